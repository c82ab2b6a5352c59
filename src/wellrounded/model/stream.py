"""Token windows on their way through the blocks, and where what they carry is kept: on a device, or in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..core.hessian import in_memory
from ..errors import CheckpointError
from .calls import Call, Carried, boxes_in, replaced, with_own_boxes

LARGE = 8192  # columns of a matrix that is worth a file: 256 MiB
_numbers = count()


@dataclass(frozen=True)
class Spilled:
    """Stands for a tensor that lies in a file, among the arguments of a recorded call or as a hidden state."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class SpillFile:
    """Tensors in one file, each at a place of its own, where one of the same shape may take its stead.

    It is written and read, not mapped: what is mapped counts as memory, and ends the process when the disk is full.
    The file has no name once it is open, where that is possible: whatever becomes of the process, it is gone.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"activations-{os.getpid()}-{id(self):x}"
        self._end = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._path.open("w+b", buffering=0)
            if os.name == "posix":
                self._path.unlink()
        except OSError as error:
            raise failed("opening", self._path, error) from None

    def put(self, tensor: torch.Tensor, place: Spilled | None = None) -> Spilled:
        """Write a tensor, to `place` or behind all others; CheckpointError if the disk does not take it."""
        if place is None:
            place = Spilled(self._end, tensor.shape, tensor.dtype, tensor.device)
            self._end += tensor.numel() * tensor.element_size()
        if (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} does not fit where {place} was")
        left = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        try:
            self._file.seek(place.offset)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise failed("writing", self._path, error) from None
        return place

    def get(self, place: Spilled) -> torch.Tensor:
        """The tensor, on the device that it came from."""
        size = prod(place.shape) * place.dtype.itemsize
        raw = torch.empty(size, dtype=torch.uint8)
        left = memoryview(raw.numpy())
        try:
            self._file.seek(place.offset)
            while left:
                count = self._file.readinto(left)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(f"it ends {len(left):,} bytes too early")
                left = left[count:]
        except OSError as error:
            raise failed("reading", self._path, error) from None
        return raw.view(place.dtype).reshape(place.shape).to(place.device)

    def close(self) -> None:
        """The file is gone."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def mapped(directory: Path) -> Callable[[int, torch.device], torch.Tensor]:
    """Makes matrices, float32 zeros [size, size], large ones in files of this directory that are mapped into memory.

    The system keeps of them what it has room for. The files have their full size at once, so that a full disk is said
    then, and no name, where that is possible.
    """

    def new(size: int, device: torch.device) -> torch.Tensor:
        if device.type != "cpu" or size < LARGE:
            return in_memory(size, device)
        path = directory / f"matrix-{os.getpid()}-{size}-{next(_numbers)}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, 4 * size**2)
                else:
                    file.truncate(4 * size**2)
            matrix = torch.from_file(str(path), shared=True, size=size**2, dtype=torch.float32).view(size, size)
        except OSError as error:
            raise failed("making", path, error) from None
        finally:
            if os.name == "posix":
                path.unlink(missing_ok=True)
        return matrix

    return new


def failed(doing: str, path: Path, error: OSError) -> CheckpointError:
    """The error of a temporary file."""
    return CheckpointError(
        f"{doing} {path}, for what does not fit into memory: {error.strerror or error}; finished blocks are kept, make "
        "room or allow more memory, and run the same command again"
    )


