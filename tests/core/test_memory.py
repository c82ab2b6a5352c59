"""Solving takes the Hessian, one factor, the codes, and as much again as some rows need: nothing else grows."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from wellrounded import report, solving
from wellrounded.core import factor as factor_module
from wellrounded.core import gptq, rtn
from wellrounded.core.factor import FactorError, factor_hessians, factor_stacked
from wellrounded.core.hessian import Hessian
from wellrounded.core.scheme import Scheme
from wellrounded.model.inputs import HERE, Member
from wellrounded.presets import preset

from . import twin
from .test_gptq import COLUMNS, PLAIN, hessian_of, inputs, lowered, weights

SCHEMES = [Scheme(4, 32), Scheme(3, -1, symmetric=False), Scheme(4, 16, act_order=True)]


def peak_bytes(run) -> int:
    """The most that was allocated at a time, beyond what was there before; workspaces of libraries are not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most


def solved(layers: list[torch.Tensor], hessian: Hessian, scheme: Scheme, settings: gptq.Settings = PLAIN):
    names = [str(i) for i in range(len(layers))]
    return list(solving.solve([names], [layers], [Member(names, hessian, hessian.tokens)], scheme, settings, True))


@pytest.mark.parametrize(("n", "rows", "members"), [(1536, 256, 1), (1024, 3000, 1), (512, 512, 4)])
def test_the_peak_is_what_was_foreseen(monkeypatch, n, rows, members):
    """One more matrix of the Hessian's size would be 40 % of the first, one more of the weights 20 % of the next."""
    monkeypatch.setattr(gptq, "ROW_ELEMENTS", 2**20)
    hessians = [hessian_of(torch.randn(2 * n, n)) for _ in range(members)]
    names = [[str(e)] for e in range(members)]
    layers = [[torch.randn(rows, n).bfloat16()] for _ in range(members)]

    def run():
        prepared = gptq.prepare(hessians, Scheme(4, 128))
        prepared.solve(rows, lambda some: torch.stack([layer[some] for (layer,) in layers]))

    foreseen = gptq.working_bytes(n, rows, members)
    assert peak_bytes(run) == pytest.approx(foreseen, rel=0.15)
    monkeypatch.setattr(solving, "ERROR_ELEMENTS", 2**18)
    side = [Member(name, hessian, hessian.tokens) for name, hessian in zip(names, hessians)]
    whole = peak_bytes(lambda: list(solving.solve(names, layers, side, Scheme(4, 128), gptq.Settings(), True)))
    assert whole == pytest.approx(foreseen, rel=0.15)


