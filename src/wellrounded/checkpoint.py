"""Safetensors on disk: read by name, written block by block, finished in one atomic step.

While a run goes on, everything lies in `OUT.partial`, whose journal lists the finished parts; `OUT` itself appears
(or is replaced) only when it is complete. A run that was stopped goes on from the journal.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, UsageError

SHARD_BYTES = 4 * 2**30
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


@dataclass
class Source:
    """A dense model about to be quantized: where its tensors come from and what belongs beside them.

    model        the architecture, its experts taken apart; parameters on the meta device, buffers computed
    read         a tensor by its name in the model, or None
    made         every tensor of the source by the name it is stored under: the model's tensors that are made of it,
                 none if the model does not have it (speculative heads, say)
    read_stored  a tensor by the name it is stored under
    packed_name  what the tensors of a layer of the model are called in files, without their endings, once it is packed
    config       config.json as a dict
    write_files  puts every non-weight file of the source into a directory
    bytes        size of the source's tensors
    fingerprint  changes when the source's tensors do
    sizes        every tensor's size in bytes by the name it is stored under
    """

    label: str
    model: torch.nn.Module
    read: Callable[[str], torch.Tensor | None]
    made: dict[str, list[str]]
    read_stored: Callable[[str], torch.Tensor]
    packed_name: Callable[[str], str]
    config: dict[str, Any]
    write_files: Callable[[Path], None]
    bytes: int
    fingerprint: str
    tokenizer: Any = None
    sizes: Mapping[str, int] = field(default_factory=dict)


class Reader:
    """Tensors of a directory's safetensors files by name; headers are read and checked when it is opened.

    `files` are those that count, if not all do.

    Raises CheckpointError naming the file for a missing, truncated or corrupt shard, UsageError for a directory
    whose weights are in another format.
    """

    def __init__(self, directory: Path, files: Iterable[Path] | None = None) -> None:
        self.directory = directory
        self.places: dict[str, Path] = {}
        self.sizes: dict[str, int] = {}
        self.bytes = 0
        for path in files or _weight_files(directory):
            header, start = read_header(path)
            self.places |= dict.fromkeys(header, path)
            self.sizes |= {name: span[1] - span[0] for name, entry in header.items() if (span := entry["data_offsets"])}
            self.bytes += path.stat().st_size - start

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name; the file is opened for this read alone, so that its pages can be dropped."""
        with safe_open(self.places[name], framework="pt") as file:
            return file.get_tensor(name)

    def fingerprint(self) -> str:
        """Names, sizes and modification times of the files."""
        files = sorted(set(self.places.values()))
        return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a shard index ({error}); download the model again") from None
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise CheckpointError(
                f"{directory}: {index.name} names {missing[0]}, which is not there; "
                f"{len(missing)} of {len(names)} shards are missing, download them again"
            )
        return [directory / name for name in names]
    files = list(directory.glob("model.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not files:
        others = [f.name for f in directory.iterdir() if f.suffix in WEIGHT_SUFFIXES] if directory.is_dir() else []
        seen = f"only {', '.join(sorted(others)[:3])}" if others else "no weights at all"
        raise UsageError(
            f"{directory}: weights are read from safetensors (or .gguf) files only, and there are "
            f"{seen}; convert them with transformers' save_pretrained first"
        )
    return files


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """A safetensors file's entries by name, and where its data begins; CheckpointError unless the file is whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise CheckpointError(f"{path}: truncated or not safetensors ({size:,} bytes); download it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); download it again") from None
    if size != expected:
        raise CheckpointError(f"{path}: {size:,} bytes, its header promises {expected:,}; download it again")
    return header, 8 + length


@dataclass
class Writer:
    """Builds a checkpoint in `OUT.partial` part by part, then turns it into `OUT`.

    `request` is what the run was asked for; a partial directory left by a different request is not continued.
    """

    out: Path
    request: dict[str, Any]
    force: bool = False
    fresh: bool = False
    finished: dict[str, Any] = field(default_factory=dict)  # part name -> what the run noted when it was written

    def __post_init__(self) -> None:
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.journal = self.partial / "journal.jsonl"
        self.check(self.out, self.force)
        if self.fresh and self.journal.exists():
            shutil.rmtree(self.partial)
        if self.journal.exists() and self._resume():
            return
        if self.partial.exists() and set(self.partial.iterdir()) - {self.journal}:
            raise UsageError(f"{self.partial} is in the way and is not from an earlier run; move it elsewhere")
        with _writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._note({"request": self.request, "what": "unfinished; run the same command again to go on"})

    @staticmethod
    def check(out: Path, force: bool) -> None:
        """Raises UsageError if `out` cannot become the result; cheap, so that it can be asked before any work."""
        if Path.cwd().is_relative_to(out.resolve()):
            raise UsageError(f"{out} is where you are, and cannot be replaced from there; name a new directory")
        if out.is_mount():
            raise UsageError(f"{out} is a mount point, and cannot be replaced; name a new directory inside it")
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file; name a directory for the result")
        if out.is_dir() and any(out.iterdir()) and not force:
            raise UsageError(f"{out} exists and is not empty; choose another directory or pass --force")
        home = _nearest(out.absolute().parent)
        if not os.access(home, os.W_OK):
            raise UsageError(f"{out}: no permission to write in {home}; choose another directory")

    def _resume(self) -> bool:
        """Take over what an earlier run has finished; False if it had not come to its first line."""
        # A crash may have cut off the last line; its part does not count as finished, and the next line starts afresh.
        whole, newline, _ = self.journal.read_text().rpartition("\n")
        self.journal.write_text(whole + newline)
        if not whole:
            return False
        lines = [json.loads(line) for line in whole.splitlines()]
        before = lines[0]["request"]
        differing = [key for key in {**before, **self.request} if before.get(key) != self.request.get(key)]
        if differing:
            details = "; ".join(f"{key}: was {before.get(key)!r}, now {self.request.get(key)!r}" for key in differing)
            raise UsageError(f"{self.partial} holds another request's unfinished run ({details}); --fresh starts over")
        self.finished = {line["part"]: line["notes"] for line in lines[1:]}
        return True

    def abandon(self) -> None:
        """After an error: leave nothing behind, unless a part that was work to make, one with notes, is finished."""
        if all(notes is None for notes in self.finished.values()):
            shutil.rmtree(self.partial, ignore_errors=True)

    def _note(self, entry: dict[str, Any]) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def path_of(self, part: str) -> Path:
        return self.partial / f"{part}.part"

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None:
        """Write one part and note it in the journal: from here on it is not lost. `notes` come back on resuming."""
        path = self.path_of(part)
        scratch = path.with_suffix(".writing")
        with _writing(path):
            try:
                save_file(_separate(tensors), scratch, metadata={"format": "pt"})
                with scratch.open("rb+") as file:
                    os.fsync(file.fileno())
                scratch.replace(path)
            finally:
                scratch.unlink(missing_ok=True)  # half a part is of no use, and the disk may be full
            self._note({"part": part, "notes": notes})
        self.finished[part] = notes

    def read_part(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished part."""
        with safe_open(self.path_of(part), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def finish(self, parts: Iterable[str], write_rest: Callable[[Path], None]) -> Path:
        """Join the parts into shards, write everything else with `write_rest(directory)`, and move it all to OUT."""
        ready = self.partial / "ready"
        with _writing(ready):
            shutil.rmtree(ready, ignore_errors=True)
            ready.mkdir()
            if paths := [self.path_of(part) for part in parts]:
                join(paths, ready)
            write_rest(ready)
            self._swap(ready)
            shutil.rmtree(self.partial)
        return self.out

    def _swap(self, ready: Path) -> None:
        """What is at OUT gives way to `ready`, and comes back if that cannot take its place."""
        old = self.partial / "replaced"
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        try:
            ready.rename(self.out)
        except OSError:
            if old.exists():
                old.rename(self.out)
            raise


def join(parts: list[Path], directory: Path) -> None:
    """Concatenate safetensors files, bytes as they are, into model shards of about SHARD_BYTES and an index."""
    shards: list[list[Path]] = [[]]
    for part in parts:
        if shards[-1] and sum(path.stat().st_size for path in [*shards[-1], part]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(part)
    total, weight_map = 0, {}
    for number, members in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        headers = [read_header(part) for part in members]
        merged: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for part, (header, start) in zip(members, headers):
            for tensor, entry in header.items():
                merged[tensor] = {**entry, "data_offsets": [offset + place for place in entry["data_offsets"]]}
            weight_map |= dict.fromkeys(header, name)
            offset += part.stat().st_size - start
        head = json.dumps(merged, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with (directory / name).open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for part, (_, start) in zip(members, headers):
                with part.open("rb") as part_file:
                    part_file.seek(start)
                    shutil.copyfileobj(part_file, out, 2**22)
            out.flush()
            os.fsync(out.fileno())
        total += offset
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _writing(path: Path):
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(_nearest(path)).free
        raise CheckpointError(
            f"writing {path}: {error} ({free / 2**20:,.0f} MiB free); finished blocks are kept, make room or fix "
            "the permissions and run the same command again"
        ) from None


def _nearest(path: Path) -> Path:
    """The path itself if it exists, else the closest directory above it that does."""
    return next(place for place in (path, *path.parents) if place.exists())


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, contiguous, none sharing memory with another (siblings share one group index)."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        out[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(out[name].data_ptr())
    return out
