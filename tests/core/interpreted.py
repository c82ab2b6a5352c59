"""The solver's programs for GPUs, interpreted (see test_triton.py), against the torch code that defines them."""

import pytest
import torch

from wellrounded.core import engines, gptq, grid, rounding, triton
from wellrounded.core.hessian import Hessian
from wellrounded.core.scheme import Scheme

from .test_native import cost, groups_of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_they_serve_here():
    assert triton.serves(torch.zeros(2, 2)) and triton.wrong(torch.device("cpu")) is None
    for other in (torch.zeros(2, 2).double(), torch.zeros(4, 4).T[:, 1:], torch.zeros(2, 2, device="meta")):
        assert not triton.serves(torch.zeros(2, 2), other)


@pytest.mark.parametrize(
    ("bits", "symmetric", "width"), [(2, True, 32), (3, False, 32), (4, True, 100), (4, False, 24), (8, True, 32)]
)
def test_the_search_finds_what_the_definition_finds(bits, symmetric, width):
    """As exactly as the native core does: see test_native.py."""
    scheme = Scheme(bits, -1, symmetric)
    weight, energy = map(torch.stack, zip(groups_of(width, 20), groups_of(width, 20, seed=1)))
    scales, zeros = triton.search(weight, energy, bits, symmetric, grid._shares(scheme, 32))
    expected_scales, expected_zeros = grid.search_rows(weight, energy, scheme, 32)
    assert torch.equal(scales, scales.half().float()) and torch.equal(zeros, zeros.round())
    same = (scales == expected_scales) & (zeros == expected_zeros)
    assert same.float().mean() > (0.9 if bits < 8 else 0.5)
    assert torch.equal(zeros[:, 0], expected_zeros[:, 0]) and torch.equal(scales[:, 0], expected_scales[:, 0])
    stack = energy.unsqueeze(1)
    mine, theirs = (cost(weight, stack, s, z, scheme) for s, z in ((scales, zeros), (expected_scales, expected_zeros)))
    off = 4 * width * 2.0**-24 * (stack * weight.square()).sum(-1).double()
    assert (mine <= theirs + off).all()


def test_a_group_that_no_candidate_fits_is_left_to_the_caller():
    weight, energy = torch.full((1, 1, 1, 8), 1e30), torch.ones(1, 1, 8)
    scales, _ = triton.search(weight, energy, 4, True, grid._shares(Scheme(4, -1), 32))
    assert not torch.isfinite(scales).any() or scales.abs().max() > 65504


def test_groups_that_are_too_wide_are_left_to_the_caller():
    weight = torch.zeros(1, 1, triton.WIDEST + 1)
    assert triton.search(weight, weight[0], 4, True, [1.0]) is None


@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (5, 7), (33, 70), (128, 40)])
def test_a_panel_is_rounded_as_the_definition_rounds_it(columns, outputs):
    """A panel inside a weight of more columns, of two members; feedback lies in a wider matrix, as in core.rounding."""
    inputs, mine = columns + 9, slice(4, 4 + columns)
    weights, target = random(2, inputs, outputs), random(2, inputs, outputs, seed=1)
    feedback = 0.05 * random(2, columns, inputs, seed=2)
    scales = random(2, columns, outputs, seed=3).sign() * (0.05 + random(2, columns, outputs, seed=4).abs() * 0.1)
    low = torch.full((2, columns, outputs), -8.0)
    found = []
    for by in (triton.sweep, rounding.sweep_panel):
        steps = torch.full_like(weights, 77.0)
        inside = weights[:, mine], target.clone()[:, mine], feedback[:, :, :columns], scales, low
        found.append((by(*inside, 15, steps[:, mine]), steps))
    (errors, steps), (expected_errors, expected) = found
    assert (steps == expected).float().mean() > 0.999
    alike = (steps == expected).all(1, keepdim=True)
    assert alike.any()
    assert torch.where(alike, errors - expected_errors, 0).abs().max() < 1e-5
    assert steps[:, mine].min() >= -8 and steps[:, mine].max() <= 7
    assert (steps[:, :4] == 77).all() and (steps[:, 4 + columns :] == 77).all()


