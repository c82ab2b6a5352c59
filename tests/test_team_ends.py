"""How a run of several processes ends: what ends one ends all in seconds, is said once, and the next one goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tiny
import wellrounded as wr
from teams import child, ended, quantize, run, together
from wellrounded import blockwise, pipeline, team
from wellrounded.checkpoint import Reader, Source, Writer
from wellrounded.cli import main
from wellrounded.errors import CheckpointError, NumericsError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
AGAIN = "finished blocks are kept, run the same command again, with as many processes as you like"
QUICK = 15  # seconds: far below the two hours that processes wait for each other


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(
        tiny.build("llama", torch.bfloat16, num_hidden_layers=4), tmp_path_factory.mktemp("ends") / "model"
    )


@pytest.fixture(scope="module")
def whole(model):
    """What a single process makes."""
    quantize(model, model.parent / "whole")
    return model.parent / "whole"


def at_block(index, happens):
    """From here on, `happens()` when the second set of layers of block `index` has been solved."""
    solve, seen = blockwise.Blockwise.solve, []

    def wrapped(self, members):
        yield from solve(self, members)
        seen.extend(name for member in members for name in member.names if f".layers.{index}." in name)
        if len(seen) > 3:
            seen.clear()
            happens()

    blockwise.Blockwise.solve = wrapped


def only(who, happens, index=2):
    """What `run` is to do before: in process `who`, that happens in the middle of a block."""
    return lambda rank: at_block(index, happens) if rank == who else None


def failing(error):
    def fail():
        raise error

    return fail


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def parts(out: Path) -> dict[str, bytes]:
    """The finished blocks of an unfinished run."""
    return {path.name: path.read_bytes() for path in out.with_name("out.partial").glob("*.part")}


def assert_goes_on(model, out, whole, size):
    """Another run, of `size` processes, ends what lies in out.partial, and leaves what is finished as it is."""
    before = parts(out)
    assert {"model.layers.0.part", "model.layers.1.part"} <= before.keys() and "model.layers.2.part" not in before
    kept = Reader(out.with_name("out.partial"), [out.with_name("out.partial") / name for name in before])
    stored = {name: kept.read(name) for name in kept.places}
    found = run(model, out, size) if size > 1 else [child_result(lambda: quantize(model, out))]
    assert [one.error for one in found] == [""] * size
    tensors = tiny.tensors(out)
    assert stored and all(torch.equal(tensors[name], stored[name]) for name in stored), "finished blocks have changed"
    assert tensors.keys() == tiny.tensors(whole).keys()
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert {path.name for path in out.parent.iterdir()} == {"out", "out.log"}
    assert torch.isfinite(tiny.logits(wr.load(out, kernel="reference"))).all()
    assert {layer.tokens for layer in found[0].result.layers} == {64 * tiny.LENGTH}


def child_result(work):
    return ended([child(work, {})], 40)[0]


# ---- a process that is gone ----


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_is_killed_ends_all_and_the_next_run_goes_on(who, size, model, whole, tmp_path):
    started = time.monotonic()
    found = run(model, tmp_path / "out", size, before=only(who, die))
    assert time.monotonic() - started < QUICK
    assert found[who].how == -signal.SIGKILL
    for rank, one in enumerate(found):
        if rank != who:
            assert one.error.startswith(f"Lost: another process of this run has ended, and so does this one; {AGAIN}")
            assert one.said == (rank < 2), "the first says it, and the second, because it may be the first that is gone"
    assert_goes_on(model, tmp_path / "out", whole, {(0, 2): 1, (1, 2): 3, (0, 3): 2, (1, 3): 1}[who, size])


def test_a_process_that_is_told_to_stop_does_so_at_once(model, whole, tmp_path):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    started = time.monotonic()
    found = run(model, tmp_path / "out", before=only(0, stop))
    assert time.monotonic() - started < QUICK
    assert found[0].error == f"Lost: stopped by SIGTERM, which torchrun sends when another process has ended; {AGAIN}"
    assert found[1].error.startswith("Lost: another process")
    log = (tmp_path / "out.log").read_text()
    assert "ERROR stopped by SIGTERM" in log
    assert_goes_on(model, tmp_path / "out", whole, 2)


def test_a_run_killed_while_tidying_up_gives_its_report_to_all(model, tmp_path):
    def before(rank):
        Writer._clean = lambda self: die()

    found = run(model, tmp_path / "out", before=before)
    assert found[0].how == -signal.SIGKILL and found[1].error.startswith("Lost: ")
    again = run(model, tmp_path / "out")
    assert [one.error for one in again] == ["", ""]
    assert again[0].result.to_dict() == again[1].result.to_dict() and len(again[0].result.layers) == 28
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.log"}


def test_a_result_that_is_complete_counts_though_the_others_have_ended(model, tmp_path):
    def before(rank):
        if rank:
            quantize_ = pipeline.Run.quantize
            pipeline.Run.quantize = lambda *args: (quantize_(*args), die())

    found = run(model, tmp_path / "out", before=before)
    assert found[1].how == -signal.SIGKILL and found[0].error == "" and found[0].result.out == str(tmp_path / "out")
    assert Reader(tmp_path / "out").places


# ---- a process that fails ----


FAILURES = {
    "NaN": NumericsError("its output holds NaN"),
    "damaged": CheckpointError("the file has changed"),
    "bug": ZeroDivisionError("by zero"),
}


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("kind", FAILURES)
def test_what_fails_in_one_process_is_said_once_and_logged(kind, who, model, whole, tmp_path):
    started, error = time.monotonic(), FAILURES[kind]
    found = run(model, tmp_path / "out", 3, before=only(who, failing(error)))
    assert time.monotonic() - started < QUICK
    own = f"{type(error).__name__}: {error}"
    told = str(error) if kind != "bug" else own
    assert found[who].error == own
    for rank, one in enumerate(found):
        if rank != who:
            assert one.error == f"Lost: {'' if who == 0 else f'process {who} of 3: '}{told}" and one.code == 1
        assert one.said == (rank == 0 and not (kind == "bug" and who == 0)), "Python itself shows a bug"
    assert str(error) in (tmp_path / "out.log").read_text()
    if kind == "NaN":
        assert_goes_on(model, tmp_path / "out", whole, 2)


LACK = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def at_place(who, layer):
    """From here on, process `who` has no memory for the weight of `layer`, which is solved, the first time."""
    place, failed = blockwise.Blockwise.place, []

    def scarce(self, name, quantized):
        if name == layer and self.team.rank == who and not failed:
            failed.append(name)
            raise RuntimeError(f"{LACK}\nmore")
        place(self, name, quantized)

    blockwise.Blockwise.place = scarce


def once(happens):
    seen = []

    def happen():
        if not seen:
            seen.append(True)
            happens()

    return happen


@pytest.mark.parametrize("where", ["solving", "placing"])
@pytest.mark.parametrize("who", [0, 1])
def test_where_memory_runs_out_in_one_process_all_go_on_with_less(who, where, model, whole, tmp_path):
    """Also where the others have a layer already that one has no place for: all of them solve it again."""
    lacking = only(who, once(failing(RuntimeError(f"{LACK}\nmore"))))
    before = lacking if where == "solving" else lambda rank: at_place(who, "model.layers.2.self_attn.v_proj")
    found = run(model, tmp_path / "out", before=before)
    assert [one.error for one in found] == ["", ""]
    log = (tmp_path / "out.log").read_text()
    said = f"out of memory at model.layers.2 ({'process 1 of 2: ' if who else ''}{LACK}): going on with half the batch"
    assert log.count("out of memory") == 1 and said in log
    mine, theirs = found[0].result.layers, wr.report.Report.read(whole).layers
    assert [layer.name for layer in mine] == [layer.name for layer in theirs], "each layer once"
    assert all(abs(one.error_db - other.error_db) < 0.3 for one, other in zip(mine, theirs))
    logits = [tiny.logits(wr.load(out, kernel="reference")) for out in (tmp_path / "out", whole)]
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[1].norm()
    assert tiny.stored_weights(tmp_path / "out").keys() == {layer.name for layer in mine}


@pytest.mark.parametrize("who", [0, 1])
def test_memory_that_does_not_suffice_for_one_window_of_a_process_ends_all(who, model, whole, tmp_path):
    def before(rank):
        blockwise.Blockwise.place = scarce if rank == who else blockwise.Blockwise.place

    def scarce(self, name, quantized, place=blockwise.Blockwise.place):
        if name == "model.layers.2.mlp.down_proj":
            raise RuntimeError(f"{LACK}\nmore")
        place(self, name, quantized)

    found = run(model, tmp_path / "out", before=before)
    why = f"model.layers.2: memory does not suffice for a single window ({'process 1 of 2: ' if who else ''}{LACK})"
    assert all(one.error.startswith(f"OutOfMemory: {why}; finished blocks are kept") for one in found)
    assert [one.said for one in found] == [True, False]
    assert_goes_on(model, tmp_path / "out", whole, 1)


def test_a_source_that_has_changed_under_one_process_ends_all(model, tmp_path):
    def before(rank):
        if rank == 1:
            Source.__init__.__globals__["Source"].verify = property(
                lambda self: failing(CheckpointError("model.safetensors has changed")), lambda self, value: None
            )

    found = run(model, tmp_path / "out", before=before)
    assert found[0].error == "Lost: process 1 of 2: model.safetensors has changed"


def test_a_failure_where_nothing_can_be_told_any_more_ends_the_others_too(model, tmp_path):
    """In the middle of an exchange the others are at, another one would be misunderstood."""

    def before(rank):
        if rank == 1:
            team.Hessian.sum_over = lambda self, reduce: failing(ZeroDivisionError("by zero"))()

    started = time.monotonic()
    found = run(model, tmp_path / "out", before=before)
    assert time.monotonic() - started < QUICK
    assert found[1].error == "ZeroDivisionError: by zero" and found[0].error.startswith("Lost: another process")


REFUSED = {
    "no such layer": ({"ignore": ["nothing"]}, r"ignore='nothing' was asked for, but no layer's name holds it"),
    "few windows": (
        {"calibration": tiny.ids(70, 1024), "samples": 2, "length": 256},
        r"3 processes were started, but there are only 2 windows to share; start fewer \(--nproc-per-node\)",
    ),
    "two passes": ({"settings": wr.Settings(true_sequential=False)}, r"true_sequential=False was asked of several"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_all_refuse_is_refused_once(case, model, tmp_path):
    options, sentence = REFUSED[case]
    found = run(model, tmp_path / "out", 3, **options)
    assert all(re.search(sentence, one.error) for one in found), found
    assert [one.said for one in found] == [True, False, False]
    assert [one.code for one in found] == [2, 2, 2] and not list(tmp_path.iterdir())


def test_a_directory_that_is_taken_is_refused_once(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    found = run(model, tmp_path / "out")
    assert all("exists and is not empty" in one.error and one.code == 2 for one in found)
    assert [one.said for one in found] == [True, False] and not (tmp_path / "out.log").exists()


@pytest.mark.parametrize("other", ["data", "model"])
def test_processes_that_were_given_different_things_refuse(other, model, tmp_path):
    def work(rank):
        mine = {"calibration": tiny.ids(seed=rank)} if other == "data" else {"only": [f"layers.{rank}"]}
        return quantize(model, tmp_path / "out", **mine)

    found = together(work)
    said = "read different calibration data" if other == "data" else "opened different models"
    assert all(said in one.error for one in found) and [one.said for one in found] == [True, False]


# ---- beside other programs ----


def test_a_program_that_has_connected_its_processes_makes_runs_of_its_own(model, whole, tmp_path):
    def work(rank):
        dist.init_process_group("gloo")
        report = quantize(model, tmp_path / f"out{rank}")
        assert dist.is_initialized() and dist.get_world_size() == 2
        return report

    assert [one.error for one in together(work)] == ["", ""]
    for rank in range(2):
        expected, found = tiny.tensors(whole), tiny.tensors(tmp_path / f"out{rank}")
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_one_program_may_make_several_runs(model, tmp_path):
    def work(rank):
        before = signal.getsignal(signal.SIGTERM)
        both = [quantize(model, tmp_path / f"out{bits}", bits=bits) for bits in (4, 8)]
        assert not dist.is_initialized() and signal.getsignal(signal.SIGTERM) is before
        return [report.scheme for report in both]

    assert [one.result for one in together(work)] == [["4-bit g32 sym", "8-bit g32 sym"]] * 2


def test_processes_that_cannot_be_connected_are_told_of_torchrun(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(wr.errors.UsageError, match=r"WORLD_SIZE=2 says .* start them with torchrun, or one without"):
        quantize(model, tmp_path / "out")
    assert not dist.is_initialized()


# ---- torchrun itself ----


def torchrun(size, *arguments) -> list:
    """As a user starts it, from Python so that it is this environment's."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", "0", "--standalone"]
    return [sys.executable, *launch, "-m", "wellrounded", "quantize", *arguments]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    home = tmp_path_factory.mktemp("torchrun")
    (home / "text.txt").write_text("".join(f"{i} {tiny.TEXT}" for i in range(120)))
    tiny.save(tiny.build("llama", torch.bfloat16, num_hidden_layers=12), home / "model")
    data = ["--calibration", home / "text.txt", "--samples", "32", "--length", "64", "--group-size", "32"]
    return [home / "model", *data, "-o"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.parametrize("who", [0, 1])
def test_torchrun_whose_process_is_killed_ends_with_a_sentence_and_goes_on(who, arguments, tmp_path):
    out, size = tmp_path / "out", 2
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen(torchrun(size, *arguments, out), **pipes) as launcher:
        while not (tmp_path / "out.partial" / "model.layers.2.part").exists():
            assert launcher.poll() is None, "\n".join(launcher.communicate())
            time.sleep(0.005)
        workers = {rank_of(pid): pid for pid in children(launcher.pid)}
        os.kill(workers[who], signal.SIGKILL)
        started = time.monotonic()
        stdout, stderr = launcher.communicate(timeout=60)
        assert time.monotonic() - started < QUICK
        assert launcher.returncode == 1 and stdout == ""
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    assert f"{AGAIN}" in stderr and "Signal 9 (SIGKILL)" in stderr
    before = set(parts(out))
    assert len(before) > 3 and not out.exists()
    if who == 0:
        return
    again = subprocess.run(torchrun(3, *arguments, out, "--json"), capture_output=True, text=True, env=ENVIRONMENT)
    assert again.returncode in (0, 3), again.stderr
    assert_one_voice(again, out)
    assert "going on after" in (tmp_path / "out.log").read_text()


def assert_one_voice(process, out):
    """One object on stdout, every block once on stderr, and nothing beside the result but its log."""
    report = json.loads(process.stdout)
    assert len(report["layers"]) == 12 * 7 and report["out"] == str(out)
    blocks = re.findall(r"quantizing, block: (\d+)/12", process.stderr)
    assert blocks == [str(number) for number in range(1, 13)]
    assert {path.name for path in out.parent.iterdir()} == {"out", "out.log"}
    assert len(Reader(out).places) > 12 * 7


def test_torchrun_says_once_what_is_wrong(arguments, tmp_path):
    wrong = torchrun(2, *arguments, tmp_path / "out", "--ignore", "nothing")
    found = subprocess.run(wrong, capture_output=True, text=True, env=ENVIRONMENT)
    assert found.returncode == 1 and found.stdout == "" and not list(tmp_path.iterdir())
    assert found.stderr.count("wellrounded quantize: ") == found.stderr.count("'nothing' was asked for") == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "wrong", [["--bits", "5"], ["--bits", "five"], ["--calibration", "none", "--calibration", "c4"]]
)
def test_what_is_wrong_for_all_before_they_are_connected_is_said_by_the_first(rank, wrong, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as ended_with:
        sys.exit(main(["quantize", "model", "-o", "out", *wrong]))
    assert ended_with.value.code == 2
    assert ("wellrounded quantize: " in capsys.readouterr().err) == (rank == 0)


def test_what_a_run_would_take_is_said_by_the_first(model, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["quantize", str(model), "--dry-run", "--calibration", "none"]) == 0
        assert bool(capsys.readouterr().out) == (rank == 0)
