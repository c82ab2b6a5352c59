"""Chats with pictures become rows of tokens, and the tensors that the model is given beside them."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .chats import Chat, holds_pictures, is_picture, render
from .rows import ids_row
from .windows import Row, per_token


class Read(NamedTuple):
    """Rows, one per chat; the ids that stand for pictures; and a sentence about chats that were too long, if any."""

    rows: list[Row]
    places: list[int]
    note: str


def encode(chats: Sequence[Chat], whole: Any, length: int, rows: int, tokens: int, name: str) -> Read:
    """Chats spread evenly over those given, until there are `rows` of them and `tokens` tokens in these.

    A chat longer than `length` is passed over if it holds pictures, for the tokens of a picture cannot be cut. `whole`
    is the model's processor; chats are plain. Raises UsageError if it refuses one, for a picture that cannot be read,
    and if every chat with pictures is too long.
    """
    kept: dict[int, Row] = {}
    held = 0  # tokens in those kept
    sizes: list[int] = []  # of the chats with pictures
    places = _placeholders(whole)
    if not getattr(whole, "chat_template", None):
        raise UsageError(f"{name}: chats need a chat template and the model's processor has none; give it one")
    for position in _spread(len(chats), rows):
        if len(kept) >= rows and held >= tokens:
            break
        chat, where = chats[position], f"{name}: chat {position}"
        row = _row(chat, whole, where)
        if holds_pictures(chat):
            _refuse_unread(row, places, where)
            sizes.append(len(row.ids))
            if sizes[-1] > length:
                continue
        kept[position] = row
        held += min(row.tokens, length)
    return Read([kept[position] for position in sorted(kept)], places, _about(sizes, length, name))


def _about(sizes: list[int], length: int, name: str) -> str:
    """A sentence about the chats with pictures if not all were used; UsageError if none was. `sizes` are in tokens."""
    if not sizes:
        return f"{name}: so few of its chats hold pictures that none of those is among the ones used"
    too_long = sum(size > length for size in sizes)
    if too_long == len(sizes):
        raise UsageError(
            f"{name}: all {too_long} chats with pictures are longer than {length} tokens, and a picture cannot be cut; "
            f"the shortest has {min(sizes)}: ask for windows of as many, by length (--length)"
        )
    note = (
        f"{name}: {too_long} of {len(sizes)} chats with pictures are longer than {length} tokens and left out, for a "
        f"picture cannot be cut; with a length (--length) of {max(sizes)} none would be"
    )
    return note if too_long else ""


def refuse_blind(rows: Sequence[Row], inputs: Collection[str] | None, name: str) -> None:
    """Raises UsageError if a model with these inputs takes nothing of what the pictures become; None: not known."""
    if inputs is None or "input_ids" not in inputs:  # a forward(*args, **kwargs) says nothing
        return
    for row in rows:
        brought = _brought(row)
        if brought and not any(key in inputs for key in brought):
            raise UsageError(
                f"{name}: its chats hold pictures, which become {', '.join(brought)}, and the model takes none of "
                "these: it reads text only; leave the pictures out, or name the model that they are for"
            )


def _placeholders(whole: Any) -> list[int]:
    """Ids of the tokens that stand for a picture, as far as the processor says; a vocabulary may end before them."""
    own = [getattr(whole, "image_token_id", None), *(getattr(whole, "image_token_ids", None) or ())]
    return sorted({one for one in own if isinstance(one, int)})


def _spread(count: int, wanted: int) -> Iterator[int]:
    """Positions 0 to count - 1: first `wanted` that are evenly spread, then those between them."""
    first = dict.fromkeys(i * count // wanted for i in range(wanted)) if wanted < count else dict.fromkeys(range(count))
    yield from first
    yield from (position for position in range(count) if position not in first)


def _row(chat: Chat, whole: Any, where: str) -> Row:
    """What the processor makes of one chat."""
    opened = [{**turn, "content": _opened(turn.get("content"), where)} for turn in chat]
    try:
        form, _ = render(opened, whole)
        made = dict(whole.apply_chat_template(form, tokenize=True, return_dict=True, return_tensors="pt"))
    except Exception as error:  # templates and processors refuse in their own words, with their own exceptions
        raise UsageError(f"{where}: the model's processor refuses it: {error}") from error
    row = ids_row(made.pop("input_ids"), made.pop("attention_mask", None), where)
    return row._replace(more={key: _tensor(value, key, where) for key, value in made.items() if value is not None})


def _tensor(value: Any, key: str, where: str) -> Tensor:
    try:
        return torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError):
        seen = f"{key} as a {type(value).__name__} that is no tensor"
        raise UsageError(
            f"{where}: the model's processor gives {seen}; such models cannot be calibrated on pictures"
        ) from None


def _brought(row: Row) -> list[str]:
    """The names of what came with the pictures, and not with every token."""
    return [key for key, value in (row.more or {}).items() if not per_token(key, value, len(row.ids))]


def _refuse_unread(row: Row, places: list[int], where: str) -> None:
    """Raise if the model would not learn of a picture, or where it stands."""
    if not _brought(row):
        raise UsageError(f"{where}: the model's processor makes nothing of its pictures; is it that of this model?")
    if places and not set(places) & set(row.ids.tolist()):
        raise UsageError(
            f"{where}: the chat template of the model's processor leaves its pictures out; "
            "give the processor a template that marks them"
        )


def _opened(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    return [{**part, "image": _picture(part["image"], where)} if is_picture(part) else part for part in content]


def _picture(picture: Any, where: str) -> Any:
    """A PIL image, from one, a path, or {"bytes"} as data sets keep it; a file is read and decoded here."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(f"{where}: pictures are read by the package pillow: pip install pillow") from None
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Mapping) and isinstance(picture.get("bytes"), bytes):
        name, source = picture.get("path") or "a picture", io.BytesIO(picture["bytes"])
    elif isinstance(picture, Path):
        name, source = picture, picture
    else:
        raise UsageError(f"{where}: a {type(picture).__name__} is given as a picture; give a PIL image or a path")
    try:
        opened = Image.open(source)
        opened.load()
        return opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{where}: {name} cannot be read as a picture ({type(error).__name__}: {error})") from None