@pytest.mark.parametrize(("n", "rows"), [(1536, 256), (1024, 3000)])
def test_to_choose_and_to_aim_takes_no_more(monkeypatch, n, rows):
    """Beside the moments, of all tokens and of those that are held out; another matrix would be seen here too."""
    monkeypatch.setattr(gptq, "ROW_ELEMENTS", 2**20)
    monkeypatch.setattr(solving, "ERROR_ELEMENTS", 2**18)
    moments, held_out = HERE.moments(n, torch.device("cpu")), HERE.moments(n, torch.device("cpu"))
    for one, tokens in ((moments, 2 * n), (held_out, n // 2)):
        x = torch.randn(tokens, n)
        one.update(x, x + 0.1 * torch.randn(tokens, n), torch.rand(tokens), torch.randn(tokens, rows))
    moments.merge(held_out)
    member = Member(["0"], moments.hessian, moments.tokens, moments, held_out)
    layers, foreseen = [[torch.randn(rows, n).bfloat16()]], gptq.working_bytes(n, rows)
    run = partial(solving.solve, [["0"]], layers, [member], Scheme(4, 128))
    assert peak_bytes(lambda: list(run(preset("default").settings, True))) == pytest.approx(foreseen, rel=0.15)
    assert peak_bytes(lambda: list(run(preset("best").settings, True))) < 1.2 * foreseen


@pytest.mark.parametrize("n", [11008, 28672, 53248])
def test_large_layers_take_their_factor_and_little_more(n):
    assert gptq.working_bytes(n, 8192) < 4 * n * n + 8192 * n + 8 * 4 * gptq.ROW_ELEMENTS


# The factor


@pytest.mark.parametrize("tile", [1, 16, 33, 80, 512])
def test_a_factor_made_tile_by_tile_is_the_factor(monkeypatch, tile):
    monkeypatch.setattr(factor_module, "TILE", tile)
    hessians = [hessian_of(inputs(seed=e)) for e in range(2)]
    order = torch.stack([torch.randperm(COLUMNS) for _ in hessians])
    damped = [twin.damped(h.matrix()[o][:, o], 0.01).double() for h, o in zip(hessians, order)]
    for found in (
        factor_hessians(hessians, order, 0.01),
        factor_stacked(torch.stack([h.matrix()[o][:, o] for h, o in zip(hessians, order)]), 0.01),
    ):
        for upper, expected in zip(found.upper.double(), damped):
            assert torch.equal(upper, upper.triu())
            # Higham, theorem 10.3; the sums of a column are added up tile by tile
            tolerance = (COLUMNS + 3) * 2.0**-24 * (upper.abs() @ upper.abs().T)
            assert ((upper @ upper.T - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("tile", [16, 512])
def test_in_float64_it_is_the_same_factor_and_float32_all_the_same(monkeypatch, tile):
    monkeypatch.setattr(factor_module, "TILE", tile)
    monkeypatch.setattr(factor_module, "WIDE", 700)
    matrix = hessian_of(inputs()).matrix() + torch.eye(COLUMNS)
    here, there = matrix[None].clone().triu(), matrix[None].clone().triu()
    assert factor_module.cholesky_(here).item() and factor_module.cholesky_(there, torch.float64).item()
    assert there.dtype == torch.float32
    exact = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    assert (there[0] - exact).abs().max() <= (here[0] - exact).abs().max()


def test_a_factor_lies_where_its_hessian_does():
    asked = []

    def new(size, device):
        asked.append(torch.zeros(size, size, device=device))
        return asked[-1]

    hessian = Hessian(COLUMNS, new=new)
    hessian.update(inputs())
    _, factored = gptq.solve(weights(), hessian, SCHEMES[0], PLAIN)
    assert len(asked) == 2 and hessian.mirrored() is asked[0]
    assert factored.upper.data_ptr() == asked[1].data_ptr()
    assert len(asked) == 2


def test_what_failed_keeps_no_matrix():
    (error,) = gptq.solve_stacked(weights(columns=2)[None], [lowered(0.9)], Scheme(4, -1), PLAIN)
    assert isinstance(error, FactorError) and error.__traceback__ is None and error.__context__ is None


def test_a_factor_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        prepared = gptq.prepare([hessian_of(inputs())], SCHEMES[0], PLAIN)
        gone = weakref.ref(prepared.factors.upper)
        prepared.solve(24, lambda some: weights()[None, some])
        del prepared
        assert gone() is None
    finally:
        gc.enable()


# The sum, symmetric in its place


@pytest.mark.parametrize("size", [40, 300, 600])  # less than a tile, more than one, more than two
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_symmetric_whenever_it_is_read(dtype, size):
    x = torch.randn(64, size).to(dtype)
    hessian, other, expected = hessian_of(x[:30]), hessian_of(x[40:]), hessian_of(x[:30])
    assert torch.equal(hessian.mirrored(), hessian.mirrored().T)
    for each in (hessian, expected):
        each.update(x[30:40])
        each.merge(other)
    assert torch.equal(hessian.mirrored(), hessian.mirrored().T)
    assert torch.equal(hessian.mirrored(), expected.mirrored()), "having been read leaves no trace"
    columns = torch.tensor([3, 1, 39])
    assert torch.equal(hessian.rows(columns), hessian.matrix()[columns])


# Rows, some at a time


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_may_come_in_chunks_of_any_size(monkeypatch, scheme):
    """One panel and no refit, so that no product, whose sums may depend on its shape, is in the way of exactness."""
    hessian, settings = hessian_of(inputs()), replace(PLAIN, panel=COLUMNS)
    whole, _ = gptq.solve(weights(), hessian, scheme, settings)
    monkeypatch.setattr(gptq, "ROW_ELEMENTS", 1)
    for least in (1, 7, 23):
        monkeypatch.setattr(gptq, "LEAST_ROWS", least)
        found, _ = gptq.solve(weights(), hessian, scheme, settings)
        for field in ("codes", "scales", "zeros", "group_index"):
            assert torch.equal(getattr(found, field), getattr(whole, field)), field


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_run_across_siblings_of_any_dtype(monkeypatch, dtype):
    layers = [weights(rows, seed=rows).to(dtype) for rows in (20, 3, 30)]
    hessian, settings = hessian_of(inputs()), replace(PLAIN, panel=COLUMNS)
    expected, _ = gptq.solve(torch.cat(layers).float(), hessian, SCHEMES[0], settings)
    monkeypatch.setattr(gptq, "LEAST_ROWS", 7)
    monkeypatch.setattr(gptq, "ROW_ELEMENTS", 1)
    found = solved(layers, hessian, SCHEMES[0], settings)
    for (piece, _), other in zip(found, expected.split([20, 3, 30])):
        assert torch.equal(piece.codes, other.codes) and torch.equal(piece.scales, other.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_errors_added_up_row_by_row_are_those_of_the_whole(monkeypatch, scheme):
    monkeypatch.setattr(gptq, "LEAST_ROWS", 5)
    monkeypatch.setattr(solving, "ERROR_ELEMENTS", 1)
    hessian, layer = hessian_of(inputs()), weights()
    ((piece, result),) = solved([layer], hessian, scheme)
    plain = rtn.solve(layer, None, scheme)
    assert result.error_db == pytest.approx(report.error_db(layer, piece, hessian.matrix()), abs=1e-4)
    assert result.rtn_error_db == pytest.approx(report.error_db(layer, plain, hessian.matrix()), abs=1e-4)


def test_a_layer_that_falls_back_is_rounded_in_chunks_too(monkeypatch):
    monkeypatch.setattr(gptq, "LEAST_ROWS", 5)
    monkeypatch.setattr(gptq, "ROW_ELEMENTS", 1)
    layers, dead = [weights(8), weights(9, seed=1)], Hessian(COLUMNS)
    for (piece, result), layer in zip(solved(layers, dead, SCHEMES[0]), layers):
        assert torch.equal(piece.codes, rtn.solve(layer, dead, SCHEMES[0]).codes)
        assert result.damping is None and "every input column of this layer is dead" in result.fallback
