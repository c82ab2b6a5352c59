"""The native core through its C interface: random layers against float64, nonsense against the error value."""

import faulthandler
import multiprocessing
from array import array
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis.strategies import booleans, builds, composite, integers, none, sampled_from

from wellrounded import native
from wellrounded.core.scheme import BITS
from wellrounded.kernels.cpu import DTYPES

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
CORE = native.library()
FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=100)
CALLS = settings(FUZZ, phases=[Phase.explicit, Phase.generate], max_examples=60)  # smaller failures cost processes
UNITS = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (8, 2)}  # inputs and planes of a unit
MOST = 2**40  # numbers in an array
FAR = integers(-(2**63), 0) | integers(2**41, 2**63 - 1) | integers(41, 62).map(lambda k: 2**k)  # no size at all
SIZE = integers(1, 300) | builds(lambda k, more: 2**k + more, integers(9, 41), integers(-1, 1))
NUMBER = integers(-2, 0) | SIZE | FAR


class Memory:
    """Numbers `skip` of them past a 64-byte boundary, every bit around them set: NaN, or no group.

    What is read beyond their end spoils the result, what is written there shows.
    """

    def __init__(self, numbers: torch.Tensor, skip: int = 0):
        size, count = numbers.dtype.itemsize, numbers.numel()
        whole = torch.full((count * size + 4096,), 255, dtype=torch.uint8)  # room for a whole row of what should not be
        start = -whole.data_ptr() % 64 + 1024 + skip * size
        self.pointer = whole.data_ptr() + start
        self.around = whole[:start], whole[start + count * size :]
        self.numbers = whole[start : start + count * size].view(numbers.dtype).view(numbers.shape)
        self.numbers.copy_(numbers)

    def kept(self) -> bool:
        return all(bool((part == 255).all()) for part in self.around)


def blank(*shape: int, dtype: torch.dtype = torch.float32, skip: int = 0) -> Memory:
    return Memory(torch.full(shape, 255 if dtype == torch.uint8 else torch.nan, dtype=dtype), skip)


def levels():
    """Each instruction set in turn, the best one last, where other tests find it; whether it multiplies bfloat16."""
    zero = Memory(torch.zeros(1))
    for level in range(CORE.wr_best() + 1):
        assert CORE.wr_use(level) == level
        yield CORE.wr_gram(zero.pointer, 1, 1, 1, zero.pointer) == 0


