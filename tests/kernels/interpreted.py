"""The kernel for GPUs, interpreted (see test_triton.py): every width and path against the dequantized weight."""

import pytest
import torch
from test_kernels import assert_is_product, inputs, make, need_of

from wellrounded.core.scheme import Scheme
from wellrounded.kernels import Need
from wellrounded.kernels import triton as kernel

SCHEMES = [
    *(Scheme(bits, group) for bits in (2, 3, 4, 8) for group in (32, 128, -1)),
    *(Scheme(bits, 64, symmetric=False) for bits in (2, 3, 4, 8)),
    *(Scheme(bits, 64, act_order=True) for bits in (3, 4)),
    Scheme(4, 16), Scheme(4, 48, symmetric=False),  # groups that are no whole blocks
]  # fmt: skip


def prepared(weight):
    return kernel.prepare(weight, need_of(weight, torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_weight_is_restored_bit_for_bit(scheme):
    weight = make(scheme, columns=192)
    assert torch.equal(kernel.restored(prepared(weight), 192, torch.float16), weight.dequantize(torch.float16))
    found, expected = kernel.restored(prepared(weight), 192, torch.bfloat16), weight.dequantize(torch.bfloat16)
    assert ((found - expected).abs() <= 2**-7 * expected.abs()).all()  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("rows", [1, 17, 64, 65])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_multiplies(scheme, rows):
    weight = make(scheme, columns=192)
    x = inputs(rows, 192, dtype=torch.float16)
    assert_is_product(kernel.matmul(x, prepared(weight), weight.dequantize), x, weight)
    x = x.bfloat16()
    y, expected = kernel.matmul(x, prepared(weight), weight.dequantize), x.float() @ weight.dequantize().T
    assert (y.float() - expected).norm() < 2**-7 * expected.norm()  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("outputs", [16, 64, 150])
@pytest.mark.parametrize("columns", [96, 1024, 1056])
def test_shares_of_the_columns_add_up(outputs, columns, monkeypatch):
    """Also where the last share has less to do, or outputs do not fill a program; counters are used again."""
    weight = make(Scheme(4, 32), rows=outputs, columns=columns)
    shares, seen = kernel._shares, []
    monkeypatch.setattr(kernel, "_shares", lambda *about: seen.append(shares(*about)) or seen[-1])
    for rows in (1, 5, 1):
        x = inputs(rows, columns, dtype=torch.float16)
        assert_is_product(kernel.matmul(x, prepared(weight), weight.dequantize), x, weight)
    assert seen == [max(1, min(16, columns // 32 // 4))] * 3
    assert all(not counter.any() for counter in kernel._counters.values())


def test_shapes_are_kept_and_other_dtypes_served():
    weight = make(Scheme(4, 32), columns=64)
    assert kernel.matmul(inputs(2, 3, 64, dtype=torch.float16), prepared(weight), weight.dequantize).shape == (2, 3, 48)
    assert kernel.matmul(inputs(0, 64, dtype=torch.float16), prepared(weight), weight.dequantize).shape == (0, 48)
    x = inputs(2, 64)
    y = kernel.matmul(x, prepared(weight), weight.dequantize)
    assert y.dtype == torch.float32 and torch.equal(y, x @ weight.dequantize().T)


def test_packed_words_take_no_more_than_the_bits():
    for bits in (2, 3, 4, 8):
        words, scales, zeros, order = prepared(make(Scheme(bits, 64), rows=48, columns=128))
        assert words.numel() * 32 == 48 * 128 * bits and words.dtype == torch.int32
        assert scales.shape == (2, 48) and not zeros.numel() and not order.numel()


def need(**changes) -> Need:
    return Need(**{"scheme": Scheme(4, 64), "in_features": 64, "out_features": 48, "device": "cpu",
                   "dtype": torch.bfloat16} | changes)  # fmt: skip


def test_it_says_where_it_cannot_serve(monkeypatch):
    assert kernel.refuses(need()) is None  # interpreted
    assert "not torch.float32" in kernel.refuses(need(dtype=torch.float32))
    monkeypatch.setattr(kernel, "_programs", lambda: None)
    assert "not installed" in kernel.refuses(need())
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "it runs on GPUs, the layer is on cpu" in kernel.refuses(need())


@pytest.mark.parametrize("which", ["few_rows", "restore"])
def test_a_device_on_which_it_is_wrong_is_noticed(which, monkeypatch):
    programs = kernel._programs()

    class Wrong:
        def __getitem__(self, grid):
            def run(*tensors, **constants):
                tensors[5 if which == "few_rows" else 4].normal_()

            return run

    class Programs:
        few_rows = Wrong() if which == "few_rows" else programs.few_rows
        restore = Wrong() if which == "restore" else programs.restore

    kernel._wrong.cache_clear()
    monkeypatch.setattr(kernel, "_programs", Programs)
    assert "computes something else" in kernel.refuses(need())
    kernel._wrong.cache_clear()


def test_a_device_on_which_it_does_not_run_is_noticed(monkeypatch):
    class Programs:
        @property
        def few_rows(self):
            raise RuntimeError("no such device\nat all")

    kernel._wrong.cache_clear()
    monkeypatch.setattr(kernel, "_programs", Programs)
    assert "does not run on this cpu (RuntimeError: no such device)" in kernel.refuses(need())
    kernel._wrong.cache_clear()
