"""The knapsack: as good as trying everything, to the byte, and it says so when it could not try everything."""

import itertools
import random

import pytest

from wellrounded.core import knapsack
from wellrounded.core.knapsack import pack
from wellrounded.errors import UsageError


def brute(costs, sizes, budget) -> float:
    """The least cost of any choice that fits, by trying all."""
    choices = itertools.product(*(range(len(each)) for each in costs))
    fitting = (o for o in choices if sum(s[i] for s, i in zip(sizes, o)) <= budget)
    return min(sum(c[i] for c, i in zip(costs, o)) for o in fitting)


def items(seed: int, count: int, options: int, alike: bool = False):
    """Costs and sizes as layers have them, larger options being cheaper; or, not `alike`, in no order at all."""
    chance = random.Random(seed)
    costs, sizes = [], []
    for _ in range(count):
        unit, weight = chance.randrange(1, 50), chance.expovariate(1.0)
        bits = sorted(chance.sample(range(2, 40), options))
        sizes.append([unit * each for each in bits])
        costs.append([weight * (4.0**-each if alike else chance.random()) for each in bits])
    return costs, sizes


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_nothing_that_fits_is_cheaper(seed, alike):
    costs, sizes = items(seed, count=6, options=4, alike=alike)
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for part in (0.0, 0.1, 0.35, 0.7, 1.0):
        budget = least + int(part * (most - least))
        found = pack(costs, sizes, budget)
        assert found.cost == pytest.approx(brute(costs, sizes, budget), rel=1e-12)
        assert found.gap == 0 and found.size <= budget
        assert found.size == sum(s[o] for s, o in zip(sizes, found.options))
        assert found.cost == pytest.approx(sum(c[o] for c, o in zip(costs, found.options)))


def test_the_greedy_choice_is_not_enough():
    """Two small gains that fit together beat the one that is best by weight and leaves no room."""
    costs, sizes = [[10.0, 4.0], [10.0, 5.5], [10.0, 5.5]], [[0, 60], [0, 50], [0, 50]]
    assert pack(costs, sizes, 100).options == (0, 1, 1)


def test_a_single_byte_decides():
    costs, sizes = [[2.0, 1.0], [2.0, 1.5]], [[10, 20], [10, 20]]
    assert pack(costs, sizes, 40).options == (1, 1)
    assert pack(costs, sizes, 39).options == (1, 0)
    assert pack(costs, sizes, 29).options == (0, 0)


def test_a_larger_option_that_costs_more_is_left_alone():
    assert pack([[1.0, 2.0]], [[5, 9]], 100).options == (0,)


def test_what_cannot_fit_is_refused_with_the_least_there_is():
    with pytest.raises(UsageError, match="the smallest choice takes 15, more than the 14 that there are"):
        pack([[1.0, 0.0], [1.0, 0.0]], [[7, 9], [8, 9]], 14)


def test_a_model_of_hundreds_of_layers_is_packed_exactly():
    costs, sizes = items(3, count=400, options=7, alike=True)
    found = pack(costs, sizes, (sum(map(min, sizes)) + sum(map(max, sizes))) // 2)
    assert found.gap == 0 and len(found.options) == 400


def test_without_room_for_all_partial_choices_the_gap_holds_the_truth(monkeypatch):
    costs, sizes = items(1, count=7, options=4)
    budget = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    monkeypatch.setattr(knapsack, "MOST_STATES", 1)
    found = pack(costs, sizes, budget)
    best = brute(costs, sizes, budget)
    assert found.size <= budget and found.cost - found.gap - 1e-12 <= best <= found.cost
