"""A trial: a whole quantization of which nothing stays but how good it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .checkpoint import Source, Writer
from .journal import difference
from .places import unfinished
from .progress import Progress
from .report import Report
from .request import Request
from .tensorfile import remove

Tell = Callable[[Progress], None]


def say(tell: Tell, message: str) -> None:
    """Something that is not about a block."""
    tell(Progress(0, 1, 0.0, "", message=message))


def attempt(request: Request, source: Source, place: Path, tell: Tell) -> Report:
    """Quantize beside the result, at `place`, where a run that is stopped goes on, and remove it; its report."""
    run = request.run(source)
    writer = Writer(place, run.request(), fresh=bool(difference(unfinished(place), run.request())))
    try:
        if said := run.settle(writer.run):
            say(tell, said)
        writer.note_run(run.noted())
        report = run.quantize(writer, tell)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    remove(writer.partial)
    return report
