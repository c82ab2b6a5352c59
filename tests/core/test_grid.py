"""Grids are judged against the extremes of a group, and against a twin that tries every scale."""

import pytest
import torch

from wellrounded.core import grid
from wellrounded.core.grid import LARGEST, TINY, encode, search
from wellrounded.core.scheme import BITS, Scheme
from wellrounded.errors import NumericsError

MANY = 64  # candidates, where a search is meant: more than enough, whatever the default is

# Half the distance between neighbouring float16 numbers, relative to them; below 2^-14 the distance itself is TINY.
HALF_UNIT = 2.0**-11


def weights(rows: int = 40, columns: int = 96, seed: int = 0) -> torch.Tensor:
    """Heavy tails: each group has a largest weight that stands out."""
    random = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, columns, generator=random) * torch.randn(rows, columns, generator=random).exp()


def energies(columns: int = 96, seed: int = 1) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).exp().square()


def restored(weight, scales, zeros, scheme):
    """[rows, columns] float64: what plain rounding on this grid gives back."""
    groups = scheme.trivial_group_index(weight.shape[1]).long()
    codes = encode(weight, scales, zeros, groups, scheme).double()
    return (codes - zeros[:, groups]) * scales.double()[:, groups]


def per_group(columnwise, scheme):
    """[rows, groups]: sums over the columns of each group."""
    groups = scheme.trivial_group_index(columnwise.shape[1]).long()
    return columnwise.double() @ torch.nn.functional.one_hot(groups).double()


def cost(weight, importance, scales, zeros, scheme):
    """[rows, groups] float64: the weighted squared error of plain rounding."""
    return per_group(importance * (restored(weight, scales, zeros, scheme) - weight.double()).square(), scheme)


def schemes(*group_sizes: int) -> list[Scheme]:
    return [Scheme(bits, size, symmetric) for bits in BITS for size in group_sizes for symmetric in (True, False)]


# Full range


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_has_a_code_of_its_own_whatever_its_sign(bits, sign):
    """It sits on the longer side of the grid, -2^(bits-1), so it comes back as exactly as its scale is stored."""
    weight = weights(columns=32).clamp(-0.2, 0.2)
    weight[:, 5] = sign * 0.7
    scales, zeros = search(weight, None, Scheme(bits, 32), candidates=1)
    assert (scales.sign() == -sign).all()
    back = restored(weight, scales, zeros, Scheme(bits, 32))[:, 5]
    assert ((back - sign * 0.7).abs() <= (HALF_UNIT + 2.0**-23) * 0.7).all()  # 0.7 is not a float32 either


@pytest.mark.parametrize("candidates", [1, MANY])
def test_scales_of_both_signs_appear(candidates):
    scales, _ = search(weights(), energies(), Scheme(4, 32), candidates)
    assert 0.3 < (scales > 0).float().mean() < 0.7


@pytest.mark.parametrize("bits", BITS)
def test_turning_all_weights_around_turns_the_scales_around(bits):
    weight = weights()
    scales, zeros = search(weight, energies(), Scheme(bits, 32), MANY)
    turned, same = search(-weight, energies(), Scheme(bits, 32), MANY)
    assert torch.equal(turned, -scales) and torch.equal(same, zeros)


@pytest.mark.parametrize("bits", BITS)
def test_both_extremes_of_an_asymmetric_group_are_in_reach(bits):
    """Without a search, the error of each is what rounding the zero point costs, half a step, and the scale's own."""
    weight, scheme = weights(), Scheme(bits, 32, symmetric=False)
    scales, zeros = search(weight, None, scheme, candidates=1)
    miss = (restored(weight, scales, zeros, scheme) - weight.double()).abs().reshape(40, 3, 32).amax(-1)
    reach = weight.reshape(40, 3, 32).abs().amax(-1)
    assert (miss <= 0.5 * scales + (2**bits * HALF_UNIT) * scales + HALF_UNIT * reach).all()


# The search


