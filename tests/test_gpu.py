"""All that runs on a GPU runs where it should: on one that is only pretended, no two devices meet (see pretend.py)."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import pretend
import tiny
import wellrounded as wr
from wellrounded import presets
from wellrounded.presets import BEST
from wellrounded.training import Training

pytestmark = pytest.mark.filterwarnings("ignore:cuda:RuntimeWarning")  # Triton does not believe in it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Best takes a few steps only."""
    short = Training(steps=4, windows_per_step=2, every=2)
    monkeypatch.setitem(presets.PRESETS, "best", replace(BEST, training=short))


# ---- the pretence ----


def test_two_devices_do_not_meet():
    with pretend.gpu():
        there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
        assert there.device == torch.device("cuda", 0) and there.is_cuda and here.device.type == "cpu"
        for wrong in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: nn.functional.linear(there, here),
            lambda: here[there.long()],
            lambda: there.T.mul_(here),
            lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert (there.cpu() + here).device.type == "cpu" and (there + here.to(there)).is_cuda
        assert here.to("cuda").is_cuda and not here.is_cuda and there.to("cpu", torch.float64).dtype == torch.float64


def test_what_is_made_of_a_tensor_is_where_it_is():
    with pretend.gpu():
        there = torch.ones(4, 4, device="cuda")
        layer = nn.Linear(4, 4).to("cuda")
        for made in (
            there[1:], there @ there, there.new_zeros(2), torch.zeros_like(there), there.split(2)[1], there.T * 2,
            nn.Parameter(there), layer.weight, layer(there), there.max(0).values, there[torch.tensor([1, 2])],
        ):  # fmt: skip
            assert made.is_cuda
        there.copy_(torch.zeros(4, 4))
        assert there.is_cuda and not there.any() and not torch.zeros_like(there, device="cpu").is_cuda


# ---- quantizing ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"preset": "fast", "sym": False, "act_order": True}),
        ("gpt2", {"preset": "best"}),
        ("llama", {"preset": "best"}),
        ("mixtral", {"preset": "default"}),
        ("llama", {"calibration": "none"}),
    ],
    ids=str,
)
def test_a_model_is_quantized_there_as_it_is_here(kind, options, tmp_path):
    changes = {"tie_word_embeddings": False} if options.get("preset") == "best" else {}  # so that it may be rotated
    source = tiny.save(tiny.build(kind, **changes), tmp_path / "source")
    with pretend.gpu():
        there = tiny.quantize(source, tmp_path / "there", device="cuda", **options)
    here = tiny.quantize(source, tmp_path / "here", device="cpu", **options)
    assert [layer.name for layer in there.layers] == [layer.name for layer in here.layers]
    if options.get("calibration") == "none":
        assert there.fidelity is None
    else:
        assert 0.5 < there.fidelity["kl_mean"] / here.fidelity["kl_mean"] < 2
    names = [set(tiny.tensors(tmp_path / name)) for name in ("there", "here")]
    assert names[0] == names[1]


def test_a_run_that_was_stopped_goes_on_there(tmp_path):
    source = tiny.save(tiny.build("llama"), tmp_path / "source")

    def stop(step):
        if step.done == 1:
            raise KeyboardInterrupt

    with pretend.gpu():
        with pytest.raises(KeyboardInterrupt):
            tiny.quantize(source, tmp_path / "there", device="cuda", preset="fast", progress=stop)
        tiny.quantize(source, tmp_path / "there", device="cuda", preset="fast")
        tiny.quantize(source, tmp_path / "undisturbed", device="cuda", preset="fast")
    found, expected = (tiny.tensors(tmp_path / name) for name in ("there", "undisturbed"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# ---- running ----


def test_a_result_is_loaded_there_writes_there_and_learns_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads are not watched
    tiny.quantize(tiny.save(tiny.build("llama"), tmp_path / "source"), tmp_path / "out")
    ids = tiny.ids(2)
    here = wr.load(tmp_path / "out")
    with pretend.gpu():
        there = wr.load(tmp_path / "out", device_map="cuda")
        logits = there(ids.to("cuda")).logits
        assert logits.is_cuda and torch.allclose(logits.cpu(), here(ids).logits, atol=0.05)
        assert there.generate(ids.to("cuda"), max_new_tokens=3).is_cuda
        adapted = get_peft_model(there, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).to("cuda")
        adapted(ids.to("cuda"), labels=ids.to("cuda")).loss.backward()
        learned = [p for name, p in adapted.named_parameters() if "lora_B" in name]
        assert learned and all(p.grad is not None and p.grad.is_cuda for p in learned)
        found = wr.evaluate(tmp_path / "out", tiny.TEXT * 20, against=tmp_path / "source", length=32)
    assert found["kl_mean"] > 0
