"""The solver's native loops against the torch ones that define them, on every instruction set of this machine."""

from pathlib import Path

import pytest
import torch

from wellrounded import native
from wellrounded.core import grid, rounding
from wellrounded.core.scheme import BITS, Scheme

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
LEVELS = native.levels()
MULTIPLIES = "avx512-bf16"  # the only one with products of bfloat16


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS, autouse=True)
def level(request):
    """The instruction set in use."""
    native.library().wr_use(request.param)
    yield request.param
    native.library().wr_use(len(LEVELS))


def groups_of(width: int, rows: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, 3, width] with some groups all zero, all positive or all negative, and an uneven energy."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 3, width, generator=random) * 0.05
    weight[0] = 0
    weight[1], weight[2] = weight[1].abs(), -weight[2].abs()
    energy = torch.rand(3, width, generator=random).exp() ** 3
    return weight, energy / energy.mean(1, keepdim=True)


def cost(weight, energy, scales, zeros, scheme) -> torch.Tensor:
    steps = grid._round(weight, scales, zeros, scheme)
    return ((weight - steps * scales.unsqueeze(-1)).square() * energy).sum(-1).double()


@pytest.mark.parametrize("width", [8, 24, 32, 64, 100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_search_finds_what_the_definition_finds(bits, symmetric, width):
    """Sums in another order tell candidates apart that are equally good: within what such sums are off by.

    A candidate is judged by its share of sum(energy * weight^2), of which each of `width` roundings may move half a
    unit in the last place, in either of two sums and of two candidates.
    """
    scheme, (weight, energy) = Scheme(bits, -1, symmetric), groups_of(width)
    scales, zeros = native.search(weight, energy, bits, symmetric, grid._shares(scheme, 32))
    expected_scales, expected_zeros = grid.search_rows(weight, energy, scheme, 32)
    assert torch.equal(scales, scales.half().float()) and torch.equal(zeros, zeros.round())
    same = (scales == expected_scales) & (zeros == expected_zeros)
    assert same.float().mean() > (0.9 if bits < 8 else 0.5)  # a cost of 8 bits is near the last place of what it is of
    assert torch.equal(zeros[0], expected_zeros[0]) and torch.equal(scales[0], expected_scales[0])
    mine, theirs = (cost(weight, energy, s, z, scheme) for s, z in ((scales, zeros), (expected_scales, expected_zeros)))
    off = 4 * width * 2.0**-24 * (energy * weight.square()).sum(-1).double()
    assert (mine <= theirs + off).all()


def test_a_group_that_no_candidate_fits_is_left_to_the_caller():
    weight, energy = torch.full((1, 1, 8), 1e30), torch.ones(1, 8)
    scheme = Scheme(4, -1)
    scales, _ = native.search(weight, energy, 4, True, grid._shares(scheme, 32))
    expected, _ = grid.search_rows(weight, energy, scheme, 32)
    assert not torch.isfinite(expected).any() or expected.abs().max() > 65504
    assert not torch.isfinite(scales).any() or scales.abs().max() > 65504


@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (5, 7), (32, 64), (33, 130), (128, 200)])
def test_a_panel_is_rounded_as_the_definition_rounds_it(columns, outputs):
    random = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, outputs, generator=random)
    feedback = torch.randn(columns, columns, generator=random).triu() * 0.05
    feedback.fill_diagonal_(1)
    scales = torch.rand(columns, outputs, generator=random) * 0.2 + 0.05
    scales *= torch.where(torch.rand(columns, outputs, generator=random) < 0.5, -1.0, 1.0)
    low = torch.full((columns, outputs), -8.0)
    steps = [torch.empty_like(weight) for _ in range(2)]
    for stored in (feedback, feedback.T.contiguous().T):  # a factor may lie in memory either way
        (mine,), (theirs,) = (
            sweep(*(each[None] for each in (weight, weight.clone(), stored, scales, low)), 15, found[None])
            for sweep, found in zip((native.sweep, rounding.sweep_panel), steps)
        )
        # A fused multiply-add may move a target across the middle between two steps, and all that follow it a little.
        assert (steps[0] == steps[1]).float().mean() > 0.999
        alike = (steps[0] == steps[1]).all(0)
        assert alike.any() and torch.allclose(mine[:, alike], theirs[:, alike], atol=1e-6)
        assert steps[0].min() >= -8 and steps[0].max() <= 7


def test_threads_change_nothing():
    weight, energy = groups_of(64, rows=3000)
    answers, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            answers.append(native.search(weight, energy, 4, True, grid._shares(Scheme(4, -1), 32)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*answers))


def test_only_contiguous_float32_on_the_cpu_is_served():
    x = torch.zeros(4, 4)
    assert native.serves(x, x)
    for other in (x.double(), x.T[:, 1:], x.to("meta"), x.bfloat16()):
        assert not native.serves(x, other)


# ---- second moments, and products of rows ----


def gram_of(rows: torch.Tensor) -> torch.Tensor | None:
    upper = torch.zeros(rows.shape[1], rows.shape[1])
    return torch.triu(upper) if native.add_gram(rows, upper) else None


