"""The kernel for GPUs, interpreted on the CPU: in a process of its own, where triton was not imported otherwise."""

from pathlib import Path

import pytest

from triton_programs import compiled, pass_interpreted


def test_its_programs_compute_what_they_are_to():
    pass_interpreted(Path(__file__).with_name("interpreted.py"))


@pytest.mark.parametrize(("generation", "dtype"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
@pytest.mark.parametrize("bits", [3, 4])
def test_they_compile_for_gpus_that_are_not_here(generation, dtype, bits, tmp_path, monkeypatch):
    """To machine code, by the assembler that comes with triton."""
    pytest.importorskip("triton")
    from wellrounded.kernels import triton_products as programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = {"x": dtype, "y": dtype, "dense": dtype, "words": "i32", "scales": "fp16", "zeros": "u8", "order": "i32"}
    tensors |= {"parts": "fp32", "counters": "i32"}
    constants = {"BITS": bits, "CHUNK": 2, "MIDDLE": -1, "ORDERED": True, "ROWS": 16, "OUTPUTS": 64, "SPLIT": 2}
    constants |= {"WIDE": False}
    for program in (programs.packed, programs.restore):
        made = compiled(program, tensors, constants, generation)
        wants = program is programs.packed and generation >= 80  # triton has no tensor cores of Turing any more
        assert made.asm["cubin"] and ("mma" in made.asm["ptx"]) == wants
