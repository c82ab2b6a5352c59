"""Parts are written while the run goes on, in order, and nothing that went wrong is passed over."""

import threading

import pytest
import torch

import pretend
import tiny
from wellrounded.errors import CheckpointError
from wellrounded.store import WriteBehind

LIMIT = 20  # seconds


class Slow:
    """A store that has a part when it is told so."""

    scratch, amended = None, None

    def __init__(self):
        self.finished, self.may, self.began = {}, threading.Semaphore(0), threading.Event()

    def add(self, part, tensors, notes=None):
        self.began.set()
        assert self.may.acquire(timeout=LIMIT)
        if notes == "full":
            raise CheckpointError("no space left")
        self.finished[part] = notes

    def read_part(self, part):
        return {part: self.finished[part]}


def test_one_part_is_on_its_way_while_the_next_is_made():
    store = Slow()
    with WriteBehind(store) as written:
        written.add("one", {}, 1)
        assert store.began.wait(LIMIT) and not store.finished, "it has come back before the part is there"
        store.may.release()
        written.add("two", {}, 2)
        assert store.finished == {"one": 1}, "the next one waits for it"
        store.may.release()
        assert written.read_part("two") == {"two": 2} and [*written.finished] == ["one", "two"]
        written.add("three", {}, 3)
        store.may.release()
    assert [*store.finished] == ["one", "two", "three"], "all is there in the end"


@pytest.mark.parametrize("then", ["another", "the end", "reading"])
def test_what_went_wrong_is_raised_by_what_comes_next(then):
    store = Slow()
    store.may.release(2)
    with pytest.raises(CheckpointError, match="no space left"), WriteBehind(store) as written:
        written.add("one", {}, "full")
        if then == "another":
            written.add("two", {})
        if then == "reading":
            written.read_part("one")
        assert then == "the end"
    assert not store.finished


def test_a_run_that_is_interrupted_has_the_part_that_was_on_its_way():
    store = Slow()
    store.may.release()
    with pytest.raises(KeyboardInterrupt), WriteBehind(store) as written:
        written.add("one", {}, 1)
        raise KeyboardInterrupt
    assert store.finished == {"one": 1}


@pytest.mark.filterwarnings("ignore:cuda:RuntimeWarning")  # Triton does not believe in it
def test_a_gpu_does_not_wait_for_the_disk(monkeypatch, tmp_path):
    model = tiny.save(tiny.build("llama", torch.bfloat16), tmp_path / "model")
    added, add = [], WriteBehind.add
    monkeypatch.setattr(WriteBehind, "add", lambda self, part, *rest: added.append(part) or add(self, part, *rest))
    with pretend.gpu():
        tiny.quantize(model, tmp_path / "there", device="cuda")
    assert added == ["model.layers.0", "model.layers.1", "model.layers.2"]
    tiny.quantize(model, tmp_path / "here", device="cpu")
    assert len(added) == 3, "a CPU has nothing else to do meanwhile"
    there, here = (tiny.tensors(tmp_path / name) for name in ("there", "here"))
    assert there.keys() == here.keys() and all(there[n].shape == here[n].shape for n in here)
