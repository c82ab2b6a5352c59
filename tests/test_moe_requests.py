"""What can be asked of a model with experts: schemes, exceptions, going on after an end, experts nobody is sent to."""

import copy
import json

import pytest
import torch
from torch import nn

import tiny
import tiny_configs
import wellrounded as wr
from wellrounded.calibration import gather
from wellrounded.core import rtn
from wellrounded.errors import UsageError
from wellrounded.model.experts import Experts


@pytest.fixture(scope="session")
def dense(_made):
    """A directory as transformers saves it, in bfloat16."""

    def make(kind):
        return _made(kind, lambda out: tiny.save(tiny_configs.build(kind).to(torch.bfloat16), out))

    return make


def quantize(source, out, **options):
    return tiny.quantize(source, out, **{"group_size": 32, **options})


def assert_runs_as_stored(out, source):
    """To the last bit, the dense model with the weights that `out` stands for; the model that was loaded."""
    model = wr.load(out, kernel="reference", experts_implementation="eager")
    expected = tiny.logits(tiny.twin(tiny.in_turn(source), out))
    assert torch.equal(tiny.logits(model), expected)
    assert not torch.equal(expected, tiny.logits(tiny.in_turn(source)))
    return model


def schemes(out, of=""):
    return {str(weight.scheme) for name, weight in tiny.stored_weights(out).items() if of in name}


# ---- schemes ----


@pytest.mark.parametrize(
    "options",
    [{"bits": 2}, {"bits": 3}, {"bits": 8}, {"sym": False}, {"act_order": True}, {"calibration": "none"},
     {"settings": wr.Settings(true_sequential=False)}],
    ids=str,
)  # fmt: skip
def test_experts_are_packed_as_asked_and_run_as_stored(options, dense, tmp_path):
    report = quantize(dense("mixtral"), tmp_path / "out", **options)
    assert schemes(tmp_path / "out", "experts") == schemes(tmp_path / "out") == {report.scheme}
    assert len(tiny.stored_weights(tmp_path / "out")) == len(report.layers) == 3 * (4 + 12)
    assert report.problems() == [] and all(layer.rounded == ("calibration" in options) for layer in report.layers)
    assert_runs_as_stored(tmp_path / "out", dense("mixtral"))


