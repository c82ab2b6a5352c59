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


@dataclass(frozen=True)
class Factors:
    """A stack of factors, [members, n, n]. Where there is none, the damping is the reason, and the matrices are I."""

    upper: torch.Tensor
    damped: torch.Tensor
    damping: list[float | FactorError]

    def members(self) -> list[Factor | FactorError]:
        """One by one, without a copy."""
        each = zip(self.upper, self.damped, self.damping)
        return [d if isinstance(d, FactorError) else Factor(upper, damped, d) for upper, damped, d in each]


class Hessian:
    """Sum of x x^T over every input row x that a layer has seen: the Hessian of its squared output error.

    Only tiles on and above the diagonal are accumulated, in float32. Rows of bfloat16 are multiplied exactly and
    summed in float32; rounding the products to bfloat16 would make the matrix indefinite.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.tokens = 0
        self._upper = torch.zeros(size, size, device=device)

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

    def blended(self, other: Hessian, floor: int) -> Hessian:
        """Itself from `floor` tokens on; else a new one, where what is missing comes from the mean of `other`.

        An expert that few tokens were routed to has a Hessian that is singular, or noise; `other` is what all experts
        of its layer have seen together. If that is nothing, there is nothing to blend in.
        """
        if self.tokens >= floor or not other.tokens:
            return self
        blend, missing = Hessian(self.size, self._upper.device), floor - self.tokens
        theirs = other._upper.to(self._upper.device)
        torch.add(self._upper, theirs, alpha=missing / other.tokens, out=blend._upper)
        blend.tokens = floor
        return blend

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
    if not (matrix.diagonal() > 0).any():
        raise FactorError("every input column of this layer is dead: no calibration token reached it")
    strength = damping
    while True:
        for dtype in (torch.float32, torch.float64):
            upper, damped, good = _try_to_factor(matrix, strength, dtype)
            if good:
                return Factor(upper, damped, strength)
        if strength >= 1.0:
            raise FactorError(f"the Hessian is not positive definite even with damping {strength:g}")
        strength = min(max(10 * strength, 1e-4), 1.0)


def factor_stacked(matrices: torch.Tensor, damping: float) -> Factors:
    """Each of [members, n, n] as `factor` does it; together, but for those that do not come out at the first try."""
    upper, damped, good = _try_to_factor(matrices, damping, torch.float32)
    dampings: list[float | FactorError] = [damping] * len(matrices)
    for e in (~good).nonzero().flatten().tolist():
        try:
            alone = factor(matrices[e], damping)
            upper[e], damped[e], dampings[e] = alone.upper, alone.damped, alone.damping
        except FactorError as error:
            upper[e] = damped[e] = torch.eye(matrices.shape[1], device=matrices.device)
            dampings[e] = error.with_traceback(None)  # which would keep the matrices
    return Factors(upper, damped, dampings)


def _try_to_factor(
    matrix: torch.Tensor, strength: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(upper, damped, good) for `matrix` [..., n, n], one or a stack; `good` is bool [...]."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    # Sorted, the dead columns come first: they move the middle by half of their number.
    middle = (diagonal.shape[-1] - 1 + (diagonal <= 0).sum(-1, keepdim=True)) // 2
    ridge = 0.5 * diagonal + diagonal.sort(-1).values.gather(-1, middle)
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(strength * ridge)
    lower, failed = torch.linalg.cholesky_ex(damped.to(dtype).flip(-2, -1))
    good = (failed == 0) & torch.isfinite(lower).all(dim=(-2, -1))
    return lower.flip(-2, -1).float(), damped, good


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
