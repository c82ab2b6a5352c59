"""Experts taken apart compute what the fused module computes, from the slices a hand would cut, and fuse again."""

import copy

import pytest
import torch
from torch import nn

import tiny
from fused import KINDS, TOKENS, apart, built, met, output
from wellrounded.model.blocks import linears
from wellrounded.model.experts import Experts, fused_experts, layout_of, take_apart


def concatenated(p, e):
    gate, up = p["gate_up_proj"][e].split(p["gate_up_proj"].shape[1] // 2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": p["down_proj"][e]}


def transposed(p, e):
    half = p["gate_up_proj"].shape[2] // 2
    first = {"gate_proj": p["gate_up_proj"][e, :, :half].T, "up_proj": p["gate_up_proj"][e, :, half:].T}
    return {**first, "down_proj": p["down_proj"][e].T}


def interleaved(p, e):
    gate, up = p["gate_up_proj"][e, :, 0::2].T, p["gate_up_proj"][e, :, 1::2].T
    return {"gate_proj": gate, "up_proj": up, "down_proj": p["down_proj"][e].T}


def piled(p, e):
    mine = slice(e * len(p["mlp.w1"]) // 4, (e + 1) * len(p["mlp.w1"]) // 4)
    return {"gate_proj": p["mlp.w1"][mine], "up_proj": p["mlp.v1"][mine], "down_proj": p["mlp.w2"][mine].T}


def named(p, e):
    return {{"weight": "proj"}.get(name, name): whole[e] for name, whole in p.items()}


# What each expert's weights are, worked out by hand from the fused parameters.
SLICES = {
    "mixtral": concatenated,
    "aria_text": transposed,
    "gpt_oss": interleaved,
    "nemotron_h": named,  # without a gate
    "llama4_text": transposed,  # every expert reads all tokens
    "jetmoe": named,  # tokens come sorted, one projection by one module
    "dbrx": piled,
    "longcat_flash": concatenated,  # some experts do nothing
    "inkling_text": lambda p, e: concatenated(p, e) if "gate_up_proj" in p else named(p, e),  # some are shared
    "deepseek_v4": concatenated,  # this and the next one have a gate of their own
    "minimax_m3_vl_text": concatenated,
}
TWO_BANKS = [kind for kind in KINDS if kind != "jetmoe"]


def parameters(module):
    return {name: p.detach() for name, p in module.named_parameters() if not name.endswith("bias")}


# ---- they compute the same ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_taken_apart_computes_the_same(kind):
    model = copy.deepcopy(built(kind))
    take_apart(model, fused_experts(model))
    assert any(isinstance(module, Experts) for module in model.modules()) and not fused_experts(model)
    assert torch.allclose(tiny.logits(model, TOKENS), tiny.logits(built(kind), TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("banks", [[0], [1]])
@pytest.mark.parametrize("kind", TWO_BANKS)
def test_one_bank_alone_may_be_taken_apart(kind, banks):
    model = copy.deepcopy(built(kind))
    layouts = fused_experts(model)
    take_apart(model, layouts, dict.fromkeys(layouts, banks))
    for name, layout in layouts.items():
        experts = model.get_submodule(name)
        held = {path.rpartition(".")[2] for path in linears(experts)}
        assert held == {leaf for bank in banks for leaf in layout.banks[bank]}
        kept = {layout.pieces[leaf].parameter for number in {0, 1} - {*banks} for leaf in layout.banks[number]}
        assert parameters(experts).keys() == kept | {f"{path}.weight" for path in linears(experts)}
    assert torch.allclose(tiny.logits(model, TOKENS), tiny.logits(built(kind), TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nemotron_h"])  # it sums in float32
def test_in_bfloat16_they_round_where_the_fused_module_rounds(kind):
    for fused, arguments in met(kind, torch.bfloat16):
        assert torch.equal(output(apart(fused), arguments), output(fused, arguments))


@pytest.mark.parametrize("banks", [[0], [1]])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "dbrx", "deepseek_v4"])
def test_in_bfloat16_a_bank_that_stays_fused_rounds_as_before(kind, banks):
    for fused, arguments in met(kind, torch.bfloat16):
        assert torch.equal(output(apart(fused, banks), arguments), output(fused, arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_back_as_through_the_fused_module(kind):
    for fused, arguments in met(kind):
        gradients = []
        for module in (fused, apart(fused)):
            own = [a.clone().requires_grad_() if is_float(a) else a for a in arguments]
            result = module(*own)
            wave = torch.arange(result.numel()).reshape(result.shape).sin()  # no two numbers count alike
            gradients.append(torch.autograd.grad((result * wave).sum(), [a for a in own if is_float(a)]))
        for theirs, ours in zip(*gradients):
            assert theirs.any() and torch.allclose(theirs, ours, atol=1e-4 * theirs.abs().max().item(), rtol=0)


def is_float(argument):
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


# ---- which weights they have ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_experts_weight_is_its_slice_of_the_fused_parameter(kind):
    for fused, _ in met(kind):
        experts, whole = apart(fused), parameters(fused)
        count = min(4, len(list(whole.values())[-1]))  # two where they are shared
        wanted = {f"{e}.{leaf}": w for e in range(count) for leaf, w in SLICES[kind](whole, e).items()}
        found = linears(experts)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(layer.weight, wanted[name]) for name, layer in found.items())
        assert sorted(n for bank in range(len(experts.layout.banks)) for one in experts.names(bank) for n in one) == (
            sorted(found)
        )


def test_an_experts_bias_is_its_slice_too():
    fused, _ = met("gpt_oss")[0]
    experts = apart(fused)
    for e in range(4):
        assert torch.equal(experts.get_submodule(f"{e}.gate_proj").bias, fused.gate_up_proj_bias[e, 0::2])
        assert torch.equal(experts.get_submodule(f"{e}.up_proj").bias, fused.gate_up_proj_bias[e, 1::2])
        assert torch.equal(experts.get_submodule(f"{e}.down_proj").bias, fused.down_proj_bias[e])
    assert fused.gate_up_proj_bias.any() and fused.down_proj_bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_an_expert_knows_what_it_is_a_part_of(kind):
    for fused, _ in met(kind):
        experts = apart(fused)
        for name, tensor in experts.state_dict().items():
            path, cut = experts.origin(name)
            assert torch.equal(cut(fused.get_parameter(path)), tensor)
        assert experts.origin("gate_up_proj") is None and experts.origin("norm.up_proj.weight") is None
        assert experts.origin("0.other.weight") is None


# ---- put together again ----


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("banks", [None, [0], [1]])
@pytest.mark.parametrize("kind", KINDS)
def test_fusing_is_the_inverse_of_taking_apart(kind, banks, training):
    if kind == "jetmoe" and banks == [1]:
        banks = []
    for original, arguments in met(kind):
        experts = apart(copy.deepcopy(original).train(training), banks)
        assert all(layer.training is training for layer in [experts, *linears(experts).values()])
        like = copy.deepcopy(original).train(not training)
        for parameter in like.parameters():
            parameter.data.zero_()
        fused = experts.fused(like, experts.state_dict().__getitem__)
        assert type(fused) is type(original) and fused.training is training
        assert all(module.training is training for module in fused.modules())
        for name, parameter in original.named_parameters():
            again = fused.get_parameter(name)
            if kind == "longcat_flash":  # what experts that do nothing have besides is nobody's
                again, parameter = again[:4], parameter[:4]
            assert torch.equal(again, parameter)
        assert torch.equal(output(fused.eval(), arguments), output(original, arguments))


# ---- what experts are ----


def test_projections_can_be_called_otherwise():
    fused, arguments = met("mixtral")[0]
    layout = layout_of(fused).renamed(("w1", "w3", "w2"))
    assert layout.banks == (("w1", "w3"), ("w2",)) and list(layout.pieces) == ["w1", "w3", "w2"]
    experts = Experts(copy.deepcopy(fused), layout)
    assert torch.equal(experts.get_submodule("2.w3").weight, concatenated(parameters(fused), 2)["up_proj"])
    assert torch.equal(output(experts, arguments), output(apart(fused), arguments))
    plain = layout_of(met("nemotron_h")[0][0])
    assert plain.renamed(None) is plain and plain.renamed(("w1", "w3", "w2")) is plain, "it has no gate"
    assert plain.renamed(("w1", "w2")).banks == (("w1",), ("w2",)) and not plain.renamed(("w1", "w2")).gated


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 8),
        nn.Conv1d(8, 8, 3, bias=False),
        nn.Conv2d(8, 8, 3),
        nn.ConvTranspose1d(8, 8, 3, bias=False),
        nn.Bilinear(8, 8, 8, bias=False),
        nn.Embedding(8, 8),
        nn.ModuleList([nn.Linear(8, 8)]),
        tiny.build("llama").model.layers[0].mlp,
        tiny.build("llama").model.layers[0],
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_holds_no_experts_has_no_layout(module):
    assert layout_of(module) is None


def test_what_is_apart_is_not_taken_apart_again():
    model = copy.deepcopy(built("mixtral"))
    take_apart(model, fused_experts(model))
    assert fused_experts(model) == {} and fused_experts(tiny.build("llama")) == {}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_see_few_different_numbers_of_rows(kind, monkeypatch):
    """In bfloat16 on a CPU, where each number costs time and memory; rows that are added change no others."""
    seen, forward = set(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: seen.add(len(x)) or forward(layer, x))
    for fused, arguments in met(kind, torch.bfloat16):
        experts, counts = apart(fused), []
        seen.clear()
        experts.told = lambda bank, routed, counts=counts: counts.extend(routed.counts)
        padded = output(experts, arguments)
        assert seen and all(rows % 16 == 0 for rows in seen) and any(count % 16 for count in counts)
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr("wellrounded.model.experts.ROW_STEP", 1)
            plain = output(experts, arguments)
        assert any(rows % 16 for rows in seen)
        assert (padded - plain).norm() <= 2**-7 * plain.norm()
