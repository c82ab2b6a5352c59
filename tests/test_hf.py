"""Checkpoints of ours and of other tools in transformers, and damaged ones, which are refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig
from transformers.quantizers import auto

import tiny
import wellrounded as wr
from wellrounded.errors import CheckpointError, UsageError
from wellrounded.formats.gptq import to_tensors
from wellrounded.hf.load import load_with_tokenizer
from wellrounded.nn import QuantLinear

LAYER = "model.layers.1.mlp.up_proj"


def layers(model) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def change_config(directory, **changes) -> None:
    """Set keys of quantization_config; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    stored = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in stored.items() if value is not None}
    path.write_text(json.dumps(config))


def assert_same_model(directory, other) -> None:
    assert torch.equal(tiny.logits(wr.load(directory)), tiny.logits(wr.load(other)))


# ---- loading ----


def test_a_quantized_model_loads_with_every_layer_packed(quantized):
    model = wr.load(quantized)
    assert len(layers(model)) == 21 and not model.training
    assert model.dtype == torch.bfloat16
    assert {layer.kernel for layer in layers(model)} <= {"cpu", "torch-int4", "reference"}
    assert not any(type(module) is torch.nn.Linear for module in model.model.modules())
    assert all(parameter.ndim == 1 for name, parameter in model.model.named_parameters() if "layers" in name)


def test_every_kernel_gives_what_the_reference_gives(quantized):
    reference = tiny.logits(wr.load(quantized, kernel="reference"))
    few = tiny.ids(1, length=8, seed=7)  # so few rows that a kernel of its own pays
    for model in (wr.load(quantized), wr.load(quantized, dtype=torch.float32)):
        error = tiny.logits(model).float() - reference.float()
        assert error.norm() / reference.float().norm() < 0.02
        assert (tiny.logits(model, few).float() - reference[:1, :8].float()).norm() / reference[:1, :8].norm() < 0.02


def test_a_kernel_is_used_when_named_and_refused_when_unknown(quantized, llama):
    assert {layer.kernel for layer in layers(wr.load(quantized, kernel="reference"))} == {"reference"}
    with pytest.raises(UsageError, match=r"no kernel is called 'marlin'; there are .*reference"):
        wr.load(quantized, kernel="marlin")
    with pytest.raises(UsageError, match="kernel 'reference' was asked for, but this model is not quantized"):
        wr.load(llama, kernel="reference")


def test_a_dense_directory_loads_too(llama):
    model = wr.load(llama)
    assert not layers(model)
    assert torch.equal(tiny.logits(model), tiny.logits(AutoModelForCausalLM.from_pretrained(llama, dtype="auto")))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_is_followed(quantized, device_map):
    assert torch.equal(tiny.logits(wr.load(quantized, device_map=device_map)), tiny.logits(wr.load(quantized)))


def test_the_dtype_can_be_chosen(quantized):
    model = wr.load(quantized, dtype=torch.float32, kernel="reference")
    assert model.dtype == torch.float32 and tiny.logits(model).dtype == torch.float32
    assert all(layer.scales.dtype == torch.float16 for layer in layers(model))


