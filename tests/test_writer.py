"""Results: written part by part, joined on the way, finished in one step, and gone on with wherever they stopped."""

import errno
import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wellrounded import journal, tensorfile
from wellrounded import writer as writing
from wellrounded.checkpoint import Reader, Writer
from wellrounded.errors import CheckpointError, UsageError
from wellrounded.tensorfile import TensorFile, join

REQUEST = {"source": "llama", "bits": 4, "settings": {"damping": 0.01}}


def tensors(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    """One of every dtype that occurs."""
    random = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}qweight": torch.randint(-(2**31), 2**31 - 1, (4, 6), dtype=torch.int32, generator=random),
        f"{prefix}scales": torch.randn(2, 6, generator=random).half(),
        f"{prefix}bias": torch.randn(6, generator=random).bfloat16(),
        f"{prefix}odd": torch.randint(255, (3,), dtype=torch.uint8, generator=random),  # 3 bytes: nothing aligned after
        f"{prefix}weight": torch.randn(3, 5, generator=random),
        f"{prefix}count": torch.tensor(7),
    }


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name]), name


def written(tmp_path, parts=("outside", "layers.0", "layers.1")) -> Writer:
    """An unfinished run whose parts hold `tensors(i)`."""
    writer = Writer(tmp_path / "out", REQUEST)
    for i, part in enumerate(parts):
        writer.add(part, tensors(i, f"{part}."), None if part == "outside" else [i])
    return writer


def again(writer: Writer, **options) -> Writer:
    """What the next run finds, after this one was killed."""
    writer.close()
    return Writer(writer.out, **{"request": REQUEST, **options})


def all_tensors(parts=("outside", "layers.0", "layers.1")) -> dict[str, torch.Tensor]:
    return {name: t for i, part in enumerate(parts) for name, t in tensors(i, f"{part}.").items()}


def finish(writer: Writer, parts=("outside", "layers.0", "layers.1")):
    return writer.finish(parts, lambda directory: (directory / "config.json").write_text("{}"))


# ---- writing ----


def test_what_is_written_is_read_back_exactly(tmp_path):
    out = finish(written(tmp_path))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert_equal(load_file(out / "model.safetensors"), all_tensors())
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / "out.partial").exists()


def test_nothing_is_called_out_before_it_is_complete(tmp_path):
    writer = written(tmp_path)
    seen = []
    writer.finish(["outside"], lambda directory: seen.append((tmp_path / "out").exists()))
    assert seen == [False] and (tmp_path / "out").exists()


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    writer = Writer(tmp_path / "out", REQUEST)
    writer.add("outside", {"a": base, "b": base, "transposed": base.T, "row": base[0]})
    assert_equal(writer.read_part("outside"), {"a": base, "b": base, "transposed": base.T, "row": base[0]})


@pytest.mark.parametrize(("parts_per_shard", "shards"), [(0.5, 5), (1.5, 5), (2.5, 3)])
def test_several_shards_have_an_index(tmp_path, monkeypatch, parts_per_shard, shards):
    parts = ["a", "b", "c", "d", "e"]
    writer = Writer(tmp_path / "out", REQUEST)
    for i, part in enumerate(parts):
        writer.add(part, tensors(i, f"{part}."))
    monkeypatch.setattr(writing, "SHARD_BYTES", parts_per_shard * writer.path_of("a").stat().st_size)
    out = writer.finish(parts, lambda directory: None)
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {name: (file, t) for file in names for name, t in load_file(out / file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
    wanted = all_tensors(parts)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in wanted.values())
    assert_equal({name: t for name, (_, t) in stored.items()}, wanted)
    assert_equal({name: Reader(out).read(name) for name in wanted}, wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.int32,
                                   torch.float32, torch.int64, torch.float64, torch.float8_e4m3fn])  # fmt: skip
