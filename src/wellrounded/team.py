"""The processes of one run: torchrun starts them, torch.distributed connects them, and each does its share.

Calibration windows are split over the processes, Hessians summed, the layers of a set of siblings (and the experts of a
layer) solved by different ones; the first writes. A run without torchrun is a team of one, for which all of this is
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .core.hessian import Hessian
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import UsageError, WellRoundedError
from .memory import exhausted
from .model.siblings import Hessians, Member
from .solving import Solved

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for a process that solves a large layer while the others wait for it


class Lost(WellRoundedError):  # noqa: N818  # a process, not an error
    """Another process of the run has ended; it says itself why."""


class Team(Hessians):
    """A process among `size` that make one run; `rank` 0, the first, is the one that writes and speaks."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """What the first process says."""
        if self.size == 1:
            return value
        box = [value]
        with self._together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all(self, value: T) -> list[T]:
        """What each process says, in order."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(said, value)
        return said

    def first_does(self, work: Callable[[], T]) -> T | None:
        """Done by the first process alone; what it raises on purpose, all raise. Others return None."""
        result, error = None, None
        if self.first:
            try:
                result = work()
            except WellRoundedError as failed:
                error = failed
        told = self.agree(None if error is None else str(error))
        if error is not None:
            raise error
        if told is not None:
            raise self._lost(told)
        return result

    def whole(self, hessian: Hessian | None, size: int, device: torch.device) -> Hessian | None:
        """The sum of what all processes have counted, None if that is nothing."""
        if self.size == 1:
            return hessian
        hessian = hessian or Hessian(size, device)
        with self._together():
            hessian.sum_over(dist.all_reduce)
        return hessian if hessian.tokens else None

    def share(self, tensors: Sequence[torch.Tensor], owner: int) -> None:
        """Fill the tensors, of equal shapes and dtypes everywhere, with what the owner has in them."""
        with self._together():
            for tensor in tensors:
                dist.broadcast(tensor, src=owner)

    def tensors(self, read: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What the first process reads."""
        if self.size == 1:
            return read()
        found = read() if self.first else {}
        about = self.agree({name: (tensor.shape, tensor.dtype) for name, tensor in found.items()})
        found = found or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in about.items()}
        self.share(list(found.values()), owner=0)
        return found

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A connection that breaks means that a process has ended."""
        try:
            yield
        except RuntimeError as error:
            if exhausted(error):
                raise
            raise self._lost(
                "another process of this run has ended, and so does this one; finished blocks are kept, run the same "
                f"command again, with as many processes as you like ({str(error).strip().splitlines()[0]})"
            ) from None

    def _lost(self, why: str) -> Lost:
        lost = Lost(why)
        lost.speaks = self.first
        return lost

    def mine(self, windows: Any) -> Any:
        """This process's share of windows; UsageError if there are fewer of them than processes."""
        if len(windows) < self.size:
            raise UsageError(
                f"{self.size} processes were started, but there are only {len(windows)} windows to share; start fewer "
                "(--nproc-per-node), or give more calibration data"
            )
        return self.some(windows)

    def some(self, windows: Any) -> Any:
        """The same, none if there are too few."""
        return windows if self.size == 1 else windows[self.rank :: self.size]


def shared(
    team: Team,
    names: list[list[str]],
    members: list[Member],
    scheme: Scheme,
    about: Callable[[str], tuple[tuple[int, int], torch.device]],
    work: Callable[[list[list[str]], list[Member]], Iterator[Solved]],
) -> Iterator[Solved]:
    """What `work` makes of the members' layers, each layer solved by one process and known to all of them.

    Of members side by side, experts, each process takes some; of a single one, some of its layers. `about` is a
    layer's shape (outputs, inputs), and where it is.
    """
    if team.size == 1:
        yield from work(names, members)
        return
    if len(members) > 1:
        mine = work(names[team.rank :: team.size], members[team.rank :: team.size])
    else:
        mine = work([names[0][team.rank :: team.size]], members)
    empty = not (names[team.rank :: team.size] if len(members) > 1 else names[0][team.rank :: team.size])
    solved = {} if empty else {result.name: (weight, result) for weight, result in mine}
    said = team.all([result for _, result in solved.values()])
    owners = {result.name: (rank, result) for rank, results in enumerate(said) for result in results}
    for name in (name for one in names for name in one):
        owner, result = owners[name]
        weight = solved[name][0] if owner == team.rank else _blank(*about(name), scheme)
        tensors = [weight.codes, weight.scales, weight.zeros, weight.group_index]
        tensors = [tensor.contiguous() for tensor in tensors]
        team.share(tensors, owner)
        yield QuantizedWeight(*tensors, scheme), result


def _blank(shape: tuple[int, int], device: torch.device, scheme: Scheme) -> QuantizedWeight:
    outputs, inputs = shape
    grid = (outputs, scheme.groups(inputs))
    return QuantizedWeight(
        torch.empty(shape, dtype=torch.uint8, device=device),
        torch.empty(grid, dtype=torch.float16, device=device),
        torch.empty(grid, dtype=torch.uint8, device=device),
        torch.empty(inputs, dtype=torch.int32, device=device),
        scheme,
    )


class Follower:
    """A pipeline.Store of a process that does not write: it knows what is finished, and where to spill."""

    def __init__(self, out: Path, finished: dict[str, Any]) -> None:
        self.finished = finished
        self.scratch = out.with_name(f"{out.name}.partial") / "scratch"

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None:
        """The first process writes it."""
        self.finished[part] = notes

    def read_part(self, part: str) -> dict[str, torch.Tensor]:
        """Never called: what the first process reads comes from it."""
        raise KeyError(part)


@contextmanager
def joined(device: str = "cpu") -> Iterator[tuple[Team, str]]:
    """The team that torchrun has started, for as long as the block lasts, and this process's device.

    A program that has connected its processes itself is left alone: each of its calls is a run of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield Team(), device
        return
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()


def neighbours() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the one of its run that a user hears."""
    return os.environ.get("RANK", "0") == "0" or dist.is_initialized()
