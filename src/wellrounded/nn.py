"""QuantLinear: a linear layer whose weight stays as the file has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import kernels
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import CheckpointError
from .formats import gptq as gptq_format
from .kernels import cpu, reference
from .ops import dense_weight
from .packed_weight import PackedWeight, refusal

KEYS = ("qweight", "qzeros", "scales", "g_idx")


class QuantLinear(nn.Linear):
    """`y = x W^T + b` with W packed in the GPTQ format.

    The buffers are the file's tensors: qweight, qzeros, scales, g_idx (see formats.gptq.layout) and bias; there are no
    parameters. `bind` chooses a kernel once they are loaded; until then, the first call binds it. It is an nn.Linear
    for everyone who looks for linear layers to put an adapter on, and `weight` can be read like one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        version: str,
        bias: bool,
        name: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight that is not there
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.version, self.name = scheme, version, name
        self.dtype = dtype or torch.get_default_dtype()  # of `weight`, for those who read it
        for key, (shape, kind) in gptq_format.layout(scheme, in_features, out_features).items():
            self.register_buffer(key, torch.zeros(shape, dtype=kind))
        if bias:
            self.register_buffer("bias", torch.zeros(out_features, dtype=dtype))
        else:
            self.bias = None  # a plain attribute is found ten times as fast as an empty buffer
        self.wanted_kernel: str | None = None
        self._kernel: kernels.Kernel | None = None
        self._prepared: list[torch.Tensor] = []
        self._bound_to: torch.device | None = None
        self.register_load_state_dict_post_hook(_unbind)

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """[out, in], restored when something is computed with it; read-only."""
        return PackedWeight(self)

    @weight.setter
    def weight(self, value: PackedWeight) -> None:  # PEFT assigns it to itself when it takes an adapter off
        if not isinstance(value, PackedWeight) or value.layer is not self:
            raise refusal(self)

    @property
    def kernel(self) -> str:
        """The name of the kernel it is bound to, "" before."""
        return self._kernel.NAME if self._kernel else ""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The file's tensors of the weight."""
        return {key: getattr(self, key) for key in KEYS}

    def quantized_weight(self) -> QuantizedWeight:
        """The weight that the buffers hold. Raises CheckpointError if they are damaged."""
        return gptq_format.from_tensors(
            self.tensors(), self.scheme, self.in_features, self.out_features, self.version, self.name
        )

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] dequantized weight; the buffers are checked unless the layer is bound, which has done it."""
        if self._kernel is None:
            return self.quantized_weight().dequantize(dtype)
        return dense_weight(self.tensors(), self.scheme, self.version, dtype)

    def bind(self, dtype: torch.dtype) -> None:
        """Check the buffers, choose the kernel for activations of `dtype` on the device they are on, and prepare it."""
        if self.qweight.device.type == "meta":
            raise CheckpointError(f"{self.name}: its tensors are not loaded yet")
        weight = self.quantized_weight()
        device = self.qweight.device
        need = kernels.Need(
            weight.scheme, self.in_features, self.out_features, device.type, dtype, weight.evenly_grouped
        )
        kernel = kernels.select(need, self.wanted_kernel)
        self._prepared = kernel.prepare(weight, need)
        self.scheme, self.dtype, self._bound_to = weight.scheme, dtype, device
        self._kernel = kernel  # last: to another thread the layer is bound as soon as this is there

    def read_in_place(self) -> None:
        """Multiply from the buffers themselves, wherever they are at each call: for layers that are offloaded."""
        self.scheme = Scheme(self.scheme.bits, self.scheme.group_size, self.scheme.symmetric, act_order=True)
        self._kernel, self._prepared, self._bound_to = reference, [], None  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of `x`, or in autocast's where that is on."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, differentiable in x, without the bias."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():
            return self._traced(x)
        if self._kernel is None or (self._prepared and self._bound_to != x.device):
            self.bind(x.dtype)
        return _Product.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T by the bound kernel, without gradients."""
        assert self._kernel is not None
        return self._kernel.matmul(x, self._prepared, self.dense_weight)

    def _traced(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernel is cpu and not (x.requires_grad and torch.is_grad_enabled()):
            return torch.ops.wellrounded.product(x, self._prepared[0], self.out_features)
        scheme = self.scheme
        act_order = scheme.act_order or self._kernel is None  # only binding tells whether g_idx is what it should be
        return torch.ops.wellrounded.linear(
            x, self._prepared, self.kernel or reference.NAME, self.qweight, self.qzeros, self.scales, self.g_idx,
            scheme.bits, scheme.group_size, scheme.symmetric, act_order, self.version,
        )  # fmt: skip

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantLinear:
        """Moves everything; scales keep their own dtype, and a bound layer is bound again where it arrives."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        if self._bound_to not in (None, self.qweight.device):
            _unbind(self)
            if self.qweight.device.type != "meta":
                self.bind(self.dtype)
        return self

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles are unbound: a kernel's layout belongs to these buffers on this machine."""
        return {**self.__dict__, "_kernel": None, "_prepared": [], "_bound_to": None}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}, kernel={self.kernel or 'unbound'}"


def _unbind(layer: QuantLinear, _keys: object = None) -> None:
    """After other tensors were loaded: the kernel that was bound has its own copy of the old ones."""
    layer._kernel, layer._prepared, layer._bound_to = None, [], None


class _Product(torch.autograd.Function):
    """x W^T, differentiable in x: the dense weight is restored for each direction and never kept between them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
        ctx.tensors, ctx.storage = layer.tensors(), (layer.scheme, layer.version)  # offloading takes them away again
        return layer.product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ dense_weight(ctx.tensors, *ctx.storage, gradient.dtype), None