def test_a_file_is_what_the_safetensors_library_reads_and_would_have_written(dtype, tmp_path):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    stored = {"b": values, "a": values[0].T, "one": values[1, 1, 1], "none": values[:0], "like a": values[0].T}
    tensorfile.write(tmp_path / "ours", stored)
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name].view(torch.uint8), t.contiguous().view(torch.uint8)) if t.ndim else
               loaded[name].item() == t.item() for name, t in stored.items())  # fmt: skip
    save_file({name: t.clone().contiguous() for name, t in stored.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_tensors_of_several_widths_are_aligned(tmp_path):
    kinds = (torch.uint8, torch.float64, torch.int16, torch.float32)
    stored = {f"t{n}": torch.ones(3, dtype=dtype) for n, dtype in enumerate(kinds)}
    tensorfile.write(tmp_path / "ours", stored)
    entries, start = tensorfile.read_header(tmp_path / "ours")
    assert start % 8 == 0
    assert all(entries[name]["data_offsets"][0] % t.element_size() == 0 for name, t in stored.items())
    assert_equal(load_file(tmp_path / "ours"), stored)


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"z: safetensors files hold no torch\.complex128; convert"):
        tensorfile.write(tmp_path / "ours", {"z": torch.ones(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_joining_one_file_gives_its_tensors_byte_for_byte(tmp_path):
    save_file(tensors(), tmp_path / "part", metadata={"format": "pt"})
    join([TensorFile(tmp_path / "part")], tmp_path / "model.safetensors")
    files = [tmp_path / "part", tmp_path / "model.safetensors"]
    one, other = (path.read_bytes()[tensorfile.read_header(path)[1] :] for path in files)
    assert one == other


# ---- resuming ----


def test_a_run_goes_on_where_it_stopped(tmp_path):
    written(tmp_path, ("outside", "layers.0"))
    writer = Writer(tmp_path / "out", json.loads(json.dumps(REQUEST)))
    assert writer.finished == {"outside": None, "layers.0": [1]}
    assert_equal(writer.read_part("layers.0"), tensors(1, "layers.0."))
    writer.add("layers.1", tensors(2, "layers.1."), [2])
    assert_equal(load_file(finish(writer) / "model.safetensors"), all_tensors())


@pytest.mark.parametrize("lost", [1, 5, 20])
def test_a_last_line_that_was_cut_off_does_not_count(tmp_path, lost):
    written(tmp_path)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-lost])
    writer = Writer(tmp_path / "out", REQUEST)
    assert list(writer.finished) == ["outside", "layers.0"]
    writer.add("layers.1", tensors(2, "layers.1."), [2])
    assert list(again(writer).finished) == ["outside", "layers.0", "layers.1"]


def test_a_line_that_was_cut_off_is_taken_away_without_writing_the_others_again(tmp_path, monkeypatch):
    """A kill in the middle of that would lose them all."""
    written(tmp_path)
    path = tmp_path / "out.partial" / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"part": "layers.2", "no')
    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, fail)
    assert len(Writer(tmp_path / "out", REQUEST).finished) == 3
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize("content", ["", '{"request": {"sou'])
def test_a_journal_that_never_came_to_a_first_line_starts_over(tmp_path, content):
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.parent.mkdir()
    journal.write_text(content)
    writer = Writer(tmp_path / "out", REQUEST)
    writer.add("outside", tensors())
    assert list(again(writer).finished) == ["outside"]


def test_another_request_is_not_continued_and_the_difference_is_named(tmp_path):
    written(tmp_path)
    with pytest.raises(UsageError) as caught:
        Writer(tmp_path / "out", {**REQUEST, "bits": 3, "new": True})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'out.partial'} holds another request's unfinished run")
    assert "(bits: was 4, now 3; new: was None, now True); --fresh starts over" in message
    assert list(Writer(tmp_path / "out", REQUEST).finished) == ["outside", "layers.0", "layers.1"]


def test_fresh_starts_over(tmp_path):
    written(tmp_path)
    writer = Writer(tmp_path / "out", {**REQUEST, "bits": 3}, fresh=True)
    assert not writer.finished and not writer.path_of("layers.0").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_partial_directory_of_somebody_else_is_left_alone(tmp_path, fresh):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"out\.partial is in the way and is not from an earlier run"):
        Writer(tmp_path / "out", REQUEST, fresh=fresh)
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


def test_an_abandoned_run_keeps_finished_work_and_nothing_else(tmp_path):
    written(tmp_path, ("outside",)).abandon()
    assert not list(tmp_path.iterdir())
    written(tmp_path, ("outside", "layers.0")).abandon()
    assert list(Writer(tmp_path / "out", REQUEST).finished) == ["outside", "layers.0"]


# ---- the place of the result ----


