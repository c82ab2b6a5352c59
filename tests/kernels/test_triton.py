"""The kernel for GPUs, interpreted on the CPU: in a process of its own, where triton was not imported otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_its_programs_compute_what_they_are_to():
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("generation", "dtype"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
@pytest.mark.parametrize("bits", [3, 4])
def test_they_compile_for_gpus_that_are_not_here(generation, dtype, bits, tmp_path, monkeypatch):
    """To machine code, by the assembler that comes with triton."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wellrounded.kernels import triton_products as programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = {"x": dtype, "y": dtype, "dense": dtype, "words": "i32", "scales": "fp16", "zeros": "u8", "order": "i32"}
    tensors |= {"parts": "fp32", "counters": "i32"}
    constants = {"BITS": bits, "CHUNK": 2, "MIDDLE": -1, "ORDERED": True, "ROWS": 16, "OUTPUTS": 64, "SPLIT": 2}
    constants |= {"WIDE": False}
    for program in (programs.packed, programs.restore):
        own = {name: value for name, value in constants.items() if name in program.arg_names}
        kinds = {name: f"*{tensors[name]}" if name in tensors else "i32" for name in program.arg_names}
        kinds |= dict.fromkeys(own, "constexpr")
        made = triton.compile(ASTSource(program, kinds, constexprs=own), target=GPUTarget("cuda", generation, 32))
        wants = program is programs.packed and generation >= 80  # triton has no tensor cores of Turing any more
        assert made.asm["cubin"] and ("mma" in made.asm["ptx"]) == wants
