"""BlockWalk: one decoder block in memory at a time, each called exactly as the model would call it.

What it gives them besides a hidden state is learned in a hollow model (hollow.py); chaining the real blocks with that
gives exactly what the model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import NumericsError
from ..memory import give_back
from .blocks import find_blocks, shape_of
from .blocks import towers as find_towers
from .calls import carried_in, hidden_of_output, same, with_own_boxes
from .hollow import Hollow
from .inputs import HERE, Bank, Siblings
from .originals import Originals, Twin
from .siblings import Batch, anew, observe, staged
from .stream import SpillFile, Stream
from .weights import Ahead, Read, materialize, put, release


class _Stop(Exception):  # noqa: N818  # a signal, not an error
    """Ends a call of the model where nothing beyond is wanted."""


class BlockWalk:
    """Visits a model's blocks in order; only the visited one holds its weights.

    `model` has its parameters on the meta device (see weights.meta_copy), `read` delivers them by name. What lies
    outside the blocks (embeddings, norms, head) is in memory while it is needed (`outside`); what serves pictures or
    sound only if `towers` says so.
    """

    def __init__(self, model: nn.Module, read: Read, device: torch.device | str = "cpu", towers: bool = True) -> None:
        self.model, self.device = model, torch.device(device)
        self._read: Read = Ahead(read) if self.device.type == "cuda" else read  # a CPU has other things to do
        self._settled: dict[str, torch.Tensor] = {}  # what has become of tensors of the source
        self.names = find_blocks(model)
        self.blocks = [model.get_submodule(name) for name in self.names]
        self._leave = tuple(f"{name}." for name in [*self.names, *(() if towers else find_towers(model))])
        self._users = 0  # of what lies outside the blocks
        self.hessians = HERE
        self.hollow = Hollow(model, self.names, self.blocks, self.at)

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor by its name in the model, as it is now; None if the source has none."""
        return self._settled[name] if name in self._settled else self._read(name)

    def settle(self, name: str, value: torch.Tensor) -> None:
        """A parameter has another value from here on, in a block that is at hand and whenever it is read again."""
        self._settled[name] = value.cpu()
        put(self.model, name, value)

    def unsettle(self, name: str) -> None:
        """A parameter has the source's value again, as soon as somebody reads it."""
        self._settled.pop(name, None)

    def settled(self, block: str) -> dict[str, torch.Tensor]:
        """What has become of parameters of this block, by their names in the model."""
        return {name: value for name, value in self._settled.items() if name.startswith(f"{block}.")}

    def __iter__(self) -> Iterator[tuple[int, str, nn.Module]]:
        """(index, name, block), the block with its weights; they are dropped when the loop moves on."""
        for index, name in enumerate(self.names):
            with self.at(index) as block:
                if isinstance(self._read, Ahead):
                    self._read.announce(self._stored(index + 1))
                yield index, name, block

    def _stored(self, index: int) -> list[str]:
        """What is to be read for a block, if there is one of this number."""
        some = slice(index, index + 1)
        found = zip(self.names[some], self.blocks[some])
        return [f"{name}.{leaf}" for name, block in found for leaf, _ in block.named_parameters()]

    @contextmanager
    def at(self, index: int) -> Iterator[nn.Module]:
        """A block; while it lasts, it has its weights."""
        block = self.blocks[index]
        materialize(block, self.read, f"{self.names[index]}.", self.device)
        try:
            yield block
        finally:
            release(block)
            give_back()  # its holes, which the next one would fill only in part

    @contextmanager
    def outside(self) -> Iterator[None]:
        """While it lasts, what lies outside the blocks is in memory; whoever needs it more than once holds it open."""
        if not self._users:
            materialize(self.model, self.read, device=self.device, leave=self._leave)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                release(self.model, leave=self._leave)

    def stream(
        self, ids: torch.Tensor, mask: torch.Tensor | None, batch: int, more: Sequence[dict[str, Any]] = (),
        spill: SpillFile | None = None,
    ) -> Stream:  # fmt: skip
        """A stream of windows `ids` int64 [n, length], `mask` bool [n, length] or None, at the first block's door.

        `more` are each window's other inputs of the model, tensors by name; with them every window is a batch. Hidden
        states lie in `spill`, if there is one.
        """
        parts = list(ids.to(self.device).split(1 if more else batch))
        masks = [None] * len(parts) if mask is None else list(mask.to(self.device).split(1 if more else batch))
        inputs = [{name: self._input(value) for name, value in one.items()} for one in more]
        with self.outside():
            return self._entered(Stream(parts, masks, inputs, spill))

    def _entered(self, stream: Stream) -> Stream:
        for ids, mask, more in zip(stream.ids, stream.masks, stream.more):
            hidden, calls = self.hollow.enter(ids, mask, more)
            # Batches that give a block the same masks and rotary tables share them.
            twin = stream.calls[0] if stream.calls and same(stream.calls[0], calls) else calls
            stream.enter(hidden, with_own_boxes(twin))
        return stream

    def halved(self, stream: Stream) -> Stream:
        """The same windows where they are now, in batches of half as many; MemoryError if each has one already."""
        if all(len(ids) == 1 for ids in stream.ids):
            raise MemoryError("every batch is a single window")
        sizes = [[(len(ids) + 1) // 2, len(ids) // 2] if len(ids) > 1 else [1] for ids in stream.ids]
        parts = [part for ids, size in zip(stream.ids, sizes) for part in ids.split(size)]
        masks: list[torch.Tensor | None] = []
        for mask, size in zip(stream.masks, sizes):
            masks += [None] * len(size) if mask is None else mask.split(size)
        pairs = zip(stream.more, sizes)
        new = Stream(parts, masks, [more for more, size in pairs for _ in size], stream.spill)
        with self.outside():
            self._entered(new)
        new.take_over(stream, sizes)
        new.original = None if stream.original is None else self.halved(stream.original)
        return new

    def _input(self, value: torch.Tensor) -> torch.Tensor:
        """On the walk's device, and in the model's dtype if it has one: pictures come as float32."""
        return value.to(self.device, self.model.dtype if value.is_floating_point() else value.dtype)

    @torch.no_grad()
    def advance(self, index: int, *streams: Stream, block: nn.Module | None = None) -> None:
        """Run block `index`, or one in its place, over every batch and keep its outputs as the next hidden states.

        Nothing happens at a block that the model does not call on a batch, nor does anything reach its layers.
        """
        for stream in streams:
            for batch in stream.rest(index):
                self._step(index, stream, batch, block)

    def observe(self, index: int, stream: Stream, names: list[str]) -> list[Siblings | Bank]:
        """Hessians of the named layers of block `index`, one per set of siblings; the stream stays where it is."""
        return observe(self.blocks[index], names, self._batches(self._run, index, stream))

    def siblings(self, index: int, stream: Stream, names: list[str]) -> list[list[str]]:
        """Which of the named layers read the same tensor, in call order; found on the stream's last batch alone."""
        return self._siblings(index, names, self._batches(self._run, index, stream)[-1:])

    def all_siblings(self, index: int, stream: Stream, names: list[str]) -> list[list[str]]:
        """The same, found on every batch."""
        return self._siblings(index, names, self._batches(self._run, index, stream))

    def _siblings(self, index: int, names: list[str], batches: list[Batch]) -> list[list[str]]:
        return [siblings.names for siblings in observe(self.blocks[index], names, batches, weigh=False)]

    @torch.no_grad()
    def writers(self, index: int, stream: Stream, known: list[list[str]]) -> dict[str, float]:
        """Layers that write to the residual stream, and how much of what they write arrives there, found on one batch.

        What is added to a writer's output appears in the block's own, whatever else it does on its way.
        """
        batch = next(iter(stream.rest(index)), None)
        if batch is None:
            return {}
        hidden, found = stream.hidden(batch), {}
        before = hidden_of_output(self._run(index, stream, batch))
        push = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(index)).to(hidden)
        push *= 100 * hidden.float().square().mean().sqrt().to(hidden.dtype)
        for name in [names[0] for names in known if len(names) == 1]:
            layer = self.blocks[index].get_submodule(name)
            if shape_of(layer)[0] != len(push):
                continue
            handle = layer.register_forward_hook(lambda layer, args, output: output + push)
            try:
                moved = (hidden_of_output(self._run(index, stream, batch)) - before).float()
            finally:
                handle.remove()
            share = (moved @ push.float()).mean() / push.float().square().sum()
            if (moved - share * push.float()).square().mean() < 0.01 * moved.square().mean():
                found[name] = float(share)
        return found

    def staged(
        self, index: int, stream: Stream, names: list[str], known: list[list[str]], twin: Twin | None = None
    ) -> Iterator[Siblings | Bank]:
        """Advance the stream, stopping before each set of siblings with the Hessian of what arrives there.

        What the caller makes of a set's weights is what the rest of the block sees. See siblings.staged. With the
        block's `twin`, what arrives there in the original comes along, and the stream's original advances too.
        """
        batches = self._batches(self._step, index, stream)
        sets = partial(staged, self.blocks[index], names, known)
        if twin is None:
            return sets(batches, self.hessians)
        originals, theirs = self._originals(self._step, index, stream, twin)
        return originals.staged(partial(sets, originals.counted(batches), self.hessians), theirs, names, known)

    def anew(
        self, index: int, stream: Stream, names: list[str], known: list[list[str]], twin: Twin | None = None
    ) -> Iterator[Siblings | Bank]:
        """The same in as little memory as a single batch takes: every batch runs again for each set. See siblings.anew.

        No stream advances.
        """
        batches = self._batches(self._run, index, stream)
        sets = partial(anew, self.blocks[index], names, known)
        if twin is None:
            return sets(batches, self.hessians)
        originals, theirs = self._originals(self._run, index, stream, twin)
        return originals.anew(partial(sets, originals.counted(batches), self.hessians), theirs)

    def _originals(
        self, run: Callable[..., Any], index: int, stream: Stream, twin: Twin
    ) -> tuple[Originals, list[Batch]]:
        """What compares, and the original's batches."""
        assert stream.original is not None
        batches = self._batches(partial(run, block=twin.block), index, stream.original)
        return Originals(self.blocks[index], twin, stream, stream.original, list(stream.rest(index))), batches

    def _batches(self, run: Callable[..., Any], index: int, stream: Stream) -> list[Batch]:
        return [(partial(run, index, stream, batch), stream.masks[batch]) for batch in stream.rest(index)]

    def _step(self, index: int, stream: Stream, batch: int, block: nn.Module | None = None) -> None:
        output = self._run(index, stream, batch, block=block)
        hidden = hidden_of_output(output)
        # One NaN or Inf makes the sum one; a sum that only overflows is looked at twice.
        if not torch.isfinite(hidden.sum(dtype=torch.float32)) and not torch.isfinite(hidden).all():
            raise NumericsError(f"{self.names[index]}: its output holds NaN or Inf")
        stream.leave(batch, index, hidden)
        if not self.hollow.hands_on:
            return
        wanted = {c for call in stream.calls[batch][index + 1 :] for c in carried_in(call)}
        carried = {c: v for c, v in stream.carried[batch].items() if c in wanted}
        carried |= {c: output[c.place] for c in wanted if c.block == index}
        stream.carried[batch] = carried

    def output(self, stream: Stream, batch: int) -> tuple[torch.Tensor, bool]:
        """What the model makes of what the last block returned, and whether it is logits, not hidden states."""
        with self.outside(), torch.no_grad():
            output = self.hollow.answer(stream.hidden(batch), *stream.given(batch))
        logits = getattr(output, "logits", None)
        return (output[0], False) if logits is None else (logits, True)

    def logits(self, stream: Stream, batch: int) -> torch.Tensor:
        """[batch, length, vocabulary]: the model's head on what the last block returned."""
        return self.output(stream, batch)[0]

    def reaching(self, layer: nn.Module, stream: Stream, batch: int) -> torch.Tensor:
        """What a layer behind the last block reads; nothing behind it runs."""
        read: list[torch.Tensor] = []

        def stop(layer: nn.Module, args: tuple) -> None:
            read.append(args[0])
            raise _Stop

        handle = layer.register_forward_pre_hook(stop)
        try:
            with suppress(_Stop):
                self.output(stream, batch)
        finally:
            handle.remove()
        return read[0]

    def _run(self, index: int, stream: Stream, batch: int, block: nn.Module | None = None) -> Any:
        """What the block, or one in its place, returns."""
        args, kwargs = stream.call(batch, index)
        hidden, block = stream.hidden(batch), block or self.blocks[index]
        if "hidden_states" in kwargs:
            return block(*args, **{**kwargs, "hidden_states": hidden})
        return block(hidden, *args, **kwargs)
