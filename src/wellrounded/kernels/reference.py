"""Dequantize and multiply: always works, everywhere, and every other kernel is tested against it.

It reads the file's tensors and keeps none of its own; the dense weight exists only during the call. For inputs of many
rows this is also the fast way, since the matrix product costs far more than restoring the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ..core.weight import QuantizedWeight

if TYPE_CHECKING:
    from . import Dense, Need

NAME = "reference"


def refuses(need: Need) -> str | None:
    """Never."""
    return None


def prepare(weight: QuantizedWeight, need: Need) -> list[torch.Tensor]:
    """No layout of its own."""
    return []


def matmul(x: torch.Tensor, prepared: Sequence[torch.Tensor], dense: Dense) -> torch.Tensor:
    """[..., in] to [..., out]."""
    return F.linear(x, dense(x.dtype))
