"""Layers of a block that read the same tensor, and the Hessian of what they read.

`observe` runs a block once on every batch and changes nothing. `staged` runs it once too, but every batch waits at each
set of siblings until its layers have been solved, so that what follows them sees their error ("true sequential" in
GPTQ's own code), and the block's outputs need no second run. Waiting batches keep what they have computed so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from ..core.hessian import Hessian

Batch = tuple[Callable[[], None], "torch.Tensor | None"]  # runs the block; padding mask bool [batch, length]


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

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Count the inputs `x` [..., size] of these layers, but not where `mask` [...] says padding."""
        if self.hessian is None:
            self.hessian = Hessian(x.shape[-1], x.device)
        if x.numel():
            self.hessian.update(x, mask if mask is not None and mask.shape == x.shape[:-1] else None)


def observe(block: nn.Module, names: Iterable[str], batches: Iterable[Batch], weigh: bool = True) -> list[Siblings]:
    """Run the block over all batches; the sets of siblings in call order, each with its Hessian if `weigh`.

    Siblings are found in the first batch in which a layer is called: inputs are compared by address, shape and stride
    while a reference keeps them alive. A layer that is never called has no siblings and does not appear.
    """
    found: dict[str, Siblings] = {}
    sets: list[Siblings] = []
    mask: torch.Tensor | None = None

    def called(name: str, x: torch.Tensor) -> None:
        if name not in found:
            match = next((s for s in sets if s.reads(x)), None)
            if match is None:
                match = Siblings([], _input=x)
                sets.append(match)
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
                    siblings._input = None  # its memory may be reused by another tensor
    finally:
        for siblings in sets:
            siblings._input = None
    return sets


def staged(block: nn.Module, names: list[str], known: list[list[str]], batches: list[Batch]) -> Iterator[Siblings]:
    """Run the block over all batches at once; yields the sets of siblings in call order, each before its layers run.

    Whoever iterates may replace the weights of the yielded layers: they run when the next set is asked for. `known` are
    the sets as `observe` finds them; a layer outside them is a set of its own, and among such the order of `names`
    counts. Of a layer that is called more than once, the first input counts. In the end every batch has run to its end.
    """
    order = [Siblings(list(names)) for names in known]
    of = {name: siblings for siblings in order for name in siblings.names}
    rank = {name: number for number, name in enumerate(names)}
    solved: set[str] = set()
    stray: set[str] = set()  # outside the known sets: placed behind what its batch has passed, and by their rank
    passed: dict[greenlet, Siblings] = {}  # the last set that a batch has gone through

    def called(name: str, x: torch.Tensor) -> None:
        if name in solved:
            return
        me = getcurrent()
        if name not in of:
            at = order.index(passed[me]) + 1 if me in passed else 0
            while at < len(order) and order[at].names[0] in stray and rank[order[at].names[0]] < rank[name]:
                at += 1
            stray.add(name)
            of[name] = Siblings([name])
            order.insert(at, of[name])
        of[name].add(x, masks[me])
        assert me.parent is not None
        me.parent.switch(of[name])
        passed[me] = of[name]

    walkers = [greenlet(run) for run, _ in batches]
    masks = {walker: mask for walker, (_, mask) in zip(walkers, batches)}
    waiting: dict[greenlet, Siblings] = {}

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
                go_on([walker for walker, place in waiting.items() if place is next_set])
        finally:
            for walker in list(waiting):
                walker.throw(GreenletExit)


@contextmanager
def _told_of_calls(block: nn.Module, names: Iterable[str], called: Callable[[str, Any], None]) -> Iterator[None]:
    """While it lasts, `called(name, input)` runs before each of the named layers does."""

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda layer, args: called(name, args[0])

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
