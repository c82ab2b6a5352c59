"""A quantized weight, before any file format or kernel layout: `dequantize` is the definition everything else obeys."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .scheme import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """`W[r, j] = scales[r, g] * (codes[r, j] - zeros[r, g])` with `g = group_index[j]`.

    codes        uint8   [out, in]      0 .. 2^bits - 1
    scales       float16 [out, groups]  may be negative (full-range symmetric grids)
    zeros        uint8   [out, groups]  2^(bits-1) everywhere if the scheme is symmetric
    group_index  int32   [in]           trivial (j // group size) unless the scheme has act_order
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_index: torch.Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        grid = (rows, self.scheme.groups(columns))
        if tuple(self.scales.shape) != grid or tuple(self.zeros.shape) != grid:
            raise ValueError(f"scales {tuple(self.scales.shape)} and zeros {tuple(self.zeros.shape)} must be {grid}")
        if tuple(self.group_index.shape) != (columns,):
            raise ValueError(f"group_index {tuple(self.group_index.shape)} must be ({columns},)")

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def trivially_grouped(self) -> bool:
        """Whether column j is in group j // group size, so that a reader may ignore `group_index`."""
        trivial = self.scheme.trivial_group_index(self.shape[1])
        return torch.equal(self.group_index, trivial.to(self.group_index.device))

    @property
    def evenly_grouped(self) -> bool:
        """Whether the groups are as large as trivial ones, whichever columns they hold; a file may say otherwise."""
        trivial = self.scheme.trivial_group_index(self.shape[1])
        return torch.equal(self.group_index.sort().values, trivial.to(self.group_index.device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out, in] dense weights, computed in float32 and rounded once to `dtype`."""
        groups = self.group_index.long()
        steps = self.codes.float() - self.zeros.float()[:, groups]
        return (steps * self.scales.float()[:, groups]).to(dtype)

    def split(self, rows: list[int]) -> list[QuantizedWeight]:
        """Cut the outputs into consecutive pieces of the given sizes (siblings that were solved as one tall matrix)."""
        pieces = zip(self.codes.split(rows), self.scales.split(rows), self.zeros.split(rows))
        return [QuantizedWeight(c, s, z, self.group_index, self.scheme) for c, s, z in pieces]

    def every(self, step: int) -> QuantizedWeight:
        """Every `step`-th output, views."""
        rows = slice(None, None, step)
        return QuantizedWeight(self.codes[rows], self.scales[rows], self.zeros[rows], self.group_index, self.scheme)
