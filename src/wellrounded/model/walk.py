"""BlockWalk: one decoder block in memory at a time, each called exactly as the model would call it.

Models hand their blocks more than a hidden state (masks, rotary embeddings, and not the same ones for every block).
The hollow walk learns them without running a block: every block's forward is replaced by a recorder that returns its
hidden state unchanged, in the form in which the first block returned one, and the model is called once. What a block
returns besides and the model hands to a later one is recorded by where it comes from. Chaining the real blocks with
what was recorded gives exactly what the model gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import NumericsError, UsageError
from .blocks import find_blocks
from .blocks import towers as find_towers
from .siblings import Bank, Batch, Siblings, observe, staged
from .weights import Read, materialize, release

ODD = (TypeError, IndexError, ValueError, AttributeError, RuntimeError)  # what a model raises that is called oddly

Call = tuple[tuple, dict[str, Any]]  # what a block is given besides its hidden state


class _Stop(Exception):  # noqa: N818  # a signal, not an error
    """Ends a hollow walk at the last block, so that the head never runs."""


@dataclass(frozen=True)
class Carried:
    """Stands for what a block returns at a place of its tuple, until it has run."""

    block: int
    place: int


class Stream:
    """Token windows on their way through the blocks: one hidden state per batch, overwritten in place.

    `more` is what the model is given besides, batch by batch: pictures, say.
    """

    def __init__(
        self, ids: list[torch.Tensor], masks: list[torch.Tensor | None], more: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.ids, self.masks, self.more = ids, masks, list(more) or [{} for _ in ids]
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[Call]] = []  # [batch][block]
        self.carried: list[dict[Carried, Any]] = []  # [batch], what later blocks are still to be given


class BlockWalk:
    """Visits a model's blocks in order; only the visited one holds its weights.

    `model` has its blocks' parameters on the meta device (see weights.meta_copy), `read` delivers them by name. What
    lies outside the blocks (embeddings, norms, head) is read at once and stays; what serves pictures or sound only if
    `towers` says so.
    """

    def __init__(self, model: nn.Module, read: Read, device: torch.device | str = "cpu", towers: bool = True) -> None:
        self.model, self.read, self.device = model, read, torch.device(device)
        self.names = find_blocks(model)
        self.blocks = [model.get_submodule(name) for name in self.names]
        leave = [*self.names, *(() if towers else find_towers(model))]
        materialize(model, read, device=self.device, leave=tuple(f"{name}." for name in leave))
        self._form: tuple | None = None  # of what blocks return: None for a tensor, or which places hold something
        self.called: list[int] = []  # the blocks that the model calls on text, once a stream has come

    def __iter__(self) -> Iterator[tuple[int, str, nn.Module]]:
        """(index, name, block), the block with its weights; they are dropped when the loop moves on."""
        for index, (name, block) in enumerate(zip(self.names, self.blocks)):
            materialize(block, self.read, f"{name}.", self.device)
            try:
                yield index, name, block
            finally:
                release(block)

    def stream(
        self, ids: torch.Tensor, mask: torch.Tensor | None, batch: int, more: Sequence[dict[str, Any]] = ()
    ) -> Stream:
        """A stream of windows `ids` int64 [n, length], `mask` bool [n, length] or None, at the first block's door.

        `more` are each window's other inputs of the model, tensors by name; with them every window is a batch.
        """
        parts = list(ids.to(self.device).split(1 if more else batch))
        masks = [None] * len(parts) if mask is None else list(mask.to(self.device).split(1 if more else batch))
        stream = Stream(parts, masks, [{name: self._input(value) for name, value in one.items()} for one in more])
        if not self.called:
            self._learn(parts[0][:1], None if masks[0] is None else masks[0][:1], stream.more[0])
        for part, part_mask, besides in zip(parts, masks, stream.more):
            hidden, calls = self._hollow_walk(part, part_mask, besides)
            stream.hidden.append(hidden)
            # Batches that give a block the same masks and rotary tables share them.
            twin = stream.calls[0] if stream.calls and _same(stream.calls[0], calls) else calls
            stream.calls.append(twin)
            stream.carried.append({})
        return stream

    def _input(self, value: torch.Tensor) -> torch.Tensor:
        """On the walk's device, and in the model's dtype if it has one: pictures come as float32."""
        return value.to(self.device, self.model.dtype if value.is_floating_point() else value.dtype)

    @torch.no_grad()
    def advance(self, index: int, *streams: Stream) -> None:
        """Run block `index` over every batch of the streams and keep its outputs as the next hidden states.

        Nothing happens at a block that the model does not call on text, nor does anything reach its layers.
        """
        for stream in streams:
            for batch in range(len(stream.hidden)) if index in self.called else ():
                self._step(index, stream, batch)

    def observe(self, index: int, stream: Stream, names: list[str]) -> list[Siblings | Bank]:
        """Hessians of the named layers of block `index`, one per set of siblings; the stream stays where it is."""
        return observe(self.blocks[index], names, self._batches(self._run, index, stream))

    def siblings(self, index: int, stream: Stream, names: list[str]) -> list[list[str]]:
        """Which of the named layers read the same tensor, in call order; found on the stream's last batch alone."""
        found = observe(self.blocks[index], names, self._batches(self._run, index, stream)[-1:], weigh=False)
        return [siblings.names for siblings in found]

    def staged(self, index: int, stream: Stream, names: list[str], known: list[list[str]]) -> Iterator[Siblings | Bank]:
        """Advance the stream, stopping before each set of siblings with the Hessian of what arrives there.

        What the caller makes of a set's weights is what the rest of the block sees. See siblings.staged.
        """
        return staged(self.blocks[index], names, known, self._batches(self._step, index, stream))

    def _batches(self, run: Callable[[int, Stream, int], Any], index: int, stream: Stream) -> list[Batch]:
        if index not in self.called:
            return []
        return [(partial(run, index, stream, batch), mask) for batch, mask in enumerate(stream.masks)]

    def _step(self, index: int, stream: Stream, batch: int) -> None:
        output = self._run(index, stream, batch)
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if not torch.isfinite(hidden).all():
            raise NumericsError(f"{self.names[index]}: its output holds NaN or Inf")
        stream.hidden[batch] = hidden
        wanted = {c for call in stream.calls[batch][index + 1 :] for c in _carried(call)}
        carried = {c: v for c, v in stream.carried[batch].items() if c in wanted}
        carried |= {c: output[c.place] for c in wanted if c.block == index}
        stream.carried[batch] = carried

    def output(self, stream: Stream, batch: int) -> tuple[torch.Tensor, bool]:
        """What the model makes of what the last block returned, and whether it is logits, not hidden states."""

        def last(hidden: torch.Tensor) -> torch.Tensor:
            return stream.hidden[batch]

        with self._hollow(None, last), torch.no_grad():
            output = self._call_model(stream.ids[batch], stream.masks[batch], stream.more[batch])
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

    def _run(self, index: int, stream: Stream, batch: int) -> Any:
        """What the block returns."""
        args, kwargs = _resolved(stream.calls[batch][index], stream.carried[batch])
        hidden = stream.hidden[batch]
        if "hidden_states" in kwargs:
            return self.blocks[index](*args, **{**kwargs, "hidden_states": hidden})
        return self.blocks[index](hidden, *args, **kwargs)

    def _learn(self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
        """In which form blocks return their hidden state, and that each is called once, in the order of the list.

        Raises UsageError if they are not, or cannot be called without what others compute.
        """
        seen: list[tuple[nn.Module, tuple, dict[str, Any]]] = []

        def first(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append((block, args, kwargs))
            raise _Stop

        try:
            with suppress(_Stop), self._hollow(first, None), torch.no_grad():
                self._call_model(ids, mask, more)
        except ODD as error:
            raise self._cannot(f"{type(error).__name__}: {error}") from None
        if not seen:
            raise self._cannot("the model calls none of them")
        block, args, kwargs = seen[0]
        index = self.blocks.index(block)
        materialize(block, self.read, f"{self.names[index]}.", self.device)
        try:
            with torch.no_grad():
                output = block(*args, **kwargs)
        finally:
            release(block)
        if isinstance(output, (tuple, list)):
            self._form = tuple(place is not None for place in output)
        elif not isinstance(output, torch.Tensor):
            raise self._cannot(f"{self.names[index]} returns a {type(output).__name__}, neither a tensor nor a tuple")
        calls: list[nn.Module] = []
        states: list[torch.Tensor] = []

        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append(block)
            states.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        for form in dict.fromkeys([self._form, self._form and (True,) + (False,) * (len(self._form) - 1)]):
            self._form = form  # a model may compute with what blocks return besides: then it is not handed on
            calls.clear()
            states.clear()
            try:
                with self._hollow(note, None), torch.no_grad():
                    self._call_model(ids, mask, more)
                break
            except ODD as error:
                problem = f"{type(error).__name__}: {error}"
        else:
            raise self._cannot(problem)
        for name, one in zip(self.names, self.blocks):
            if calls.count(one) > 1:
                raise self._cannot(f"{name} is called {calls.count(one)} times in one pass")
        self.called = [index for index, one in enumerate(self.blocks) if one in calls]
        if calls != [self.blocks[index] for index in self.called]:
            raise self._cannot("they are not called in the order of their list")
        for before, after, index in zip(states, states[1:], self.called[1:]):
            if (before.data_ptr(), before.shape) != (after.data_ptr(), after.shape):
                raise self._cannot(f"{self.names[index]} does not read what the block before it returns")

    def _cannot(self, why: str) -> UsageError:
        return UsageError(
            f"{type(self.model).__name__}: its blocks ({self.names[0]} ... {self.names[-1]}) cannot be walked one "
            f"after another: {why}; calibration='none' rounds them plainly, without a walk"
        )

    def _hollow_walk(
        self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]
    ) -> tuple[torch.Tensor, list[Call]]:
        """The hidden state that enters the first block, and what each block is given besides."""
        calls: list[Call] = [((), {}) for _ in self.blocks]
        entering: list[torch.Tensor] = []

        def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            named = "hidden_states" in kwargs
            entering.append(kwargs["hidden_states"] if named else args[0])
            index = self.blocks.index(block)
            calls[index] = (args if named else args[1:], {**kwargs, "hidden_states": None} if named else kwargs)
            if index == self.called[-1]:
                raise _Stop

        with suppress(_Stop), self._hollow(record, None), torch.no_grad():
            self._call_model(ids, mask, more)
        return entering[0], calls

    def _call_model(self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> Any:
        wanted = inspect.signature(self.model.forward).parameters
        caching = {"use_cache": False} if "use_cache" in wanted or "kwargs" in wanted else {}
        if "decoder_input_ids" in wanted:  # an encoder-decoder model: it reads the text, and is to write it
            caching["decoder_input_ids"] = ids
        return self.model(input_ids=ids, attention_mask=None if mask is None else mask.long(), **more, **caching)

    @contextmanager
    def _hollow(self, record: Callable | None, last: Callable | None) -> Iterator[None]:
        """Replace every block's forward by one that only records, or that returns `last` from the final block."""

        def forward_of(index: int, block: nn.Module) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                if record is not None:
                    record(block, args, kwargs)
                if last is not None and index == self.called[-1]:
                    hidden = last(hidden)
                if self._form is None:
                    return hidden
                return hidden, *(Carried(index, n) if held else None for n, held in enumerate(self._form) if n)

            return forward

        own = {block: block.__dict__.get("forward") for block in self.blocks}  # hooks may have put one there already
        for index, block in enumerate(own):
            block.forward = forward_of(index, block)
        try:
            yield
        finally:
            for block, forward in own.items():
                del block.forward
                if forward is not None:
                    block.forward = forward


def _resolved(value: Any, carried: dict[Carried, Any]) -> Any:
    """The same with everything carried put in its place."""
    if isinstance(value, Carried):
        return carried[value]
    if isinstance(value, (tuple, list)) and any(_carried(value)):
        return type(value)(_resolved(one, carried) for one in value)
    if isinstance(value, dict) and any(_carried(value)):
        return {key: _resolved(one, carried) for key, one in value.items()}
    return value


def _carried(value: Any) -> Iterator[Carried]:
    if isinstance(value, Carried):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _carried(one)


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded calls are equal in every tensor and value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a is b or a == b)
