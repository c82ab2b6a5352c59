"""kill -9 at any moment: the same command goes on, ends with the same bytes, and nothing is left over but the log.

Every child dies by SIGKILL when it is about to do the k-th thing to the disk: for the writer alone with every k there
is, for whole quantizations with random ones. Python tells of nearly all of them itself (audit events).
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tiny
from wellrounded import writer as writing
from wellrounded.checkpoint import Reader, Writer
from wellrounded.errors import UsageError
from wellrounded.report import Report

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

REQUEST = {"source": "llama", "bits": 4}
PARTS = ["outside", *(f"layers.{i}" for i in range(4))]
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.copyfile"}
DONE, KILLED, FAILED = 0, -signal.SIGKILL, 7


def kill_at(step: int, below: Path) -> None:
    """From here on: SIGKILL before the `step`-th (from 1) thing that happens to a path below this one, or is synced."""
    left = [step]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event == "os.truncate" or (event in EVENTS and any(str(below) in str(arg) for arg in args[:2])):
            count()

    def half(handle: int, data: bytes, write=os.write) -> int:
        """A write is cut off in the middle."""
        if left[0] == 1:
            write(handle, data[: len(data) // 2])
        count()
        return write(handle, data)

    os.fsync, os.write = lambda handle: count(), half
    sys.addaudithook(hook)


class Ended(NamedTuple):
    """How a child ended, and the exception that it ended with."""

    how: int
    said: str


def in_child(work, step: int = 0, below: Path = Path("/")) -> Ended:
    """Do `work` in a child process, killed at its `step`-th thing unless that is 0."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if step:
                kill_at(step, below)
            work()
            os._exit(DONE)
        except BaseException as error:
            os.write(its, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(FAILED)  # never back into pytest
    os.close(its)
    with open(ours, encoding="utf-8") as pipe:  # noqa: PTH123
        said = pipe.read()
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a result, without what holds times and places."""
    own = {"quantization_report.json", "README.md"}
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in own}


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {out.name, f"{out.name}.log"}


@pytest.fixture(autouse=True, scope="module")
def unsynced():
    """What is not synced survives a kill as well, only not a power cut; thousands of times it would take a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@contextmanager
def shards_of(size: int):
    """While the block runs, shards are that small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "SHARD_BYTES", size)
        yield


# ---- the writer, at every step ----


def tensors(part: str) -> dict[str, torch.Tensor]:
    random_ = torch.Generator().manual_seed(PARTS.index(part))
    return {f"{part}.w": torch.randn(10, 30, generator=random_), f"{part}.odd": torch.ones(3, dtype=torch.uint8)}


@shards_of(3000)
def write(out: Path, force: bool = False, fresh: bool = False, request: Any = REQUEST, amends: bool = False) -> None:
    """A whole run: parts of about 1.4 kB in shards of 3 kB, a temporary file, and a few other files.

    One that `amends` keeps a state, and replaces a tensor of every other part when all are written.
    """
    writer = Writer(out, request, force, fresh)
    if writer.complete:
        return
    if not writer.run:
        writer.note_run({"batch": 4})
    writer.scratch.mkdir(exist_ok=True)
    (writer.scratch / "activations").write_bytes(b"1" * 100)
    for part in PARTS:
        if part not in writer.finished:
            writer.add(part, tensors(part), None if part == "outside" else [part])
        assert set(writer.read_part(part)) == set(tensors(part))
    assert writer.run == {"batch": 4}
    if amends and writer.amended is None:
        writer.state("training").write_bytes(b"1" * 100)
        writer.amend({f"{part}.w": -tensors(part)[f"{part}.w"] for part in PARTS[::2]}, {"steps": 4})
    assert writer.amended == ({"steps": 4} if amends else None)

    def rest(directory: Path) -> None:
        (directory / "sub").mkdir()
        for name in ("sub/params.json", "config.json"):
            (directory / name).write_text("{}")

    writer.finish(PARTS, rest)


def old(out: Path) -> None:
    out.mkdir()
    (out / "old.txt").write_text("old")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    write(out)
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    return contents(out)


def go_on(out: Path, force: bool) -> None:
    """The same command, after a kill. Without --force it says that OUT exists if all had been done already."""
    try:
        write(out, force)
    except UsageError as error:
        assert not force and "exists and is not empty" in str(error)


@pytest.mark.parametrize("force", [False, True])
def test_the_writer_goes_on_after_a_kill_at_every_step(tmp_path, undisturbed, force):
    step = 0
    while True:
        step += 1
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        if force:
            old(out)
        ended = in_child(lambda out=out: write(out, force), step, tmp_path).how
        new_old_or_both(out, undisturbed, force, step)
        go_on(out, force)
        assert contents(out) == undisturbed and not beside(out), f"killed at step {step}"
        if ended == DONE:
            break
        assert ended == KILLED
    assert step > 80, "the kills came too seldom to mean anything"


def new_old_or_both(out: Path, undisturbed: dict[str, bytes], force: bool, step: int) -> None:
    """What is at OUT is complete, and until the new result is there, the old one is somewhere."""
    if out.exists() and contents(out) == undisturbed:
        return
    assert force or not out.exists(), f"step {step}: OUT is there and not complete"
    places = [out / "old.txt", out.with_name("out.partial") / "replaced" / "old.txt"]
    assert not force or any(place.exists() for place in places), f"step {step}: the old result is lost"


def test_what_is_replaced_at_the_end_is_all_replaced_after_a_kill_at_every_step(tmp_path, undisturbed):
    write(tmp_path / "whole" / "out", amends=True)
    whole = contents(tmp_path / "whole" / "out")
    assert whole.keys() == undisturbed.keys()
    assert sum(whole[name] != undisturbed[name] for name in whole) == 3, "every shard holds what was replaced"
    ended, step = KILLED, 0
    while ended == KILLED:
        step += 1
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        ended = in_child(lambda out=out: write(out, amends=True), step, tmp_path).how
        assert not out.exists() or contents(out) == whole, f"step {step}: OUT is there and not complete"
        with suppress(UsageError):  # it exists: all had been done
            write(out, amends=True)
        assert contents(out) == whole and not beside(out), f"killed at step {step}"
    assert ended == DONE and step > 90


@pytest.mark.parametrize("stopped", ["before the swap", "in the swap"])
def test_a_run_killed_at_its_end_may_be_killed_again_at_every_step(tmp_path, undisturbed, stopped):
    first = tmp_path / "first" / "out"
    first.parent.mkdir()
    old(first)

    def work() -> None:
        if stopped == "in the swap":
            rename = Path.rename
            Path.rename = lambda a, b: kill() if a.name == "ready" else rename(a, b)
        else:
            Writer._swap = lambda self: kill()
        write(first, True)

    assert in_child(work).how == KILLED and (first.with_name("out.partial") / "ready").exists()
    ended, step = KILLED, 0
    while ended == KILLED:
        step += 1
        out = shutil.copytree(first.parent, tmp_path / str(step)) / "out"
        ended = in_child(lambda out=out: write(out, True), step, tmp_path).how
        new_old_or_both(out, undisturbed, True, step)
        go_on(out, True)
        assert contents(out) == undisturbed and not beside(out), f"killed at step {step}"
    assert ended == DONE and step > 15


def test_a_result_that_was_taken_elsewhere_before_all_was_tidied_up_is_made_again(tmp_path, undisturbed):
    out = tmp_path / "out"

    def work() -> None:
        Writer._clean = lambda self: kill()
        write(out)

    assert in_child(work).how == KILLED and beside(out) == {"out.partial"}
    for part in out.with_name("out.partial").glob("shard-*"):
        part.unlink()  # tidying up had begun
    out.rename(tmp_path / "elsewhere")
    write(out)
    assert contents(out) == contents(tmp_path / "elsewhere") == undisturbed and beside(out) == {"elsewhere"}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_starting_over_may_be_killed_at_every_step(tmp_path, undisturbed):
    """What was there is there, or nothing: never a journal of parts that are gone."""
    ended, step = KILLED, 0
    while ended == KILLED and step < 40:
        step += 1
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        earlier = Writer(out, REQUEST)
        for part in PARTS[:3]:
            earlier.add(part, tensors(part), [part])
        earlier.close()
        ended = in_child(lambda out=out: Writer(out, {"bits": 3}, fresh=True), step, tmp_path).how
        try:
            following = Writer(out, REQUEST)
        except UsageError as error:
            assert "bits: was 3, now 4" in str(error)
            continue
        assert len(following.finished) in (0, 3)
        following.close()
        write(out)
        assert contents(out) == undisturbed
    assert ended == DONE and step > 8


@pytest.mark.parametrize("seed", range(12))
def test_the_writer_goes_on_after_being_killed_again_and_again(tmp_path, undisturbed, seed):
    steps, out, force = random.Random(seed), tmp_path / "out", seed % 2 == 1
    if force:
        old(out)
    for _ in range(8):
        if in_child(lambda: write(out, force), steps.randint(1, 60), tmp_path).how == DONE:
            break
    if not (out.exists() and contents(out) == undisturbed and not beside(out)):
        go_on(out, force)
    assert contents(out) == undisturbed and not beside(out)


@pytest.mark.parametrize("size", [1, 100, 700, 1300, 1500, 2500])
@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_a_write_that_ends_in_the_middle_of_a_file(tmp_path, undisturbed, size, full):
    """No file may grow beyond `size`: the process is killed there, or told so."""
    out = tmp_path / "out"

    def limited() -> None:
        if not full:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        write(out)

    ended, said = in_child(limited)
    assert ended == (FAILED if full else -signal.SIGXFSZ)
    if full:
        assert said.startswith("CheckpointError: writing ") and os.strerror(errno.EFBIG) in said
        assert "finished blocks are kept, make room or fix the permissions and run the same command again" in said
        assert not list(tmp_path.rglob("*.writing"))
    go_on(out, False)
    assert contents(out) == undisturbed and not beside(out)


# ---- whole quantizations ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("kill")
    (home / "text.txt").write_text("".join(f"{i} {tiny.TEXT}" for i in range(120)))
    return tiny.save(tiny.build("llama", torch.bfloat16, num_hidden_layers=4), home / "model")


def quantize(model: Path, out: Path, force: bool = False) -> Report:
    torch.set_num_threads(1)  # threads do not survive a fork
    with shards_of(80_000):
        return tiny.quantize(model, out, force=force)


@pytest.fixture(scope="module")
def whole(model):
    """What a run makes that nobody disturbs, and how many steps it takes."""
    out = model.parent / "whole"
    quantize(model, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    return contents(out)


@pytest.mark.parametrize("seed", range(6))
def test_a_quantization_goes_on_after_being_killed_again_and_again(model, whole, tmp_path, seed):
    steps, out, force = random.Random(seed), tmp_path / "out", seed % 2 == 1
    if force:
        old(out)
    kills = 0
    for _ in range(5):
        if out.exists() and contents(out) == whole:
            break
        kills += in_child(lambda: quantize(model, out, force), steps.randint(1, 70), tmp_path).how == KILLED
    assert kills >= 2
    if out.with_name("out.partial").exists():
        assert in_child(lambda: quantize(model, out, force)).how == DONE
    assert contents(out) == whole and not beside(out)
    log = (tmp_path / "out.log").read_text()
    assert log.count("wellrounded 0.1.0: quantize(") >= 3 and "Traceback" not in log


def test_a_run_killed_while_tidying_up_gives_the_report_that_it_had_made(model, whole, tmp_path):
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        Writer._clean = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        quantize(model, out)
        os._exit(FAILED)
    os.waitpid(child, 0)
    assert beside(out) == {"out.partial"} and contents(out) == whole
    made = json.loads((out / "quantization_report.json").read_text())
    report = quantize(model, out)
    assert json.loads(json.dumps(report.to_dict())) == made
    assert contents(out) == whole and not beside(out)
    with pytest.raises(UsageError, match="exists and is not empty"):
        quantize(model, out)


def test_a_real_process_killed_at_random_moments_ends_with_the_same_bytes(model, tmp_path):
    command = [sys.executable, "-m", "wellrounded", "quantize", str(model), "--calibration",
               str(model.parent / "text.txt"), "--samples", "32", "--length", "64", "-o"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    subprocess.run([*command, tmp_path / "undisturbed"], check=True, capture_output=True, env=environment)
    took = time.perf_counter() - started
    out, moments = tmp_path / "out", random.Random(0)
    for _ in range(2):
        child = subprocess.Popen([*command, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        time.sleep(took * moments.uniform(0.6, 0.95))
        child.kill()
        child.wait()
    if not out.exists() or (tmp_path / "out.partial").exists():
        subprocess.run([*command, out], check=True, capture_output=True, env=environment)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert {p.name for p in tmp_path.iterdir()} == {"undisturbed", "undisturbed.log", "out", "out.log"}
    assert Reader(out).places
