"""Files: read by name or refused by name, never outside the model's directory."""

import errno
import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wellrounded import tensorfile
from wellrounded.card import copy_files
from wellrounded.checkpoint import Reader
from wellrounded.errors import CheckpointError, UsageError
from wellrounded.hf.source import open_source


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name]), name


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


@pytest.fixture
def snapshot(tmp_path, llama):
    """`llama` in the hub's cache: links to blobs, which have no suffix."""
    home = tmp_path / "models--some--llama"
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(llama.iterdir()):
        (home / "blobs" / f"{number:064}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    return snapshot


def test_files_of_a_snapshot_are_read_and_copied_through_their_links(tmp_path, llama, snapshot):
    assert Reader(snapshot).places.keys() == Reader(llama).places.keys()
    target = tmp_path / "target"
    target.mkdir()
    copy_files(snapshot, target)
    assert not any(path.is_symlink() for path in target.iterdir())
    assert {p.name for p in target.iterdir()} == {p.name for p in llama.iterdir()} - {"model.safetensors"}


# ---- never out of the directory ----

ELSEWHERE = r"leads out of the model's directory, to .*, and nothing there is read or copied; put the file itself into"


@pytest.mark.parametrize("name", ["../stolen/a.safetensors", "/etc/a.safetensors", "sub/../../a", "..\\a", "C:\\a"])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(model, match=ELSEWHERE)


def test_weights_that_are_a_link_to_elsewhere_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "a.safetensors")
    refused(tmp_path / "model", match=ELSEWHERE)


def test_a_link_inside_the_directory_is_followed(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "real")
    (tmp_path / "model.safetensors").symlink_to("real")
    assert Reader(tmp_path).read("a").item() == 1


def test_blobs_of_another_repository_are_elsewhere(tmp_path, snapshot):
    other = tmp_path / "models--other" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("x")
    (snapshot / "notes.txt").symlink_to(other / "secret")
    with pytest.raises(CheckpointError, match=ELSEWHERE):
        copy_files(snapshot, tmp_path)


def test_a_file_beside_the_weights_that_is_a_link_to_elsewhere_is_refused_before_any_work(copy_of, llama, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    model = copy_of(llama)
    (model / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=ELSEWHERE):
        open_source(model)
    with pytest.raises(CheckpointError, match=ELSEWHERE):
        copy_files(model, tmp_path)


# ---- reading by offsets ----

EVERY_DTYPE = [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
               torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
               torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]  # fmt: skip


def raw(path, dtype: str, shape: list[int], data: bytes) -> None:
    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path, dtype):
    bits = torch.randint(2 if dtype is torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    stored = {"matrix": bits.reshape(2, 3), "scalar": bits[0].clone(), "none": bits[:0].reshape(0, 4).clone()}
    save_file(stored, tmp_path / "model.safetensors")
    reader, library = Reader(tmp_path), load_file(tmp_path / "model.safetensors")
    for name, wanted in library.items():
        got = reader.read(name)
        assert got.dtype == wanted.dtype == dtype and got.shape == wanted.shape
        assert got.reshape(-1).view(torch.uint8).tolist() == wanted.reshape(-1).view(torch.uint8).tolist()


def test_a_dtype_that_torch_does_not_know_is_named(tmp_path):
    raw(tmp_path / "model.safetensors", "F6_E3M2", [4], b"123")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: t is stored as F6_E3M2, which torch .* not know"):
        Reader(tmp_path).read("t")


@pytest.mark.parametrize(("shape", "data"), [([3], b"1234"), ([-1, -4], b"1234"), ([2.0], b"12"), ("ab", b"")])
def test_a_header_whose_sizes_do_not_add_up_is_refused(tmp_path, shape, data):
    raw(tmp_path / "model.safetensors", "U8", shape, data)
    refused(tmp_path, match=r"safetensors \(.*\); download it again")


def test_a_read_that_stops_early_goes_on(tmp_path, monkeypatch):
    wanted = torch.randn(1000)
    save_file({"a": wanted}, tmp_path / "model.safetensors")
    reader = Reader(tmp_path)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Trickle(path))
    assert torch.equal(reader.read("a"), wanted)


class Trickle(io.FileIO):
    """Gives 100 bytes at a time."""

    def readinto(self, buffer):
        return super().readinto(buffer[:100])


def test_headers_are_parsed_once(sharded, monkeypatch):
    reader = Reader(sharded)
    monkeypatch.setattr(tensorfile, "_parse", None)
    assert all(reader.read(name) is not None for name in reader.places)


# ---- sources that change ----


def changed(path, how) -> None:
    if how == "grown":
        with path.open("ab") as file:
            file.write(b"more")
    elif how == "touched":
        os.utime(path, ns=(1, 1))
    elif how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("how", ["grown", "touched", "gone", "cut"])
def test_a_file_that_changes_is_noticed_and_named(sharded, copy_of, how):
    copy = copy_of(sharded)
    source = open_source(copy)
    source.verify()
    shard = sorted(copy.glob("*.safetensors"))[1]
    changed(shard, how)
    sentence = f"{shard.name}: changed while it was being read, .*leave the source alone, and run again with --fresh"
    with pytest.raises(CheckpointError, match=sentence):
        source.verify()


@pytest.mark.parametrize("how", ["grown", "touched", "cut"])
def test_a_file_that_has_changed_is_not_read(llama, copy_of, how):
    reader = Reader(copy_of(llama))
    changed(reader.directory / "model.safetensors", how)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was being read"):
        reader.read("lm_head.weight")


def test_a_read_that_fails_names_file_and_tensor(llama, copy_of, monkeypatch):
    reader = Reader(copy_of(llama))

    def broken(file, buffer):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Trickle, "readinto", broken)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Trickle(path))
    with pytest.raises(CheckpointError) as caught:
        reader.read("lm_head.weight")
    message = str(caught.value)
    assert (
        message.startswith(f"{reader.directory}/model.safetensors: lm_head.weight cannot be read (")
        and ("Input/output error); finished blocks are kept: see that the disk is there and whole, and run the same")
        in message
    )
