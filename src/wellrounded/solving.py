"""From dense weights and what reached them to quantized weights and what became of the error, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .core import gptq, rtn
from .core.hessian import FactorError, Hessian
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import NumericsError
from .model.siblings import Member
from .report import LayerResult, error_db

Solved = tuple[QuantizedWeight, LayerResult]


def same_scheme(
    members: list[Member], scheme_of: Callable[[str], Scheme]
) -> Iterator[tuple[list[list[str]], list[Member]]]:
    """Members cut into runs of layers that share a scheme: each run is solved as one tall matrix per member.

    Members side by side, experts, have the same layers, and those the same schemes. Yields the names, member by member.
    """
    by_scheme: dict[Scheme, list[int]] = {}
    for place, name in enumerate(members[0].names):
        by_scheme.setdefault(scheme_of(name), []).append(place)
    for places in by_scheme.values():
        yield [[member.names[place] for place in places] for member in members], members


def solve(
    names: list[list[str]],
    weights: list[list[torch.Tensor]],
    members: list[Member],
    scheme: Scheme,
    settings: gptq.Settings,
    calibrated: bool,
) -> Iterator[Solved]:
    """Quantize the layers of each member as one, and all members side by side.

    names and weights (float32 [out, in]) are those of each member's layers; without `calibrated` nothing is known of
    their inputs, and nobody expects it. Raises NumericsError, naming the layers, for NaN or Inf.
    """
    talls = [torch.cat(mine) if len(mine) > 1 else mine[0] for mine in weights]
    rows = [len(weight) for weight in weights[0]]
    try:
        solutions = _solutions(talls, [member.hessian for member in members], scheme, settings, calibrated)
        for member, mine, layers, tall, (solved, damping, fallback) in zip(members, weights, names, talls, solutions):
            if member.filled and fallback is None:
                fallback = f"read {member.tokens} of the {tall.shape[1]} tokens it needs, the rest from all experts"
            moment = member.hessian.matrix() if member.hessian is not None else None
            plain = rtn.solve(tall, None, scheme).split(rows) if moment is not None else [None] * len(rows)
            for name, weight, piece, rounded in zip(layers, mine, solved.split(rows), plain):
                after = error_db(weight, piece, moment) if moment is not None else None
                before = error_db(weight, rounded, moment) if moment is not None and rounded is not None else None
                parameters, tokens = weight.numel(), member.tokens
                yield piece, LayerResult(name, str(scheme), parameters, tokens, after, before, damping, fallback)
    except NumericsError as error:
        raise NumericsError(f"{', '.join(name for layers in names for name in layers)}: {error}") from None


def _solutions(
    weights: list[torch.Tensor],
    hessians: list[Hessian | None],
    scheme: Scheme,
    settings: gptq.Settings,
    calibrated: bool,
) -> list[tuple[QuantizedWeight, float | None, str | None]]:
    """For each weight, its quantized form, the damping that was used, and why it is not what was asked for."""
    known = [hessian for hessian in hessians if hessian is not None]
    if len(known) < len(hessians):  # no token reached any of them
        why = "no calibration token reached this layer" if calibrated else None
        return [(rtn.solve(weight, None, scheme), None, why) for weight in weights]
    found: list[tuple[QuantizedWeight, float | None, str | None]] = []
    for weight, hessian, solution in zip(
        weights, known, gptq.solve_stacked(torch.stack(weights), known, scheme, settings)
    ):
        if isinstance(solution, FactorError):
            found.append((rtn.solve(weight, hessian, scheme), None, f"plain rounding: {solution}"))
            continue
        quantized, factored = solution
        raised = factored.damping > settings.damping
        why = f"damping raised from {settings.damping:g} to {factored.damping:g}" if raised else None
        found.append((quantized, factored.damping, why))
    return found
