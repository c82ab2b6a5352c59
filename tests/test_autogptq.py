"""AutoGPTQ's names: its README's quick tour runs with the import line changed, and so does code around it."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TextGenerationPipeline

import tiny
import wellrounded as wr
from wellrounded.autogptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from wellrounded.errors import UsageError
from wellrounded.nn import QuantLinear

EXAMPLES = [{"input_ids": row, "attention_mask": [1] * tiny.LENGTH} for row in tiny.ids(80).tolist()]


def layers(model) -> list[QuantLinear]:
    return [module for module in model.model.modules() if isinstance(module, QuantLinear)]


@pytest.fixture(autouse=True)
def strict():
    """What is not announced must not happen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def quantized_by_name(source, examples=EXAMPLES, **config) -> AutoGPTQForCausalLM:
    wanted = BaseQuantizeConfig(**{"bits": 4, "group_size": 64, "desc_act": False, **config})
    model = AutoGPTQForCausalLM.from_pretrained(source, wanted)
    model.quantize(examples)
    return model


def test_the_quick_tour_runs(tmp_path, monkeypatch):
    """AutoGPTQ's README, line by line, but for the import and a device that every machine has."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tiny.build("opt", torch.float16), tmp_path / "facebook" / "opt-125m")

    pretrained_model_dir = "facebook/opt-125m"
    quantized_model_dir = "opt-125m-4bit"
    tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
    examples = [tokenizer("auto-gptq is an easy-to-use model quantization library with user-friendly apis.")]
    quantize_config = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)
    with pytest.warns(UserWarning, match="calibrated on 65 tokens"):
        model.quantize(examples)
    model.save_quantized(quantized_model_dir)
    model.save_quantized(quantized_model_dir, use_safetensors=True)
    model = AutoGPTQForCausalLM.from_quantized(quantized_model_dir, device="cpu")
    inputs = tokenizer("auto_gptq is", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    text = pipeline("auto_gptq is", max_new_tokens=5, do_sample=False)[0]["generated_text"]

    assert len(layers(model)) == 18 and {str(layer.scheme) for layer in layers(model)} == {"4-bit g128 sym"}
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert text == tokenizer.decode(output[0], skip_special_tokens=True)
    assert "quantization_report.json" in {path.name for path in (tmp_path / quantized_model_dir).iterdir()}


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ({}, {"group_size": 64}),
        ({"group_size": -1, "bits": 3}, {"group_size": -1, "bits": 3}),
        ({"desc_act": True, "sym": False}, {"group_size": 64, "act_order": True, "sym": False}),
        ({"desc_act": True, "static_groups": True}, {"group_size": 64}),
        (
            {"damp_percent": 0.1, "true_sequential": False},
            {"group_size": 64, "settings": wr.Settings(damping=0.1, true_sequential=False)},
        ),
    ],
)
def test_what_is_asked_for_is_what_is_done(llama, tmp_path, config, same):
    model = quantized_by_name(llama, **config)
    model.save_quantized(tmp_path / "mine")
    rows = [row["input_ids"] for row in EXAMPLES]
    tiny.quantize(llama, tmp_path / "ours", calibration=rows, samples=128, length=256, **same)
    mine, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("mine", "ours"))
    assert mine.keys() == ours.keys() and all(torch.equal(mine[name], ours[name]) for name in ours)


def test_a_model_that_was_changed_before_is_quantized_as_it_is_now(llama, tmp_path):
    model = AutoGPTQForCausalLM.from_pretrained(llama, BaseQuantizeConfig(4, 64, desc_act=False))
    assert not layers(model)
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight.mul_(3)
    changed = tiny.save(model.model, tmp_path / "changed")
    model.quantize(EXAMPLES)
    other = quantized_by_name(changed)
    assert len(layers(model)) == len(layers(other)) == 21
    for a, b in zip(layers(model), layers(other)):
        assert all(torch.equal(a.tensors()[key], b.tensors()[key]) for key in a.tensors())
    assert torch.equal(tiny.logits(model.model), tiny.logits(other.model))
    assert torch.equal(model(tiny.ids(1)).logits, model.model(tiny.ids(1)).logits)


def test_biases_survive_when_a_model_in_memory_is_quantized(tmp_path):
    source = tiny.build("opt")
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    tiny.save(source, tmp_path / "m")
    model = AutoGPTQForCausalLM.from_pretrained(tmp_path / "m", BaseQuantizeConfig(8, 32, desc_act=False))
    assert torch.equal(tiny.logits(model.model), tiny.logits(source))
    model.quantize(EXAMPLES)
    assert (tiny.logits(model.model) - tiny.logits(source)).abs().max() < 0.1 < tiny.logits(source).std()


@pytest.mark.parametrize("where", [{"device": "cpu"}, {"device_map": "auto"}, {"max_memory": {"cpu": "1GiB"}}, {}])
def test_a_quantized_model_is_loaded_wherever_it_is_wanted(quantized, where):
    model = AutoGPTQForCausalLM.from_quantized(quantized, **where)
    assert torch.equal(tiny.logits(model.model), tiny.logits(wr.load(quantized)))
    assert model.quantized and model.quantize_config == BaseQuantizeConfig(
        4, 64, desc_act=False, static_groups=True, true_sequential=True, checkpoint_format="gptq"
    )
    assert model.config.vocab_size == tiny.VOCABULARY and model.device == torch.device("cpu")
    assert model.to("cpu") is model


def test_a_file_is_chosen_by_its_name_where_there_are_several(quantized, llama, copy_of, tmp_path):
    copy = copy_of(quantized)
    (copy / "model.safetensors").rename(copy / "gptq_model-4bit-64g.safetensors")
    tiny.quantize(llama, tmp_path / "other", seed=1, settings=wr.Settings(damping=1.0))
    (tmp_path / "other" / "model.safetensors").rename(copy / "another.safetensors")
    model = AutoGPTQForCausalLM.from_quantized(copy, model_basename="gptq_model-4bit-64g")
    assert torch.equal(tiny.logits(model.model), tiny.logits(wr.load(quantized)))
    other = AutoGPTQForCausalLM.from_quantized(copy, model_basename="another.safetensors")
    assert not torch.equal(tiny.logits(other.model), tiny.logits(model.model))


def test_a_configuration_counts_where_a_checkpoint_does_not_describe_itself(quantized, copy_of):
    copy = copy_of(quantized)
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "quantize_config.json").unlink()
    model = AutoGPTQForCausalLM.from_quantized(copy, quantize_config=BaseQuantizeConfig(4, 64, desc_act=False))
    assert torch.equal(tiny.logits(model.model), tiny.logits(wr.load(quantized)))


def test_a_configuration_goes_to_disk_and_comes_back(tmp_path):
    config = BaseQuantizeConfig(bits=3, group_size=32, damp_percent=0.05, sym=False)
    config.save_pretrained(tmp_path / "new")
    assert BaseQuantizeConfig.from_pretrained(tmp_path / "new") == config
    assert json.loads((tmp_path / "new" / "quantize_config.json").read_text())["group_size"] == 32


def test_switches_without_meaning_are_named_once(quantized):
    with pytest.warns(UserWarning) as caught:
        AutoGPTQForCausalLM.from_quantized(
            quantized, device="cpu", use_triton=True, inject_fused_attention=False, disable_exllama=True,
            use_safetensors=True, trainable=True,
        )  # fmt: skip
    assert [str(warning.message) for warning in caught] == [
        "AutoGPTQ: use_triton, disable_exllama, trainable: without meaning here, and ignored"
    ]


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda q, m: AutoGPTQForCausalLM.from_quantized(q, device="cuda:7"), UsageError, "no such GPU here"),
        (lambda q, m: AutoGPTQForCausalLM.from_quantized(q).quantize(EXAMPLES), UsageError, "quantized already; load"),
        (lambda q, m: AutoGPTQForCausalLM.from_pretrained("no/where", BaseQuantizeConfig()), UsageError, "no/where"),
        (lambda q, m: AutoGPTQForCausalLM.from_pretrained(m, BaseQuantizeConfig()).save_quantized("x"), UsageError,
         "not quantized yet; call quantize"),
        (lambda q, m: quantized_by_name(m, examples=[]), UsageError, "calibration is empty"),
        (lambda q, m: quantized_by_name(m, bits=5), UsageError, "bits=5 was asked for"),
        (lambda q, m: quantized_by_name(q), UsageError, "it is quantized already"),
        (lambda q, m: AutoGPTQForCausalLM.from_quantized(q).save_quantized("x", speed=9), TypeError, "speed"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_a_sentence(quantized, llama, tmp_path, monkeypatch, act, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        act(quantized, llama)
    assert not (tmp_path / "x").exists()
