"""Codes of 2, 3, 4 or 8 bits as one little-endian bit stream in 32-bit words: the only file that shifts.

Code i of a line occupies the stream's bits `i * bits` and up; word w holds the stream's bits `32 w` to `32 w + 31`,
lowest bit first. Three bits do not divide a word, so there a code may lie across two: 32 codes fill three words.

A little-endian stream is the same stream whether it is cut into words or into bytes, so everything below works on
bytes, without ever widening a code, and looks at the words as bytes: right wherever memory is little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch

from ..core.scheme import BITS


def pack(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words, contiguous, of `codes` uint8 [a, b]; along `dim`, n codes become n * bits / 32 words.

    >>> hex(pack(torch.arange(8, dtype=torch.uint8).reshape(1, 8), bits=4, dim=1).item())
    '0x76543210'

    Raises ValueError for a code that does not fit, or if n codes do not fill whole words.
    """
    lines = codes.movedim(dim, -1)
    _check(codes, torch.uint8, lines.shape[1], bits)
    if codes.max() > 2**bits - 1:
        raise ValueError(f"the largest code is {int(codes.max())}; {bits} bits hold 0 to {2**bits - 1}")
    per_unit, unit_bytes = _unit(bits)
    units = lines.reshape(len(lines), -1, per_unit)
    stream = torch.zeros(*units.shape[:2], unit_bytes, dtype=torch.uint8, device=codes.device)
    for place, byte, shift in _places(bits):
        code = units[..., place]
        stream[..., byte].bitwise_or_(code << shift)
        if shift + bits > 8:
            stream[..., byte + 1].bitwise_or_(code >> (8 - shift))
    return stream.reshape(len(lines), -1).view(torch.int32).movedim(-1, dim).contiguous()


def unpack(words: torch.Tensor, bits: int, dim: int, count: int) -> torch.Tensor:
    """uint8 codes of `words` int32 [a, b]; along `dim`, n words become `count` = n * 32 / bits codes.

    The codes lie consecutively in memory along `dim`, whichever it is.

    Raises ValueError if `count` codes do not fill exactly these words.
    """
    lines = words.movedim(dim, -1)
    _check(words, torch.int32, count, bits)
    if lines.shape[1] * 32 != count * bits:
        raise ValueError(f"{count} codes of {bits} bits fill {count * bits // 32} words, not {lines.shape[1]}")
    per_unit, unit_bytes = _unit(bits)
    stream = lines.contiguous().view(torch.uint8).reshape(len(lines), -1, unit_bytes)
    codes = torch.empty(*stream.shape[:2], per_unit, dtype=torch.uint8, device=words.device)
    for place, byte, shift in _places(bits):
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, 2**bits - 1, out=codes[..., place])
    return codes.reshape(len(lines), count).movedim(-1, dim)


def _unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that ends on a byte boundary."""
    codes = 8 // gcd(8, bits)
    return codes, codes * bits // 8


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """(code, byte, shift) for every code of a unit: its lowest bit is bit `shift` of that byte."""
    for place in range(_unit(bits)[0]):
        byte, shift = divmod(place * bits, 8)
        yield place, byte, shift


def _check(tensor: torch.Tensor, dtype: torch.dtype, count: int, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}; 2, 3, 4 or 8 can be packed")
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise ValueError(f"expected a matrix of {dtype}, got {tensor.dtype} {tuple(tensor.shape)}")
    if count <= 0 or count * bits % 32:
        raise ValueError(
            f"{count} codes of {bits} bits do not fill whole words; use a multiple of {32 // gcd(32, bits)}"
        )
