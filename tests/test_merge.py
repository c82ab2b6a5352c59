"""An adapter is merged onto dequantized weights; the sum is quantized again or saved dense."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
import wellrounded as wr
from wellrounded.cli import main
from wellrounded.errors import UsageError
from wellrounded.nn import QuantLinear


@pytest.fixture(scope="module")
def adapter(quantized, tmp_path_factory):
    """A LoRA on every layer of `quantized`, as if it had been trained: large enough to change what the model says."""
    model = get_peft_model(wr.load(quantized), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("adapter") / "tuned"
    model.save_pretrained(path)
    return path


def adapted(quantized, adapter, dtype=torch.float32) -> torch.Tensor:
    """What the adapter on packed weights says: the truth that a merged model is held against."""
    return tiny.logits(PeftModel.from_pretrained(wr.load(quantized, dtype=dtype, kernel="reference"), adapter)).float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_a_dense_merge_says_what_the_adapter_said(quantized, adapter, tmp_path):
    assert wr.merge(adapter, tmp_path / "out", dense=True) is None
    wr.unregister()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and not any(isinstance(m, QuantLinear) for m in model.modules())
    truth = adapted(quantized, adapter)
    assert distance(tiny.logits(model), truth) < 0.05 < 0.3 < distance(tiny.logits(wr.load(quantized)), truth)
    assert not (tmp_path / "out.partial").exists()
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_a_quantized_merge_keeps_each_layers_scheme(llama, tmp_path):
    recipe = wr.Recipe(wr.Scheme(4, 32), (wr.Rule(r".*down_proj", wr.Scheme(8, 64)), wr.Rule(r".*o_proj", None)))
    tiny.quantize(llama, tmp_path / "base", recipe=recipe)
    model = get_peft_model(wr.load(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    report = wr.merge(tmp_path / "adapter", tmp_path / "out", calibration=tiny.ids(), samples=64, length=tiny.LENGTH)
    assert report.source == "base with adapter" and report.coverage()["gptq"] > 0.4
    before, after = ({m.name: m.scheme for m in wr.load(tmp_path / name).modules() if isinstance(m, QuantLinear)}
                     for name in ("base", "out"))  # fmt: skip
    assert before == after and len(set(after.values())) == 2
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    # An adapter that does nothing: what was on the grid stays on it, give or take the search for scales.
    assert distance(tiny.logits(wr.load(tmp_path / "out")), tiny.logits(wr.load(tmp_path / "base"))) < 0.1


def test_a_quantized_merge_is_close_to_the_dense_one(quantized, adapter, tmp_path):
    report = wr.merge(adapter, tmp_path / "out", bits=8, calibration=tiny.ids(), samples=64, length=tiny.LENGTH)
    model = wr.load(tmp_path / "out")
    assert {m.scheme.bits for m in model.modules() if isinstance(m, QuantLinear)} == {8}
    assert distance(tiny.logits(model), adapted(quantized, adapter)) < 0.05
    assert report.fidelity["kl_mean"] < 0.01
    tensors = {name: tensor.dtype for name, tensor in model.state_dict().items() if "embed" in name or "norm" in name}
    assert set(tensors.values()) == {torch.bfloat16}


@pytest.mark.parametrize("words", [["--dense"], ["--calibration", "none"]])
def test_the_command_says_which_it_did(adapter, tmp_path, capsys, words):
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "-o", str(out), *words]) == 0
    said = capsys.readouterr().out
    assert ("is a dense model" in said) == (words == ["--dense"])
    assert ("and quantized again" in said) == (words != ["--dense"])
    assert ("quantization_config" in json.loads((out / "config.json").read_text())) == (words != ["--dense"])


def test_the_command_prints_one_json_object(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out"), "--calibration", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "out")


def test_an_adapter_finds_its_base_where_it_is_told(quantized, adapter, copy_of, tmp_path):
    moved = copy_of(adapter, "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/away"}))
    with pytest.raises(UsageError, match=r"/gone/away: no such .* if that lies elsewhere, name it with --base"):
        wr.merge(moved, tmp_path / "out", dense=True)
    wr.merge(moved, tmp_path / "out", base=quantized, dense=True)
    assert distance(tiny.logits(wr.load(tmp_path / "out")), adapted(quantized, adapter)) < 0.05


def test_an_adapter_of_a_dense_model_is_merged_and_quantized(llama, tmp_path):
    get_peft_model(wr.load(llama), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    wr.merge(tmp_path / "adapter", tmp_path / "out", bits=4, calibration="none")
    tiny.quantize(llama, tmp_path / "plain", calibration="none")
    a, b = tiny.stored_weights(tmp_path / "out"), tiny.stored_weights(tmp_path / "plain")
    assert all(torch.equal(a[name].codes, b[name].codes) for name in b)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{llama}", "-o", "out"], "no PEFT adapter"),
        (["{adapter}", "-o", "out", "--dense", "--bits", "4"], "--dense was asked for together with --bits"),
        (["{adapter}", "-o", "out", "--bits", "5"], "bits=5 was asked for"),
        (["{adapter}", "-o", "{llama}"], "exists and is not empty"),
        (["{adapter}", "-o", "out", "--base", "no/where"], "no/where: no such directory"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    adapter, llama, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    code = main(["merge", *(word.format(adapter=adapter, llama=llama) for word in words)])
    assert code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
