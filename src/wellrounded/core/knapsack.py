"""One option for every item, the cheapest that fits: the multiple-choice knapsack, solved to the byte.

Price a byte at p and every item can choose alone: what minimizes `cost + p * size`. The best such price gives a lower
bound of the cost, and a choice that nearly fits. How far an option is from its item's cheapest at that price, its
excess, is what it adds to the bound: `cost = bound + p * (budget - size) + sum of excesses`. Hence no option whose
excess is above the gap between the bound and a choice that is known can be part of a better one, which leaves few, and
these are tried in all combinations that nothing dominates (Nemhauser and Ullmann, "Discrete dynamic programming and
capital allocation", 1969; Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import UsageError

MOST_STATES = 2**20  # partial choices that are kept; beyond, the gap says what may have been missed
STEPS = 200  # of the search for the price of a byte


@dataclass(frozen=True)
class Packing:
    """The option of every item, what they cost and weigh, and by how much a better choice could be cheaper at most."""

    options: tuple[int, ...]
    cost: float
    size: int
    gap: float = 0.0


def pack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> Packing:
    """Options, one per item, with the least total of `costs` among those whose total of `sizes` is at most `budget`.

    `costs[i][o]` and `sizes[i][o]` are those of option o of item i; items may have different options. Sizes are whole
    numbers. The result is the best there is, unless its `gap` says otherwise.

    Raises UsageError if even the smallest options do not fit.
    """
    least = sum(map(min, sizes))
    if least > budget:
        raise UsageError(f"the smallest choice takes {least:,}, more than the {budget:,} that there are")
    price, bound = _price(costs, sizes, budget)
    known = _filled(costs, sizes, budget, _cheapest(costs, sizes, price))
    total = _total(costs, known)
    excess = [_excess(c, s, price) for c, s in zip(costs, sizes)]
    found, missed = _search(costs, sizes, budget, excess, total - bound)
    if found is not None and (better := _total(costs, found)) < total:
        known, total = found, better
    size = sum(s[o] for s, o in zip(sizes, known))
    return Packing(tuple(known), total, size, max(0.0, total - bound) if missed else 0.0)


def _total(costs: Sequence[Sequence[float]], options: Sequence[int]) -> float:
    return sum(c[o] for c, o in zip(costs, options))


def _excess(costs: Sequence[float], sizes: Sequence[int], price: float) -> list[float]:
    """How much more each option costs at this price than the item's cheapest."""
    priced = [cost + price * size for cost, size in zip(costs, sizes)]
    return [each - min(priced) for each in priced]


def _cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], price: float) -> list[int]:
    """Every item's best option at this price, the smallest of equals."""
    return [
        min(range(len(c)), key=lambda o, c=c, s=s: (c[o] + price * s[o], s[o]))  # type: ignore[misc]
        for c, s in zip(costs, sizes)
    ]


def _price(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> tuple[float, float]:  # fmt: skip
    """A price per unit of size at which the items' own choices fit, as low as can be; and the bound that it proves."""

    def size_at(price: float) -> int:
        return sum(s[o] for s, o in zip(sizes, _cheapest(costs, sizes, price)))

    def bound_at(price: float) -> float:
        return sum(min(a + price * b for a, b in zip(c, s)) for c, s in zip(costs, sizes)) - price * budget

    low, high = 0.0, 1e-300
    if size_at(low) <= budget:
        return low, bound_at(low)
    # Above the steepest step from one option to a smaller one, everybody takes the smallest, which fits.
    for c, s in zip(costs, sizes):
        steps = [(c[b] - c[a]) / (s[a] - s[b]) for a in range(len(c)) for b in range(len(c)) if s[a] > s[b]]
        high = max([high, *steps])
    high *= 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if size_at(middle) > budget else (low, middle)
    return high, bound_at(high)


def _filled(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, options: list[int]
) -> list[int]:
    """A choice that fits, improved option by option with the room that is left, the largest gain first."""
    options = list(options)
    left = budget - sum(s[o] for s, o in zip(sizes, options))
    while True:
        gains = [
            (c[now] - c[other], i, other)
            for i, (c, s, now) in enumerate(zip(costs, sizes, options))
            for other in range(len(c))
            if c[other] < c[now] and s[other] - s[now] <= left
        ]
        if not gains:
            return options
        _, i, other = max(gains)
        left -= sizes[i][other] - sizes[i][options[i]]
        options[i] = other


def _search(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    budget: int,
    excess: Sequence[Sequence[float]],
    gap: float,
) -> tuple[list[int] | None, bool]:
    """The cheapest choice that is better than what is known by up to `gap`, None if there is none.

    Item by item, partial choices [states] that no other one beats in both size and cost; and whether some had to be
    left out for want of room.
    """
    smallest = [min(s) for s in sizes]
    rest = sum(smallest)
    slack = gap * (1 + 1e-9) + 1e-300  # what rounding may hide
    size = torch.zeros(1, dtype=torch.int64)
    cost, over = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[torch.Tensor, torch.Tensor]] = []  # per item: from which state, with which option
    missed = False
    for c, s, e, least in zip(costs, sizes, excess, smallest):
        rest -= least
        open_ = [o for o in range(len(c)) if e[o] <= slack]
        options = torch.tensor(open_).repeat_interleave(len(size))
        parent = torch.arange(len(size)).repeat(len(open_))
        new_size = (size + torch.tensor([s[o] for o in open_]).unsqueeze(1)).flatten()
        new_cost = (cost + torch.tensor([c[o] for o in open_], dtype=torch.float64).unsqueeze(1)).flatten()
        new_over = (over + torch.tensor([e[o] for o in open_], dtype=torch.float64).unsqueeze(1)).flatten()
        keep = ((new_over <= slack) & (new_size + rest <= budget)).nonzero().flatten()
        keep = keep[_undominated(new_size[keep], new_cost[keep])]
        if len(keep) > MOST_STATES:
            missed = True
            keep = keep[torch.argsort(new_over[keep])[:MOST_STATES]]
        size, cost, over = new_size[keep], new_cost[keep], new_over[keep]
        trail.append((parent[keep], options[keep]))
        if not len(keep):
            return None, missed
    state, found = int(cost.argmin()), []
    for parent, options in reversed(trail):
        found.append(int(options[state]))
        state = int(parent[state])
    return found[::-1], missed


def _undominated(size: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """int64: which states are cheaper than every one that is not larger."""
    by_cost = torch.argsort(cost, stable=True)
    order = by_cost[torch.argsort(size[by_cost], stable=True)]  # by size, the cheaper one first
    sorted_ = cost[order]
    before = torch.cat([sorted_.new_full((1,), torch.inf), sorted_.cummin(0).values[:-1]])
    return order[sorted_ < before]
