"""How far a run is, how fast, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report


@dataclass(frozen=True)
class Progress:
    """Told to the caller after every block: how many are done, of how many, and seconds since the start.

    layers     quantized so far
    tokens_per_second  how fast the last block's calibration tokens went through it, solving included
    left       seconds, None while nothing is known
    error_db   mean over the layers so far, None without data
    message    something to be said once, "" if there is nothing
    """

    done: int
    total: int
    seconds: float
    what: str
    layers: int = 0
    tokens_per_second: float = 0.0
    left: float | None = None
    error_db: float | None = None
    message: str = ""


class Clock:
    """Times the blocks of a run and tells of each; blocks that an earlier run has finished pass faster."""

    def __init__(self, total: int, tell: Callable[[Progress], None]) -> None:
        self.total, self.tell = total, tell
        self.done = 0
        self._started = self._last = time.perf_counter()
        self._solved: list[float] = []  # seconds of the blocks that this run has solved

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def enter(self) -> None:
        """The blocks begin: what came before does not count as time that blocks take."""
        self._last = time.perf_counter()

    def passed(self, name: str, tokens: int, replayed: bool, report: Report) -> None:
        """A block is done, through which `tokens` went."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self.done += 1
        if not replayed:
            self._solved.append(took)
        left = sum(self._solved) / len(self._solved) * (self.total - self.done) if self._solved else None
        errors = [layer.error_db for layer in report.layers if layer.error_db is not None]
        mean = sum(errors) / len(errors) if errors else None
        layers = len(report.layers)
        self.tell(Progress(self.done, self.total, self.seconds, name, layers, tokens / max(took, 1e-9), left, mean))

    def say(self, message: str) -> None:
        """Something that happened in between."""
        self.tell(Progress(self.done, self.total, self.seconds, "", message=message))


class Pace:
    """How long counted steps will still take, by those taken since the first one that was told of."""

    def __init__(self, done: int = 0) -> None:
        self._first, self._started = done, time.perf_counter()

    def left(self, done: int, total: int) -> str:
        """`, about 4 min left`, or nothing where nothing is known, or left."""
        if not self._first < done < total:
            return ""
        took = time.perf_counter() - self._started
        return f", about {duration(took / (done - self._first) * (total - done))} left"


def lines(progress: Progress) -> list[str]:
    """What there is to be said: something that happened, or that a block is done."""
    if progress.message:
        return [progress.message]
    said = [f"quantizing, block: {progress.done}/{progress.total}, {progress.what}", *figures(progress)]
    said.insert(2, f"{duration(progress.seconds)} so far")
    return [", ".join(said)]


def figures(progress: Progress) -> list[str]:
    """Layers, speed, time left and error, as far as they are known."""
    said = [f"{progress.layers:,} layers"]
    if progress.tokens_per_second > 0:
        said.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.left is not None:
        said.append(f"about {duration(progress.left)} left")
    if progress.error_db is not None:
        said.append(f"error {progress.error_db:.1f} dB")
    return said


def duration(seconds: float) -> str:
    """Seconds up to two minutes, minutes up to two hours, then hours and minutes.

    >>> duration(7.4), duration(340), duration(9000)
    ('7 s', '6 min', '2 h 30 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
