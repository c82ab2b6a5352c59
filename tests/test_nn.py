"""A QuantLinear is a linear layer with the dequantized weight, whatever happens to the module around it."""

import copy
import io
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wellrounded import kernels
from wellrounded.core.scheme import Scheme
from wellrounded.core.weight import QuantizedWeight
from wellrounded.errors import CheckpointError, UsageError
from wellrounded.formats import gptq as gptq_format
from wellrounded.nn import QuantLinear
from wellrounded.packed_weight import PackedWeight

NAME = "model.layers.3.mlp.down_proj"
IN, OUT = 128, 64
SCHEMES = [Scheme(4, 32), Scheme(4, 64, symmetric=False), Scheme(3, -1), Scheme(8, 32, act_order=True), Scheme(4, 24)]


def make(scheme: Scheme, seed: int = 0) -> QuantizedWeight:
    random = torch.Generator().manual_seed(seed)
    grid = (OUT, scheme.groups(IN))
    index = scheme.trivial_group_index(IN)
    zeros = torch.randint(1, scheme.max_code + 1, grid, generator=random).to(torch.uint8)
    return QuantizedWeight(
        codes=torch.randint(scheme.max_code + 1, (OUT, IN), generator=random).to(torch.uint8),
        scales=(torch.randn(grid, generator=random) * 0.1 / scheme.midpoint).half(),
        zeros=torch.full_like(zeros, scheme.midpoint) if scheme.symmetric else zeros,
        group_index=index[torch.randperm(IN, generator=random)] if scheme.act_order else index,
        scheme=scheme,
    )


def layer_of(weight: QuantizedWeight, bias: bool = False, version: str = "gptq") -> QuantLinear:
    layer = QuantLinear(IN, OUT, weight.scheme, version, bias, NAME, dtype=torch.float32)
    tensors = gptq_format.to_tensors(weight, version)
    if bias:
        tensors["bias"] = torch.randn(OUT, generator=torch.Generator().manual_seed(9))
    layer.load_state_dict(tensors)
    return layer


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """x W^T + b in float32: one rounding for each product, sum and bias, in the worst case, and in either result."""
    expected = F.linear(x, weight, bias)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert ((y - expected).abs() <= 2 * (IN + 1) * 2.0**-24 * size).all()


