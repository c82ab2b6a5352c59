"""The experts of a layer, solved as a stack: each is what it would be alone, whatever it is stacked with."""

from dataclasses import replace

import pytest
import torch

from wellrounded import native
from wellrounded.core import gptq, grid, rounding
from wellrounded.core.factor import FactorError, factor, factor_stacked
from wellrounded.core.gptq import ORDERS, Settings
from wellrounded.core.hessian import Hessian
from wellrounded.core.scheme import BITS, Scheme
from wellrounded.errors import NumericsError

from . import twin
from .test_gptq import (
    assert_same_but_for_ties,
    hessian_of,
    inputs,
    lower,
    lowered,
    order_of,
    rounding_of_targets,
    rows_of,
    weights,
)  # fmt: skip

ROWS, COLUMNS, MEMBERS = 24, 80, 3
SETTINGS = Settings(damping=0.01, panel=16, order="importance", candidates=8, refit_sweeps=2)
FIELDS = ("codes", "scales", "zeros", "group_index")
FEW = [Scheme(4, 32), Scheme(3, 16, symmetric=False), Scheme(2, -1), Scheme(4, 32, act_order=True)]
needs_core = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture(params=[pytest.param("native", marks=needs_core), "torch"])
def path(request, monkeypatch):
    """Which code rounds: the native core, member by member, or torch, the whole stack at once."""
    if request.param == "torch":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    return request.param


def experts(columns: int = COLUMNS) -> tuple[torch.Tensor, list[Hessian]]:
    """Weights [members, rows, columns] and what they read: the last has dead columns, whose importance is a tie."""
    seen = [inputs(columns, tokens=400 - 150 * e, seed=10 + e) for e in range(MEMBERS)]
    seen[-1][:, ::7] = 0
    return torch.stack([weights(ROWS, columns, seed=e) for e in range(MEMBERS)]), [hessian_of(x) for x in seen]


def assert_same(here, there) -> None:
    """Bit for bit, the factor included."""
    (q, factored), (other, expected) = here, there
    for field in FIELDS:
        assert torch.equal(getattr(q, field), getattr(other, field)), field
    assert torch.equal(factored.upper, expected.upper)
    assert (q.scheme, factored.damping) == (other.scheme, expected.damping)


# Stacked and alone


