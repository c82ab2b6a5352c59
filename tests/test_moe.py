"""Models with experts, from directory to directory: under which names they are stored, and that they run as stored."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTQConfig

import tiny
import tiny_configs
import wellrounded as wr
from wellrounded.errors import CheckpointError
from wellrounded.formats.config import from_config
from wellrounded.model.experts import Experts
from wellrounded.nn import QuantLinear

# What a layer of experts is called in the model's own files, and how its first, second and last projections are.
STORED = {
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}", ("w1", "w3", "w2"), (0, 1, 2)),
    "qwen3_moe": ("model.layers.{}.mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj"), (0, 1, 2)),
    "gpt_oss": ("model.layers.{}.mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj"), (0, 1)),
    "deepseek_v3": ("model.layers.{}.mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj"), (1, 2)),
}
KINDS = pytest.mark.parametrize("kind", STORED)
ROUTERS = {
    "mixtral": ["block_sparse_moe.gate.weight"],
    "qwen2_moe": ["mlp.gate.weight", "mlp.shared_expert_gate.weight"],
    "gpt_oss": ["mlp.router.weight", "mlp.router.bias"],
    "deepseek_v3": ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"],
}


@pytest.fixture(scope="session")
def dense(_made):
    """A directory as transformers saves it, in bfloat16."""

    def make(kind):
        return _made(kind, lambda out: tiny.save(tiny_configs.build(kind).to(torch.bfloat16), out))

    return make


@pytest.fixture(scope="session")
def packed(_made, dense):
    """The same in 4 bits."""
    return lambda kind: _made(f"{kind}-packed", lambda out: tiny.quantize(dense(kind), out, group_size=32))


def expert_layers(kind):
    pattern, leaves, blocks = STORED[kind]
    return [pattern.format(block, e, leaf) for block in blocks for e in range(4) for leaf in leaves]


def quantization(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def assert_same_tensors(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_runs_as(model, directory, source):
    """To the last bit, the dense model with the weights that `directory` stands for."""
    expected = tiny.logits(tiny.twin(tiny.in_turn(source), directory))
    assert torch.equal(tiny.logits(model), expected)
    assert not torch.equal(expected, tiny.logits(tiny.in_turn(source)))


# ---- what is stored ----


@KINDS
def test_a_directory_and_the_model_in_memory_give_the_same(kind, dense, packed, tmp_path):
    tiny.quantize(tiny.in_turn(dense(kind)), tmp_path / "out", group_size=32)
    assert_same_tensors(tiny.tensors(tmp_path / "out"), tiny.tensors(packed(kind)))


@KINDS
def test_every_expert_is_packed_under_the_name_of_the_models_own_files(kind, dense, packed):
    weights, stored = tiny.stored_weights(packed(kind)), tiny.tensors(packed(kind))
    experts = expert_layers(kind)
    assert {name for name in weights if ".experts." in name} == set(experts)
    assert {str(weights[name].scheme) for name in experts} == {"4-bit g32 sym"}
    assert all(tensor.ndim < 3 for tensor in stored.values())
    leaves = ("qweight", "qzeros", "scales", "g_idx", *(["bias"] if kind == "gpt_oss" else []))
    assert {n for n in stored if ".experts." in n} == {f"{name}.{leaf}" for name in experts for leaf in leaves}
    theirs = {name for name in tiny.tensors(dense(kind)) if ".experts." in name}
    assert kind == "gpt_oss" or theirs == {f"{name}.weight" for name in experts}


def test_the_biases_of_fused_experts_are_stored_expert_by_expert(dense, packed):
    stored, source = tiny.tensors(packed("gpt_oss")), tiny.tensors(dense("gpt_oss"))
    for block in (0, 1):
        first, second = (source[f"model.layers.{block}.mlp.experts.{n}_proj_bias"] for n in ("gate_up", "down"))
        for e in range(4):
            mine = [stored[f"model.layers.{block}.mlp.experts.{e}.{n}_proj.bias"] for n in ("gate", "up", "down")]
            assert all(map(torch.equal, mine, (first[e, 0::2], first[e, 1::2], second[e])))


@pytest.mark.parametrize("kind", ROUTERS)
def test_what_chooses_the_experts_stays_dense_and_has_a_rule_that_says_so(kind, dense, packed):
    source, stored = tiny.tensors(dense(kind)), tiny.tensors(packed(kind))
    routers = [name for name in source if any(name.endswith(ending) for ending in ROUTERS[kind])]
    assert len(routers) == {"mixtral": 3, "qwen2_moe": 4, "gpt_oss": 4, "deepseek_v3": 4}[kind]
    assert all(torch.equal(stored[name], source[name]) for name in routers)
    rules = [key.removeprefix("-:") for key in quantization(packed(kind))["dynamic"] if key.startswith("-:")]
    for name in routers:
        layer = name.replace("block_sparse_moe", "mlp").rpartition(".")[0]
        assert any(re.match(rule, layer) for rule in rules)
        assert from_config(quantization(packed(kind))).recipe.scheme_of(layer) is None
    report = json.loads((packed(kind) / "quantization_report.json").read_text())
    assert set(report["kept"].values()) == {"chooses the experts"} and report["problems"] == []


@KINDS
def test_the_report_says_how_many_tokens_each_expert_read(kind, packed):
    report = json.loads((packed(kind) / "quantization_report.json").read_text())
    tokens = {layer["name"]: layer["tokens"] for layer in report["layers"]}
    pattern, leaves, blocks = STORED[kind]
    pattern = pattern.replace("block_sparse_moe", "mlp")  # as it is called in the model
    for block in blocks:
        by_leaf = [[tokens[pattern.format(block, e, leaf)] for e in range(4)] for leaf in leaves]
        assert by_leaf[0] == by_leaf[1] == by_leaf[2] and sum(by_leaf[0]) == 64 * tiny.LENGTH * 2
        assert tokens[f"model.layers.{block}.self_attn.o_proj"] == 64 * tiny.LENGTH


# ---- what is loaded ----


@KINDS
def test_what_is_loaded_computes_what_is_stored(kind, dense, packed):
    model = wr.load(packed(kind), kernel="reference")
    assert_runs_as(model, packed(kind), dense(kind))
    assert not [name for name, p in model.named_parameters() if p.ndim > 2]


@KINDS
def test_transformers_loads_the_same_and_saves_it_under_the_same_names(kind, dense, packed, tmp_path):
    wr.register()
    model = AutoModelForCausalLM.from_pretrained(packed(kind))
    assert_same_tensors(model.state_dict(), wr.load(packed(kind)).state_dict())
    assert_runs_as(wr.load(packed(kind), kernel="reference"), packed(kind), dense(kind))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tiny.tensors(tmp_path / "saved"), tiny.tensors(packed(kind)))
    assert quantization(tmp_path / "saved") == quantization(packed(kind))


@KINDS
def test_dequantizing_gives_the_model_back_with_the_weights_that_are_stored(kind, dense, packed):
    model = wr.load(packed(kind), kernel="reference")
    model.dequantize()
    twin = tiny.twin(tiny.in_turn(dense(kind)), packed(kind))
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert not any(isinstance(module, Experts | QuantLinear) for module in model.modules())
    twin.set_experts_implementation(model.config._experts_implementation)
    assert torch.equal(tiny.logits(model), tiny.logits(twin))


def test_dequantized_experts_do_what_the_models_configuration_says(packed):
    model = wr.load(packed("mixtral"))
    model.dequantize()
    model.set_experts_implementation("batched_mm")
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm"


SHORT = {".gate_proj": ".w1", ".up_proj": ".w3", ".down_proj": ".w2"}


# GPTQModel writes Mixtral as transformers' code calls it, older tools as its own files do.
@pytest.mark.parametrize(
    ("kind", "spelling"),
    [("mixtral", tiny.MIXTRAL), ("mixtral", {".block_sparse_moe.": ".mlp."}),
     ("mixtral", {new: old for old, new in SHORT.items()}), ("qwen3_moe", SHORT), ("gpt_oss", SHORT)],
    ids=["mlp, gate_proj", "mlp, w1", "block_sparse_moe, gate_proj", "qwen3_moe, w1", "gpt_oss, w1"],
)  # fmt: skip
def test_experts_that_are_spelled_otherwise_are_the_same(kind, spelling, packed, copy_of):
    copy = copy_of(packed(kind))
    with tiny.rewritten(copy) as stored:
        for name in [name for name in stored if ".experts." in name or ".block_sparse_moe." in name]:
            other = name
            for old, new in spelling.items():
                other = other.replace(old, new)
            stored[other] = stored.pop(name)
    expected = tiny.logits(wr.load(packed(kind)))
    assert torch.equal(tiny.logits(wr.load(copy)), expected)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(copy)), expected)


@pytest.mark.parametrize("load", [wr.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
@pytest.mark.parametrize("lost", ["qweight", "scales", "(qweight|qzeros|scales|g_idx)"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_experts_tensor_that_is_not_there_is_missed(kind, lost, load, packed, copy_of):
    copy, layer = copy_of(packed(kind)), expert_layers(kind)[7]
    with tiny.rewritten(copy) as stored:
        for name in [name for name in stored if re.fullmatch(rf"{re.escape(layer)}\.{lost}", name)]:
            del stored[name]
    wr.register()
    with pytest.raises(CheckpointError, match=rf"{re.escape(layer[-12:])}\.(qweight|scales) is missing"):
        load(copy)


@pytest.mark.parametrize("load", [wr.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
@pytest.mark.parametrize("lost", ["experts", "gate_proj", "down_proj"])
def test_what_all_experts_of_a_layer_lack_is_missed(lost, load, packed, copy_of):
    copy = copy_of(packed("qwen3_moe"))
    with tiny.rewritten(copy) as stored:
        for name in [name for name in stored if "layers.1.mlp" in name and lost in name]:
            del stored[name]
    wr.register()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\."):
        load(copy)


# ---- packed while loading ----


@KINDS
def test_experts_are_packed_while_they_are_loaded(kind, dense, tmp_path):
    model = wr.load(dense(kind), bits=4, group_size=32, kernel="reference")
    tiny.quantize(dense(kind), tmp_path / "out", group_size=32, calibration="none")
    assert_same_tensors(model.state_dict(), wr.load(tmp_path / "out", kernel="reference").state_dict())
    assert_runs_as(model, tmp_path / "out", dense(kind))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tiny.tensors(tmp_path / "saved"), tiny.tensors(tmp_path / "out"))


@pytest.fixture
def on_the_fly(dense):
    """Quantized by transformers' own call while it is loaded."""
    wr.register()
    config = GPTQConfig(4, group_size=32, dataset=[tiny.TEXT * 100], tokenizer=tiny.tokenizer())
    return lambda kind: AutoModelForCausalLM.from_pretrained(dense(kind), quantization_config=config)


@KINDS
def test_transformers_packs_experts_while_it_loads_them(kind, dense, on_the_fly):
    model, source = on_the_fly(kind), tiny.in_turn(dense(kind)).state_dict()
    experts = [model.get_submodule(name.replace("block_sparse_moe", "mlp")) for name in expert_layers(kind)]
    assert all(isinstance(layer, QuantLinear) for layer in experts)
    shared = model.state_dict().keys() & source.keys()
    assert len(shared) > 9 and all(torch.equal(model.state_dict()[name], source[name]) for name in shared)
    tiny.logits(model)


def test_the_biases_of_experts_that_are_packed_while_they_are_loaded_are_the_sources(dense, on_the_fly):
    model, source = on_the_fly("gpt_oss"), tiny.in_turn(dense("gpt_oss"))
    for ours, theirs in zip(model.model.layers, source.model.layers):
        for e in range(4):
            assert torch.equal(
                ours.mlp.experts.get_submodule(f"{e}.down_proj").bias, theirs.mlp.experts.down_proj_bias[e]
            )
