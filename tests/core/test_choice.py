"""What a layer should become: the target against least squares in float64, and choices against counting it all out."""

import copy
from itertools import product

import pytest
import torch

from wellrounded.core import choice, gptq
from wellrounded.core.choice import Choice
from wellrounded.core.gptq import Settings
from wellrounded.core.hessian import Hessian
from wellrounded.core.moments import Moments
from wellrounded.core.scheme import Scheme
from wellrounded.errors import NumericsError

from .seen import ALL, IN, OUT, Seen, assert_same, seen, some_weight, sums

SCHEME = Scheme(3, 8)


def prepared(moments: Moments, damping: float, order: str = "importance") -> gptq.Prepared:
    return gptq.prepare([moments.hessian], SCHEME, Settings(damping=damping, order=order))


# ---- the target ----


@pytest.mark.parametrize("order", ["importance", "stored", "group"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_target_is_what_least_squares_find(order, weighted):
    tokens, weight = seen(weighted=weighted), some_weight()
    moments = tokens.moments()
    for upstream, residual in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.5)):
        asked = Choice(upstream, residual)
        found = choice.target(weight, moments, prepared(moments, 1e-9, order), ALL, asked)
        torch.testing.assert_close(found.double(), tokens.best(weight, upstream, residual), rtol=1e-3, atol=1e-3)
        if (upstream, residual) == (1.0, 1.0):
            assert tokens.error(weight, found) < 0.8 * tokens.error(weight, weight), "there is something to make up for"


