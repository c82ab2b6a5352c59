"""What the commands share: a table on standard output, progress with time left on standard error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Other libraries' progress bars and advice would drown ours; their errors still show. For the commands only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def print_table(rows: list[tuple[str, Any]], title: str | None = None) -> None:
    """Two columns, on standard output."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in rows:
        table.add_row(f"[bold]{label}", str(value))
    stdout.print(table)


class Bar:
    """Counts steps: a bar on a terminal, elsewhere a line every so often."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines = not stderr.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False), console=stderr,
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
