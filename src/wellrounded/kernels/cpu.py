"""The native core's kernel for CPUs: a few rows stream the packed weights once, many rows restore them for torch.

Products are of whole numbers with the inputs, exact, summed in float32 within a group and scaled once per group.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .. import native
from ..core.weight import QuantizedWeight

if TYPE_CHECKING:
    from . import Dense, Need

NAME = "cpu"
FEW_ROWS = 16  # beyond this many rows restoring the weight for a dense product is faster (`wellrounded bench`)
OUTPUTS_AT = 16  # where a block's header says how many outputs there are; looked up in every call, so not by torch
SLAB_BYTES = 16 * 2**20
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as csrc/wellrounded.h numbers them


def refuses(need: Need) -> str | None:
    """Why this layer cannot use it, as a sentence."""
    if need.device != "cpu":
        return f"it runs on the CPU, the layer is on {need.device}"
    if need.dtype not in (*DTYPES, torch.float16):
        return f"it computes in {', '.join(map(str, DTYPES))}, not {need.dtype}"
    return native.missing()


def prepare(weight: QuantizedWeight, need: Need) -> list[torch.Tensor]:
    """One block of bytes, laid out as csrc/wellrounded.h says."""
    core = native.library()
    assert core is not None, "prepare is called only when refuses() is None"
    outputs, inputs = weight.shape
    groups, bits = weight.scales.shape[1], weight.scheme.bits
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    zeros = None if (weight.zeros == weight.scheme.midpoint).all() else weight.zeros.contiguous()
    if weight.trivially_grouped:
        index, width = None, weight.scheme.columns_per_group(inputs)
    else:
        index = weight.group_index.int().contiguous()
        width = int(torch.bincount(index.long(), minlength=groups).max())
    shape = (outputs, inputs, bits, groups, min(width, inputs))
    block = torch.empty(core.wr_bytes(*shape, zeros is not None, index is not None), dtype=torch.uint8)
    native.on_large_pages(block)
    pointers = (t if t is None else t.data_ptr() for t in (codes, scales, zeros, index))
    if core.wr_pack(block.data_ptr(), *shape, *pointers):
        raise RuntimeError(f"the native core cannot pack {weight.scheme} of {outputs} x {inputs}")
    return [block]


def no_dense(dtype: torch.dtype) -> torch.Tensor:
    """For callers of `matmul` that have no dense weight: this kernel restores its own."""
    raise AssertionError("the native core's kernel never asks for the dense weight")


def matmul(x: torch.Tensor, prepared: Sequence[torch.Tensor], dense: Dense) -> torch.Tensor:
    """[..., in] to [..., out]."""
    (block,) = prepared
    core = native.library()
    assert core is not None
    if x.dtype == torch.float16:
        return matmul(x.float(), prepared, dense).half()
    inputs = x.shape[-1]
    outputs, rows = ctypes.c_int64.from_address(block.data_ptr() + OUTPUTS_AT).value, x.numel() // inputs
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], outputs)
    kind = DTYPES[x.dtype]
    if rows <= FEW_ROWS:
        core.wr_matmul(block.data_ptr(), x.data_ptr(), y.data_ptr(), rows, kind)
        return y
    # A slab of outputs at a time: restored into memory that is in cache, and used while it is there.
    slab = max(16, min(outputs, SLAB_BYTES // (inputs * x.element_size()) // 16 * 16))
    weight = x.new_empty(slab, inputs)
    flat = y.view(rows, outputs)
    for begin in range(0, outputs, slab):
        end = min(begin + slab, outputs)
        core.wr_restore(block.data_ptr(), weight.data_ptr(), kind, begin, end)
        torch.mm(x.view(rows, inputs), weight[: end - begin].T, out=flat[:, begin:end])
    return y
