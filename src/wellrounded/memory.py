"""Memory of this process and of the machine: what is used, what may be used, and how running out of it looks."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .errors import UsageError

UNITS = {"": 1, "B": 1} | {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}
UNITS |= {letter: 1024**n for n, letter in enumerate("KMGT", 1)}
M_MMAP_THRESHOLD = -3  # malloc.h
GROUPS = {"": ("/sys/fs/cgroup", "memory.max"), "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")}
EXHAUSTED = r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory"


def peak_rss_bytes() -> int:
    """The largest resident set so far, in bytes; 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The resident set now, in bytes; its peak where only that is known."""
    with suppress(OSError, ValueError):
        import resource

        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return peak_rss_bytes()


def give_back() -> None:
    """Return to the system what the C library has free: large tensors leave holes that would add up over a run."""
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def keep_few_products() -> None:
    """Let torch and oneDNN remember fewer products of matrices than 1024, each with its number of rows.

    What they remember of one in bfloat16 takes 0.7 MB, and every expert reads another number of tokens. No result
    depends on it, nor did time where it was measured (dev/LOG.md). They look at this once, before their first such
    product, in each thread; who has set it otherwise is heeded.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # descriptions of products, and their code
        os.environ.setdefault(name, "64")


@contextmanager
def tidy() -> Iterator[None]:
    """While it lasts, whatever is larger than 4 MiB goes back to the system the moment it is freed (glibc's alone).

    Usually the C library comes to keep everything below 32 MiB, and over hours its holes add up. What that costs is
    clearing pages anew: a few percent.
    """
    _keep_below(4 * 2**20)
    try:
        yield
    finally:
        _keep_below(32 * 2**20)  # where its own rule ends up


def _keep_below(size: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)


def allowed_bytes() -> int | None:
    """What this process may come to hold in all: what it has, and what is free, within its limits; None if unknown."""
    return min(_allowances(), default=None)


def free_bytes(device: str) -> int | None:
    """What a run on this device may use: of a GPU, what is free of its memory; else what the process is allowed."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return allowed_bytes()


def _allowances() -> Iterator[int]:
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        yield rss_bytes() + free["MemAvailable"]
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if soft != resource.RLIM_INFINITY:
            yield soft
    yield from _cgroup_limits()


def _cgroup_limits() -> Iterator[int]:
    """The limits of the control groups that this process is in, version 1 and 2."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in GROUPS:
                continue
            root, name = GROUPS[controllers]
            here = Path(root) / path.lstrip("/")
            for directory in (here, *here.parents):
                with suppress(OSError, ValueError):  # "max" is no number
                    limit = int((directory / name).read_text())
                    if limit < 2**60:  # version 1 has a huge number for none
                        yield limit
                if directory == Path(root):
                    break


def parse_size(text: str | int) -> int:
    """Bytes: a number of them, or a number with a unit, as 4GiB (or 4G, 1024 to the next), 4GB (1000 to the next)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UsageError(f"{text!r} was given as an amount of memory; give one like 4GiB, 3000MB or 6G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def shown(size: float) -> str:
    """Bytes as people read them.

    >>> shown(3 * 2**30)
    '3.00 GiB'
    """
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def exhausted(error: BaseException) -> bool:
    """Whether this says that an allocation failed, on the host or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and re.search(EXHAUSTED, str(error)) is not None
