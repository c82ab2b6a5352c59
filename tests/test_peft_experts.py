"""Adapters on experts that are taken apart: linear layers like any other, for PEFT too."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
import wellrounded as wr
from wellrounded.model.experts import Experts
from wellrounded.nn import QuantLinear

LEAVES = {"mixtral": ["w1", "w2"], "qwen3_moe": ["gate_proj"]}


@pytest.fixture(scope="module", params=LEAVES)
def both(request, tmp_path_factory):
    """An architecture, its dense directory and its quantized one."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny.save(tiny.build(request.param), directory / "dense")
    tiny.quantize(directory / "dense", directory / "quantized", group_size=32)
    return request.param, directory


def adapted(directory, target):
    """The quantized model with an adapter that changes what it computes."""
    torch.manual_seed(0)
    model = wr.load(directory / "quantized", dtype=torch.float32, kernel="reference")
    return get_peft_model(model, LoraConfig(target_modules=target, r=4, init_lora_weights=False))


def on_experts(model) -> set[str]:
    return {name for name, _ in model.named_modules() if ".experts." in name and name.endswith("lora_A.default")}


def test_an_adapter_on_one_projection_is_on_that_of_every_expert(both):
    kind, directory = both
    model = adapted(directory, LEAVES[kind])
    assert len(on_experts(model)) == 3 * 4 * len(LEAVES[kind]), "blocks, experts, projections"
    plain = tiny.logits(wr.load(directory / "quantized", dtype=torch.float32, kernel="reference"))
    assert not torch.allclose(tiny.logits(model), plain, atol=1e-2)
    loss = model(input_ids=tiny.ids(2), labels=tiny.ids(2)).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert sum(g is not None and bool(g.any()) for g in gradients) > len(gradients) / 2


def test_all_linear_means_the_experts_too(both):
    _, directory = both
    model = adapted(directory, "all-linear")
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len([n for n, _ in model.named_modules() if n.endswith("lora_A.default")]) == len(packed)


@pytest.mark.parametrize("target", ["one", "all-linear"])
def test_it_is_saved_loaded_and_merged(target, both, tmp_path):
    kind, directory = both
    model = adapted(directory, LEAVES[kind] if target == "one" else target)
    model.save_pretrained(tmp_path / "adapter")
    expected = tiny.logits(model)
    again = wr.load(directory / "quantized", dtype=torch.float32, kernel="reference")
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(again, tmp_path / "adapter")), expected)
    wr.merge(tmp_path / "adapter", tmp_path / "merged", base=directory / "quantized", dense=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not any(isinstance(module, Experts) for module in merged.modules())
    assert (tiny.logits(merged) - expected).norm() < 1e-4 * expected.norm()


def test_models_with_fused_experts_are_served_as_before(both):
    kind, directory = both
    wr.load(directory / "quantized")
    dense = AutoModelForCausalLM.from_pretrained(directory / "dense")
    model = get_peft_model(
        dense, LoraConfig(target_modules=["gate_proj", "up_proj"] if kind != "mixtral" else ["w1", "w3"])
    )
    assert any("lora" in name and "experts" in name for name, _ in model.named_parameters())
    assert not any(isinstance(module, Experts) for module in model.modules())
