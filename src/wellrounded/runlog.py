"""What a run tells: the line of a finished block, and `OUT.log`, in which every line of a run stays."""

from __future__ import annotations

import logging
import os
import reprlib
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .errors import UsageError, WellRoundedError

if TYPE_CHECKING:
    from .pipeline import Progress
    from .report import Report

LOGGER = logging.getLogger("wellrounded")


class RunLog:
    """A file beside `out` that is written while the block runs; an earlier run's is continued.

    A run that ends with nothing to keep (`keep` is to be set once there is something) leaves no new file behind.

    Raises UsageError if the file cannot be written.
    """

    def __init__(self, out: Path, asked: str) -> None:
        self.path, self.asked = out.with_name(out.name + ".log"), asked
        self.keep = False

    def __enter__(self) -> RunLog:
        self._made = [place for place in self.path.absolute().parents if not place.exists()]
        self._was_there = self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = logging.FileHandler(self.path, encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{self.path}: the log of the run cannot be written ({error}); move it elsewhere"
            ) from None
        form = logging.Formatter("%(asctime)s.%(msecs)03dZ %(process)d %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        form.converter = time.gmtime
        self._handler.setFormatter(form)
        self._level = LOGGER.level
        LOGGER.setLevel(logging.INFO)
        LOGGER.addHandler(self._handler)
        self._show = warnings.showwarning
        warnings.showwarning = self._showwarning
        LOGGER.info("wellrounded %s: %s", __version__, self.asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Whatever ended the run is the last that is said of it."""
        if isinstance(error, KeyboardInterrupt):
            LOGGER.error("stopped by Ctrl-C; the same command goes on")
        elif isinstance(error, WellRoundedError):
            LOGGER.error("%s", error, exc_info=error)
        elif error is not None:
            LOGGER.error("%s: %s", type(error).__name__, error, exc_info=error)
        warnings.showwarning = self._show
        LOGGER.removeHandler(self._handler)
        LOGGER.setLevel(self._level)
        self._handler.close()
        if error is not None and not self.keep and not self._was_there:
            self._discard()
        return False

    def _discard(self) -> None:
        with suppress(OSError):
            self.path.unlink()
            for place in self._made:
                place.rmdir()

    def _showwarning(self, message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        """Where it would have gone, and into the file too."""
        LOGGER.warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
        self._show(message, category, filename, lineno, *rest)

    def say(self, line: str) -> None:
        """Add a line."""
        LOGGER.info("%s", line)

    def telling(self, tell: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """`tell`, after a line in the file."""

        def both(progress: Progress) -> None:
            for said in lines(progress):
                self.say(said)
            tell(progress)

        return both

    def done(self, report: Report) -> Report:
        """The closing table, and what is wrong with the result."""
        rows = report.summary()
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            self.say(f"{label.ljust(width)}  {value}")
        for note in report.notes:
            self.say(f"note: {note}")
        for problem in report.problems():
            LOGGER.warning("check failed: %s", problem)
        self.say(f"finished: {report.out}")
        return report


def one_line(model: Any, out: Path, options: dict[str, Any]) -> str:
    """A call of `wellrounded.quantize` as it would be written, every option in it; long values are cut."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 400
    name = str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__
    asked = "".join(f", {key}={shown.repr(value)}" for key, value in options.items())
    return f"quantize({name!r}, {str(out)!r}{asked}) in {Path.cwd()}".replace("\n", " ")


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
