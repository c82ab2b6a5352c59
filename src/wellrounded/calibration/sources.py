"""Where calibration data comes from: a specification such as `wikitext2:train:64`, a file, or a list in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import UsageError
from . import builtin
from .rows import ACCEPTED, column_of

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
PLENTY = 4_000_000  # characters, of which a tokenizer reads more than a million a second
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class DataSet:
    """A data set of the Hugging Face hub under the short name everyone uses for it."""

    path: str
    config: str | None = None
    split: str = "train"
    files: Mapping[str, str] | None = None  # the one shard per split that is read, where all would be far too many
    one_text: bool = False  # its rows are lines of one text, to be joined as published perplexities join them


KNOWN = {
    "wikitext2": DataSet("Salesforce/wikitext", config="wikitext-2-raw-v1", one_text=True),
    "c4": DataSet(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "ultrachat": DataSet("HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "pile": DataSet("mit-han-lab/pile-val-backup", split="validation"),
}
NAMES = (*KNOWN, "builtin")


class Read(NamedTuple):
    """Rows of a source, and how many of them were passed over because there were more than plenty.

    `folder` is where the relative paths in the rows start.
    """

    rows: list[Any]
    passed_over: int = 0
    folder: Path = Path()


@dataclass(frozen=True)
class Source:
    """One place to read calibration data from; `share` is its number of windows, None for an even part of the rest."""

    name: str
    split: str | None = None
    share: int | None = None

    @property
    def title(self) -> str:
        """The source as a report names it: `wikitext2 (train)`, `notes.txt`."""
        return f"{self.name} ({self.split})" if self.split else self.name

    def read(self, tokens: int) -> Read:
        """Rows that hold at least `tokens` tokens if the source has them."""
        if self.name == "builtin":
            return Read([builtin.text()])
        if self.name not in KNOWN and _is_file(self.name):
            path = Path(self.name)
            return thin(read_file(path), _plenty(tokens))._replace(folder=path.parent)
        return Read(_read_hub(self, _plenty(tokens)))


@dataclass(frozen=True)
class Given:
    """Rows that the caller holds in memory."""

    rows: list[Any]
    share: int | None = None
    title: str = "calibration data"

    def read(self, tokens: int) -> Read:
        """Rows that hold at least `tokens` tokens if there are as many."""
        return thin(self.rows, _plenty(tokens))


def parse(spec: str) -> Source:
    """A specification names one source: NAME, NAME:split or NAME:split:windows; a file takes FILE::windows.

    >>> parse("wikitext2")
    Source(name='wikitext2', split='train', share=None)
    >>> parse("HuggingFaceH4/ultrachat_200k:train_sft:96").share
    96
    """
    if spec not in NAMES and _is_file(spec):  # a file may have a colon in its name
        return Source(spec)
    name, _, rest = spec.partition(":")
    split, _, number = rest.partition(":")
    _refuse_unknown(name, spec)
    if number and not (number.isdecimal() and int(number) > 0):
        raise UsageError(f"calibration {spec!r}: {number!r} is not a number of windows; write NAME:split:number")
    share = int(number) if number else None
    if name == "builtin" or (name not in KNOWN and _is_file(name)):
        if split:
            raise UsageError(f"calibration {spec!r}: {name} has no splits; for a number of windows: {name}::{split}")
        return Source(name, None, share)
    known = KNOWN.get(name, DataSet(name))
    if split and known.files and split not in known.files:
        raise UsageError(f"calibration {spec!r}: {name} has no split {split!r}; it has {', '.join(known.files)}")
    return Source(name, split or known.split, share)


def sources_of(calibration: Any) -> list[Source | Given]:
    """The sources a caller means: one specification, several parsed ones, or rows held in memory."""
    if isinstance(calibration, (str, Path)):
        return [parse(str(calibration))]
    if isinstance(calibration, Source):
        return [calibration]
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise UsageError(f"calibration is a {type(calibration).__name__}; give a name, a file, or {ACCEPTED}")
    items = list(calibration)
    if not items:
        raise UsageError(f"calibration is empty; leave it out for the built-in text, or give {ACCEPTED}")
    if any(isinstance(item, Source) for item in items):
        if not all(isinstance(item, Source) for item in items):
            raise UsageError("calibration mixes sources and rows; parse() every specification, or give rows only")
        titles = [item.title for item in items]
        for title in titles:
            if titles.count(title) > 1:  # what one of them holds out, the other would calibrate on
                raise UsageError(f"calibration names {title} more than once; name it once, with all its windows")
        return items
    if all(isinstance(item, str) and _names_data(item) for item in items):
        raise UsageError(f"calibration {items}: a list of strings is a list of texts; for these sources parse() each")
    if isinstance(calibration, Tensor) and calibration.ndim == 1:
        items = [calibration]  # one row of token ids, like a flat list
    elif all(isinstance(item, int) for item in items):
        items = [items]
    return [Given(items)]


def thin(rows: list[Any], enough: int) -> Read:
    """Every n-th row, if there are more than `enough` characters: a long file is heard in all its parts, soon."""
    every = -(-sum(map(_size, rows)) // enough) or 1
    kept = rows[::every]
    return Read(kept, len(rows) - len(kept))


def read_file(path: Path) -> list[Any]:
    """Rows of a .jsonl, .json or .parquet file; any other file is one text."""
    if path.stat().st_size == 0:
        raise UsageError(f"calibration {str(path)!r}: the file is empty")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if path.suffix == ".jsonl":
        return list(_json_lines(text, path))
    if path.suffix != ".json":
        return [text]
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        return list(_json_lines(text, path))  # many a .json file is JSON lines
    return rows if isinstance(rows, list) else [rows]


def _refuse_unknown(name: str, spec: str) -> None:
    """Raise unless the name is a known data set, an existing file, or has the form of a hub id."""
    if name in NAMES or _is_file(name):
        return
    shown = repr(spec if len(spec) <= 80 else spec[:77] + "...")
    if "\n" in spec or len(spec) > 1000:
        raise UsageError(f"calibration {shown}: this is a text, not a name; give texts in a list: [text]")
    if name and Path(name).is_dir():
        raise UsageError(f"calibration {shown}: this is a directory; name one file of it, {', '.join(SUFFIXES)}")
    if name.endswith(SUFFIXES):
        raise UsageError(f"calibration {shown}: no such file; the path starts at {Path.cwd()}")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        known = ", ".join(NAMES)
        raise UsageError(
            f"calibration {shown}: not a known data set ({known}), an existing file, or a hub id (owner/name); "
            "was a path meant? A text of your own goes into a list: [text]"
        )


def _names_data(text: str) -> bool:
    return text.partition(":")[0] in NAMES or (text.endswith(SUFFIXES) and _is_file(text))


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a path, or with a NUL: a text given by mistake
        return False


def _plenty(tokens: int) -> int:
    """The characters after which more rows of a source would only cost time: four times those it takes, or `PLENTY`."""
    return max(PLENTY, 4 * CHARACTERS_PER_TOKEN * tokens)


def _size(row: Any) -> int:
    """About how many characters a row holds."""
    if isinstance(row, str):
        return len(row)
    if isinstance(row, Mapping):
        return sum(map(_size, row.values()))
    if isinstance(row, (list, tuple)) and row and not isinstance(row[0], int):
        return sum(map(_size, row))
    tokens = row.numel() if isinstance(row, Tensor) else len(row) if isinstance(row, (list, tuple)) else 0
    return tokens * CHARACTERS_PER_TOKEN


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"calibration {str(path)!r}: not UTF-8 text ({error}); convert it, or name a text") from None
    if "\0" in text:
        raise UsageError(f"calibration {str(path)!r}: a binary file (it has NUL bytes); name a text")
    if not text.strip():
        raise UsageError(f"calibration {str(path)!r}: the file holds nothing but white space")
    return text


def _json_lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at U+2028
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"calibration {str(path)!r}: line {number} is not JSON: {error}") from None


def _read_parquet(path: Path) -> list[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing("pyarrow", str(path)) from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [column_of(names, f"calibration {str(path)!r}"), "attention_mask"]
        return file.read(columns=[name for name in wanted if name in names]).to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"calibration {str(path)!r}: not a parquet file: {_first_line(error)}") from None


def _read_hub(source: Source, enough: int) -> list[Any]:
    """Rows of a data set of the hub, read from its start as a stream until there are enough of them."""
    known = KNOWN.get(source.name, DataSet(source.name))
    split = source.split or known.split
    try:
        from datasets import load_dataset
    except ImportError:
        raise _missing("datasets", source.name) from None
    options: dict[str, Any] = {"split": split, "streaming": not known.one_text}
    if known.files:
        options["data_files"] = {split: known.files[split]}
    try:
        found = load_dataset(known.path, *([known.config] if known.config else []), **options)
        if known.one_text:  # downloaded whole, so that it is there the next time, offline too
            return ["\n\n".join(row["text"] for row in found)]
        rows, size = [], 0
        for row in found:
            column = column_of(row, f"calibration {source.name!r}")
            rows.append({name: row[name] for name in (column, "attention_mask") if name in row})
            size += _size(rows[-1])
            if size >= enough:
                break
        return rows
    except UsageError:
        raise
    except Exception as error:  # a download fails in as many ways as there are networks
        raise UsageError(
            f"calibration {source.title!r}: cannot read the data set {known.path}: {_first_line(error)}; "
            "offline, name a local file or use `builtin`"
        ) from error


def _missing(package: str, name: str) -> UsageError:
    return UsageError(
        f'calibration {name!r} needs the package {package}: pip install "wellrounded[data]"; '
        "a text file or `builtin` needs nothing"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
