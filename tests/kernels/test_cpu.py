"""The native core on every instruction set that this machine has, each forced in turn."""

import pytest
import torch
from test_kernels import assert_is_product, inputs, make, matmul_of, need_of

from wellrounded import native
from wellrounded.core.scheme import BITS, Scheme
from wellrounded.kernels import cpu

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
LEVELS = native.levels()
SHAPES = [(64, 48, 768), (128, 50, 576), (24, 7, 96), (-1, 17, 40), (8, 33, 96), (1024, 16, 64), (96, 1, 128),
          (32, 100, 33)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request):
    """The instruction set in use."""
    core = native.library()
    assert core.wr_use(request.param) == request.param
    yield request.param
    core.wr_use(len(LEVELS))


def restored(weight, dtype: torch.dtype) -> torch.Tensor:
    (block,) = cpu.prepare(weight, need_of(weight, dtype))
    dense = torch.full(weight.shape, torch.nan, dtype=dtype)
    assert native.library().wr_restore(block.data_ptr(), dense.data_ptr(), cpu.DTYPES[dtype], 0, weight.shape[0]) == 0
    return dense


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "outputs", "columns"), SHAPES)
def test_every_shape_is_multiplied_and_restored(level, group_size, outputs, columns, bits, symmetric, act_order):
    """Restored, it is the definition bit by bit; multiplied by, as close to it as the number of roundings allows."""
    weight = make(Scheme(bits, group_size, symmetric, act_order), outputs, columns)
    for dtype in DTYPES:
        assert torch.equal(restored(weight, dtype), weight.dequantize(dtype))
        matmul = matmul_of(cpu, weight, dtype)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
            x = inputs(rows, columns, dtype=dtype)
            assert_is_product(matmul(x), x, weight)


def test_instruction_sets_agree_on_whole_numbers():
    """Where every partial sum is exact there is one right answer."""
    weight = make(Scheme(4, 64), 48, 768)
    weight.scales.fill_(0.5)
    x = torch.randint(-8, 8, (5, 768)).float()
    answers = []
    for level in range(len(LEVELS)):
        native.library().wr_use(level)
        answers.append(matmul_of(cpu, weight, torch.float32)(x))
    native.library().wr_use(len(LEVELS))
    assert all(torch.equal(answer, x @ weight.dequantize().T) for answer in answers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_may_begin_anywhere_in_memory(level, dtype):
    weight = make(Scheme(3, 32, symmetric=False), 40, 96)
    matmul = matmul_of(cpu, weight, dtype)
    memory = inputs(97 * 3, dtype=dtype).flatten()
    for start in (0, 1, 3, 7):
        x = memory[start : start + 2 * 96].view(2, 96)
        assert torch.equal(matmul(x), matmul(x.clone()))


@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0])
def test_large_and_small_inputs_keep_their_size(level, size):
    weight = make(Scheme(4, 64, symmetric=False), 16, 128)
    x = inputs(2, 128) * size
    y = matmul_of(cpu, weight, torch.float32)(x)
    expected = (x.double() @ weight.dequantize().double().T).float()
    assert torch.allclose(y, expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


def test_scales_from_the_smallest_to_the_largest_are_restored(level):
    weight = make(Scheme(4, 32), 16, 64)
    weight.scales.view(-1)[:8] = torch.tensor([6e-8, 6e-5, 65504.0, -65504.0, 0.0, -6e-8, 1.0, -1.0]).half()
    assert torch.equal(restored(weight, torch.float32), weight.dequantize())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_comes_out_as_none(level, value, dtype):
    weight = make(Scheme(4, 64), 16, 128)
    x = inputs(2, 128, dtype=dtype)
    x[1, 5] = value
    y = matmul_of(cpu, weight, dtype)(x)
    assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


def test_one_thread_computes_what_two_do(level):
    weight = make(Scheme(4, 128), 256, 4096)
    matmul, x, threads = matmul_of(cpu, weight, torch.bfloat16), inputs(3, 4096).bfloat16(), torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(matmul(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_what_wr_pack_did_not_make_is_refused():
    core, weight = native.library(), make(Scheme(4, 64), 16, 64)
    (block,) = cpu.prepare(weight, need_of(weight, torch.float32))
    x, y = torch.zeros(16, 64), torch.zeros(16, 64)
    damaged = block.clone()
    damaged[:4] = 0
    assert core.wr_matmul(damaged.data_ptr(), x.data_ptr(), y.data_ptr(), 1, 0) == -1
    assert core.wr_matmul(None, x.data_ptr(), y.data_ptr(), 1, 0) == -1
    assert core.wr_matmul(block.data_ptr(), x.data_ptr(), y.data_ptr(), 1, 7) == -1
    for begin, end in ((1, 16), (0, 15), (0, 17), (16, 16), (-16, 16)):
        assert core.wr_restore(block.data_ptr(), y.data_ptr(), 0, begin, end) == -1
    for numbers in ((0, 64, 4, 1, 64), (16, 0, 4, 1, 64), (16, 64, 5, 1, 64), (16, 64, 4, 65, 1), (16, 64, 4, 1, 65)):
        assert core.wr_bytes(*numbers, 0, 0) == 0
    codes, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.zeros(16, 1).half()
    for wrong in (1, -1):  # a group that is not there
        group = torch.full((64,), wrong, dtype=torch.int32)
        pointers = (codes.data_ptr(), scales.data_ptr(), None, group.data_ptr())
        assert core.wr_pack(block.data_ptr(), 16, 64, 4, 1, 64, *pointers) == -1


def test_the_threads_are_those_of_torch():
    """A second OpenMP runtime in the process would fight torch's for the cores."""
    runtime, threads = native._runtime(), torch.get_num_threads()
    if runtime is None:
        pytest.skip("torch brings no OpenMP runtime that can be borrowed here")
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert runtime.omp_get_max_threads() == count
    finally:
        torch.set_num_threads(threads)
