"""Layers of a block that read the same tensor, and the Hessian of what they read.

`observe` runs a block once on every batch and changes nothing. `staged` runs it once too, but every batch waits at each
set of siblings until its layers have been solved, so that what follows them sees their error ("true sequential" in
GPTQ's own code), and the block's outputs need no second run. Waiting batches keep what they have computed so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from ..core.hessian import Hessian
from .experts import Experts, Routed

STACK_BYTES = 2**28  # what Hessians of experts that are solved together may take, with what solving adds
Batch = tuple[Callable[[], None], "torch.Tensor | None"]  # runs the block; padding mask bool [batch, length]


@dataclass(frozen=True)
class Member:
    """Layers that share a Hessian; `tokens` reached them. It knows of more if it is `filled`, and of none if None."""

    names: list[str]
    hessian: Hessian | None
    tokens: int = 0

    @property
    def filled(self) -> bool:
        """Whether part of the Hessian is what other experts have read."""
        return self.hessian is not None and self.hessian.tokens > self.tokens


@dataclass
class Siblings:
    """Layers of one block that read the same tensor, in call order, and the Hessian they share."""

    names: list[str]
    hessian: Hessian | None = None
    _input: torch.Tensor | None = field(default=None, repr=False)

    def reads(self, x: torch.Tensor) -> bool:
        """Whether `x` is the very tensor that the first of these layers read."""
        mine = self._input
        return mine is not None and (mine.data_ptr(), mine.shape, mine.stride()) == (x.data_ptr(), x.shape, x.stride())

    def forget_input(self) -> None:
        """Let go of the tensor that `reads` compares with."""
        self._input = None

    def stacks(self) -> Iterator[list[Member]]:
        """What is to be solved together: of layers that read one tensor, just these."""
        yield [Member(self.names, self.hessian, self.hessian.tokens if self.hessian else 0)]

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Count the inputs `x` [..., size] of these layers, but not where `mask` [...] says padding."""
        if self.hessian is None:
            self.hessian = Hessian(x.shape[-1], x.device)
        if x.numel():
            self.hessian.update(x, mask if mask is not None and mask.shape == x.shape[:-1] else None)