def test_all_experts_may_have_a_scheme_of_their_own(dense, tmp_path):
    recipe = wr.Recipe(wr.Scheme(4, 32), (wr.Rule(r".*experts\.\d+\.down_proj", wr.Scheme(8, 64)),))
    quantize(dense("qwen3_moe"), tmp_path / "out", recipe=recipe)
    assert schemes(tmp_path / "out", "down_proj") == {"8-bit g64 sym"}
    assert schemes(tmp_path / "out", "up_proj") == schemes(tmp_path / "out", "q_proj") == {"4-bit g32 sym"}
    assert_runs_as_stored(tmp_path / "out", dense("qwen3_moe"))


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"ignore": [r"experts\.1\."]}, "dense"),
        ({"ignore": [r"layers\.2\.mlp\.experts\.[0-2]"]}, "dense"),
        ({"recipe": wr.Recipe(wr.Scheme(4, 32), (wr.Rule(r".*experts\.[01]\.", wr.Scheme(8, 32)),))}, "8-bit g32 sym"),
        ({"ignore": ["up_proj"]}, "dense"),  # it reads what the gate reads
    ],
)
def test_experts_of_a_layer_that_would_differ_are_refused(options, other, dense, tmp_path):
    expert = r"model\.layers\.[02]\.mlp\.experts\.\d\.\w+"
    pair = rf"{expert} would be (4-bit g32 sym|{other}) and {expert} (4-bit g32 sym|{other})"
    with pytest.raises(UsageError, match=rf"^{pair}; all experts of a layer have one scheme, so let the pattern"):
        quantize(dense("qwen3_moe"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# ---- what stays dense ----


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_ignored_experts_are_the_sources_own_tensors(kind, dense, tmp_path):
    report = quantize(dense(kind), tmp_path / "out", ignore=["experts"])
    source, stored = tiny.tensors(dense(kind)), tiny.tensors(tmp_path / "out")
    experts = [name for name in source if "experts" in name]
    assert experts and experts == [name for name in stored if "experts" in name]
    assert all(torch.equal(stored[name], source[name]) for name in experts)
    asked = [name for name, why in report.kept.items() if why == "ignored on request"]
    assert asked and all("experts" in name for name in asked) and report.problems() == []
    assert "-:.*(?:experts)" in json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    model = assert_runs_as_stored(tmp_path / "out", dense(kind))
    assert not any(isinstance(module, Experts) for module in model.modules()), "they stay fused"


BANKS = [
    ("qwen3_moe", ["down_proj"]), ("qwen3_moe", ["gate_proj", "up_proj"]), ("mixtral", ["w2"]),
    ("mixtral", ["w1", "w3"]), ("gpt_oss", ["down_proj"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "ignore"), BANKS)
def test_one_projection_of_all_experts_may_stay_dense(kind, ignore, dense, tmp_path):
    quantize(dense(kind), tmp_path / "out", ignore=ignore)
    source, stored = tiny.tensors(dense(kind)), tiny.tensors(tmp_path / "out")
    kept = [name for name in source if ".experts." in name and any(leaf in name for leaf in ignore)]
    assert kept and all(torch.equal(stored[name], source[name]) for name in kept)
    assert not any(leaf in name for name in tiny.stored_weights(tmp_path / "out") for leaf in ignore)
    assert any(".experts." in name for name in tiny.stored_weights(tmp_path / "out"))
    model = assert_runs_as_stored(tmp_path / "out", dense(kind))
    model.save_pretrained(tmp_path / "saved")
    saved = tiny.tensors(tmp_path / "saved")
    assert saved.keys() == stored.keys() and all(torch.equal(saved[name], stored[name]) for name in stored)
    model.dequantize()
    wanted = tiny.twin(tiny.in_turn(dense(kind)), tmp_path / "out").state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in wanted)


# ---- again ----


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(kind, blocks, dense, tmp_path):
    def stop(told):
        if told.done == min(blocks, told.total):
            raise KeyboardInterrupt

    whole = quantize(dense(kind), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(dense(kind), tmp_path / "out", progress=stop)
    again = quantize(dense(kind), tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again.layers == whole.layers and again.fidelity == whole.fidelity and again.kept == whole.kept


# ---- experts that nobody, or hardly anybody, is sent to ----


def shunning(expert, but=None):
    """A Mixtral whose routers send no token to this expert, but those of one id in the first block."""
    model = tiny_configs.build("mixtral", num_hidden_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0  # every token says so
        for block in model.model.layers:
            block.mlp.gate.weight[:, 0] = 0.0
            block.mlp.gate.weight[expert, 0] = -10.0
        if but is not None:
            model.model.embed_tokens.weight[but, 0] = -10.0
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("but", [None, 77])
@pytest.mark.parametrize("settings", [wr.Settings(), wr.Settings(true_sequential=False)], ids=["staged", "observed"])
def test_an_expert_of_few_tokens_is_solved_with_what_the_others_read(but, settings, tmp_path):
    source = tiny.save(shunning(1, but), tmp_path / "source")
    report = quantize(source, tmp_path / "out", settings=settings)
    windows = gather(tiny.ids(), None, samples=64, length=tiny.LENGTH).windows.ids
    came = 0 if but is None else int((windows == but).sum())
    mine = [layer for layer in report.layers if "layers.0.mlp.experts.1." in layer.name]
    assert [layer.name[-2:] for layer in mine] == ["w1", "w3", "w2"] and (came > 0) == (but is not None)
    for layer, needed in zip(mine, (64, 64, 128)):
        assert layer.tokens == came and not layer.rounded and layer.error_db < layer.rtn_error_db
        assert layer.fallback == f"read {came} of the {needed} tokens it needs, the rest from all experts"
    first = [x for x in report.layers if "layers.0" in x.name and x.name.endswith("w1")]
    assert sum(layer.tokens for layer in first) == 2 * windows.numel()
    assert all((layer.fallback is None) == (layer.tokens >= 64) for layer in first)
    assert not any("experts" in name for name in report.kept) and report.problems() == []
    weight = tiny.stored_weights(tmp_path / "out")["model.layers.0.block_sparse_moe.experts.1.w1"]
    original = tiny.tensors(source)["model.layers.0.block_sparse_moe.experts.1.w1.weight"].float()
    assert torch.nn.functional.cosine_similarity(weight.dequantize().flatten(), original.flatten(), dim=0) > 0.98
    assert not torch.equal(weight.codes, rtn.solve(original, None, weight.scheme).codes)
    assert_runs_as_stored(tmp_path / "out", source)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 96, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Listed(nn.Module):
    """Experts in a list, as models have them whose code comes with them; the best two that are not shunned."""

    def __init__(self, count, shunned):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, count, bias=False), nn.ModuleList(Expert() for _ in range(count))
        self.shunned = shunned

    def forward(self, x):
        rows = x.reshape(-1, 64)
        weights, index = self.gate(rows).index_fill(1, torch.tensor(self.shunned), -1e4).softmax(-1).topk(2)
        result = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            if len(token):
                result.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return result.reshape(x.shape)


def listing(count=4, shunned=()):
    model = tiny.build("llama", num_hidden_layers=2)
    torch.manual_seed(1)
    for block in model.model.layers:
        block.mlp = Listed(count, list(shunned))
        for parameter in block.mlp.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("settings", [wr.Settings(), wr.Settings(true_sequential=False)], ids=["staged", "observed"])
def test_an_expert_in_a_list_that_no_token_reaches_is_solved_with_what_the_others_read(settings, tmp_path):
    model = listing(shunned=[2])
    report = quantize(model, tmp_path / "out", settings=settings)
    found = {layer.name: layer for layer in report.layers}
    for block in range(2):
        for leaf, needed in (("gate_proj", 64), ("up_proj", 64), ("down_proj", 96)):
            layers = [found[f"model.layers.{block}.mlp.experts.{e}.{leaf}"] for e in range(4)]
            assert [layer.tokens > 0 for layer in layers] == [True, True, False, True]
            assert sum(layer.tokens for layer in layers) == 2 * 64 * tiny.LENGTH
            fallback = f"read 0 of the {needed} tokens it needs, the rest from all experts"
            assert [layer.fallback for layer in layers] == [None, None, fallback, None]
            assert not layers[2].rounded and layers[2].error_db < layers[2].rtn_error_db
    assert not any("experts" in name for name in report.kept) and report.problems() == []
    stored = tiny.stored_weights(tmp_path / "out")
    assert {name for name in stored if "experts" in name} == {name for name in found if "experts" in name}
    twin = tiny.twin(copy.deepcopy(model), tmp_path / "out")
    assert torch.isfinite(tiny.logits(twin)).all()


def test_the_router_beside_experts_in_a_list_stays_dense(tmp_path):
    report = quantize(listing(count=8), tmp_path / "out", calibration="none")
    assert report.kept == {f"model.layers.{block}.mlp.gate": "chooses the experts" for block in range(2)}
