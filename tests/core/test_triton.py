"""The solver's programs for GPUs: interpreted in a process of its own, and compiled for GPUs that are not here."""

from pathlib import Path

import pytest
import torch

from machine_code import compiled
from triton_programs import pass_interpreted
from wellrounded import native
from wellrounded.core import engines
from wellrounded.core import triton as programs


def test_they_compute_what_they_are_to():
    pass_interpreted(Path(__file__).with_name("interpreted.py"))


def test_a_cpu_has_the_native_core_or_torch():
    x = torch.zeros(4, 4)
    assert not programs.serves(x) and engines.engine(x) is (native if native.serves(x) else None)
    assert engines.engine(x.double()) is None
    assert engines.named("cpu") == ("native" if native.serves(x) else "torch")


PROGRAMS = {
    "sweep": (
        dict.fromkeys(("weights", "target", "steps", "feedback", "scales", "low", "errors"), "fp32"),
        {"COLUMNS": 128, "PANEL": 128, "OUTPUTS": 32},
        1,
    ),
    "search": (
        dict.fromkeys(("weights", "energies", "shares", "scales", "zeros"), "fp32"),
        {"SHARES": 31, "BITS": 4, "SYMMETRIC": False, "ROWS": 32, "WIDTH": 128},
        4,
    ),
    "product": (
        {"a": "bf16", "b": "bf16", "total": "fp32"},
        {"TRIANGLE": True, "LEFTS": 128, "RIGHTS": 128, "TOKENS": 64, "WIDE": False},
        8,
    ),
}


@pytest.mark.parametrize("generation", [75, 80, 90])
@pytest.mark.parametrize("name", PROGRAMS)
def test_they_compile_for_gpus_that_are_not_here(name, generation, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from wellrounded.core import triton_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors, constants, warps = PROGRAMS[name]
    if generation == 75:
        tensors = {key: kind.replace("bf16", "fp16") for key, kind in tensors.items()}
    made = compiled(getattr(triton_programs, name), tensors, constants, generation, num_warps=warps)
    assert made.asm["cubin"] and ("mma" in made.asm["ptx"]) == (name == "product" and generation >= 80)
    assert made.metadata.shared <= 64 * 1024 or generation >= 80, "more than Turing has"
