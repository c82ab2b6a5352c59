"""What a layer should become: the target that makes up for the error made before it, as far as held-out tokens agree.

A quantized model's layers read x_q, not the x of the original, and what they write joins a residual r_q, not r. What
comes closest to the original, `|r + W x - r_q - W* x_q|^2`, is not W but

    W* = W + (a W D + b G) (H + L)^-1        with H, D and G of core.moments, the ridge L, a = b = 1.

Rounding W* instead of W makes up for the errors of earlier layers. But a few tokens with huge values may decide about D
and G: so a and b are those that lose least on held-out tokens, where the loss is quadratic in them.
Sources: Arai and Ichikawa, "Quantization Error Propagation" (2025) for D; Li et al., "LoaQ" (2025) for G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import NumericsError
from . import gptq
from .factor import FactorError
from .gptq import Prepared, Settings
from .moments import Moments
from .scheme import Scheme

ROWS = 256  # of the weight, evenly spaced, that choices are made on


@dataclass(frozen=True)
class Choice:
    """The shares, from 0 to 1, of the errors in what is read, and in the residual, that are made up for."""

    upstream: float = 0.0
    residual: float = 0.0


def choose(
    weight: torch.Tensor, moments: Moments, held_out: Moments, rows: slice, scheme: Scheme, settings: Settings
) -> Choice:
    """What a layer should make up for to lose least on held-out tokens; weight float32 [some, in] is `rows` of its own.

    `held_out` is a part of what `moments` has counted, and is taken out of it while this goes on.
    """
    with moments.without(held_out):
        prepared = gptq.prepare([moments.hessian], scheme, settings)
        if isinstance(prepared.factors.damping[0], FactorError):
            return Choice()
        most = Choice(float(settings.upstream), float(settings.residual))
        return Choice(*shares(weight, corrections(weight, moments, prepared, rows, most), held_out, rows))


def target(weight: torch.Tensor, moments: Moments, prepared: Prepared, rows: slice, choice: Choice) -> torch.Tensor:
    """W* float32 [some, in], for `rows` of a layer, [some, in]."""
    return corrected(weight, corrections(weight, moments, prepared, rows, choice), choice)


def corrected(weight: torch.Tensor, parts: tuple[torch.Tensor | None, ...], choice: Choice) -> torch.Tensor:
    """The weight and the chosen shares of its corrections."""
    for part, share in zip(parts, (choice.upstream, choice.residual)):
        if part is not None and share:
            weight = weight.add(part, alpha=share)
    return weight


def corrections(
    weight: torch.Tensor, moments: Moments, prepared: Prepared, rows: slice, choice: Choice
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`W D (H + L)^-1` and `G (H + L)^-1`, by the factor of H + L; None for those of which the choice has no share."""
    drift = weight @ moments.drift if choice.upstream else None
    residual = moments.residual[rows] if moments.residual is not None and choice.residual else None
    return _solved(drift, moments, prepared), _solved(residual, moments, prepared)


def _solved(missing: torch.Tensor | None, moments: Moments, prepared: Prepared) -> torch.Tensor | None:
    if missing is None:
        return None
    upper, order = prepared.factors.upper[0], prepared.order[0]
    ordered = missing[:, order] / max(moments.tokens, 1)
    ordered = torch.linalg.solve_triangular(upper.T, ordered, upper=False, left=False)
    ordered = torch.linalg.solve_triangular(upper, ordered, upper=True, left=False)
    return torch.empty_like(missing).index_copy_(1, order, ordered)


def shares(
    weight: torch.Tensor, parts: tuple[torch.Tensor | None, ...], held_out: Moments, rows: slice
) -> tuple[float, ...]:
    """From 0 to 1, of each part that is added to the weight, so that the sum loses least on held-out tokens.

    Raises NumericsError if the parts, or what was counted, hold NaN or Inf.
    """
    there = [part for part in parts if part is not None]
    if not there:
        return 0.0, 0.0
    matrix = held_out.hessian.mirrored()
    slope = held_out.wanted(weight, rows).sub_(weight @ matrix)  # what lowers the loss, at the weight itself
    linear = torch.stack([(slope * part).sum() for part in there]).double().cpu()
    quadratic = torch.stack([torch.stack([(one @ matrix).mul_(two).sum() for two in there]) for one in there])
    quadratic = quadratic.double().cpu()
    if not (torch.isfinite(linear).all() and torch.isfinite(quadratic).all()):
        raise NumericsError("the inputs of this layer, or the residual, hold NaN or Inf in the original model")
    best = iter(_least(quadratic.tolist(), linear.tolist()))
    return tuple(next(best) if part is not None else 0.0 for part in parts)


def _least(quadratic: list[list[float]], linear: list[float]) -> list[float]:
    """The x in [0, 1]^k, k of 1 or 2, with the least `x^T A x - 2 b^T x`: inside, or on an edge, or in a corner.

    In plain numbers: a LAPACK routine's last digits depend on where in memory its arguments lie.
    """

    def edge(linear: float, quadratic: float) -> float:
        return min(max(linear / quadratic, 0.0), 1.0) if quadratic > 0 else float(2 * linear > quadratic)

    if len(linear) == 1:
        return [edge(linear[0], quadratic[0][0])]
    ((a, c), (d, b)), (p, q) = quadratic, linear
    candidates = [[x, edge(q - d * x, b)] for x in (0.0, 1.0)] + [[edge(p - c * y, a), y] for y in (0.0, 1.0)]
    if (determinant := a * b - c * d) > 0:
        inside = [(p * b - c * q) / determinant, (a * q - d * p) / determinant]
        candidates += [inside] if all(0 <= x <= 1 for x in inside) else []

    def value(x: list[float]) -> float:
        return a * x[0] ** 2 + (c + d) * x[0] * x[1] + b * x[1] ** 2 - 2 * (p * x[0] + q * x[1])

    return min(candidates, key=value)
