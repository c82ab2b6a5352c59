"""PackedWeight: what stands where a packed layer's dense weight would be, for code that looks at weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_iter, tree_map_only

from .errors import UsageError

if TYPE_CHECKING:
    from .nn import QuantLinear

# What can be asked of a PackedWeight without restoring it: these, and every attribute but _VALUES.
_FACTS = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point,
          torch.Tensor.element_size}  # fmt: skip
_VALUES = ("T", "mT", "H", "mH", "real", "imag")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = {"__set__", "__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)}


class PackedWeight(torch.Tensor):
    """Stands for the weight of a QuantLinear: has its shape, dtype and device, and its values when they are needed.

    Whatever is computed with it gives plain tensors. Multiplying by it, `F.linear(x, weight)`, is the layer's own
    product, so no dense copy outlives the call even while a graph is recorded. It cannot be written to.
    """

    layer: QuantLinear
    _is_hf_initialized = True  # transformers gives random values to what does not carry this mark

    @staticmethod
    def __new__(cls, layer: QuantLinear, dtype: torch.dtype | None = None) -> PackedWeight:
        shape, dtype = (layer.out_features, layer.in_features), dtype or layer.dtype
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=layer.qweight.device)
        made.layer = layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        target = next(iter((*args, *kwargs.values())))
        getter = func.__self__.__name__ if name == "__get__" else ""
        if isinstance(target, cls):
            if getter == "data" or func is torch.Tensor.detach:
                return target  # what is written to these is refused too
            if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype) and not kwargs:
                return cls(target.layer, args[1])
            if name == "__set__" and func.__self__.__name__ == "requires_grad" and not args[1]:
                return None
            if func is torch.Tensor.requires_grad_ and (*args[1:], *kwargs.values()) == (False,):
                return target
        if func in _FACTS or (getter and getter not in _VALUES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for written in tree_iter(_written(name, target, kwargs)):
            if isinstance(written, cls):
                raise refusal(written.layer)
        if func is F.linear and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            return args[1].layer.multiply(args[0])
        return func(*tree_map_only(cls, cls.restore, args), **tree_map_only(cls, cls.restore, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*tree_map_only(cls, cls.restore, args), **tree_map_only(cls, cls.restore, kwargs or {}))

    def restore(self) -> torch.Tensor:
        """[out, in] the values, as a plain tensor."""
        if self.layer.qweight.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self.layer.dense_weight(self.layer.dtype).to(self.dtype)


def refusal(layer: QuantLinear) -> UsageError:
    """The error for writing to the weight of this layer."""
    return UsageError(
        f"{layer.name}: its weight is packed ({layer.scheme}) and cannot be written to; call "
        "model.dequantize() first, or merge an adapter with `wellrounded merge`"
    )


def _written(name: str, target: Any, kwargs: dict) -> list:
    """What a torch function of this name changes in place."""
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or kwargs.get("inplace")
    return [kwargs.get("out"), target if in_place else None]