@needs_core
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_each_member_is_what_it_is_alone_bit_for_bit(bits, symmetric, act_order, order):
    """80 columns in groups of 32: the last one is ragged."""
    (stack, hessians), scheme = experts(), Scheme(bits, 32, symmetric, act_order)
    settings = replace(SETTINGS, order=order)
    solved = gptq.solve_stacked(stack, hessians, scheme, settings)
    assert len(solved) == MEMBERS
    for weight, hessian, member in zip(stack, hessians, solved):
        assert_same(member, gptq.solve(weight, hessian, scheme, settings))
    assert not torch.equal(solved[0][0].codes, solved[1][0].codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_each_member_is_the_textbook_on_the_grid_it_stores(path, scheme, order):
    (stack, hessians), settings = experts(), replace(SETTINGS, order=order, refit_sweeps=0)
    solved = gptq.solve_stacked(stack, hessians, scheme, settings)
    for weight, hessian, (q, factored) in zip(stack, hessians, solved):
        groups = q.group_index.long()
        order_here = order_of(hessian.diagonal(), groups, order)
        alone = factor(hessian.matrix()[order_here][:, order_here], settings.damping)
        assert torch.equal(factored.upper, alone.upper)
        damped = torch.empty(COLUMNS, COLUMNS, dtype=torch.float64)
        damped[order_here[:, None], order_here] = factored.upper.double() @ factored.upper.double().T
        expected, targets = twin.gptq(weight, damped, q.scales, q.zeros, groups, order_here, scheme.max_code)
        quantized = twin.restore(expected - q.zeros[:, groups], q.scales, groups)
        tolerance = rounding_of_targets(weight[:, order_here], quantized[:, order_here], factored.upper)
        codes, scales = q.codes[:, order_here], q.scales.double()[:, groups][:, order_here]
        assert_same_but_for_ties(codes, expected[:, order_here], targets[:, order_here], scales, tolerance)


class Stack:
    """What a sweep is given, for all members; the Hessians' factors in float64, where no rounding is a tie."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, (self.weights, hessians) = scheme, experts()
        importance = torch.stack([hessian.diagonal() for hessian in hessians])
        self.scales, self.zeros = (x.mT for x in grid.search(self.weights, importance, scheme, candidates=8))
        random = torch.Generator().manual_seed(2)
        self.order = torch.stack([torch.randperm(COLUMNS, generator=random) for _ in hessians])
        self.groups = scheme.trivial_group_index(COLUMNS).long()[self.order]
        self.columns = torch.stack([w.T[o] for w, o in zip(self.weights, self.order)]).double()
        factors = [factor(h.matrix()[o][:, o], 0.01) for h, o in zip(hessians, self.order)]
        self.upper = torch.stack([each.upper for each in factors]).double()
        self.damped = self.upper @ self.upper.mT

    def sweep(self, members: slice, panel: int) -> torch.Tensor:
        parts = (self.columns, self.upper, self.scales, self.zeros, self.groups)
        return rounding.sweep(*(each[members] for each in parts), self.scheme, panel)


@pytest.mark.parametrize("scheme", FEW[:3], ids=str)
def test_a_stack_is_swept_as_its_members_are_and_as_the_textbook_says(scheme):
    stack = Stack(scheme)
    steps = stack.sweep(slice(None), panel=16)
    for e in range(MEMBERS):
        damped, order = torch.empty_like(stack.damped[e]), stack.order[e]
        damped[order[:, None], order] = stack.damped[e]
        codes, _ = twin.gptq(
            stack.weights[e], damped, stack.scales[e].T, stack.zeros[e].T,
            scheme.trivial_group_index(COLUMNS).long(), order, scheme.max_code,
        )  # fmt: skip
        assert torch.equal((steps[e] + stack.zeros[e][stack.groups[e]]).T, codes[:, order])
        assert torch.equal(stack.sweep(slice(e, e + 1), panel=33)[0], steps[e])


@pytest.mark.parametrize("scheme", FEW[:3], ids=str)
def test_scales_of_a_stack_are_refitted_as_those_of_its_members(scheme):
    stack = Stack(scheme)
    steps = stack.sweep(slice(None), panel=COLUMNS)
    parts = (stack.columns, steps, stack.scales, stack.groups)
    refitted = rounding.refit(*parts, rows_of(stack.damped))
    for e in range(MEMBERS):
        few = 4  # rows: the twin is slow
        expected = twin.refit(
            stack.columns[e, :, :few].T, steps[e, :, :few].T, stack.scales[e, :, :few].T, stack.groups[e],
            stack.damped[e],
        )  # fmt: skip
        assert torch.equal(refitted[e, :, :few].T, expected)
        assert torch.equal(
            rounding.refit(*(each[e : e + 1] for each in parts), rows_of(stack.damped[e : e + 1]))[0], refitted[e]
        )
    assert not torch.equal(refitted, stack.scales)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("candidates", [1, 8])
@pytest.mark.parametrize("scheme", FEW[:3], ids=str)
def test_grids_are_searched_with_the_importance_of_each_member(path, monkeypatch, scheme, candidates, weighted):
    monkeypatch.setattr(grid, "ROWS", 7)
    stack, hessians = experts()
    importance = torch.stack([hessian.diagonal() for hessian in hessians]) if weighted else None
    scales, zeros = grid.search(stack, importance, scheme, candidates)
    assert scales.shape == zeros.shape == (MEMBERS, ROWS, scheme.groups(COLUMNS))
    for e in range(MEMBERS):
        alone = grid.search(stack[e], importance[e] if weighted else None, scheme, candidates)
        assert torch.equal(scales[e], alone[0]) and torch.equal(zeros[e], alone[1])


def test_with_activation_order_grids_are_searched_on_the_columns_of_each_member_s_groups(path):
    (stack, hessians), scheme = experts(), Scheme(3, 16, symmetric=False, act_order=True)
    solved = gptq.solve_stacked(stack, hessians, scheme, replace(SETTINGS, refit_sweeps=0))
    for weight, hessian, (q, _) in zip(stack, hessians, solved):
        columns = torch.argsort(q.group_index, stable=True)
        scales, zeros = grid.search(weight[:, columns], hessian.diagonal()[columns], scheme, SETTINGS.candidates)
        assert torch.equal(q.scales, scales) and torch.equal(q.zeros, zeros)


# What must not matter


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_permuting_the_members_permutes_the_answer(path, scheme):
    """One panel and no refit: there is no matrix product whose sums might depend on a member's place."""
    (stack, hessians), order = experts(), [2, 0, 1]
    settings = replace(SETTINGS, panel=COLUMNS, refit_sweeps=0)
    here = gptq.solve_stacked(stack, hessians, scheme, settings)
    there = gptq.solve_stacked(stack[order], [hessians[e] for e in order], scheme, settings)
    for e, member in zip(order, there):
        assert_same(member, here[e])


@needs_core
def test_weights_of_any_dtype_lying_any_way_are_solved():
    """Fused experts are often stored [experts, in, out]."""
    stack, hessians = experts()
    stack = stack.bfloat16()
    expected = gptq.solve_stacked(stack.float(), hessians, FEW[1], SETTINGS)
    for lying in (stack, stack.mT.contiguous().mT, stack.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(lying, stack)
        for one, other in zip(gptq.solve_stacked(lying, hessians, FEW[1], SETTINGS), expected):
            assert_same(one, other)


def test_nothing_that_was_handed_in_is_changed(path):
    stack, hessians = experts()
    before = stack.clone(), [hessian.matrix() for hessian in hessians]
    gptq.solve_stacked(stack, hessians, FEW[0], SETTINGS)
    assert torch.equal(stack, before[0])
    assert all(torch.equal(hessian.matrix(), matrix) for hessian, matrix in zip(hessians, before[1]))


def test_every_tensor_of_a_member_is_contiguous(path):
    for q, _ in gptq.solve_stacked(*experts(), FEW[3], SETTINGS):
        assert all(getattr(q, field).is_contiguous() for field in FIELDS)


# Factors, and members that have none


def matrices(*hessians: Hessian) -> torch.Tensor:
    return torch.stack([hessian.matrix() for hessian in hessians])


def test_a_stack_is_factored_in_one_call(monkeypatch):
    real, shapes = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: shapes.append(tuple(matrix.shape)) or real(matrix))
    _, hessians = experts()
    factors = factor_stacked(matrices(*hessians), 0.01).members()
    assert shapes == [(MEMBERS, COLUMNS, COLUMNS)]
    for found, hessian in zip(factors, hessians):
        alone = factor(hessian.matrix(), 0.01)
        assert found.damping == alone.damping == 0.01
        torch.testing.assert_close(found.upper, alone.upper)  # libraries may factor a batch by another routine


def test_a_member_climbs_the_ladder_by_itself():
    """Damping is raised for those that need it: each comes out as alone, in the order that was asked for."""
    stack = matrices(lowered(0.0), lowered(0.55), lowered(0.9), Hessian(2), lowered(0.6), lowered(0.1))
    factors = factor_stacked(stack, 0.01).members()
    for e in (0, 1, 4, 5):
        alone = factor(stack[e], 0.01)
        assert factors[e].damping == alone.damping
        assert torch.equal(factors[e].upper, alone.upper)
    assert [factors[e].damping for e in (0, 1, 4, 5)] == pytest.approx([0.01, 0.1, 1.0, 0.01])
    assert isinstance(factors[2], FactorError) and "not positive definite even with damping 1" in str(factors[2])
    assert isinstance(factors[3], FactorError) and "every input column of this layer is dead" in str(factors[3])
    assert factors[2].__traceback__ is None, "an error that is kept must not keep the stack"


def test_float64_is_tried_for_a_member_before_more_damping(monkeypatch):
    """Which matrices fail in float32 only depends on the library, so here those do whose corner is 1."""
    real, tried = torch.linalg.cholesky_ex, []

    def failing_in_float32(matrix):
        tried.append((matrix.dtype, len(matrix)))
        lower, info = real(matrix)
        return lower, info + ((matrix[..., 0, 0] == 1) & (matrix.dtype == torch.float32))

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing_in_float32)
    stack = torch.stack([2 * torch.eye(3), torch.eye(3), 3 * torch.eye(3)])
    factors = factor_stacked(stack, 0.0).members()
    assert tried == [(torch.float32, 3), (torch.float64, 1)]
    for found, matrix in zip(factors, stack):
        assert found.damping == 0.0 and found.upper.dtype == torch.float32
        torch.testing.assert_close(found.upper, matrix.sqrt())


