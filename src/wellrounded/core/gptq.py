"""GPTQ: round the columns of a weight one after another, letting the later ones make up for the error so far.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), in the
inverse-free form: with the damped Hessian factored as `H = R R^T`, R upper triangular, column j is rounded from

    t_j = W_j + sum_{i<j} (W_i - Q_i) R_ij / R_jj          and adds R_jj^2 (t_j - Q_j)^2 to the loss

which gives the codes of the textbook form (Cholesky of the inverse) for a third of its work. This is Babai's nearest
plane; see Chen et al., "The Geometry of LLM Quantization" (2025).

Everything here is done to a stack of matrices at once, [members, ...]: the experts of a layer. One matrix is a stack of
one. What depends on the inputs alone is prepared first; rows of the weight do not influence each other, and go through
in chunks: beside the Hessian, its factor and the codes, solving takes the same memory for a small layer and a huge one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import UsageError
from . import grid
from .factor import TILE, Factor, FactorError, Factors, factor_hessians, ridge
from .hessian import Hessian
from .rounding import losses, members_of, refit, sweep
from .scheme import Scheme
from .weight import QuantizedWeight

ROW_ELEMENTS = 2**24  # float32 weights that are solved at a time, 64 MB; four to five arrays of that size are alive
LEAST_ROWS = 64  # but never fewer rows: each chunk reads the whole factor
ORDERS = ("importance", "group", "stored")


@dataclass(frozen=True)
class Settings:
    """How a solution is looked for; what is stored is the Scheme's business.

    damping       relative strength of the ridge added to the Hessian's diagonal (see factor.ridge)
    panel         columns whose corrections are applied together; changes the speed, never the result
    order         which column is rounded when: "importance", "group" (by group, then importance) or "stored"
    candidates    scales tried per group
    refit_sweeps  closed-form scale refits after rounding, each accepted only where it lowers the loss
    outer         how often all is rounded again on the refitted scales, which are refitted then: the outer iterations
                  of Guo et al., "decoupleQ" (2024); each output keeps what loses least
    upstream      whether a layer makes up for the errors in what it reads, as far as held-out tokens bear that out; all
                  that needs the original beside the quantized model takes a second stream of activations
    residual      whether a layer that writes to the residual stream makes up for the errors in that (see core.choice)
    token_weights whether in such a layer tokens count 1 / mean(r^2) of the residual r
    biases        whether layers with a bias put the mean of their error into it, and are solved for the rest
    true_sequential  layers of a block see the error of those rounded before them, and a block runs once; without it
                  it runs twice, but keeps nothing in between (the pipeline's business)
    """

    damping: float = 0.01
    panel: int = 128
    order: str = "importance"
    candidates: int = 32
    refit_sweeps: int = 1
    outer: int = 0
    upstream: bool = False
    residual: bool = False
    token_weights: bool = False
    biases: bool = False
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if not self.damping >= 0 or min(self.panel, self.candidates) < 1 or min(self.refit_sweeps, self.outer) < 0:
            raise UsageError(f"{self}: damping, refit_sweeps and outer start at 0, panel and candidates at 1")
        if self.order not in ORDERS:
            raise UsageError(f"order={self.order!r} was asked for; use one of {', '.join(ORDERS)}")

    @property
    def paired(self) -> bool:
        """Whether it must be known what layers read in the original model."""
        return self.upstream or self.residual or self.token_weights


def solve(
    weight: torch.Tensor, hessian: Hessian, scheme: Scheme, settings: Settings = Settings()
) -> tuple[QuantizedWeight, Factor]:
    """Codes, scales and zeros that minimize `tr((W - Q) H (W - Q)^T)` greedily, and the factor that was used.

    `weight` is [out, in], any float dtype. Rows do not influence each other, so layers that read the same input can
    be stacked and solved as one (QuantizedWeight.split).

    Raises NumericsError for NaN or Inf in weights or inputs, FactorError if the Hessian cannot be factored.
    """
    (solved,) = solve_stacked(weight.unsqueeze(0), [hessian], scheme, settings)
    if isinstance(solved, FactorError):
        raise solved
    return solved


def solve_stacked(
    weights: torch.Tensor, hessians: Sequence[Hessian], scheme: Scheme, settings: Settings = Settings()
) -> list[tuple[QuantizedWeight, Factor] | FactorError]:
    """What `solve` gives for each of `weights` [members, out, in], every one with a Hessian of its own: the experts.

    A Hessian that cannot be factored has its FactorError in the list, and does not disturb the others. What is
    returned are views of the stack's tensors: they are freed together.

    Raises NumericsError for NaN or Inf in weights or inputs of any member.
    """
    if len(weights) != len(hessians):
        raise ValueError(f"{len(weights)} weights need as many Hessians, not {len(hessians)}")
    prepared = prepare(hessians, scheme, settings)
    quantized = prepared.solve(weights.shape[1], lambda rows: weights[:, rows])
    return [f if isinstance(f, FactorError) else (q, f) for q, f in zip(quantized, prepared.factors.members())]


def prepare(hessians: Sequence[Hessian], scheme: Scheme, settings: Settings = Settings()) -> Prepared:
    """What `solve` needs to know of the inputs. Raises NumericsError if any of them held NaN or Inf."""
    importance = torch.stack([hessian.diagonal() for hessian in hessians])
    index = _group_index(importance, scheme)
    order = _sweep_order(importance, index, settings.order)
    factors = factor_hessians(hessians, order, settings.damping)
    return Prepared(hessians, scheme, settings, importance, index, order, factors)


@dataclass(frozen=True)
class Prepared:
    """Hessians, their factors, and the order of the columns: enough to solve any rows that read these inputs.

    importance  float32 [members, in]: diag(H)
    index       int32 [members, in]: the group of each column
    order       int64 [members, in]: which column is rounded when; the factors are in this order
    """

    hessians: Sequence[Hessian]
    scheme: Scheme
    settings: Settings
    importance: torch.Tensor
    index: torch.Tensor
    order: torch.Tensor
    factors: Factors

    def solve(self, rows: int, take: Callable[[slice], torch.Tensor]) -> list[QuantizedWeight]:
        """Member by member, weights of `rows` rows; `take` gives some of them, [members, some, in], any float dtype.

        Where a member has no factor the result means nothing. Raises NumericsError if a weight is NaN or Inf.
        """
        members, inputs = self.order.shape
        groups, device = self.scheme.groups(inputs), self.order.device
        codes = torch.empty(members, rows, inputs, dtype=torch.uint8, device=device)
        scales = torch.empty(members, rows, groups, dtype=torch.float16, device=device)
        zeros = torch.empty(members, rows, groups, dtype=torch.uint8, device=device)
        at_once = ROW_ELEMENTS // (members * (2 if self.settings.outer else 1))  # there is more of each row, then
        for some in chunks(rows, inputs, at_once):
            codes[:, some], scales[:, some], zeros[:, some] = self._solve(take, some)
        return [QuantizedWeight(*each, self.scheme) for each in zip(codes, scales, zeros, self.index)]

    def _solve(
        self, take: Callable[[slice], torch.Tensor], some: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [members, some, in], scales and zeros [members, some, groups] of one chunk of rows."""
        weights, member, groups = take(some).detach().float(), members_of(self.order), self.index.long()
        scales, zeros = (each.mT for each in self._grids(weights))
        columns, stored = weights.mT.contiguous(), torch.argsort(self.order)
        del weights
        best: tuple[torch.Tensor, ...] | None = None  # codes minus zeros, scales, losses
        for _ in range(1 + self.settings.outer):
            columns = columns[member, self.order]
            order_groups = groups.gather(1, self.order)
            steps = sweep(columns, self.factors.upper, scales, zeros, order_groups, self.scheme, self.settings.panel)
            steps = steps[member, stored]
            columns = columns[member, stored]
            for _ in range(self.settings.refit_sweeps):
                scales = refit(columns, steps, scales, groups, self._damped_rows)
            if self.settings.outer:
                best = _better(best, (steps, scales, losses(columns, steps, scales, groups, self._damped_rows)))
                steps, scales, _ = best
        del columns, best
        codes = steps.add_(zeros.to(steps.dtype)[member, groups]).to(torch.uint8)
        return codes.mT, scales.mT, zeros.mT

    def _grids(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros [members, rows, groups], searched on the columns of each group."""
        importance = self.importance
        if self.scheme.act_order:
            grouped = torch.argsort(self.index, stable=True)
            weights = weights.gather(2, grouped.unsqueeze(1).expand(-1, weights.shape[1], -1))
            importance = importance.gather(1, grouped)
        return grid.search(weights, importance, self.scheme, self.settings.candidates)

    def _damped_rows(self, columns: torch.Tensor) -> torch.Tensor:
        """[members, k, in]: rows of the damped Hessians, as stored, for columns int64 [members, k]."""
        rows = [hessian.rows(mine) for hessian, mine in zip(self.hessians, columns)]
        found = torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
        return found.scatter_add_(2, columns.unsqueeze(2), self._ridge().gather(1, columns).unsqueeze(2))

    def _ridge(self) -> torch.Tensor:
        """[members, in]: what was added to each diagonal; 0 where there is no factor."""
        damping = [0.0 if isinstance(d, FactorError) else d for d in self.factors.damping]
        return ridge(self.importance) * self.importance.new_tensor(damping).unsqueeze(1)


def _better(old: tuple[torch.Tensor, ...] | None, new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Output by output, what loses less: of two pairs of steps and scales, [members, ..., out], and their losses."""
    if old is None:
        return new
    better = new[-1] < old[-1]
    return *(torch.where(better.unsqueeze(1), *pair) for pair in zip(new[:-1], old[:-1])), new[-1].minimum(old[-1])


def chunks(rows: int, inputs: int, elements: int) -> Iterator[slice]:
    """Which rows are taken together, about `elements` values: from shapes alone, the same on every machine."""
    some = max(LEAST_ROWS, elements // inputs)
    for start in range(0, rows, some):
        yield slice(start, min(start + some, rows))


def working_bytes(inputs: int, outputs: int, members: int = 1) -> int:
    """What solving allocates at its peak: factor, codes, and the larger of what factoring and rounding need besides.

    The Hessians themselves are not counted, and neither are the weights before they are taken to float32.
    """
    rows = min(outputs, max(LEAST_ROWS, ROW_ELEMENTS // (inputs * members)))
    panel, tile = min(Settings.panel, inputs), min(TILE, inputs)
    factoring = tile * max(4 * tile, 2 * inputs)  # a tile turned over, or what is above it, solved
    rounding = 4 * rows * inputs + panel * (3 * rows + inputs)  # weights, steps, errors, and one that is on its way
    return members * (4 * (inputs * inputs + max(factoring, rounding)) + outputs * inputs)


def _group_index(importance: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """int32 [members, in]: by position, or with act_order by falling importance, so that alike ones share a scale."""
    members, size = importance.shape
    index = scheme.trivial_group_index(size).to(importance.device).repeat(members, 1)
    if scheme.act_order:
        rank = torch.argsort(torch.argsort(importance, descending=True))  # of each column: 0 for the most important
        index = index.gather(1, rank)
    return index


def _sweep_order(importance: torch.Tensor, index: torch.Tensor, order: str) -> torch.Tensor:
    """int64 [members, in]: which column is rounded when. The first ones suffer least, so the important ones go first.

    Scales are settled before any code is chosen, so the order is free and costs nothing at run time, whatever it does
    to the groups: columns are rounded in one order and stored in another. "group" keeps groups together, which is what
    scales found along the way would need (GAR: Gafni et al., "Dual Precision Quantization for Efficient and Accurate
    Deep Neural Networks Inference", 2025).
    """
    by_importance = torch.argsort(importance, descending=True, stable=True)
    if order == "importance":
        return by_importance
    groups = index.long()
    if order == "stored":
        return torch.argsort(groups, stable=True)
    peak = importance.new_zeros(len(groups), int(groups.max()) + 1)
    peak = peak.scatter_reduce(1, groups, importance, "amax", include_self=False)
    rank = torch.argsort(torch.argsort(peak, descending=True, stable=True))  # of each group: 0 for the highest peak
    ranks = rank.gather(1, groups.gather(1, by_importance))
    return by_importance.gather(1, torch.argsort(ranks, stable=True))
