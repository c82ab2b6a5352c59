"""A rotation inside attention heads, between values and output: it changes nothing but what is rounded.

Heads mix their values linearly, so that an orthogonal matrix folded into the rows of the value projection, and its
inverse into the columns of the output projection, cancel: `W_v <- R^T W_v`, `W_o <- W_o R`, head by head. Rotated
weights have no outliers, and are rounded with less error. Source: R2 of Liu et al., "SpinQuant" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .blocks import oriented

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rotation:
    """Of a block: its value projection and output projection, by their names in it, and R float64 [head, head]."""

    values: str
    output: str
    matrix: torch.Tensor

    def changes(self, block: nn.Module) -> dict[str, Change]:
        """What becomes of the block's parameters, by their names in it: float32, of any float dtype before."""
        values, output = (block.get_submodule(name) for name in (self.values, self.output))

        def rows(value: torch.Tensor) -> torch.Tensor:
            heads = value.double().unflatten(0, (-1, len(self.matrix)))
            return torch.einsum("hd...,de->he...", heads, self.matrix).flatten(0, 1)

        def columns(value: torch.Tensor) -> torch.Tensor:
            return (value.double().unflatten(1, (-1, len(self.matrix))) @ self.matrix).flatten(1)

        changes: dict[str, Change] = {
            f"{self.values}.weight": lambda value: oriented(values, rows(oriented(values, value))).float(),
            f"{self.output}.weight": lambda value: oriented(output, columns(oriented(output, value))).float(),
        }
        if getattr(values, "bias", None) is not None:
            changes[f"{self.values}.bias"] = lambda value: rows(value).float()
        return changes


def candidates(block: nn.Module, known: list[list[str]], seed: int) -> list[Rotation]:
    """Rotations that may be exact, by names and shapes: of layers in one module, which knows its `head_dim`."""
    found = []
    for (output,) in (one for one in known if len(one) == 1):
        parent = output.rpartition(".")[0]
        size = getattr(block.get_submodule(parent), "head_dim", None)
        mates = [one for one in known if len(one) > 1 and all(name.rpartition(".")[0] == parent for name in one)]
        if not isinstance(size, int) or size < 2:
            continue
        for values in reversed([name for one in mates for name in one]):
            shapes = [oriented(m, m.weight).shape for m in map(block.get_submodule, (values, output))]
            if shapes[0][0] % size == 0 and shapes[1][1] % size == 0:
                found.append(Rotation(values, output, orthogonal(size, seed)))
    return found


def orthogonal(size: int, seed: int) -> torch.Tensor:
    """float64 [size, size]: Hadamard's matrix with random signs for a power of two, else a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    if size & (size - 1):
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return matrix * signs / math.sqrt(size)
