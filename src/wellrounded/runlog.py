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
from .progress import Progress, lines

if TYPE_CHECKING:
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
        warnings.showwarning = self._showwarning  # type: ignore[assignment]
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
