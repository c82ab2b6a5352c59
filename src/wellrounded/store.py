"""Where the parts of a result go: what a run asks of that, and writing one part while the next is made."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from .places import JOURNAL, partial_of


class Store(Protocol):
    """Where the parts of a result go, and which of them are there already: a checkpoint.Writer, or memory."""

    finished: dict[str, Any]
    scratch: Path | None  # a directory for what is needed during the run, if there is one
    amended: Any  # notes on tensors that were replaced later, None if none were

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None: ...

    def read_part(self, part: str) -> dict[str, torch.Tensor]: ...

    def state(self, name: str) -> Path: ...

    def amend(self, tensors: dict[str, torch.Tensor], notes: Any) -> None: ...

    def amendment(self) -> dict[str, torch.Tensor]: ...


class WriteBehind:
    """A store whose `add` returns while the part is still on its way, the one before it being there.

    So a GPU does not wait for the disk: a part comes from its device in the thread that writes it. What went wrong is
    raised by whatever is called next, and when the `with` block ends, before which all is written.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._pool = store, ThreadPoolExecutor(1, "writing")
        self._last: Future[None] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> Store:
        """The store, when nothing is on its way."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
        return self._store

    @property
    def finished(self) -> dict[str, Any]:
        return self._wait().finished

    @property
    def scratch(self) -> Path | None:
        return self._store.scratch

    @property
    def amended(self) -> Any:
        return self._store.amended

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None:
        self._last = self._pool.submit(self._wait().add, part, tensors, notes)

    def read_part(self, part: str) -> dict[str, torch.Tensor]:
        return self._wait().read_part(part)

    def state(self, name: str) -> Path:
        return self._store.state(name)

    def amend(self, tensors: dict[str, torch.Tensor], notes: Any) -> None:
        self._wait().amend(tensors, notes)

    def amendment(self) -> dict[str, torch.Tensor]:
        return self._wait().amendment()


class Follower:
    """A store of a process that does not write: it knows what is finished, and where to spill."""

    def __init__(self, out: Path, finished: dict[str, Any]) -> None:
        self.finished = finished
        self.scratch = partial_of(out) / "scratch"

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None:
        """The first process writes it."""
        self.finished[part] = notes

    def read_part(self, part: str) -> dict[str, torch.Tensor]:
        """Never called: what the first process reads comes from it."""
        raise KeyError(part)

    def leave(self) -> None:
        """Nothing is left on a machine where the first process does not write."""
        home = self.scratch.parent
        with suppress(OSError):  # they are not there, or not empty
            if not (home / JOURNAL).exists():  # else it is the first one's, who clears it away
                self.scratch.rmdir()
                home.rmdir()
