"""What a layer is stored as: schemes, recipes, and the definition of a quantized weight."""

import dataclasses
import re
from dataclasses import replace

import pytest
import torch

from wellrounded.core.recipe import Recipe, Rule
from wellrounded.core.scheme import BITS, Scheme, default_group_size
from wellrounded.core.weight import QuantizedWeight
from wellrounded.errors import UsageError

# Scheme


@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4", None])
def test_other_widths_are_refused_with_those_there_are(bits):
    with pytest.raises(UsageError, match=re.escape(f"bits={bits!r} was asked for; the GPTQ format holds 2, 3, 4 or 8")):
        Scheme(bits=bits)


@pytest.mark.parametrize("group_size", [0, -2, 4, 12, 100])
def test_other_group_sizes_are_refused_with_what_to_use(group_size):
    with pytest.raises(UsageError, match=rf"group_size={group_size} was asked for; use -1 .* or a multiple of 8"):
        Scheme(group_size=group_size)


@pytest.mark.parametrize("group_size", [-1, 8, 24, 128, 4096])
@pytest.mark.parametrize("bits", BITS)
def test_every_width_goes_with_every_group_of_eights(bits, group_size):
    assert Scheme(bits, group_size).group_size == group_size


def test_a_scheme_is_a_value():
    assert Scheme(4, 64) == Scheme(4, 64) and len({Scheme(4, 64), Scheme(4, 64), Scheme(4, 64, False)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme().bits = 3


@pytest.mark.parametrize(("bits", "largest", "middle"), [(2, 3, 2), (3, 7, 4), (4, 15, 8), (8, 255, 128)])
def test_codes_fill_their_bits_and_symmetric_zeros_sit_in_the_middle(bits, largest, middle):
    assert Scheme(bits).max_code == largest and Scheme(bits).midpoint == middle


@pytest.mark.parametrize(
    ("group_size", "inputs", "width", "groups"),
    [(-1, 576, 576, 1), (64, 576, 64, 9), (128, 576, 128, 5), (128, 64, 128, 1), (8, 8, 8, 1)],
)
def test_groups_are_counted_up(group_size, inputs, width, groups):
    scheme = Scheme(4, group_size)
    assert scheme.columns_per_group(inputs) == width and scheme.groups(inputs) == groups
    index = scheme.trivial_group_index(inputs)
    assert index.dtype == torch.int32 and index.tolist() == [j // width for j in range(inputs)]


@pytest.mark.parametrize(
    ("scheme", "inputs", "expected"),
    [
        (Scheme(4, 128), 4096, 4 + 20 / 128),
        (Scheme(4, 64), 4096, 4.3125),
        (Scheme(3, 128), 4096, 3 + 19 / 128),
        (Scheme(2, 64), 4096, 2.28125),
        (Scheme(8, -1), 1024, 8 + 24 / 1024),
        (Scheme(4, 128), 576, 4 + 5 * 20 / 576),  # a ragged group costs as much as a whole one
    ],
)
def test_bits_per_weight_count_scales_and_zeros(scheme, inputs, expected):
    assert scheme.bits_per_weight(inputs) == expected


@pytest.mark.parametrize(("bits", "unit"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_a_shape_is_refused_when_codes_do_not_fill_words(bits, unit):
    scheme = Scheme(bits, 64)
    assert scheme.refuses(5 * unit, 3 * unit) is None
    why = scheme.refuses(5 * unit + 2, 3 * unit)
    assert why == f"{bits}-bit packing needs inputs in multiples of {unit}, this layer has {5 * unit + 2}"
    why = scheme.refuses(5 * unit, 3 * unit + 2)
    assert why == f"{bits}-bit packing needs outputs in multiples of {unit}, this layer has {3 * unit + 2}"


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme(), "4-bit g128 sym"),
        (Scheme(3, -1, symmetric=False), "3-bit channel asym"),
        (Scheme(8, 32, act_order=True), "8-bit g32 sym act-order"),
    ],
)
def test_a_scheme_prints_as_people_say_it(scheme, text):
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("inputs", "size"),
    [([4096, 11008], 128), ([576, 1536], 64), ([4096, 96], 32), ([100], 32), ([128], 128)],
)
def test_the_default_group_divides_every_layer_or_is_32(inputs, size):
    assert default_group_size(inputs) == size


# Recipe


def test_the_first_rule_that_matches_wins():
    eight, three = Scheme(8), Scheme(3)
    recipe = Recipe(Scheme(4), (Rule(r".*layers\.0\.", eight), Rule(r".*down_proj", three), Rule(r".*layers", None)))
    assert recipe.scheme_of("model.layers.0.mlp.down_proj") == eight
    assert recipe.scheme_of("model.layers.1.mlp.down_proj") == three
    assert recipe.scheme_of("model.layers.1.mlp.up_proj") is None
    assert recipe.scheme_of("lm_head") == Scheme(4)


def test_a_rule_matches_from_the_start_of_the_name():
    recipe = Recipe(Scheme(), (Rule("mlp", None),))
    assert recipe.scheme_of("mlp.up_proj") is None
    assert recipe.scheme_of("layers.0.mlp.up_proj") == Scheme()


def test_ignored_layers_are_found_anywhere_in_the_name():
    recipe = Recipe.of(Scheme(), ["down_proj", r"layers\.0\.", "^head|tail$"])
    for name in ("a.down_proj", "down_proj", "model.layers.0.q_proj", "head.x", "x.tail"):
        assert recipe.scheme_of(name) is None
    for name in ("model.layers.10.q_proj", "x.head", "tail.x", "layersx0.q"):
        assert recipe.scheme_of(name) == Scheme()
    assert Recipe.of(Scheme(), []) == Recipe(Scheme())


@pytest.mark.parametrize("pattern", ["(", "[a", "*x"])
def test_a_pattern_that_is_not_a_regular_expression_is_refused(pattern):
    with pytest.raises(UsageError, match=f"pattern {re.escape(repr(pattern))} is not a regular expression: .+"):
        Rule(pattern, None)
    with pytest.raises(UsageError, match="is not a regular expression"):
        Recipe.of(Scheme(), [pattern])


# QuantizedWeight


def make(scheme: Scheme, rows: int = 6, columns: int = 80, seed: int = 0) -> QuantizedWeight:
    """Scales of both signs, columns of the groups in a random order."""
    random = torch.Generator().manual_seed(seed)
    grid = (rows, scheme.groups(columns))
    return QuantizedWeight(
        codes=torch.randint(scheme.max_code + 1, (rows, columns), generator=random).to(torch.uint8),
        scales=torch.randn(grid, generator=random).half(),
        zeros=torch.randint(scheme.max_code + 1, grid, generator=random).to(torch.uint8),
        group_index=scheme.trivial_group_index(columns)[torch.randperm(columns, generator=random)],
        scheme=scheme,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 16, 32])
