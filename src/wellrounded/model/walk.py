"""BlockWalk: one decoder block in memory at a time, each called exactly as the model would call it.

Models hand their blocks more than a hidden state (masks, rotary embeddings, and not the same ones for every block).
The hollow walk learns them without running a block: every block's forward is replaced by a recorder that returns its
hidden state unchanged, and the model is called once. Chaining the real blocks with what was recorded gives exactly
what the model gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, NumericsError, UsageError
from .blocks import find_blocks
from .siblings import Batch, Siblings, observe, staged

Read = Callable[[str], "torch.Tensor | None"]  # a tensor of the source by its name in the model; None if it has none
Call = tuple[tuple, dict[str, Any]]  # what a block is given besides its hidden state


class _Stop(Exception):  # noqa: N818  # a signal, not an error
    """Ends a hollow walk at the last block, so that the head never runs."""


class Stream:
    """Token windows on their way through the blocks: one hidden state per batch, overwritten in place."""

    def __init__(self, ids: list[torch.Tensor], masks: list[torch.Tensor | None]) -> None:
        self.ids, self.masks = ids, masks
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[Call]] = []  # [batch][block]


class BlockWalk:
    """Visits a model's blocks in order; only the visited one holds its weights.

    `model` has its blocks' parameters on the meta device (see `hollow_copy`), `read` delivers them by name. What lies
    outside the blocks (embeddings, norms, head) is read at once and stays.
    """

    def __init__(self, model: nn.Module, read: Read, device: torch.device | str = "cpu") -> None:
        self.model, self.read, self.device = model, read, torch.device(device)
        self.names = find_blocks(model)
        self.blocks = [model.get_submodule(name) for name in self.names]
        materialize(model, read, device=self.device, leave=tuple(f"{name}." for name in self.names))
        self._tuple_output = False

    def __iter__(self) -> Iterator[tuple[int, str, nn.Module]]:
        """(index, name, block), the block with its weights; they are dropped when the loop moves on."""
        for index, (name, block) in enumerate(zip(self.names, self.blocks)):
            materialize(block, self.read, f"{name}.", self.device)
            try:
                yield index, name, block
            finally:
                _release(block)

    def stream(self, ids: torch.Tensor, mask: torch.Tensor | None, batch: int) -> Stream:
        """A stream of windows `ids` int64 [n, length], `mask` bool [n, length] or None, at the first block's door."""
        parts = list(ids.to(self.device).split(batch))
        masks = [None] * len(parts) if mask is None else list(mask.to(self.device).split(batch))
        stream = Stream(parts, masks)
        for part, part_mask in zip(parts, masks):
            hidden, calls = self._hollow_walk(part, part_mask)
            stream.hidden.append(hidden)
            # Batches that give a block the same masks and rotary tables share them.
            twin = stream.calls[0] if stream.calls and _same(stream.calls[0], calls) else calls
            stream.calls.append(twin)
        return stream

    @torch.no_grad()
    def advance(self, index: int, *streams: Stream) -> None:
        """Run block `index` over every batch of the streams and keep its outputs as the next hidden states."""
        for stream in streams:
            for batch in range(len(stream.hidden)):
                self._step(index, stream, batch)

    def observe(self, index: int, stream: Stream, names: list[str]) -> list[Siblings]:
        """Hessians of the named layers of block `index`, one per set of siblings; the stream stays where it is."""
        return observe(self.blocks[index], names, self._batches(self._run, index, stream))

    def siblings(self, index: int, stream: Stream, names: list[str]) -> list[list[str]]:
        """Which of the named layers read the same tensor, in call order; found on the stream's last batch alone."""
        found = observe(self.blocks[index], names, self._batches(self._run, index, stream)[-1:], weigh=False)
        return [siblings.names for siblings in found]

    def staged(self, index: int, stream: Stream, names: list[str], known: list[list[str]]) -> Iterator[Siblings]:
        """Advance the stream, stopping before each set of siblings with the Hessian of what arrives there.

        What the caller makes of a set's weights is what the rest of the block sees. See siblings.staged.
        """
        return staged(self.blocks[index], names, known, self._batches(self._step, index, stream))

    def _batches(self, run: Callable[[int, Stream, int], Any], index: int, stream: Stream) -> list[Batch]:
        return [(partial(run, index, stream, batch), mask) for batch, mask in enumerate(stream.masks)]

    def _step(self, index: int, stream: Stream, batch: int) -> None:
        output = self._run(index, stream, batch)
        if not torch.isfinite(output).all():
            raise NumericsError(f"{self.names[index]}: its output holds NaN or Inf")
        stream.hidden[batch] = output

    def logits(self, stream: Stream, batch: int) -> torch.Tensor:
        """[batch, length, vocabulary]: the model's head on what the last block returned."""

        def last(hidden: torch.Tensor) -> torch.Tensor:
            return stream.hidden[batch]

        with self._hollow(None, last, self._tuple_output), torch.no_grad():
            return self._call_model(stream.ids[batch], stream.masks[batch]).logits

    def _run(self, index: int, stream: Stream, batch: int) -> torch.Tensor:
        args, kwargs = stream.calls[batch][index]
        hidden = stream.hidden[batch]
        if "hidden_states" in kwargs:
            output = self.blocks[index](*args, **{**kwargs, "hidden_states": hidden})
        else:
            output = self.blocks[index](hidden, *args, **kwargs)
        self._tuple_output = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    def _hollow_walk(self, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, list[Call]]:
        """The hidden state that enters the first block, and what each block is given besides."""
        problems = []
        for as_tuple in (False, True):  # what blocks return is known only once one has run
            calls: list[Call] = []
            first: list[torch.Tensor] = []

            def record(args: tuple, kwargs: dict[str, Any], calls: list[Call] = calls, first: list = first) -> None:
                named = "hidden_states" in kwargs
                first.append(kwargs["hidden_states"] if named else args[0])
                calls.append((args if named else args[1:], {**kwargs, "hidden_states": None} if named else kwargs))
                if len(calls) == len(self.blocks):
                    raise _Stop

            try:
                with self._hollow(record, None, as_tuple), torch.no_grad():
                    self._call_model(ids, mask)
            except _Stop:
                return first[0], calls
            except (TypeError, IndexError, ValueError, AttributeError, RuntimeError) as error:
                problems.append(f"{type(error).__name__}: {error}")
            else:
                problems.append(f"{len(calls)} of {len(self.blocks)} blocks were called")
        raise UsageError(
            f"{type(self.model).__name__}: its blocks ({self.names[0]} ... {self.names[-1]}) cannot be walked one "
            f"after another: {problems[0]}"
        )

    def _call_model(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return self.model(input_ids=ids, attention_mask=None if mask is None else mask.long(), use_cache=False)

    @contextmanager
    def _hollow(self, record: Callable | None, last: Callable | None, as_tuple: bool) -> Iterator[None]:
        """Replace every block's forward by one that only records, or that returns `last` from the final block."""

        def forward_of(block: nn.Module) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                if record is not None:
                    record(args, kwargs)
                if last is not None and block is self.blocks[-1]:
                    hidden = last(hidden)
                return (hidden, None) if as_tuple else hidden

            return forward

        own = [block.__dict__.get("forward") for block in self.blocks]  # hooks may have put one there already
        for block in self.blocks:
            block.forward = forward_of(block)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, own):
                del block.forward
                if forward is not None:
                    block.forward = forward


