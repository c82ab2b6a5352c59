"""GPTQ: round the columns of a weight one after another, letting the later ones make up for the error so far.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), in the
inverse-free form: with the damped Hessian factored as `H = R R^T`, R upper triangular, column j is rounded from

    t_j = W_j + sum_{i<j} (W_i - Q_i) R_ij / R_jj          and adds R_jj^2 (t_j - Q_j)^2 to the loss

which gives the codes of the textbook form (Cholesky of the inverse) for a third of its work. This is Babai's nearest
plane; see Chen et al., "The Geometry of LLM Quantization" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import native
from ..errors import UsageError
from . import grid
from .hessian import Factor, Hessian, factor
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
    weight = weight.detach().float()
    importance = hessian.diagonal()
    index = _group_index(importance, scheme)
    grouped = torch.argsort(index, stable=True)
    scales, zeros = grid.search(weight[:, grouped], importance[grouped], scheme, settings.candidates)

    order = _sweep_order(importance, index, settings.order)
    factored = factor(hessian.matrix()[order][:, order], settings.damping)
    columns = weight.T[order].contiguous()
    codes = sweep(columns, factored.upper, scales.T, zeros.T, index.long()[order], scheme, settings.panel)
    for _ in range(settings.refit_sweeps):
        scales = refit(columns, codes, scales.T, index.long()[order], factored.damped).T

    stored = torch.empty_like(codes, dtype=torch.uint8)
    stored[order] = (codes + zeros.T[index.long()[order]]).to(torch.uint8)
    quantized = QuantizedWeight(stored.T.contiguous(), scales.contiguous(), zeros, index, scheme)
    return quantized, factored


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    scheme: Scheme,
    panel: int,
) -> torch.Tensor:
    """Codes minus zeros, like `weight` [in, out]: one input column per row, so that every step is contiguous.

    upper [in, in] from `factor`; scales and zeros [groups, out]; groups [in] int64. Corrections inside a panel are
    rank-one updates; what a finished panel owes to the columns after it is one matrix product.
    """
    feedback = upper / upper.diagonal()  # column j divided by R_jj
    target = weight.clone()
    steps = torch.empty_like(weight)
    scales, low = scales.to(weight.dtype), -zeros.to(weight.dtype)
    for start in range(0, len(weight), panel):
        stop = min(start + panel, len(weight))
        mine = slice(start, stop)
        inside = (weight[mine], target[mine], feedback[mine, mine], scales[groups[mine]], low[groups[mine]])
        round_panel = native.sweep if native.serves(weight, target, steps) else sweep_panel
        errors = round_panel(*inside, scheme.max_code, steps[mine])
        if stop < len(weight):
            target[stop:].addmm_(feedback[start:stop, stop:].T, errors)
    return steps


def sweep_panel(
    weight: torch.Tensor,
    target: torch.Tensor,
    feedback: torch.Tensor,
    scales: torch.Tensor,
    low: torch.Tensor,
    most: int,
    steps: torch.Tensor,
) -> torch.Tensor:
    """Round the columns of one panel, all [columns, out]; writes `steps`, uses up `target`, returns the errors."""
    errors = torch.empty_like(weight)
    for j in range(len(weight)):
        torch.clamp((target[j] / scales[j]).round_(), low[j], low[j] + most, out=steps[j])
        torch.addcmul(weight[j], steps[j], scales[j], value=-1, out=errors[j])
        target[j + 1 :].addr_(feedback[j, j + 1 :], errors[j])
    return errors


def refit(
    weight: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    damped: torch.Tensor,
) -> torch.Tensor:
    """Scales float16 [groups, out] that fit the chosen codes better, group after group, in closed form.

    With codes fixed, the loss is quadratic in each scale: its best value is s + num / den with
    `num = sum(steps_g * (H_g E))`, `den = sum(steps_g * (H_gg steps_g))`, E = W - Q. The rounded scale is taken only
    where it is closer to the best one than the old scale was, which is exactly where the loss falls.
    Source: the coordinate form of the scale step in Guo et al., "decoupleQ" (2024).
    """
    scales = scales.clone()
    error = weight - steps * scales.float()[groups]
    for g in range(len(scales)):
        columns = (groups == g).nonzero().squeeze(1)
        mine, old = steps[columns], scales[g].float()
        gradient = (mine * (damped[columns] @ error)).sum(0)
        curvature = (mine * (damped[columns][:, columns] @ mine)).sum(0)
        best = old + gradient / curvature.clamp_min(1e-30)
        new = best.half().float()
        accepted = (curvature > 0) & torch.isfinite(new) & (new != 0) & ((new - best).abs() < (old - best).abs())
        new = torch.where(accepted, new, old)
        error[columns] += mine * (old - new)
        scales[g] = new.half()
    return scales


def _group_index(importance: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """int32 [in]: by position, or with act_order by falling importance, so that alike columns share a scale."""
    index = scheme.trivial_group_index(len(importance)).to(importance.device)
    if scheme.act_order:
        index[torch.argsort(importance, descending=True)] = index.clone()
    return index


def _sweep_order(importance: torch.Tensor, index: torch.Tensor, order: str) -> torch.Tensor:
    """int64 [in]: which column is rounded when. The first ones suffer least, so the important ones go first.

    Scales are settled before any code is chosen, so the order is free and costs nothing at run time, whatever it does
    to the groups: columns are rounded in one order and stored in another. "group" keeps groups together, which is what
    scales found along the way would need (GAR: Gafni et al., "Dual Precision Quantization for Efficient and Accurate
    Deep Neural Networks Inference", 2025).
    """
    if order == "importance":
        return torch.argsort(importance, descending=True, stable=True)
    groups = index.long()
    if order == "stored":
        return torch.argsort(groups, stable=True)
    peak = torch.zeros(int(groups.max()) + 1, device=importance.device)
    peak = peak.scatter_reduce(0, groups, importance, "amax", include_self=False)
    rank = torch.empty_like(peak, dtype=torch.int64)
    rank[torch.argsort(peak, descending=True, stable=True)] = torch.arange(len(peak), device=peak.device)
    by_importance = torch.argsort(importance, descending=True, stable=True)
    return by_importance[torch.argsort(rank[groups[by_importance]], stable=True)]
