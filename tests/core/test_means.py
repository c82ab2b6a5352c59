"""A bias takes the mean of an error; what is left of the loss is what second moments around the means say."""

import pytest
import torch

from wellrounded.core.means import Means

from .seen import IN, OUT, seen, some_weight


def apart_from_zero(**options):
    """Tokens that have much in common."""
    tokens = seen(**options)
    return tokens._replace(x=tokens.x + 0.7, x_q=tokens.x_q + torch.linspace(0, 2, IN), r=tokens.r + 1)


def counted(tokens, rows=slice(None)):
    means = Means(IN)
    root = None if tokens.weights is None else tokens.weights[rows].sqrt()
    each = (tokens.x_q[rows], (tokens.x - tokens.x_q)[rows], (tokens.r - tokens.r_q)[rows])
    read, drift, apart = each if root is None else (one * root.unsqueeze(1) for one in each)
    means.update(read, root, drift, apart)
    return means


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_with_its_bias_a_layer_loses_what_centred_moments_say(weighted, residual):
    tokens, weight, quantized = apart_from_zero(weighted=weighted), some_weight(), some_weight(6)
    moments, means = tokens.moments(residual), counted(tokens)
    apart, mass = tokens.r - tokens.r_q, torch.ones(len(tokens.x)) if tokens.weights is None else tokens.weights
    bias = means.absorbed(weight, quantized, 1.0, float(residual))
    error = tokens.x @ weight.T - tokens.x_q @ quantized.T + apart * residual
    left = (error - bias).double()
    assert (mass.double() @ left).abs().max() < 1e-4 * (mass.double() @ error.double()).abs().max(), "no mean is left"
    exact = (mass.double().unsqueeze(1) * left.square()).sum()

    def constant():
        """The loss of zero, which does not depend on what is chosen."""
        whole = tokens.x @ weight.T + apart * residual
        middle = (mass @ whole) / mass.sum()
        return (mass.unsqueeze(1) * (whole - middle).square()).double().sum()

    before = [one.clone() for one in (moments.hessian.mirrored(), moments.drift)]
    with means.centred(moments.hessian.mirrored(), moments.drift, moments.residual):
        lost = (quantized @ moments.hessian.mirrored() * quantized).sum()
        found = lost - 2 * (moments.wanted(weight) * quantized).sum() + constant()
    assert float(found) == pytest.approx(float(exact), rel=1e-3)
    for one, old in zip((moments.hessian.mirrored(), moments.drift), before):
        torch.testing.assert_close(one, old, rtol=1e-5, atol=1e-3)


def test_rows_are_of_the_layer_and_shares_are_of_the_errors():
    means, weight, quantized = counted(apart_from_zero()), some_weight(), some_weight(6)
    whole = means.absorbed(weight, quantized, 0.5, 0.25)
    some = slice(1, 4)
    torch.testing.assert_close(means.absorbed(weight[some], quantized[some], 0.5, 0.25, some), whole[some])
    parts = [means.absorbed(weight, quantized, *shares) for shares in ((0, 0), (1, 0), (0, 1))]
    expected = parts[0] + 0.5 * (parts[1] - parts[0]) + 0.25 * (parts[2] - parts[0])
    torch.testing.assert_close(whole, expected)
    assert len(whole) == OUT and not torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])


def test_processes_add_up():
    tokens = apart_from_zero()
    whole, *halves = (counted(tokens, rows) for rows in (slice(None), slice(50), slice(50, None)))
    others = iter([halves[1].mass, halves[1].inputs, halves[1].drift, halves[1].residual])
    halves[0].sum_over(lambda mine: mine.add_(next(others)), OUT)
    for name in ("mass", "inputs", "drift", "residual"):
        torch.testing.assert_close(getattr(halves[0], name), getattr(whole, name))
    halves[0].merge(halves[1], sign=-1)
    torch.testing.assert_close(halves[0].inputs, counted(tokens, slice(50)).inputs, rtol=1e-4, atol=1e-3)
