"""The kernel for GPUs, interpreted on the CPU: in a process of its own, where triton was not imported otherwise."""

from pathlib import Path

import pytest

import machine_code
from triton_programs import pass_interpreted


def test_its_programs_compute_what_they_are_to():
    pass_interpreted(Path(__file__).with_name("interpreted.py"))


@pytest.mark.parametrize(("generation", "dtype"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
@pytest.mark.parametrize("bits", [3, 4])
def test_they_compile_for_gpus_that_are_not_here(generation, dtype, bits, tmp_path, monkeypatch):
    """To machine code, by the assembler that comes with triton."""
    pytest.importorskip("triton")
    from wellrounded.kernels import triton_products as programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = machine_code.TENSORS | dict.fromkeys(("x", "y", "dense"), dtype)
    constants = {"BITS": bits, "CHUNK": 2, "MIDDLE": -1, "ROWS": 16, "TIMES": 2, "OUTPUTS": 64}
    constants |= {"WIDE": False}
    for program in (programs.packed, programs.restore):
        made = machine_code.compiled(program, tensors, constants, generation)
        wants = program is programs.packed and generation >= 80  # triton has no tensor cores of Turing any more
        assert made.asm["cubin"] and ("mma" in made.asm["ptx"]) == wants


def test_weights_are_restored_where_a_tensor_core_takes_them(tmp_path, monkeypatch):
    """4 bits: nothing restored goes through shared memory, nothing is converted, and there is little else."""
    pytest.importorskip("triton")
    from wellrounded.kernels import triton_products as programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for generation, product, most in ((90, "HGMMA", 3), (80, "HMMA", 5)):
        found = machine_code.turn(programs, bits=4, rows=16, config=programs.FEW[2], generation=generation)
        assert found.per_weight < most and found.counts[product]
        assert not {"I2F", "LDL", "STL"} & found.counts.keys() and not found.stack_bytes
        assert found.counts["STS"] <= 2, "scales alone"
