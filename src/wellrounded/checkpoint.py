"""The source of a quantization, and tensors of a directory's safetensors files by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any

import torch

from .errors import CheckpointError, UsageError
from .model.weights import Change, changed
from .tensorfile import TensorFile, read_header
from .writer import Writer

__all__ = ["WEIGHT_SUFFIXES", "Reader", "Source", "Writer", "indexed", "inside", "read_header"]

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
    fingerprint  changes when the source's tensors do; of files, one for each by its name
    sizes        every tensor's size in bytes by the name it is stored under
    verify       raises CheckpointError if the source's files have changed since they were opened
    rotation     what is to be said of the rotation of its residual stream (see rotating), None if nobody thought of it
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
    fingerprint: str | dict[str, str]
    tokenizer: Any = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    verify: Callable[[], None] = lambda: None
    rotation: dict[str, Any] | None = None

    def changed(self, changes: Mapping[str, Change], mark: str) -> Source:
        """The same with other values in some tensors, by their names in the model; they are stored in their old dtype.

        Of a stored tensor that several of the model's are made of, none may be copied as it is. The fingerprint gets a
        mark by which this source is told apart.
        """

        def read_stored(stored: str) -> torch.Tensor:
            value, made = self.read_stored(stored), self.made[stored]
            return changes[made[0]](value).to(value.dtype) if len(made) == 1 and made[0] in changes else value

        marked = {"": mark, **self.fingerprint} if isinstance(self.fingerprint, dict) else f"{self.fingerprint} {mark}"
        return replace(self, read=changed(self.read, changes), read_stored=read_stored, fingerprint=marked)


class Reader:
    """Tensors of a directory's safetensors files by name; headers are read and checked when it is opened.

    `files` are those that count, if not all do.

    Raises CheckpointError naming the file for a missing, truncated or corrupt shard, or one that lies outside the
    directory; UsageError for a directory whose weights are in another format.
    """

    files: Mapping[Path, TensorFile] = MappingProxyType({})

    def __init__(self, directory: Path, files: Iterable[Path] | None = None) -> None:
        self.directory = directory
        self.places: dict[str, Path] = {}
        self.sizes: dict[str, int] = {}
        self.files = {path: TensorFile(path) for path in files or _weight_files(directory)}
        for path, file in self.files.items():
            self.places |= dict.fromkeys(file.entries, path)
            self.sizes |= {name: end - begin for name, e in file.entries.items() for begin, end in [e["data_offsets"]]}
        self.bytes = sum(file.stamp.size - file.start for file in self.files.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name. Raises CheckpointError if its file cannot be read, or has changed."""
        return self.files[self.places[name]].read(name)

    def check_unchanged(self) -> None:
        """Raises CheckpointError naming a file whose size or time of modification is not what it was."""
        for file in self.files.values():
            file.check_unchanged()

    def fingerprint(self) -> str | dict[str, str]:
        """Sizes and modification times of the files by name."""
        return {path.name: self.files[path].stamp.words() for path in sorted(self.files)}


def indexed(index: Path) -> list[str]:
    """The files that a shard index names. Raises CheckpointError if it is none."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [os.fspath(name) for name in names]  # a TypeError for what is no name
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index ({error}); download the model again") from None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = indexed(inside(directory, index))
        missing = [name for name in names if not (directory / name).exists()]
        for name in names:
            inside(directory, directory / name)
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
    return [inside(directory, path) for path in files]


def inside(directory: Path, path: Path) -> Path:
    """The path, which belongs to a model's directory; CheckpointError if it leads elsewhere, by its name or by a link.

    A snapshot in the hub's cache consists of links into its own repository's `blobs`: these are as good as inside.
    """
    root, target = directory.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    named = path.relative_to(directory) if path.is_relative_to(directory) else path
    foreign = PureWindowsPath(named)  # which knows both kinds of slashes
    steps_out = named.is_absolute() or foreign.is_absolute() or foreign.drive or ".." in foreign.parts
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(blobs)
    if steps_out or not (target.is_relative_to(root) or in_cache):
        raise CheckpointError(
            f"{path}: leads out of the model's directory, to {target}, and nothing there is read or copied; "
            "put the file itself into the directory, or download the model again"
        )
    return path
