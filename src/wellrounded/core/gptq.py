"""GPTQ: round the columns of a weight one after another, letting the later ones make up for the error so far.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), in the
inverse-free form: with the damped Hessian factored as `H = R R^T`, R upper triangular, column j is rounded from

    t_j = W_j + sum_{i<j} (W_i - Q_i) R_ij / R_jj          and adds R_jj^2 (t_j - Q_j)^2 to the loss

which gives the codes of the textbook form (Cholesky of the inverse) for a third of its work. This is Babai's nearest
plane; see Chen et al., "The Geometry of LLM Quantization" (2025).

Everything here is done to a stack of matrices at once, [members, ...]: the experts of a layer. `stack[member, index]`,
with `member` from `_members`, takes from each member rows of its own. One matrix is a stack of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import native
from ..errors import UsageError
from . import grid
from .hessian import Factor, FactorError, Hessian, factor_stacked
from .scheme import Scheme
from .weight import QuantizedWeight

ORDERS = ("importance", "group", "stored")


@dataclass(frozen=True)
class Settings:
    """How a solution is looked for; what is stored is the Scheme's business.

    damping       relative strength of the ridge added to the Hessian's diagonal (see hessian.factor)
    panel         columns whose corrections are applied together; changes the speed, never the result
    order         which column is rounded when: "importance", "group" (by group, then importance) or "stored"
    candidates    scales tried per group
    refit_sweeps  closed-form scale refits after rounding, each accepted only where it lowers the loss
    true_sequential  layers of a block see the error of those rounded before them, and a block runs once; without it
                  it runs twice, but keeps nothing in between (the pipeline's business)
    """

    damping: float = 0.01
    panel: int = 128
    order: str = "importance"
    candidates: int = 32
    refit_sweeps: int = 1
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if not self.damping >= 0 or self.panel < 1 or self.candidates < 1 or self.refit_sweeps < 0:
            raise UsageError(f"{self}: damping and refit_sweeps start at 0, panel and candidates at 1")
        if self.order not in ORDERS:
            raise UsageError(f"order={self.order!r} was asked for; use one of {', '.join(ORDERS)}")


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
    weights, member = weights.detach().float(), _members(weights)
    importance = torch.stack([hessian.diagonal() for hessian in hessians])
    index = _group_index(importance, scheme)
    grouped = torch.argsort(index, stable=True)
    weighted_by = importance.gather(1, grouped)
    scales, zeros = grid.search(_columns(weights, grouped), weighted_by, scheme, settings.candidates)

    order = _sweep_order(importance, index, settings.order)
    factors = factor_stacked(
        torch.stack([hessian.matrix()[mine.unsqueeze(1), mine] for hessian, mine in zip(hessians, order)]),
        settings.damping,
    )
    columns, groups = weights.mT[member, order].contiguous(), index.long().gather(1, order)
    steps = sweep(columns, factors.upper, scales.mT, zeros.mT, groups, scheme, settings.panel)
    for _ in range(settings.refit_sweeps):
        scales = refit(columns, steps, scales.mT, groups, factors.damped).mT

    codes = (steps + zeros.mT[member, groups]).to(torch.uint8)
    stored = codes[member, torch.argsort(order)].mT.contiguous()
    quantized = [QuantizedWeight(*each, scheme) for each in zip(stored, scales.contiguous(), zeros, index)]
    return [f if isinstance(f, FactorError) else (q, f) for q, f in zip(quantized, factors.members())]


def sweep(
    weights: torch.Tensor,
    upper: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    scheme: Scheme,
    panel: int,
) -> torch.Tensor:
    """Codes minus zeros, like `weights` [members, in, out]: one input column per row, so that steps are contiguous.

    upper [members, in, in] from `factor_stacked`; scales and zeros [members, groups, out]; groups [members, in] int64.
    Corrections inside a panel are rank-one updates; what a finished panel owes to the columns after it is one matrix
    product.
    """
    feedback = upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(1)  # column j divided by R_jj
    target, member = weights.clone(), _members(weights)
    steps = torch.empty_like(weights)
    scales, low = scales.to(weights.dtype), -zeros.to(weights.dtype)
    round_panel = _native_panel if native.serves(weights, target, steps) else sweep_panel
    for start in range(0, weights.shape[1], panel):
        mine, rest = slice(start, start + panel), slice(start + panel, None)
        grids = (scales[member, groups[:, mine]], low[member, groups[:, mine]])
        inside = (weights[:, mine], target[:, mine], feedback[:, mine, mine], *grids)
        errors = round_panel(*inside, scheme.max_code, steps[:, mine])
        _add_products(target[:, rest], feedback[:, mine, rest].mT, errors)
    return steps


def sweep_panel(
    weights: torch.Tensor,
    target: torch.Tensor,
    feedback: torch.Tensor,
    scales: torch.Tensor,
    low: torch.Tensor,
    most: int,
    steps: torch.Tensor,
) -> torch.Tensor:
    """Round the columns of one panel, all [members, columns, out]; writes `steps`, uses up `target`, returns errors."""
    errors = torch.empty_like(weights)
    for j in range(weights.shape[1]):
        lowest = low[:, j]
        torch.clamp((target[:, j] / scales[:, j]).round_(), lowest, lowest + most, out=steps[:, j])
        torch.addcmul(weights[:, j], steps[:, j], scales[:, j], value=-1, out=errors[:, j])
        target[:, j + 1 :].addcmul_(feedback[:, j, j + 1 :, None], errors[:, j, None])
    return errors


def _native_panel(
    weights: torch.Tensor,
    target: torch.Tensor,
    feedback: torch.Tensor,
    scales: torch.Tensor,
    low: torch.Tensor,
    most: int,
    steps: torch.Tensor,
) -> torch.Tensor:
    """The same by the native core, member by member."""
    members = zip(weights, target, feedback, scales, low, steps)
    return torch.stack([native.sweep(w, t, f, s, lowest, most, q) for w, t, f, s, lowest, q in members])


def refit(
    weights: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    damped: torch.Tensor,
) -> torch.Tensor:
    """Scales float16 [members, groups, out] that fit the chosen codes better, group after group, in closed form.

    With codes fixed, the loss is quadratic in each scale: its best value is s + num / den with
    `num = sum(steps_g * (H_g E))`, `den = sum(steps_g * (H_gg steps_g))`, E = W - Q. The rounded scale is taken only
    where it is closer to the best one than the old scale was, which is exactly where the loss falls.
    Source: the coordinate form of the scale step in Guo et al., "decoupleQ" (2024).
    """
    scales, member = scales.clone(), _members(scales)
    error = weights - steps * scales.float()[member, groups]
    widths = torch.bincount(groups[0], minlength=scales.shape[1]).tolist()  # the same for every member
    for g, columns in enumerate(torch.argsort(groups, stable=True).split(widths, 1)):
        mine, old = steps[member, columns], scales[:, g].float()
        across = damped[member, columns]
        within = _columns(across, columns)
        gradient = (mine * _add_products(torch.zeros_like(mine), across, error)).sum(1)
        curvature = (mine * _add_products(torch.zeros_like(mine), within, mine)).sum(1)
        best = old + gradient / curvature.clamp_min(1e-30)
        new = best.half().float()
        accepted = (curvature > 0) & torch.isfinite(new) & (new != 0) & ((new - best).abs() < (old - best).abs())
        new = torch.where(accepted, new, old)
        error[member, columns] += mine * (old - new).unsqueeze(1)
        scales[:, g] = new.half()
    return scales


def _members(stack: torch.Tensor) -> torch.Tensor:
    """[members, 1]: the index of each, to be paired with rows of its own."""
    return torch.arange(len(stack), device=stack.device).unsqueeze(1)


def _columns(stack: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[members, rows, k]: from each member, columns of its own; index [members, k]."""
    return stack.gather(2, index.unsqueeze(1).expand(-1, stack.shape[1], -1))


def _add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total += left @ right for every member; returns `total`.

    One by one where the native core serves: on a CPU a batch gains nothing, and its sums may be rounded otherwise.
    """
    if native.serves(*total):
        for mine, a, b in zip(total, left, right):
            mine.addmm_(a, b)
        return total
    return total.baddbmm_(left, right)


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
