"""The GPTQ tensors: golden words, exact round trips, and errors that name the tensor."""

import re
from dataclasses import replace

import pytest
import torch

from wellrounded.core.scheme import BITS, Scheme
from wellrounded.core.weight import QuantizedWeight
from wellrounded.errors import CheckpointError, UsageError
from wellrounded.formats.gptq import from_tensors, layout, to_tensors

NAME = "model.layers.3.mlp.down_proj"
PLAIN = Scheme(bits=4, group_size=32)


def make(scheme: Scheme, rows: int = 32, columns: int = 96, lowest_zero: int = 0, seed: int = 0) -> QuantizedWeight:
    """A random weight: scales of both signs, any zero from `lowest_zero` up unless symmetric."""
    random = torch.Generator().manual_seed(seed)
    grid = (rows, scheme.groups(columns))
    index = scheme.trivial_group_index(columns)
    zeros = torch.randint(lowest_zero, scheme.max_code + 1, grid, generator=random).to(torch.uint8)
    return QuantizedWeight(
        codes=torch.randint(scheme.max_code + 1, (rows, columns), dtype=torch.uint8, generator=random),
        scales=torch.randn(grid, generator=random).half(),
        zeros=torch.full_like(zeros, scheme.midpoint) if scheme.symmetric else zeros,
        group_index=index[torch.randperm(columns, generator=random)] if scheme.act_order else index,
        scheme=scheme,
    )


def stored() -> dict[str, torch.Tensor]:
    """A plain layer as in a file, to be damaged."""
    return {key: tensor.clone() for key, tensor in to_tensors(make(PLAIN), "gptq").items()}


def read(tensors, scheme: Scheme, version: str = "gptq", rows: int = 32, columns: int = 96) -> QuantizedWeight:
    return from_tensors(tensors, scheme, columns, rows, version, NAME)


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    for field in ("codes", "scales", "zeros", "group_index"):
        left, right = getattr(one, field), getattr(other, field)
        assert left.dtype == right.dtype and torch.equal(left, right), field
        assert right.is_contiguous(), field
    assert one.scheme == other.scheme


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 40])  # 96 columns: one group, three whole ones, a ragged last one
@pytest.mark.parametrize("act_order", [True, False])
def test_what_is_written_is_read_back_exactly(bits, version, symmetric, group_size, act_order):
    scheme = Scheme(bits, group_size, symmetric, act_order)
    weight = make(scheme, lowest_zero=1 if version == "gptq" else 0)
    tensors = to_tensors(weight, version)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == layout(scheme, 96, 32)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(weight, read(tensors, scheme, version))


def test_the_layout_rounds_groups_up():
    assert layout(Scheme(bits=4, group_size=128), 576, 1536) == {
        "qweight": ((72, 1536), torch.int32),
        "qzeros": ((5, 192), torch.int32),
        "scales": ((5, 1536), torch.float16),
        "g_idx": ((576,), torch.int32),
    }
    assert layout(Scheme(bits=3, group_size=-1), 64, 32)["qweight"] == ((6, 32), torch.int32)
    assert layout(Scheme(bits=3, group_size=-1), 64, 32)["qzeros"] == ((1, 3), torch.int32)


@pytest.mark.parametrize(
    ("bits", "version", "words"),
    [
        (2, "gptq", ["55555555"]),  # 2 - 1 = 01
        (3, "gptq", ["db6db6db", "b6db6db6", "6db6db6d"]),  # 4 - 1 = 011
        (4, "gptq", ["77777777"]),
        (8, "gptq", ["7f7f7f7f"]),
        (2, "gptq_v2", ["aaaaaaaa"]),  # 10
        (3, "gptq_v2", ["24924924", "49249249", "92492492"]),  # 100
        (4, "gptq_v2", ["88888888"]),
        (8, "gptq_v2", ["80808080"]),
    ],
)
def test_symmetric_zeros_are_a_constant_pattern(bits, version, words):
    qzeros = to_tensors(make(Scheme(bits, 32)), version)["qzeros"]
    assert [f"{word & 0xFFFFFFFF:08x}" for word in qzeros[0, : len(words)].tolist()] == words


def test_inputs_run_down_the_words_and_outputs_across():
    weight = make(Scheme(bits=4, group_size=-1, symmetric=False), rows=8, columns=8)
    weight.codes[:] = 0
    weight.codes[2] = torch.arange(8)  # output 2 counts along its inputs
    weight.zeros[:, 0] = torch.arange(1, 9)  # output r has zero point r + 1
    tensors = to_tensors(weight, "gptq")
    assert tensors["qweight"].tolist() == [[0, 0, 0x76543210, 0, 0, 0, 0, 0]]
    assert tensors["qzeros"].tolist() == [[0x76543210]]  # v1: minus one
    assert to_tensors(weight, "gptq_v2")["qzeros"].item() & 0xFFFFFFFF == 0x87654321


