"""torch's own int4 kernel for CPUs: for a few rows, eight times as fast as the dense product in bfloat16.

It computes `(code - 8) * scale + zero` with scales and zeros in the dtype of the input, so in bfloat16 a scale keeps
8 bits of its 11. Codes of 2 and 3 bits, and groups of other sizes, are expressed in the widths it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..core.weight import QuantizedWeight
from . import reference

if TYPE_CHECKING:
    from . import Dense, Need

NAME = "torch-int4"
GROUPS = (256, 128, 64, 32)
FEW_ROWS = 24  # beyond this many rows the dense product is faster (measured: `wellrounded bench`)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def refuses(need: Need) -> str | None:
    """Why this layer cannot use it, as a sentence."""
    if need.device != "cpu":
        return f"it runs on the CPU, the layer is on {need.device}"
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} does not have it (2.6 and later do)"
    if need.dtype not in DTYPES:
        return f"it computes in {', '.join(map(str, DTYPES))}, not {need.dtype}"
    if need.scheme.bits > 4:
        return f"it holds at most 4 bits, the layer has {need.scheme.bits}"
    if need.out_features % 16:
        return f"it needs outputs in multiples of 16, the layer has {need.out_features}"
    if not need.even:
        return "it needs groups of equal size, the group index of this layer makes others"
    if _group(need) is None:
        width = need.scheme.columns_per_group(need.in_features)
        return f"no group of {GROUPS} divides both {need.in_features} inputs and their groups of {width}"
    return None


def prepare(weight: QuantizedWeight, need: Need) -> list[torch.Tensor]:
    """Packed codes, scales and zeros in the dtype of the input, and the columns' order unless it is the stored one."""
    group = _group(need)
    assert group is not None, "prepare is called only when refuses() is None"
    order = None if weight.trivially_grouped else torch.argsort(weight.group_index.long(), stable=True)
    codes = (weight.codes if order is None else weight.codes[:, order]).int()
    width = weight.scheme.columns_per_group(need.in_features)
    repeats = width // group
    zeros = weight.zeros.int()
    # Below 4 bits every code fits after moving its zero point to the kernel's own 8, and no zero needs storing.
    shift = 8 - zeros if weight.scheme.bits < 4 else torch.zeros_like(zeros)
    codes = codes + shift.repeat_interleave(width, 1)
    scales = weight.scales.float()
    offsets = (8 - zeros - shift) * scales
    both = torch.stack([scales, offsets], -1).repeat_interleave(repeats, 1).transpose(0, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return [packed, both.contiguous().to(need.dtype), *([] if order is None else [order])]


def matmul(x: torch.Tensor, prepared: Sequence[torch.Tensor], dense: Dense) -> torch.Tensor:
    """[..., in] to [..., out]; many rows, none, and another dtype than was prepared take the reference way."""
    packed, scales_and_zeros, *order = prepared
    columns = x.shape[-1]
    rows = x.numel() // columns
    if not 0 < rows <= FEW_ROWS or x.dtype != scales_and_zeros.dtype:
        return reference.matmul(x, (), dense)
    flat = x.reshape(rows, columns) if not order else x.reshape(rows, columns)[:, order[0]]
    group = columns // scales_and_zeros.shape[0]
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat.contiguous(), packed, group, scales_and_zeros)
    return out.reshape(*x.shape[:-1], -1)


def _group(need: Need) -> int | None:
    """The kernel's group that tiles the layer's: equal scales are repeated."""
    width = need.scheme.columns_per_group(need.in_features)
    whole = need.in_features % width == 0
    return next((g for g in GROUPS if whole and width % g == 0), None)