def test_halves_are_rounded_to_even_ones():
    weights = (torch.arange(-9, 10).float() / 2)[None, :, None]
    steps, ones = torch.empty_like(weights), torch.ones_like(weights)
    triton.sweep(weights, weights, torch.zeros(1, 19, 19), ones, -8 * ones, 15, steps)
    assert torch.equal(steps, weights.round())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "lefts", "rights"), [(1, 8, 8), (70, 40, 150), (200, 130, 129)])
def test_products_of_rows_are_added_up(tokens, lefts, rights, dtype):
    a, b = random(tokens, lefts).to(dtype), random(tokens, 2 * rights, seed=1).to(dtype)[:, ::2]
    start = random(lefts, rights, seed=2)
    total = start.clone()
    assert triton.add_product(a, b, total)
    assert (total - (start.double() + a.double().T @ b.double())).abs().max() < 2e-4
    upper = random(lefts, lefts, seed=3)
    expected = upper.double() + a.double().T @ a.double()
    assert triton.add_gram(a, upper)
    assert (upper - expected).triu().abs().max() < 2e-4


def test_other_dtypes_are_left_to_the_caller():
    assert not triton.add_gram(torch.ones(3, 4), torch.zeros(4, 4))
    assert not triton.add_product(torch.ones(3, 4).half(), torch.ones(3, 4).bfloat16(), torch.zeros(4, 4))
    assert not triton.add_gram(torch.ones(3, 4).half(), torch.zeros(4, 4).double())


@pytest.mark.parametrize("scheme", [Scheme(3, 32, symmetric=False), Scheme(4, 32, act_order=True)], ids=str)
def test_layers_are_solved_as_well_as_without_them(scheme, monkeypatch):
    """A stack of two with Hessians of their own, by these programs alone, and by torch alone."""
    rows = random(2, 300, 96) @ random(96, 96, seed=1) * 0.1
    lost, weights = [], random(2, 24, 96, seed=2)
    for engine in (triton, None):
        monkeypatch.setattr(engines, "ALL", (engine,) if engine else ())
        hessians = [Hessian(96) for _ in rows]
        for hessian, mine in zip(hessians, rows):
            hessian.update(mine.bfloat16())
        solved = gptq.solve_stacked(weights, hessians, scheme)
        off = [w - q.dequantize() for w, (q, _) in zip(weights, solved)]
        lost.append(torch.stack([(e @ h.matrix() * e).sum() for e, h in zip(off, hessians)]))
    assert torch.allclose(*lost, rtol=0.01)


@pytest.mark.parametrize("name", ["search", "sweep", "product"])
def test_a_device_on_which_they_are_wrong_is_noticed(name, monkeypatch):
    programs = triton._programs()

    class Wrong:
        def __getitem__(self, grid):
            return lambda *tensors, **constants: [
                t.mul_(1.5).add_(1) for t in tensors if torch.is_tensor(t) and t.is_floating_point()
            ]

    class Programs:
        search, sweep, product = programs.search, programs.sweep, programs.product

    setattr(Programs, name, Wrong())
    triton.wrong.cache_clear()
    monkeypatch.setattr(triton, "_programs", lambda: Programs)
    with pytest.warns(RuntimeWarning, match="computes something else"):
        assert not triton.serves(torch.zeros(2, 2))
    triton.wrong.cache_clear()


def test_a_device_on_which_they_do_not_run_is_noticed(monkeypatch):
    triton.wrong.cache_clear()
    monkeypatch.setattr(triton, "_programs", lambda: object())
    with pytest.warns(RuntimeWarning, match="without Triton's programs, and slower: AttributeError"):
        assert not triton.serves(torch.zeros(2, 2))
    triton.wrong.cache_clear()
