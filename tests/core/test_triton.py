"""The solver's programs for GPUs: interpreted in a process of its own, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wellrounded import native
from wellrounded.core import engines
from wellrounded.core import triton as programs


def test_they_compute_what_they_are_to():
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_a_cpu_has_the_native_core_or_torch():
    x = torch.zeros(4, 4)
    assert not programs.serves(x) and engines.engine(x) is (native if native.serves(x) else None)
    assert engines.engine(x.double()) is None
    assert engines.named("cpu") == ("native" if native.serves(x) else "torch")


PROGRAMS = {
    "sweep": (
        dict.fromkeys(("weights", "target", "steps", "feedback", "scales", "low", "errors"), "*fp32"),
        {"COLUMNS": 128, "PANEL": 128, "OUTPUTS": 32},
        1,
    ),
    "search": (
        dict.fromkeys(("weights", "energies", "shares", "scales", "zeros"), "*fp32"),
        {"SHARES": 31, "BITS": 4, "SYMMETRIC": False, "ROWS": 32, "WIDTH": 128},
        4,
    ),
    "product": (
        {"a": "*bf16", "b": "*bf16", "total": "*fp32"},
        {"TRIANGLE": True, "LEFTS": 128, "RIGHTS": 128, "TOKENS": 64, "WIDE": False},
        8,
    ),
}


@pytest.mark.parametrize("generation", [75, 80, 90])
@pytest.mark.parametrize("name", PROGRAMS)
def test_they_compile_for_gpus_that_are_not_here(name, generation, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wellrounded.core import triton_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors, constants, warps = PROGRAMS[name]
    if generation == 75:
        tensors = {key: kind.replace("bf16", "fp16") for key, kind in tensors.items()}
    program = getattr(triton_programs, name)
    kinds = {key: tensors.get(key, "constexpr" if key in constants else "i32") for key in program.arg_names}
    source = ASTSource(program, kinds, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options={"num_warps": warps})
    assert made.asm["cubin"] and ("mma" in made.asm["ptx"]) == (name == "product" and generation >= 80)
    assert made.metadata.shared <= 64 * 1024 or generation >= 80, "more than Turing has"
