"""From dense weights and what reached them to quantized weights and what became of the error, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import log10

import torch

from .core import choice, gptq, rtn
from .core.factor import FactorError
from .core.hessian import Hessian
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import NumericsError
from .model.inputs import Member
from .report import LayerResult

ERROR_ROWS = 2048  # of a layer whose error is measured, evenly spaced: for more, it would cost as much as solving does
AIM_ROWS = 512  # the same, where what a layer aims for must be worked out
ERROR_ELEMENTS = 2**22  # float32 weights whose errors are measured at a time: plain rounding takes ten times as much
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
    centred: bool = False,
) -> Iterator[Solved]:
    """Quantize the layers of each member as one, and all members side by side.

    names and weights ([out, in], any float dtype) are those of each member's layers; without `calibrated` nothing is
    known of their inputs, and nobody expects it. What is `centred` has biases for the mean of its error (core.means).
    Raises NumericsError, naming the layers, for NaN or Inf.
    """
    rows = [len(weight) for weight in weights[0]]
    try:
        chosen = _chosen(
            weights, members[0], scheme, settings
        )  # by moments as they are: held-out ones have other means
        with _centred(members[0]) if centred else nullcontext():
            solutions, aims = _solutions(weights, members, scheme, settings, calibrated, chosen)
            for member, mine, layers, (solved, damping, fallback) in zip(members, weights, names, solutions):
                if member.filled and fallback is None:
                    fallback = (
                        f"read {member.tokens} of the {solved.shape[1]} tokens it needs, the rest from all experts"
                    )
                for name, weight, piece, aim in zip(layers, mine, solved.split(rows), aims):
                    errors = (
                        errors_db(weight, piece, member.hessian, aim) if member.hessian is not None else (None, None)
                    )
                    about = (name, str(scheme), weight.numel(), member.tokens, *errors)
                    made_up_for = (0.0, 0.0) if damping is None else (chosen.upstream, chosen.residual)
                    yield piece, LayerResult(*about, damping, fallback, *made_up_for)
    except NumericsError as error:
        raise NumericsError(f"{', '.join(name for layers in names for name in layers)}: {error}") from None


def errors_db(
    weight: torch.Tensor, quantized: QuantizedWeight, hessian: Hessian, aim: torch.Tensor | None = None
) -> tuple[float, float]:
    """10 log10 of `tr(E H E^T) / tr(W H W^T)`, E = W - Q, for `quantized` and for plain rounding of `weight`.

    Where something else than the weight was aimed for, E is the distance to that, `aim`, of AIM_ROWS rows. Some rows at
    a time, beside the Hessian's own matrix: report.error_db is the definition. Of layers with many outputs, rows
    evenly spaced stand for all.
    """
    every = spaced(weight, ERROR_ROWS if aim is None else AIM_ROWS).step
    weight, quantized = weight[::every], quantized.every(every)
    some = [part.stop - part.start for part in gptq.chunks(*weight.shape, elements=ERROR_ELEMENTS)]
    lost = plain = signal = 0.0
    aims = (weight if aim is None else aim).split(some)
    for rows, chosen, wanted in zip(weight.split(some), quantized.split(some), aims):
        rows, wanted = rows.detach().float(), wanted.detach().float()
        lost += _energy(wanted - chosen.dequantize(), hessian)
        plain += _energy(wanted - rtn.solve(rows, None, quantized.scheme).dequantize(), hessian)
        signal += _energy(rows, hessian)
    least = 1e-30
    mine, theirs = (10 * log10(max(each, least) / max(signal, least)) for each in (lost, plain))
    return mine, theirs


def spaced(weight: torch.Tensor, most: int) -> slice:
    """So many rows of a layer at most, evenly spaced."""
    return slice(None, None, -(-len(weight) // most))


def _energy(rows: torch.Tensor, hessian: Hessian) -> float:
    """tr(rows H rows^T)."""
    return float((rows @ hessian.mirrored()).mul_(rows).sum()) / max(hessian.tokens, 1)


def _chosen(
    weights: list[list[torch.Tensor]], member: Member, scheme: Scheme, settings: gptq.Settings
) -> choice.Choice:
    """What the layers make up for."""
    if member.moments is None or member.held_out is None:
        return choice.Choice()
    every = slice(None, None, -(-sum(len(weight) for weight in weights[0]) // choice.ROWS))
    some = torch.cat([weight[every].detach().float() for weight in weights[0]])
    return choice.choose(some, member.moments, member.held_out, every, scheme, settings)


def _centred(member: Member) -> AbstractContextManager[None]:
    """While it lasts, second moments are around the means."""
    if member.hessian is None or member.means is None:
        return nullcontext()
    others = (member.moments.drift, member.moments.residual) if member.moments is not None else ()
    return member.means.centred(member.hessian.mirrored(), *others)


def _solutions(
    weights: list[list[torch.Tensor]], members: list[Member], scheme: Scheme, settings: gptq.Settings,
    calibrated: bool, chosen: choice.Choice,
) -> tuple[list[tuple[QuantizedWeight, float | None, str | None]], list[torch.Tensor | None]]:  # fmt: skip
    """For each member, its quantized form, the damping, None if it was rounded plainly, and why it differs.

    And for each layer AIM_ROWS of what was aimed for, evenly spaced, None if that is the weight.
    """
    aim = None
    nothing: list[torch.Tensor | None] = [None] * len(weights[0])
    known = [member.hessian for member in members if member.hessian is not None]
    if len(known) < len(members):  # no token reached any of them
        why = "no calibration token reached this layer" if calibrated else None
        return [(_rounded(mine, None, scheme), None, why) for mine in weights], nothing
    rows, moments = sum(len(weight) for weight in weights[0]), members[0].moments
    prepared = gptq.prepare(known, scheme, settings)
    if moments is not None and not isinstance(prepared.factors.damping[0], FactorError):
        aim = partial(choice.target, moments=moments, prepared=prepared, choice=chosen)
    quantized = prepared.solve(rows, partial(_taken, weights, aim))
    dampings, aims = prepared.factors.damping, nothing
    if aim is not None:
        rows_of = ((weight, spaced(weight, AIM_ROWS)) for weight in weights[0])
        aims = [aim(weight[some].detach().float(), rows=some) for weight, some in rows_of]
    del prepared, aim  # and with them the factors, which are large
    found: list[tuple[QuantizedWeight, float | None, str | None]] = []
    for mine, hessian, solved, damping in zip(weights, known, quantized, dampings):
        if isinstance(damping, FactorError):
            found.append((_rounded(mine, hessian, scheme), None, f"plain rounding: {damping}"))
            continue
        why = f"damping raised from {settings.damping:g} to {damping:g}" if damping > settings.damping else None
        found.append((solved, damping, why))
    return found, aims


def _taken(weights: list[list[torch.Tensor]], aim: Callable[..., torch.Tensor] | None, some: slice) -> torch.Tensor:
    """[members, some, in]: rows of what is to be rounded: the weights, or what `aim` makes of those of one member."""
    if aim is None:
        return _stacked([_rows(one, some) for one in weights])
    # What aiming takes besides is several times what it is given: some of the rows at a time.
    few = gptq.chunks(some.stop - some.start, weights[0][0].shape[1], gptq.ROW_ELEMENTS // 4)
    parts = [slice(some.start + part.start, some.start + part.stop) for part in few]
    return torch.cat([aim(_rows(weights[0], part).detach().float(), rows=part) for part in parts]).unsqueeze(0)


def _rounded(weights: list[torch.Tensor], hessian: Hessian | None, scheme: Scheme) -> QuantizedWeight:
    """Plain rounding of layers as one tall matrix, some rows at a time."""
    rows, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
    parts = [rtn.solve(_rows(weights, some), hessian, scheme) for some in gptq.chunks(rows, inputs, gptq.ROW_ELEMENTS)]
    codes, scales, zeros = (torch.cat(each) for each in zip(*((p.codes, p.scales, p.zeros) for p in parts)))
    return QuantizedWeight(codes, scales, zeros, parts[0].group_index, scheme)


def _stacked(members: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(members) if len(members) > 1 else members[0].unsqueeze(0)


def _rows(weights: list[torch.Tensor], some: slice) -> torch.Tensor:
    """[some, in] of the layers on top of each other: without a copy if they are of one layer."""
    found, start = [], 0
    for weight in weights:
        first, last = max(some.start - start, 0), min(some.stop - start, len(weight))
        if first < last:
            found.append(weight[first:last])
        start += len(weight)
    return found[0] if len(found) == 1 else torch.cat(found)
