"""Processes that make one run together: forked from this one, which knows torch already, and connected."""

import os
import pickle
import signal
import socket
import time
from functools import partial
from typing import NamedTuple

import torch

import tiny
import wellrounded as wr
from wellrounded.request import Request

LIMIT = 120  # seconds after which processes hang: far more than they take, even on a busy machine


class Ended(NamedTuple):
    """How a process ended: by itself (0) or a signal, with a result or an error, and whether that is for it to say."""

    how: int
    result: object = None
    error: str = ""
    said: bool = False
    code: int = 0


def together(work, size=2, limit=LIMIT) -> list[Ended]:
    """work(rank) in `size` processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [child(partial(work, rank), {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(size)]
    return ended(children, limit)


def child(work, environment) -> tuple[int, int]:
    """(process, a pipe that its result comes through)."""
    ours, its = os.pipe()
    pid = os.fork()
    if pid:
        os.close(its)
        return pid, ours
    os.close(ours)
    try:
        torch.set_num_threads(1)  # threads do not survive a fork
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            said = (work(),)
        except Exception as error:
            own = isinstance(error, wr.errors.WellRoundedError)
            why = f"{type(error).__name__}: {error}"
            said = (None, why, own and error.speaks, error.exit_code if own else 1)
        with os.fdopen(its, "wb") as pipe:
            pickle.dump(said, pipe)
    finally:
        os._exit(0)  # never back into pytest


def ended(children, limit) -> list[Ended]:
    end, found = time.monotonic() + limit, {}
    while len(found) < len(children) and time.monotonic() < end:
        for pid, pipe in children:
            if pid not in found:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    with os.fdopen(pipe, "rb") as said:
                        content = said.read()
                    how = os.waitstatus_to_exitcode(status)
                    found[pid] = Ended(how, *(pickle.loads(content) if content else ()))
        time.sleep(0.01)
    hung = [pid for pid, _ in children if pid not in found]
    for pid in hung:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not hung, f"{len(hung)} of {len(children)} processes still waited after {limit} s: {found}"
    return [found[pid] for pid, _ in children]


def quantize(model, out, **options):
    """By preset "fast" unless told otherwise: where small differences add up to few other codes."""
    return tiny.quantize(model, out, **{"group_size": 32, "preset": "fast", **options})


def run(model, out, size=2, before=lambda rank: None, **options) -> list[Ended]:
    """A quantization by `size` processes, in each of which `before(rank)` has been done."""

    def work(rank):
        before(rank)
        return quantize(model, out, **options)

    return together(work, size)


def use(room):
    """From here on, runs of this process keep that much in memory."""
    Request._room = lambda self, run, work: (room, 0, "")