@pytest.mark.parametrize("scheme", schemes(-1, 8, 32, 40), ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_no_group_is_worse_than_on_its_extremes(scheme, weighted):
    """The extremes are the first candidate; what is better by less than rounding may turn out to be worse."""
    weight, importance = weights(), energies() if weighted else None
    counted = importance if weighted else torch.ones(96)
    searched = cost(weight, counted, *search(weight, importance, scheme, MANY), scheme)
    extremes = cost(weight, counted, *search(weight, None, scheme, candidates=1), scheme)
    # A float16 step is off by up to its half unit, which moves every weight by that share of itself; and the cost is
    # the difference of float32 sums that are as large as the energy of the weights: some eight roundings.
    rounding = (HALF_UNIT**2 + 8 * 2.0**-24) * per_group(counted * weight.square(), scheme)
    assert (searched <= extremes + rounding).all()
    assert searched.sum() < (0.99 if scheme.bits == 8 else 0.97) * extremes.sum()


def best_of_every_scale(weight, importance, scheme):
    """[rows, groups] float64: the lowest cost over a thousand scales of either sign and, if asymmetric, every zero."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % scheme.group_size)).double()
    groups = groups.reshape(len(weight), -1, scheme.group_size)
    energy = torch.nn.functional.pad(importance, (0, -weight.shape[1] % scheme.group_size)).double()
    energy = energy.reshape(-1, scheme.group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    span = groups.amax(-1, keepdim=True).clamp_min(0) - groups.amin(-1, keepdim=True).clamp_max(0)
    lowest = torch.full(groups.shape[:2], torch.inf, dtype=torch.float64)
    zeros = [scheme.midpoint] if scheme.symmetric else range(scheme.max_code + 1)
    for share in torch.linspace(0.2, 1.3, 400).tolist():
        for sign in (1, -1) if scheme.symmetric else (1,):
            scale = sign * share * (largest / scheme.midpoint if scheme.symmetric else span / scheme.max_code)
            for zero in zeros:
                steps = (groups / scale).round().clamp(-zero, scheme.max_code - zero)
                lowest = lowest.minimum((energy * (groups - steps * scale).square()).sum(-1))
    return lowest


@pytest.mark.parametrize("scheme", [s for s in schemes(32, 40) if s.bits < 8], ids=str)
def test_trying_every_scale_would_gain_little(scheme):
    """Half of the groups have the best grid there is, and all together are within a few percent of it.

    What is missing lies outside the range that is searched: a step so large that the extremes are not reached, or a
    zero point that is not where the extremes put it.
    """
    random = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(100, 96, generator=random), torch.randn(96, generator=random).exp()
    found = cost(weight, importance, *search(weight, importance, scheme, MANY), scheme)
    best = best_of_every_scale(weight, importance, scheme)
    assert (found / best).median() <= 1.001
    assert found.sum() <= (1.03 if scheme.symmetric else 1.08) * best.sum()


def test_the_error_moves_to_where_no_input_feels_it():
    weight, importance, scheme = weights(), torch.ones(96), Scheme(3, 32)
    importance[::2] = 1e-4
    careful, plain = (search(weight, each, scheme, MANY) for each in (importance, None))
    felt = [cost(weight, importance, *found, scheme).sum() for found in (careful, plain)]
    unfelt = [cost(weight, torch.ones(96), *found, scheme).sum() for found in (careful, plain)]
    assert felt[0] < 0.9 * felt[1] and unfelt[0] > unfelt[1]


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-50, 2.0**50, 2.0**100])
def test_only_the_proportions_of_the_energy_count(factor):
    weight, importance = weights(), energies()
    expected = search(weight, importance, Scheme(4, 32), MANY)
    assert all(torch.equal(a, b) for a, b in zip(search(weight, importance * factor, Scheme(4, 32), MANY), expected))


def test_a_group_that_no_input_reaches_is_searched_as_if_all_columns_counted():
    weight, importance = weights(), energies()
    importance[32:64] = 0
    scales, zeros = search(weight, importance, Scheme(4, 32, symmetric=False), MANY)
    plain_scales, plain_zeros = search(weight, None, Scheme(4, 32, symmetric=False), MANY)
    assert torch.equal(scales[:, 1], plain_scales[:, 1]) and torch.equal(zeros[:, 1], plain_zeros[:, 1])
    assert not torch.equal(scales[:, 0], plain_scales[:, 0])


# What is returned


@pytest.mark.parametrize("scheme", schemes(-1, 8, 32, 40), ids=str)
@pytest.mark.parametrize("candidates", [1, 2, MANY])
def test_scales_and_zeros_can_be_stored(scheme, candidates):
    scales, zeros = search(weights(), energies(), scheme, candidates)
    assert scales.shape == zeros.shape == (40, scheme.groups(96))
    assert scales.dtype == torch.float16 and zeros.dtype == torch.uint8
    assert torch.isfinite(scales).all() and (scales != 0).all()
    if scheme.symmetric:
        assert (zeros == scheme.midpoint).all()
    else:
        assert (scales > 0).all() and zeros.max() <= scheme.max_code and len(zeros.unique()) > 1


@pytest.mark.parametrize("scheme", schemes(8, 40), ids=str)
def test_rows_are_searched_by_themselves(monkeypatch, scheme):
    weight, importance = weights(), energies()
    expected = search(weight, importance, scheme, MANY)
    monkeypatch.setattr(grid, "ROWS", 7)
    assert all(torch.equal(a, b) for a, b in zip(search(weight, importance, scheme, MANY), expected))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_ragged_group_is_what_it_is_alone(symmetric, weighted):
    """The last 16 of 96 columns: no padding shows."""
    weight, importance = weights(), energies() if weighted else None
    scales, zeros = search(weight, importance, Scheme(4, 40, symmetric), MANY)
    tail = None if importance is None else importance[80:]
    alone = search(weight[:, 80:], tail, Scheme(4, -1, symmetric), MANY)
    # Padding changes the order of float32 sums, and with it the last bit of a float16 scale at most.
    torch.testing.assert_close(scales[:, 2:], alone[0], rtol=2 * HALF_UNIT, atol=0)
    assert torch.equal(zeros[:, 2:], alone[1])


@pytest.mark.parametrize("candidates", [1, MANY])
@pytest.mark.parametrize("scheme", schemes(32), ids=str)
def test_a_group_of_zeros_stays_zero_on_the_smallest_scale(scheme, candidates):
    weight = weights()
    weight[:, 32:64] = 0
    scales, zeros = search(weight, energies(), scheme, candidates)
    assert (scales[:, 1].abs() == TINY).all()
    assert (restored(weight, scales, zeros, scheme)[:, 32:64] == 0).all()


@pytest.mark.parametrize("candidates", [1, MANY])
@pytest.mark.parametrize("value", [0.3, -0.3])
@pytest.mark.parametrize("scheme", schemes(32), ids=str)
def test_a_constant_group_is_as_exact_as_its_scale(scheme, value, candidates):
    weight = torch.full((2, 32), value)
    back = restored(weight, *search(weight, energies(32), scheme, candidates), scheme)
    assert ((back - value).abs() <= (HALF_UNIT + 2.0**-23) * abs(value)).all()


@pytest.mark.parametrize("candidates", [1, MANY])
@pytest.mark.parametrize("scheme", schemes(32), ids=str)
def test_weights_below_the_smallest_float16_are_rounded_to_it(scheme, candidates):
    """2^-24 is about 6e-8: weights of 1e-8 are nearest to zero, and no scale vanishes."""
    weight = 1e-8 * weights().sign()
    scales, zeros = search(weight, energies(), scheme, candidates)
    assert (scales.abs() == TINY).all()
    assert (restored(weight, scales, zeros, scheme) == 0).all()


@pytest.mark.parametrize("candidates", [1, MANY])
@pytest.mark.parametrize("size", [1e9, 1e30, 3e38])
@pytest.mark.parametrize("scheme", schemes(32), ids=str)
def test_weights_beyond_every_float16_scale_are_refused(scheme, size, candidates):
    """Even at 3e38, where the products of the search overflow: what cannot be judged is not passed on."""
    weight, importance = weights(), energies()
    weight[7, 40], importance[40] = size, importance.max()
    with pytest.raises(NumericsError, match=r"beyond float16 \(65504\)"):
        search(weight, importance, scheme, candidates)


def test_the_largest_scale_that_fits_is_used():
    weight = torch.zeros(1, 32)
    weight[0, 0] = 8 * LARGEST
    scales, _ = search(weight, None, Scheme(4, 32), candidates=1)
    assert scales.item() == -LARGEST


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_numbers_are_refused(value):
    weight = weights()
    weight[39, 95] = value
    with pytest.raises(NumericsError, match="the weights of this layer hold NaN or Inf"):
        search(weight, energies(), Scheme(4, 32))


# Plain rounding


def test_encode_rounds_to_the_nearest_code_and_stays_inside_the_grid():
    scales, zeros = torch.tensor([[0.5, -0.25]]).half(), torch.tensor([[8, 3]]).to(torch.uint8)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    weight = torch.tensor([[0.0, 0.74, -0.76, 100.0, 0.0, 0.25, -0.75, 100.0]])
    codes = encode(weight, scales, zeros, groups, Scheme(4, 8))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[8, 9, 6, 15, 3, 2, 6, 0]]


@pytest.mark.parametrize("scheme", schemes(32), ids=str)
def test_no_other_code_is_nearer(scheme):
    weight, groups = weights(8), scheme.trivial_group_index(96).long()
    scales, zeros = search(weight, energies(), scheme, MANY)
    codes = encode(weight, scales, zeros, groups, scheme).double()
    scale, zero = scales.double()[:, groups], zeros.double()[:, groups]
    every = torch.arange(scheme.max_code + 1).double()
    nearest = ((every[:, None, None] - zero) * scale - weight.double()).abs().amin(0)
    chosen = ((codes - zero) * scale - weight.double()).abs()
    assert (chosen <= nearest + 2.0**-23 * weight.abs()).all()  # a tie, as float32 sees it


@pytest.mark.parametrize("scheme", schemes(-1, 32, 40), ids=str)
def test_what_was_rounded_is_rounded_to_itself(scheme):
    weight, groups = weights(), scheme.trivial_group_index(96).long()
    scales, zeros = search(weight, energies(), scheme, MANY)
    codes = encode(weight, scales, zeros, groups, scheme)
    back = restored(weight, scales, zeros, scheme).float()
    assert torch.equal(encode(back, scales, zeros, groups, scheme), codes)
