"""What a model hands its blocks, learned without running one, and what it makes of what the last one returns.

Models hand their blocks more than a hidden state (masks, rotary embeddings, and not the same ones for every block).
Every block's forward is replaced by a recorder that returns its hidden state unchanged, in the form in which the first
block returned one, and the model is called once. What a block returns besides and the model hands to a later one is
recorded by where it comes from. Chaining the real blocks with what was recorded gives exactly what the model gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .blocks import idle_parts
from .calls import Call, Carried, hidden_of

ODD = (TypeError, IndexError, ValueError, AttributeError, RuntimeError)  # what a model raises that is called oddly


class _Stop(Exception):  # noqa: N818  # a signal, not an error
    """Ends a call of the model at its last block, so that the head never runs."""


class Hollow:
    """A model whose blocks only record; everything outside them is in memory when it is called.

    names, blocks  the model's blocks;  at  what gives one of them its weights while it lasts

    called  the blocks that the model calls on text, known once something has entered
    idle    parts with blocks of their own that it does not call on text
    """

    def __init__(
        self, model: nn.Module, names: list[str], blocks: list[nn.Module],
        at: Callable[[int], AbstractContextManager[nn.Module]],
    ) -> None:  # fmt: skip
        self.model, self.names, self.blocks, self._at = model, names, blocks, at
        self._form: tuple | None = None  # of what blocks return: None for a tensor, or which places hold something
        self.called: list[int] = []
        self.idle: set[str] = set()

    @property
    def hands_on(self) -> bool:
        """Whether blocks return more than a hidden state."""
        return self._form is not None and any(self._form[1:])

    def enter(
        self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]
    ) -> tuple[torch.Tensor, list[Call | None]]:
        """The hidden state that enters the first block, and what each block is given besides, None if it is passed by.

        Other inputs may make a model compute between its blocks, or call others: that is looked at every time. Raises
        UsageError for a model whose blocks are no chain.
        """
        if not self.called:
            self._learn(ids[:1], None if mask is None else mask[:1], more)
        calls: list[Call | None] = [None for _ in self.blocks]
        entering: list[tuple[int, torch.Tensor]] = []

        def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            named, index = "hidden_states" in kwargs, self.blocks.index(block)
            entering.append((index, hidden_of(args, kwargs)))
            calls[index] = (args if named else args[1:], {**kwargs, "hidden_states": None} if named else kwargs)
            if index == self.called[-1]:
                raise _Stop

        with suppress(_Stop), self._instead(record, None), torch.no_grad():
            self._call(ids, mask, more)
        self._check(entering)
        return entering[0][1], calls

    def answer(self, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> Any:
        """What the model returns if its last block returned `hidden`."""
        with self._instead(None, lambda _: hidden):
            return self._call(ids, mask, more)

    def _learn(self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
        """In which form blocks return their hidden state, and that each is called once, in the order of the list.

        Raises UsageError if they are not, or cannot be called without what others compute.
        """
        self._form = self._first_form(ids, mask, more)
        simple = self._form and (True,) + (False,) * (len(self._form) - 1)
        problem = ""
        for form in dict.fromkeys([self._form, simple]):
            self._form = form  # a model may compute with what blocks return besides: then it is not handed on
            calls: list[tuple[int, torch.Tensor]] = []

            def note(block: nn.Module, args: tuple, kwargs: dict[str, Any], calls: list = calls) -> None:
                calls.append((self.blocks.index(block), hidden_of(args, kwargs)))

            try:
                with self._instead(note, None), torch.no_grad():
                    ran = self._modules_reached(ids, mask, more)
                break
            except ODD as error:
                problem = f"{type(error).__name__}: {error}"
        else:
            raise self._cannot(problem)
        self._check(calls)
        self.called = [index for index, _ in calls]
        self.idle = idle_parts(self.model, ran)

    def _first_form(self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> tuple | None:
        """How the first block that is called returns: None for a tensor, or which places of a tuple hold something."""
        seen: list[tuple[nn.Module, tuple, dict[str, Any]]] = []

        def first(*call: Any) -> None:
            seen.append(call)  # type: ignore[arg-type]
            raise _Stop

        try:
            with suppress(_Stop), self._instead(first, None), torch.no_grad():
                self._call(ids, mask, more)
        except ODD as error:
            raise self._cannot(f"{type(error).__name__}: {error}") from None
        if not seen:
            raise self._cannot("the model calls none of them")
        block, args, kwargs = seen[0]
        name = self.names[self.blocks.index(block)]
        try:
            with self._at(self.blocks.index(block)), torch.no_grad():
                output = block(*args, **kwargs)
        except ODD as error:
            raise self._cannot(f"{name} does not run by itself ({type(error).__name__}: {error})") from None
        if isinstance(output, (tuple, list)):
            return tuple(place is not None for place in output)
        if not isinstance(output, torch.Tensor):
            raise self._cannot(f"{name} returns a {type(output).__name__}, neither a tensor nor a tuple")
        return None

    def _modules_reached(self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> set[str]:
        """Call the model once; the names of the modules that ran."""
        ran: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: ran.add(name))
            for name, module in self.model.named_modules()
        ]
        try:
            self._call(ids, mask, more)
        finally:
            for hook in hooks:
                hook.remove()
        return ran

    def _check(self, calls: list[tuple[int, torch.Tensor]]) -> None:
        """Raises UsageError unless each block was called at most once, in order, with what the one before returned."""
        order = [index for index, _ in calls]
        for index in order:
            if order.count(index) > 1:
                raise self._cannot(f"{self.names[index]} is called {order.count(index)} times in one pass")
        if order != sorted(order):
            raise self._cannot("they are not called in the order of their list")
        for (_, before), (index, after) in pairwise(calls):
            if (before.data_ptr(), before.shape) != (after.data_ptr(), after.shape):
                raise self._cannot(
                    f"{self.names[index]} does not read what the block before it returns: the model computes between"
                )

    def _cannot(self, why: str) -> UsageError:
        return UsageError(
            f"{type(self.model).__name__}: its blocks ({self.names[0]} ... {self.names[-1]}) cannot be walked one "
            f"after another: {why}; calibration='none' rounds them plainly, without a walk"
        )

    def _call(self, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> Any:
        wanted = inspect.signature(self.model.forward).parameters
        caching = {"use_cache": False} if "use_cache" in wanted or "kwargs" in wanted else {}
        if "decoder_input_ids" in wanted:  # an encoder-decoder model: it reads the text, and is to write it
            caching["decoder_input_ids"] = ids
        return self.model(input_ids=ids, attention_mask=None if mask is None else mask.long(), **more, **caching)

    @contextmanager
    def _instead(self, record: Callable | None, last: Callable | None) -> Iterator[None]:
        """Replace every block's forward by one that only records, or that returns `last` from the final block."""

        def forward_of(index: int, block: nn.Module) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = hidden_of(args, kwargs)
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