def materialize(
    module: nn.Module, read: Read, prefix: str = "", device: torch.device | str = "cpu", leave: tuple[str, ...] = ()
) -> None:
    """Give every meta parameter below `module` its values; tied ones are read once and stay tied.

    `prefix` is the module's own name with a dot; tensors whose full name starts with one of `leave` are left alone.
    Persistent buffers come from the source, the others were computed when the model was built. Raises
    CheckpointError for a tensor that the source lacks or has in another shape.
    """
    made: dict[int, nn.Parameter] = {}
    aliases: dict[int, list[str]] = {}
    places = []
    for path, owner in module.named_modules():
        base = f"{prefix}{path}." if path else prefix
        if leave and base.startswith(leave):
            continue
        for attr, buffer in owner._buffers.items():
            stored = None if buffer is None or attr in owner._non_persistent_buffers_set else read(base + attr)
            if buffer is not None:
                owner._buffers[attr] = (buffer if stored is None else stored.to(buffer.dtype)).to(device)
        for attr, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                places.append((owner, attr, parameter))
                aliases.setdefault(id(parameter), []).append(base + attr)
    for owner, attr, parameter in places:
        if id(parameter) not in made:
            names = aliases[id(parameter)]
            value = next((v for v in map(read, names) if v is not None), None)
            if value is None:
                raise CheckpointError(f"{names[0]}: the source has no such tensor, but the model needs it")
            if value.shape != parameter.shape:
                needs, has = tuple(parameter.shape), tuple(value.shape)
                raise CheckpointError(f"{names[0]}: the model needs shape {needs}, the source has {has}")
            if not torch.isfinite(value).all():
                raise NumericsError(f"{names[0]}: the source's tensor holds NaN or Inf; download the model again")
            made[id(parameter)] = nn.Parameter(value.to(device, parameter.dtype), requires_grad=False)
        owner._parameters[attr] = made[id(parameter)]


def meta_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` whose parameters hold no memory: on the meta device, in `dtype` where the model has its own.

    Buffers are copied with their values (rotary tables are computed, not stored). The model itself is untouched.
    """
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        kept = dtype if parameter.dtype == usual else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta", dtype=kept), requires_grad=False)
    return copy.deepcopy(model, memo)


def _release(block: nn.Module) -> None:
    """Put the parameters of a block back on the meta device; its buffers are few and stay."""
    for owner in block.modules():
        for attr, parameter in owner._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                owner._parameters[attr] = nn.Parameter(empty, requires_grad=False)


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded calls are equal in every tensor and value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a is b or a == b)
