"""What this engine computes, as torch operators, for code that traces models.

    linear      the product with a packed weight: one node whose arguments are the file's tensors and the kernel's own
    product     the same by the native core and without gradients: two tensors, a third of the cost of a call
    attention   the native core's, see native.attend

torch.compile and torch.export see these nodes; outside a trace nobody does, calling the kernels is cheaper. Schemas
stand here once, for every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import kernels, native
from .core.scheme import Scheme
from .formats import gptq as gptq_format
from .kernels import cpu

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


_plain = torch.library.Library("wellrounded", "FRAGMENT")  # custom_op would add 20 us to each call
_plain.define("product(Tensor x, Tensor block, int outputs) -> Tensor")
_plain.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor")


def _product(x: torch.Tensor, block: torch.Tensor, outputs: int) -> torch.Tensor:
    # A graph traced without gradients may run where they are recorded: it gives none.
    return cpu.matmul(x.detach() if x.requires_grad else x, [block], cpu.no_dense)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float, causal: bool
) -> torch.Tensor:
    output = native.attend(q, k, v, mask, scale, causal)
    assert output is not None, "a graph was traced where the native core served, and runs where it does not"
    return output


_plain.impl("product", _product, "CPU")
_plain.impl("attention", _attention, "CPU")


@torch.library.register_fake("wellrounded::product")
def _(x: torch.Tensor, block: torch.Tensor, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("wellrounded::attention")
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float, causal: bool) -> torch.Tensor:
    batch, heads, queries, depth = q.shape
    return q.new_empty((batch, queries, heads, depth))


def _dense(layer: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    bits, group_size, symmetric, act_order, version = layer[4:]
    return dense_weight(dict(zip(_KEYS, layer)), Scheme(bits, group_size, symmetric, act_order), version, dtype)
