"""The two loops over a weight's columns: `sweep` chooses their codes one after another, `refit` then the scales.

Everything here is done to a stack of matrices at once, [members, in, out]: one input column per row, so that steps are
contiguous. `stack[member, index]`, with `member` from `members_of`, takes from each member rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import native
from .engines import engine
from .scheme import Scheme

STRIP = 2**22  # values that `refit` takes at a time of the Hessian, or of a group that is as wide as the layer: 16 MB
AT_ONCE = 128  # rows of the Hessian that `losses` takes at a time


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
    diagonal = upper.diagonal(dim1=1, dim2=2).unsqueeze(1)
    target, member = weights.clone(), members_of(weights)
    steps = torch.empty_like(weights)
    scales, low = scales.to(weights.dtype), -zeros.to(weights.dtype)
    runs = engine(weights, target, steps)
    round_panel = runs.sweep if runs else sweep_panel
    for start in range(0, weights.shape[1], panel):
        mine, rest = slice(start, start + panel), slice(start + panel, None)
        grids = (scales[member, groups[:, mine]], low[member, groups[:, mine]])
        feedback = upper[:, mine, start:] / diagonal[:, :, start:]  # column j divided by R_jj
        inside = (weights[:, mine], target[:, mine], feedback[:, :, :panel], *grids)
        errors = round_panel(*inside, scheme.max_code, steps[:, mine])
        add_products(target[:, rest], feedback[:, :, panel:].mT, errors)
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


def refit(
    weights: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    rows: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Scales float16 [members, groups, out] that fit the chosen codes better, group after group, in closed form.

    With codes fixed, the loss is quadratic in each scale: its best value is s + num / den with
    `num = sum(steps_g * (H_g E))`, `den = sum(steps_g * (H_gg steps_g))`, E = W - Q. The rounded scale is taken only
    where it is closer to the best one than the old scale was, which is exactly where the loss falls. `rows` gives rows
    [members, k, in] of the damped Hessian, those of `columns` int64 [members, k].
    Source: the coordinate form of the scale step in Guo et al., "decoupleQ" (2024).
    """
    scales, member = scales.clone(), members_of(scales)
    error = torch.addcmul(weights, steps, scales.to(weights.dtype)[member, groups], value=-1)
    strip = max(1, STRIP // (len(weights) * max(weights.shape[1:])))
    widths = torch.bincount(groups[0], minlength=scales.shape[1]).tolist()  # the same for every member
    for g, columns in enumerate(torch.argsort(groups, stable=True).split(widths, 1)):
        mine, old = steps[member, columns], scales[:, g].float()
        gradient, curvature = torch.zeros_like(mine[:, 0]), torch.zeros_like(mine[:, 0])
        strips = list(zip(columns.split(strip, 1), mine.split(strip, 1)))
        for some, part in strips:
            across = rows(some)
            within = across.gather(2, columns.unsqueeze(1).expand(-1, across.shape[1], -1))
            gradient += add_products(torch.zeros_like(part), across, error).mul_(part).sum(1)
            curvature += add_products(torch.zeros_like(part), within, mine).mul_(part).sum(1)
        best = old + gradient / curvature.clamp_min(1e-30)
        new = best.half().float()
        accepted = (curvature > 0) & torch.isfinite(new) & (new != 0) & ((new - best).abs() < (old - best).abs())
        new = torch.where(accepted, new, old)
        for some, part in strips:
            error[member, some] += part * (old - new).unsqueeze(1)
        scales[:, g] = new.half()
    return scales


def losses(
    weights: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    rows: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """float32 [members, out]: `e^T H e` of each output, e = w - q; the arguments are those of `refit`."""
    member = members_of(weights)
    error = torch.addcmul(weights, steps, scales.to(weights.dtype)[member, groups], value=-1)
    lost = torch.zeros_like(error[:, 0])
    every = torch.arange(weights.shape[1], device=weights.device).expand(len(weights), -1)
    for some in every.split(AT_ONCE, 1):
        part = error[member, some]
        lost += add_products(torch.zeros_like(part), rows(some), error).mul_(part).sum(1)
    return lost


def members_of(stack: torch.Tensor) -> torch.Tensor:
    """[members, 1]: the index of each, to be paired with rows of its own."""
    return torch.arange(len(stack), device=stack.device).unsqueeze(1)


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total += left @ right for every member; returns `total`.

    One by one where the native core serves: on a CPU a batch gains nothing, and its sums may be rounded otherwise.
    """
    if native.serves(*total):
        for mine, a, b in zip(total, left, right):
            mine.addmm_(a, b)
        return total
    return total.baddbmm_(left, right)
