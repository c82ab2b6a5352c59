"""The processes that torchrun has started: how they find each other, and how they end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UsageError
from .team import AGAIN, Lost, Team

PATIENCE = timedelta(hours=2)  # for a process that solves a large layer while the others wait for it


@contextmanager
def joined(device: str = "cpu") -> Iterator[tuple[Team, str]]:
    """The team that torchrun has started, for as long as the block lasts, and this process's device.

    All its processes must come here. A program that has connected its processes itself is left alone: each of its
    calls is a run of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield Team(), device
        return
    cuda, place = device.startswith("cuda"), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and place < torch.cuda.device_count():
        device = f"cuda:{place}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise UsageError(
            f"WORLD_SIZE={size} says that this is one of {size} processes, but they cannot be connected ({line}); "
            "start them with torchrun, or one without WORLD_SIZE"
        ) from None
    team = Team(dist.get_rank(), size)
    try:
        with _terminable(team), team.bound():
            if cuda and place >= torch.cuda.device_count():
                raise UsageError(
                    f"{neighbours()} processes were started on a machine with {torch.cuda.device_count()} GPUs; start "
                    "one for each (--nproc-per-node), or use --device cpu"
                )
            yield team, device
    finally:
        dist.destroy_process_group()


@contextmanager
def _terminable(team: Team) -> Iterator[None]:
    """While it lasts, SIGTERM, which torchrun sends when another process has ended, ends this one like an error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the next one does not wait
        team.silence()
        stopped = Lost(f"stopped by SIGTERM, which torchrun sends when another process has ended; {AGAIN}")
        stopped.speaks = team.rank < 2
        raise stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def neighbours() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the one of its run that a user hears."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized()
    return alone or os.environ.get("RANK", "0") == "0"
