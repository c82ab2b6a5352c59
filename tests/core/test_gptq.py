"""The laws of the solver. Settings are spelled out, so that tuning the defaults cannot change what is tested."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from wellrounded.core import gptq, grid, rounding, rtn
from wellrounded.core.factor import FactorError, factor
from wellrounded.core.gptq import Settings
from wellrounded.core.hessian import Hessian
from wellrounded.core.scheme import BITS, Scheme
from wellrounded.errors import NumericsError

from . import twin

ROWS, COLUMNS = 24, 80
PLAIN = Settings(damping=0.01, panel=16, order="stored", candidates=8, refit_sweeps=0)
SCHEMES = [
    Scheme(bits, group_size, symmetric)
    for bits in BITS
    for symmetric in (True, False)
    for group_size in (-1, 16, 32)  # 80 columns: one group, five whole ones, a ragged last one
]


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int = COLUMNS, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """[tokens, columns]: few directions hold most of the energy, and columns differ in size, as in a real model."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, columns // 4, generator=random) @ torch.randn(columns // 4, columns, generator=random)
    noise = torch.randn(tokens, columns, generator=random)
    return (shared + noise) * torch.randn(columns, generator=random).exp()


def hessian_of(x: torch.Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.update(x)
    return hessian


def order_of(importance: torch.Tensor, index: torch.Tensor, name: str) -> torch.Tensor:
    """The order that is documented, by sorting a list."""
    group, h = index.tolist(), importance.tolist()
    peak = [max((h[j] for j in range(len(h)) if group[j] == g), default=0) for g in range(max(group) + 1)]
    keys = {"importance": lambda j: -h[j], "group": lambda j: (-peak[group[j]], -h[j]), "stored": lambda j: group[j]}
    return torch.tensor(sorted(range(len(h)), key=keys[name]))


def rounding_of_targets(weight: torch.Tensor, quantized: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """[out, in] float64: how far float32 targets can be from exact ones, once all codes before them are the same.

    A target adds one product per column before it to the weight; each product and each sum is rounded once, and so is
    the factor: (in + 3) half-units of what is added, in absolute value. Everything is in the order of the sweep.
    """
    feedback = torch.triu(upper.double() / upper.double().diagonal(), 1).abs()
    added = weight.double().abs() + (weight.double() - quantized.double()).abs() @ feedback
    return (weight.shape[1] + 3) * 2.0**-24 * added


def assert_same_but_for_ties(codes, expected, targets, scales, tolerance) -> None:
    """Row by row, all [out, in] in sweep order: the first code that differs was a tie; later ones follow from it."""
    for r in (codes != expected).any(1).nonzero().flatten().tolist():
        j = int((codes[r] != expected[r]).nonzero()[0])
        step = (targets[r, j] / scales[r, j]).abs()
        from_tie = (step - step.floor() - 0.5).abs() * scales[r, j].abs()
        assert from_tie <= tolerance[r, j], f"row {r}, column {j}: {from_tie:g} from a tie, {tolerance[r, j]:g} allowed"


def refit(*matrices: torch.Tensor) -> torch.Tensor:
    """One member's new scales; the last matrix is the damped Hessian."""
    *stacks, damped = (matrix[None] for matrix in matrices)
    return rounding.refit(*stacks, rows_of(damped))[0]


def rows_of(damped: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a refit asks for rows of damped Hessians [members, in, in]."""
    return lambda columns: damped[torch.arange(len(damped))[:, None], columns]


class Problem:
    """Everything that a sweep is given, columns in a random order, and R R^T as the Hessian of the twin."""

    def __init__(self, scheme: Scheme, columns: int = COLUMNS, rows: slice = slice(None)) -> None:
        self.scheme, self.weight = scheme, weights(columns=columns)[rows]
        hessian = hessian_of(inputs(columns))
        self.scales, self.zeros = grid.search(self.weight, hessian.diagonal(), scheme, candidates=8)
        self.groups = scheme.trivial_group_index(columns).long()
        self.order = torch.randperm(columns, generator=torch.Generator().manual_seed(2))
        self.upper = factor(hessian.matrix()[self.order][:, self.order], 0.01).upper
        self.damped = torch.empty(columns, columns, dtype=torch.float64)
        self.damped[self.order[:, None], self.order] = self.upper.double() @ self.upper.double().T

    def sweep(self, panel: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Codes [out, in], like the twin's."""
        columns, groups = self.weight.T[self.order].to(dtype), self.groups[self.order]
        stacks = (each[None] for each in (columns, self.upper.to(dtype), self.scales.T, self.zeros.T, groups))
        (steps,), zeros = rounding.sweep(*stacks, self.scheme, panel), self.zeros.T
        codes = torch.empty_like(steps)
        codes[self.order] = steps + zeros[groups]
        return codes.T

    def twin(self) -> tuple[torch.Tensor, torch.Tensor]:
        return twin.gptq(
            self.weight, self.damped, self.scales, self.zeros, self.groups, self.order, self.scheme.max_code
        )


# The same as the textbook


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_sweep_chooses_the_codes_of_the_textbook(scheme):
    problem = Problem(scheme)
    assert torch.equal(problem.sweep(panel=16), problem.twin()[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_in_float32_the_sweep_leaves_the_textbook_only_at_ties(scheme):
    problem = Problem(scheme)
    codes, (expected, targets) = problem.sweep(panel=16, dtype=torch.float32), problem.twin()
    steps = expected - problem.zeros[:, problem.groups]
    order, scales = problem.order, problem.scales.double()[:, problem.groups]
    quantized = twin.restore(steps, problem.scales, problem.groups)
    tolerance = rounding_of_targets(problem.weight[:, order], quantized[:, order], problem.upper)
    assert_same_but_for_ties(codes[:, order], expected[:, order], targets[:, order], scales[:, order], tolerance)


@pytest.mark.parametrize("order_name", ["importance", "group", "stored"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 16, symmetric=False), Scheme(2, -1)], ids=str)
def test_a_solution_is_the_textbook_on_the_grid_it_stores(scheme, act_order, order_name):
    """Scales are final, rounded to float16, before any code is chosen: the twin knows only the stored ones."""
    weight, hessian, scheme = weights(), hessian_of(inputs()), replace(scheme, act_order=act_order)
    q, factored = gptq.solve(weight, hessian, scheme, replace(PLAIN, order=order_name))
    groups = q.group_index.long()
    order = order_of(hessian.diagonal(), groups, order_name)
    assert torch.equal(factored.upper, factor(hessian.matrix()[order][:, order], PLAIN.damping).upper)
    damped = torch.empty(COLUMNS, COLUMNS, dtype=torch.float64)
    damped[order[:, None], order] = factored.upper.double() @ factored.upper.double().T
    expected, targets = twin.gptq(weight, damped, q.scales, q.zeros, groups, order, scheme.max_code)
    quantized = twin.restore(expected - q.zeros[:, groups], q.scales, groups)
    tolerance = rounding_of_targets(weight[:, order], quantized[:, order], factored.upper)
    scales = q.scales.double()[:, groups]
    assert_same_but_for_ties(q.codes[:, order], expected[:, order], targets[:, order], scales[:, order], tolerance)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_code_is_the_nearest_to_its_target_and_the_loss_is_what_they_miss(scheme):
    """`t_j - q_j` weighs R_jj^2 (Babai): the sum is the trace that the Hessian gives."""
    weight, hessian = weights(), hessian_of(inputs())
    q, factored = gptq.solve(weight, hessian, scheme, PLAIN)
    upper, groups = factored.upper.double(), q.group_index.long()
    quantized = twin.restore(q.codes.double() - q.zeros[:, groups], q.scales, groups)
    targets = weight.double() + (weight.double() - quantized) @ torch.triu(upper / upper.diagonal(), 1)
    scales, zeros = q.scales.double()[:, groups], q.zeros.double()[:, groups]

    again = twin.round_to_grid(targets, scales, zeros, scheme.max_code)
    tie = (targets / scales).abs().frac().sub(0.5).abs() * scales.abs()
    assert ((again == q.codes) | (tie <= rounding_of_targets(weight, quantized, upper))).all()

    missed = upper.diagonal().square() @ (targets - quantized).square().T
    # The factor is backward stable: R R^T is off by (in + 1) half-units of |R| |R|^T, entry by entry.
    error = (weight - quantized).abs()
    tolerance = (COLUMNS + 1) * 2.0**-24 * ((error @ upper.abs()) ** 2).sum(1)
    damped = twin.damped(hessian.matrix(), factored.damping)
    assert ((missed - twin.exact_loss(weight, quantized, damped)).abs() <= tolerance).all()


# Where it must agree with plain rounding, and where it must win


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("sizes", ["identity", "diagonal"])
def test_without_correlation_it_is_plain_rounding_exactly(scheme, sizes):
    weight = weights()
    diagonal = torch.ones(COLUMNS) if sizes == "identity" else weights(1, COLUMNS, seed=3)[0].exp()
    hessian = hessian_of(torch.diag(diagonal))
    q, _ = gptq.solve(weight, hessian, scheme, replace(PLAIN, order="group"))
    scales, zeros = grid.search(weight, hessian.diagonal(), scheme, PLAIN.candidates)
    assert torch.equal(q.scales, scales) and torch.equal(q.zeros, zeros)
    assert torch.equal(q.codes, grid.encode(weight, scales, zeros, q.group_index.long(), scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("order_name", ["importance", "group", "stored"])
def test_on_correlated_inputs_it_loses_less_than_plain_rounding_on_the_same_grid(scheme, order_name):
    weight, hessian = weights(), hessian_of(inputs())
    q, _ = gptq.solve(weight, hessian, scheme, replace(PLAIN, order=order_name))
    plain = replace(q, codes=grid.encode(weight, q.scales, q.zeros, q.group_index.long(), scheme))
    H = hessian.matrix()
    loss, plain_loss = (twin.exact_loss(weight, each.dequantize(), H).sum() for each in (q, plain))
    assert loss < plain_loss


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_as_it_comes_it_loses_less_than_plain_rounding_as_it_comes(scheme):
    weight, hessian = weights(), hessian_of(inputs())
    H, (q, _) = hessian.matrix(), gptq.solve(weight, hessian, scheme)
    for plain in (rtn.solve(weight, hessian, scheme), rtn.solve(weight, None, scheme)):
        losses = [twin.exact_loss(weight, each.dequantize(), H).sum() for each in (q, plain)]
        assert losses[0] < losses[1]


# What must not matter


@pytest.mark.parametrize("panel", [1, 7, 64, 128, 1000])
def test_panels_change_the_speed_and_nothing_else(panel):
    problem = Problem(Scheme(3, 32), columns=160)
    assert torch.equal(problem.sweep(panel), problem.sweep(panel=160))


def whole_numbers(columns: int) -> torch.Tensor:
    """Inputs whose columns all differ in energy, and whose sums of products, below 300 * 128^2 < 2^24, are exact."""
    random = torch.Generator().manual_seed(5)
    x = torch.randint(-64, 65, (300, columns // 2), generator=random).float()
    x = torch.cat([x, x.roll(1, 1) + torch.randint(-64, 65, x.shape, generator=random)], 1)
    assert len(hessian_of(x).diagonal().unique()) == columns
    return x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_permuting_the_columns_permutes_the_answer(group_size, symmetric):
    """Groups move as wholes and columns inside them; with one candidate no sum depends on the order inside."""
    random = torch.Generator().manual_seed(4)
    scheme, width = Scheme(3, group_size, symmetric), 64 if group_size == -1 else group_size
    group_order = torch.randperm(64 // width, generator=random)
    order = torch.cat([g * width + torch.randperm(width, generator=random) for g in group_order])
    weight, x = weights(columns=64), whole_numbers(64)
    settings = replace(PLAIN, order="group", candidates=1, refit_sweeps=2 if group_size == -1 else 0)
    here, _ = gptq.solve(weight, hessian_of(x), scheme, settings)
    there, _ = gptq.solve(weight[:, order], hessian_of(x[:, order]), scheme, settings)
    assert not torch.equal(here.codes, there.codes)
    assert torch.equal(here.codes[:, order], there.codes)
    assert torch.equal(here.scales[:, group_order], there.scales)
    assert torch.equal(here.zeros[:, group_order], there.zeros)
    assert torch.equal(here.dequantize()[:, order], there.dequantize())


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(2, -1, symmetric=False), Scheme(4, 32, act_order=True)],
                         ids=str)  # fmt: skip
def test_siblings_solved_as_one_tall_matrix_are_what_they_are_alone(scheme):
    """One panel, so that no matrix product, whose sums may depend on its shape, is in the way of exactness."""
    layers = [weights(rows, seed=rows) for rows in (200, 8, 30)]
    hessian, settings = hessian_of(inputs()), replace(PLAIN, panel=COLUMNS)
    tall, _ = gptq.solve(torch.cat(layers), hessian, scheme, settings)
    for layer, piece in zip(layers, tall.split([200, 8, 30])):
        alone, _ = gptq.solve(layer, hessian, scheme, settings)
        for field in ("codes", "scales", "zeros", "group_index"):
            assert torch.equal(getattr(piece, field), getattr(alone, field)), field


def test_rows_never_see_each_other():
    """The same for many panels, whose matrix products are summed in float64 here."""
    scheme = Scheme(3, 32, symmetric=False)
    pieces = [Problem(scheme, rows=rows).sweep(panel=7) for rows in (slice(0, 1), slice(1, 6), slice(6, None))]
    assert torch.equal(torch.cat(pieces), Problem(scheme).sweep(panel=7))


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, -1, symmetric=False), Scheme(4, 16, act_order=True)],
                         ids=str)  # fmt: skip
def test_the_same_question_has_the_same_answer_bit_for_bit(scheme):
    settings = Settings(damping=0.01, panel=32, order="group", candidates=8, refit_sweeps=2)
    first, second = (gptq.solve(weights(), hessian_of(inputs()), scheme, settings)[0] for _ in range(2))
    for field in ("codes", "scales", "zeros", "group_index"):
        assert torch.equal(getattr(first, field), getattr(second, field)), field


def test_nothing_that_was_handed_in_is_changed():
    weight, hessian = weights(), hessian_of(inputs())
    before = weight.clone(), hessian.matrix().clone()
    gptq.solve(weight, hessian, Scheme(4, 32), replace(PLAIN, order="group", refit_sweeps=1))
    assert torch.equal(weight, before[0]) and torch.equal(hessian.matrix(), before[1])


# Columns and groups of every kind


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(3, -1, symmetric=False), Scheme(4, 32, act_order=True)],
                         ids=str)  # fmt: skip
def test_dead_columns_are_rounded_plainly_and_not_zeroed(scheme):
    dead = torch.tensor([0, 5, 17, *range(32, 48), 79])  # the third group of 16 is dead as a whole
    weight, x = weights(), inputs()
    x[:, dead] = 0
    q, _ = gptq.solve(weight, hessian_of(x), scheme, replace(PLAIN, order="group"))
    plain = grid.encode(weight, q.scales, q.zeros, q.group_index.long(), scheme)
    assert torch.equal(q.codes[:, dead], plain[:, dead])
    assert not torch.equal(q.codes, plain)
    assert q.dequantize()[:, dead].abs().mean() > 0.5 * weight[:, dead].abs().mean()


def test_a_dead_column_does_not_disturb_the_others():
    dead = torch.arange(3, COLUMNS, 8)
    weight, x = weights(), inputs()
    x[:, dead] = 0
    weight[:, ::8] = 4 * weight[:, ::8].sign()  # the largest of each group, and alive
    other = weight.clone()
    other[:, dead] *= -0.5
    one, two = (gptq.solve(each, hessian_of(x), Scheme(4, 16), PLAIN)[0] for each in (weight, other))
    live = torch.ones(COLUMNS, dtype=torch.bool)
    live[dead] = False
    assert torch.equal(one.codes[:, live], two.codes[:, live]) and torch.equal(one.scales, two.scales)


def test_activation_order_fills_groups_with_columns_of_like_importance():
    hessian = hessian_of(inputs())
    q, _ = gptq.solve(weights(), hessian, Scheme(4, 32, act_order=True), PLAIN)
    assert torch.bincount(q.group_index).tolist() == [32, 32, 16]
    assert not q.trivially_grouped and q.evenly_grouped
    importance = hessian.diagonal()
    members = [importance[q.group_index == g] for g in range(3)]
    assert members[0].min() > members[1].max() and members[1].min() > members[2].max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_order_by_importance_loses_less_than_the_natural_one(symmetric):
    weight, hessian, scheme = weights(64), hessian_of(inputs()), Scheme(3, 16, symmetric)
    natural, _ = gptq.solve(weight, hessian, scheme, PLAIN)
    aware, _ = gptq.solve(weight, hessian, scheme, replace(PLAIN, order="group"))
    free, _ = gptq.solve(weight, hessian, scheme, replace(PLAIN, order="importance"))
    stored, _ = gptq.solve(weight, hessian, replace(scheme, act_order=True), replace(PLAIN, order="group"))
    solved = (natural, aware, free, stored)
    losses = [twin.exact_loss(weight, q.dequantize(), hessian.matrix()).sum() for q in solved]
    assert max(losses[1:]) < losses[0]
    assert natural.trivially_grouped and aware.trivially_grouped and free.trivially_grouped


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_solution_has_the_documented_shapes_and_ranges(scheme, act_order):
    scheme = replace(scheme, act_order=act_order)
    settings = Settings(damping=0.01, panel=32, order="group", candidates=8, refit_sweeps=1)
    q, factored = gptq.solve(weights().bfloat16(), hessian_of(inputs()), scheme, settings)
    groups = scheme.groups(COLUMNS)
    fields = [(q.codes, (ROWS, COLUMNS), torch.uint8), (q.scales, (ROWS, groups), torch.float16),
              (q.zeros, (ROWS, groups), torch.uint8), (q.group_index, (COLUMNS,), torch.int32)]  # fmt: skip
    for tensor, shape, dtype in fields:
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype) and tensor.is_contiguous()
    assert q.scheme == scheme and factored.damping == settings.damping
    assert q.codes.max() <= scheme.max_code and q.zeros.max() <= scheme.max_code
    assert torch.isfinite(q.scales).all() and (q.scales != 0).all()
    assert not scheme.symmetric or (q.zeros == scheme.midpoint).all()


# Scales after rounding


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(2, 16), Scheme(3, 32, symmetric=False), Scheme(2, -1)],
                         ids=str)  # fmt: skip
