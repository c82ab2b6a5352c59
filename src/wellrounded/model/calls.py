"""What a model gives its blocks besides their hidden state, recorded from one call to be given again."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

Call = tuple[tuple, dict[str, Any]]  # arguments, without the hidden state
Box = UserDict  # in which blocks leave keys and values for later ones: transformers' KVSharingDict is one


@dataclass(frozen=True)
class Carried:
    """Stands for what a block returns at a place of its tuple, until it has run."""

    block: int
    place: int


def hidden_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state that a block is called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def hidden_of_output(output: Any) -> torch.Tensor:
    """The hidden state that a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def replaced(value: Any, new: Callable[[Any], Any]) -> Any:
    """The same with every leaf given to `new`; containers in which nothing changes are the same objects."""
    if isinstance(value, (tuple, list)):
        parts = [replaced(one, new) for one in value]
        if all(a is b for a, b in zip(parts, value)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        found = {key: replaced(one, new) for key, one in value.items()}
        return value if all(found[key] is value[key] for key in value) else found
    return new(value)


def carried_in(value: Any) -> Iterator[Carried]:
    if isinstance(value, Carried):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from carried_in(one)


def same(a: Any, b: Any) -> bool:
    """Whether two recorded calls are equal in every tensor and value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a is b or a == b)


def flat(value: Any) -> list[Any]:
    """Whatever lies in containers of containers, in their order."""
    found: list[Any] = []
    replaced(value, found.append)
    return found


def boxes_in(value: Any) -> list[Box]:
    """Each box once, in the order in which they are met."""
    return list({id(one): one for one in flat(value) if isinstance(one, Box)}.values())


def with_own_boxes(value: Any) -> Any:
    """The same with boxes of its own, in which lies what lay in the others."""
    own = {id(box): copy(box) for box in boxes_in(value)}
    return replaced(value, lambda one: own.get(id(one), one)) if own else value