def test_the_formula_of_other_readers_gives_the_same_weights():
    """W[k, n] = scales[g_idx[k], n] * (q[k, n] - (stored zero + 1)), every number picked out of its word by hand."""
    weight = make(Scheme(bits=4, group_size=40, symmetric=False, act_order=True), lowest_zero=1)
    stored = {key: tensor.tolist() for key, tensor in to_tensors(weight, "gptq").items()}
    dense = weight.dequantize()
    for k, n in [(0, 0), (7, 31), (8, 1), (50, 17), (95, 31)]:
        group = stored["g_idx"][k]
        code = stored["qweight"][k // 8][n] >> 4 * (k % 8) & 15
        zero = (stored["qzeros"][group][n // 8] >> 4 * (n % 8) & 15) + 1
        assert dense[n, k].item() == stored["scales"][group][n] * (code - zero)


def test_v1_refuses_a_zero_point_of_zero():
    weight = make(Scheme(bits=4, group_size=32, symmetric=False), lowest_zero=1)
    weight.zeros[5, 1] = 0
    with pytest.raises(UsageError, match=r"'gptq' was asked for.* 1 of 96 zero points.*write 'gptq_v2'"):
        to_tensors(weight, "gptq")
    assert_same(weight, read(to_tensors(weight, "gptq_v2"), weight.scheme, "gptq_v2"))


@pytest.mark.parametrize("bits", BITS)
def test_a_wrapped_v1_zero_is_read_as_zero(bits):
    scheme = Scheme(bits, 32, symmetric=False)
    tensors = to_tensors(make(scheme, lowest_zero=1), "gptq")
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    assert (read(tensors, scheme).zeros == 0).all()


def test_g_idx_may_be_missing_without_activation_order():
    tensors = stored()
    del tensors["g_idx"]
    assert_same(make(PLAIN), read(tensors, PLAIN))


def test_a_group_index_that_the_configuration_does_not_mention_is_honoured():
    weight = make(Scheme(bits=4, group_size=32, act_order=True))
    back = read(to_tensors(weight, "gptq"), replace(weight.scheme, act_order=False))
    assert back.scheme.act_order
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_float_types_become_float16(dtype):
    weight = make(PLAIN)
    weight = replace(weight, scales=weight.scales.bfloat16().half())  # exact in all three
    tensors = to_tensors(weight, "gptq")
    tensors["scales"] = tensors["scales"].to(dtype)
    assert_same(weight, read(tensors, weight.scheme))


def test_the_bias_is_left_alone():
    assert_same(make(PLAIN), read({**stored(), "bias": torch.ones(32)}, PLAIN))


def assert_refused(tensors, *parts: str, scheme: Scheme = PLAIN, version: str = "gptq") -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tensors, scheme, version)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_missing_tensor_is_named(key):
    tensors = stored()
    del tensors[key]
    parts = (f"{NAME}.{key} is missing", "expected", "fetch the checkpoint again", '"-:"')
    assert_refused(tensors, *parts, scheme=replace(PLAIN, act_order=True))


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_wrong_shape_is_named(key):
    tensors = stored()
    shape = list(tensors[key].shape)
    tensors[key] = tensors[key][:-1]
    seen = [shape[0] - 1, *shape[1:]]
    assert_refused(tensors, f"{NAME}.{key} is", f"{seen}, expected {_dtype(key)} {shape}", "check bits and group_size")


def _dtype(key: str) -> str:
    return "float16 or bfloat16 or float32" if key == "scales" else "int32"


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("qweight", torch.int64), ("qzeros", torch.float16), ("scales", torch.int32), ("g_idx", torch.uint8)],
)
def test_a_wrong_dtype_is_named(key, dtype):
    tensors = stored()
    tensors[key] = tensors[key].to(dtype)
    seen = str(dtype).removeprefix("torch.")
    assert_refused(tensors, f"{NAME}.{key} is {seen}", f"expected {_dtype(key)}", "check bits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_that_are_not_numbers_are_refused(value, dtype):
    tensors = stored()
    tensors["scales"] = tensors["scales"].to(dtype)
    tensors["scales"][1, 7] = value
    assert_refused(tensors, f"{NAME}.scales is NaN or Inf in 1 of 96 values", "fetch", "quantize")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_beyond_float16_are_refused(dtype):
    tensors = stored()
    tensors["scales"] = tensors["scales"].to(dtype)
    tensors["scales"][0, 0] = -131072.0
    assert_refused(tensors, f"{NAME}.scales is beyond float16 in 1 of 96 values", "131072", "at most 65504", "quantize")


@pytest.mark.parametrize("group", [-1, 3])
def test_a_group_index_out_of_range_is_refused(group):
    tensors = stored()
    tensors["g_idx"][10] = group
    assert_refused(tensors, f"{NAME}.g_idx holds groups", str(group), "expected 0 to 2", "group_size")


@pytest.mark.parametrize(("written", "claimed"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_a_symmetric_file_with_the_wrong_version_in_its_configuration_is_refused(written, claimed):
    tensors = to_tensors(make(PLAIN), written)
    parts = (f"{NAME}.qzeros", f"read as {claimed!r}", "expected 8", f'"checkpoint_format": {written!r}')
    assert_refused(tensors, *parts, version=claimed)


def test_a_symmetric_layer_with_other_zeros_is_refused():
    weight = make(Scheme(bits=4, group_size=32, symmetric=False), lowest_zero=1)
    assert_refused(to_tensors(weight, "gptq"), f"{NAME}.qzeros", "zero points 1 to 15", '"sym": false')


def test_a_shape_that_cannot_be_packed_is_refused_everywhere():
    scheme = Scheme(bits=3, group_size=32)
    with pytest.raises(CheckpointError, match=rf"{re.escape(NAME)}: 3-bit packing needs outputs.*keep it dense"):
        read({}, scheme, rows=40)
    with pytest.raises(UsageError, match=r"outputs in multiples of 32, this layer has 40.*keep this layer dense"):
        layout(scheme, 96, 40)
    with pytest.raises(UsageError, match="inputs in multiples of 32, this layer has 80"):
        to_tensors(make(scheme, columns=80), "gptq")


def test_an_unknown_version_is_refused():
    with pytest.raises(UsageError, match=r"'gptq_v3'.*use 'gptq' or 'gptq_v2'"):
        to_tensors(make(PLAIN), "gptq_v3")
    with pytest.raises(UsageError, match="'marlin'"):
        read(stored(), PLAIN, "marlin")