def test_refitted_scales_are_the_best_that_three_losses_can_find(scheme):
    problem = Problem(scheme, rows=slice(8))
    steps = problem.sweep(panel=COLUMNS) - problem.zeros[:, problem.groups]
    order = problem.order
    damped = problem.damped[order][:, order]
    refitted = refit(
        problem.weight.double().T[order], steps.T[order], problem.scales.T, problem.groups[order],
        damped,
    ).T  # fmt: skip
    assert refitted.dtype == torch.float16
    assert torch.equal(refitted, twin.refit(problem.weight, steps, problem.scales, problem.groups, problem.damped))
    assert not torch.equal(refitted, problem.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refitting_never_raises_the_loss_of_any_row(scheme):
    problem = Problem(scheme)
    steps = problem.sweep(panel=COLUMNS) - problem.zeros[:, problem.groups]
    order, scales = problem.order, problem.scales
    damped = problem.damped[order][:, order]
    losses = [twin.exact_loss(problem.weight, twin.restore(steps, scales, problem.groups), problem.damped)]
    for _ in range(3):
        columns, groups = problem.weight.double().T[order], problem.groups[order]
        scales = refit(columns, steps.T[order], scales.T, groups, damped).T
        losses.append(twin.exact_loss(problem.weight, twin.restore(steps, scales, problem.groups), problem.damped))
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-12)).all()  # float64 sums of 6400 products
    assert losses[1].sum() < losses[0].sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refits_inside_a_solution_keep_the_codes_and_lower_the_loss(scheme):
    weight, hessian = weights(), hessian_of(inputs())
    solved = [gptq.solve(weight, hessian, scheme, replace(PLAIN, refit_sweeps=n)) for n in (0, 1, 3)]
    (q, factored), *_ = solved
    damped = twin.damped(hessian.matrix(), factored.damping)
    losses = [twin.exact_loss(weight, each.dequantize(), damped) for each, _ in solved]
    assert all(torch.equal(each.codes, q.codes) for each, _ in solved)
    # In float32 the slope of the loss in a scale is off by about `in` half-units of its absolute terms, and a scale
    # that is not really better can be taken for better by that much: its change times twice the slope's error.
    groups, H = q.group_index.long(), damped.double().abs()
    steps = (q.codes.double() - q.zeros[:, groups]).abs()
    error = (weight.double() - q.dequantize().double()).abs() + 2.0**-11 * weight.double().abs()
    slope = COLUMNS * 2.0**-24 * (steps * (error @ H)) @ torch.nn.functional.one_hot(groups).double()
    for (before, _), (after, _), was, now in zip(solved, solved[1:], losses, losses[1:]):
        change = (after.scales.double() - before.scales.double()).abs()
        assert (now <= was + 2 * (slope * change).sum(1)).all()
    assert losses[1].sum() < losses[0].sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_again_on_refitted_scales_loses_less_or_changes_nothing(scheme):
    weight, hessian = weights(), hessian_of(inputs())
    solved = [gptq.solve(weight, hessian, scheme, replace(PLAIN, refit_sweeps=1, outer=n)) for n in (0, 1, 3)]
    damped = twin.damped(hessian.matrix(), solved[0][1].damping)
    lost = [twin.exact_loss(weight, each.dequantize(), damped) for each, _ in solved]
    for before, after in pairwise(lost):
        assert (after <= before * (1 + 1e-4)).all()  # they are compared in float32
    again = [torch.equal(solved[0][0].codes, each.codes) for each, _ in solved[1:]]
    assert not any(again) and lost[1].sum() < lost[0].sum()


