"""How much a run keeps in memory, and how much it has to do: what a forecast is asked about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BATCH_TOKENS = 4096  # enough for matmuls at full speed


@dataclass(frozen=True)
class Room:
    """How much a run keeps in memory, from fast to frugal.

    batch_tokens  per forward pass, one window at least; only this changes the last bits of the result
    waits         batches wait inside a block for its layers to be solved (siblings.staged), or run anew for each set
    spills        hidden states, and what a batch alone is given, lie in a file
    maps          large Hessians and factors lie in files that are mapped into memory
    """

    batch_tokens: int = BATCH_TOKENS
    waits: bool = True
    spills: bool = False
    maps: bool = False

    def __str__(self) -> str:
        parts = [f"batches of {self.batch_tokens:,} tokens"]
        parts += [] if self.waits else ["blocks run again for each set of layers"]
        parts += ["activations on disk"] if self.spills else []
        parts += ["large matrices on disk"] if self.maps else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Workload:
    """One process's share of a run: windows to calibrate on, and held-out ones, of one length; none for no data.

    processes  how many there are, to share the layers of a set of siblings too
    further    windows of other text that there are to train on, as far as that is known
    """

    windows: int
    held_out: int
    length: int
    padded: bool = False
    processes: int = 1
    further: int = 0

    @property
    def tokens(self) -> int:
        """Of the calibration windows, padding included."""
        return self.windows * self.length


def rooms(tokens: int, length: int) -> Iterator[Room]:
    """From the fastest to the most frugal."""
    yield Room(tokens)
    yield Room(tokens, waits=False)
    while True:
        yield Room(tokens, waits=False, spills=True)
        if tokens <= length:
            break
        tokens = max(length, tokens // 2)
    yield Room(tokens, waits=False, spills=True, maps=True)