@dataclass
class Bank:
    """The same projections of all experts of a layer: each expert's read what was routed to it, and share that Hessian.

    An expert that fewer tokens reached than it has inputs has a singular Hessian: what is missing is filled in with
    what all experts of the layer have read. `keep` holds on to the inputs until they are asked for, which costs nothing
    where batches wait for each other anyway; otherwise they are counted at once, in as many Hessians as experts.
    """

    experts: list[list[str]]
    keep: bool = False
    _inputs: list[tuple[Routed, torch.Tensor | None]] = field(default_factory=list, repr=False)
    _hessians: dict[int, Hessian] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """All layers, expert by expert."""
        return [name for names in self.experts for name in names]

    def add(self, routed: Routed, mask: torch.Tensor | None) -> None:
        """Count what each expert is about to read, but not where `mask` [...] says padding."""
        if self.keep:
            self._inputs.append((routed, mask))
        else:
            for expert in range(len(self.experts)):
                self._count(self._hessians, expert, routed, mask)

    def forget_input(self) -> None:
        """Let go of the inputs that were kept."""
        self._inputs.clear()

    def stacks(self) -> Iterator[list[Member]]:
        """As many experts at a time as their Hessians, and what solving them takes, have room for."""
        at_once = len(self.experts)
        counted = ((hessian.size, hessian.device) for hessian in self._hessians.values())
        kept = ((rows.shape[-1], rows.device) for routed, _ in self._inputs for rows in [routed.rows(0)])
        for size, device in islice(chain(counted, kept), 1):
            room = STACK_BYTES * (16 if device.type == "cuda" else 1)  # large stacks keep a GPU busy
            at_once = max(1, room // (6 * 4 * size**2))
        if at_once >= len(self.experts):
            for routed, mask in self._inputs:
                for expert in range(len(self.experts)):
                    self._count(self._hessians, expert, routed, mask)
            self._inputs.clear()
        for start in range(0, len(self.experts), at_once):
            yield [self._member(expert) for expert in range(start, min(start + at_once, len(self.experts)))]

    def _member(self, expert: int) -> Member:
        own = dict(self._hessians)
        for routed, mask in self._inputs:
            self._count(own, expert, routed, mask)
        names, mine = self.experts[expert], own.get(expert)
        if mine is not None and mine.tokens >= mine.size:
            return Member(names, mine, mine.tokens)
        if mine is None or self._together is None:
            return Member(names, self._together)
        return Member(names, mine.blended(self._together, floor=mine.size), mine.tokens)

    @cached_property
    def _together(self) -> Hessian | None:
        """The Hessian of what all experts have read, None if that is nothing."""
        one: dict[int, Hessian] = {}
        for routed, mask in self._inputs:
            for expert in range(len(self.experts)):
                self._count(one, expert, routed, mask, into=0)
        for hessian in self._hessians.values():
            one.setdefault(0, Hessian(hessian.size, hessian.device)).merge(hessian)
        return one[0] if one and one[0].tokens else None

    def _count(
        self, hessians: dict[int, Hessian], expert: int, routed: Routed, mask: torch.Tensor | None,
        into: int | None = None,
    ) -> None:  # fmt: skip
        if not routed.counts[expert]:
            return
        rows = routed.rows(expert)
        into = expert if into is None else into
        if into not in hessians:
            hessians[into] = Hessian(rows.shape[-1], rows.device)
        known = mask is not None and routed.tokens is not None and mask.numel() == routed.total
        hessians[into].update(rows, mask.reshape(-1)[routed.tokens(expert)] if known else None)


def observe(
    block: nn.Module, names: Iterable[str], batches: Iterable[Batch], weigh: bool = True
) -> list[Siblings | Bank]:
    """Run the block over all batches; the sets of siblings in call order, each with its Hessian if `weigh`.

    Siblings are found in the first batch in which a layer is called: inputs are compared by address, shape and stride
    while a reference keeps them alive. A layer that is never called has no siblings and does not appear.
    """
    found: dict[str, Siblings | Bank] = {}
    sets: list[Siblings | Bank] = []
    mask: torch.Tensor | None = None

    def called(place: Place, x: Any) -> None:
        name = place.name
        if name not in found:
            match = None if place.experts else next((s for s in sets if isinstance(s, Siblings) and s.reads(x)), None)
            if match is None:
                match = Bank(place.experts) if place.experts else Siblings([], _input=x)
                sets.append(match)
            if isinstance(match, Siblings):
                match.names.append(name)
            found[name] = match
        if weigh and found[name].names[0] == name:
            found[name].add(x, mask)

    try:
        with _told_of_calls(block, names, called):
            for run, mask in batches:  # noqa: B007  # `called` reads it
                with torch.no_grad():
                    run()
                for siblings in sets:
                    siblings.forget_input()  # its memory may be reused by another tensor
    finally:
        for siblings in sets:
            siblings.forget_input()
    return sets


def staged(
    block: nn.Module, names: list[str], known: list[list[str]], batches: list[Batch]
) -> Iterator[Siblings | Bank]:
    """Run the block over all batches at once; yields the sets of siblings in call order, each before its layers run.

    Whoever iterates may replace the weights of the yielded layers: they run when the next set is asked for. `known` are
    the sets as `observe` finds them; a layer outside them is a set of its own, and among such the order of `names`
    counts. Of a layer that is called more than once, the first input counts. In the end every batch has run to its end.
    """
    banks = {place.name: Bank(place.experts, keep=True) for place in _places(block, names) if place.experts}
    order: list[Siblings | Bank] = [banks.get(names[0]) or Siblings(list(names)) for names in known]
    of = {name: siblings for siblings in order for name in siblings.names}
    rank = {name: number for number, name in enumerate(names)}
    solved: set[str] = set()
    stray: set[str] = set()  # outside the known sets: placed behind what its batch has passed, and by their rank
    passed: dict[greenlet, Siblings | Bank] = {}  # the last set that a batch has gone through

    def called(place: Place, x: Any) -> None:
        name = place.name
        if name in solved:
            return
        me = getcurrent()
        if name not in of:
            at = order.index(passed[me]) + 1 if me in passed else 0
            while at < len(order) and order[at].names[0] in stray and rank[order[at].names[0]] < rank[name]:
                at += 1
            stray.add(name)
            new = banks.get(name) or Siblings([name])
            of.update(dict.fromkeys(new.names, new))
            order.insert(at, new)
        of[name].add(x, masks[me])
        assert me.parent is not None
        me.parent.switch(of[name])
        passed[me] = of[name]

    walkers = [greenlet(run) for run, _ in batches]
    masks = {walker: mask for walker, (_, mask) in zip(walkers, batches)}
    waiting: dict[greenlet, Siblings | Bank] = {}

    def go_on(some: list[greenlet]) -> None:
        for walker in some:
            waiting.pop(walker, None)
            walker.parent = getcurrent()
            with torch.no_grad():  # here and not inside: a walker that waits must not leave its setting behind
                place = walker.switch()
            if not walker.dead:
                waiting[walker] = place

    with _told_of_calls(block, names, called):
        try:
            go_on(walkers)
            while waiting:
                next_set = min(waiting.values(), key=order.index)
                yield next_set
                solved.update(next_set.names)
                next_set.forget_input()
                go_on([walker for walker, place in waiting.items() if place is next_set])
        finally:
            for walker in list(waiting):
                walker.throw(GreenletExit)


@dataclass(frozen=True)
class Place:
    """Where a block can be stopped: before a layer, or before a bank of experts, called by its first layer's name."""

    name: str
    module: nn.Module
    bank: int = 0
    experts: list[list[str]] = field(default_factory=list)


def _places(block: nn.Module, names: Iterable[str]) -> list[Place]:
    wanted = dict.fromkeys(names)
    places = []
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            for bank in module.apart:
                inside = [[f"{path}.{name}" if path else name for name in one] for one in module.names(bank)]
                chosen = [[name for name in one if name in wanted] for one in inside]
                if any(chosen):
                    places.append(Place(next(filter(None, chosen))[0], module, bank, chosen))
                for one in chosen:
                    for name in one:
                        del wanted[name]
    return [*places, *(Place(name, block.get_submodule(name)) for name in wanted)]


@contextmanager
def _told_of_calls(block: nn.Module, names: Iterable[str], called: Callable[[Place, Any], None]) -> Iterator[None]:
    """While it lasts, `called(place, input)` runs before each of the named layers, or its bank of experts, does."""

    def hook(place: Place) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda layer, args: called(place, args[0])

    def told(places: dict[int, Place], bank: int, routed: Routed) -> None:
        if bank in places:
            called(places[bank], routed)

    handles, banks = [], {}
    for place in _places(block, names):
        if place.experts:
            banks.setdefault(place.module, {})[place.bank] = place
        else:
            handles.append(place.module.register_forward_pre_hook(hook(place)))
    for experts, places in banks.items():
        experts.told = partial(told, places)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for experts in banks:
            experts.told = None