@pytest.fixture
def occupied(tmp_path):
    """An earlier result at `out`."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    return tmp_path / "out"


def test_an_existing_result_is_refused(occupied):
    with pytest.raises(UsageError, match="out exists and is not empty; choose another directory or pass --force"):
        Writer(occupied, REQUEST)
    assert [path.name for path in occupied.parent.iterdir()] == ["out"]


def test_an_empty_directory_will_do(tmp_path):
    (tmp_path / "out").mkdir()
    assert (finish(written(tmp_path)) / "config.json").exists()


def test_force_replaces_the_old_result_at_the_very_end(tmp_path, occupied):
    writer = Writer(occupied, REQUEST, force=True)
    writer.add("outside", tensors())
    assert (occupied / "old.txt").exists()
    writer.finish(["outside"], lambda directory: None)
    assert [path.name for path in occupied.iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_the_old_result_stays_if_the_new_one_cannot_be_completed(tmp_path, occupied):
    writer = Writer(occupied, REQUEST, force=True)
    writer.add("layers.0", tensors(), [0])
    with pytest.raises(CheckpointError, match="Input/output error"):
        writer.finish(["layers.0"], fail)
    assert [path.name for path in occupied.iterdir()] == ["old.txt"]
    following = again(writer, force=True)
    assert list(following.finished) == ["layers.0"]
    assert following.finish(["layers.0"], lambda directory: None).exists()


def test_the_old_result_stays_if_the_new_one_cannot_take_its_place(tmp_path, occupied, monkeypatch):
    writer = Writer(occupied, REQUEST, force=True)
    writer.add("layers.0", tensors(), [0])
    rename = type(occupied).rename
    monkeypatch.setattr(type(occupied), "rename", lambda a, b: fail() if a.name == "ready" else rename(a, b))
    with pytest.raises(CheckpointError, match="Input/output error"):
        writer.finish(["layers.0"], lambda directory: None)
    assert [path.name for path in occupied.iterdir()] == ["old.txt"]


def test_a_file_in_the_place_of_the_result_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="out is a file; name a directory for the result"):
        Writer(tmp_path / "out", REQUEST, force=True)


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(
        UsageError, match="volume is a mount point, and cannot be replaced; name a new directory inside"
    ):
        Writer(tmp_path / "volume", REQUEST)


@pytest.mark.parametrize("name", [".", "..", "../.."])
def test_the_current_directory_cannot_be_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="is where you are, and cannot be replaced from there; name a new directory"):
        Writer.check(Path(name), force=True)


def test_a_place_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"no permission to write in {re.escape(str(tmp_path))}; choose another"):
        Writer(tmp_path / "deep" / "out", REQUEST)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_so_and_keeps_what_is_finished(tmp_path, monkeypatch):
    def disk_full(path, tensors):
        path.write_bytes(b"half a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = written(tmp_path, ("outside", "layers.0"))
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "write", disk_full)
        with pytest.raises(CheckpointError) as caught:
            writer.add("layers.1", tensors(2, "layers.1."), [2])
    message = str(caught.value)
    assert message.startswith(f"writing {writer.path_of('layers.1')}: ") and "No space left on device" in message
    assert re.search(r"\([\d,]+ MiB free\); finished blocks are kept, make room", message)
    assert sorted(p.name for p in writer.partial.iterdir()) == ["journal.jsonl", "layers.0.part", "outside.part"]
    following = again(writer)
    assert list(following.finished) == ["outside", "layers.0"]
    following.add("layers.1", tensors(2, "layers.1."), [2])
    assert_equal(load_file(finish(following) / "model.safetensors"), all_tensors())


# ---- one at a time ----


def test_another_process_is_refused_until_the_first_has_ended_however(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    first = context.Process(target=kept_open, args=(tmp_path / "out", ready, end))
    first.start()
    assert ready.wait(30)
    with pytest.raises(UsageError) as caught:
        Writer(tmp_path / "out", REQUEST)
    assert str(caught.value) == (
        f"{tmp_path / 'out.partial'}: another process ({first.pid}) is writing it; wait until it has ended, or name "
        "another directory for the result"
    )
    with pytest.raises(UsageError, match="is writing it"):
        Writer(tmp_path / "out", REQUEST, fresh=True, force=True)
    first.kill()
    first.join()
    assert list(Writer(tmp_path / "out", REQUEST).finished) == ["layers.0"]


def kept_open(out, ready, end) -> None:
    writer = Writer(out, REQUEST)
    writer.add("layers.0", tensors(), [0])
    ready.set()
    end.wait()


def test_a_writer_lets_go_when_it_has_finished_or_given_up(tmp_path):
    first = written(tmp_path)
    finish(first)
    second = Writer(tmp_path / "out", REQUEST, force=True)
    second.abandon()
    assert Writer(tmp_path / "out", REQUEST, force=True).finished == {}


def test_a_refused_request_lets_go(tmp_path):
    written(tmp_path).close()
    with pytest.raises(UsageError, match="another request's"):
        Writer(tmp_path / "out", {"bits": 2})
    assert len(Writer(tmp_path / "out", REQUEST).finished) == 3


def test_a_journal_that_is_removed_while_it_is_opened_is_made_again(tmp_path, monkeypatch):
    """One run tidies up while the next one waits at its door."""
    lock, path = journal._lock, tmp_path / "out.partial" / "journal.jsonl"
    removed = []

    def late(handle, at):
        if not removed:
            removed.append(path.unlink())
            path.parent.rmdir()
        lock(handle, at)

    monkeypatch.setattr(journal, "_lock", late)
    writer = Writer(tmp_path / "out", REQUEST)
    writer.add("layers.0", tensors(), [0])
    assert removed and list(again(writer).finished) == ["layers.0"]


@pytest.mark.skipif(journal.fcntl is None, reason="Windows locks otherwise")
def test_where_nothing_can_be_locked_the_run_goes_on_and_says_so(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(journal.fcntl, "flock", unknown)
    with pytest.warns(UserWarning, match=r"out\.partial: files there cannot be locked \(.*\); see that no second run"):
        writer = written(tmp_path)
    assert finish(writer).exists()


# ---- shards on the way ----


def partial_files(writer: Writer) -> list[str]:
    return sorted(path.name for path in writer.partial.iterdir())


def test_parts_become_shards_as_soon_as_they_fill_one(tmp_path, monkeypatch):
    size = written(tmp_path / "probe", ["a"]).path_of("a").stat().st_size
    monkeypatch.setattr(writing, "SHARD_BYTES", 2.5 * size)
    names = ["a", "b", "c", "d", "e"]
    writer = written(tmp_path, names)
    assert partial_files(writer) == ["e.part", "journal.jsonl", "shard-00001.safetensors", "shard-00002.safetensors"]
    for i, name in enumerate(names):
        assert_equal(writer.read_part(name), tensors(i, f"{name}."))
    following = again(writer)
    for i, name in enumerate(names):
        assert_equal(following.read_part(name), tensors(i, f"{name}."))
    assert following.finished == {name: [i] for i, name in enumerate(names)}
    out = following.finish(names, lambda directory: None)
    assert len(list(out.glob("*.safetensors"))) == 3
    assert_equal({name: Reader(out).read(name) for name in Reader(out).places}, all_tensors(names))


def test_saving_takes_no_room_a_second_time(tmp_path):
    writer = written(tmp_path)
    links = []
    writer.finish([], lambda ready: links.append((ready / "model.safetensors").stat().st_nlink))
    assert links == [2]


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", unknown)
    assert_equal(load_file(finish(written(tmp_path)) / "model.safetensors"), all_tensors())


@pytest.mark.parametrize("where", ["join", "sync_tree", "write"])
def test_a_disk_that_is_full_keeps_what_is_finished(tmp_path, monkeypatch, where):
    def disk_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = written(tmp_path, ("outside", "layers.0"))
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, where, disk_full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*finished blocks are kept, make room"):
            writer.add("layers.1", tensors(2, "layers.1."), [2])
            finish(writer)
    writer.abandon()
    following = Writer(tmp_path / "out", REQUEST)
    if "layers.1" not in following.finished:
        following.add("layers.1", tensors(2, "layers.1."), [2])
    assert_equal(load_file(finish(following) / "model.safetensors"), all_tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_line_that_does_not_fit_on_the_disk_is_not_there_by_half(tmp_path, monkeypatch):
    writer = written(tmp_path, ("outside", "layers.0"))
    write = os.write

    def half(handle, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(CheckpointError, match="No space left"):
            writer.add("layers.1", tensors(2, "layers.1."), [2])
    writer.add("layers.1", tensors(2, "layers.1."), [2])
    assert len(again(writer).finished) == 3


def test_a_finished_part_that_is_gone_is_said(tmp_path):
    writer = written(tmp_path)
    writer.path_of("layers.0").unlink()
    with pytest.raises(CheckpointError, match=r"layers\.0\.part: a finished part is missing or damaged; --fresh"):
        again(writer)
    assert Writer(tmp_path / "out", REQUEST, fresh=True).finished == {}


def test_temporary_files_go_when_the_run_starts_and_when_it_ends(tmp_path):
    writer = written(tmp_path)
    for end in (lambda: again(writer), writer.abandon, lambda: finish(Writer(tmp_path / "out", REQUEST))):
        writer.scratch.mkdir()
        (writer.scratch / "activations").write_bytes(b"x")
        following = end()
        assert not writer.scratch.exists()
        if isinstance(following, Writer):
            following.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- what the journal remembers ----


def test_what_a_run_wants_to_be_told_is_told_and_is_no_difference(tmp_path):
    writer = Writer(tmp_path / "out", REQUEST)
    assert writer.run == {}
    writer.note_run({"batch": 8, "spill": True})
    assert writer.run == again(writer).run == {"batch": 8, "spill": True}


def test_of_two_requests_only_what_differs_is_said():
    files = {f"model-{i:05d}-of-00100.safetensors": f"{i} bytes" for i in range(100)}
    touched = {**files, "model-00007-of-00100.safetensors": "8 bytes"}
    before = {"tensors": files, "settings": {"damping": 0.01, "panel": 128}, "bits": 4}
    assert journal.difference(before, {**before, "tensors": touched}) == (
        "tensors: was {model-00007-of-00100.safetensors: '7 bytes'}, now {model-00007-of-00100.safetensors: '8 bytes'}"
    )
    assert journal.difference(before, {**before, "settings": {"damping": 0.1, "panel": 128}, "bits": 3}) == (
        "settings: was {damping: 0.01}, now {damping: 0.1}; bits: was 4, now 3"
    )
    assert "and 97 more}" in journal.difference(before, {**before, "tensors": {}})
    assert len(journal.difference({"text": "x" * 5000}, {"text": "y" * 5000})) < 300
    assert journal.difference({"sizes": [1, 2]}, {"sizes": (1, 2)}) == ""


# ---- replaced later ----


def newer(*names: str) -> dict[str, torch.Tensor]:
    """Other values for these tensors of `written`, each as large as it was."""
    return {name: -all_tensors()[name] for name in names}


SCALES = ("outside.weight", "layers.0.scales", "layers.1.scales", "layers.1.odd")


def amended(tmp_path, notes=("steps", 4)) -> Writer:
    writer = written(tmp_path)
    writer.amend(newer(*SCALES), notes)
    return writer


@pytest.fixture
def in_shards(tmp_path, monkeypatch):
    """Shards hold a single part; the last part is in none until the end."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 1)


