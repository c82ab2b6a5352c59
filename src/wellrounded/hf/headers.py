"""Open a model for a dry run: headers of files are enough, and of a model on the hub no weights are downloaded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError

from ..checkpoint import WEIGHT_SUFFIXES, Reader, Source, indexed
from ..errors import CheckpointError, UsageError
from .source import delivered, download, from_directory, open_source

BESIDE = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "tokenizer*", "chat_template*"]  # all that is no weight
INDEX = "model.safetensors.index.json"
AT_ONCE = 8  # headers asked for at the same time: a large model has a hundred files


def open_headers(model: str | Path | torch.nn.Module, trust_remote_code: bool = False) -> Source:
    """The dense model as `open_source` gives it, except that its tensors cannot be read.

    Of a model on the hub the files beside the weights are downloaded, and the headers of its safetensors files; of
    those that are in the cache already, the headers there are read, so that this works without a network too.

    Raises what `open_source` raises. That a file on the hub is damaged behind its header is not noticed.
    """
    here = isinstance(model, torch.nn.Module) or Path(model).suffix == ".gguf" or Path(model).expanduser().is_dir()
    source = open_source(model, None, trust_remote_code) if here else _on_the_hub(str(model), trust_remote_code)
    return replace(source, read=_refuse, read_stored=_refuse)


def _on_the_hub(name: str, trust_remote_code: bool) -> Source:
    directory = download(name, BESIDE)
    reader = None if _is_whole(directory) else Headers(directory, name)
    return from_directory(directory, name, None, trust_remote_code, reader)


def _refuse(name: str) -> torch.Tensor:
    raise RuntimeError(f"{name} was to be read in a dry run, which opens headers only; a bug in wellrounded")


def _is_whole(directory: Path) -> bool:
    """Whether an earlier run has downloaded the weights already."""
    index = directory / INDEX
    if index.exists():
        return all((directory / name).exists() for name in indexed(index))
    return any(directory.glob("*.safetensors"))


class Headers(Reader):
    """What a Reader knows of files on the hub, from their headers alone.

    `directory` is the snapshot with the files beside them; its name is the commit that is asked for.

    Raises UsageError if the hub does not deliver them, or has no safetensors; CheckpointError for a damaged header.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self.places, self.sizes, self.bytes = {}, {}, 0
        api, commit = HfApi(), directory.name

        def header(file: str) -> dict[str, tuple[int, int]]:
            found = api.parse_safetensors_file_metadata(name, file, revision=commit)
            return {tensor: info.data_offsets for tensor, info in found.tensors.items()}

        with delivered(name):
            files = self._weight_files(api.list_repo_files(name, revision=commit))
            try:
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    headers = list(pool.map(header, files))
            except SafetensorsParsingError as error:
                raise CheckpointError(f"{name}: the hub's files cannot be read as safetensors ({error})") from None
        for file, spans in zip(files, headers):
            self.places |= dict.fromkeys(spans, directory / file)
            self.sizes |= {tensor: end - start for tensor, (start, end) in spans.items()}
            self.bytes += max((end for _, end in spans.values()), default=0)

    def _weight_files(self, listed: list[str]) -> list[str]:
        """Those files in a repository that `Reader` would take once they are here."""
        if INDEX in listed:
            return indexed(self.directory / INDEX)
        here = [file for file in listed if "/" not in file]
        files = [file for file in here if file == "model.safetensors"]
        files = files or sorted(file for file in here if file.endswith(".safetensors"))
        if not files:
            others = sorted(file for file in here if Path(file).suffix in WEIGHT_SUFFIXES)
            seen = f"only {', '.join(others[:3])}" if others else "no weights at all"
            raise UsageError(
                f"{self.name}: weights are read from safetensors (or .gguf) files only, and the hub has {seen}; "
                "convert them with transformers' save_pretrained first"
            )
        return files

    def read(self, name: str) -> torch.Tensor:
        """Nothing is read: the file is not here."""
        return _refuse(name)

    def fingerprint(self) -> str:
        """The commit."""
        return f"{self.name}@{self.directory.name}"