@pytest.mark.parametrize("scheme", FEW, ids=str)
@pytest.mark.parametrize("broken", ["dead", "hopeless"])
def test_a_member_that_cannot_be_factored_does_not_disturb_the_others(path, scheme, broken):
    """One panel and no refit, as above, so that the others may be compared bit for bit."""
    stack, hessians = experts()
    settings = replace(SETTINGS, panel=COLUMNS, refit_sweeps=0)
    expected = gptq.solve_stacked(stack, hessians, scheme, settings)
    bad = Hessian(COLUMNS)
    if broken == "hopeless":
        bad = lower(hessian_of(inputs()), 0.5 * float(hessian_of(inputs()).diagonal().max()))
    found = gptq.solve_stacked(
        torch.cat([stack[:1], weights()[None], stack[1:]]), [hessians[0], bad, *hessians[1:]], scheme, settings
    )
    error = found.pop(1)
    assert isinstance(error, FactorError)
    with pytest.raises(FactorError) as alone:
        gptq.solve(weights(), bad, scheme, settings)
    assert str(error) == str(alone.value)
    for member, other in zip(found, expected):
        assert_same(member, other)


def test_all_members_may_fail():
    found = gptq.solve_stacked(experts()[0], [Hessian(COLUMNS)] * MEMBERS, FEW[0], SETTINGS)
    assert len(found) == MEMBERS and all(isinstance(member, FactorError) for member in found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_member_that_is_not_a_number_stops_all(value):
    """Even beside, and in, a member that cannot be factored: numbers come first, as for one matrix."""
    stack, hessians = experts()
    hessians[0] = Hessian(COLUMNS)
    for e in range(MEMBERS):
        spoilt = stack.clone()
        spoilt[e, 3, 7] = value
        with pytest.raises(NumericsError, match="the weights of this layer hold NaN or Inf") as raised:
            gptq.solve_stacked(spoilt, hessians, FEW[0], SETTINGS)
        assert not isinstance(raised.value, FactorError)
    x = inputs()
    x[3, 7] = value
    with pytest.raises(NumericsError, match="the inputs of this layer hold NaN or Inf"):
        gptq.solve_stacked(stack, [*hessians[:2], hessian_of(x)], FEW[0], SETTINGS)


def test_each_member_needs_a_hessian():
    stack, hessians = experts()
    with pytest.raises(ValueError, match="3 weights need as many Hessians, not 1"):
        gptq.solve_stacked(stack, hessians[:1], FEW[0], SETTINGS)


# What few tokens were routed to


def test_what_is_missing_comes_from_the_mean_of_the_others():
    x, everything = inputs(tokens=30), inputs(tokens=500, seed=7)
    few, many = hessian_of(x), hessian_of(everything)
    blend = few.blended(many, 120)
    exact = x.double().T @ x.double() + 90 / 500 * (everything.double().T @ everything.double())
    magnitude = x.double().abs().T @ x.double().abs() + 90 / 500 * (everything.abs().T @ everything.abs()).double()
    assert blend.tokens == 120
    assert ((blend.matrix() - exact / 120).abs() <= (500 + 6) * 2.0**-24 * magnitude / 120).all()
    # From what both hold, it takes one product and one sum.
    upper = torch.triu(few._upper.double() + many._upper.double() * 90 / 500)
    bound = 3 * 2.0**-24 * (few._upper.double().abs() + many._upper.double().abs() * 90 / 500)
    assert ((torch.triu(blend._upper) - upper).abs() <= bound).all()


@pytest.mark.parametrize("floor", [0, 1, 29, 30])
def test_who_has_seen_enough_is_left_alone(floor):
    few, many = hessian_of(inputs(tokens=30)), hessian_of(inputs(tokens=500, seed=7))
    assert few.blended(many, floor) is few
    assert few.blended(many, 31) is not few


def test_blending_changes_neither_of_the_two():
    few, many = hessian_of(inputs(tokens=30)), hessian_of(inputs(tokens=500, seed=7))
    before = few.matrix(), many.matrix()
    few.blended(many, 100).update(inputs(tokens=5))
    assert torch.equal(few.matrix(), before[0]) and torch.equal(many.matrix(), before[1])
    assert (few.tokens, many.tokens) == (30, 500)


def test_others_that_have_seen_nothing_have_nothing_to_give():
    few, none = hessian_of(inputs(tokens=3)), Hessian(COLUMNS)
    assert few.blended(none, 100) is few and none.blended(Hessian(COLUMNS), 100) is none


def test_who_has_seen_nothing_takes_the_mean_of_the_others():
    many = hessian_of(inputs(tokens=500))
    blend = Hessian(COLUMNS).blended(many, 64)
    assert blend.tokens == 64
    torch.testing.assert_close(blend.matrix(), many.matrix())


def test_blending_gives_the_rank_that_few_tokens_lack():
    few, many = hessian_of(weights(5, 16, seed=1)), hessian_of(weights(100, 16, seed=2))
    assert torch.linalg.matrix_rank(few.matrix()) == 5
    blend = few.blended(many, 16)
    assert torch.linalg.matrix_rank(blend.matrix()) == 16
    with pytest.raises(FactorError, match="dead"):
        gptq.solve(weights(8, 16), Hessian(16), Scheme(4, 8), SETTINGS)
    q, _ = gptq.solve(weights(8, 16), Hessian(16).blended(many, 16), Scheme(4, 8), SETTINGS)
    assert q.shape == (8, 16)
