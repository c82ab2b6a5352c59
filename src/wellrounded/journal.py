"""A file of JSON lines that one process at a time holds: the lock and the memory of a run."""

from __future__ import annotations

import errno
import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UsageError
from .tensorfile import sync

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

FAR = 2**40  # Windows locks bytes against reading too; nobody reads these
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class Journal:
    """Lines that are on the disk once they are noted, held against other processes until it is closed.

    The lock is the operating system's: it goes with the process, however that ends. Making it makes the directory.

    Raises UsageError naming the process that holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        while self._handle is None:  # its last holder may remove it, and the directory, at any moment
            self._handle = _hold(path)
        sync(path.parent)
        sync(path.parent.parent)

    def lines(self) -> list[dict[str, Any]]:
        """What has been noted. A crash may have cut off the last line: it does not count, and is taken away."""
        assert self._handle is not None
        whole, newline, cut = self.path.read_bytes().rpartition(b"\n")
        if cut:
            os.ftruncate(self._handle, len(whole) + len(newline))
        return [json.loads(line) for line in whole.splitlines()]

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line; all of it is on the disk afterwards, or none is."""
        assert self._handle is not None
        end = os.lseek(self._handle, 0, os.SEEK_END)
        left = memoryview((json.dumps(entry) + "\n").encode())
        try:
            while left:
                left = left[os.write(self._handle, left) :]
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, end)
            raise

    def clear(self) -> None:
        """Forget every line."""
        assert self._handle is not None
        os.ftruncate(self._handle, 0)

    def remove(self) -> None:
        """The file is gone, and with it the lock."""
        if fcntl is None:
            self.close()  # Windows removes no file that is open
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()


def _hold(path: Path) -> int | None:
    """A handle that holds the lock, None if the file went away meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except FileNotFoundError:
        return None
    try:
        _lock(handle, path)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _lock(handle: int, path: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in TAKEN:
            raise UsageError(
                f"{path.parent}: another process{_holder(path)} is writing it; wait until it has ended, or name "
                "another directory for the result"
            ) from None
        # Some network file systems know no locks: better to work there without than not at all.
        warnings.warn(
            f"{path.parent}: files there cannot be locked ({error}); see that no second run writes to it", stacklevel=6
        )


def _holder(path: Path) -> str:
    """Its number, if it has come to note it."""
    with suppress(OSError, ValueError):
        pids = [line["pid"] for line in map(json.loads, path.read_bytes().splitlines()) if "pid" in line]
        return f" ({pids[-1]})" if pids else ""
    return ""


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two requests, in words; of dicts within them, the keys that do. "" if they are equal."""
    now = json.loads(json.dumps(now))
    said = []
    for key in {**before, **now}:
        was, new = before.get(key), now.get(key)
        if was != new:
            was, new = _apart(was, new)
            said.append(f"{key}: was {_shown(was)}, now {_shown(new)}")
    return "; ".join(said)


def _apart(was: Any, new: Any) -> tuple[Any, Any]:
    if not (isinstance(was, dict) and isinstance(new, dict)):
        return was, new
    pairs = {key: _apart(was.get(key), new.get(key)) for key in {**was, **new} if was.get(key) != new.get(key)}
    return {k: v for k, (v, _) in pairs.items() if k in was}, {k: v for k, (_, v) in pairs.items() if k in new}


def _shown(value: Any, keys: int = 3, width: int = 100) -> str:
    if isinstance(value, dict):
        shown = [f"{key}: {_shown(inner)}" for key, inner in list(value.items())[:keys]]
        more = [f"and {len(value) - keys} more"] if len(value) > keys else []
        return "{" + ", ".join([*shown, *more]) + "}"
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}..."