# What it computes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_linear_with_the_dequantized_weight(scheme, version, bias):
    weight = make(scheme)
    layer = layer_of(weight, bias, version)
    for shape in ((), (3,), (2, 5), (40,), (0,)):
        x = inputs(*shape)
        assert_linear(layer(x), x, weight.dequantize(), layer.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_answers_in_the_dtype_of_its_input(scheme, dtype):
    """And as the kernel would; how exact that is, the tests of the kernels say."""
    weight = make(scheme)
    layer = layer_of(weight, bias=True)
    need = kernels.Need(scheme, IN, OUT, "cpu", dtype)
    kernel = kernels.select(need)
    prepared = kernel.prepare(weight, need)
    for rows in (2, 40):
        x = inputs(rows, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, kernel.matmul(x, prepared, weight.dequantize) + layer.bias.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_gradient_of_its_input_is_that_of_the_dense_layer(scheme):
    weight = make(scheme)
    layer = layer_of(weight, bias=True)
    layer(inputs(2))  # binds it
    for rows in (2, 40):
        x, along = inputs(rows).requires_grad_(), torch.randn(rows, OUT)
        (gradient,) = torch.autograd.grad(layer(x), x, along)
        (expected,) = torch.autograd.grad(F.linear(x, weight.dequantize(), layer.bias), x, along)
        assert torch.equal(gradient, expected)


def test_it_has_nothing_to_train():
    layer = layer_of(make(SCHEMES[0]), bias=True)
    assert list(layer.parameters()) == []
    assert not layer(inputs(2)).requires_grad


# Its tensors are the file's


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_its_state_is_the_file(scheme, bias):
    layer = QuantLinear(IN, OUT, scheme, "gptq", bias, NAME)
    state = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in layer.state_dict().items()}
    assert state == gptq_format.layout(scheme, IN, OUT) | ({"bias": ((OUT,), torch.float32)} if bias else {})


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_saved_and_loaded_it_is_the_same(scheme):
    layer = layer_of(make(scheme), bias=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear(IN, OUT, scheme, "gptq", True, NAME)
    other.load_state_dict(torch.load(file))
    for key, tensor in layer.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    assert torch.equal(other(inputs(3)), layer(inputs(3)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("assign", [True, False])
def test_tensors_that_are_loaded_after_a_call_count(scheme, assign):
    weight = make(scheme, seed=1)
    model = nn.Sequential(layer_of(make(scheme)))
    model(inputs(2))
    model.load_state_dict(nn.Sequential(layer_of(weight)).state_dict(), assign=assign)
    assert_linear(model(inputs(2)), inputs(2), weight.dequantize())


def test_a_group_index_in_the_file_counts_whatever_the_scheme_says():
    weight = make(Scheme(4, 32, act_order=True))
    layer = QuantLinear(IN, OUT, Scheme(4, 32), "gptq", False, NAME)
    layer.load_state_dict(gptq_format.to_tensors(weight, "gptq"))
    assert_linear(layer(inputs(2)), inputs(2), weight.dequantize())


def test_a_group_index_that_makes_groups_of_unequal_size_counts_too():
    weight = make(Scheme(4, 32, act_order=True))
    weight.group_index[:100] = 0
    layer = layer_of(weight)
    assert_linear(layer(inputs(2)), inputs(2), weight.dequantize())
    with pytest.raises(UsageError, match="groups of equal size"):
        layer.wanted_kernel = "torch-int4"
        layer.bind(torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_scale_is_reported_with_the_name_of_the_layer(value):
    layer = layer_of(make(SCHEMES[0]))
    layer.scales[1, 7] = value
    with pytest.raises(CheckpointError, match=rf"^{NAME}\.scales is NaN or Inf in 1 of"):
        layer(inputs(2))


def test_a_shape_that_cannot_be_packed_is_refused():
    with pytest.raises(UsageError, match="outputs in multiples of 32, this layer has 40"):
        QuantLinear(IN, 40, Scheme(3, 32), "gptq", False, NAME)


# Binding


class Recorder:
    """A kernel that counts, then does as the reference does."""

    NAME = "recorder"

    def __init__(self) -> None:
        self.needs = []

    def refuses(self, need):
        return None

    def prepare(self, weight, need):
        self.needs.append(need)
        return [weight.codes]

    def matmul(self, x, prepared, dense):
        return F.linear(x, dense(x.dtype))


@pytest.fixture
def recorder(monkeypatch):
    only = Recorder()
    monkeypatch.setattr(kernels, "table", lambda: [only])
    return only


def test_it_is_bound_once_by_the_first_call(recorder):
    layer = layer_of(make(SCHEMES[0]))
    assert recorder.needs == [] and layer.kernel == ""
    layer(inputs(2))
    layer(inputs(40))
    assert recorder.needs == [kernels.Need(SCHEMES[0], IN, OUT, "cpu", torch.float32)]
    assert layer.kernel == "recorder"


def test_bound_by_hand_it_is_not_bound_again(recorder):
    layer = layer_of(make(SCHEMES[0]))
    layer.bind(torch.bfloat16)
    layer(inputs(2))
    assert [need.dtype for need in recorder.needs] == [torch.bfloat16]


def test_on_another_device_it_is_bound_again(recorder):
    layer = layer_of(make(SCHEMES[0]))
    layer(inputs(2))
    layer._bound_to = torch.device("meta")  # as if it had been there
    layer(inputs(2))
    assert len(recorder.needs) == 2


def test_the_kernel_that_was_wanted_is_taken():
    layer = layer_of(make(SCHEMES[0]))
    layer.wanted_kernel = "reference"
    layer(inputs(2))
    assert layer.kernel == "reference"


def test_a_wanted_kernel_that_refuses_is_not_replaced(monkeypatch):
    never = SimpleNamespace(NAME="never", refuses=lambda need: "it is never in the mood")
    monkeypatch.setattr(kernels, "table", lambda: [never, Recorder()])
    layer = layer_of(make(SCHEMES[0]))
    layer.wanted_kernel = "never"
    with pytest.raises(UsageError, match="'never' was asked for, but it is never in the mood"):
        layer(inputs(2))


def test_without_tensors_it_cannot_be_bound():
    with torch.device("meta"):
        layer = QuantLinear(IN, OUT, SCHEMES[0], "gptq", False, NAME)
    with pytest.raises(CheckpointError, match=f"{NAME}: its tensors are not loaded yet"):
        layer.bind(torch.float32)


def test_it_prints_what_it_is():
    layer = layer_of(make(SCHEMES[0]))
    layer.wanted_kernel = "reference"
    assert repr(layer) == "QuantLinear(128, 64, 4-bit g32 sym, kernel=unbound)"
    layer(inputs(2))
    assert repr(layer) == "QuantLinear(128, 64, 4-bit g32 sym, kernel=reference)"


# Life in a module


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_another_dtype_after_binding_is_computed_in_that_dtype(scheme):
    weight = make(scheme)
    layer = layer_of(weight, bias=True)
    layer.bind(torch.bfloat16)
    for rows in (2, 40):
        assert_linear(layer(inputs(rows)), inputs(rows), weight.dequantize(), layer.bias)


@pytest.mark.parametrize("bound", [True, False])
def test_a_copy_lives_by_itself(bound):
    weight, other = make(SCHEMES[0]), make(SCHEMES[0], seed=1)
    layer = layer_of(weight)
    if bound:
        layer(inputs(2))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(inputs(2)), layer(inputs(2)))
    twin.load_state_dict(gptq_format.to_tensors(other, "gptq"))
    assert_linear(twin(inputs(2)), inputs(2), other.dequantize())
    assert_linear(layer(inputs(2)), inputs(2), weight.dequantize())


@pytest.mark.parametrize("bound", [True, False])
def test_a_pickle_is_the_same_layer(bound):
    layer = layer_of(make(SCHEMES[0]), bias=True)
    if bound:
        layer(inputs(2))
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(inputs(2)), layer(inputs(2)))
    assert other.name == NAME and other.scheme == SCHEMES[0]


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_moved_to_another_dtype_it_has_the_weight_that_it_had(scheme, dtype, bound):
    """A dtype is one for activations: the stored scales stay what the file has."""
    weight = make(scheme)
    layer = layer_of(weight, bias=True)
    if bound:
        layer(inputs(2))
    layer.to("cpu").to(dtype)
    assert {key: tensor.dtype for key, tensor in layer.tensors().items()} == {
        "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32,
    }  # fmt: skip
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.dense_weight(torch.float32), weight.dequantize())
    for rows in (2, 40):
        assert_linear(layer(inputs(rows)), inputs(rows), weight.dequantize(), layer.bias.float())


def test_moved_to_where_it_was_it_stays_bound(recorder):
    layer = layer_of(make(SCHEMES[0]))
    layer(inputs(2))
    layer.to("cpu").to(torch.bfloat16)
    layer(inputs(2))
    assert len(recorder.needs) == 1


def test_moved_away_it_is_unbound_and_bound_again_when_its_tensors_come_back(recorder):
    layer = layer_of(make(SCHEMES[0]))
    layer(inputs(2))
    state = layer.state_dict()
    layer.to("meta")
    assert layer.kernel == ""
    layer.load_state_dict(state, assign=True)
    layer(inputs(2))
    assert len(recorder.needs) == 2


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_read_in_place_it_multiplies_by_whatever_its_buffers_hold(scheme):
    """As offloading moves them in and out, without telling the layer."""
    weight, other = make(scheme), make(scheme, seed=1)
    with torch.device("meta"):
        layer = QuantLinear(IN, OUT, scheme, "gptq", False, NAME)
    layer.read_in_place()
    for held in (weight, other):
        for key, tensor in gptq_format.to_tensors(held, "gptq").items():
            setattr(layer, key, tensor)
        assert_linear(layer(inputs(40)), inputs(40), held.dequantize())
    assert layer.kernel == "reference"


# Mixed precision, gradients, tracing


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("gradient", [True, False])
def test_under_autocast_it_computes_in_its_dtype_as_a_dense_layer_does(rows, gradient):
    layer = layer_of(make(SCHEMES[0]), bias=True)
    dense = nn.Linear(IN, OUT)
    x = inputs(rows).requires_grad_(gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), dense(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(y.detach(), layer(x.detach().bfloat16()))
    if gradient:
        y.sum().backward()
        assert x.grad.dtype == torch.float32


def test_no_dense_weight_outlives_a_call_in_either_direction():
    """Every tensor of the weight's shape is counted while three layers in a row are differentiated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        alive, most, made = weakref.WeakSet(), 0, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() == IN * IN:
                    self.alive.add(tensor.untyped_storage())
                    self.made += 1
            self.most = max(self.most, len(self.alive))
            return out

    layers = [QuantLinear(IN, IN, Scheme(4, 32), "gptq_v2", False, NAME) for _ in range(3)]
    for layer in layers:
        layer.qzeros.fill_(-0x77777778)  # eights
        layer.bind(torch.float32)

    def most(linear) -> int:
        x = inputs(5).requires_grad_()
        with Count() as count:
            y = x
            for layer in layers:
                y = linear(y, layer)
            y.sum().backward()
        assert count.made >= 6 and x.grad is not None
        return count.most

    one = most(lambda y, layer: layer(y))
    assert most(lambda y, layer: F.linear(y, layer.weight)) == one
    kept = most(lambda y, layer: F.linear(y, layer.dense_weight(y.dtype)))  # what autograd does with a plain weight
    assert one < kept


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_it_is_one_node_without_a_break(scheme, dynamic):
    layer = layer_of(make(scheme), bias=True)
    layer.bind(torch.float32)
    torch._dynamo.reset()  # it counts how often one piece of code was compiled
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (1, 40, 3):
        x = inputs(rows)
        assert torch.equal(compiled(x), layer(x))
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
        assert torch.equal(gradient, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(inputs(3)).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_the_operators_keep_every_promise_that_torch_checks(scheme, rows):
    layer = layer_of(make(scheme))
    layer.bind(torch.float32)
    tensors = [layer.tensors()[key] for key in ("qweight", "qzeros", "scales", "g_idx")]
    storage = (scheme.bits, scheme.group_size, scheme.symmetric, scheme.act_order, "gptq")
    x, gradient = inputs(rows).requires_grad_(), torch.randn(rows, OUT)
    torch.library.opcheck(torch.ops.wellrounded.linear, (x, layer._prepared, layer.kernel, *tensors, *storage))
    torch.library.opcheck(torch.ops.wellrounded.linear_backward, (gradient, *tensors, *storage))


def test_the_first_calls_may_come_from_several_threads(monkeypatch):
    layer, ready = layer_of(make(SCHEMES[0])), threading.Event()
    kernel = kernels.table()[0]
    prepare = kernel.prepare

    def slowly(weight, need):
        ready.set()
        time.sleep(0.2)  # the other thread calls meanwhile
        return prepare(weight, need)

    monkeypatch.setattr(kernel, "prepare", slowly)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(layer, inputs(2))
        ready.wait(10)
        second = threads.submit(layer, inputs(2))
    assert torch.equal(first.result(), second.result())


def test_a_gradient_is_right_where_offloading_has_taken_the_tensors_away():
    layer = layer_of(make(SCHEMES[0]))
    x = inputs(3).requires_grad_()
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    layer.to("meta")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, expected)


def test_compiled_before_it_is_bound_it_follows_the_group_index_of_the_file():
    weight = make(Scheme(4, 32, act_order=True))
    layer = QuantLinear(IN, OUT, Scheme(4, 32), "gptq", False, NAME)
    layer.load_state_dict(gptq_format.to_tensors(weight, "gptq"))
    torch._dynamo.reset()
    assert_linear(torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs(2)), inputs(2), weight.dequantize())


# Its weight, for those who read it


def test_its_weight_is_known_by_shape_without_being_restored(monkeypatch):
    layer = layer_of(make(SCHEMES[0]))
    layer.bind(torch.bfloat16)
    monkeypatch.setattr(QuantLinear, "dense_weight", None)
    weight = layer.weight
    assert weight.shape == weight.size() == (OUT, IN) and weight.dtype == torch.bfloat16
    assert weight.device == torch.device("cpu") and not weight.requires_grad and weight.is_floating_point()
    assert isinstance(layer, nn.Linear) and list(layer.parameters()) == []


def test_whatever_is_computed_with_its_weight_is_a_plain_tensor():
    weight = make(SCHEMES[0])
    layer = layer_of(weight)
    layer.bind(torch.float32)
    dense = weight.dequantize()
    for compute in (
        lambda w: w.T, lambda w: w.detach().clone(), lambda w: w + 1, lambda w: 1 + w,
        lambda w: w.double(), lambda w: torch.linalg.norm(w, dim=1), lambda w: torch.stack([w, w]),
        lambda w: w[3], lambda w: w @ w.T, lambda w: F.linear(w, w), lambda w: torch.empty_like(w).copy_(w),
    ):  # fmt: skip
        result = compute(layer.weight)
        assert type(result) is torch.Tensor and torch.equal(result, compute(dense))


def test_its_weight_stays_packed_where_nothing_is_computed():
    weight = make(SCHEMES[0])
    layer = layer_of(weight)
    layer.bind(torch.bfloat16)
    for same in (
        lambda w: w.data,
        lambda w: w.detach(),
        lambda w: w.to(torch.float32),
        lambda w: w.requires_grad_(False),
    ):
        assert type(same(layer.weight)) is PackedWeight
    assert layer.weight.to(torch.float32).dtype == torch.float32
    assert torch.equal(layer.weight.to(torch.float32) + 0, weight.dequantize(torch.bfloat16).float())
    layer.weight = layer.weight
    layer.weight.requires_grad = False


def test_multiplying_by_its_weight_is_its_own_product():
    layer = layer_of(make(SCHEMES[0]), bias=True)
    x = inputs(3)
    y = F.linear(x, layer.weight)
    assert torch.equal(y + layer.bias, layer(x))


@pytest.mark.parametrize(
    "write",
    [lambda w: w.zero_(), lambda w: w.__iadd__(1), lambda w: setattr(w, "data", torch.ones(OUT, IN)),
     lambda w: nn.init.normal_(w), lambda w: w.copy_(torch.ones(OUT, IN)), lambda w: w.data.add_(1),
     lambda w: w.data.__imul__(2), lambda w: w.__setitem__(0, 1.0), lambda w: torch.add(1, 1, out=w),
     lambda w: F.relu(w, inplace=True), lambda w: torch._foreach_add_([w], 1), lambda w: w.requires_grad_(),
     lambda w: setattr(w.layer, "weight", layer_of(make(SCHEMES[1])).weight)],
)  # fmt: skip
def test_its_weight_cannot_be_written_to(write):
    """A merged adapter that is lost without a word would be worse than an error."""
    layer = layer_of(make(SCHEMES[0]))
    with pytest.raises(UsageError, match=rf"^{NAME}: its weight is packed \(4-bit g32 sym\) and cannot be written to"):
        write(layer.weight)


def test_on_meta_its_weight_is_there_too():
    with torch.device("meta"):
        layer = QuantLinear(IN, OUT, SCHEMES[0], "gptq", False, NAME)
    assert layer.weight.shape == (OUT, IN) and (layer.weight + 1).is_meta