def expected() -> dict[str, torch.Tensor]:
    return all_tensors() | newer(*SCALES)


def stored(out) -> dict[str, torch.Tensor]:
    return {name: Reader(out).read(name) for name in Reader(out).places}


def test_what_is_replaced_later_is_read_and_stored_instead_and_nothing_else_changes(tmp_path):
    writer = written(tmp_path)
    assert writer.amended is None and writer.amendment() == {}
    writer.amend(newer(*SCALES), {"steps": 4})
    for part in ("outside", "layers.0", "layers.1"):
        assert_equal(writer.read_part(part), {n: t for n, t in expected().items() if n.startswith(f"{part}.")})
    assert_equal(writer.amendment(), newer(*SCALES))
    out = finish(writer)
    assert_equal(stored(out), expected())
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(list(out.iterdir())) == 2


def test_bytes_are_those_of_a_run_that_wrote_them_at_once(tmp_path):
    amended(tmp_path / "later")
    later = finish(Writer(tmp_path / "later" / "out", REQUEST))
    at_once = Writer(tmp_path / "at once" / "out", REQUEST)
    for i, part in enumerate(("outside", "layers.0", "layers.1")):
        at_once.add(part, {name: expected()[name] for name in tensors(i, f"{part}.")}, [i])
    assert (later / "model.safetensors").read_bytes() == (finish(at_once) / "model.safetensors").read_bytes()