def test_a_ridge_shrinks_what_is_added_as_it_shrinks_any_least_squares():
    tokens, weight = seen(), some_weight()
    moments = tokens.moments()
    ready = prepared(moments, 0.5)
    n, read = moments.tokens, tokens.x_q.double()
    missing = (tokens.x - tokens.x_q).double() @ weight.double().T + (tokens.r - tokens.r_q).double()
    ridge = ready._ridge()[0].double().diag()
    expected = weight.double() + (missing.T @ read / n) @ torch.linalg.inv(read.T @ read / n + ridge)
    found = choice.target(weight, moments, ready, ALL, Choice(1.0, 1.0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_layer_have_the_targets_that_they_have_among_all():
    tokens, weight = seen(), some_weight()
    moments = tokens.moments()
    ready, asked = prepared(moments, 0.01), Choice(1.0, 1.0)
    whole = choice.target(weight, moments, ready, ALL, asked)
    for rows in (slice(3, 7), slice(None, None, 5)):
        torch.testing.assert_close(choice.target(weight[rows], moments, ready, rows, asked), whole[rows])


def test_where_nothing_has_drifted_the_weight_stays_as_it_is():
    tokens, weight = seen(drift=0.0), some_weight()
    for residual in (False, True):  # not compared at all, or the same
        moments = tokens.moments(residual)
        found = choice.target(weight, moments, prepared(moments, 0.01), ALL, Choice(1.0, 1.0))
        assert torch.equal(found, weight)


def test_what_was_not_chosen_is_not_made_up_for():
    moments, weight = seen().moments(), some_weight()
    assert choice.target(weight, moments, prepared(moments, 0.01), ALL, Choice()) is weight


# ---- shares ----


def least_on_a_grid(value) -> float:
    """Of `value(a, b)`, for a and b from 0 to 1 in steps of 0.02."""
    ticks = [tick / 50 for tick in range(51)]
    return min(value(a, b) for a, b in product(ticks, ticks))


def quadratics():
    """(A, b) of all kinds: the least inside, on edges, in corners; singular, zero, and not quite positive."""
    random = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        for _ in range(30):
            root = torch.randn(2, 2, generator=random, dtype=torch.float64)
            yield root @ root.T, scale * torch.randn(2, generator=random, dtype=torch.float64)
    for a, b in (
        ((1, 1), (1, 1)),
        ((1, 1), (0.5, 0.5)),
        ((1, -1), (0.3, -0.3)),
        ((2, 1), (4, 2)),
        ((1, 0), (0.4, 0.2)),
    ):
        line = torch.tensor(a, dtype=torch.float64)
        yield torch.outer(line, line), torch.tensor(b, dtype=torch.float64)
    yield torch.zeros(2, 2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    yield torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    yield torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize(("quadratic", "linear"), quadratics())
def test_the_least_is_found_wherever_it_lies(quadratic, linear):
    def value(*x):
        x = torch.tensor(x, dtype=torch.float64)
        return float(x @ quadratic @ x - 2 * linear @ x)

    found = choice._least(quadratic.tolist(), linear.tolist())
    assert len(found) == 2 and all(0 <= one <= 1 for one in found)
    assert value(*found) <= least_on_a_grid(value) + 1e-12
    (alone,) = choice._least(quadratic[:1, :1].tolist(), linear[:1].tolist())
    assert 0 <= alone <= 1
    assert value(alone, 0) <= min(value(tick / 50, 0) for tick in range(51)) + 1e-12


@pytest.mark.parametrize("held_drift", [-0.3, 0.0, 0.1, 0.3, 0.9])
def test_shares_are_those_that_lose_least_on_held_out_tokens(held_drift):
    """What was to be made up for is on the held-out tokens the opposite, nothing, less, as much, or more."""
    tokens, held, weight = seen(), seen(80, 1, held_drift), some_weight()
    moments = tokens.moments()
    one, two = choice.corrections(weight, moments, prepared(moments, 0.01), ALL, Choice(1.0, 1.0))

    def error(a, b):
        return held.error(weight, weight + a * one + b * two)

    found = choice.shares(weight, (one, two), held.moments(), ALL)
    least = least_on_a_grid(error)
    assert error(*found) <= least * (1 + 1e-5)
    if held_drift <= 0:
        assert found == (0.0, 0.0)
    if held_drift == 0.9:
        assert found == (1.0, 1.0)
    if held_drift == 0.1:
        assert all(0.1 < share < 0.9 for share in found)
    a, b = choice.shares(weight, (None, two), held.moments(), ALL)
    assert a == 0.0 and error(a, b) <= min(error(0, tick / 50) for tick in range(51)) * (1 + 1e-5)
    assert choice.shares(weight, (one, None), held.moments(), ALL)[1] == 0.0
    assert choice.shares(weight, (None, None), held.moments(), ALL) == (0.0, 0.0)


# ---- choosing ----


def told_apart(held_drift: float = 0.15):
    """Tokens of which a part is held out, that differ: the moments of both together, and of the held-out ones."""
    rest, held = seen(600, 0), seen(100, 1, held_drift)
    held = Seen(*(each if each is None else each * 3 for each in held))
    moments = rest.moments()
    moments.merge(held.moments())
    return rest, held, moments


@pytest.mark.parametrize(("upstream", "residual"), [(True, True), (True, False), (False, True), (False, False)])
def test_solving_never_sees_the_tokens_that_choices_are_made_on(upstream, residual):
    rest, held, moments = told_apart()
    weight, before = some_weight(), sums(moments)
    settings = Settings(damping=0.01, upstream=upstream, residual=residual)
    found = choice.choose(weight, moments, held.moments(), ALL, SCHEME, settings)
    alone = rest.moments()
    parts = choice.corrections(weight, alone, prepared(alone, 0.01), ALL, Choice(upstream, residual))
    expected = choice.shares(weight, parts, held.moments(), ALL)
    assert (found.upstream, found.residual) == pytest.approx(expected, abs=1e-4)
    assert [share > 0 for share in expected] == [upstream, residual]
    assert_same(sums(moments), before, 1e-6)


def test_choices_are_made_on_some_rows_of_the_weight():
    _, held, moments = told_apart()
    weight, rows = some_weight(), slice(None, None, 3)
    settings = Settings(upstream=True, residual=True)
    some = choice.choose(weight[rows], moments, held.moments(), rows, SCHEME, settings)
    apart = copy.deepcopy(moments)
    apart.residual = moments.residual[rows]
    mine = held.moments()
    mine.residual = mine.residual[rows]
    assert some == choice.choose(weight[rows], apart, mine, ALL, SCHEME, settings)


def test_where_nothing_can_be_solved_nothing_is_chosen():
    dead = Moments(Hessian(IN), torch.zeros(IN, IN))
    dead.update(torch.zeros(50, IN), torch.zeros(50, IN))
    held = Moments(Hessian(IN), torch.zeros(IN, IN))
    settings = Settings(damping=0.02, upstream=True)
    assert choice.choose(some_weight(), dead, held, ALL, SCHEME, settings) == Choice()


def test_inputs_that_are_not_numbers_are_said_and_nothing_stays_taken_away():
    _, held, moments = told_apart()
    tokens = moments.tokens
    moments.update(torch.full((1, IN), torch.nan), torch.zeros(1, IN))
    with pytest.raises(NumericsError, match="NaN or Inf"):
        choice.choose(some_weight(), moments, held.moments(), ALL, SCHEME, Settings(upstream=True))
    assert moments.tokens == tokens + 1


@pytest.mark.parametrize("where", ["read", "residual"])
def test_an_original_that_overflows_where_the_quantized_model_does_not_is_said(where):
    _, held, moments = told_apart()
    before, many = moments.tokens, torch.full((1, IN), torch.inf)
    moments.update(torch.ones(1, IN), many if where == "read" else torch.ones(1, IN), None, many[:, :OUT])
    with pytest.raises(NumericsError, match="hold NaN or Inf in the original model"):
        choice.choose(some_weight(), moments, held.moments(), ALL, SCHEME, Settings(upstream=True, residual=True))
    assert moments.tokens == before + 1
