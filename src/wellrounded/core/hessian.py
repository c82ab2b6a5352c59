"""The second moment of a layer's inputs, and its upper factor: what the solver knows about the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import native
from ..errors import NumericsError

TILE = 768  # columns per tile of the upper triangle: wide enough for a matmul to run at full speed


class FactorError(NumericsError):
    """No damping up to 1.0 makes the matrix positive definite."""


@dataclass(frozen=True)
class Factor:
    """`damped = upper @ upper.T` in the order it was asked for.

    upper    float32 [n, n], upper triangular
    damped   float32 [n, n], the damped Hessian itself
    damping  the relative damping that succeeded; larger than what was asked means that it had to be raised
    """

    upper: torch.Tensor
    damped: torch.Tensor
    damping: float


class Hessian:
    """Sum of x x^T over every input row x that a layer has seen: the Hessian of its squared output error.

    Only tiles on and above the diagonal are accumulated, in float32. Rows of bfloat16 are multiplied exactly and
    summed in float32; rounding the products to bfloat16 would make the matrix indefinite.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.tokens = 0
        self._upper = torch.zeros(size, size, device=device)

    def update(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add the rows of `x` [..., size]; rows where `mask` [...] is False (padding) do not count."""
        rows = x.detach().reshape(-1, self.size)
        if mask is not None:
            rows = rows[mask.reshape(-1).to(rows.device)]
        self.tokens += rows.shape[0]
        if not native.add_gram(rows, self._upper):
            self.add_rows(rows)

    def add_rows(self, rows: torch.Tensor) -> None:
        """The definition of `update`, for every device and dtype: rows [tokens, size], tile by tile."""
        exact_in_bf16 = rows.dtype == torch.bfloat16
        rows = rows.float()
        with _bf16_products(exact_in_bf16 and rows.device.type == "cpu"):
            for i in range(0, self.size, TILE):
                left = rows[:, i : i + TILE].T
                for j in range(i, self.size, TILE):
                    self._upper[i : i + TILE, j : j + TILE].addmm_(left, rows[:, j : j + TILE])

    def merge(self, other: Hessian) -> None:
        """Add what another Hessian of the same size has seen (another device, another rank)."""
        self._upper += other._upper.to(self._upper.device)
        self.tokens += other.tokens

    def matrix(self) -> torch.Tensor:
        """[size, size] float32: the mean of x x^T. Raises NumericsError if the inputs held NaN or Inf."""
        upper = torch.triu(self._upper) / max(self.tokens, 1)
        return _finite(upper + torch.triu(upper, 1).T)

    def diagonal(self) -> torch.Tensor:
        """[size] float32: the mean of x_j^2. Zero marks a dead column, one that no input ever reached.

        Raises NumericsError if the inputs held NaN or Inf.
        """
        return _finite(self._upper.diagonal() / max(self.tokens, 1))


def factor(matrix: torch.Tensor, damping: float) -> Factor:
    """Upper factor R of the damped matrix, `matrix + diag(lambda) = R R^T`: GPTQ without any inverse.

    R is the Cholesky factor of the index-reversed matrix, reversed back. The damping is per column,
    `lambda_j = damping * (H_jj / 2 + median(diag H))`: a few massive channels dominate the usual mean of the diagonal
    and silently turn GPTQ into plain rounding. Dead columns are decoupled, so they are rounded plainly. When the
    factorization fails it is tried in float64, then with ten times the damping (1e-4 at least), up to 1.0.

    Raises FactorError when all of that fails.
    """
    diagonal = matrix.diagonal()
    live = diagonal[diagonal > 0]
    if not len(live):
        raise FactorError("every input column of this layer is dead: no calibration token reached it")
    ridge = 0.5 * diagonal + live.median()
    strength = damping
    while True:
        damped = matrix + torch.diag(strength * ridge)
        for dtype in (torch.float32, torch.float64):
            lower, failed = torch.linalg.cholesky_ex(damped.to(dtype).flip(0, 1))
            if not failed and torch.isfinite(lower).all():
                return Factor(lower.flip(0, 1).float(), damped, strength)
        if strength >= 1.0:
            raise FactorError(f"the Hessian is not positive definite even with damping {strength:g}")
        strength = min(max(10 * strength, 1e-4), 1.0)


def _finite(moment: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(moment).all():
        raise NumericsError("the inputs of this layer hold NaN or Inf")
    return moment


@contextmanager
def _bf16_products(enabled: bool) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices through bfloat16, accumulating in float32.

    Exact for values that are bfloat16 already, and twice as fast. The setting is torch's own and is put back.
    """
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not enabled or backend is None or not hasattr(backend, "fp32_precision"):
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
