"""What is stored for one layer: how many bits, how many columns share a scale, with or without zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Scheme:
    """One layer's storage. Group size -1 means one group over all inputs.

    >>> Scheme(bits=4, group_size=128).groups(576)
    5
    >>> Scheme(bits=4, group_size=128).refuses(576, 576)

    `act_order` stores a group index per input column (`g_idx`, `desc_act` in the file): columns are grouped by
    importance instead of by position. Few engines read it; the default order inside groups costs nothing at run time.

    Raises UsageError for a width or group size that no file format here can hold.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits={self.bits!r} was asked for; the GPTQ format holds 2, 3, 4 or 8 bits")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise UsageError(
                f"group_size={self.group_size!r} was asked for; use -1 (one group per output) or a multiple of 8, "
                "such as 32, 64 or 128"
            )

    @property
    def max_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero point of every symmetric group, 2^(bits-1)."""
        return 2 ** (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """How many columns share a scale in a layer with this many inputs."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """How many groups a layer with this many inputs has; the last one may be ragged."""
        return -(-in_features // self.columns_per_group(in_features))

    def trivial_group_index(self, in_features: int) -> torch.Tensor:
        """[in_features] int32: column j belongs to group j // columns_per_group."""
        return torch.arange(in_features, dtype=torch.int32) // self.columns_per_group(in_features)

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight, fp16 scales and packed zeros included (g_idx left out)."""
        return self.bits + (16 + self.bits) * self.groups(in_features) / in_features

    def refuses(self, in_features: int, out_features: int) -> str | None:
        """Why the GPTQ file format cannot hold a layer of this shape, as a sentence; None if it can.

        Codes are packed into 32-bit words along the inputs, zeros along the outputs. Three bits do not divide a word:
        their unit is 32 values in three words.
        """
        unit = 32 // self.bits if self.bits != 3 else 32
        for what, size in (("inputs", in_features), ("outputs", out_features)):
            if size % unit:
                return f"{self.bits}-bit packing needs {what} in multiples of {unit}, this layer has {size}"
        return None

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}-bit {group} {'sym' if self.symmetric else 'asym'}{' act-order' if self.act_order else ''}"


def default_group_size(inputs: list[int]) -> int:
    """The largest of 128, 64, 32 that divides every layer's inputs, else 32: serving engines refuse ragged groups."""
    return next((size for size in (128, 64) if all(n % size == 0 for n in inputs)), 32)
