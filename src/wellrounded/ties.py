"""Layers that must have one scheme, whatever is best for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import nn

from .formats.config import FUSED


class Named(Protocol):
    """Something about some layers, by their full names."""

    names: list[str]


T = TypeVar("T", bound=Named)


def ties_of(names: Iterable[str], model: nn.Module) -> dict[str, list[object]]:
    """What layers have in common that must have one scheme, layer by layer.

    Engines hold as one matrix what they fuse, and the experts of a layer in one tensor; and a weight that several
    layers share is stored once.
    """
    ties: dict[str, list[object]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parts = name.split(".")
        ties[name] = [
            id(model.get_submodule(name).weight),
            *((parent, fused) for fused, pieces in FUSED.items() if leaf in pieces),
            *(".".join(parts[: n + 1]) for n, part in enumerate(parts[:-1]) if part == "experts"),
        ]
    return ties


def together(sets: Sequence[T], ties: Mapping[str, list[object]]) -> list[list[T]]:
    """Sets some of whose layers are tied to each other, in the order of their first ones."""
    first: dict[object, int] = {}  # tie -> the first set that has it
    group = list(range(len(sets)))
    for number, one in enumerate(sets):
        for tie in (tie for name in one.names for tie in ties[name]):
            mine, other = group[number], group[first.setdefault(tie, number)]
            group = [min(mine, other) if each in (mine, other) else each for each in group]
    return [[one for one, g in zip(sets, group) if g == leader] for leader in dict.fromkeys(group)]