def test_the_loss_of_an_output_is_what_is_left_of_it_in_the_hessian(monkeypatch):
    problem = Problem(Scheme(3, 16))
    steps = problem.sweep(panel=COLUMNS) - problem.zeros[:, problem.groups]
    stacks = (problem.weight.double().T, steps.T, problem.scales.T, problem.groups)
    expected = twin.exact_loss(problem.weight, twin.restore(steps, problem.scales, problem.groups), problem.damped)
    for columns in (rounding.AT_ONCE, 7):
        monkeypatch.setattr(rounding, "AT_ONCE", columns)
        (lost,) = rounding.losses(*(each[None] for each in stacks), rows_of(problem.damped[None]))
        torch.testing.assert_close(lost, expected)


def test_a_scale_whose_codes_are_all_zero_is_left_alone():
    scales = torch.tensor([[0.5], [0.25]]).half()
    steps = torch.zeros(4, 1)
    groups = torch.tensor([0, 0, 1, 1])
    assert torch.equal(refit(torch.ones(4, 1), steps, scales, groups, torch.eye(4)), scales)


def test_a_scale_never_becomes_zero():
    """It would be the best one for a group whose weights are zero."""
    scales = torch.tensor([[0.5]]).half()
    groups = torch.tensor([0, 0])
    assert torch.equal(refit(torch.zeros(2, 1), torch.ones(2, 1), scales, groups, torch.eye(2)), scales)