def test_a_run_that_goes_on_knows_what_was_replaced(tmp_path, in_shards):
    writer = again(amended(tmp_path))
    assert writer.amended == ["steps", 4]
    assert_equal(writer.amendment(), newer(*SCALES))
    for part in ("outside", "layers.0", "layers.1"):
        assert_equal(writer.read_part(part), {n: t for n, t in expected().items() if n.startswith(f"{part}.")})
    assert_equal(stored(finish(writer)), expected())


def test_parts_may_still_come_after_it(tmp_path, in_shards):
    writer = again(amended(tmp_path))
    writer.add("layers.2", tensors(3, "layers.2."), [3])
    assert_equal(stored(finish(again(writer))), expected() | tensors(3, "layers.2."))


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_replacing_may_stop_between_shards_and_is_done_again(tmp_path, in_shards, monkeypatch, stop):
    writer, overwrite, left = amended(tmp_path), tensorfile.overwrite, [stop]

    def stopped(path, tensors):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        overwrite(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "overwrite", stopped)
        with pytest.raises(CheckpointError, match=r"No space left on device.*finished blocks are kept"):
            finish(writer)
    writer.abandon()
    assert not (tmp_path / "out").exists()
    assert_equal(stored(finish(Writer(tmp_path / "out", REQUEST))), expected())


