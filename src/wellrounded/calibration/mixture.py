"""From whatever the user names to windows: each source gives its share, and every number is accounted for."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from . import builtin, pictures
from .chats import Processor, holds_pictures, plain
from .rows import Rows, beginning, begun, check_ids, encode, sort_out
from .sources import Given, Source, sources_of
from .windows import Divided, Row, Windows, cut, join, pick

NOTHING_NAMED = (
    "no calibration data named: using English and code from the Python standard library; "
    'to name some: calibration="wikitext2", a file, or a list of texts like those the model will meet'
)
ENOUGH = 2048  # tokens: with fewer, the second moments of a layer's inputs say next to nothing


@dataclass(frozen=True)
class SourceUse:
    """What one source gave: windows asked, used and held out, tokens in those used, and rows that were dropped.

    A dropped row is one that was blank, or not needed because there were more than enough, or a chat with pictures
    that is longer than a window.
    """

    name: str
    asked: int
    used: int
    dropped: int
    tokens: int
    held_out: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows to calibrate on, others to prove the result on that share no token with them, and their origin.

    `further` are windows of the same sources that are neither, as many as were asked for and are there.
    """

    windows: Windows
    held_out: Windows
    sources: tuple[SourceUse, ...]
    note: str = ""
    further: Windows | None = None

    @property
    def digest(self) -> str:
        """Equal for two runs exactly if they calibrate on the same tokens: what a resumed run compares."""
        return _digest(self.windows)

    @property
    def further_digest(self) -> str | None:
        """The same of the further windows, if there are any."""
        return _digest(self.further) if self.further else None

    def describe(self) -> str:
        """One line per source: what was asked, used and held out; a last line for what else should be known."""
        lines = []
        for use in self.sources:
            dropped = f" ({use.dropped:,} {_plural(use.dropped, 'row')} blank or not needed)" if use.dropped else ""
            lines.append(
                f"{use.name}: asked {use.asked} {_plural(use.asked, 'window')} of {self.windows.length}, "
                f"used {use.used}, {use.tokens:,} tokens{dropped}; "
                f"{use.held_out} {_plural(use.held_out, 'window')} held out"
            )
        return "\n".join([*lines, self.note] if self.note else lines)

    def to_dict(self) -> dict[str, Any]:
        """The same account as plain numbers and strings, for a report in JSON."""
        return {
            "description": self.describe(),
            "windows": len(self.windows),
            "length": self.windows.length,
            "tokens": self.windows.tokens,
            "held_out_windows": len(self.held_out),
            "held_out_tokens": self.held_out.tokens,
            "sources": [asdict(use) for use in self.sources],
            "sha256": self.digest,
            "note": self.note,
        }