def bytes_of(outputs, inputs, bits, groups, width, has_zeros, has_columns) -> int:
    """What csrc/wellrounded.h says of a block, in numbers that do not overflow; 0 where there is no such layer."""
    if bits not in UNITS or min(outputs, inputs, groups, width) < 1 or max(groups, width) > inputs or inputs >= 2**31:
        return 0
    if groups * width < inputs or outputs * groups * width > MOST:
        return 0
    (unit, planes), tiles = UNITS[bits], -(-outputs // 16)
    width += -width % unit
    listed = bool(has_columns) or groups * width != inputs
    parts = (tiles * groups * 32, tiles * groups * 16 * bool(has_zeros), groups * width * 4 * listed)
    return 128 + sum(part + -part % 64 for part in parts) + tiles * groups * (width // unit) * planes * 64


# ---- layers that make sense ----


@composite
def layers(draw):
    """A block, the weight that it stands for, and what the weight is made of."""
    bits, outputs, inputs = draw(sampled_from(BITS)), draw(integers(1, 70)), draw(integers(1, 300))
    random, skip = torch.Generator().manual_seed(draw(integers(0, 2**32 - 1))), draw(integers(0, 7))
    width, has_zeros, listed = draw(integers(1, inputs)), draw(booleans()), draw(booleans())
    index, groups = torch.arange(inputs) // width, -(-inputs // width)
    if listed and draw(booleans()):  # groups of any size, some of them perhaps empty
        groups = draw(integers(1, min(inputs, 9)))
        index = (torch.rand(inputs, generator=random) ** draw(integers(1, 4)) * groups).long()
        width = int(index.bincount().max())
    codes = torch.randint(2**bits, (outputs, inputs), generator=random).byte()
    middle = torch.full((outputs, groups), 2 ** (bits - 1)).byte()
    zeros = torch.randint(2**bits, middle.shape, generator=random).byte() if has_zeros else middle
    patterns = torch.randint(0x7C00, middle.shape, generator=random)  # every finite magnitude
    scales = (patterns - 2**15 * torch.randint(2, middle.shape, generator=random)).short().view(torch.float16)

    shape = (outputs, inputs, bits, groups, width)
    size = CORE.wr_bytes(*shape, has_zeros, listed)
    assert size == bytes_of(*shape, has_zeros, listed)
    block = blank(size, dtype=torch.uint8)
    given = [Memory(codes, skip), Memory(scales, skip), has_zeros and Memory(zeros, skip)]
    given.append(listed and Memory(index.int(), skip))
    assert CORE.wr_pack(block.pointer, *shape, *(memory.pointer if memory else None for memory in given)) == 0
    assert block.kept()
    scale, zero = scales.double()[:, index], zeros.double()[:, index]
    return SimpleNamespace(
        block=block, width=width, groups=groups, random=random, dense=(codes.double() - zero) * scale,  # exact
        scale=scale.abs(), summands=(codes.double() + zero + 2**bits) * scale.abs(),
    )  # fmt: skip


@composite
def products(draw):
    """A layer, a dtype and rows: normal numbers, or those of one other size, or of every size; and zeros in between."""
    layer, dtype = draw(layers()), draw(sampled_from([*DTYPES]))
    shape = (draw(integers(0, 20)), layer.dense.shape[1])
    low, high = draw(sampled_from([(0, 1), (-149, -148), (-126, -110), (85, 86), (-149, 86)]))
    exponents = torch.randint(low, high, shape, generator=layer.random).double()
    x = torch.randn(shape, generator=layer.random) * 2**exponents
    x[torch.rand(shape, generator=layer.random) < draw(sampled_from([0, 0.3]))] = 0
    return layer, dtype, Memory(x.to(dtype), draw(integers(0, 7)))


def off(layer, x: torch.Tensor, exact: torch.Tensor, halves: bool, dtype: torch.dtype) -> torch.Tensor:
    """How far a product summed in float32 may be from the exact one:

    - codes and zero points may be summed apart, a code in two halves: all that an input is multiplied by adds up to
      at most code + zero + 2^bits. The sum of a group rounds at most twice for each input, the sum of the groups once
      for each; ten roundings more are left for what is done once (chains, pieces, scales), 1% for their products;
    - below the normal numbers steps are absolute. Products of bfloat16 (`halves`) take such numbers for zeros: each
      summand, and each of three pieces twice, may lose what is below 2^-125;
    - the result is rounded to its dtype.
    """
    sums = 1.01 * (2 * layer.width + layer.groups + 10) * 2.0**-24 * (x.abs() @ layer.summands.T)
    step = 2.0**-125 if halves else torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    sums = sums + step * ((layer.summands + 6 * layer.scale).sum(1) + layer.groups + 2)
    return sums + torch.finfo(dtype).eps / 2 * (exact.abs() + sums)


@FUZZ
@given(layers(), sampled_from([*DTYPES]), integers(0, 7), integers(0, 4), integers(1, 5))
def test_any_layer_is_restored_exactly_and_nothing_else_is_written(layer, dtype, skip, first, count):
    """Otherwise a scale of some size, a ragged tile or an address would make other weights."""
    outputs, inputs = layer.dense.shape
    begin = min(16 * first, (outputs - 1) // 16 * 16)
    end = min(begin + 16 * count, outputs)
    for _ in levels():
        w = blank(end - begin, inputs, dtype=dtype, skip=skip)
        assert CORE.wr_restore(layer.block.pointer, w.pointer, DTYPES[dtype], begin, end) == 0
        assert torch.equal(w.numbers, layer.dense[begin:end].to(dtype)) and w.kept()


@FUZZ
@given(products(), integers(0, 7))
def test_any_layer_is_multiplied_by_and_nothing_else_is_written(product, skip):
    """Otherwise inputs of some size, number or address would be lost, or what lies beside them would count."""
    layer, dtype, x = product
    exact = x.numbers.double() @ layer.dense.T
    for halves in levels():
        y = blank(*exact.shape, dtype=dtype, skip=skip)
        assert CORE.wr_matmul(layer.block.pointer, x.pointer, y.pointer, len(exact), DTYPES[dtype]) == 0
        assert ((y.numbers - exact).abs() <= off(layer, x.numbers.double(), exact, halves, dtype)).all() and y.kept()


@FUZZ
@given(integers(1, 40), integers(1, 200), integers(0, 9), integers(0, 7))
def test_a_panel_of_a_wider_factor_is_as_one_alone_and_nothing_else_is_written(columns, outputs, gap, skip):
    """Otherwise columns of another panel, or what a factor has below its diagonal, would be fed back."""
    random = torch.Generator().manual_seed(outputs)
    factor = torch.randn(columns, columns + gap, generator=random)
    factor[torch.ones_like(factor).tril().bool()], factor[:, columns:] = torch.nan, torch.nan
    weight, scales, low = torch.randn(3, columns, outputs, generator=random)
    for _ in levels():
        answers = []
        for stride in (columns, columns + gap):
            given = (weight, weight, factor[:, :stride], scales, low, weight, weight)
            memory = [Memory(numbers, skip) for numbers in given]
            a, target, b, c, d, steps, errors = (m.pointer for m in memory)
            assert CORE.wr_sweep(a, target, b, stride, c, d, 15, steps, errors, columns, outputs) == 0
            assert all(m.kept() for m in memory)
            answers.append(torch.stack([memory[i].numbers for i in (1, 5, 6)]))
        assert torch.equal(*answers) and not answers[0].isnan().any()


# ---- calls that make no sense, in a process that may die of one ----


class Content:
    """What memory holds, `skip` bytes past a 64-byte boundary."""

    def __init__(self, content: bytes, skip: int = 0):
        self.content, self.skip = content, skip

    def __repr__(self) -> str:
        return f"<{len(self.content)} bytes at {self.skip}: {self.content[:128].hex(' ', 8)}>"


def call(name: str, arguments: list) -> tuple[int, bool]:
    """What a function returns, and whether all memory is as it was; the end of this process if that takes a minute."""
    faulthandler.dump_traceback_later(60, exit=True)
    given = [a if isinstance(a, Content) else None for a in arguments]
    memory = [g and Memory(torch.frombuffer(bytearray(g.content), dtype=torch.uint8), g.skip) for g in given]
    result = getattr(CORE, name)(*(m.pointer if m else a for m, a in zip(memory, arguments)))
    faulthandler.cancel_dump_traceback_later()
    return result, all(m.kept() and m.numbers.numpy().tobytes() == g.content for m, g in zip(memory, given) if m)


@cache
def other_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def answer(name: str, arguments: list) -> tuple[int, bool]:
    try:
        return other_process().submit(call, name, arguments).result()
    except BrokenProcessPool:
        other_process.cache_clear()
    pytest.fail(f"{name} was the end of its process")


@composite
def shapes(draw):
    """Any numbers, and such as a layer may just have or just not."""
    bits, (outputs, inputs, groups, width) = draw(sampled_from(BITS)), (draw(NUMBER) for _ in range(4))
    if draw(integers(0, 3)):
        outputs, inputs, width = draw(SIZE), draw(SIZE), draw(SIZE)
        width = min(width, inputs)
        groups = -(-inputs // width) + draw(integers(-1, 1))
    elif draw(booleans()):
        bits = draw(NUMBER)
    return outputs, inputs, bits, groups, width, draw(booleans()), draw(booleans())


@CALLS
@given(shapes())
@example((1, 2**31, 4, 1, 2**31, False, False))  # columns are of 32 bits
@example((2**62, 64, 4, 1, 64, True, False))
def test_the_bytes_of_a_block_are_those_of_exact_arithmetic(shape):
    """Otherwise sizes that overflow would be given a small block, and wr_pack would write far beyond it."""
    assert answer("wr_bytes", shape) == (bytes_of(*shape), True)


FIELDS = ["magic", "bytes", "outputs", "inputs", "bits", "groups", "width"]
FIELDS += ["scales", "zeros", "columns", "codes", "reserved"]
DAMAGES = (*FIELDS, "all", "address")


@composite
def damaged(draw, layer, how):
    """Its block with another number in a field of the header, or in all, or at an address where no block can be.

    Not with a header that a layer can have: one with as many tiles, or whose list has places for as many inputs.
    """
    block = layer.block.numbers.clone()
    header = block[:128].view(torch.int64)
    if how in FIELDS:
        value, old = draw(NUMBER), dict(zip(FIELDS, header.tolist()))
        assume(value != old[how] and (how != "outputs" or -(-value // 16) != -(-old["outputs"] // 16)))
        places = old["groups"] * old["width"]
        assume(how != "inputs" or not old["columns"] or not old["groups"] <= value <= places)
        header[FIELDS.index(how)] = value
    elif how == "all":
        header[1:] = torch.tensor([draw(NUMBER) for _ in range(15)])
    return Content(block.numpy().tobytes(), draw(integers(1, 7)) if how == "address" else 0)


CALLED = {  # what kind of argument comes where
    "wr_pack": "place size inputs bits size size memory memory zeros group",
    "wr_matmul": "block memory memory count dtype",
    "wr_restore": "block memory dtype begin end",
    "wr_search": "memory memory size size size bits symmetric memory count memory memory",
    "wr_sweep": "memory memory memory stride memory memory most memory memory size size",
    "wr_gram": "memory count stride size memory",
    "wr_attend": "memory memory memory zeros memory size size size size size depth strides most symmetric",
}
HELD = Content(bytes(4096))
GOOD = {"memory": HELD, "place": HELD, "zeros": HELD, "group": None, "size": 5, "inputs": 10, "count": 3, "stride": 5}
GOOD |= {"depth": 32, "strides": Content(bytes(88)), "bits": 4, "symmetric": 1, "most": 15, "dtype": 0, "begin": 0}
WRONG = {  # whatever the other arguments are
    "memory": none(),
    "block": none(),
    "place": none() | builds(Content, sampled_from([HELD.content]), integers(1, 7)),
    "group": sampled_from([[0] * 4 + [1] * 6, [0] * 5 + [1] * 4 + [5], [-1] * 2 + [1] * 8]).map(
        lambda group: Content(array("i", group).tobytes())
    ),
    "size": FAR,
    "inputs": FAR,
    "count": FAR.filter(bool),
    "stride": FAR | integers(-2, 4),
    "bits": NUMBER.filter(lambda bits: not 2 <= bits <= 8),
    "dtype": integers(-(2**31), -1) | integers(2, 2**31 - 1),
    "depth": FAR | integers(1, 31),
    "strides": none() | FAR.filter(bool).map(lambda far: Content(array("q", [9] * 10 + [far]).tobytes())),
    "begin": FAR.filter(bool) | integers(1, 15) | integers(71, 99),
    "end": FAR | integers(71, 99),
}
TOGETHER = ("size", "inputs", "count", "stride")
MISTAKES = [(name, kind) for name, kinds in CALLED.items() for kind in WRONG if kind in kinds.split()]
MISTAKES += [(name, "together") for name, kinds in CALLED.items() if "size" in kinds]
MISTAKES += [(name, f"block:{how}") for name, kinds in CALLED.items() if "block" in kinds for how in DAMAGES]


@composite
def nonsense(draw, name, mistake):
    """Arguments of which one is wrong, or whose sizes are possible alone and not together."""
    kinds, good = CALLED[name].split(), GOOD
    if "block" in kinds:
        layer = draw(layers())
        good = GOOD | {"block": Content(layer.block.numbers.numpy().tobytes()), "end": len(layer.dense)}
    arguments = [good[kind] for kind in kinds]
    if mistake == "together":
        size = 2 ** draw(integers(21, 62))
        return [size if kind in TOGETHER else argument for kind, argument in zip(kinds, arguments)]
    mistake, _, how = mistake.partition(":")
    wrong = damaged(layer, how) if how else WRONG[mistake]
    arguments[draw(sampled_from([i for i, kind in enumerate(kinds) if kind == mistake]))] = draw(wrong)
    return arguments


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(name, mistake):
    """Otherwise a mistake of a caller or a damaged block would end the process, or change memory of others."""

    @CALLS
    @given(nonsense(name, mistake))
    def refuses(arguments):
        assert answer(name, arguments) == (-1, True)

    refuses()
