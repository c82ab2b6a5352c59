"""What the commands share: a table on standard output, progress with time left on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ..card import to_json
from ..progress import Progress, duration, figures, lines

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
    """Counts steps: a bar on a terminal, elsewhere a line every so often, or for every block."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines = not stderr.is_terminal
        self.bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
            console=stderr,
        )
        self.task = self.bar.add_task(what, total=None, said="")

    def step(self, done: int, total: int, seconds: float) -> None:
        """`done` of `total` steps after `seconds`."""
        left = duration(seconds / max(done, 1) * (total - done))
        self.bar.update(self.task, completed=done, total=total, said=f"about {left} left" if done < total else "")
        if self.lines and (done in (1, total) or done * 10 // total > (done - 1) * 10 // total):
            stderr.print(f"{self.what}: {done}/{total}, {seconds:.0f} s, about {left} left")

    def tell(self, progress: Progress) -> None:
        """A block is done, or something happened in between."""
        if self.lines or progress.message:
            for line in lines(progress):
                stderr.print(line)
        if not progress.message:
            said = ", ".join(figures(progress))
            self.bar.update(self.task, completed=progress.done, total=progress.total, said=said)


@contextmanager
def progress(what: str, shown: bool = True) -> Iterator[Bar]:
    """Show a bar while the block runs; one that is not `shown` is never told of anything."""
    bar = Bar(what)
    if bar.lines or not shown:
        yield bar
        return
    with bar.bar:
        yield bar
