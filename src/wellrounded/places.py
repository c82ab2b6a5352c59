"""What lies beside a result while it is made, and what goes wrong with disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError

JOURNAL = "journal.jsonl"  # beside the parts, in `partial_of`
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK,
            errno.EINVAL}  # fmt: skip


def unfinished(out: Path) -> dict[str, Any]:
    """The request of a run that was to write `out` and has been stopped; {} if there is none."""
    try:
        first = (partial_of(out) / JOURNAL).read_bytes().partition(b"\n")[0]
        return dict(json.loads(first)["request"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def link(file: Path, place: Path) -> None:
    """The file has a second name, or there is a second file where the disk knows no such names."""
    try:
        os.link(file, place)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(file, place)


def partial_of(out: Path) -> Path:
    """Where everything is until `out` is complete."""
    return out.with_name(out.name + ".partial")


def is_placed(out: Path) -> bool:
    """Whether a run was stopped after it had put its result at `out`, before it had tidied up."""
    home = partial_of(out)
    try:
        lines = (home / JOURNAL).read_bytes().splitlines()
    except OSError:
        return False
    return b'{"finishing": true}' in lines and not (home / "ready").exists() and out.exists()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While it lasts, what goes wrong with the disk is a CheckpointError, which says how much room there is."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(nearest(path)).free
        raise CheckpointError(
            f"writing {path}: {error} ({free / 2**20:,.0f} MiB free); finished blocks are kept, make room or fix "
            "the permissions and run the same command again"
        ) from None


def nearest(path: Path) -> Path:
    """The path itself if it exists, else the closest directory above it that does."""
    return next(place for place in (path, *path.parents) if place.exists())
