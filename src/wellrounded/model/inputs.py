"""What layers of a block read, counted as it arrives: of layers that read one tensor, and of the experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from ..core.hessian import Hessian, in_memory
from ..core.means import Means
from ..core.moments import Moments
from .experts import Routed

STACK_BYTES = 2**28  # what Hessians of experts that are solved together may take, with what solving adds
Count = Callable[..., None]  # told of an input, which of it is padding, and the number of its batch


class Hessians:
    """Where Hessians come from, and how they become whole: here at once; in a run of many processes, as their sum.

    `square` makes their matrices, float32 zeros [size, size]. `biased` are the layers of the block at hand whose bias
    is to absorb the mean of their error: of what they read the means are known, too.
    """

    square: Callable[[int, torch.device], torch.Tensor] = staticmethod(in_memory)
    biased: Collection[str] = ()

    def new(self, size: int, device: torch.device) -> Hessian:
        """An empty one."""
        return Hessian(size, device, self.square)

    def moments(self, size: int, device: torch.device, means: bool = False) -> Moments:
        """Empty ones, with means or without."""
        return Moments(self.new(size, device), self.square(size, device), Means(size, device) if means else None)

    def whole(self, hessian: Hessian | None, size: int, device: torch.device) -> Hessian | None:
        """What all have counted, given what this process has; None if that is nothing."""
        return hessian

    def whole_moments(
        self, moments: Moments | None, size: int, device: torch.device, outputs: int, means: bool
    ) -> Moments | None:
        """The same of moments, with those of a residual of so many features, and with means or without."""
        return moments

    def whole_means(self, means: Means) -> Means:
        """The same of means, which every process has."""
        return means


HERE = Hessians()


@dataclass(frozen=True)
class Member:
    """Layers that share a Hessian; `tokens` reached them. It knows of more if it is `filled`, and of none if None.

    moments   of all tokens, where it is known what the layers read in the original model; `hessian` is theirs
    held_out  the part of them that choices are made on
    means     of the same tokens, where a bias can absorb the mean of the error
    """

    names: list[str]
    hessian: Hessian | None
    tokens: int = 0
    moments: Moments | None = None
    held_out: Moments | None = None
    means: Means | None = None

    def within(self, block: str) -> Member:
        """The same, its layers called by their full names."""
        return replace(self, names=[f"{block}.{name}" for name in self.names])

    @property
    def filled(self) -> bool:
        """Whether part of the Hessian is what other experts have read."""
        return self.hessian is not None and self.hessian.tokens > self.tokens


@dataclass
class Siblings:
    """Layers of one block that read the same tensor, `size` wide, in call order, and the Hessian they share."""

    names: list[str]
    size: int
    device: torch.device
    hessians: Hessians = HERE
    hessian: Hessian | None = None
    means: Means | None = None
    _input: torch.Tensor | None = field(default=None, repr=False)

    def reads(self, x: torch.Tensor) -> bool:
        """Whether `x` is the very tensor that the first of these layers read."""
        mine = self._input
        return mine is not None and (mine.data_ptr(), mine.shape, mine.stride()) == (x.data_ptr(), x.shape, x.stride())

    def forget_input(self) -> None:
        """Let go of the tensor that `reads` compares with."""
        self._input = None

    def forget(self) -> None:
        """Let go of the Hessian: these layers are solved."""
        self.hessian = self.means = None

    def stacks(self) -> Iterator[list[Member]]:
        """What is to be solved together: of layers that read one tensor, just these."""
        self.hessian = self.hessians.whole(self.hessian, self.size, self.device)
        means = self.hessians.whole_means(self.means or Means(self.size, self.device)) if self.biased else None
        yield [Member(self.names, self.hessian, self.hessian.tokens if self.hessian else 0, means=means)]

    @property
    def biased(self) -> bool:
        """Whether any of the layers has a bias that is to absorb the mean of its error."""
        return not {*self.names}.isdisjoint(self.hessians.biased)

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, batch: int = 0) -> None:
        """Count the inputs `x` [..., size] of these layers, but not where `mask` [...] says padding."""
        if self.hessian is None:
            self.hessian = self.hessians.new(self.size, x.device)
        if x.numel():
            mask = mask if mask is not None and mask.shape == x.shape[:-1] else None
            self.hessian.update(x, mask)
            if self.biased:
                self.means = self.means or Means(self.size, x.device)
                self.means.update(x.reshape(-1, self.size) if mask is None else x[mask.to(x.device)])


@dataclass
class Witness(Siblings):
    """Layers of the original model: what they read is kept, batch by batch, until it has been compared with."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, batch: int = 0) -> None:
        """Keep the inputs of one batch."""
        self.inputs[batch] = x