# When it cannot be done


def lower(hessian: Hessian, by: float) -> Hessian:
    """Itself, all eigenvalues smaller than they were by as much."""
    hessian.mirrored().diagonal().sub_(by * hessian.tokens)
    return hessian


def lowered(by: float) -> Hessian:
    """Eigenvalues 1.5 - by and 0.5 - by, diagonal 1 - by: damping d adds d * 1.5 * (1 - by)."""
    return lower(hessian_of(torch.tensor([[1.5**0.5, 1.5**0.5], [0.5**0.5, -(0.5**0.5)]])), by)


def test_a_raised_damping_is_reported():
    weight, scheme = weights(columns=2), Scheme(4, -1)
    assert gptq.solve(weight, lowered(0.0), scheme, PLAIN)[1].damping == 0.01
    assert gptq.solve(weight, lowered(0.55), scheme, PLAIN)[1].damping == pytest.approx(0.1)
    assert gptq.solve(weight, lowered(0.6), scheme, PLAIN)[1].damping == pytest.approx(1.0)


def test_a_hessian_that_no_damping_repairs_is_refused():
    with pytest.raises(FactorError, match="not positive definite even with damping 1"):
        gptq.solve(weights(columns=2), lowered(0.9), Scheme(4, -1), PLAIN)


def test_a_layer_that_no_input_reached_is_refused():
    with pytest.raises(FactorError, match="every input column of this layer is dead"):
        gptq.solve(weights(), hessian_of(torch.zeros(10, COLUMNS)), Scheme(4, 16), PLAIN)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_and_inputs_that_are_not_numbers_are_told_apart(value):
    weight, x = weights(), inputs()
    weight[3, 7] = value
    with pytest.raises(NumericsError, match="the weights of this layer hold NaN or Inf"):
        gptq.solve(weight, hessian_of(x), Scheme(4, 16), PLAIN)
    x[3, 7] = value
    for solve in (gptq.solve, rtn.solve):
        with pytest.raises(NumericsError, match="the inputs of this layer hold NaN or Inf"):
            solve(weights(), hessian_of(x), Scheme(4, 16))
