"""The processes of one run: torchrun starts them, torch.distributed connects them, and each does its share.

Calibration windows are split over the processes, Hessians summed, the layers of a set of siblings (and the experts of a
layer) solved by different ones; the first writes. A run without torchrun is a team of one, for which all of this is
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .core.hessian import Hessian
from .core.means import Means
from .core.moments import Moments
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import OutOfMemory, UsageError, WellRoundedError
from .memory import exhausted
from .model.inputs import Bank, Hessians, Member, Siblings
from .solving import Solved

T = TypeVar("T")
LACKS = 0  # an exit code that no failure has
AGAIN = "finished blocks are kept, run the same command again, with as many processes as you like"


class Lost(WellRoundedError):  # noqa: N818  # a process, not an error
    """Another process of the run has failed or ended, and so does this one."""


class Lacking(MemoryError):  # noqa: N818  # of another process, not of this one
    """Memory does not suffice in another process of the run; this one can go on with less, as all of them do then."""


class Team(Hessians):
    """A process among `size` that make one run; `rank` 0, the first, is the one that writes and speaks.

    All of them call the same methods in the same order. Before anything is exchanged they meet; one that has failed
    comes to the next meeting too, and says so: nobody waits for it in vain, and why the run ends is said once.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._broken = False  # whether the others cannot be told anything any more

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def meet(self) -> None:
        """Wait until all are here. Raises Lost if one of them has failed, Lacking if memory does not suffice in one."""
        if self.size > 1 and (told := self._told(None)):
            raise Lacking(self._heard(told))

    def lacks(self, why: str) -> str:
        """Come to the next meeting because memory does not suffice here: what all of them say of that then.

        Raises Lost if one of them has failed, OutOfMemory if the others cannot be told.
        """
        if self.size == 1:
            return why
        if self._broken:
            raise OutOfMemory(f"memory does not suffice ({why}) in the middle of an exchange; {AGAIN}")
        return self._heard(self._told((why, LACKS)))

    def _heard(self, told: list[tuple[str, int] | None]) -> str:
        """Who lacks memory, and why; whoever has failed comes first."""
        failed = [(rank, *one) for rank, one in enumerate(told) if one is not None]
        rank, why, code = max(failed, key=lambda one: (one[2] != LACKS, -one[0]))
        why = why if rank == 0 else f"process {rank} of {self.size}: {why}"
        if code == LACKS:
            return why
        lost = Lost(why)
        lost.speaks, lost.exit_code = self.first, code
        raise lost

    def agree(self, value: T) -> T:
        """What the first process says."""
        if self.size == 1:
            return value
        self.meet()
        box = [value]
        with self._together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all(self, value: T) -> list[T]:
        """What each process says, in order."""
        if self.size == 1:
            return [value]
        self.meet()
        said: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(said, value)
        return said

    def first_does(self, work: Callable[[], T]) -> T | None:
        """Done by the first process alone, while the others, which return None, wait."""
        result = work() if self.first else None
        self.meet()
        return result

    def whole(self, hessian: Hessian | None, size: int, device: torch.device) -> Hessian | None:
        """The sum of what all processes have counted, None if that is nothing."""
        if self.size == 1:
            return hessian
        hessian = hessian if hessian is not None else self.new(size, device)
        self.meet()
        with self._together():
            hessian.sum_over(dist.all_reduce)
        return hessian if hessian.tokens else None

    def whole_moments(
        self, moments: Moments | None, size: int, device: torch.device, outputs: int, means: bool
    ) -> Moments | None:
        """The same of moments, with those of a residual of so many features, and with means or without."""
        if self.size == 1:
            return moments
        moments = moments if moments is not None else self.moments(size, device, means)
        self.meet()
        with self._together():
            moments.sum_over(dist.all_reduce, outputs)
        return moments if moments.tokens else None

    def whole_means(self, means: Means) -> Means:
        """The sum of what all processes have counted."""
        if self.size > 1:
            self.meet()
            with self._together():
                means.sum_over(dist.all_reduce)
        return means

    def share(self, tensors: Sequence[torch.Tensor], owner: int) -> None:
        """Fill the contiguous tensors, of equal shapes and dtypes everywhere, with what the owner has in them."""
        self.meet()
        with self._together():
            for tensor in tensors:
                if tensor.numel():  # as bytes: not every dtype can be sent
                    dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=owner)

    def tensors(self, read: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What the first process reads, in main memory."""
        if self.size == 1:
            return read()
        found = {name: tensor.contiguous() for name, tensor in read().items()} if self.first else {}
        about = self.agree({name: (tensor.shape, tensor.dtype) for name, tensor in found.items()})
        found = found or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in about.items()}
        self.share([*found.values()], owner=0)
        return found

    def in_step(
        self, sets: Iterator[Siblings | Bank], known: list[list[str]], without: Callable[[list[str]], Siblings | Bank]
    ) -> Iterator[Siblings | Bank]:
        """`sets`, each at the same time in all processes, in the order of `known`, those that are not in it first.

        Quantized layers may send tokens another way than dense ones did: where a set is not reached, `without(names)`
        stands for it; where it is reached too late, what it then reads does not count.
        """
        rank = {names[0]: number for number, names in enumerate(known)}
        mine, done = next(sets, None), set[str]()
        while True:
            while mine is not None and done.issuperset(mine.names):
                mine = next(sets, None)
            offers = [names for names in self.all(None if mine is None else mine.names) if names]
            if not offers:
                return
            chosen = min(offers, key=lambda names: rank.get(names[0], -1))
            reached = mine is not None and mine.names == chosen
            yield mine if reached and mine is not None else without(chosen)
            done.update(chosen)

    @contextmanager
    def bound(self) -> Iterator[None]:
        """While it lasts, what ends this process ends all of them, and the first one says why."""
        try:
            yield
        except Exception as error:
            if self.size > 1 and not self._broken:
                with suppress(Lost):
                    self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        if not isinstance(error, Lost):
            own = isinstance(error, WellRoundedError)
            why = str(error) if own else f"{type(error).__name__}: {error}"
            self._told((why, error.exit_code if isinstance(error, WellRoundedError) else 1))
            if isinstance(error, WellRoundedError):
                error.speaks = self.first
        with self._together():  # torchrun ends the others as soon as one is gone: the first has to put its things away
            dist.all_reduce(torch.zeros(1))

    def _told(self, failure: tuple[str, int] | None) -> list[tuple[str, int] | None]:
        """Meet; who has failed, and why: nothing if nobody has."""
        failures = torch.tensor([int(failure is not None)])
        said: list[Any] = [None] * self.size
        with self._together():
            dist.all_reduce(failures)
            if not failures:
                return []
            dist.all_gather_object(said, failure)
        return said

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Whatever goes wrong in here leaves the others in the middle of something: nothing can be told them."""
        try:
            yield
        except BaseException as error:
            self._broken = True
            if not isinstance(error, RuntimeError) or exhausted(error):
                raise
            raise self._lost(error) from None

    def silence(self) -> None:
        """Tell the others nothing any more: this process ends wherever it is."""
        self._broken = True

    def _lost(self, error: RuntimeError) -> Lost:
        """The first process says it, and the second too: it may be the first that has ended."""
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        lost = Lost(f"another process of this run has ended, and so does this one; {AGAIN} ({line})")
        lost.speaks = self.rank < 2
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


def merged(found: list[list[list[str]]]) -> list[list[str]]:
    """Sets of siblings as several processes have found them, in an order that is right for each, every layer once."""
    known: list[list[str]] = []
    for sets in found:
        at = 0
        for siblings in sets:
            places = {name: place for place, names in enumerate(known) for name in names}
            at = max([at, *(places[name] + 1 for name in siblings if name in places)])
            if new := [name for name in siblings if name not in places]:
                known.insert(at, new)
                at += 1
    return known


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
        tensors = [tensor.to(about(name)[1]).contiguous() for tensor in tensors]
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
