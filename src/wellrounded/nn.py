"""QuantLinear: a linear layer whose weight stays as the file has it."""

from __future__ import annotations

import torch
from torch import nn

from . import kernels
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import CheckpointError
from .formats import gptq as gptq_format


class QuantLinear(nn.Module):
    """`y = x W^T + b` with W packed in the GPTQ format.

    The buffers are the file's tensors: qweight, qzeros, scales, g_idx (see formats.gptq.layout) and bias. `bind`
    chooses a kernel once they are loaded; until then, and after the layer has moved to another device, the first call
    binds it.
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
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.version, self.name = scheme, version, name
        for key, (shape, kind) in gptq_format.layout(scheme, in_features, out_features).items():
            self.register_buffer(key, torch.zeros(shape, dtype=kind))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.wanted_kernel: str | None = None
        self._matmul: kernels.Matmul | None = None
        self._bound_to: tuple[torch.device, torch.dtype] | None = None
        self.kernel = ""
        self.register_load_state_dict_post_hook(_unbind)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight that the buffers hold. Raises CheckpointError if they are damaged."""
        tensors = {key: getattr(self, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        return gptq_format.from_tensors(
            tensors, self.scheme, self.in_features, self.out_features, self.version, self.name
        )

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] dequantized weight."""
        return self.quantized_weight().dequantize(dtype)

    def bind(self, dtype: torch.dtype) -> None:
        """Choose the kernel for activations of `dtype` on the device where the buffers are now, and prepare it."""
        if self.qweight.device.type == "meta":
            raise CheckpointError(f"{self.name}: its tensors are not loaded yet")
        weight = self.quantized_weight()
        device = self.qweight.device
        need = kernels.Need(
            weight.scheme, self.in_features, self.out_features, device.type, dtype, weight.evenly_grouped
        )
        kernel = kernels.select(need, self.wanted_kernel)
        self._matmul = kernel.prepare(weight, need)
        self.kernel, self._bound_to = kernel.NAME, (device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of `x`."""
        if self._matmul is None or self._bound_to is None or self._bound_to[0] != x.device:
            self.bind(x.dtype)
        assert self._matmul is not None
        y = self._matmul(x, self.dense_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles are unbound: a kernel's layout belongs to these buffers on this machine."""
        return {**self.__dict__, "_matmul": None, "_bound_to": None, "kernel": ""}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}, kernel={self.kernel or 'unbound'}"


def _unbind(layer: QuantLinear, _keys: object) -> None:
    """After other tensors were loaded: the kernel that was bound has its own copy of the old ones."""
    layer._matmul, layer._bound_to, layer.kernel = None, None, ""
