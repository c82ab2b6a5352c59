"""Layers of a block that read the same tensor, and the Hessian of what they read.

`observe` runs a block once on every batch and changes nothing. `staged` runs it once too, but every batch waits at each
set of siblings until its layers have been solved, so that what follows them sees their error ("true sequential" in
GPTQ's own code), and the block's outputs need no second run. Waiting batches keep what they have computed so far.
`anew` sees the same, in the memory of a single batch: it runs every batch again for each set, as far as to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from .blocks import shape_of
from .experts import Experts, Routed
from .inputs import HERE, Bank, Count, Hessians, Siblings

Batch = tuple[Callable[[], None], "torch.Tensor | None"]  # runs the block; padding mask bool [batch, length]
Kind = Callable[[list[str], int, torch.device, Hessians], Siblings]


class _Reached(Exception):  # noqa: N818  # a signal, not an error
    """Ends a run of a block where nothing beyond is wanted."""


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
    block: nn.Module, names: list[str], known: list[list[str]], batches: list[Batch], hessians: Hessians = HERE,
    kind: Kind = Siblings,
) -> Iterator[Siblings | Bank]:  # fmt: skip
    """Run the block over all batches at once; yields the sets of siblings in call order, each before its layers run.

    Whoever iterates may replace the weights of the yielded layers: they run when the next set is asked for. `known` are
    the sets as `observe` finds them; a layer outside them is a set of its own, and among such the order of `names`
    counts. Of a layer that is called more than once, the first input counts. In the end every batch has run to its end.
    """

    def new(name: str, names: list[str]) -> Siblings:
        return kind(names, *_about(block, name), hessians)

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
        of[name].add(x, masks[me], numbers[me])
        assert me.parent is not None
        me.parent.switch(of[name])
        passed[me] = of[name]

    walkers = [greenlet(run) for run, _ in batches]
    masks = {walker: mask for walker, (_, mask) in zip(walkers, batches)}
    numbers = {walker: number for number, walker in enumerate(walkers)}
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
                walker.parent = getcurrent()
                walker.throw(GreenletExit)


def anew(
    block: nn.Module, names: list[str], known: list[list[str]], batches: list[Batch], hessians: Hessians = HERE,
    kind: Kind = Siblings, before: Callable[[Place, int], None] = lambda place, number: None,
) -> Iterator[Siblings | Bank]:  # fmt: skip
    """Run the block over all batches for each set of siblings that has layers in `names`, no further than to them.

    Yields what `staged` yields, if all sets are `known`, and the batches end where they began: nothing waits. Experts
    whose Hessians have no room side by side are counted in several runs. `before` is told where a batch is going to be
    stopped.
    """
    wanted = set(names)
    for mine in ([name for name in one if name in wanted] for one in known):
        for place in [place for place in _places(block, mine) if place.name == mine[0]]:
            about = _about(block, place.name)
            if place.experts:
                yield Bank(place.experts, *about, hessians, again=partial(run_to, block, place, batches))
            else:
                siblings = kind(mine, *about, hessians)
                for number, batch in enumerate(batches):
                    before(place, number)
                    run_to(block, place, [batch], partial(siblings.add, batch=number))
                yield siblings


def _about(block: nn.Module, name: str) -> tuple[int, torch.device]:
    """The number of inputs of a layer, and where it is."""
    layer = block.get_submodule(name)
    return shape_of(layer)[1], layer.weight.device


def run_to(block: nn.Module, place: Place, batches: list[Batch], count: Count) -> None:
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