class Aside(NamedTuple):
    """What else is known of what a layer reads: how much each token counts, None for all alike, and residuals.

    weights  float32 [...]: 1 / mean(r^2) of the residual r that the layer's output joins in the original. What reads it
             next divides by its root; without that, a few tokens with huge residuals would decide alone
    apart    [..., out]: the original's residual minus the quantized model's, before the output joins it
    """

    weights: torch.Tensor | None = None
    apart: torch.Tensor | None = None


ChosenOn = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass
class Paired(Siblings):
    """Layers whose inputs are compared with those that they have in the original model, token by token.

    originals  by the first layer's name and batch, what is read there; a batch that is not there counts as unchanged
    aside      of layers, a batch and what it has there: what else is known
    chosen_on  of a batch and its inputs [..., size]: bool [...], which are held out, to choose by them how to solve
    outputs    features of the residual that a layer writes to, 0 for others
    """

    originals: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict, repr=False)
    aside: Callable[[list[str], int, torch.Tensor], Aside] = field(default=lambda *told: Aside(), repr=False)
    chosen_on: ChosenOn = field(default=lambda batch, x: torch.zeros(x.shape[:-1], dtype=torch.bool), repr=False)
    outputs: int = 0
    moments: Moments | None = field(default=None, repr=False)
    held_out: Moments | None = field(default=None, repr=False)

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, batch: int = 0) -> None:
        """Count the inputs `x` [..., size], but not where `mask` [...] says padding."""
        original, aside = self.originals.get(self.names[0], {}).pop(batch, None), Aside()
        if original is None or original.shape != x.shape:
            original = x
        else:
            aside = self.aside(self.names, batch, original)
        if self.moments is None or self.held_out is None:
            self.moments, self.held_out = (self.hessians.moments(self.size, x.device, self.biased) for _ in range(2))
        held = self.chosen_on(batch, x)
        real = torch.ones_like(held) if mask is None or mask.shape != held.shape else mask.to(x.device)
        for moments, some in ((self.moments, real & ~held), (self.held_out, real & held)):
            moments.update(x[some], original[some], *(None if one is None else one[some] for one in aside))

    def forget(self) -> None:
        """Let go of the moments: these layers are solved."""
        self.hessian = self.moments = self.held_out = self.means = None

    def stacks(self) -> Iterator[list[Member]]:
        """These layers, with the moments of all tokens and those of the held-out ones among them."""
        about = self.size, self.device, self.outputs, self.biased
        held = self.held_out = self.hessians.whole_moments(self.held_out, *about)
        moments = self.moments = self.hessians.whole_moments(self.moments, *about)
        if moments is None or held is None:
            yield [Member(self.names, None)]
            return
        moments.merge(held)
        self.hessian = moments.hessian
        yield [Member(self.names, moments.hessian, moments.tokens, moments, held, moments.means)]