class Stream:
    """Token windows, batch by batch, and the hidden state of each, overwritten in place.

    ids      int64 [windows, length];  masks  bool, the same, False at padding, or None
    more     what the model is given besides, tensors by name: pictures, say
    calls    [batch][block], what each block is given besides, None where a block is passed by
    carried  [batch], what earlier blocks returned and later ones are still to be given
    passed   [batch], how many blocks it has gone through
    original the same windows on their way through the original model, where that is to be known

    With a `spill`, hidden states lie there, and so does what a batch alone is given: masks, where windows are padded.
    """

    def __init__(
        self,
        ids: list[torch.Tensor],
        masks: list[torch.Tensor | None],
        more: Sequence[dict[str, Any]] = (),
        spill: SpillFile | None = None,
    ) -> None:
        self.ids, self.masks, self.more = ids, masks, list(more) or [{} for _ in ids]
        self.calls: list[list[Call | None]] = []
        self.carried: list[dict[Carried, Any]] = []
        self.passed = [0] * len(ids)
        self.spill = spill
        self.original: Stream | None = None
        self._hidden: list[torch.Tensor | Spilled] = []

    def enter(self, hidden: torch.Tensor, calls: list[Call | None]) -> None:
        """The next batch stands at the first block's door."""
        if self.spill is not None and (not self.calls or calls is not self.calls[0]):
            calls = self._put_away(calls, {})
        self._hidden.append(hidden if self.spill is None else self.spill.put(hidden))
        self.calls.append(calls)
        self.carried.append({})

    def given(self, batch: int) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
        """What the model is given: ids, mask, and what else."""
        return self.ids[batch], self.masks[batch], self.more[batch]

    def hidden(self, batch: int) -> torch.Tensor:
        """[windows, length, size]: what the next block reads."""
        kept = self._hidden[batch]
        return kept if isinstance(kept, torch.Tensor) else self._file.get(kept)

    def leave(self, batch: int, index: int, hidden: torch.Tensor) -> None:
        """A batch has gone through block `index`."""
        kept = self._hidden[batch]
        self._hidden[batch] = hidden if isinstance(kept, torch.Tensor) else self._file.put(hidden, kept)
        self.passed[batch] = index + 1

    def rest(self, index: int) -> Iterator[int]:
        """The batches that the model hands to block `index` and that have not gone through it."""
        return (b for b, calls in enumerate(self.calls) if calls[index] is not None and self.passed[b] <= index)

    def call(self, batch: int, index: int) -> Call:
        """What block `index` is given besides its hidden state, put together again."""

        def whole(one: Any) -> Any:
            if isinstance(one, Carried):
                return self.carried[batch][one]
            return self._file.get(one) if isinstance(one, Spilled) else one

        call = self.calls[batch][index]
        assert call is not None, "rest() leaves it out"
        return replaced(call, whole)

    def take_over(self, other: Stream, sizes: list[list[int]]) -> None:
        """Hidden states from a stream of the same windows, of each of whose batches `sizes` were made.

        What is carried is cut as the windows are; what has another first dimension serves all of them.
        """
        batch = 0
        for old, mine in enumerate(sizes):
            hidden = other.hidden(old)
            pieces = hidden.split(mine, max(0, hidden.ndim - 3))  # Gemma 3n has streams in front of the windows
            for number, piece in enumerate(pieces):

                def cut(one: Any, number: int = number, mine: list[int] = mine) -> Any:
                    whole = isinstance(one, torch.Tensor) and one.ndim and len(one) == sum(mine)
                    return one.split(mine)[number] if whole else one

                self.leave(batch, other.passed[old] - 1, piece)
                self.carried[batch] = {key: replaced(value, cut) for key, value in other.carried[old].items()}
                for theirs, own in zip(boxes_in(other.calls[old]), boxes_in(self.calls[batch])):
                    own.update({key: replaced(value, cut) for key, value in theirs.items()})
                batch += 1

    def some(self, batches: Sequence[int]) -> Stream:
        """Some of its batches, which it shares with this one."""
        part = Stream(*([all_[b] for b in batches] for all_ in (self.ids, self.masks, self.more)), self.spill)
        part.calls, part.carried, part.passed, part._hidden = (
            [all_[b] for b in batches] for all_ in (self.calls, self.carried, self.passed, self._hidden)
        )
        return part

    def twin(self) -> Stream:
        """The same windows where they are now, about to go another way than these."""
        twin = Stream(self.ids, self.masks, self.more, self.spill)
        twin.calls, twin.passed = [with_own_boxes(calls) for calls in self.calls], list(self.passed)
        twin.carried = [dict(each) for each in self.carried]
        held = (self.hidden(batch) for batch in range(len(self.ids)))
        twin._hidden = [hidden if self.spill is None else self.spill.put(hidden) for hidden in held]
        return twin

    @property
    def _file(self) -> SpillFile:
        assert self.spill is not None
        return self.spill

    def _put_away(self, calls: list[Call | None], places: dict[tuple, Spilled]) -> list[Call | None]:
        def put(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            key = (one.data_ptr(), one.shape, one.stride(), one.dtype)
            if key not in places:
                places[key] = self._file.put(one)
            return places[key]

        return [None if call is None else replaced(call, put) for call in calls]
