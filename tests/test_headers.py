"""A model opened for a dry run is the model that would be quantized, and its weights have not left the hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hub
import tiny
from wellrounded.hf.headers import open_headers
from wellrounded.hf.source import open_source

FIRST = 100_001  # bytes: what the client asks for, hoping that the header ends there
OPEN = """if True:
    import json, sys
    from pathlib import Path
    from wellrounded.errors import WellRoundedError
    from wellrounded.hf.headers import open_headers
    from wellrounded.hf.source import download
    from test_headers import describe

    out, *names = sys.argv[1:]
    found = {}
    for name in names:
        try:
            found[name] = str(download(name[1:])) if name.startswith("+") else describe(open_headers(name))
        except WellRoundedError as error:
            found[name] = f"{type(error).__name__}: {error}"
    Path(out).write_text(json.dumps(found))
"""


def describe(source):
    """All that a source says, except where it comes from."""
    model = {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in source.model.state_dict().items()}
    about = {"made": source.made, "sizes": dict(source.sizes), "bytes": source.bytes, "config": source.config}
    return {"model": model, "tokenizer": source.tokenizer is not None, **about}


@pytest.fixture
def server(tmp_path):
    with hub.serve(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def opened(server, tmp_path):
    """What a process that knows this hub only says of these models; one with a + is downloaded whole."""

    def opened(*names, home="home", **environment):
        env = {**server.environment(tmp_path / home), **environment}
        command = [sys.executable, "-c", OPEN, str(tmp_path / "said"), *names]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent, env=env)
        assert ran.returncode == 0, ran.stderr
        return json.loads((tmp_path / "said").read_text())

    return opened


def weights_sent(server):
    return {path: sent for path, sent in server.sent.items() if path.endswith(".safetensors")}


def test_of_a_model_on_the_hub_headers_are_enough(server, opened):
    llama = tiny.save(tiny.build("llama", hidden_size=128), server.root / "someone/llama")
    moe = tiny.save(tiny.build("qwen3_moe", hidden_size=128), server.root / "someone/moe", max_shard_size="500KB")
    shards = sorted(moe.glob("*.safetensors"))
    assert len(shards) > 2 and (moe / "model.safetensors.index.json").exists()
    found = opened("someone/llama", "someone/moe")
    for directory in (llama, moe):
        assert found[f"someone/{directory.name}"] == json.loads(json.dumps(describe(open_source(directory))))
    sizes = [path.stat().st_size for path in (llama / "model.safetensors", *shards)]
    assert max(sizes) > 4 * FIRST
    assert sorted(weights_sent(server).values()) == sorted(min(FIRST, size) for size in sizes)
    assert not server.unknown


def test_a_header_longer_than_the_first_request_is_fetched_to_its_end_and_no_further(server, opened):
    path = tiny.save(
        tiny.build("llama", num_hidden_layers=150, hidden_size=32, intermediate_size=64), server.root / "someone/deep"
    )
    file = path / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert header > FIRST
    assert opened("someone/deep")["someone/deep"]["bytes"] == file.stat().st_size - 8 - header
    assert list(weights_sent(server).values()) == [FIRST + header]


def test_weights_that_are_in_the_cache_are_not_asked_for_and_no_network_is_needed(server, opened):
    directory = tiny.save(tiny.build("llama"), server.root / "someone/llama")
    opened("+someone/llama")
    server.sent.clear()
    wanted = json.loads(json.dumps(describe(open_source(directory))))
    assert opened("someone/llama")["someone/llama"] == wanted
    assert opened("someone/llama", HF_HUB_OFFLINE="1")["someone/llama"] == wanted
    assert not weights_sent(server)
    missing = opened("someone/llama", home="other", HF_HUB_OFFLINE="1")["someone/llama"]
    assert missing.startswith("UsageError: someone/llama: no such directory here, and the hub did not deliver it")


def test_what_the_hub_does_not_have_or_give_is_an_error_that_says_so(server, opened):
    for name in ("proud/llama", "someone/pickles", "someone/broken", "someone/gap"):
        tiny.save(tiny.build("llama"), server.root / name)
    server.gated.add("proud")
    file = "model.safetensors"
    (server.root / "someone/pickles" / file).rename(server.root / "someone/pickles/pytorch_model.bin")
    (server.root / "someone/broken" / file).write_bytes(b"no such thing" * 100)
    small = tiny.save(tiny.build("llama", num_hidden_layers=2), server.root / "someone/small")
    (small / file).replace(server.root / "someone/gap" / file)
    found = opened("someone/nothing", "proud/llama", "someone/pickles", "someone/broken", "someone/gap")
    undelivered = "no such directory here, and the hub did not deliver it"
    assert found["someone/nothing"].startswith(f"UsageError: someone/nothing: {undelivered} (404")
    assert found["proud/llama"].startswith(f"UsageError: proud/llama: {undelivered} (403")
    assert "safetensors (or .gguf) files only, and the hub has only pytorch_model.bin" in found["someone/pickles"]
    assert found["someone/broken"].startswith("CheckpointError: someone/broken: ")
    assert "none of its files has model.layers.2." in found["someone/gap"]


def test_a_directory_is_opened_as_ever_but_its_tensors_are_out_of_reach(tmp_path):
    model = tiny.build("qwen3_moe")
    for what in (tiny.save(model, tmp_path), model):
        source, usual = open_headers(what), open_source(what)
        assert describe(source) == describe(usual)
        assert source.sizes.keys() == source.made.keys() and sum(source.sizes.values()) == source.bytes
        for stored, size in source.sizes.items():
            tensor = usual.read_stored(stored)
            assert size == tensor.numel() * tensor.element_size()
        assert {p.device for p in source.model.parameters()} == {torch.device("meta")}
        for read, names in ((source.read, dict(source.model.named_parameters())), (source.read_stored, source.made)):
            with pytest.raises(RuntimeError, match=r"was to be read in a dry run, which opens headers only"):
                read(next(iter(names)))
