"""What becomes of every tensor of the source: packed, or copied bit by bit under the name that it has; none is lost."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from contextlib import suppress

import torch

from .checkpoint import Source
from .core.recipe import Rule
from .core.weight import QuantizedWeight
from .errors import CheckpointError
from .formats import gptq as gptq_format
from .plan import Plan

OUTSIDE = "outside"  # the part of a result that holds everything outside the blocks; large models have several
PART_BYTES = 2**30  # of what is outside, in one part


class Ledger:
    """The source's tensors by the part of the result that they belong to, and what a plan makes of them.

    owners  planned layers that share their weight with one before them, and which: that one is solved, and stored
    parts   the stored tensors of every block, and of what is outside: each belongs to the first block that needs it
    outside the names of the parts with what is outside
    stored  where a parameter of the model lies in the files, of those that one stored tensor alone is made for

    Raises CheckpointError for a planned layer under whose name no packed tensor would be found again.
    """

    def __init__(self, source: Source, plan: Plan, blocks: list[str]) -> None:
        self.source, self.plan = source, plan
        self.owners = self._owners()
        self.parts: dict[str, list[str]] = {part: [] for part in [OUTSIDE, *blocks]}
        for stored, made in source.made.items():
            owner = next((b for b in blocks if any(name.startswith(f"{b}.") for name in made)), OUTSIDE)
            self.parts[owner].append(stored)
        self.outside = self._divided()
        alone = ((made[0], stored) for stored, made in source.made.items() if len(made) == 1)
        self.stored = {name: stored for name, stored in alone if name.removesuffix(".weight") not in plan.schemes}
        for name in plan.schemes:
            source.packed_name(name)

    def _divided(self) -> list[str]:
        """Cut what is outside into parts that a small memory can hold."""
        pieces: list[list[str]] = [[]]
        size = 0
        for stored in self.parts[OUTSIDE]:
            mine = self.source.sizes.get(stored, 0)
            if pieces[-1] and size + mine > PART_BYTES:
                pieces.append([])
                size = 0
            pieces[-1].append(stored)
            size += mine
        names = [OUTSIDE, *(f"{OUTSIDE}-{number}" for number in range(2, len(pieces) + 1))]
        self.parts |= dict(zip(names, pieces))
        return names

    def _owners(self) -> dict[str, str]:
        first: dict[int, str] = {}
        weights = {name: self.source.model.get_submodule(name).weight for name in self.plan.schemes}
        owners = {name: first.setdefault(id(weight), name) for name, weight in weights.items()}
        return {name: owner for name, owner in owners.items() if owner != name}

    def packed(self, name: str, quantized: QuantizedWeight, version: str) -> dict[str, torch.Tensor]:
        """The tensors of a packed layer, by their names in the file."""
        prefix = self.source.packed_name(name)
        return {f"{prefix}.{key}": tensor for key, tensor in gptq_format.to_tensors(quantized, version).items()}

    def dense(self, part: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What belongs to this part and stays as it is, by its name in the file.

        One of which the model makes several, some of them a packed layer's, is replaced by those that are not packed.
        """
        for stored in self.parts[part]:
            made = self.source.made[stored]
            packed = [name for name in made if name.removesuffix(".weight") in self.plan.schemes]
            together = len(made) > 1 and any(name.rpartition(".")[0] in self.plan.schemes for name in made)
            if not packed and not together:
                yield stored, self.source.read_stored(stored).contiguous()
                continue
            for name in (name for name in made if name not in packed):
                layer, _, leaf = name.rpartition(".")
                value = self.source.read(name)
                assert value is not None
                yield f"{self.source.packed_name(layer)}.{leaf}", value.contiguous()

    def account(self, names: Container[str]) -> dict[str, int]:
        """What became of the source's tensors in a result whose tensors are called `names`, counted.

        Raises CheckpointError for one that is neither there nor packed: that would be our fault, and is never silent.
        """
        counts = {"quantized": 0, "copied": 0, "not_in_model": 0}
        for stored, made in self.source.made.items():
            if stored in names:
                counts["copied" if made else "not_in_model"] += 1
                continue
            for name in made or [stored]:
                layer, _, leaf = name.rpartition(".")
                prefix = self.source.packed_name(self.owners.get(layer, layer))
                if f"{prefix}.qweight" not in names and f"{prefix}.{leaf}" not in names:
                    raise CheckpointError(f"{stored} of the source is neither copied nor packed; please report this")
            counts["quantized"] += 1
        return counts

    def kept(self) -> list[str]:
        """Names of what stays dense, as the model has them and as the files do: readers know the one or the other."""
        names = dict.fromkeys(self.plan.kept)
        for name in self.plan.kept:
            with suppress(CheckpointError):
                names[self.source.packed_name(name)] = None
        return list(names)

    def beyond(self) -> list[Rule]:
        """Rules that keep dense what the model does not have, but an engine may: a speculative head."""
        used = {prefix for stored, made in self.source.made.items() if made for prefix in _prefixes(stored)}
        unknown = (stored for stored, made in self.source.made.items() if not made and stored.endswith(".weight"))
        shortest = (next((p for p in _prefixes(stored) if p not in used), stored) for stored in unknown)
        return [Rule(rf"{re.escape(prefix)}(\.|$)", None) for prefix in dict.fromkeys(shortest)]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts) - 1)]
