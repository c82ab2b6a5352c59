"""Token windows: cut from a stream of tokens without padding, or taken from rows whose bounds somebody chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

FEWEST_ROWS_TO_HOLD_OUT = 8  # below this, a row is worth more in calibration than as proof


class Row(NamedTuple):
    """One row of token ids, int64 [length]; `mask`, bool [length], is False where the row is only padding.

    `more` has what else the model is given with it, tensors by name, if there is anything.
    """

    ids: Tensor
    mask: Tensor | None = None
    more: Mapping[str, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that count: all of them, less the padding."""
        return len(self.ids) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids, int64 [n, length]; `mask`, bool [n, length], is False at padding, None when nothing is padded.

    `more` has each window's other inputs of the model, tensors by name, if there are any: pictures, say.

    >>> windows = Windows(torch.arange(6).reshape(3, 2))
    >>> [batch.ids.tolist() for batch in windows.batches(2)]
    [[[0, 1], [2, 3]], [[4, 5]]]
    """

    ids: Tensor
    mask: Tensor | None = None
    more: tuple[dict[str, Tensor], ...] = ()

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Windows:
        """The windows chosen by a slice, by positions or by a boolean choice: always `Windows`, never one row."""
        chosen = torch.arange(len(self))[index].tolist() if self.more else ()
        more = tuple(self.more[window] for window in chosen)
        return Windows(self.ids[index], None if self.mask is None else self.mask[index], more)

    @property
    def length(self) -> int:
        """Tokens per window, padding included."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens that count: all of them, less the padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def batches(self, size: int) -> Iterator[Windows]:
        """Consecutive windows, `size` at a time; the last batch holds what is left."""
        return (self[start : start + size] for start in range(0, len(self), size))


class Divided(NamedTuple):
    """Windows to calibrate on, those held out, and `further` ones that are neither; no token is in two of them."""

    windows: Windows
    held_out: Windows
    further: Windows


def cut(stream: Tensor, length: int, samples: int, held_out: int, further: int = 0) -> Divided:
    """Windows spread evenly over a stream, never overlapping; its tail is reserved first, for the held-out windows.

    At most a tenth of the stream is reserved, but one window of it as soon as there are three. A stream of fewer than
    `samples` windows gives all it has, back to back. So many `further` ones, if there are, lie between them.
    """
    reserved = min(held_out, len(stream) // 10 // length)
    if held_out and not reserved and len(stream) >= 3 * length:
        reserved = 1
    end = len(stream) - reserved * length
    count = min(samples, end // length)
    step = max(length, (end - length) // count)
    starts = torch.arange(count) * step
    stretches = ((start + length, min(start + step, end) - length + 1) for start in starts.tolist())
    between = [place for first, stop in stretches for place in range(first, stop, length)]
    between = _evenly(torch.tensor(between, dtype=torch.int64), further)
    chosen = (stream.unfold(0, length, 1)[each].clone() for each in (starts, between))
    windows, others = map(Windows, chosen)
    return Divided(windows, Windows(stream[end:].reshape(reserved, length).clone()), others)


def _evenly(positions: Tensor, most: int) -> Tensor:
    """At most so many of them, spread evenly."""
    count = min(most, len(positions))
    return positions[torch.arange(count) * len(positions) // max(count, 1)]


def pick(rows: Sequence[Row], length: int, samples: int, held_out: int, further: int = 0) -> Divided:
    """Whole rows spread evenly over those given; every k-th row is reserved first, for the held-out windows.

    So many `further` ones, if there are, are rows that would otherwise not be needed.
    """
    windows = stack([fit(row, length) for row in rows])
    total = len(windows)
    reserved = min(held_out, max(1, total // 10)) if total >= FEWEST_ROWS_TO_HOLD_OUT else 0
    position = torch.arange(total)
    is_held = torch.zeros(total, dtype=torch.bool)
    if reserved:
        every = total // reserved
        is_held = (position % every == every - 1) & (position < reserved * every)
    chosen = _evenly(position[~is_held], samples)
    is_left = ~is_held
    is_left[chosen] = False
    return Divided(windows[chosen], windows[is_held], windows[_evenly(position[is_left], further)])


def fit(row: Row, length: int) -> Row:
    """The row itself if it is short enough; else its first `length` tokens, not counting padding on either side."""
    if len(row.ids) <= length:
        return row
    start, end = 0, length
    if row.mask is not None:
        real = row.mask.nonzero()
        start = int(real[0])
        end = min(int(real[-1]) + 1, start + length)
    more = row.more and _with_tokens(row.more, len(row.ids), lambda tensor: tensor[:, start:end])
    return Row(row.ids[start:end], None if row.mask is None else row.mask[start:end], more)


def per_token(name: str, tensor: Tensor, length: int) -> bool:
    """Whether a tensor beside a row has something for each of its `length` tokens: [1, length, ...], and no pixels."""
    return tensor.shape[:2] == (1, length) and not tensor.is_floating_point() and not name.startswith("pixel")


def _with_tokens(more: Mapping[str, Tensor], length: int, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The same tensors, those with something for each of the `length` tokens changed."""
    return {name: change(tensor) if per_token(name, tensor, length) else tensor for name, tensor in more.items()}


def _widened(more: Mapping[str, Tensor] | None, length: int, sides: tuple[int, int]) -> dict[str, Tensor]:
    """The same tensors for a row of `length` tokens that gets padding on its sides."""

    def widen(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, 0) * (tensor.ndim - 2) + sides)

    return _with_tokens(more or {}, length, widen)


def stack(rows: Sequence[Row]) -> Windows:
    """Rows padded with id 0 to the longest of them, each on the side where it already is; no mask if none is padded."""
    width = max(len(row.ids) for row in rows)
    ids, masks, more = [], [], []
    for row in rows:
        mask = torch.ones_like(row.ids, dtype=torch.bool) if row.mask is None else row.mask
        gap = width - len(row.ids)
        sides = (0, gap) if mask[0] else (gap, 0)
        ids.append(pad(row.ids, sides))
        masks.append(pad(mask, sides))
        more.append(_widened(row.more, len(row.ids), sides))
    return _windows(torch.stack(ids), torch.stack(masks), more)


def join(parts: Sequence[Windows]) -> Windows:
    """All windows of several sources in one; narrower ones are padded on the right to the widest."""
    width = max(part.length for part in parts)
    ids = [pad(part.ids, (0, width - part.length)) for part in parts]
    masks = [torch.ones_like(part.ids, dtype=torch.bool) if part.mask is None else part.mask for part in parts]
    masks = [pad(mask, (0, width - mask.shape[1])) for mask in masks]
    more = [
        _widened(one, part.length, (0, width - part.length)) for part in parts for one in part.more or [{}] * len(part)
    ]
    return _windows(torch.cat(ids), torch.cat(masks), more)


def _windows(ids: Tensor, mask: Tensor, more: list[dict[str, Tensor]]) -> Windows:
    """Without a mask that masks nothing, and without other inputs if no window has any."""
    return Windows(ids, None if bool(mask.all()) else mask, tuple(more) if any(more) else ())
