"""Scales and zeros of every group, searched on the original weights before any code is chosen.

The cost of a grid is the squared rounding error weighted by the layer's input energy, diag(H): a column that no
input excites may be rounded badly. For codes q (zero already subtracted) the best scale has a closed form,
`s = sum(h w q) / sum(h q^2)`, and leaves `sum(h w^2) - sum(h w q)^2 / sum(h q^2)`; so every candidate is judged by
the best scale of the codes it leads to, and a few dozen candidates are enough.

Symmetric grids are full-range: codes reach from -2^(b-1) to 2^(b-1)-1, and the sign of the scale is free, so that the
largest weight of a group, whichever its sign, can sit on the longer side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import NumericsError
from .engines import engine
from .scheme import Scheme

ROWS = 192  # rows searched at a time, so that the working set stays in cache
TINY = 2.0**-24  # the smallest float16: a stored scale is never zero
LARGEST = 65504.0  # the largest float16


def search(
    weight: torch.Tensor, importance: torch.Tensor | None, scheme: Scheme, candidates: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales float16 [..., rows, groups] and zeros uint8, the same, for `weight` float32 [..., rows, columns].

    Columns of a group are consecutive; the last group may be ragged. `importance` is diag(H), float32 [..., columns],
    or None for plain squared error. With `candidates=1` the grid spans the extremes of the group, without any search.

    Raises NumericsError if a weight is NaN or Inf, or too large for a float16 scale.
    """
    if not torch.isfinite(weight).all():
        raise NumericsError("the weights of this layer hold NaN or Inf")
    width = scheme.columns_per_group(weight.shape[-1])
    grouped, energy = _group(weight, importance, width)
    grouped, energy = grouped.contiguous(), energy.contiguous()
    found, runs = None, engine(grouped, energy) if candidates > 1 else None
    if runs is not None:
        found = runs.search(grouped, energy, scheme.bits, scheme.symmetric, _shares(scheme, candidates))
    scales, zeros = found or search_rows(grouped, energy, scheme, candidates)
    if scales.abs().max() > LARGEST:
        raise NumericsError(f"a group needs the scale {scales.abs().max():g}, beyond float16 (65504)")
    return scales.half(), zeros.to(torch.uint8)


def encode(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """uint8 codes [rows, columns] of plain rounding: `round(w / s) + z`, kept inside the grid."""
    scale = scales.float()[:, groups]
    return (torch.round(weight / scale) + zeros[:, groups]).clamp_(0, scheme.max_code).to(torch.uint8)


def _group(weight: torch.Tensor, importance: torch.Tensor | None, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., rows, groups, width] weights and [..., groups, width] importance; a ragged tail has weightless zeros."""
    *members, _, columns = weight.shape
    energy = torch.ones(*members, columns, device=weight.device) if importance is None else importance.float()
    padding = -columns % width
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
        energy = torch.nn.functional.pad(energy, (0, padding))
    energy = energy.unflatten(-1, (-1, width))
    mean = energy.mean(-1, keepdim=True)
    # A group without any input energy is judged by plain squared error; the others are scaled away from underflow.
    energy = torch.where(mean > 0, energy / mean.clamp_min(1e-38), torch.ones_like(energy))
    return weight.float().unflatten(-1, (-1, width)), energy


def search_rows(
    weight: torch.Tensor, energy: torch.Tensor, scheme: Scheme, candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (already float16-exact) and zeros, float32 [..., rows, groups], for weights [..., rows, groups, width].

    The definition, and what is used where no engine is.
    """
    energy = energy.unsqueeze(-3)  # the same for all rows
    parts = [_search_slice(part, energy, scheme, candidates) for part in weight.split(ROWS, dim=-3)]
    scales, zeros = zip(*parts)
    return torch.cat(scales, dim=-2), torch.cat(zeros, dim=-2)


def _search_slice(
    weight: torch.Tensor, energy: torch.Tensor, scheme: Scheme, candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    weighted = weight * energy
    best_gain = torch.full(weight.shape[:-1], -1.0, device=weight.device)
    best_scale = torch.full_like(best_gain, torch.inf)  # stays where no candidate can be judged: the caller raises
    best_zero = torch.zeros_like(best_gain)
    for scale, zero in _candidates(weight, scheme, candidates):
        scale = _storable(scale)
        steps = _round(weight, scale, zero, scheme)
        along, norm = (weighted * steps).sum(-1), (steps.square_().mul_(energy)).sum(-1)
        gain = along.square() / norm.clamp_min(1e-30)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        # A single candidate is plain rounding: its scale is stored as it is.
        refit = scale if candidates == 1 else torch.where(norm > 0, along / norm.clamp_min(1e-30), scale)
        best_scale = torch.where(better, refit, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return _storable(best_scale), best_zero


def _round(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes minus zero, float32, like `weight` [..., rows, groups, width]."""
    steps = (weight * scale.reciprocal().unsqueeze(-1)).round_()
    return steps.clamp_(-zero.unsqueeze(-1), (scheme.max_code - zero).unsqueeze(-1))


def _storable(scale: torch.Tensor) -> torch.Tensor:
    """What a float16 file gives back, with zero moved to the smallest magnitude of the same sign."""
    tiny = torch.where(scale < 0, -TINY, TINY)
    return torch.where(scale.abs() < TINY, tiny, scale).clamp(-2 * LARGEST, 2 * LARGEST).half().float()


def _candidates(weight: torch.Tensor, scheme: Scheme, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(scale, zero) pairs, each float32 [..., rows, groups]."""
    if scheme.symmetric:
        largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True)).squeeze(-1)
        zero = torch.full_like(largest, scheme.midpoint)
        base = -largest / scheme.midpoint
        yield base, zero
        for share in _shares(scheme, count):
            yield base * share, zero
            yield base * -share, zero
        return
    low, high = weight.amin(-1).clamp_max(0), weight.amax(-1).clamp_min(0)
    span = (high - low) / scheme.max_code
    flat = span == 0
    for share in _shares(scheme, count):
        scale = torch.where(flat, TINY, span * share)
        centre = -low * share / scale
        for zero in (centre.floor(), centre.ceil()) if count > 1 else (centre.round(),):
            yield scale, zero.clamp(0, scheme.max_code)


def _shares(scheme: Scheme, count: int) -> list[float]:
    """What part of the widest grid is tried, in this order; a symmetric grid tries the whole one besides."""
    if scheme.symmetric:
        return torch.linspace(1.15, 0.4, count - 1).tolist() if count > 1 else []
    return torch.linspace(1.0, 0.4, count).tolist()
