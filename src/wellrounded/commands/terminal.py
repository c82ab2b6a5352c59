"""What the commands share: a table on standard output, progress with time left on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..card import to_json

# Names and patterns are printed as they are, brackets included, and lines as long as they are, into pipes too.
PLAIN = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
stdout = Console(**PLAIN)
stderr = Console(stderr=True, **PLAIN)


def print_json(content: Any) -> None:
    """The one object on standard output."""
    print(to_json(content))


def print_table(rows: list[tuple[str, Any]], title: str = "") -> None:
    """Two columns, on standard output."""
    if title:
        stdout.print(title, style="italic")
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        stdout.print(Text.assemble((label.ljust(width), "bold"), "  ", str(value)))


def print_columns(header: list[str], rows: list[list[str]], left: int = 1) -> None:
    """Columns with a header, on standard output; the first `left` of them start together, the others end together."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for number, row in enumerate([header, *rows]):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        stdout.print("  ".join(cells).rstrip(), style=None if number else "bold")


class Bar:
    """Counts steps: a bar on a terminal, elsewhere a line every so often."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines = not stderr.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=stderr,
        )
        self.task = self.bar.add_task(what, total=None)

    def step(self, done: int, total: int, seconds: float) -> None:
        """`done` of `total` steps after `seconds`."""
        self.bar.update(self.task, completed=done, total=total)
        if self.lines and (done in (1, total) or done * 10 // total > (done - 1) * 10 // total):
            left = seconds / done * (total - done)
            stderr.print(f"{self.what}: {done}/{total}, {seconds:.0f} s, about {left:.0f} s left")


@contextmanager
def progress(what: str) -> Iterator[Bar]:
    """Show a bar while the block runs."""
    bar = Bar(what)
    if bar.lines:
        yield bar
        return
    with bar.bar:
        yield bar
