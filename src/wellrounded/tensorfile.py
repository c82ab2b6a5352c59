"""One safetensors file: its header checked and parsed once, its tensors read from where the header says, and joined."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from .errors import CheckpointError

__all__ = ["Stamp", "TensorFile", "join", "read_header", "remove", "sync", "sync_tree", "write"]

COPY = 2**22  # bytes at once

# How the format names dtypes; those that came later are there if this torch has them.
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {ours: getattr(torch, name) for ours, name in _TORCH.items() if hasattr(torch, name)}
NAMES = {dtype: ours for ours, dtype in DTYPES.items()}
PAIRS = {"F4"}  # two values in a byte: torch's shape counts bytes


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        return cls(stat.st_size, stat.st_mtime_ns)

    def words(self) -> str:
        """Both, readable."""
        seconds, rest = divmod(self.modified, 10**9)
        return f"{self.size:,} bytes of {datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}.{rest:09d}Z"


class TensorFile:
    """A safetensors file as it was when this was made; it is not kept open, nor mapped.

    Raises CheckpointError if it is missing, truncated or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp, self.entries, self.start = _parse(path)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name, read straight into its memory. Raises CheckpointError if the file has changed."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {entry['dtype']}, which torch {torch.__version__} does not know; "
                "convert the model to another dtype first"
            )
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        try:
            with self.path.open("rb", buffering=0) as file:
                if Stamp.of(os.fstat(file.fileno())) != self.stamp:
                    raise self._changed()
                file.seek(self.start + begin)
                self._fill(file.readinto, memoryview(data.numpy().data))
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be read ({error}); finished blocks are kept: see that the disk is there "
                "and whole, and run the same command again"
            ) from None
        shape = list(entry["shape"])
        if entry["dtype"] in PAIRS and shape:
            shape[-1] //= 2
        return data.view(dtype).reshape(shape)

    def _fill(self, readinto: Callable[[memoryview], int | None], left: memoryview) -> None:
        """A read may stop early, after 2 GiB at the latest."""
        while left:
            got = readinto(left)
            if not got:
                raise self._changed()
            left = left[got:]

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file is not what it was when it was opened."""
        try:
            now = Stamp.of(self.path.stat())
        except OSError:
            now = None
        if now != self.stamp:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: changed while it was being read, so that blocks would come from two different models; "
            "leave the source alone, and run again with --fresh"
        )


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """A safetensors file's entries by name, and where its data begins; CheckpointError unless the file is whole."""
    _, entries, start = _parse(path)
    return entries, start


def _parse(path: Path) -> tuple[Stamp, dict[str, dict], int]:
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            length = int.from_bytes(file.read(8), "little")
            if length > stamp.size - 8:
                raise CheckpointError(f"{path}: truncated or not safetensors ({stamp.size:,} bytes); download it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + _checked(header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); download it again") from None
    if stamp.size != expected:
        raise CheckpointError(f"{path}: {stamp.size:,} bytes, its header promises {expected:,}; download it again")
    return stamp, header, 8 + length


def _checked(header: dict[str, dict]) -> int:
    """Where the data ends of tensors that lie one behind the other, each as large as it says; ValueError for others."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if not all(type(size) is int and size >= 0 for size in (begin, end, *shape)):
            raise ValueError(f"{name}: shape {shape} at {entry['data_offsets']}")
        if begin != at or end < begin:
            raise ValueError(f"{name} begins at {begin:,}, where {at:,} was expected")
        if dtype in DTYPES:
            size = math.prod(shape) // 2 if dtype in PAIRS else math.prod(shape) * DTYPES[dtype].itemsize
            if size != end - begin:
                raise ValueError(f"{name}: {dtype} {shape} in {end - begin:,} bytes")
        at = end
    return at


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Store tensors in a new file that is on the disk afterwards, each straight from its memory.

    The safetensors library would copy all of them first. Wide values come first, so that every tensor is aligned.
    Raises CheckpointError for a dtype that the format does not have.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{name}: safetensors files hold no {tensor.dtype}; convert the model first")
        shape, size = list(tensor.shape), tensor.numel() * tensor.element_size()
        if NAMES[tensor.dtype] in PAIRS and shape:
            shape[-1] *= 2
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    with _begun(path, entries) as out:
        for name in order:
            values = tensors[name].detach().cpu().contiguous().reshape(-1)
            if values.numel():
                out.write(memoryview(values.view(torch.uint8).numpy().data))


def overwrite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give those of a file's tensors that are among `tensors` other values, in place, and on the disk afterwards.

    Raises CheckpointError for one of another shape or dtype, before anything is written.
    """
    entries, start = read_header(path)
    for name in entries.keys() & tensors.keys():
        new = (NAMES[tensors[name].dtype], list(tensors[name].shape))
        if new != (entries[name]["dtype"], entries[name]["shape"]):
            raise CheckpointError(f"{path}: {name} is {entries[name]['dtype']} {entries[name]['shape']}, not {new}")
    with path.open("rb+", buffering=0) as out:
        for name in sorted(entries.keys() & tensors.keys()):
            out.seek(start + entries[name]["data_offsets"][0])
            left = memoryview(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            while left:
                left = left[out.write(left) :]
        os.fsync(out.fileno())


def join(parts: Iterable[TensorFile], path: Path) -> None:
    """Concatenate files, bytes as they are, in a new file that is on the disk afterwards."""
    parts = list(parts)
    entries: dict[str, Any] = {}
    offset = 0
    for part in parts:
        for tensor, entry in part.entries.items():
            entries[tensor] = {**entry, "data_offsets": [offset + place for place in entry["data_offsets"]]}
        offset += part.stamp.size - part.start
    with _begun(path, entries) as out:
        for part in parts:
            with part.path.open("rb") as file:
                file.seek(part.start)
                shutil.copyfileobj(file, out, COPY)


@contextmanager
def _begun(path: Path, entries: dict[str, Any]) -> Iterator[BinaryIO]:
    """A new file with this header, for its data to be written; on the disk when the block ends."""
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        yield out
        out.flush()
        os.fsync(out.fileno())


def sync(directory: Path) -> None:
    """The directory's entries are on the disk; nothing where directories cannot be synced (Windows, some networks)."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(directory: Path) -> None:
    """Every file below a directory is on the disk, and every entry."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync(path)
    sync(directory)


def remove(path: Path) -> None:
    """A file, a link or a whole directory is gone; it need not have been there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
