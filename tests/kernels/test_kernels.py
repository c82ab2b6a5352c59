"""Every kernel against the dequantized weight in float64; what a kernel does not do, it says in a sentence."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from wellrounded import kernels
from wellrounded.core.scheme import BITS, Scheme
from wellrounded.core.weight import QuantizedWeight
from wellrounded.errors import UsageError
from wellrounded.kernels import Need, reference, torch_int4

KERNELS = [kernel for kernel in kernels.table() if kernel.NAME != "triton"]  # that one is in test_triton.py
NAMES = [kernel.NAME for kernel in KERNELS]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [1, 3, 24, 25, 100]
OUT, IN = 48, 768  # every group size below divides the inputs

needs_int4 = pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"), reason="this torch has no int4 kernel for CPUs"
)


def make(scheme: Scheme, rows: int = OUT, columns: int = IN, seed: int = 0) -> QuantizedWeight:
    """Scales of both signs, any zero point unless symmetric, columns of the groups in a random order if act_order."""
    random = torch.Generator().manual_seed(seed)
    grid = (rows, scheme.groups(columns))
    index = scheme.trivial_group_index(columns)
    zeros = torch.randint(scheme.max_code + 1, grid, generator=random).to(torch.uint8)
    return QuantizedWeight(
        codes=torch.randint(scheme.max_code + 1, (rows, columns), generator=random).to(torch.uint8),
        scales=(torch.randn(grid, generator=random) * 0.1 / scheme.midpoint).half(),
        zeros=torch.full_like(zeros, scheme.midpoint) if scheme.symmetric else zeros,
        group_index=index[torch.randperm(columns, generator=random)] if scheme.act_order else index,
        scheme=scheme,
    )


def need_of(weight: QuantizedWeight, dtype: torch.dtype) -> Need:
    return Need(weight.scheme, weight.shape[1], weight.shape[0], "cpu", dtype, weight.evenly_grouped)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matmul_of(kernel, weight: QuantizedWeight, dtype: torch.dtype):
    """What multiplies by `weight`, prepared for inputs of `dtype`."""
    prepared = kernel.prepare(weight, need_of(weight, dtype))
    return lambda x: kernel.matmul(x, prepared, weight.dequantize)


def assert_is_product(y: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight) -> None:
    """`y` is x W^T up to what a kernel may round when it computes in the dtype of x, u being that dtype's half unit:

    - the scale of a group, and the offset scale * (midpoint - zero): off by u for all its columns together, so what
      the group contributes is off by u, whichever the signs (a sum over groups, which is the worst case);
    - each dequantized weight: off by u on its own. Errors of either sign that do not know each other add up like a
      random walk: the root of the sum of squares, each at most u / sqrt(3) in the mean. Six times that;
    - partial sums, kept in float32: one of its half units for each column, in the worst case;
    - the result: off by u.
    """
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    u, middle, groups = torch.finfo(x.dtype).eps / 2, weight.scheme.midpoint, weight.group_index.long()
    x, y = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, weight.shape[0]).double()
    scale = weight.scales.double()[:, groups]
    steps, offsets = (weight.codes.double() - middle) * scale, (middle - weight.zeros.double()[:, groups]) * scale
    dense = steps + offsets
    exact = x @ dense.T
    shared = sum(
        (x[:, mine] @ part[:, mine].T).abs() for mine in groups == groups.unique()[:, None] for part in (steps, offsets)
    )
    alone = 6 / 3**0.5 * (x.square() @ dense.square().T).sqrt()
    summed = x.shape[1] * 2.0**-24 * (x.abs() @ (steps.abs() + offsets.abs()).T)
    assert ((y - exact).abs() <= u * (shared + alone + exact.abs()) + summed).all()


# Every kernel computes the definition, or says why not


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 192, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_a_kernel_multiplies_by_the_dequantized_weight(kernel, act_order, symmetric, bits, group_size, dtype):
    weight = make(Scheme(bits, group_size, symmetric, act_order))
    if reason := kernel.refuses(need_of(weight, dtype)):
        pytest.skip(reason)
    matmul = matmul_of(kernel, weight, dtype)
    for rows in ROWS:
        x = inputs(rows, IN, dtype=dtype)
        assert_is_product(matmul(x), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("group_size", "outputs", "columns"),
    [(128, 48, 576), (96, 48, 128), (32, 40, 96), (8, 48, 96), (24, 48, 96), (-1, 16, 40), (1024, 16, 64)],
)
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_odd_shapes_are_computed_or_refused(kernel, group_size, outputs, columns, bits, dtype):
    """Ragged last groups, groups and sizes that no fast kernel likes."""
    weight = make(Scheme(bits, group_size, symmetric=False), outputs, columns)
    need = need_of(weight, dtype)
    if kernel.refuses(need) is not None:
        pytest.skip(kernel.refuses(need))
    for rows in (1, 30):
        x = inputs(rows, columns, dtype=dtype)
        assert_is_product(matmul_of(kernel, weight, x.dtype)(x), x, weight)


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_groups_of_unequal_size_are_computed_or_refused(kernel):
    """A file may say so: here the first group has all columns but one of each other group."""
    weight = make(Scheme(4, 32, act_order=True))
    index = torch.zeros(IN, dtype=torch.int32)
    index[:24] = torch.arange(24, dtype=torch.int32)
    weight = replace(weight, group_index=index)
    need = need_of(weight, torch.float32)
    if kernel.refuses(need) is not None:
        pytest.skip(kernel.refuses(need))
    x = inputs(3, IN)
    assert_is_product(matmul_of(kernel, weight, x.dtype)(x), x, weight)


@pytest.fixture(params=[Scheme(4, 64), Scheme(3, 64, symmetric=False, act_order=True)], ids=str)
def served(request):
    """(kernel, weight) pairs in bfloat16 that are not refused."""
    weight = make(request.param)
    return [(kernel, weight) for kernel in KERNELS if kernel.refuses(need_of(weight, torch.bfloat16)) is None]


@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3), (5, 7), (2, 2, 2)])
def test_leading_dimensions_are_kept(served, shape):
    for kernel, weight in served:
        x = inputs(*shape, IN, dtype=torch.bfloat16)
        y = matmul_of(kernel, weight, x.dtype)(x)
        assert_is_product(y, x, weight)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_nothing_in_gives_nothing_out(served, shape):
    """An expert that no token was sent to."""
    for kernel, weight in served:
        x = inputs(*shape, IN, dtype=torch.bfloat16)
        y = matmul_of(kernel, weight, x.dtype)(x)
        assert y.shape == (*shape, OUT) and y.dtype == torch.bfloat16


def test_strided_inputs_are_read_as_they_are(served):
    for kernel, weight in served:
        matmul = matmul_of(kernel, weight, torch.bfloat16)
        x = inputs(4, 2, IN, dtype=torch.bfloat16).transpose(0, 1)
        assert not x.is_contiguous()
        assert_is_product(matmul(x), x, weight)
        assert_is_product(matmul(x[:, ::2]), x[:, ::2], weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_another_dtype_than_was_prepared_for_are_computed_in_theirs(served, dtype):
    for kernel, weight in served:
        x = inputs(2, IN, dtype=dtype)
        assert_is_product(matmul_of(kernel, weight, torch.bfloat16)(x), x, weight)


def test_a_kernel_leaves_the_weight_alone(served):
    for kernel, weight in served:
        before = [getattr(weight, field).clone() for field in ("codes", "scales", "zeros", "group_index")]
        matmul_of(kernel, weight, torch.bfloat16)(inputs(2, IN).bfloat16())
        after = [getattr(weight, field) for field in ("codes", "scales", "zeros", "group_index")]
        assert all(torch.equal(a, b) for a, b in zip(before, after))


# Refusals


NEEDS = [
    Need(Scheme(8, 64), 768, 48, "cpu", torch.bfloat16),
    Need(Scheme(4, 64), 768, 40, "cpu", torch.bfloat16),
    Need(Scheme(4, 64), 800, 48, "cpu", torch.bfloat16),
    Need(Scheme(4, 24), 768, 48, "cpu", torch.bfloat16),
    Need(Scheme(4, -1), 100, 48, "cpu", torch.bfloat16),
    Need(Scheme(4, 64), 768, 48, "cpu", torch.float64),
    Need(Scheme(4, 64), 768, 48, "meta", torch.bfloat16),
    Need(Scheme(4, 64, act_order=True), 768, 48, "cpu", torch.bfloat16, even=False),
]


def is_sentence(reason: str) -> bool:
    """Fits after "but" and before a semicolon: several words, no capital in front, no full stop."""
    return len(reason.split()) >= 5 and reason[0].islower() and reason == reason.strip() and reason[-1] not in ".;,"


@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_a_refusal_is_a_sentence(kernel, need):
    reason = kernel.refuses(need)
    assert reason is None or is_sentence(reason), reason


@needs_int4
@pytest.mark.parametrize(
    ("need", "part"),
    zip(NEEDS, ["at most 4 bits, the layer has 8", "outputs in multiples of 16, the layer has 40", "800 inputs",
                "groups of 24", "100 inputs", "not torch.float64", "the layer is on meta", "groups of equal size"]),
)  # fmt: skip
def test_the_int4_kernel_names_what_stands_in_the_way(need, part):
    assert part in torch_int4.refuses(need)


@needs_int4
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_int4_kernel_takes_what_it_was_written_for(bits, group_size, dtype):
    for act_order in (True, False):
        assert torch_int4.refuses(Need(Scheme(bits, group_size, False, act_order), IN, OUT, "cpu", dtype)) is None


def test_the_int4_kernel_says_when_torch_is_too_old(monkeypatch):
    monkeypatch.setattr(torch_int4.torch.ops, "aten", SimpleNamespace())
    reason = torch_int4.refuses(Need(Scheme(4, 64), IN, OUT, "cpu", torch.bfloat16))
    assert is_sentence(reason) and torch.__version__ in reason


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_the_reference_never_refuses_and_comes_last(need):
    assert reference.refuses(need) is None
    assert kernels.table()[-1] is reference


# The choice


def fake(name: str, reason: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(NAME=name, refuses=lambda need: reason, prepare=None)


@pytest.fixture
def three(monkeypatch):
    """A table of three, of which the first one refuses."""
    listed = [fake("first", "it is never in the mood"), fake("second"), fake("third")]
    monkeypatch.setattr(kernels, "table", lambda: listed)
    return listed


def test_the_first_that_does_not_refuse_is_taken(three):
    assert kernels.select(NEEDS[0]) is three[1]


def test_a_named_kernel_is_taken_even_if_another_is_preferred(three):
    assert kernels.select(NEEDS[0], "third") is three[2]


def test_a_named_kernel_that_refuses_raises_its_sentence(three):
    with pytest.raises(UsageError, match="kernel 'first' was asked for, but it is never in the mood; leave"):
        kernels.select(NEEDS[0], "first")


def test_a_real_refusal_is_raised_whole():
    need = NEEDS[0]
    with pytest.raises(UsageError, match=re.escape(torch_int4.refuses(need))):
        kernels.select(need, torch_int4.NAME)


def test_an_unknown_name_lists_the_names(three):
    with pytest.raises(UsageError, match="no kernel is called 'fourth'; there are first, second, third"):
        kernels.select(NEEDS[0], "fourth")


def test_every_kernel_explains_itself_in_the_order_of_preference(three):
    assert kernels.explain(NEEDS[0]) == [("first", "it is never in the mood"), ("second", None), ("third", None)]


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)
