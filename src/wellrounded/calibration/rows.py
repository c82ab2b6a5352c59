"""Rows of any accepted kind become tokens: texts and chats through the tokenizer, token ids as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .chats import Processor, plain, render, with_pictures
from .windows import Row

# Where a row of a data set keeps its content; the first of these columns that it has is the one used.
COLUMNS = {"text": "text", "messages": "chat", "conversations": "chat", "input_ids": "token row"}
ACCEPTED = (
    "a list of texts, a list of chats (each a list of {'role', 'content'}), token ids (a list of lists, a 2-D tensor "
    "or dicts with input_ids), or dicts with one of the columns " + ", ".join(COLUMNS)
)


class Rows(NamedTuple):
    """Rows of one kind, "text", "chat" or "token row", and how many blank ones were left out."""

    kind: str
    items: list[Any]
    blank: int


def sort_out(rows: Sequence[Any], name: str) -> Rows:
    """All rows are of one kind, and known to be; `name` is what errors call the source."""
    found = {position: _unwrap(row, f"{name}: row {position}") for position, row in enumerate(rows)}
    found = {position: item for position, item in found.items() if item is not None}
    blank = len(rows) - len(found)
    if not found:
        raise UsageError(f"{name}: {f'all {blank} rows are blank' if blank else 'no rows'}; give {ACCEPTED}")
    first, (kind, _) = next(iter(found.items()))
    for position, (other, _) in found.items():
        if other != kind:
            raise UsageError(f"{name}: row {first} is a {kind}, row {position} a {other}; give rows of one kind")
    return Rows(kind, [item for _, item in found.values()], blank)


def column_of(columns: Iterable[str], where: str) -> str:
    """The column that holds the content of a row with these columns."""
    seen = [str(column) for column in columns]
    for column in COLUMNS:
        if column in seen:
            return column
    hint = "; a chat is a list of such messages: wrap each chat in a list" if {"role", "content"} <= set(seen) else ""
    raise UsageError(f"{where}: none of the columns {', '.join(COLUMNS)}; seen: {', '.join(seen) or 'none'}{hint}")


def _unwrap(row: Any, where: str) -> tuple[str, Any] | None:
    """The kind of a row and its content, freed from the dict it may come in; None if there is nothing in it."""
    wanted = mask = pictures = None
    if isinstance(row, Mapping):
        column = column_of(row, where)
        wanted, mask, pictures, row = COLUMNS[column], row.get("attention_mask"), row.get("images"), row[column]
    if row is None or (isinstance(row, str) and not row.strip()) or (isinstance(row, (list, tuple)) and not row):
        return None
    kind = _kind(row)
    if kind is None or wanted not in (None, kind):
        raise UsageError(f"{where}: seen {_shown(row)}, asked for a {wanted or 'row'}; give {ACCEPTED}")
    if kind == "chat" and pictures:
        row = with_pictures(row, pictures, where)
    if kind != "token row":
        return kind, row
    ids = ids_row(row, mask, where)
    return (kind, ids) if len(ids.ids) and (ids.mask is None or bool(ids.mask.any())) else None


def _kind(row: Any) -> str | None:
    if isinstance(row, str):
        return "text"
    if isinstance(row, (list, tuple)) and isinstance(row[0], Mapping):
        return "chat"
    return "token row" if isinstance(row, (list, tuple, Tensor)) or hasattr(row, "__array__") else None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def ids_row(ids: Any, mask: Any, where: str) -> Row:
    """Ids of shape [L] or [1, L], with a mask of the same shape or none."""
    row = Row(_vector(ids, f"{where}: input_ids"), None if mask is None else _vector(mask, f"{where}: attention_mask"))
    if row.mask is None:
        return row
    if len(row.mask) != len(row.ids):
        raise UsageError(
            f"{where}: {len(row.mask)} entries in attention_mask, {len(row.ids)} in input_ids; give as many"
        )
    return Row(row.ids, None if bool(row.mask.all()) else row.mask.bool())


def _vector(values: Any, where: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{where}: not a row of whole numbers: {error}") from None
    if tensor.ndim == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        seen = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise UsageError(f"{where}: asked for whole numbers of shape [L] or [1, L], seen {seen}")
    return tensor.to("cpu", torch.int64)


def encode(rows: Rows, processor: Processor, length: int, name: str) -> Tensor | list[Row]:
    """One stream of tokens to cut windows from, or rows to keep as they are: padded ones, or all of `length`."""
    tokenizer = processor.tokenizer
    if rows.kind != "token row" and tokenizer is None:
        raise UsageError(f"{name}: {rows.kind}s need a tokenizer, and none was given; pass one, or give token ids")
    if rows.kind == "text":
        return _one_stream(rows.items, tokenizer)
    if rows.kind == "chat":
        rendered = _render(rows.items, processor.template(name), name)
        return torch.cat([tokenize(tokenizer, chat, add_special_tokens=False) for chat in rendered])
    if any(row.mask is not None for row in rows.items) or all(len(row.ids) == length for row in rows.items):
        return rows.items
    return torch.cat([row.ids for row in rows.items])


def _one_stream(texts: list[str], tokenizer: Any) -> Tensor:
    """Each text tokenized as the model expects a text of its own; between two of them, the end-of-text token."""
    end = getattr(tokenizer, "eos_token_id", None)
    parts: list[Tensor] = []
    for text in texts:
        if parts and end is not None and parts[-1][-1:].tolist() != [end]:  # some tokenizers have added it already
            parts.append(torch.tensor([end]))
        parts.append(tokenize(tokenizer, text))
    return torch.cat(parts)


def _render(chats: list[Any], template: Any, name: str) -> list[str]:
    """Chats as the model reads them, by its own template, which already marks where each begins and ends."""
    texts = []
    for position, chat in enumerate(chats):
        turns = plain(chat, f"{name}: chat {position}")
        try:
            texts.append(render(turns, template)[1])
        except Exception as error:
            raise UsageError(f"{name}: the model's chat template refuses chat {position}: {error}") from error
    return texts


def beginning(stream: Tensor, tokenizer: Any) -> int | None:
    """The beginning-of-text token, if texts of this model begin with one, as `stream` does; else None."""
    first = getattr(tokenizer, "bos_token_id", None)
    return first if len(stream) and int(stream[0]) == first else None


def begun(windows: Tensor, first: int | None) -> Tensor:
    """Windows int64 [n, length] that begin with this token, if there is one, in the place of their own first one.

    A model that is used to a beginning of text says nonsense without: Gemma 3's perplexity is four times as high.
    """
    if first is not None:
        windows = windows.clone()
        windows[:, 0] = first
    return windows


def tokenize(tokenizer: Any, text: str, **options: Any) -> Tensor:
    """Exactly the ids of `tokenizer(text)`, without its warning that a whole book is longer than the model's window."""
    if not callable(tokenizer):
        ids = tokenizer.encode(text, **options)
        return torch.tensor(getattr(ids, "ids", ids), dtype=torch.int64)
    if "verbose" in inspect.signature(tokenizer).parameters:
        options["verbose"] = False
    return torch.tensor(tokenizer(text, **options)["input_ids"], dtype=torch.int64)


