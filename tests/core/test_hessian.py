"""The second moment is exact to float32, whatever it was summed from, and its factor is a factor."""

import pytest
import torch

from wellrounded.core import hessian as module
from wellrounded.core.factor import Factor, FactorError, factor, ridge
from wellrounded.core.hessian import Hessian
from wellrounded.errors import NumericsError

from . import twin


def rows(tokens: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Columns of very different size, as after a norm with large gains."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randn(size, generator=random).exp()
    return (torch.randn(tokens, size, generator=random) * sizes).to(dtype)


def observed(*batches: torch.Tensor) -> Hessian:
    hessian = Hessian(batches[0].shape[-1])
    for batch in batches:
        hessian.update(batch)
    return hessian


def assert_second_moment(matrix: torch.Tensor, x: torch.Tensor) -> None:
    """Equal to the float64 mean up to one rounding of a float32 per product, per sum and for the mean."""
    exact, magnitude = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    tolerance = (len(x) + 3) * 2.0**-24 * magnitude / len(x)
    assert ((matrix.double() - exact / len(x)).abs() <= tolerance).all()


def low_rank(size: int = 48, tokens: int = 6) -> torch.Tensor:
    return observed(rows(tokens, size)).matrix()


# The sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 40, 51])  # less than a tile, whole tiles, and a rest
def test_it_is_the_mean_of_products(monkeypatch, dtype, size):
    monkeypatch.setattr(module, "TILE", 20)
    x = rows(300, size, dtype)
    matrix = observed(x).matrix()
    assert matrix.dtype == torch.float32 and torch.equal(matrix, matrix.T)
    assert_second_moment(matrix, x)


def test_it_is_as_exact_for_products_that_a_library_would_rather_compute_in_bfloat16():
    """Large enough for every fast path of the CPU. Rounded products would be off by 2^-9, five hundred half-units."""
    for dtype in (torch.bfloat16, torch.float32):
        x = rows(64, 800, dtype)
        assert_second_moment(observed(x).matrix(), x)


def test_every_leading_dimension_is_one_of_tokens():
    x = rows(60, 16)
    hessian = observed(x.reshape(3, 4, 5, 16))
    assert hessian.tokens == 60
    assert torch.equal(hessian.matrix(), observed(x).matrix())


def test_batches_add_up():
    x = rows(100, 24)
    parts = observed(*x.split([1, 59, 40]))
    assert parts.tokens == 100
    assert_second_moment(parts.matrix(), x)


def test_an_empty_batch_adds_nothing():
    x = rows(10, 24)
    assert torch.equal(observed(x, x[:0]).matrix(), observed(x).matrix())


def test_two_that_are_merged_have_seen_what_both_saw():
    x = rows(100, 24)
    one, other = observed(x[:30]), observed(x[30:])
    before = other.matrix()
    one.merge(other)
    assert one.tokens == 100
    assert_second_moment(one.matrix(), x)
    assert other.tokens == 70 and torch.equal(other.matrix(), before)


def test_padding_does_not_count():
    x = rows(12, 16).reshape(3, 4, 16)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]).bool()
    x[~mask] = torch.nan
    hessian = Hessian(16)
    hessian.update(x, mask)
    assert hessian.tokens == 7
    assert torch.equal(hessian.matrix(), observed(x[mask]).matrix())


def test_a_gradient_is_not_kept():
    hessian = observed(rows(5, 8).requires_grad_())
    assert not hessian.matrix().requires_grad


def test_the_diagonal_is_the_diagonal_and_zero_for_dead_columns():
    x = rows(50, 16)
    x[:, [3, 9]] = 0
    hessian = observed(x)
    assert torch.equal(hessian.diagonal(), hessian.matrix().diagonal())
    assert (hessian.diagonal() == 0).nonzero().flatten().tolist() == [3, 9]


