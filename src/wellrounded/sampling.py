"""Text by the original model itself, to train on: the tokens that were calibrated on have been used up.

Kullback-Leibler divergence is an expectation over what the original says; its own samples are what it is taken over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import tensorfile
from .memory import exhausted
from .model.walk import BlockWalk
from .model.weights import materialize, release
from .progress import Pace

AT_ONCE = 64  # windows that are continued side by side
PROMPT = 8  # one part in so many of a window is read, the others are written
ODD = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)  # what `generate` raises


class Wordless(Exception):  # noqa: N818  # what a model is, not what went wrong
    """The model cannot write."""


def sample(walk: BlockWalk, windows: torch.Tensor, count: int, seed: int, say: Callable[[str], None]) -> torch.Tensor:
    """int64 [count, length]: continuations of the beginnings of windows int64 [n, length], drawn from the model.

    The whole model is in memory meanwhile. Tokens are drawn at temperature 1 from all of the vocabulary; where the
    same window is continued again, it is from another place in it. Raises Wordless if it cannot write, saying why.
    """
    model: Any = walk.model
    length = windows.shape[1]
    prompt = max(1, length // PROMPT)
    starts = [(n % len(windows), n // len(windows) * prompt % (length - prompt + 1)) for n in range(count)]
    prompts = torch.stack([windows[window, start : start + prompt] for window, start in starts])
    parts: list[torch.Tensor] = []
    pace = Pace()
    materialize(model, walk.read, device=walk.device)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for part in prompts.to(walk.device).split(AT_ONCE):
                parts.append(_continued(model, part, length).cpu())
                done = sum(map(len, parts))
                say(f"the original writes text to train on: {done} of {count} windows{pace.left(done, count)}")
    finally:
        release(model)
    return torch.cat(parts)


def _continued(model: Any, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [n, length]: what the model makes of beginnings int64 [n, some]."""
    new = length - prompts.shape[1]
    try:
        written = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, min_new_tokens=new, max_new_tokens=new,
        )  # fmt: skip
    except ODD as error:
        if exhausted(error):
            raise
        raise Wordless(f"{type(error).__name__}: {error}") from error
    return written[:, :length]


def sampled(
    walk: BlockWalk, windows: torch.Tensor, count: int, seed: int, state: Path, say: Callable[[str], None]
) -> torch.Tensor | None:
    """The same, kept in the file `state` for a run that goes on; None, having said why, if the model cannot do it."""
    if state.exists():
        return tensorfile.TensorFile(state).read("ids")
    try:
        ids = sample(walk, windows, count, seed, say)
    except Wordless as error:
        say(f"the original writes no text ({error})")
        return None
    new = state.with_name(f"{state.name}.new")
    tensorfile.write(new, {"ids": ids})
    new.replace(state)
    tensorfile.sync(state.parent)
    return ids
