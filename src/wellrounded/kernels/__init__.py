"""Kernels: ways to multiply by a quantized weight, in order of preference, each stating its own limits.

A kernel is a module with a NAME and three functions. `refuses(need)` is None, or one sentence that says why it cannot
serve; `prepare(weight, need)` turns a QuantizedWeight into the kernel's own layout, as plain tensors; `matmul`
multiplies by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from ..core.scheme import Scheme
from ..core.weight import QuantizedWeight
from ..errors import UsageError

Dense = Callable[[torch.dtype], torch.Tensor]  # the dequantized weight [out, in], made on demand


@dataclass(frozen=True)
class Need:
    """What a layer asks of a kernel: its storage, its shape, and where and in which dtype it will run.

    `even` is QuantizedWeight.evenly_grouped: without it, sorting the columns by group does not make full groups.
    """

    scheme: Scheme
    in_features: int
    out_features: int
    device: str
    dtype: torch.dtype
    even: bool = True


class Kernel(Protocol):
    """A module of this package; see the package's own description."""

    NAME: str

    def refuses(self, need: Need) -> str | None: ...

    def prepare(self, weight: QuantizedWeight, need: Need) -> list[torch.Tensor]: ...

    def matmul(self, x: torch.Tensor, prepared: Sequence[torch.Tensor], dense: Dense) -> torch.Tensor:
        """`x` [..., in] times the weight's transpose: [..., out], in the dtype of `x`; never differentiated."""
        ...


@cache
def table() -> tuple[Kernel, ...]:
    """Every kernel, the preferred ones first; the last one never refuses."""
    from . import cpu, reference, torch_int4, triton

    return triton, cpu, torch_int4, reference  # type: ignore[return-value]


def named(name: str) -> Kernel:
    """The kernel of this name. Raises UsageError with all names if there is none such."""
    for kernel in table():
        if kernel.NAME == name:
            return kernel
    raise UsageError(f"no kernel is called {name!r}; there are {', '.join(k.NAME for k in table())}")


def select(need: Need, name: str | None = None) -> Kernel:
    """The first kernel that does not refuse, or the named one.

    Raises UsageError with the kernel's own sentence if the named one refuses, or if there is none such.
    """
    if name is None:
        return next(kernel for kernel in table() if kernel.refuses(need) is None)
    kernel = named(name)
    if reason := kernel.refuses(need):
        raise UsageError(f"kernel {name!r} was asked for, but {reason}; leave the choice to wellrounded")
    return kernel


def explain(need: Need) -> list[tuple[str, str | None]]:
    """(name, refusal or None) of every kernel, in order of preference: why a layer runs on what it runs on."""
    return [(kernel.NAME, kernel.refuses(need)) for kernel in table()]
