"""The upper factor of a damped Hessian, in place: one matrix is all that a factor takes, however large it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from ..errors import NumericsError
from .hessian import Hessian

TILE = 512  # columns factored at once; what is to the right of them is then one tall product, at a matmul's full speed
WIDE = 2**22  # float64 values that are converted at a time, where float32 does not do


class FactorError(NumericsError):
    """No damping up to 1.0 makes the matrix positive definite."""


@dataclass(frozen=True)
class Factor:
    """`damped = upper @ upper.T` in the order it was asked for.

    upper    float32 [n, n], upper triangular
    damping  the relative damping that succeeded; larger than what was asked means that it had to be raised
    """

    upper: torch.Tensor
    damping: float


@dataclass(frozen=True)
class Factors:
    """A stack of factors, [members, n, n]. Where there is none, the damping is the reason, and the matrix is I."""

    upper: torch.Tensor
    damping: list[float | FactorError]

    def members(self) -> list[Factor | FactorError]:
        """One by one, without a copy."""
        return [d if isinstance(d, FactorError) else Factor(r, d) for r, d in zip(self.upper, self.damping)]


def factor(matrix: torch.Tensor, damping: float) -> Factor:
    """Upper factor R of the damped matrix, `matrix + diag(lambda) = R R^T`: GPTQ without any inverse.

    R is the Cholesky factor of the index-reversed matrix, reversed back; see `ridge` for lambda. When the factorization
    fails it is tried with sums in float64, then with ten times the damping (1e-4 at least), up to 1.0.

    Raises FactorError when all of that fails.
    """
    (found,) = factor_stacked(matrix.unsqueeze(0), damping).members()
    if isinstance(found, FactorError):
        raise found
    return found


def factor_stacked(matrices: torch.Tensor, damping: float) -> Factors:
    """Each of float32 [members, n, n] as `factor` does it, side by side at the first try."""

    def write(e: int, upper: torch.Tensor) -> None:
        upper.copy_(matrices[e]).triu_()

    return _factored(torch.empty_like(matrices), matrices.diagonal(dim1=1, dim2=2), write, damping)


def factor_hessians(hessians: Sequence[Hessian], order: torch.Tensor, damping: float) -> Factors:
    """The factor of each Hessian's mean, its columns in an order of its own, int64 [members, n]; beside it nothing.

    A single factor lies where its Hessian does: in memory from `Hessian.new`.
    """
    size, device = order.shape[1], hessians[0].device
    if len(hessians) == 1:
        upper = hessians[0].new(size, device).unsqueeze(0)
    else:
        upper = torch.zeros(len(hessians), size, size, device=device)
    diagonals = torch.stack([hessian.diagonal() for hessian in hessians]).gather(1, order)

    def write(e: int, mine: torch.Tensor) -> None:
        matrix, columns, tokens = hessians[e].mirrored(), order[e], max(hessians[e].tokens, 1)
        for start in range(0, size, TILE):
            rows = matrix.index_select(0, columns[start : start + TILE])
            part = mine[start : start + TILE, start:]
            torch.gather(rows, 1, columns[start:].expand(len(rows), -1), out=part).div_(tokens)

    return _factored(upper, diagonals, write, damping)


def ridge(diagonals: torch.Tensor) -> torch.Tensor:
    """[members, n]: what a damping of 1.0 adds to each diagonal [members, n], `H_jj / 2 + median(diag H)`.

    A few massive channels dominate the usual mean of the diagonal and silently turn GPTQ into plain rounding. Dead
    columns are left out of the median; the ridge decouples them, so that they are rounded plainly.
    """
    # Sorted, the dead columns come first: they move the middle by half of their number.
    middle = (diagonals.shape[1] - 1 + (diagonals <= 0).sum(1, keepdim=True)) // 2
    return 0.5 * diagonals + diagonals.sort(1).values.gather(1, middle)


def cholesky_(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Put R of `D = R R^T` in the place of D, float32 [members, n, n]; bool [members]: where that worked.

    D is read on and above the diagonal, and in the diagonal's tiles; below those it must be zero. A column of tiles is
    final as soon as what the finished ones to its right hold has been taken from it, so that every tile is written
    once: two thirds of what is read and written when each step updates all that is left, and one product a column.
    With float64, products are summed, and tiles solved, in float64; what is kept is float32 all the same.
    """
    size = matrices.shape[1]
    good = torch.ones(len(matrices), dtype=torch.bool, device=matrices.device)
    for start in reversed(range(0, size, TILE)):
        stop = min(start + TILE, size)
        column = matrices[:, :stop, start:stop].to(dtype)
        if stop < size:
            _subtract_products(column, matrices[:, :stop, stop:], matrices[:, start:stop, stop:])
        lower, failed = torch.linalg.cholesky_ex(column[:, start:].flip(1, 2))
        tile = lower.flip(1, 2)
        good &= (failed == 0) & torch.isfinite(tile).all(dim=(1, 2))
        if not good.any():
            break
        matrices[:, start:stop, start:stop] = tile
        if start:
            above = torch.linalg.solve_triangular(tile.mT, column[:, :start], upper=False, left=False)
            matrices[:, :start, start:stop] = above
    return good


def _subtract_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total -= left @ right^T for every member, in the precision of `total`."""
    if total.dtype != left.dtype:
        width = max(1, WIDE // (left.shape[0] * left.shape[1]))
        for a, b in zip(left.split(width, 2), right.split(width, 2)):
            _subtract_products(total, a.to(total.dtype), b.to(total.dtype))
    elif total.device.type == "cpu":  # where a batch of slices would be copied first
        for mine, a, b in zip(total, left, right):
            mine.addmm_(a, b.T, alpha=-1)
    else:
        total.baddbmm_(left, right.mT, alpha=-1)


def _factored(
    upper: torch.Tensor, diagonals: torch.Tensor, write: Callable[[int, torch.Tensor], None], damping: float
) -> Factors:
    """Factors in `upper` [members, n, n], zero so far; `write` puts a member's matrix there, as often as it takes."""
    ridges = ridge(diagonals)

    def damped(e: int, strength: float) -> torch.Tensor:
        write(e, upper[e])
        upper[e].diagonal().add_(strength * ridges[e])
        return upper[e : e + 1]

    found: list[float | FactorError] = [damping] * len(upper)
    for e in range(len(upper)):
        damped(e, damping)
    for e in (~cholesky_(upper)).nonzero().flatten().tolist():
        if not (diagonals[e] > 0).any():
            found[e] = FactorError("every input column of this layer is dead: no calibration token reached it")
        else:
            found[e] = _climb(partial(damped, e), damping)
        if isinstance(found[e], FactorError):
            upper[e].zero_().fill_diagonal_(1.0)
    return Factors(upper, found)


def _climb(damped: Callable[[float], torch.Tensor], damping: float) -> float | FactorError:
    """The first damping that suffices, the matrix then being its factor, once the first try has failed."""
    strength = damping
    for strength, dtype in islice(_ladder(damping), 1, None):
        if cholesky_(damped(strength), dtype).item():
            return strength
    return FactorError(f"the Hessian is not positive definite even with damping {strength:g}")


def _ladder(damping: float) -> Iterator[tuple[float, torch.dtype]]:
    while True:
        yield damping, torch.float32
        yield damping, torch.float64
        if damping >= 1.0:
            return
        damping = min(max(10 * damping, 1e-4), 1.0)
