"""A model's parameters: from a source into memory, and back to the meta device, where they hold none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, NumericsError

Read = Callable[[str], "torch.Tensor | None"]  # a tensor of the source by its name in the model; None if it has none
Change = Callable[[torch.Tensor], torch.Tensor]


def changed(read: Read, changes: Mapping[str, Change]) -> Read:
    """The same tensors, some of them with other values, by their names in the model."""

    def other(name: str) -> torch.Tensor | None:
        value = read(name)
        return changes[name](value) if value is not None and name in changes else value

    return other


class Ahead:
    """The same tensors, those that are announced read by a thread of its own: the next block's, while a GPU computes.

    They lie in pinned memory then, from where a GPU fetches them itself. `read` may be called by both threads at once;
    what cannot be read fails where it is asked for.
    """

    def __init__(self, read: Read) -> None:
        self._read, self._coming = read, dict[str, Future]()
        self._pool = ThreadPoolExecutor(1, "read ahead")

    def announce(self, names: Iterable[str]) -> None:
        """These will be asked for soon, once each; what was announced before and never asked for is forgotten."""
        for future in self._coming.values():
            future.cancel()
        self._coming = {name: self._pool.submit(self._pinned, name) for name in names}

    def __call__(self, name: str) -> torch.Tensor | None:
        coming = self._coming.pop(name, None)
        return self._read(name) if coming is None else coming.result()

    def _pinned(self, name: str) -> torch.Tensor | None:
        value = self._read(name)
        return value if value is None or not torch.cuda.is_available() else value.pin_memory()


def materialize(
    module: nn.Module, read: Read, prefix: str = "", device: torch.device | str = "cpu", leave: tuple[str, ...] = ()
) -> None:
    """Give every meta parameter below `module` its values; tied ones are read once and stay tied.

    `prefix` is the module's own name with a dot; tensors whose full name starts with one of `leave` are left alone.
    Persistent buffers come from the source, the others were computed when the model was built. Raises
    CheckpointError for a tensor that the source lacks or has in another shape.
    """
    made: dict[int, nn.Parameter] = {}
    aliases: dict[int, list[str]] = {}
    places = []
    for path, owner in module.named_modules():
        base = f"{prefix}{path}." if path else prefix
        if leave and base.startswith(leave):
            continue
        for attr, buffer in owner._buffers.items():
            stored = None if buffer is None or attr in owner._non_persistent_buffers_set else read(base + attr)
            if buffer is not None:
                owner._buffers[attr] = (buffer if stored is None else stored.to(buffer.dtype)).to(device)
        for attr, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                places.append((owner, attr, parameter))
                aliases.setdefault(id(parameter), []).append(base + attr)
    for owner, attr, parameter in places:
        if id(parameter) not in made:
            names = aliases[id(parameter)]
            value = next((v for v in map(read, names) if v is not None), None)
            if value is None:
                raise CheckpointError(f"{names[0]}: the source has no such tensor, but the model needs it")
            if value.shape != parameter.shape:
                needs, has = tuple(parameter.shape), tuple(value.shape)
                raise CheckpointError(f"{names[0]}: the model needs shape {needs}, the source has {has}")
            value = value.to(device, non_blocking=True)  # which waits unless the memory is pinned
            if not all(bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(2**24)):
                raise NumericsError(f"{names[0]}: the source's tensor holds NaN or Inf; download the model again")
            made[id(parameter)] = nn.Parameter(value.to(parameter.dtype), requires_grad=False)
        owner._parameters[attr] = made[id(parameter)]


def meta_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` whose parameters hold no memory: on the meta device, in `dtype` where the model has its own.

    Buffers are copied with their values (rotary tables are computed, not stored). The model itself is untouched.
    """
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        kept = dtype if parameter.dtype == usual else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta", dtype=kept), requires_grad=False)
    return copy.deepcopy(model, memo)


def release(module: nn.Module, prefix: str = "", leave: tuple[str, ...] = ()) -> None:
    """Put the parameters of a module back on the meta device, tied ones still tied; its buffers are few and stay.

    `prefix` and `leave` are those of `materialize`.
    """
    empty: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        if leave and (f"{prefix}{path}." if path else prefix).startswith(leave):
            continue
        for attr, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in empty:
                    empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                owner._parameters[attr] = empty[id(parameter)]


def put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter of a module a new value, on its device and in its dtype; the old tensor is not written to."""
    owner, _, leaf = name.rpartition(".")
    old = module.get_parameter(name)
    setattr(
        module.get_submodule(owner), leaf, nn.Parameter(value.detach().to(old.device, old.dtype), requires_grad=False)
    )