@pytest.mark.parametrize("stop", range(1, 5))
def test_replacing_may_stop_in_the_middle_of_a_tensor(tmp_path, monkeypatch, stop):
    writer, left = amended(tmp_path), [stop]

    class Torn:
        """A file whose `stop`-th write is cut off."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            left[0] -= 1
            if left[0] == 0:
                self.file.write(data[: len(data) // 2])
                raise KeyboardInterrupt
            return self.file.write(data)

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode="r", *more, **options: (
            Torn(opened(path, mode, *more, **options)) if mode == "rb+" and path.name.startswith("shard") else
            opened(path, mode, *more, **options)
        ))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            finish(writer)
    assert left == [0]
    assert_equal(stored(finish(again(writer))), expected())


@pytest.mark.parametrize("wrong", [torch.zeros(6, 2).half(), torch.zeros(2, 6), torch.zeros(2, 5).half()])
def test_a_tensor_of_another_shape_or_dtype_replaces_none(tmp_path, wrong):
    path = tmp_path / "file.safetensors"
    tensorfile.write(path, all_tensors())
    with pytest.raises(CheckpointError, match=r"layers\.1\.scales is F16 \[2, 6\], not \("):
        tensorfile.overwrite(path, newer("outside.weight") | {"layers.1.scales": wrong})
    assert_equal(load_file(path), all_tensors())
    tensorfile.overwrite(path, newer("outside.weight", "layers.0.count") | {"of another file": wrong})
    assert_equal(load_file(path), all_tensors() | newer("outside.weight", "layers.0.count"))


def test_what_is_nowhere_cannot_be_replaced(tmp_path):
    writer = written(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.7\.scales was to be replaced, and is in no finished part"):
        writer.amend(newer("outside.weight") | {"layers.7.scales": torch.zeros(2).half()}, {})
    assert writer.amended is None and again(writer).amended is None
    assert_equal(stored(finish(Writer(tmp_path / "out", REQUEST))), all_tensors())


def test_half_of_what_was_to_be_replaced_does_not_count(tmp_path, monkeypatch):
    writer = written(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_note", lambda self, **entry: fail())  # killed before the journal knows of it
        with pytest.raises(CheckpointError, match="Input/output error"):
            writer.amend(newer(*SCALES), {})
    assert (writer.partial / writing.AMENDMENT).exists()
    writer = again(writer)
    assert writer.amended is None and not (writer.partial / writing.AMENDMENT).exists()
    assert_equal(stored(finish(writer)), all_tensors())


def test_a_lost_amendment_is_said(tmp_path):
    writer = amended(tmp_path)
    (writer.partial / writing.AMENDMENT).unlink()
    with pytest.raises(
        CheckpointError, match=r"amendment\.part: a finished part is missing or damaged; --fresh starts"
    ):
        again(writer)
    fresh = Writer(tmp_path / "out", REQUEST, fresh=True)
    assert fresh.finished == {} and fresh.amended is None


def test_a_steps_state_outlives_a_stopped_run_and_goes_with_a_finished_one(tmp_path):
    writer = written(tmp_path)
    writer.state("training").write_bytes(b"step 8")
    writer.state("training").with_name("training.state.new").write_bytes(b"half of step 16")
    writer = again(writer)
    assert writer.state("training").read_bytes() == b"step 8"
    assert [path.name for path in writer.partial.glob("*.state*")] == ["training.state"]
    writer.abandon()
    finish(again(writer))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_starts_over_has_no_state(tmp_path):
    writer = amended(tmp_path)
    writer.state("training").write_bytes(b"step 8")
    fresh = again(writer, fresh=True)
    assert not fresh.state("training").exists() and fresh.amended is None and fresh.amendment() == {}
