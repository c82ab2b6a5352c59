"""Files: read by name or refused by name, written part by part, finished in one step."""

import errno
import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wellrounded import checkpoint
from wellrounded.card import copy_files
from wellrounded.checkpoint import Reader, Writer, join
from wellrounded.errors import CheckpointError, UsageError

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


def all_tensors(parts=("outside", "layers.0", "layers.1")) -> dict[str, torch.Tensor]:
    return {name: t for i, part in enumerate(parts) for name, t in tensors(i, f"{part}.").items()}


def finish(writer: Writer, parts=("outside", "layers.0", "layers.1")):
    return writer.finish(parts, lambda directory: (directory / "config.json").write_text("{}"))


def refused(directory, error=CheckpointError, match=None) -> str:
    with pytest.raises(error, match=match) as caught:
        Reader(directory)
    return str(caught.value)


# ---- reading ----


def test_a_single_file_is_read_by_name(llama):
    reader, stored = Reader(llama), load_file(llama / "model.safetensors")
    assert reader.places.keys() == stored.keys()
    assert_equal({name: reader.read(name) for name in stored}, stored)
    assert reader.bytes == sum(t.numel() * t.element_size() for t in stored.values())


def test_shards_are_read_as_one(llama, sharded):
    whole, parts = Reader(llama), Reader(sharded)
    assert len(set(parts.places.values())) > 3
    assert_equal({name: parts.read(name) for name in parts.places}, {name: whole.read(name) for name in whole.places})
    assert parts.bytes == whole.bytes


def test_files_without_an_index_are_all_read(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    assert {name: path.name for name, path in Reader(tmp_path).places.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_the_fingerprint_changes_with_the_file(llama, copy_of):
    copy = copy_of(llama)
    before = Reader(copy).fingerprint()
    assert Reader(copy).fingerprint() == before
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert Reader(copy).fingerprint() != before


def test_a_missing_shard_is_named(sharded, copy_of):
    copy = copy_of(sharded)
    names = sorted(copy.glob("*.safetensors"))
    names[1].unlink()
    message = refused(copy, match=f"names {re.escape(names[1].name)}, which is not there")
    assert f"1 of {len(names)} shards are missing, download them again" in message


def test_a_truncated_file_is_named(sharded, copy_of):
    copy = copy_of(sharded)
    shard = sorted(copy.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert refused(copy) == (
        f"{shard}: {len(content) - 1:,} bytes, its header promises {len(content):,}; download it again"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"12", b"<!DOCTYPE html><html>Not found</html>", b"\x05" + bytes(7) + b"[1,2]", b"\x04" + bytes(7) + b"null",
     b"\x09" + bytes(7) + b'{"a":{}}!', b"\x08" + bytes(7) + b'{"a":{}}', b"\x07" + bytes(7) + b'{"a":1}',
     b"\x03" + bytes(7) + b"\xff\xfe\xfd", (2**63).to_bytes(8, "little") + b"{}"],
)  # fmt: skip
def test_a_file_with_a_damaged_header_is_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refused(tmp_path, match=r"safetensors \(.*\); download it again")
    assert message.startswith(str(tmp_path / "model.safetensors"))


def test_a_directory_with_pickles_only_is_refused(tmp_path):
    for name in ("pytorch_model.bin", "rust_model.h5"):
        (tmp_path / name).write_bytes(b"1234")
    message = refused(tmp_path, UsageError, "weights are read from safetensors")
    assert "only pytorch_model.bin, rust_model.h5; convert them with transformers' save_pretrained" in message


def test_a_directory_without_weights_is_refused(tmp_path):
    refused(tmp_path, UsageError, "there are no weights at all")


@pytest.mark.parametrize("content", ["<html>", "{}", "[]", '{"weight_map": []}', '{"weight_map": 3}', '"text"'])
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, match=r"model\.safetensors\.index\.json: not a shard index \(.*\); download the model again")


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
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", parts_per_shard * writer.path_of("a").stat().st_size)
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


def test_joining_one_file_gives_its_tensors_byte_for_byte(tmp_path):
    save_file(tensors(), tmp_path / "part", metadata={"format": "pt"})
    join([tmp_path / "part"], tmp_path)
    files = [tmp_path / "part", tmp_path / "model.safetensors"]
    one, other = (path.read_bytes()[checkpoint.read_header(path)[1] :] for path in files)
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
    journal = written(tmp_path).journal
    journal.write_text(journal.read_text()[:-lost])
    writer = Writer(tmp_path / "out", REQUEST)
    assert list(writer.finished) == ["outside", "layers.0"]
    writer.add("layers.1", tensors(2, "layers.1."), [2])
    assert list(Writer(tmp_path / "out", REQUEST).finished) == ["outside", "layers.0", "layers.1"]


@pytest.mark.parametrize("content", ["", '{"request": {"sou'])
def test_a_journal_that_never_came_to_a_first_line_starts_over(tmp_path, content):
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.parent.mkdir()
    journal.write_text(content)
    writer = Writer(tmp_path / "out", REQUEST)
    writer.add("outside", tensors())
    assert list(Writer(tmp_path / "out", REQUEST).finished) == ["outside"]


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
    again = Writer(occupied, REQUEST, force=True)
    assert list(again.finished) == ["layers.0"]
    assert again.finish(["layers.0"], lambda directory: None).exists()


def test_the_old_result_stays_if_the_new_one_cannot_take_its_place(tmp_path, occupied, monkeypatch):
    writer = Writer(occupied, REQUEST, force=True)
    writer.add("layers.0", tensors(), [0])
    rename = type(occupied).rename
    monkeypatch.setattr(type(occupied), "rename", lambda a, b: fail() if a.name == "ready" else rename(a, b))
    with pytest.raises(CheckpointError, match="Input/output error"):
        writer.finish(["layers.0"], lambda directory: None)
    assert [path.name for path in occupied.iterdir()] == ["old.txt"]


def test_a_replacement_that_was_killed_half_way_is_made_up_for(tmp_path, occupied):
    for _ in range(2):
        writer = Writer(occupied, REQUEST, force=True)
        writer.add("outside", tensors())
        occupied.rename(writer.partial / "replaced")  # killed after the old result had moved out of the way
        assert finish(Writer(occupied, REQUEST), ["outside"]).exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_place_of_the_result_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="out is a file; name a directory for the result"):
        Writer(tmp_path / "out", REQUEST, force=True)


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(
        UsageError, match="volume is a mount point, and cannot be replaced; name a new directory inside"
    ):
        Writer(tmp_path / "volume", REQUEST)