def _digest(windows: Windows) -> str:
    digest = hashlib.sha256(f"{tuple(windows.ids.shape)}".encode())
    for tensor in (windows.ids, windows.mask):
        digest.update(b"" if tensor is None else _bytes(tensor))
    for window, more in enumerate(windows.more):
        for name, tensor in sorted(more.items()):
            digest.update(f"{window} {name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


class _Asked(NamedTuple):
    """What holds for every source of one call."""

    processor: Processor
    length: int
    vocab_size: int | None
    inputs: Collection[str] | None
    min_tokens: int  # of one source; 0 where several are counted together
    little: bool  # whether less than a window will do


class _Part(NamedTuple):
    """What came of one source."""

    windows: Windows
    held_out: Windows
    further: Windows
    use: SourceUse
    tokens: int  # all that it held, used or not
    note: str = ""


def gather(
    calibration: Any,
    tokenizer: Any,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    held_out: int = 16,
    vocab_size: int | None = None,
    min_tokens: int = ENOUGH,
    little: bool = False,
    inputs: Collection[str] | None = None,
    further: int = 0,
) -> Calibration:
    """`samples` windows of `length` tokens and up to `held_out` others, from whatever the user names; deterministic.

    Up to `further` ones of the same sources come along, in the same shares.

    `calibration` is None for built-in text, a specification (see `parse`) or several parsed ones, or rows: texts, chats
    in the {"role", "content"} form, or token ids, the only kind that needs no `tokenizer`. Texts and ids of several
    lengths are packed without padding. Chats with pictures need the model's processor as `tokenizer`, or a
    `chats.Processor`; each becomes a window, and these are padded. `seed` orders the windows of several sources; one
    source keeps its order. Token ids are checked against `vocab_size`, what pictures become against `inputs`, the names
    of what the model takes, and data of fewer than `min_tokens` tokens is refused. With `little`, less than a window
    will do.
    """
    _check_numbers(samples, length, held_out)
    sources = sources_of("builtin" if calibration is None else calibration)
    shares = _shares(sources, samples)
    least = min_tokens if len(sources) == 1 else 0
    asked = _Asked(Processor.of(tokenizer), length, vocab_size, inputs, least, little)
    numbers = zip(shares, _split(held_out, shares), _split(further, shares))
    parts = [_take(source, *each, asked) for source, each in zip(sources, numbers)]
    total = sum(part.tokens for part in parts)
    if total < min_tokens:
        raise UsageError(f"all calibration sources together hold {total:,} tokens, {min_tokens:,} are needed; add text")

    windows = join([part.windows for part in parts])
    if len(parts) > 1:
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    proof = join([part.held_out for part in parts])
    notes = [NOTHING_NAMED if calibration is None else "", *(part.note for part in parts)]
    if held_out and not len(proof):
        proof, note = _proof_from_builtin(held_out, asked)
        notes.append(note)
    others = join([part.further for part in parts])
    note = "\n".join(filter(None, notes))
    return Calibration(windows, proof, tuple(part.use for part in parts), note, others if len(others) else None)


def _take(source: Source | Given, samples: int, held_out: int, further: int, asked: _Asked) -> _Part:
    """The share of one source, cut from its stream or picked from its rows."""
    wanted = samples + held_out + further
    read = source.read(wanted * asked.length)
    found = sort_out(read.rows, source.title)
    dropped, notes, kind = read.passed_over + found.blank, [], f"{found.kind}s"
    if found.kind == "chat" and any(map(holds_pictures, found.items)):
        kind = "chats with pictures"
        tokens, too_long = _with_pictures(found, read.folder, wanted, asked, source.title)
        dropped += len(found.items) - len(tokens)
        notes.append(too_long)
    else:
        tokens = check_ids(encode(found, asked.processor, asked.length, source.title), asked.vocab_size, source.title)
    if isinstance(tokens, Tensor) and asked.min_tokens <= len(tokens) < asked.length and asked.little:
        tokens = [Row(tokens)]  # one window, as long as it is
    available = _available(tokens, asked, source.title)
    divide = cut if isinstance(tokens, Tensor) else pick
    divided = divide(tokens, asked.length, samples, held_out, further)
    if isinstance(tokens, Tensor) and found.kind != "token row":
        first = beginning(tokens, asked.processor.tokenizer)
        divided = Divided(*(Windows(begun(one.ids, first)) for one in divided))
    windows, kept_out, others = divided
    if not isinstance(tokens, Tensor):
        dropped += len(tokens) - len(windows) - len(kept_out) - len(others)
        longer = sum(row.tokens > asked.length for row in tokens)
        cut_rows = f"{longer} of {len(tokens)} rows were longer than {asked.length} tokens and are cut"
        notes.append(cut_rows if longer else "")
    name = f"given {kind}" if isinstance(source, Given) else source.title
    use = SourceUse(name, samples, len(windows), dropped, windows.tokens, len(kept_out))
    return _Part(windows, kept_out, others, use, available, "\n".join(filter(None, notes)))


def _with_pictures(found: Rows, folder: Path, wanted: int, asked: _Asked, name: str) -> tuple[list[Row], str]:
    """Chats with pictures as rows, enough of them for `wanted` windows, and a note about those that were too long."""
    whole = asked.processor.whole(name)
    chats = [plain(chat, f"{name}: chat {position}", folder) for position, chat in enumerate(found.items)]
    read = pictures.encode(chats, whole, asked.length, wanted, asked.min_tokens, name)
    pictures.refuse_blind(read.rows, asked.inputs, name)
    return check_ids(read.rows, asked.vocab_size, name, read.places), read.note


def _available(tokens: Tensor | list[Row], asked: _Asked, name: str) -> int:
    """The number of tokens a source holds; raise if that is too few to be of use."""
    if isinstance(tokens, Tensor):
        count, needed = len(tokens), max(asked.min_tokens, asked.length)
    else:  # a row need not fill a window
        count, needed = sum(row.tokens for row in tokens), asked.min_tokens
    if count < needed:
        shorter = f", or ask for windows shorter than {asked.length}" if count < asked.length else ""
        raise UsageError(f"{name}: it holds {count:,} tokens and {needed:,} are needed; give more text{shorter}")
    return count


def _proof_from_builtin(held_out: int, asked: _Asked) -> tuple[Windows, str]:
    """Windows of built-in text that `builtin` itself never calibrates on, and a sentence that says so."""
    nothing = Windows(torch.empty(0, asked.length, dtype=torch.int64))
    too_little = "too little data to hold any out"
    if asked.processor.tokenizer is None:
        return nothing, f"{too_little}, and no tokenizer for the built-in text: nothing is held out"
    stream = encode(Rows("text", [builtin.proof_text()], 0), asked.processor, asked.length, "builtin")
    check_ids(stream, asked.vocab_size, "builtin")
    count = min(held_out, len(stream) // asked.length)
    if not count:
        return nothing, f"{too_little}, and windows too long for the built-in text: nothing is held out"
    first = beginning(stream, asked.processor.tokenizer)
    windows = Windows(begun(stream[: count * asked.length].reshape(count, asked.length), first))
    proof = f"{count} {_plural(count, 'window')} of built-in text, English and code"
    return windows, f"{too_little}: the result is proven on {proof} instead"


def _check_numbers(samples: int, length: int, held_out: int) -> None:
    if samples < 1:
        raise UsageError(f"samples is {samples}; calibration needs at least 1 window, 128 is usual")
    if length < 2:
        raise UsageError(f"length is {length}; a window needs at least 2 tokens, 512 is usual")
    if held_out < 0:
        raise UsageError(f"held_out is {held_out}; give 0 to hold nothing out, 16 is usual")


def _shares(sources: Sequence[Source | Given], samples: int) -> list[int]:
    """Windows asked from each source: its own number, or an even part of what the others leave."""
    named = sum(source.share or 0 for source in sources)
    open_ones = [source for source in sources if source.share is None]
    left = samples - named
    if (left and not open_ones) or left < len(open_ones):
        others = f" and {len(open_ones)} more without a number" if open_ones else ""
        raise UsageError(f"the sources ask for {named} windows{others}, but samples is {samples}; make them agree")
    parts = iter(_split(left, [1] * len(open_ones)))
    return [next(parts) if source.share is None else source.share for source in sources]


def _split(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts proportional to the weights, which add up to it exactly.

    >>> _split(16, [96, 32]), _split(10, [1, 1, 1])
    ([12, 4], [3, 3, 4])
    """
    whole = sum(weights)
    bounds = [total * sum(weights[:i]) // whole for i in range(len(weights) + 1)] if whole else []
    return [after - before for before, after in itertools.pairwise(bounds)]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"
