"""The kernel for GPUs, interpreted (see test_triton.py): every width and path against the dequantized weight."""

import pytest
import torch
from test_kernels import assert_is_product, inputs, make, need_of

import pretend
from wellrounded.core.scheme import Scheme
from wellrounded.formats import gptq as gptq_format
from wellrounded.kernels import Need
from wellrounded.kernels import triton as kernel
from wellrounded.nn import QuantLinear

SCHEMES = [
    *(Scheme(bits, group) for bits in (2, 3, 4, 8) for group in (32, 128, -1)),
    *(Scheme(bits, 64, symmetric=False) for bits in (2, 3, 4, 8)),
    *(Scheme(bits, 64, act_order=True) for bits in (3, 4)),
    Scheme(4, 16), Scheme(4, 48, symmetric=False),  # groups that are no whole blocks
]  # fmt: skip


def prepared(weight):
    return kernel.prepare(weight, need_of(weight, torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_weight_is_restored_bit_for_bit(scheme):
    """Each column where the order has it; what fills up a group is 0, so that it may be added to any."""
    weight = make(scheme, columns=192)
    words = prepared(weight)
    order = words[3].long() if words[3].numel() else torch.arange(192)

    def restored(dtype):
        return torch.zeros(weight.shape).index_add(1, order, kernel.restored(words, dtype).float())

    assert torch.equal(restored(torch.float16), weight.dequantize(torch.float16).float())
    found, expected = restored(torch.bfloat16), weight.dequantize(torch.bfloat16).float()
    assert ((found - expected).abs() <= 2**-7 * expected.abs()).all()  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("rows", [1, 17, 64, 65])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_multiplies(scheme, rows):
    weight = make(scheme, columns=192)
    x = inputs(rows, 192, dtype=torch.float16)
    assert_is_product(kernel.matmul(x, prepared(weight), weight.dequantize), x, weight)
    x = x.bfloat16()
    y, expected = kernel.matmul(x, prepared(weight), weight.dequantize), x.float() @ weight.dequantize().T
    assert (y.float() - expected).norm() < 2**-7 * expected.norm()  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("outputs", [16, 64, 150])
@pytest.mark.parametrize("columns", [96, 1024, 1056])
def test_shares_of_the_columns_add_up(outputs, columns, monkeypatch):
    """Also where the last share has less to do, or outputs do not fill a program; counters are used again."""
    weight = make(Scheme(4, 32), rows=outputs, columns=columns)
    kernel._most.cache_clear()
    shares, seen = kernel._shares, []
    monkeypatch.setattr(kernel, "_shares", lambda *about: seen.append(shares(*about)) or seen[-1])
    for rows in (1, 5, 1):
        x = inputs(rows, columns, dtype=torch.float16)
        assert_is_product(kernel.matmul(x, prepared(weight), weight.dequantize), x, weight)
    turns = columns // 128 if columns % 128 == 0 else columns // 32
    assert {*seen} == {max(1, min(16, turns // 2))}
    assert all(not counter.any() for counter in kernel._counters.values())


@pytest.mark.parametrize(("rows", "tall"), [(1, 16), (60, 64), (130, 128)])
def test_whatever_is_tuned_computes_the_same(rows, tall, monkeypatch):
    """Every shape of a program that may turn out to be fastest, and more rows than one program has."""
    programs = kernel._programs()
    weight = make(Scheme(4, 32, act_order=True), rows=150, columns=512)
    x, words = inputs(rows, 512, dtype=torch.float16), prepared(weight)
    for config in programs.kinds(tall):
        monkeypatch.setattr(programs, "kinds", lambda rows, config=config: [config])
        kernel._most.cache_clear()
        assert_is_product(kernel._read(x[:, words[3]], words, tunes=False), x, weight)
    kernel._most.cache_clear()
    assert all(not counter.any() for counter in kernel._counters.values())


class Device:
    """What a GPU answers, with clocks of its own."""

    off, reads = 0.0, 0

    def __init__(self, monkeypatch, folder, reading, restoring):
        self.asked, times = [], {True: reading, False: restoring}
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(kernel, "_known", {})
        monkeypatch.setattr(kernel, "interpreted", lambda: False)
        monkeypatch.setattr(kernel, "_capturing", lambda device: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(kernel, "_has_tensor_cores", lambda device: True)
        monkeypatch.setattr(kernel, "_read", self.read)
        monkeypatch.setattr(kernel, "restored", lambda prepared, dtype: torch.zeros(48, 64, dtype=dtype))

        def bench(run):
            before = self.reads
            run()
            self.asked += ["read"] * (self.reads > before)
            return times[self.reads > before]

        monkeypatch.setattr(kernel._programs().triton.testing, "do_bench", bench)

    def read(self, x, prepared):
        self.reads += 1
        return x.new_zeros(len(x), 48) + self.off


@pytest.mark.parametrize(("reading", "restoring"), [(1.0, 2.0), (2.0, 1.0)])
def test_what_is_faster_is_measured_once(reading, restoring, monkeypatch, tmp_path):
    packed, x = prepared(make(Scheme(4, 32), columns=64)), inputs(100, 64, dtype=torch.float16)
    device = Device(monkeypatch, tmp_path, reading, restoring)
    assert [kernel._reads_faster(x[:rows], packed) for rows in (100, 80)] == [reading < restoring] * 2
    assert device.asked == ["read"], "128 rows stand for all from 65 on"
    kernel._known.clear()  # another process
    assert kernel._reads_faster(x, packed) == (reading < restoring) and device.asked == ["read"]
    assert kernel._reads_faster(x[:1].expand(150, -1), packed) == (reading < restoring) and len(device.asked) == 2
    assert not kernel._reads_faster(x[:1].expand(1025, -1), packed) and len(device.asked) == 2


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch, tmp_path):
    packed, x = prepared(make(Scheme(4, 32), columns=64)), inputs(100, 64, dtype=torch.float16)
    device = Device(monkeypatch, tmp_path, 1.0, 2.0)
    monkeypatch.setattr(kernel, "_capturing", lambda device: True)
    assert not kernel._reads_faster(x, packed) and not device.asked and not kernel._known


def test_a_way_that_is_wrong_or_too_large_is_not_taken(monkeypatch, tmp_path):
    """Where it would be faster; the shape of a program for many rows is not the one that is tried at first."""
    packed, x = prepared(make(Scheme(4, 32), columns=64)), inputs(100, 64, dtype=torch.float16)
    device = Device(monkeypatch, tmp_path, 1.0, 2.0)
    device.off = 1.0
    assert not kernel._reads_faster(x, packed)

    def too_large(x, prepared):
        raise kernel._programs().triton.runtime.errors.OutOfResources(131072, 101376, "shared memory")

    monkeypatch.setattr(kernel, "_read", too_large)
    assert not kernel._reads_faster(inputs(200, 64, dtype=torch.float16), packed)


@pytest.mark.parametrize("tensor_cores", [True, False])
def test_few_rows_are_read_where_there_are_tensor_cores(tensor_cores, monkeypatch, tmp_path):
    packed, x = prepared(make(Scheme(4, 32), columns=64)), inputs(3, 64, dtype=torch.float16)
    device = Device(monkeypatch, tmp_path, 2.0, 1.0)
    monkeypatch.setattr(kernel, "_has_tensor_cores", lambda device: tensor_cores)
    assert kernel._reads_faster(x, packed) == tensor_cores and bool(device.asked) != tensor_cores


@pytest.mark.parametrize("content", ["", "[1", "3"])
def test_a_spoilt_cache_is_measured_again(content, monkeypatch, tmp_path):
    packed, x = prepared(make(Scheme(4, 32), columns=64)), inputs(100, 64, dtype=torch.float16)
    device = Device(monkeypatch, tmp_path, 1.0, 2.0)
    (tmp_path / "wellrounded").mkdir()
    (tmp_path / "wellrounded" / "triton.json").write_text(content)
    assert kernel._reads_faster(x, packed) and device.asked
    kernel._known.clear()
    assert kernel._reads_faster(x, packed) and len(device.asked) == 1


def test_shapes_are_kept_and_other_dtypes_served():
    weight = make(Scheme(4, 32), columns=64)
    assert kernel.matmul(inputs(2, 3, 64, dtype=torch.float16), prepared(weight), weight.dequantize).shape == (2, 3, 48)
    assert kernel.matmul(inputs(0, 64, dtype=torch.float16), prepared(weight), weight.dequantize).shape == (0, 48)
    x = inputs(2, 64)
    y = kernel.matmul(x, prepared(weight), weight.dequantize)
    assert y.dtype == torch.float32 and torch.equal(y, x @ weight.dequantize().T)


def test_packed_words_take_no_more_than_the_bits():
    for bits in (2, 3, 4, 8):
        words, scales, zeros, order = prepared(make(Scheme(bits, 64), rows=48, columns=128))
        assert words.numel() * 32 == 48 * 128 * bits and words.dtype == torch.int32
        assert scales.shape == (2, 48) and not zeros.numel() and not order.numel()


def need(**changes) -> Need:
    return Need(**{"scheme": Scheme(4, 64), "in_features": 64, "out_features": 48, "device": "cpu",
                   "dtype": torch.bfloat16} | changes)  # fmt: skip


def test_it_says_where_it_cannot_serve(monkeypatch):
    assert kernel.refuses(need()) is None  # interpreted
    assert "not torch.float32" in kernel.refuses(need(dtype=torch.float32))
    monkeypatch.setattr(kernel, "_programs", lambda: None)
    assert "not installed" in kernel.refuses(need())
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "it runs on GPUs, the layer is on cpu" in kernel.refuses(need())


@pytest.mark.parametrize("which", ["packed", "restore"])
def test_a_device_on_which_it_is_wrong_is_noticed(which, monkeypatch):
    programs = kernel._programs()

    class Wrong:
        def __getitem__(self, grid):
            def run(*tensors, **constants):
                tensors[4 if which == "packed" else 3].normal_()

            return run

    class Programs:
        kinds = staticmethod(programs.kinds)
        packed = Wrong() if which == "packed" else programs.packed
        restore = Wrong() if which == "restore" else programs.restore

    kernel._wrong.cache_clear()
    monkeypatch.setattr(kernel, "_programs", Programs)
    with pytest.warns(
        RuntimeWarning, match="'triton' is not used for 4 bits and torch.bfloat16: it computes something"
    ):
        assert "computes something else" in kernel.refuses(need())
    assert "computes something else" in kernel.refuses(need()), "and is not tried or warned of again"
    kernel._wrong.cache_clear()


def test_a_device_on_which_it_does_not_run_is_noticed(monkeypatch):
    class Programs:
        kinds = staticmethod(kernel._programs().kinds)

        @property
        def packed(self):
            raise RuntimeError("no such device\nat all")

    kernel._wrong.cache_clear()
    monkeypatch.setattr(kernel, "_programs", Programs)
    with pytest.warns(RuntimeWarning, match="it does not run on this cpu"):
        assert "does not run on this cpu (RuntimeError: no such device)" in kernel.refuses(need())
    kernel._wrong.cache_clear()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 64, act_order=True)], ids=str)
def test_a_layer_that_moves_to_a_gpu_is_served(scheme):
    """On one that is pretended: nothing that is multiplied with lies elsewhere."""
    weight = make(scheme, rows=64, columns=192)
    layer = QuantLinear(192, 64, scheme, "gptq_v2", True, "a layer", dtype=torch.float16)
    bias = inputs(64, dtype=torch.float16)
    layer.load_state_dict(gptq_format.to_tensors(weight, "gptq_v2") | {"bias": bias})
    x = inputs(3, 192, dtype=torch.float16)
    with pretend.gpu():
        layer.to("cuda")
        y = layer(x.to("cuda"))
        assert y.is_cuda and layer.kernel == "triton"
        with pytest.raises(RuntimeError, match="device"):
            layer(x)
        assert_is_product(y.cpu() - bias, x, weight)
        assert not layer.to("cpu")(x).is_cuda
