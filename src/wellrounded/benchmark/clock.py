"""Medians that can be compared: what is compared runs in turn, in one process.

Whatever slows the machine down for a while then slows every candidate.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..errors import UsageError
from ..native import on_large_pages

READ_BYTES = 512 * 2**20
LEAST = 3  # samples behind a median

Sample = TypeVar("Sample")


class Clock:
    """Times what a device does: its own events on a GPU, where the host runs ahead of it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise UsageError(f"device {device!r} was asked for; bench can read the clocks of cpu and cuda only")
        self.gpu = self.device.type == "cuda"

    def mark(self) -> Any:
        """This moment in the device's work."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; waits for the second."""
        if not self.gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def __call__(self, call: Callable[[], object], times: int = 1) -> float:
        """Seconds that each of several calls takes."""
        start = self.mark()
        for _ in range(times):
            call()
        return self.between(start, self.mark()) / times


def alternate(measures: Sequence[Callable[[], Sample]], seconds: float) -> list[list[Sample]]:
    """What each gives, all called in turn for about `seconds`, at least LEAST times, after one call to warm up."""
    samples: list[list[Sample]] = [[] for _ in measures]
    for measure in measures:
        measure()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < LEAST:
        for measure, seen in zip(measures, samples):
            seen.append(measure())
    return samples


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    gpu = device.startswith("cuda")
    cpu = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
    return {
        "device": device,
        "processor": torch.cuda.get_device_name(device) if gpu else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def read_bandwidth(device: str, seconds: float) -> float:
    """Bytes per second that the device reads from its memory: the best product with a large tensor."""
    clock = Clock(device)
    values = on_large_pages(torch.empty(READ_BYTES // 4, device=device)).fill_(1)
    matrix, vector = values.view(-1, 4096), torch.ones(4096, device=device)
    ways = (lambda: values @ values, lambda: matrix @ vector)
    samples = alternate([lambda way=way: clock(way) for way in ways], seconds)  # type: ignore[misc]
    return READ_BYTES / min(itertools.chain(*samples))
