"""Who runs the solver's inner loops: the native core on CPUs, Triton's programs on GPUs, torch where neither does."""

from __future__ import annotations

from types import ModuleType

import torch

from .. import native
from . import triton

ALL = (native, triton)


def engine(*tensors: torch.Tensor) -> ModuleType | None:
    """The one whose `search` and `sweep` are for these tensors."""
    return next((each for each in ALL if each.serves(*tensors)), None)


def named(device: str) -> str:
    """Which of them serves a device: "native", "triton" or "torch"."""
    found = engine(torch.zeros(1, device=device))
    return "torch" if found is None else found.__name__.rpartition(".")[2]


def added_gram(rows: torch.Tensor, upper: torch.Tensor) -> bool:
    """upper float32 [n, n] += rows^T rows, if one of them does that with exact products."""
    return any(each.add_gram(rows, upper) for each in ALL)


def added_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> bool:
    """total float32 [m, n] += a^T b, likewise."""
    return any(each.add_product(a, b, total) for each in ALL)