def exact_gram(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows^T rows in float64, and how far a float32 sum may be from it: half a unit of every partial sum."""
    x = rows.double()
    return torch.triu(x.T @ x), (len(x) + 2) * 2.0**-24 * (x.abs().T @ x.abs())


@pytest.mark.parametrize("count", [1, 2, 7, 1024, 2051])
@pytest.mark.parametrize("size", [1, 7, 8, 16, 25, 48, 50, 130, 300])
def test_the_second_moment_is_exact_but_for_float32_sums(level, size, count):
    random = torch.Generator().manual_seed(size)
    rows = (torch.randn(count, size, generator=random) * torch.randn(size, generator=random).exp()).bfloat16()
    moment = gram_of(rows)
    if LEVELS[level] != MULTIPLIES:
        assert moment is None
        return
    exact, off = exact_gram(rows)
    assert ((moment - exact).abs() <= off).all()


def test_second_moments_add_up_and_rows_may_lie_apart(level):
    wide = torch.randn(300, 100).bfloat16()
    for rows in (wide[:, 30:77], wide[:1, 30:77], wide[::3, 30:77], wide.T[:90, :64], wide[:1, :40].expand(5, 40)):
        upper = torch.full((rows.shape[1], rows.shape[1]), 3.0)
        if native.add_gram(rows, upper):
            assert torch.equal(torch.triu(upper), torch.triu(gram_of(rows.contiguous()) + 3.0))
        else:
            assert (upper == 3).all() and LEVELS[level] != MULTIPLIES


def product_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    total = torch.zeros(a.shape[1], b.shape[1])
    return total if native.add_product(a, b, total) else None


@pytest.mark.parametrize("count", [1, 7, 513, 2051])
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (1, 130), (130, 1), (7, 9), (8, 48), (16, 33), (50, 25), (129, 65), (300, 49)]
)
def test_a_product_of_rows_is_exact_but_for_float32_sums(level, m, n, count):
    random = torch.Generator().manual_seed(m)
    a, b = ((torch.randn(count, size, generator=random) * 3).bfloat16() for size in (m, n))
    before = torch.randn(m, n, generator=random)
    total = before.clone()
    if not native.add_product(a, b, total):
        assert torch.equal(total, before) and LEVELS[level] != MULTIPLIES
        return
    assert LEVELS[level] == MULTIPLIES
    x, y, start = a.double(), b.double(), before.double()
    off = (count + 2) * 2.0**-24 * (x.abs().T @ y.abs() + start.abs())
    assert ((total - (start + x.T @ y)).abs() <= off).all()


def test_both_sides_of_a_product_may_lie_apart(level):
    wide, other = torch.randn(300, 100).bfloat16(), torch.randn(300, 80).bfloat16()
    pairs = [(wide[:, 30:77], other), (wide[:1, 30:77], other[:1, 3:]), (wide[::3, 30:], other.T[:80, :64].T[:, 2:])]
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in (*pairs, (wide.T[:90], other[:1].expand(90, 80)))]
    for a, b in [*pairs, *((b, a) for a, b in pairs)]:
        found, expected = product_of(a, b), product_of(a.contiguous(), b.contiguous())
        assert (found is None) is (LEVELS[level] != MULTIPLIES)
        assert found is None or (torch.equal(found, expected) and found.any())


def test_the_upper_half_of_a_product_with_itself_is_the_second_moment(level):
    rows = torch.randn(1100, 333).bfloat16()
    found = product_of(rows, rows)
    assert found is None or (torch.equal(found, found.T) and torch.equal(torch.triu(found), gram_of(rows)))


def test_the_number_of_threads_changes_no_bit_of_a_product(level):
    rows, others, before = torch.randn(1500, 200).bfloat16(), torch.randn(1500, 310).bfloat16(), torch.get_num_threads()
    for function in (lambda: gram_of(rows), lambda: product_of(rows, others), lambda: product_of(others, rows)):
        products = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            products.append(function())
        torch.set_num_threads(before)
        assert all(p is None or torch.equal(p, products[0]) for p in products)


def test_no_rows_add_nothing(level):
    rows, total = torch.empty(0, 4, dtype=torch.bfloat16), torch.ones(4, 4)
    for done in (native.add_gram(rows, total), native.add_product(rows, rows, total)):
        assert done is (LEVELS[level] == MULTIPLIES) and (total == 1).all()


def test_other_dtypes_and_places_are_left_to_torch():
    upper = torch.zeros(4, 4)
    for rows in (torch.randn(3, 4), torch.randn(3, 4).half(), torch.empty(3, 4, dtype=torch.bfloat16, device="meta")):
        assert not native.add_gram(rows, upper) and not native.add_product(rows, rows, upper)
        good = torch.randn(3, 4).bfloat16()
        assert not native.add_product(good, rows, upper) and not native.add_product(rows, good, upper)
    for total in (upper.double(), torch.zeros(4, 8)[:, ::2], upper.to("meta")):
        assert not native.add_gram(good, total) and not native.add_product(good, good, total)
    assert (upper == 0).all()


# ---- memory ----


def flags_of(address: int) -> list[str]:
    """What Linux knows of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        start, _, rest = line.partition("-")
        if rest and ":" not in start and " " not in start:
            inside = int(start, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_pages_are_asked_for_and_the_tensor_stays_what_it_is():
    tensor = torch.empty(8 * 2**20, dtype=torch.uint8)
    assert native.on_large_pages(tensor) is tensor and (tensor.fill_(7) == 7).all()
    assert "hg" in flags_of(tensor.data_ptr() + tensor.nbytes // 2)
    small, elsewhere = torch.ones(3), torch.empty(2**22, device="meta")
    assert (
        native.on_large_pages(small) is small and (small == 1).all() and native.on_large_pages(elsewhere) is elsewhere
    )
