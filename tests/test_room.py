"""How much a run keeps in memory changes nothing but the time, and is foretold; running out of it ends nothing."""

import ctypes
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import tiny
import tiny_configs
import wellrounded as wr
from wellrounded import memory, prediction, request, solving
from wellrounded.checkpoint import Reader, Writer
from wellrounded.errors import CheckpointError, OutOfMemory, UsageError
from wellrounded.hf.headers import open_headers
from wellrounded.hf.source import open_source
from wellrounded.memory import exhausted, keep_few_products, parse_size
from wellrounded.model import stream
from wellrounded.model.walk import BlockWalk
from wellrounded.prediction import Forecaster, Room, Workload, rooms
from wellrounded.presets import preset
from wellrounded.report import Report
from wellrounded.request import Request

FULL = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


def run_in(room, source, out, settings=None, padded=False, **options) -> list[str]:
    """Quantize in this room; what was said on the way."""
    said = []
    asked = Request(calibration=data(padded), samples=64, length=tiny.LENGTH, device="cpu", **options)
    run = asked.run(open_source(source, tiny.tokenizer()))
    run.work.room = room
    writer = Writer(out, {})
    try:
        run.write(writer, lambda progress: said.append(progress.message))
    finally:
        writer.abandon()
    return [message for message in said if message]


def data(padded):
    ids = tiny.ids()
    if not padded:
        return ids
    masks = torch.ones_like(ids)
    masks[::3, -5:] = 0
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks)]


def weights(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


# ---- the same result ----

FRUGAL = [Room(waits=False), Room(spills=True), Room(waits=False, spills=True), Room(waits=False, maps=True)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "mixtral"])
def test_what_is_kept_in_memory_changes_no_bit_of_the_result(kind, padded, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "LARGE", 65)
    model = tiny_configs.build(kind).bfloat16()
    run_in(Room(), model, tmp_path / "fast", padded=padded)
    expected = weights(tmp_path / "fast")
    for number, room in enumerate(FRUGAL):
        run_in(room, model, tmp_path / str(number), padded=padded)
        assert weights(tmp_path / str(number)) == expected, room
        assert not list(tmp_path.glob("*.partial"))


def test_a_smaller_batch_changes_only_the_order_of_sums(llama, quantized, tmp_path):
    run_in(Room(batch_tokens=tiny.LENGTH), llama, tmp_path / "out")
    assert_close(tmp_path / "out", quantized)


def assert_close(out, expected):
    """Where a tie falls the other way codes differ, and what follows makes up for it: errors stay what they were."""
    mine, theirs = (Report.read(directory).layers for directory in (out, expected))
    assert [layer.name for layer in mine] == [layer.name for layer in theirs]
    for layer, other in zip(mine, theirs):
        assert (layer.tokens, layer.fallback) == (other.tokens, None)
        assert layer.error_db == pytest.approx(other.error_db, abs=0.25), layer.name