@pytest.mark.parametrize("name", [".", "..", "../.."])
def test_the_current_directory_cannot_be_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="is where you are, and cannot be replaced from there; name a new directory"):
        Writer.check(checkpoint.Path(name), force=True)


def test_a_place_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: checkpoint.Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"no permission to write in {re.escape(str(tmp_path))}; choose another"):
        Writer(tmp_path / "deep" / "out", REQUEST)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_so_and_keeps_what_is_finished(tmp_path, monkeypatch):
    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = written(tmp_path, ("outside", "layers.0"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", disk_full)
        with pytest.raises(CheckpointError) as caught:
            writer.add("layers.1", tensors(2, "layers.1."), [2])
    message = str(caught.value)
    assert message.startswith(f"writing {writer.path_of('layers.1')}: ") and "No space left on device" in message
    assert re.search(r"\([\d,]+ MiB free\); finished blocks are kept, make room", message)
    assert sorted(p.name for p in writer.partial.iterdir()) == ["journal.jsonl", "layers.0.part", "outside.part"]
    again = Writer(tmp_path / "out", REQUEST)
    assert list(again.finished) == ["outside", "layers.0"]
    again.add("layers.1", tensors(2, "layers.1."), [2])
    assert_equal(load_file(finish(again) / "model.safetensors"), all_tensors())


# ---- the files beside the weights ----


def test_every_file_that_holds_no_weights_is_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    kept = ["config.json", "tokenizer.model", "merges.txt", "modeling_own.py", "sub/deep/params.json", "sub/README.md"]
    weights = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
               "pytorch_model.bin.index.json", "original/consolidated.00.pth", "q4.gguf", "onnx/model.onnx",
               ".git/config", ".cache/x.json"]  # fmt: skip
    for name in [*kept, *weights, "README.md"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    copy_files(source, target)
    copied = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert copied == {name: name for name in kept} | {"README.source.md": "README.md"}


def test_files_of_a_snapshot_are_copied_through_their_links(tmp_path, llama):
    snapshot, target = tmp_path / "snapshot", tmp_path / "target"
    snapshot.mkdir()
    target.mkdir()
    for path in llama.iterdir():  # as in the hub's cache, whose blobs have no suffix
        (tmp_path / f"blob-{path.stem}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(tmp_path / f"blob-{path.stem}")
    copy_files(snapshot, target)
    assert not any(path.is_symlink() for path in target.iterdir())
    assert {p.name for p in target.iterdir()} == {p.name for p in llama.iterdir()} - {"model.safetensors"}
