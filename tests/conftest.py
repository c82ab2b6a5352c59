"""Tiny checkpoints, each made once: tests that change one work on a copy."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

import tiny
import wellrounded as wr


@pytest.fixture(autouse=True)
def unregistered():
    """Loading a model registers with transformers; the next test starts without."""
    yield
    wr.unregister()


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    """What to call for a directory that is made the first time somebody asks for it."""
    root = tmp_path_factory.mktemp("tiny")

    def make(name, how):
        if not (root / name).exists():
            how(root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def llama(_made):
    """A Llama in bfloat16, its head untied."""
    return _made("llama", lambda out: tiny.save(tiny.build("llama", torch.bfloat16), out))


@pytest.fixture(scope="session")
def tied(_made):
    """A Llama in bfloat16 whose head is its embedding."""
    return _made("tied", lambda out: tiny.save(tiny.build("llama", torch.bfloat16, tie_word_embeddings=True), out))


@pytest.fixture(scope="session")
def sharded(_made):
    """The same Llama as `llama` in files of at most 100 kB."""
    return _made("sharded", lambda out: tiny.save(tiny.build("llama", torch.bfloat16), out, max_shard_size="100KB"))


@pytest.fixture(scope="session")
def quantized(_made, llama):
    """`llama` in 4 bits."""
    return _made("quantized", lambda out: tiny.quantize(llama, out))


@pytest.fixture
def copy_of(tmp_path):
    """A private copy of a directory, to be damaged."""

    def copy(directory, name="copy"):
        return shutil.copytree(directory, tmp_path / name)

    return copy


@pytest.fixture
def fresh_dynamo():
    """It counts compilations per process, and gives up after some."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
