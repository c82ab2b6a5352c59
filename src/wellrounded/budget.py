"""A bit budget: which layer gets how many bits, so that the model fits, to the byte, and suffers least.

What each set of layers would cost is measured (sensitivity), and a knapsack chooses (core.knapsack). Whether the
mixture is better than a uniform scheme is for contest to find out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from .core.knapsack import pack
from .core.recipe import Recipe, Rule
from .core.scheme import Scheme
from .errors import UsageError
from .formats.config import patterns_for
from .formats.gptq import layout
from .memory import parse_size
from .model import blocks as layers_of
from .pipeline import Run
from .sensitivity import Sensitivity

SERVED = (4, 8)  # bits that serving engines load: others are chosen from only where these do not fit
ENTRY = len('"":{"dtype":"BF16","shape":,"data_offsets":[,]},')  # of a tensor in a file's header
HEADER = 8 + len('{"__metadata__":{"format":"pt"}}') + 8  # of a file: its length, what is always there, padding
SHARD = 2**31  # no two files in a row hold less together than they might: see writer.SHARD_BYTES


@dataclass(frozen=True)
class Budget:
    """How large a result may be: `bpw` bits per weight of the quantized layers, scales and zeros included, or `size`.

    `size` is in bytes, or text like "4.2GB": all safetensors files together, what stays dense included.

    Raises UsageError unless exactly one of them is given, and makes sense.
    """

    bpw: float | None = None
    size: int | str | None = None

    def __post_init__(self) -> None:
        if (self.bpw is None) == (self.size is None):
            raise UsageError(f"bpw={self.bpw} and size={self.size} were asked for; give one of them")
        if self.bpw is not None and not 0 < self.bpw < 100:
            raise UsageError(f"bpw={self.bpw} was asked for; give bits per weight, such as 3.5 or 4.25")
        if self.size is not None:
            object.__setattr__(self, "size", parse_size(self.size))

    def __str__(self) -> str:
        return f"{self.bpw:g} bits per weight" if self.bpw is not None else f"{self.size:,} bytes"


@dataclass(frozen=True)
class Account:
    """What layers take, and what there is for all of them, in the budget's unit: bits, or bytes.

    shapes  (outputs, inputs) of every layer that is stored, by its name; those that share its weight take nothing
    room    for all of them together
    dense   what everything else takes, headers included, at most
    """

    shapes: Mapping[str, tuple[int, int]]
    room: int
    dense: int
    in_bytes: bool

    @classmethod
    def of(cls, run: Run, budget: Budget) -> Account:
        """Of the layers that `run` would quantize."""
        names = [name for name in run.plan.schemes if name not in run.owners]
        shapes = {name: layers_of.shape_of(run.source.model.get_submodule(name)) for name in names}
        if budget.bpw is not None:
            return cls(shapes, int(budget.bpw * sum(map(prod, shapes.values()))), 0, False)
        assert isinstance(budget.size, int)
        dense = _dense_bytes(run, shapes)
        return cls(shapes, budget.size - dense, dense, True)

    def size(self, names: Iterable[str], scheme: Scheme) -> int:
        """What these layers take with this scheme."""
        return sum(self._one(*self.shapes[name], scheme) for name in names if name in self.shapes)

    def _one(self, outputs: int, inputs: int, scheme: Scheme) -> int:
        if self.in_bytes:
            return _stored_bytes(scheme, outputs, inputs)
        return outputs * (inputs * scheme.bits + (16 + scheme.bits) * scheme.groups(inputs))  # Scheme.bits_per_weight

    def said(self, size: int) -> str:
        """Such a total, as the budget was asked for."""
        if self.in_bytes:
            return f"{size + self.dense:,} bytes"
        return f"{size / sum(map(prod, self.shapes.values())):.3f} bits per weight"


def _stored_bytes(scheme: Scheme, outputs: int, inputs: int) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in layout(scheme, inputs, outputs).values())


def _dense_bytes(run: Run, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Whatever the files hold besides packed layers: dense tensors, to the byte, and headers, barely rounded up."""
    packed = {f"{name}.weight" for name in run.plan.schemes}
    dense = {stored: made for stored, made in run.source.made.items() if not made or not packed.issuperset(made)}
    total = sum(run.source.sizes[stored] for stored in dense)
    most = total + sum(_stored_bytes(Scheme(8, 32), *shape) for shape in shapes.values())
    offsets = 2 * len(str(most))  # no offset has more digits
    for stored, made in dense.items():
        for name in {stored, *made}:
            # The digits of a shape are hardly more than those of its product.
            total += ENTRY + len(name) + len(str(run.source.sizes[stored])) + 12 + offsets
    for name, (outputs, inputs) in shapes.items():
        for leaf, (shape, _) in layout(run.plan.schemes[name], inputs, outputs).items():
            total += ENTRY + len(f"{run.source.packed_name(name)}.{leaf}") + len(str(list(shape))) + 2 + offsets
    return total + (1 + most // SHARD) * HEADER


def mixture(sets: Sequence[Sensitivity], account: Account, budget: Budget) -> tuple[list[Scheme], float]:
    """The scheme of each set that there is room for and that together cost least; and what may be missing to the best.

    Of 4 and 8 bits, which serving engines load, where these fit; else of 3 bits too. Raises UsageError for a budget out
    of range.
    """
    names, options = [one.names for one in sets], [[*one.costs] for one in sets]
    refuse_out_of_range(names, options, account, budget)
    served = [[scheme for scheme in each if scheme.bits in SERVED] for each in options]
    if all(served) and sum(map(min, _sizes(names, served, account))) <= account.room:
        options = served
    costs = [[one.costs[scheme] for scheme in each] for one, each in zip(sets, options)]
    packing = pack(costs, _sizes(names, options, account), account.room)
    return [each[chosen] for each, chosen in zip(options, packing.options)], packing.gap


def refuse_out_of_range(
    names: Sequence[Sequence[str]], options: Sequence[Sequence[Scheme]], account: Account, budget: Budget
) -> None:
    """Raises UsageError, naming the range that is possible, if these schemes of these layers cannot meet the budget."""
    sizes = _sizes(names, options, account)
    least, most = (sum(extreme(each) for each in sizes) for extreme in (min, max))
    if not least <= account.room <= most:
        few, many = (extreme(scheme.bits for each in options for scheme in each) for extreme in (min, max))
        raise UsageError(
            f"{budget} were asked for; of this model everything in {few} bits takes {account.said(least)}, and in "
            f"{many} bits {account.said(most)}: ask for something between"
        )


def _sizes(names: Sequence[Sequence[str]], options: Sequence[Sequence[Scheme]], account: Account) -> list[list[int]]:
    return [[account.size(mine, scheme) for scheme in each] for mine, each in zip(names, options)]


def uniform(sets: Sequence[Sensitivity], account: Account) -> Scheme | None:
    """The one scheme for all layers that fits and is expected to cost least; None if none fits."""
    shared = [scheme for scheme in sets[0].costs if all(scheme in one.costs for one in sets)]
    fitting = [s for s in shared if sum(account.size(one.names, s) for one in sets) <= account.room]
    return min(fitting, key=lambda scheme: sum(one.costs[scheme] for one in sets), default=None)


def recipe_of(run: Run, sets: Sequence[Sensitivity], chosen: Sequence[Scheme]) -> Recipe:
    """The recipe that gives each set the scheme chosen for it, and leaves dense what `run` does.

    Rules name layers as the model, as the files and as engines that fuse some do.
    """
    weights: Counter[Scheme] = Counter()
    names: dict[Scheme, dict[str, None]] = {}
    for one, scheme in zip(sets, chosen):
        weights[scheme] += sum(run.source.model.get_submodule(name).weight.numel() for name in one.names)
        mine = names.setdefault(scheme, {})
        mine |= dict.fromkeys(one.names)
        mine |= dict.fromkeys(run.source.packed_name(name) for name in one.names)
    base = weights.most_common(1)[0][0]
    rules = [Rule(p, scheme) for scheme, mine in names.items() if scheme != base for p in _patterns(mine)]
    return Recipe(base, (*run.recipe.rules, *rules))


def _patterns(names: Iterable[str]) -> list[str]:
    r"""Patterns for exactly these layers, those that differ only in the number of their block taken together.

    >>> _patterns(["h.3.mlp.gate_proj", "h.3.mlp.up_proj", "h.12.mlp.gate_proj", "h.12.mlp.up_proj"])
    ['h\\.(3|12)\\.mlp\\.(gate_proj|up_proj|gate_up_proj)$']
    >>> _patterns(["h.0.mlp.experts.0.w1", "h.0.mlp.experts.1.w1", "h.0.mlp.experts.0.w2"])
    ['h\\.0\\.mlp\\.experts(\\..*)?$']
    """
    inside = re.compile(r"(.*\.experts)(\..*)")
    names = list(names)
    experts = dict.fromkeys(match[1] for name in names if (match := inside.fullmatch(name)))
    found = patterns_for(name for name in names if not inside.fullmatch(name))
    found += [rf"{re.escape(name)}(\..*)?$" for name in experts]
    numbers: dict[tuple[str, str], list[str]] = {}
    for pattern in found:
        before, number, after = re.fullmatch(r"(.*?\\\.)?(\d+)(\\\..*)|.*", pattern).group(1, 2, 3)  # type: ignore[union-attr]
        numbers.setdefault((before or "", after) if number else (pattern, ""), []).append(number or "")
    return [
        before + (each[0] if len(each) == 1 else f"({'|'.join(each)})") + after
        for (before, after), each in numbers.items()
    ]


def described(run: Run, sets: Sequence[Sensitivity], chosen: Sequence[Scheme]) -> str:
    """Which schemes, and how large a part of the quantized weights has each."""
    weights: Counter[Scheme] = Counter()
    for one, scheme in zip(sets, chosen):
        weights[scheme] += sum(run.source.model.get_submodule(name).weight.numel() for name in one.names)
    total = sum(weights.values())
    if len(weights) == 1:
        return str(next(iter(weights)))
    parts = sorted(weights.items(), key=lambda item: (item[0].bits, -item[0].group_size))
    return f"mixed ({', '.join(f'{count / total:.0%} {scheme}' for scheme, count in parts)})"
