"""Layers of a block that read the same tensor, and the Hessian of what they read.

`observe` runs a block once on every batch and changes nothing. `staged` runs it once too, but every batch waits at each
set of siblings until its layers have been solved, so that what follows them sees their error ("true sequential" in
GPTQ's own code), and the block's outputs need no second run. Waiting batches keep what they have computed so far.
`anew` sees the same, in the memory of a single batch: it runs every batch again for each set, as far as to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from ..core.hessian import Hessian, in_memory
from .blocks import shape_of
from .experts import Experts, Routed

STACK_BYTES = 2**28  # what Hessians of experts that are solved together may take, with what solving adds
Batch = tuple[Callable[[], None], "torch.Tensor | None"]  # runs the block; padding mask bool [batch, length]
Count = Callable[[Any, "torch.Tensor | None"], None]  # told of an input, and which of it is padding


class Hessians:
    """Where Hessians come from, and how they become whole: here at once; in a run of many processes, as their sum.

    `square` makes their matrices, float32 zeros [size, size].
    """

    square: Callable[[int, torch.device], torch.Tensor] = staticmethod(in_memory)

    def new(self, size: int, device: torch.device) -> Hessian:
        """An empty one."""
        return Hessian(size, device, self.square)

    def whole(self, hessian: Hessian | None, size: int, device: torch.device) -> Hessian | None:
        """What all have counted, given what this process has; None if that is nothing."""
        return hessian


HERE = Hessians()


class _Reached(Exception):  # noqa: N818  # a signal, not an error
    """Ends a run of a block where nothing beyond is wanted."""


@dataclass(frozen=True)
class Member:
    """Layers that share a Hessian; `tokens` reached them. It knows of more if it is `filled`, and of none if None."""

    names: list[str]
    hessian: Hessian | None
    tokens: int = 0

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
        self.hessian = None

    def stacks(self) -> Iterator[list[Member]]:
        """What is to be solved together: of layers that read one tensor, just these."""
        self.hessian = self.hessians.whole(self.hessian, self.size, self.device)
        yield [Member(self.names, self.hessian, self.hessian.tokens if self.hessian else 0)]

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Count the inputs `x` [..., size] of these layers, but not where `mask` [...] says padding."""
        if self.hessian is None:
            self.hessian = self.hessians.new(self.size, x.device)
        if x.numel():
            self.hessian.update(x, mask if mask is not None and mask.shape == x.shape[:-1] else None)


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


def observe(
    block: nn.Module, names: Iterable[str], batches: Iterable[Batch], weigh: bool = True
) -> list[Siblings | Bank]:
    """Run the block over all batches; the sets of siblings in call order, each with its Hessian if `weigh`.

    Siblings are found in the first batch in which a layer is called: inputs are compared by address, shape and stride
    while a reference keeps them alive. A set that is found late comes behind what its batch has passed, and among its
    like by the order of `names`. A layer that is never called has no siblings and does not appear.
    """
    names = list(names)
    rank = {name: number for number, name in enumerate(names)}
    found: dict[str, Siblings | Bank] = {}
    sets: list[Siblings | Bank] = []
    mask: torch.Tensor | None = None
    at = 0  # behind the set that this batch has gone through last

    def called(place: Place, x: Any) -> None:
        nonlocal at
        name = place.name
        if name not in found:
            match = None if place.experts else next((s for s in sets if isinstance(s, Siblings) and s.reads(x)), None)
            if match is None:
                about = _about(block, name)
                match = Bank(place.experts, *about) if place.experts else Siblings([], *about, _input=x)
                while at < len(sets) and rank[sets[at].names[0]] < rank[name]:
                    at += 1
                sets.insert(at, match)
            if isinstance(match, Siblings):
                match.names.append(name)
            found[name] = match
        at = max(at, next(number for number, one in enumerate(sets) if one is found[name]) + 1)
        if weigh and found[name].names[0] == name:
            found[name].add(x, mask)

    try:
        with _told_of_calls(block, names, called):
            for run, mask in batches:  # noqa: B007  # `called` reads it
                at = 0
                with torch.no_grad():
                    run()
                for siblings in sets:
                    siblings.forget_input()  # its memory may be reused by another tensor
    finally:
        for siblings in sets:
            siblings.forget_input()
    return sets


def staged(
    block: nn.Module, names: list[str], known: list[list[str]], batches: list[Batch], hessians: Hessians = HERE
) -> Iterator[Siblings | Bank]:
    """Run the block over all batches at once; yields the sets of siblings in call order, each before its layers run.

    Whoever iterates may replace the weights of the yielded layers: they run when the next set is asked for. `known` are
    the sets as `observe` finds them; a layer outside them is a set of its own, and among such the order of `names`
    counts. Of a layer that is called more than once, the first input counts. In the end every batch has run to its end.
    """

    def new(name: str, names: list[str]) -> Siblings:
        return Siblings(names, *_about(block, name), hessians)

    banks = {
        place.name: Bank(place.experts, *_about(block, place.name), hessians, keep=True)
        for place in _places(block, names)
        if place.experts
    }
    order: list[Siblings | Bank] = [banks.get(names[0]) or new(names[0], list(names)) for names in known]
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
            stranger = banks.get(name) or new(name, [name])
            of.update(dict.fromkeys(stranger.names, stranger))
            order.insert(at, stranger)
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


def anew(
    block: nn.Module, names: list[str], known: list[list[str]], batches: list[Batch], hessians: Hessians = HERE
) -> Iterator[Siblings | Bank]:
    """Run the block over all batches for each set of siblings that has layers in `names`, no further than to them.

    Yields what `staged` yields, if all sets are `known`, and the batches end where they began: nothing waits. Experts
    whose Hessians have no room side by side are counted in several runs.
    """
    wanted = set(names)
    for mine in ([name for name in one if name in wanted] for one in known):
        for place in [place for place in _places(block, mine) if place.name == mine[0]]:
            about = _about(block, place.name)
            if place.experts:
                yield Bank(place.experts, *about, hessians, again=partial(_run_to, block, place, batches))
            else:
                siblings = Siblings(mine, *about, hessians)
                _run_to(block, place, batches, siblings.add)
                yield siblings


def _about(block: nn.Module, name: str) -> tuple[int, torch.device]:
    """The number of inputs of a layer, and where it is."""
    layer = block.get_submodule(name)
    return shape_of(layer)[1], layer.weight.device


def _run_to(block: nn.Module, place: Place, batches: list[Batch], count: Count) -> None:
    """Run the block over all batches as far as to `place`, and tell `count` what arrives there."""
    mask: torch.Tensor | None = None

    def reached(place: Place, x: Any) -> None:
        count(x, mask)
        raise _Reached

    names = [name for one in place.experts for name in one] or [place.name]
    with _told_of_calls(block, names, reached):
        for run, mask in batches:  # noqa: B007  # `reached` reads it
            with torch.no_grad(), suppress(_Reached):
                run()


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
