"""The second moment of a layer's inputs: what the solver knows about the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import NumericsError
from .engines import added_gram

TILE = 768  # columns per tile of the upper triangle: wide enough for a matmul to run at full speed
MIRROR = 256  # the side of a square that is turned over in cache


def in_memory(size: int, device: torch.device) -> torch.Tensor:
    """float32 zeros [size, size]."""
    return torch.zeros(size, size, device=device)


class Hessian:
    """Sum of x x^T over every input row x that a layer has seen: the Hessian of its squared output error.

    Only tiles on and above the diagonal are accumulated, in float32. Rows of bfloat16 are multiplied exactly and
    summed in float32; rounding the products to bfloat16 would make the matrix indefinite.

    There is one matrix, float32 zeros [size, size] from `new`, which is asked for the matrix of the factor too: a layer
    too large for the memory can have both in files.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        new: Callable[[int, torch.device], torch.Tensor] = in_memory,
    ) -> None:
        self.size = size
        self.tokens = 0
        self.new = new
        self._upper = new(size, torch.device(device))
        self._symmetric = False  # whether the lower half has been filled in since the last update

    @property
    def device(self) -> torch.device:
        """Where it is accumulated."""
        return self._upper.device

    def update(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add the rows of `x` [..., size]; rows where `mask` [...] is False (padding) do not count."""
        rows = x.detach().reshape(-1, self.size)
        if mask is not None:
            rows = rows[mask.reshape(-1).to(rows.device)]
        self.tokens += rows.shape[0]
        self._symmetric = False
        if not added_gram(rows, self._upper):
            self.add_rows(rows)

    def add_rows(self, rows: torch.Tensor) -> None:
        """The definition of `update`, for every device and dtype: rows [tokens, size], tile by tile."""
        self._symmetric = False
        with exact_products(rows):
            rows = rows.float()
            for i in range(0, self.size, TILE):
                left = rows[:, i : i + TILE].T
                for j in range(i, self.size, TILE):
                    self._upper[i : i + TILE, j : j + TILE].addmm_(left, rows[:, j : j + TILE])

    def merge(self, other: Hessian, sign: int = 1) -> None:
        """Add what another Hessian of the same size has seen (another device, another rank), or take it away again."""
        for mine, theirs in zip(_upper_rows(self._upper), _upper_rows(other._upper)):
            mine.add_(theirs.to(mine.device), alpha=sign)
        self._symmetric = False
        self.tokens += sign * other.tokens

    def sum_over(self, all_reduce: Callable[[torch.Tensor], Any]) -> None:
        """Make it the sum of those that several processes have; `all_reduce` does so in place, for one tensor."""
        all_reduce(self._upper)  # as it is: where it is symmetric already, it is so everywhere
        self._symmetric = False
        tokens = torch.tensor([self.tokens], device=self.device)
        all_reduce(tokens)
        self.tokens = int(tokens)

    def blended(self, other: Hessian, floor: int) -> Hessian:
        """Itself from `floor` tokens on; else a new one, where what is missing comes from the mean of `other`.

        An expert that few tokens were routed to has a Hessian that is singular, or noise; `other` is what all experts
        of its layer have seen together. If that is nothing, there is nothing to blend in.
        """
        if self.tokens >= floor or not other.tokens:
            return self
        blend, missing = Hessian(self.size, self.device, self.new), floor - self.tokens
        for out, mine, theirs in zip(*(_upper_rows(each._upper) for each in (blend, self, other))):
            torch.add(mine, theirs.to(mine.device), alpha=missing / other.tokens, out=out)
        blend.tokens = floor
        return blend

    def mirrored(self) -> torch.Tensor:
        """[size, size] float32: the *sum* of x x^T, both halves: the matrix itself, until the next update."""
        if not self._symmetric:
            for start in range(0, self.size, MIRROR):
                stop = start + MIRROR
                corner = self._upper[start:stop, start:stop]
                corner.copy_(corner.triu() + corner.triu(1).T)
                for after in range(stop, self.size, MIRROR):
                    above = self._upper[start:stop, after : after + MIRROR]
                    self._upper[after : after + MIRROR, start:stop].copy_(above.T)
            self._symmetric = True
        return self._upper

    def rows(self, columns: torch.Tensor) -> torch.Tensor:
        """[k, size] float32: the mean of x_j x^T for the columns j, int64 [k]."""
        return self.mirrored().index_select(0, columns).div_(max(self.tokens, 1))

    def matrix(self) -> torch.Tensor:
        """[size, size] float32: the mean of x x^T, a copy. Raises NumericsError if the inputs held NaN or Inf."""
        return _finite(self.mirrored() / max(self.tokens, 1))

    def diagonal(self) -> torch.Tensor:
        """[size] float32: the mean of x_j^2. Zero marks a dead column, one that no input ever reached.

        Raises NumericsError if the inputs held NaN or Inf: |x_i x_j| is never above both squares, so that what is not
        finite anywhere is not finite here.
        """
        return _finite(self._upper.diagonal() / max(self.tokens, 1))


def _upper_rows(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views that together hold the upper half, and what of the lower one is in a tile on the diagonal."""
    for start in range(0, len(matrix), TILE):
        yield matrix[start : start + TILE, start:]


def _finite(moment: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(moment).all():
        raise NumericsError("the inputs of this layer hold NaN or Inf")
    return moment


@contextmanager
def exact_products(rows: torch.Tensor) -> Iterator[None]:
    """While it lasts, oneDNN multiplies float32 matrices through bfloat16, accumulating in float32, if `rows` are that.

    Exact for values that are bfloat16 already, and twice as fast. The setting is torch's own and is put back.
    """
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    exact = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    if not exact or backend is None or not hasattr(backend, "fp32_precision"):
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
