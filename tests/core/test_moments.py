"""What is counted of tokens in both models: the loss is their error, and sums are sums."""

import pytest
import torch

from wellrounded import native
from wellrounded.core.hessian import Hessian
from wellrounded.core.moments import Moments

from .seen import IN, OUT, Seen, assert_same, seen, some_weight, sums


def loss(moments, weight, quantized, rows=slice(None)):
    """The mean error of a quantized weight, up to what does not depend on it, as Moments says."""
    lost = (quantized @ moments.hessian.mirrored() * quantized).sum()
    return float(lost - 2 * (moments.wanted(weight, rows) * quantized).sum()) / moments.tokens


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_loss_is_the_error_but_for_a_constant(residual, weighted):
    tokens, weight = seen(weighted=weighted), some_weight()
    moments = tokens.moments(residual)
    several = [weight, torch.zeros_like(weight), weight + 0.1, some_weight(6), tokens.best(weight).float()]
    apart = [tokens.error(weight, one, residual) - loss(moments, weight, one) for one in several]
    scale = tokens.error(weight, several[1], residual)
    assert max(apart) - min(apart) < 1e-4 * scale
    parts = [loss(moments, weight[rows], several[3][rows], rows) for rows in (slice(0, 5), slice(5, OUT))]
    assert sum(parts) == pytest.approx(loss(moments, weight, several[3]), rel=1e-4)


def test_a_row_that_weighs_four_is_four_rows():
    tokens = seen(40)
    heavy = tokens._replace(weights=torch.tensor([4.0, 1.0] * 20))
    often = Seen(*(torch.cat([each, *[each[::2]] * 3]) for each in tokens[:4]))
    mine, theirs = sums(heavy.moments()), sums(often.moments())
    assert_same({name: mine[name] for name in "HDG"}, theirs)


def test_what_reads_the_same_in_both_models_has_not_drifted_however_it_weighs():
    tokens = seen(weighted=True)
    same = tokens._replace(x=tokens.x_q.bfloat16(), x_q=tokens.x_q.bfloat16())
    moments = same.moments()
    assert not moments.drift.any() and moments.residual.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_summed_in_float32(monkeypatch, dtype, weighted):
    """And the native core's products are those of torch, which it stands in for."""
    tokens = seen(weighted=weighted)
    tokens = Seen(*(each.to(dtype) for each in tokens[:4]), tokens.weights)
    x, x_q, root = tokens.x, tokens.x_q, 1 if tokens.weights is None else tokens.weights.double().sqrt()[:, None]
    heavy, drift, apart = (each.double() * root for each in (x_q, x - x_q, tokens.r - tokens.r_q))
    exact = {"H": heavy.T @ heavy, "D": drift.T @ heavy, "G": apart.T @ heavy}
    rounding = torch.finfo(dtype).eps if weighted else 0  # rows that are scaled are rounded once more
    mine = sums(tokens.moments())
    assert_same({name: mine[name].double() for name in exact}, exact, 1e-6 + rounding)
    monkeypatch.setattr(native, "library", lambda: None)
    assert_same(mine, sums(tokens.moments()), 1e-6)


def test_no_rows_are_nothing():
    moments = seen().moments()
    before = sums(moments)
    moments.update(*(torch.empty(0, IN) for _ in range(2)), torch.empty(0), torch.empty(0, OUT))
    assert_same(sums(moments), before, 0)


@pytest.mark.parametrize("residual", [False, True])
def test_parts_that_are_merged_are_the_whole(residual):
    tokens = seen(weighted=True)
    whole, parts = (
        tokens.moments(residual),
        [Seen(*(each[some] for each in tokens)) for some in (slice(200), slice(200, None))],
    )
    merged = Moments(Hessian(IN), torch.zeros(IN, IN))
    for part in parts:
        merged.merge(part.moments(residual))
    assert_same(sums(merged), sums(whole))
    assert (merged.residual is None) is not residual


def test_the_sum_over_processes_is_what_all_have_counted():
    """Of two processes, one has met no token of the residual yet: it takes part all the same."""
    tokens = [seen(100, seed) for seed in (0, 1)]
    here, there = tokens[0].moments(residual=False), tokens[1].moments()
    left = iter([there.hessian.mirrored(), torch.tensor([there.tokens]), there.drift, there.residual])
    here.sum_over(lambda tensor: tensor.add_(next(left)), outputs=OUT)
    assert next(left, None) is None
    both = tokens[0].moments(residual=False)
    both.merge(there)
    assert_same(sums(here), sums(both))


def test_without_a_part_it_is_as_if_that_had_not_been_counted_and_then_it_is_back():
    rest, part = seen(600, 0), seen(80, 1)
    whole, taken = rest.moments(), part.moments()
    whole.merge(taken)
    before, mine = sums(whole), sums(taken)
    with pytest.raises(KeyboardInterrupt), whole.without(taken):
        assert_same(sums(whole), sums(rest.moments()), 1e-5)
        raise KeyboardInterrupt
    assert_same(sums(whole), before, 1e-6)
    assert_same(sums(taken), mine, 0)