def test_without_tokens_every_column_is_dead():
    assert torch.equal(Hessian(8).diagonal(), torch.zeros(8))
    assert torch.equal(Hessian(8).matrix(), torch.zeros(8, 8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_that_are_not_numbers_are_refused_wherever_they_show(value, dtype):
    x = rows(50, 16, dtype)
    x[7, 11] = value
    hessian = observed(x)
    for read in (hessian.matrix, hessian.diagonal):
        with pytest.raises(NumericsError, match="the inputs of this layer hold NaN or Inf"):
            read()


# The setting of torch that is borrowed


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(params=["none", "ieee"])
def chosen(request):
    """What somebody else chose for float32 products."""
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        pytest.skip("this torch has no such setting")
    before = precision()
    torch.backends.mkldnn.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_precision_of_torch_is_put_back(chosen, dtype):
    Hessian(16).add_rows(rows(10, 16, dtype))
    assert precision() == chosen


def test_the_precision_of_torch_is_put_back_after_an_error(chosen):
    hessian = Hessian(16)
    hessian._upper = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        hessian.add_rows(rows(10, 16, torch.bfloat16))
    assert precision() == chosen


@pytest.mark.parametrize(("dtype", "during"), [(torch.bfloat16, "bf16"), (torch.float32, None)])
def test_only_bfloat16_rows_are_multiplied_in_bfloat16(chosen, dtype, during):
    seen = []

    class Recorder:
        def __getitem__(self, tile):
            return self

        def addmm_(self, left, right):
            seen.append(precision())

    hessian = Hessian(16)
    hessian._upper = Recorder()
    hessian.add_rows(rows(10, 16, dtype))
    assert seen == [during or chosen]


# The factor


def assert_factored(matrix: torch.Tensor, factored: Factor) -> None:
    """R R^T is the damped matrix, up to the backward error of a Cholesky factor in float32 (Higham, theorem 10.3)."""
    upper, damped = factored.upper.double(), twin.damped(matrix, factored.damping).double()
    assert factored.upper.dtype == torch.float32
    assert torch.equal(upper, torch.triu(upper)) and (upper.diagonal() > 0).all()
    tolerance = (len(upper) + 2) * 2.0**-24 * (upper.abs() @ upper.abs().T)
    assert ((upper @ upper.T - damped).abs() <= tolerance).all()


def test_the_factor_is_upper_triangular_and_gives_the_damped_matrix():
    matrix = observed(rows(200, 48)).matrix()
    factored = factor(matrix, 0.01)
    assert factored.damping == 0.01
    assert_factored(matrix, factored)


def test_fewer_tokens_than_columns_need_no_more_damping_than_was_asked():
    matrix = low_rank()
    assert torch.linalg.matrix_rank(matrix) == 6
    factored = factor(matrix, 0.01)
    assert factored.damping == 0.01
    assert_factored(matrix, factored)


def test_each_column_is_damped_by_half_of_itself_and_by_the_median():
    matrix = observed(rows(200, 5)).matrix()
    diagonal = matrix.diagonal().tolist()
    median = sorted(diagonal)[2]
    expected = torch.tensor([h / 2 + median for h in diagonal])
    torch.testing.assert_close(ridge(matrix.diagonal()[None])[0], expected, rtol=2 * 2.0**-24, atol=0)
    torch.testing.assert_close(twin.damped(matrix, 0.05), matrix + torch.diag(0.05 * expected))
    assert_factored(matrix, factor(matrix, 0.05))


def test_one_massive_column_does_not_drown_the_others():
    x = rows(200, 48)
    calm = observed(x).diagonal()
    x[:, 7] *= 1e4
    damped = observed(x).diagonal() + 0.01 * ridge(observed(x).diagonal()[None])[0]
    # The median moves up by one column at most; the mean would be some million times as large.
    limit = calm + 0.01 * (calm / 2 + calm.sort().values[24])
    others = torch.arange(48) != 7
    assert (damped[others] <= limit[others] * (1 + 4 * 2.0**-24)).all()  # four float32 operations


def test_dead_columns_are_decoupled_and_left_out_of_the_median():
    x = rows(200, 9)
    live = torch.tensor([0, 2, 4])
    x[:, [j for j in range(9) if j not in live]] = 0
    factored = factor(observed(x).matrix(), 0.01)
    assert_factored(observed(x).matrix(), factored)
    median = observed(x).diagonal()[live].median()
    for j in set(range(9)) - set(live.tolist()):
        assert factored.upper[j].count_nonzero() == factored.upper[:, j].count_nonzero() == 1
        assert factored.upper[j, j] == (0.01 * median).sqrt()
    alone = factor(observed(x[:, live]).matrix(), 0.01)
    torch.testing.assert_close(factored.upper[live][:, live], alone.upper, rtol=16 * 2.0**-24, atol=0)  # 3 columns


def indefinite(off: float) -> torch.Tensor:
    """Eigenvalues 1 + off and 1 - off; damping d adds 1.5 d to both."""
    return torch.tensor([[1.0, off], [off, 1.0]])


@pytest.mark.parametrize(
    ("off", "asked", "used"),
    [(0.99, 0.0, 0.0), (1.0005, 0.0, 1e-3), (1.05, 1e-4, 0.1), (1.05, 0.01, 0.1), (1.05, 0.05, 0.05), (1.2, 0.01, 1.0),
     (1.2, 0.09, 0.9), (2.4, 0.09, 1.0), (2.0, 2.0, 2.0)],
)  # fmt: skip
def test_damping_is_raised_tenfold_until_it_suffices_and_no_further_than_one(off, asked, used):
    factored = factor(indefinite(off), asked)
    assert factored.damping == pytest.approx(used)
    assert_factored(indefinite(off), factored)


@pytest.mark.parametrize("asked", [0.0, 0.01, 0.05, 1.0])
def test_a_hopeless_matrix_is_refused(asked):
    with pytest.raises(FactorError, match=r"not positive definite even with damping 1$"):
        factor(indefinite(3.0), asked)


def test_float64_is_tried_before_more_damping(monkeypatch):
    """Which matrices fail in float32 only depends on the library, so here all of them do."""
    real, tried = torch.linalg.cholesky_ex, []

    def failing_in_float32(matrix):
        tried.append(matrix.dtype)
        lower, info = real(matrix)
        return lower, info + (matrix.dtype == torch.float32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing_in_float32)
    factored = factor(indefinite(1.05), 0.01)
    assert tried == [torch.float32, torch.float64] * 2 and factored.damping == pytest.approx(0.1)
    assert_factored(indefinite(1.05), factored)


def test_a_matrix_without_a_live_column_is_refused():
    with pytest.raises(FactorError, match="every input column of this layer is dead"):
        factor(torch.zeros(4, 4), 0.01)