@dataclass
class Bank:
    """The same projections of all experts of a layer: each expert's read what was routed to it, and share that Hessian.

    An expert that fewer tokens reached than it has inputs has a singular Hessian: what is missing is filled in with
    what all experts of the layer have read. `keep` holds on to the inputs until they are asked for, which costs
    nothing where batches wait for each other anyway; `again` delivers them to whoever asks, as often as it takes;
    otherwise they are counted at once, in as many Hessians as experts. They are `size` wide.
    """

    experts: list[list[str]]
    size: int
    device: torch.device
    hessians: Hessians = HERE
    keep: bool = False
    again: Callable[[Count], None] | None = None
    _inputs: list[tuple[Routed, torch.Tensor | None]] = field(default_factory=list, repr=False)
    _hessians: dict[int, Hessian] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """All layers, expert by expert."""
        return [name for names in self.experts for name in names]

    def add(self, routed: Routed, mask: torch.Tensor | None, batch: int = 0) -> None:
        """Count what each expert is about to read, but not where `mask` [...] says padding."""
        if self.keep:
            self._inputs.append((routed, mask))
        else:
            for expert in range(len(self.experts)):
                self._count(self._hessians, expert, routed, mask)

    def forget_input(self) -> None:
        """Let go of the inputs that were kept."""
        self._inputs.clear()

    def forget(self) -> None:
        """Let go of the Hessians: these layers are solved."""
        self._hessians.clear()
        self.__dict__.pop("_together", None)

    def stacks(self) -> Iterator[list[Member]]:
        """As many experts at a time as their Hessians, and what solving them takes, have room for."""
        room = STACK_BYTES * (16 if self.device.type == "cuda" else 1)  # large stacks keep a GPU busy
        at_once = max(1, room // (6 * 4 * self.size**2))
        if at_once >= len(self.experts) or self._hessians:
            self._hessians = self._counted(range(len(self.experts)))
            self._inputs.clear()
            self.again = None
        for start in range(0, len(self.experts), at_once):
            some = range(start, min(start + at_once, len(self.experts)))
            own = self._hessians or self._counted(some)
            if stack := [self._member(expert, own.get(expert)) for expert in some if self.experts[expert]]:
                yield stack
            del stack, own  # before the next ones are counted

    def _visit(self, count: Count) -> None:
        """Tell `count` of everything that is not in a Hessian yet."""
        if self.again is not None:
            self.again(count)
        for routed, mask in self._inputs:
            count(routed, mask)

    def _counted(self, experts: range) -> dict[int, Hessian]:
        own = dict(self._hessians)

        def count(routed: Routed, mask: torch.Tensor | None) -> None:
            for expert in experts:
                self._count(own, expert, routed, mask)

        self._visit(count)
        whole = ((expert, self.hessians.whole(own.get(expert), self.size, self.device)) for expert in experts)
        return {expert: hessian for expert, hessian in whole if hessian is not None}

    def _member(self, expert: int, mine: Hessian | None) -> Member:
        names = self.experts[expert]
        if mine is not None and mine.tokens >= mine.size:
            return Member(names, mine, mine.tokens)
        if mine is None or self._together is None:
            return Member(names, self._together)
        return Member(names, mine.blended(self._together, floor=mine.size), mine.tokens)

    @cached_property
    def _together(self) -> Hessian | None:
        """The Hessian of what all experts have read, None if that is nothing."""
        one: dict[int, Hessian] = {}

        def count(routed: Routed, mask: torch.Tensor | None) -> None:
            for expert in range(len(self.experts)):
                self._count(one, expert, routed, mask, into=0)

        if self._hessians:  # all experts' are here, and whole
            for hessian in self._hessians.values():
                one.setdefault(0, self.hessians.new(self.size, self.device)).merge(hessian)
            return one[0] if one[0].tokens else None
        self._visit(count)
        together = self.hessians.whole(one.get(0), self.size, self.device)
        return together if together is not None and together.tokens else None

    def _count(
        self, hessians: dict[int, Hessian], expert: int, routed: Routed, mask: torch.Tensor | None,
        into: int | None = None,
    ) -> None:  # fmt: skip
        if not routed.counts[expert]:
            return
        rows = routed.rows(expert)
        into = expert if into is None else into
        if into not in hessians:
            hessians[into] = self.hessians.new(self.size, rows.device)
        known = mask is not None and routed.tokens is not None and mask.numel() == routed.total
        hessians[into].update(rows, mask.reshape(-1)[routed.tokens(expert)] if known else None)