def test_generation_continues_a_prompt(quantized):
    model, tokenizer = wr.load(quantized), AutoTokenizer.from_pretrained(quantized)
    inputs = tokenizer("The quick brown", return_tensors="pt")["input_ids"]
    output = model.generate(inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(output[:, : inputs.shape[1]], inputs) and output.shape[1] > inputs.shape[1]
    with torch.no_grad():
        first = model(inputs).logits[0, -1].argmax()
    assert output[0, inputs.shape[1]] == first


# ---- registration ----


def mappings():
    return auto.AUTO_QUANTIZER_MAPPING["gptq"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]


def test_register_and_unregister_leave_transformers_as_it_was(quantized):
    before = mappings()
    wr.load(quantized)
    assert mappings() != before
    wr.register()
    wr.register()
    assert mappings() != before
    wr.unregister()
    assert mappings() == before
    wr.unregister()
    assert mappings() == before


def test_from_pretrained_works_once_registered(quantized):
    wr.register()
    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert len(layers(model)) == 21
    assert torch.equal(tiny.logits(model), tiny.logits(wr.load(quantized)))
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModelForCausalLM.from_pretrained(quantized, quantization_config=GPTQConfig(bits=4))
    assert torch.equal(tiny.logits(again), tiny.logits(model))


# ---- saving ----


def test_a_loaded_model_saves_to_an_equal_one(quantized, tmp_path):
    model = wr.load(quantized)
    model.save_pretrained(tmp_path / "saved")
    stored, saved = (load_file(d / "model.safetensors") for d in (quantized, tmp_path / "saved"))
    assert stored.keys() == saved.keys() and all(torch.equal(stored[name], saved[name]) for name in stored)
    before, after = (json.loads((d / "config.json").read_text()) for d in (quantized, tmp_path / "saved"))
    assert before["quantization_config"] == after["quantization_config"]
    assert_same_model(tmp_path / "saved", quantized)


def test_rules_for_single_layers_survive_saving(llama, tmp_path):
    recipe = wr.Recipe(wr.Scheme(4, 32), (wr.Rule(r".*down_proj", wr.Scheme(8, 64)), wr.Rule(r".*o_proj", None)))
    tiny.quantize(llama, tmp_path / "out", recipe=recipe, calibration="none")
    model = wr.load(tmp_path / "out")
    assert [str(layer.scheme) for layer in layers(model)[3:6]] == ["4-bit g32 sym"] * 2 + ["8-bit g64 sym"]
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(tmp_path / "saved", tmp_path / "out")


# ---- other architectures ----


def with_biases(model):
    """The biases that a model starts with are zero, and would hide that they were lost."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi", "bloom", "mamba2", "gemma3_text", "qwen3_moe"])
def test_an_architecture_goes_to_disk_and_comes_back(kind, tmp_path):
    source = with_biases(tiny.build(kind))
    tiny.quantize(source, tmp_path / "out", group_size=32)
    model = wr.load(tmp_path / "out", kernel="reference")
    expected = tiny.logits(tiny.twin(source, tmp_path / "out"))
    assert torch.allclose(tiny.logits(model), expected, atol=1e-4)  # a bias is added after the product, not inside it
    assert not torch.allclose(expected, tiny.logits(source), atol=1e-2)
    assert layers(model)


def test_gpt2_loads_from_files_without_the_base_models_prefix(tmp_path):
    source = with_biases(tiny.build("gpt2"))
    tiny.save(source, tmp_path / "source")
    with tiny.rewritten(tmp_path / "source") as tensors:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tiny.quantize(tmp_path / "source", tmp_path / "out")
    assert "h.0.attn.c_attn.qweight" in load_file(tmp_path / "out" / "model.safetensors")
    expected = tiny.logits(tiny.twin(source, tmp_path / "out"))
    assert torch.allclose(tiny.logits(wr.load(tmp_path / "out", kernel="reference")), expected, atol=1e-4)


# ---- checkpoints of other tools ----


def test_a_configuration_without_a_checkpoint_format_means_version_one(quantized, copy_of):
    copy = copy_of(quantized)
    change_config(copy, checkpoint_format=None, format=None, pack_dtype=None, lm_head=None, meta=None)
    assert_same_model(copy, quantized)


def test_version_two_is_read(quantized, copy_of):
    copy = copy_of(quantized)
    second = {f"{name}.{key}": tensor for name, weight in tiny.stored_weights(quantized).items()
              for key, tensor in to_tensors(weight, "gptq_v2").items()}  # fmt: skip
    with tiny.rewritten(copy) as tensors:
        tensors |= second
    with pytest.raises(CheckpointError, match=r'qzeros holds zero points 9 to 9 .*"checkpoint_format": \'gptq_v2\''):
        wr.load(copy)
    change_config(copy, checkpoint_format="gptq_v2")
    assert_same_model(copy, quantized)


def test_one_group_per_output_is_read(llama, tmp_path):
    tiny.quantize(llama, tmp_path / "out", group_size=-1)
    assert {layer.scales.shape[0] for layer in layers(wr.load(tmp_path / "out"))} == {1}
    expected = tiny.logits(tiny.twin(wr.load(llama), tmp_path / "out"))
    assert torch.equal(tiny.logits(wr.load(tmp_path / "out", kernel="reference")), expected)


def test_a_group_index_may_be_left_out(quantized, copy_of, tmp_path):
    copy = copy_of(quantized)
    with tiny.rewritten(copy) as tensors:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]
    assert_same_model(copy, quantized)
    wr.load(copy).save_pretrained(tmp_path / "saved")
    assert_same_model(tmp_path / "saved", quantized)


def test_scales_of_another_float_type_are_read(quantized, copy_of):
    copy = copy_of(quantized)
    with tiny.rewritten(copy) as tensors:
        tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("scales")}
    assert_same_model(copy, quantized)


def test_a_quantization_described_in_its_own_file_only_is_read(quantized, copy_of):
    copy = copy_of(quantized)
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    old = {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "sym": True, "model_name": 0}
    (copy / "quantize_config.json").write_text(json.dumps(old))
    assert_same_model(copy, quantized)
    with pytest.raises(UsageError, match="already quantized"):
        tiny.quantize(copy, copy.with_name("twice"))


def test_layers_named_for_quantization_are_the_only_ones_expected_packed(llama, tmp_path):
    tiny.quantize(llama, tmp_path / "out", ignore=["mlp"])
    change_config(tmp_path / "out", dynamic=None, modules_in_block_to_quantize=[
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
    ])  # fmt: skip
    assert len(layers(wr.load(tmp_path / "out"))) == 12


# ---- damaged checkpoints ----


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.qweight"), rf"^{LAYER}\.qweight is missing, and so is a dense {LAYER}\.weight"),
        (lambda t: t.pop(f"{LAYER}.scales"), rf"^{LAYER}\.scales is missing; fetch the checkpoint again"),
        (lambda t: t.pop("model.norm.weight"), r"none of its files has model\.norm\.weight; download it again"),
        (lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:-1]}), rf"^{LAYER}\.qweight is .*\[7, 128\], "),
        (lambda t: t.update({f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"].long()}), rf"^{LAYER}\.qzeros is .*, expected "),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"model\.norm\.weight is \[65\], the model needs"),
        (lambda t: t[f"{LAYER}.scales"].view(-1)[5].fill_(torch.nan), rf"^{LAYER}\.scales is NaN or Inf in 1 of 128"),
        (lambda t: t[f"{LAYER}.g_idx"].fill_(9), rf"^{LAYER}\.g_idx holds groups 9 to 9, expected 0 to 0"),
        (lambda t: t[f"{LAYER}.qzeros"].fill_(0), rf"^{LAYER}\.qzeros holds zero points 1 to 1"),
        (lambda t: t.update({"model.layers.7.up.qweight": t[f"{LAYER}.qweight"]}), r"layers\.7\.up\.qweight .* no lin"),
    ],
    ids=["qweight", "scales", "norm", "shape", "dtype", "norm shape", "nan", "group", "zeros", "stray"],
)  # fmt: skip
def test_a_damaged_tensor_is_named(quantized, copy_of, damage, message):
    copy = copy_of(quantized)
    with tiny.rewritten(copy) as tensors:
        damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        wr.load(copy)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{LAYER}.weight", "lm_head.weight"])
def test_a_dense_model_is_not_completed_with_random_numbers(llama, copy_of, name):
    copy = copy_of(llama)
    with tiny.rewritten(copy) as tensors:
        del tensors[name]
    with pytest.raises(CheckpointError, match=f"none of its files has {name}"):
        wr.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_format": "gptq_p"}, r"checkpoint_format is 'gptq_p', expected 'gptq' or 'gptq_v2'; quantize the"),
        ({"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "awq"}, "quant_method is 'awq', expected 'gptq'; load this model with transformers instead"),
        ({"bits": None}, "quantization_config has no bits; add the value"),
        ({"bits": 5}, "bits=5 was asked for"),
        ({"bits": "4"}, "bits is '4', expected int"),
    ],
)
def test_an_unknown_format_is_named_with_its_file(quantized, copy_of, changes, message):
    copy = copy_of(quantized)
    change_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        wr.load(copy)
    assert str(caught.value).startswith(f"{copy / 'config.json'}: ")


def test_another_group_size_than_the_files_have_is_named(quantized, copy_of):
    copy = copy_of(quantized)
    change_config(copy, group_size=32)
    with pytest.raises(CheckpointError, match=r"qzeros is .*, expected .* for 4-bit g32 sym; check bits and"):
        wr.load(copy)


def test_a_missing_shard_is_named(sharded, copy_of):
    copy = copy_of(sharded)
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names {shard.name}, which is not there"):
        wr.load(copy)


def test_a_truncated_file_is_named(quantized, copy_of):
    path = copy_of(quantized) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* bytes, its header promises"):
        wr.load(path.parent)


def test_a_broken_configuration_is_named(quantized, copy_of):
    copy = copy_of(quantized)
    (copy / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(UsageError, match=r"config\.json"):
        wr.load(copy)
    (copy / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UsageError, match=r"config\.json: .*no-such-model"):
        wr.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json, so it is not a model"):
        wr.load(copy)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "justaname", "a/b/c"])
def test_a_model_that_is_nowhere_is_refused(name):
    with pytest.raises(UsageError, match=r"no such directory, and not a hub id \(ORGANIZATION/NAME\) either"):
        wr.load(name)


def test_an_unfinished_run_is_no_model(llama, tmp_path):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(llama, tmp_path / "out", progress=stop)
    with pytest.raises(CheckpointError, match=r"out: unfinished, its finished blocks lie in out\.partial; run"):
        wr.load(tmp_path / "out")
    with pytest.raises(UsageError, match=r"out\.partial: an unfinished run, not a model"):
        wr.load(tmp_path / "out.partial")


# ---- models that are refused ----


@pytest.mark.parametrize("architectures", [None, ["MyOwnModel"]])
def test_a_configuration_that_names_no_class_is_refused(architectures, tmp_path):
    from transformers import BertConfig

    BertConfig(hidden_size=64, num_hidden_layers=1, architectures=architectures).save_pretrained(tmp_path)
    named = "nothing" if architectures is None else "MyOwnModel"
    with pytest.raises(UsageError, match=rf"'bert' model \({named}\), which transformers .* cannot build"):
        wr.quantize(tmp_path, tmp_path.with_name("out"))


def test_a_quantized_model_is_not_quantized_again(quantized, tmp_path):
    with pytest.raises(UsageError, match=r"already quantized \(gptq\); start from the original model"):
        tiny.quantize(quantized, tmp_path / "out")
    with pytest.raises(UsageError, match="already quantized; start from the original model"):
        tiny.quantize(wr.load(quantized), tmp_path / "out")


def test_negative_scales_are_as_good_as_positive_ones(quantized, copy_of):
    """A full-range grid has both: the negative scale with codes mirrored around the zero point is nearly the same."""
    flipped = {}
    for name, weight in tiny.stored_weights(quantized).items():
        codes = (2 * weight.zeros[:, weight.group_index.long()].int() - weight.codes.int()).clamp(0, 15)
        mirrored = replace(weight, codes=codes.to(torch.uint8), scales=-weight.scales)
        flipped |= {f"{name}.{key}": tensor for key, tensor in to_tensors(mirrored, "gptq").items()}
    copy = copy_of(quantized)
    with tiny.rewritten(copy) as tensors:
        tensors |= flipped
    weights = tiny.stored_weights(copy)
    assert any((weight.scales < 0).any() for weight in weights.values())
    expected = tiny.logits(wr.load(copy, kernel="reference"))
    assert (tiny.logits(wr.load(copy)) - expected).norm() / expected.norm() < 0.02


def test_a_copy_without_tokenizer_still_loads(quantized, copy_of):
    copy = copy_of(quantized)
    for path in copy.glob("token*"):
        path.unlink()
    model, tokenizer = load_with_tokenizer(copy)
    assert tokenizer is None and layers(model)