def test_a_disk_too_small_for_a_matrix_is_said(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(CheckpointError, match=r"making .*matrix-.*: No space left on device; finished blocks are kept"):
        stream.mapped(tmp_path)(stream.LARGE, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


# ---- running out of it ----


@pytest.fixture
def narrow(monkeypatch):
    """Memory suffices for batches of so many windows in a block of this number, and for all of them elsewhere."""

    def patch(windows: int, block: int = 1) -> list[int]:
        run, tried = BlockWalk._run, []

        def scarce(walk, index, stream, batch, **instead):
            if index == block and len(stream.ids[batch]) > windows:
                tried.append(len(stream.ids[batch]))
                raise RuntimeError(FULL)
            return run(walk, index, stream, batch, **instead)

        monkeypatch.setattr(BlockWalk, "_run", scarce)
        return tried

    return patch


@pytest.mark.parametrize("room", [Room(16 * tiny.LENGTH), Room(16 * tiny.LENGTH, waits=False, spills=True)])
def test_a_failed_allocation_halves_the_batch_and_the_run_goes_on(room, narrow, llama, quantized, tmp_path):
    tried = narrow(windows=4)
    said = run_in(room, llama, tmp_path / "out")
    assert tried and set(tried) == {16, 8}
    assert len(said) == 2 and all("out of memory at model.layers.1 (" in message for message in said)
    assert "half the batch" in said[0]
    assert_close(tmp_path / "out", quantized)


@pytest.mark.parametrize("layer", ["q_proj", "o_proj", "down_proj"])
def test_what_was_solved_before_memory_ran_out_is_not_solved_again(layer, llama, quantized, tmp_path, monkeypatch):
    solved, solve, failed = [], solving._solutions, []

    def scarce(names, *args):
        if any(layer in name for name in names[0]) and "layers.1." in names[0][0] and not failed:
            failed.append(names)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes")
        solved.extend(names[0])
        return original(names, *args)

    original = solving.solve
    monkeypatch.setattr("wellrounded.blockwise.solve", scarce)
    said = run_in(Room(), llama, tmp_path / "out")
    assert failed and len(said) == 1 and solve is solving._solutions
    assert len(solved) == len(set(solved)) == 21, "every layer once"
    assert_close(tmp_path / "out", quantized)


def test_single_windows_no_longer_wait_when_memory_runs_out(llama, quantized, tmp_path, monkeypatch):
    run, failed = BlockWalk._run, []

    def scarce(walk, index, stream, batch, **instead):
        if index == 1 and batch == 40 and not failed:
            failed.append(batch)
            raise RuntimeError(FULL)
        return run(walk, index, stream, batch, **instead)

    monkeypatch.setattr(BlockWalk, "_run", scarce)
    (said,) = run_in(Room(tiny.LENGTH), llama, tmp_path / "out")
    assert failed and said.endswith("going on with single windows, none of which waits for others")
    assert_close(tmp_path / "out", quantized)


def test_memory_that_does_not_suffice_for_a_window_ends_the_run_and_keeps_its_blocks(narrow, llama, tmp_path):
    narrow(windows=0)
    with pytest.raises(OutOfMemory, match=r"model\.layers\.1: memory does not suffice .* are kept"):
        run_in(Room(), llama, tmp_path / "out")
    assert list(Writer(tmp_path / "out", {}).finished) == ["outside", "model.layers.0"]


def test_other_errors_are_not_taken_for_a_lack_of_memory(llama, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("wellrounded.blockwise.solve", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_in(Room(), llama, tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError(FULL), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_a_lack_of_memory_is_known_by_its_words(error, is_it):
    assert exhausted(error) is is_it


def test_a_real_allocation_that_fails_is_recognized():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert exhausted(failed.value)


# ---- a limit ----


SMALL = Workload(64, 8, 32)


def forecaster(model, work=SMALL, name="fast", **options) -> Forecaster:
    asked = Request(calibration="none", device="cpu", preset=name, **options)
    run = asked.run(open_headers(model))
    return Forecaster(run.source, run.plan, run.walk.names, work, "cpu", base=2**20, preset=preset(name))


@pytest.mark.parametrize("name", ["fast", "default", "best"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_every_room_takes_less_than_the_one_before(kind, name):
    known = forecaster(tiny_configs.build(kind), Workload(4096, 8, 32), name)
    choices = list(rooms(4096, 32))
    peaks = [known.peak(room) for room in choices]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[1] > peaks[2] > peaks[-2]
    assert choices[-1].batch_tokens == 32 and choices[-1].maps
    for room, peak in zip(choices, peaks):
        assert known.peak(known.room(peak)) <= peak
        assert room in (known.room(peak), *choices[choices.index(known.room(peak)) :])


def test_a_limit_that_nothing_fits_into_is_refused_with_the_least_that_would_do():
    known = forecaster(tiny.build("llama"))
    least = min(known.peak(room) for room in rooms(4096, 32))
    with pytest.raises(UsageError, match=r"1 MiB of memory was allowed, but this run needs \d+ MiB at least, while"):
        known.room(2**20)
    assert known.peak(known.room(least)) == least


def test_a_limit_too_small_is_refused_before_any_work(llama, tmp_path):
    with pytest.raises(UsageError, match=r"100 MiB of memory was allowed, but this run needs"):
        tiny.quantize(llama, tmp_path / "out", max_memory="100MiB")
    assert not list(tmp_path.iterdir())


def test_what_is_free_chooses_the_room_and_warns_where_nothing_fits(llama, tmp_path, monkeypatch):
    asked = Request(calibration=tiny.ids(), samples=64, length=32, device="cpu")
    source = open_source(llama)
    roomy = asked.run(source)
    assert roomy.work.room == Room() and roomy.caution == ""
    monkeypatch.setattr(request, "rss_bytes", lambda: 0)
    known = Forecaster(source, roomy.plan, roomy.walk.names, Workload(64, 8, 32), "cpu", 0, preset("default"))
    monkeypatch.setattr(request, "free_bytes", lambda device: known.peak(Room(waits=False)))
    assert asked.run(open_source(llama)).work.room == Room(waits=False)
    monkeypatch.setattr(request, "free_bytes", lambda device: 2**20)
    poor = asked.run(open_source(llama))
    assert poor.work.room == Room(32, waits=False, spills=True, maps=True)
    assert poor.caution.startswith("only 1 MiB of memory are free, and this run is likely to need ")


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 2**32), ("4G", 2**32), ("3GB", 3 * 10**9), ("1.5 MiB", 3 * 2**19), ("1000", 1000), (77, 77), ("2b", 2)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 XB", "0", "four", "1,5GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match=r"was given as an amount of memory; give one like 4GiB"):
        parse_size(text)


def test_a_control_groups_limit_is_heeded(tmp_path, monkeypatch):
    (tmp_path / "v2/job").mkdir(parents=True)
    (tmp_path / "v2/memory.max").write_text("max\n")
    (tmp_path / "v2/job/memory.max").write_text("3000000000\n")
    (tmp_path / "groups").write_text("0::/job\n")
    monkeypatch.setattr(memory, "GROUPS", {"": (str(tmp_path / "v2"), "memory.max")})
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda path: real(tmp_path / "groups" if path == "/proc/self/cgroup" else path))
    assert list(memory._cgroup_limits()) == [3 * 10**9]
    assert memory.allowed_bytes() <= 3 * 10**9


# ---- foretold ----


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("tied", {}), ("tied", {"lm_head": True}), ("sharded", {"bits": 3, "group_size": 32, "sym": False}),
     ("llama", {"ignore": ["down_proj"]})],
)  # fmt: skip
def test_the_size_of_the_output_is_foretold_to_the_byte(name, options, request, tmp_path):
    source = request.getfixturevalue(name)
    foretold = wr.forecast(source, calibration="none", **options)
    tiny.quantize(source, tmp_path / "out", calibration="none", **options)
    assert foretold.output_bytes == Reader(tmp_path / "out").bytes
    assert foretold.disk_bytes >= foretold.output_bytes and foretold.blocks == 3


def test_of_experts_too(tmp_path):
    source = tiny.save(tiny_configs.build("qwen3_moe").bfloat16(), tmp_path / "source")
    tiny.quantize(source, tmp_path / "out", calibration="none")
    assert wr.forecast(source, calibration="none").output_bytes == Reader(tmp_path / "out").bytes


def test_a_forecast_says_what_is_alive_when(llama):
    found = wr.forecast(llama, samples=256, length=64, device="cpu")
    assert max(found.phases.values()) == found.peak_memory_bytes and found.peak_vram_bytes == 0
    assert found.phases.keys() == {"reading", "running a block", "solving", "comparing"}
    assert 0 < found.seconds < 600 and found.room == Room()
    assert [label for label, _ in found.summary()] == ["peak memory", "size", "disk", "time"]
    larger = wr.forecast(llama, samples=4096, length=64, device="cpu")
    assert larger.peak_memory_bytes > found.peak_memory_bytes and larger.seconds > found.seconds


def test_what_more_accuracy_takes_is_foretold(llama, monkeypatch):
    monkeypatch.setattr(request, "rss_bytes", lambda: 0)  # which is not the same twice
    fast, default, best = (
        wr.forecast(llama, samples=256, length=64, device="cpu", preset=name) for name in ("fast", "default", "best")
    )
    assert fast.peak_memory_bytes < default.peak_memory_bytes and fast.output_bytes == best.output_bytes
    assert best.phases.keys() - default.phases.keys() == {"rotating", "training", "writing text to train on"}
    assert all(best.phases[phase] >= bytes_ for phase, bytes_ in default.phases.items())
    assert best.disk_bytes > default.disk_bytes and best.seconds > default.seconds


def test_the_original_is_whole_in_memory_only_where_it_must_write():
    enough, some, none = (forecaster(tiny.build("llama"), replace(SMALL, further=n), "best") for n in (256, 200, 0))
    writing = [one.phases(Room()).get("writing text to train on") for one in (enough, some, none)]
    assert writing[0] is None and writing[1] == writing[2] > tiny.build("llama").get_memory_footprint()
    rates = prediction.Rates(*[1e9] * 8)
    seconds = [one._training_seconds(rates, one.training) for one in (enough, some, none)]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_what_is_compared_with_the_original_is_there_twice_and_told_apart():
    """Of a layer, 4 matrices instead of one; of one that writes to the residual stream, a sum with that, twice."""
    fast, default = (forecaster(tiny.build("llama"), SMALL, name) for name in ("fast", "default"))
    (block, *_), room = fast.blocks, Room(waits=False)
    read, (wrote,) = block.sets[0], [one for one in block.sets if one.inputs != fast.hidden]
    assert fast._matrices(read, room) == 4 * read.inputs**2 and default._matrices(read, room) == 16 * read.inputs**2
    assert default._matrices(wrote, room) == 16 * wrote.inputs**2 + 8 * fast.hidden * wrote.inputs
    assert default._kept(room) - fast._kept(room) == SMALL.tokens * fast.hidden * 2
    solved = block.bytes - 2 * wrote.inputs * wrote.outputs
    assert default._inside(block, room) - fast._inside(block, room) == solved, "the rest is in both blocks"


def test_a_forecast_is_refused_what_a_run_would_be(llama):
    with pytest.raises(UsageError, match="group_size=512 was asked for"):
        wr.forecast(llama, group_size=512)
    with pytest.raises(UsageError, match="colour: asked of a forecast, which knows no such option"):
        wr.forecast(llama, colour="red")


def test_a_gpus_memory_and_the_hosts_are_told_apart(llama):
    asked = Request(calibration="none", device="cpu").run(open_headers(llama))
    known = Forecaster(asked.source, asked.plan, asked.walk.names, Workload(64, 8, 32), "cuda", base=2**20)
    found = known.predict(Room(), prediction.Rates(*[1e9] * 8))
    assert found.peak_vram_bytes == known.peak(Room()) > prediction.CONTEXT
    assert found.peak_memory_bytes < found.peak_vram_bytes
    assert [label for label, _ in found.summary()][:2] == ["peak GPU memory", "peak memory"]


def test_a_continued_run_keeps_its_batches(llama, quantized, tmp_path):
    run = Request(calibration=tiny.ids(), samples=64, length=32, device="cpu").run(open_source(llama))
    assert run.settle({}) == "" and run.noted() == {"batch_tokens": 4096}
    assert run.settle({"batch_tokens": 64}) == "" and run.work.room == replace(Room(), batch_tokens=64)
    assert run.settle({"batch_tokens": 128}).startswith("going on in batches of 64 tokens, not 128")


def test_few_products_are_remembered_unless_somebody_said_otherwise(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # put back in the end
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    keep_few_products()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts what glibc has handed out")
def test_products_of_many_heights_do_not_add_up():
    """Torch looks at it once, before its first product: in a process of its own."""
    work = """
import ctypes, sys, torch
from wellrounded.memory import keep_few_products
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in fields]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
def used():
    return mallinfo().uordblks + mallinfo().hblkhd
if sys.argv[1] == "few":
    keep_few_products()
weight = torch.zeros(64, 64, dtype=torch.bfloat16)
def multiply(heights):
    for height in heights:
        torch.nn.functional.linear(torch.zeros(height, 64, dtype=torch.bfloat16), weight)
multiply(range(16, 16 * 80, 16))
before = used()
multiply(range(16 * 80, 16 * 400, 16))
print(used() - before)
"""
    grown = {}
    for which in ("few", "usual"):
        told = subprocess.run([sys.executable, "-c", work, which], capture_output=True, text=True, check=True)
        grown[which] = int(told.stdout)
    assert grown["few"] < max(2**20, grown["usual"] / 4), grown