def test_dequantize_is_the_formula(bits, group_size):
    """Every number of Python's is exact here: 11 bits of scale times 9 of a step fit a float32, and a float64."""
    weight = make(Scheme(bits, group_size, symmetric=False))
    codes, scales, zeros = weight.codes.tolist(), weight.scales.tolist(), weight.zeros.tolist()
    expected = [
        [scales[r][g] * (codes[r][j] - zeros[r][g]) for j, g in enumerate(weight.group_index.tolist())]
        for r in range(6)
    ]
    dense = weight.dequantize()
    assert dense.dtype == torch.float32 and dense.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantize_rounds_once(dtype):
    weight = make(Scheme(8, 16, symmetric=False))
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


@pytest.mark.parametrize("field", ["scales", "zeros"])
@pytest.mark.parametrize("shape", [(6, 4), (5, 5), (5, 6)])
def test_scales_and_zeros_must_have_one_value_per_row_and_group(field, shape):
    weight = make(Scheme(4, 16))
    with pytest.raises(ValueError, match=r"must be \(6, 5\)") as caught:
        replace(weight, **{field: getattr(weight, field).new_zeros(shape)})
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("length", [79, 81])
def test_the_group_index_must_have_one_value_per_column(length):
    with pytest.raises(ValueError, match=rf"group_index \({length},\) must be \(80,\)"):
        replace(make(Scheme(4, 16)), group_index=torch.zeros(length, dtype=torch.int32))


def test_it_knows_whether_its_index_may_be_ignored():
    mixed = make(Scheme(4, 32))
    trivial = replace(mixed, group_index=mixed.scheme.trivial_group_index(80))
    uneven = replace(mixed, group_index=torch.zeros(80, dtype=torch.int32))
    assert [each.trivially_grouped for each in (trivial, mixed, uneven)] == [True, False, False]
    assert [each.evenly_grouped for each in (trivial, mixed, uneven)] == [True, True, False]
    assert trivial.shape == (6, 80)


def test_pieces_are_the_rows_they_were_cut_from():
    weight = make(Scheme(4, 32))
    pieces = weight.split([1, 2, 3])
    assert [piece.shape for piece in pieces] == [(1, 80), (2, 80), (3, 80)]
    assert torch.equal(torch.cat([piece.dequantize() for piece in pieces]), weight.dequantize())
    assert all(torch.equal(piece.group_index, weight.group_index) for piece in pieces)


@pytest.mark.parametrize("rows", [[1, 2], [4, 4]])
def test_pieces_must_add_up_to_the_whole(rows):
    with pytest.raises((RuntimeError, ValueError)):
        make(Scheme(4, 32)).split(rows)