def check_ids(
    tokens: Tensor | list[Row], vocab_size: int | None, name: str, known: Sequence[int] = ()
) -> Tensor | list[Row]:
    """Every token that counts is inside the vocabulary; padding outside it, which is legal, becomes id 0.

    `known` are ids that the model understands wherever its vocabulary ends.
    """
    if isinstance(tokens, Tensor):
        _refuse_outside(tokens, vocab_size, name)
        return tokens
    checked = []
    for row in tokens:
        understood = torch.isin(row.ids, torch.tensor(known, dtype=torch.int64))
        counting = ~understood if row.mask is None else row.mask & ~understood
        _refuse_outside(row.ids[counting], vocab_size, name)
        strange = _outside(row.ids, vocab_size) & ~understood
        checked.append(row._replace(ids=row.ids.masked_fill(strange, 0)))
    return checked


def _outside(ids: Tensor, vocab_size: int | None) -> Tensor:
    return (ids < 0) if vocab_size is None else (ids < 0) | (ids >= vocab_size)


def _refuse_outside(ids: Tensor, vocab_size: int | None, name: str) -> None:
    strange = ids[_outside(ids, vocab_size)]
    if len(strange):
        known = "ids start at 0" if vocab_size is None else f"the model knows ids 0 to {vocab_size - 1}"
        raise UsageError(f"{name}: token id {int(strange[0])}, but {known}; use the tokenizer of this model")
