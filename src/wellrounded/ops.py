"""`wellrounded::linear`: the product with a packed weight as one torch operator, for code that traces models.

torch.compile and torch.export see one node whose arguments are the file's tensors and the kernel's own; outside a
trace QuantLinear calls the kernel itself, which is cheaper. The schema stands here once, for every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import kernels
from .core.scheme import Scheme
from .formats import gptq as gptq_format

_LAYER = (
    "Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx, "
    "int bits, int group_size, bool symmetric, bool act_order, str version"
)
_KEYS = ("qweight", "qzeros", "scales", "g_idx")


def dense_weight(tensors: dict[str, torch.Tensor], scheme: Scheme, version: str, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] the weight that the file's tensors stand for, unchecked: they were checked when the layer was bound."""
    weight = gptq_format.decode(tensors, scheme, version)
    rows, columns = weight.shape
    groups = weight.scales.shape[1]
    if scheme.act_order or scheme.columns_per_group(columns) * groups != columns:
        return weight.dequantize(dtype)
    # Whole groups side by side: the same values without spreading scales and zeros over the columns first.
    steps = weight.codes.reshape(rows, groups, -1).float() - weight.zeros.float().unsqueeze(-1)
    return (steps * weight.scales.float().unsqueeze(-1)).to(dtype).reshape(rows, columns)


@torch.library.custom_op(
    "wellrounded::linear", mutates_args=(), schema=f"(Tensor x, Tensor[] prepared, str kernel, {_LAYER}) -> Tensor"
)
def linear(x: torch.Tensor, prepared: Sequence[torch.Tensor], kernel: str, *layer: Any) -> torch.Tensor:
    """[..., in] to [..., out] in the dtype of `x`, by the kernel of this name."""
    return kernels.named(kernel).matmul(x, prepared, lambda dtype: _dense(layer, dtype))


@torch.library.custom_op(
    "wellrounded::linear_backward", mutates_args=(), schema=f"(Tensor gradient, {_LAYER}) -> Tensor"
)
def linear_backward(gradient: torch.Tensor, *layer: Any) -> torch.Tensor:
    """[..., out] to [..., in]: the gradient of `x`; the dense weight lives during this call only."""
    return gradient @ _dense(layer, gradient.dtype)


@linear.register_fake
def _(x: torch.Tensor, prepared: Sequence[torch.Tensor], kernel: str, *layer: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], layer[0].shape[1]))


@linear_backward.register_fake
def _(gradient: torch.Tensor, *layer: Any) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], layer[3].shape[0]))


def _remember(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, prepared, _, *layer = inputs
    ctx.save_for_backward(*layer[:4])
    ctx.prepared, ctx.storage = len(prepared), layer[4:]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    of_x = torch.ops.wellrounded.linear_backward(gradient, *ctx.saved_tensors, *ctx.storage)
    return of_x, [None] * ctx.prepared, *(None,) * 10


linear.register_autograd(_backward, setup_context=_remember)


def _dense(layer: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    bits, group_size, symmetric, act_order, version = layer[4:]
    return dense_weight(dict(zip(_KEYS, layer)), Scheme(bits, group_size, symmetric, act_order), version, dtype)
