"""A block's layers, observed and solved set by set, in the memory and by the processes that there are."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .core.gptq import ROW_ELEMENTS, Settings, chunks
from .core.hessian import Hessian
from .core.means import Means
from .core.recipe import role_of
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import OutOfMemory
from .memory import exhausted, give_back
from .model import blocks as layers_of
from .model.inputs import Bank, Member, Paired, Siblings
from .model.originals import Twin
from .model.siblings import anew
from .model.stream import Stream
from .model.walk import BlockWalk
from .plan import UNUSED, Plan
from .prediction import Room
from .progress import Clock
from .report import LayerResult
from .solving import Solved, same_scheme, solve
from .team import Lacking, Team, merged, shared


@dataclass
class Blockwise:
    """Solves the layers of the blocks of a walk, as planned, and puts the results into the blocks.

    calibrated  whether there are calibration tokens: without, nothing is known of what layers read
    room        what is kept in memory: less after an allocation has failed
    uneven      whether in the team's processes different layers of the block are reached
    storable    parameters that have a place of their own in the files, so that they may change
    """

    walk: BlockWalk
    plan: Plan
    settings: Settings
    calibrated: bool
    room: Room = field(default_factory=Room)
    team: Team = field(default_factory=Team)
    uneven: bool = False
    storable: Container[str] = ()

    def __post_init__(self) -> None:
        self.walk.hessians = self.team
        # Counted once, before the walk: blocks that share weights no longer do when they have been released.
        self.parameters = sum(parameter.numel() for parameter in self.walk.model.parameters())

    def known(self, index: int, names: list[str], streams: list[Stream]) -> list[list[str]] | None:
        """Sets of siblings, None if they will be found while observing.

        Found on one window, and in a team, where all must walk the same way, on all if that does not reach every layer.
        """
        if not streams or not self.settings.true_sequential:
            return None
        known = self.walk.siblings(index, streams[0], names)
        if self.team.size == 1:
            return known
        if sum(map(len, known)) < len(names):
            known = self.walk.all_siblings(index, streams[-1], names)
        found = self.team.all(known)
        self.uneven = any(other != found[0] for other in found)
        return merged(found)

    def quantize(
        self, index: int, names: list[str], known: list[list[str]] | None, calibrating: list[Stream], clock: Clock,
        twin: Twin | None = None,
    ) -> Iterator[Solved]:  # fmt: skip
        """Solve the named layers of block `index`, each put back into it; in the end the streams have left the block.

        When memory does not suffice, here or in another process, what is solved stays solved, and the rest goes on in
        less. A layer that not every process has solved by then is solved again: the later one counts.
        """
        block = self.walk.names[index]
        self.team.biased = [name for name in names if self._absorbs(f"{block}.{name}")]
        done: set[str] = set()
        alike: dict[tuple[str, int], Hessian] = {}
        while True:
            left = [name for name in names if f"{block}.{name}" not in {*done, *self.plan.kept}]
            try:
                known = self._complete(index, left, known, calibrating)
                for members in self._observed(index, left, known, calibrating, alike, twin):
                    for quantized, result in self.solve([member.within(block) for member in members]):
                        if members[0].means is not None and self._absorbs(result.name):
                            self._absorb(members[0].means, quantized, result)
                        self.place(result.name, quantized)
                        done.add(result.name)
                        yield quantized, result
                    del members  # and their Hessian, before the next one is counted
                if twin is not None:
                    self.walk.advance(index, *(stream.original for stream in calibrating), block=twin.block)
                self.team.meet()  # nobody leaves the block before all can
                return
            except (MemoryError, RuntimeError) as error:
                if not exhausted(error):
                    raise
                lack, told = str(error).splitlines()[0], isinstance(error, Lacking)
            # Here, where nothing holds on to the error.
            lack = lack if told else self.team.lacks(lack)
            done = self._agreed(done)
            self._economize(index, calibrating, clock, lack)

    def _agreed(self, done: set[str]) -> set[str]:
        """The layers that are solved in every process; others are solved again, as they were."""
        agreed = set.intersection(*map(set, self.team.all([*done])))
        for name in done - agreed:
            self.walk.unsettle(f"{name}.bias")
        return agreed

    def twin(
        self, index: int, known: list[list[str]] | None, writers: dict[str, float], calibrating: list[Stream]
    ) -> Twin | None:
        """The block as it is in the original, where it is to be known what its layers read there.

        Where no sets of layers are known there is nothing to compare set by set, and the originals go on at once.
        """
        originals = [stream.original for stream in calibrating if stream.original is not None]
        if originals and known is not None:
            block = self.walk.blocks[
                index
            ]  # whose parameters are replaced, never written to: until then they are shared
            block = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
            return Twin(block, writers, self.settings.token_weights, self.settings.residual)
        self.walk.advance(index, *originals)
        return None

    def writers(self, index: int, known: list[list[str]] | None, streams: list[Stream]) -> dict[str, float]:
        """Which layers write to the residual stream, and how much of that arrives, where that is of use."""
        wanted = self.settings.token_weights or self.settings.residual
        return self.walk.writers(index, streams[0], known) if known and wanted else {}

    def _complete(
        self, index: int, names: list[str], known: list[list[str]] | None, calibrating: list[Stream]
    ) -> list[list[str]] | None:
        """The sets of siblings with those that only some batches reach, where nobody waits until one does."""
        if self.team.size > 1:  # what any process knows of is among them, and all walk the same way
            return known
        if known is None or self.room.waits or {*names} <= {name for one in known for name in one}:
            return known
        return self.walk.all_siblings(index, calibrating[0], names)

    def _economize(self, index: int, calibrating: list[Stream], clock: Clock, lack: str) -> None:
        """After a failed allocation: half the batch from here on, and no batch waits any more, in every process.

        Raises OutOfMemory if every batch is a single window already.
        """
        waited, self.room = self.room.waits, replace(self.room, waits=False)
        less = "half the batch"
        try:
            for number, stream in enumerate(calibrating):
                calibrating[number] = self.walk.halved(stream)
        except MemoryError:
            if not waited or not calibrating:
                raise OutOfMemory(
                    f"{self.walk.names[index]}: memory does not suffice for a single window ({lack}); finished blocks "
                    "are kept: free some memory or use shorter windows (--length), and run the same command again"
                ) from None
            less = "single windows, none of which waits for others"
        except RuntimeError as error:
            if not exhausted(error):
                raise
            raise OutOfMemory(f"{self.walk.names[index]}: not even half a batch fits ({lack})") from None
        clock.say(f"out of memory at {self.walk.names[index]} ({lack}): going on with {less}")

    def _observed(
        self, index: int, names: list[str], known: list[list[str]] | None, calibrating: list[Stream],
        alike: dict[tuple[str, int], Hessian], twin: Twin | None = None,
    ) -> Iterator[list[Member]]:  # fmt: skip
        """What is to be solved next: siblings, or experts side by side.

        They are to be rounded before the next are asked for. In the end the calibrating streams have left the block.
        Layers that no token reached come last, with the Hessian of those that differ from them in a number only (the
        other experts, in models that have a list of them), collected in `alike`; where there are none, they stay dense.
        """
        unseen = dict.fromkeys(names)
        for stream in calibrating:
            for siblings in self._sets(index, names, known, stream, twin):
                yield from siblings.stacks()
                for name in siblings.names:
                    unseen.pop(name, None)
                if isinstance(siblings, Siblings) and siblings.hessian is not None:
                    for role in {role_of(name) for name in siblings.names} - {*siblings.names}:
                        like = (role, siblings.size)
                        alike.setdefault(like, Hessian(siblings.size, siblings.device)).merge(siblings.hessian)
                siblings.forget()
                give_back()
            self.walk.advance(index, stream)  # whatever has not left
        for name in unseen:
            _, inputs = layers_of.shape_of(self.walk.blocks[index].get_submodule(name))
            known_of = alike.get((role_of(name), inputs))  # an expert of its own kind, that no token was routed to
            if not self.calibrated or known_of is not None:
                yield [Member([name], known_of)]
            else:
                self.leave(f"{self.walk.names[index]}.{name}")

    def leave(self, name: str) -> None:
        """Keep a layer dense that no calibration token reached: nothing is known of what it would read."""
        layer = self.walk.model.get_submodule(name)
        self.plan.keep(name, UNUSED, layer.weight.numel() / self.parameters)

    def _sets(
        self, index: int, names: list[str], known: list[list[str]] | None, stream: Stream, twin: Twin | None
    ) -> Iterable[Siblings | Bank]:
        if known is None:
            return self.walk.observe(index, stream, names)
        if self.uneven or not self.room.waits:
            return self.walk.anew(index, stream, names, known, twin)
        sets = self.walk.staged(index, stream, names, known, twin)
        if self.team.size == 1:
            return sets
        block, kind = self.walk.blocks[index], Paired if twin else Siblings
        return self.team.in_step(sets, known, lambda missing: next(anew(block, names, [missing], [], self.team, kind)))

    def solve(self, members: list[Member]) -> Iterator[Solved]:
        """Quantize the layers of one set of siblings, or of experts side by side, those of one scheme together.

        Each process of the team solves some of them, and has all in the end.
        """
        for names, stack in same_scheme(members, self.plan.schemes.__getitem__):
            scheme = self.plan.schemes[names[0][0]]
            centred = all(self._absorbs(name) for one in names for name in one)

            def work(
                names: list[list[str]], stack: list[Member], scheme: Scheme = scheme, centred: bool = centred
            ) -> Iterator[Solved]:
                weights = [[self._dense_weight(name) for name in one] for one in names]
                return solve(names, weights, stack, scheme, self.settings, self.calibrated, centred)

            yield from shared(self.team, names, stack, scheme, self._weight_of, work)

    def _weight_of(self, name: str) -> tuple[tuple[int, int], torch.device]:
        layer = self.walk.model.get_submodule(name)
        return layers_of.shape_of(layer), layer.weight.device

    def _dense_weight(self, name: str) -> torch.Tensor:
        """The source's own values [out, in]: not those that the block computes with, which may be coarser."""
        layer = self.walk.model.get_submodule(name)
        weight = self.walk.read(f"{name}.weight")
        if weight is None:
            weight = layer.weight
        return layers_of.oriented(layer, weight.to(layer.weight.device))

    def _absorbs(self, name: str) -> bool:
        """Whether the layer has a bias for the mean of its error."""
        bias = getattr(self.walk.model.get_submodule(name), "bias", None)
        return self.settings.biases and bias is not None and f"{name}.bias" in self.storable

    def _absorb(self, means: Means, quantized: QuantizedWeight, result: LayerResult) -> None:
        """Put the mean of a layer's error into its bias; some rows at a time."""
        weight, name = self._dense_weight(result.name), f"{result.name}.bias"
        old = self.walk.read(name)
        assert old is not None
        new = old.float().to(weight.device)
        some = list(chunks(*weight.shape, elements=ROW_ELEMENTS))
        for rows, piece in zip(some, quantized.split([rows.stop - rows.start for rows in some])):
            new[rows] += means.absorbed(weight[rows], piece.dequantize(), result.upstream, result.residual, rows)
        self.walk.settle(name, new.to(old.dtype))

    def place(self, name: str, quantized: QuantizedWeight) -> None:
        """What follows sees the quantized weight, rounded to the dtype that the model computes in."""
        layer = self.walk.model.get_submodule(name)
        dense = layers_of.oriented(layer, quantized.dequantize(layer.weight.dtype))
        layer.weight = nn.Parameter(dense.to(layer.weight.device).contiguous(), requires_grad=False)  # from a part, too
