"""A GPU that is not there: tensors said to be on it lie on the CPU, and whoever mixes the two is told, as a GPU would.

`gpu()` makes torch believe in one device, "cuda". Every call is watched: what is computed from its tensors is on it,
`.to()` moves, and an operator that is given tensors of both devices, or numpy one of the GPU's, raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

GPU = torch.device("cuda", 0)
MEMORY = 64 * 2**30
MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
ACROSS = {  # which may be given tensors of both
    torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch._has_compatible_shallow_copy_type,
}  # fmt: skip
LOOKS = {torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__}


_there = WeakTensorKeyDictionary()


def is_there(tensor: torch.Tensor) -> bool:
    """Whether it is said to be on the GPU."""
    return _there.get(tensor, False)


def _put(value: Any, there: bool) -> Any:
    if isinstance(value, torch.Tensor):
        _there[value] = there
    return value


def _cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"


class Watch(TorchFunctionMode):
    """Sees every call of torch while it is on."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        if func in LOOKS:
            found = func(*args)
            there = is_there(args[0]) and args[0].is_cpu
            return (GPU if there else found) if isinstance(found, torch.device) else there
        if func == torch.Tensor.data.__set__:
            _put(args[0], is_there(args[1]))
            return func(*args)
        if func in MOVES:
            return self._moved(func, args, kwargs)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and is_there(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        there = any(map(is_there, tensors))
        sized = {is_there(each) for each in tensors if each.ndim and each.device.type != "meta"}
        if len(sized) > 1 and func not in ACROSS:
            shapes = [(tuple(each.shape), "cuda" if is_there(each) else "cpu") for each in tensors]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {shapes}")
        if func is torch.Tensor.__getitem__ and not is_there(args[0]) and there:
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        if kwargs.get("device") is not None:
            there = _cuda(kwargs["device"])
            if kwargs.get("generator") is not None and there:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            kwargs["device"] = "cpu" if there else kwargs["device"]
        found = func(*args, **kwargs)
        return tree_map(lambda each: each if any(each is old for old in tensors) else _put(each, there), found)

    def _moved(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        this, *rest = args
        there, other = is_there(this), kwargs.get("other")
        for each in (*rest, kwargs.get("device"), other):
            if isinstance(each, torch.Tensor):
                there = is_there(each)
            elif isinstance(each, (str, torch.device)):
                there = _cuda(each)
        there = func is torch.Tensor.cuda or (there and func is not torch.Tensor.cpu)
        here = ["cpu" if _cuda(each) else each for each in rest]
        kwargs = {key: "cpu" if _cuda(each) else each for key, each in kwargs.items()}
        found = this.to(*here, **kwargs) if func is torch.Tensor.to else this
        if found is this and there != is_there(this):
            found = this.clone()
        return found if found is this else _put(found, there)


def _parameter(new: Any) -> Any:
    def made(cls: Any, data: torch.Tensor | None = None, requires_grad: bool = True) -> Any:
        return _put(new(cls, data, requires_grad), data is not None and is_there(data))

    return made


@contextmanager
def gpu() -> Iterator[None]:
    """While it lasts, there is one."""
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY), "get_device_name": lambda device=None: "a GPU",
        "synchronize": lambda device=None: None, "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None, "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None, "set_device": lambda device: None,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "get_rng_state": lambda device=None: torch.zeros(1), "set_rng_state": lambda state, device=None: None,
        "device_of": lambda tensor: nullcontext(), "manual_seed_all": lambda seed: None, "is_initialized": lambda: True,
    }  # fmt: skip
    parameter = torch.nn.Parameter
    with (
        patch.multiple(torch.cuda, **answers),
        patch.object(torch.Tensor, "pin_memory", lambda self: self),  # other threads are not watched
        patch.object(parameter, "__new__", _parameter(parameter.__new__)),
        Watch(),
    ):
        yield
