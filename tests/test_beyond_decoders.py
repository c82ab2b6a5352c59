"""Models that continue no text, output heads, tensors without a model, and models that bring their own code."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import tiny
import wellrounded as wr
from tiny_configs import build
from wellrounded.checkpoint import Reader
from wellrounded.core.fidelity import Fidelity, Likeness
from wellrounded.errors import UsageError
from wellrounded.nn import QuantLinear

ENCODER = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1, "num_labels": 3,
}  # fmt: skip
HEADS = {"states": AutoModel, "gaps": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification}


def encoder(head: str, kind: str = "bert"):
    torch.manual_seed(0)
    return HEADS[head].from_config(AutoConfig.for_model(kind, **ENCODER), dtype=torch.bfloat16).eval()


def packed(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def output(model, tokens):
    with torch.no_grad():
        found = model(input_ids=tokens)
    return found.logits if "logits" in found else found.last_hidden_state


def quantization(out) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]


# ---- encoders ----


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("head", HEADS)
def test_an_encoder_is_quantized_and_comes_back_as_what_it_was(kind, head, tmp_path):
    model = encoder(head, kind)
    tiny.save(model, tmp_path / "dense")
    report = tiny.quantize(tmp_path / "dense", tmp_path / "out", group_size=32, only=["encoder"])
    loaded = wr.load(tmp_path / "out", kernel="reference")
    assert type(loaded) is type(model) and not report.generates
    assert len(packed(loaded)) == 2 * 6 and not report.overlooked
    tokens = tiny.ids(2, seed=7)
    expected = output(tiny.twin(model, tmp_path / "out"), tokens)
    assert torch.equal(output(loaded, tokens), expected)
    assert not torch.equal(expected, output(model, tokens))


def test_embeddings_are_compared_by_their_angle_and_logits_by_their_divergence(tmp_path):
    states = tiny.quantize(encoder("states"), tmp_path / "states", group_size=32).fidelity
    assert set(states) == {"cosine_mean", "cosine_worst", "cosine_tokens", "tokens"}
    assert 0.9 < states["cosine_worst"] <= states["cosine_mean"] < 1
    for head in ("gaps", "classes"):
        found = tiny.quantize(encoder(head), tmp_path / head, group_size=32, only=["encoder"]).fidelity
        assert set(found) == {"kl_mean", "kl_median", "kl_p99", "top1_agreement", "tokens"}
        assert 0 < found["kl_mean"] < 1
    assert found["tokens"] * tiny.LENGTH == states["tokens"], "classes are one choice per window"


def test_embeddings_that_have_turned_are_a_problem(tmp_path):
    report = tiny.quantize(encoder("states"), tmp_path / "out", group_size=32, only=["encoder"])
    assert not report.problems()
    report.fidelity["cosine_mean"] = 0.5
    assert report.problems() == ["embeddings have turned, cosine 0.500: the model is damaged"]


def test_evaluation_of_an_encoder_needs_its_original(tmp_path):
    model = encoder("states")
    tiny.save(model, tmp_path / "dense")
    tiny.quantize(tmp_path / "dense", tmp_path / "out", group_size=32)
    with pytest.raises(UsageError, match="BertModel predicts no next tokens; compare it with its original"):
        wr.evaluate(tmp_path / "out", 20 * tiny.TEXT)
    result = wr.evaluate(tmp_path / "out", 20 * tiny.TEXT, against=tmp_path / "dense")
    assert 0.9 < result["cosine_mean"] < 1 and result["length"] == 64, "as much as it can read"
    same = wr.evaluate(tmp_path / "dense", 20 * tiny.TEXT, against=tmp_path / "dense")
    assert same["cosine_mean"] == pytest.approx(1)


def test_padding_counts_in_no_comparison():
    torch.manual_seed(0)
    before, after = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    ids, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    changed = after.clone()
    changed[1, 3:] = 100.0
    for kind in (Likeness, lambda: Fidelity(causal=False)):
        found = []
        for other in (after, changed):
            measured = kind()
            measured.update(before, other, ids, mask)
            found.append(measured.to_dict())
        assert found[0] == found[1] and found[0]["tokens"] == 8


# ---- encoder and decoder ----

BOTH = {
    "bart": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.1,
    },
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "initializer_factor": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", BOTH)
def test_the_decoder_of_an_encoder_decoder_model_is_walked_and_the_encoder_named(kind, tmp_path):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=tiny.VOCABULARY, **special, **BOTH[kind])
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.bfloat16).eval()
    tiny.save(model, tmp_path / "dense")
    report = tiny.quantize(tmp_path / "dense", tmp_path / "out", group_size=32)
    assert all("decoder" in layer.name for layer in report.layers) and len(report.layers) == 2 * 10
    problems = report.problems()
    assert problems and [p for p in problems if "encoder" not in p or "outside the blocks" not in p] == []
    loaded = wr.load(tmp_path / "out", kernel="reference", attn_implementation="eager")
    tokens = tiny.ids(2, seed=7)
    twin = tiny.twin(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", attn_implementation="eager"), tmp_path / "out"
    )
    with torch.no_grad():
        seen, expected = (m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (loaded, twin.bfloat16()))
    assert (seen - expected).norm() < 0.01 * expected.norm()
    assert loaded.generate(tokens, max_new_tokens=4, min_new_tokens=4).shape[1] >= 4


# ---- the output head ----


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_packed_on_request_and_untied_from_the_embeddings(tied, tmp_path):
    model = tiny.build("llama", torch.bfloat16, tie_word_embeddings=tied)
    tiny.save(model, tmp_path / "dense")
    report = tiny.quantize(tmp_path / "dense", tmp_path / "out", group_size=32, lm_head=True)
    head = report.layers[-1]
    assert head.name == "lm_head" and head.tokens == 64 * tiny.LENGTH and head.error_db < head.rtn_error_db
    assert quantization(tmp_path / "out")["lm_head"] is True
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = wr.load(tmp_path / "out", kernel="reference")
    assert isinstance(loaded.lm_head, QuantLinear)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    dense = tiny.build("llama", torch.bfloat16, tie_word_embeddings=False)
    dense.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(loaded), tiny.logits(tiny.twin(dense, tmp_path / "out")))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.logits(wr.load(tmp_path / "again", kernel="reference")), tiny.logits(loaded))


def test_the_proof_is_made_with_the_packed_head(tmp_path):
    model = tiny.build("llama", torch.bfloat16)
    without = tiny.quantize(model, tmp_path / "without", group_size=32)
    report = tiny.quantize(model, tmp_path / "out", group_size=32, lm_head=True, bits=4)
    assert report.layers[:-1] == without.layers and report.fidelity["kl_mean"] > without.fidelity["kl_mean"]
    assert report.fidelity["original_perplexity"] == without.fidelity["original_perplexity"]


def test_an_interrupted_run_keeps_its_head(tmp_path):
    model = tiny.build("llama", torch.bfloat16, tie_word_embeddings=True)
    tiny.quantize(model, tmp_path / "whole", group_size=32, lm_head=True)

    def stop(progress):
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(model, tmp_path / "out", group_size=32, lm_head=True, progress=stop)
    with pytest.raises(UsageError, match="lm_head: was"):
        tiny.quantize(model, tmp_path / "out", group_size=32)
    tiny.quantize(model, tmp_path / "out", group_size=32, lm_head=True)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][n], files[1][n]) for n in files[0])


def test_a_head_that_is_not_there_or_ignored_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the output head was asked for, but BertModel has none"):
        tiny.quantize(encoder("states"), tmp_path / "out", lm_head=True)
    with pytest.raises(UsageError, match="the output head was asked for, and lm_head is ignored on request"):
        tiny.quantize(tiny.build("llama"), tmp_path / "out", lm_head=True, ignore=["head"])


# ---- what is chosen by name ----


def test_only_what_is_named_is_quantized_and_nothing_else_is_a_problem(tmp_path):
    model = tiny.build("llama", torch.bfloat16)
    report = tiny.quantize(model, tmp_path / "out", group_size=32, only=["mlp", r"layers\.0\..*q_proj"])
    expected = {f"model.layers.{n}.mlp.{p}_proj" for n in range(3) for p in ("gate", "up", "down")}
    assert {layer.name for layer in report.layers} == expected | {"model.layers.0.self_attn.q_proj"}
    assert not report.problems()
    loaded = wr.load(tmp_path / "out", kernel="reference")
    assert packed(loaded) == {layer.name for layer in report.layers}
    both = tiny.quantize(model, tmp_path / "both", group_size=32, only="mlp", ignore="down_proj")
    assert {layer.name.rpartition(".")[2] for layer in both.layers} == {"gate_proj", "up_proj"}


@pytest.mark.parametrize("option", ["only", "ignore"])
def test_a_pattern_that_is_found_nowhere_is_refused(option, tmp_path):
    with pytest.raises(UsageError, match=rf"{option}='nowhere' was asked for, but no layer's name holds it"):
        tiny.quantize(tiny.build("llama"), tmp_path / "out", **{option: ["nowhere"]})


# ---- every tensor of the source ----


def test_tensors_that_the_model_does_not_have_are_copied_and_engines_are_told(tmp_path):
    tiny.save(tiny.build("llama", torch.bfloat16), tmp_path / "dense")
    with tiny.rewritten(tmp_path / "dense") as tensors:
        tensors["mtp.layers.0.q_proj.weight"] = torch.randn(64, 64)
        tensors["model.layers.3.eh_proj.weight"] = torch.randn(64, 128)
        tensors["model.layers.3.enorm.weight"] = torch.randn(64)
        speculative = {name: tensors[name].clone() for name in list(tensors)[-3:]}
    report = tiny.quantize(tmp_path / "dense", tmp_path / "out", group_size=32)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in speculative.items())
    assert report.tensors == {"quantized": 21, "copied": 9, "not_in_model": 3}
    rules = [key.removeprefix("-:") for key in quantization(tmp_path / "out")["dynamic"]]
    for name in ("mtp.layers.0.q_proj", "model.layers.3.eh_proj"):
        assert any(re.match(rule, name) for rule in rules)
    assert not any(re.match(rule, "model.layers.2.mlp.up_proj") for rule in rules)
    wr.load(tmp_path / "out")


def test_a_tensor_that_would_be_lost_is_an_error_and_no_result(tmp_path, monkeypatch):
    from wellrounded import ledger
    from wellrounded.errors import CheckpointError

    dense = ledger.Ledger.dense
    losing = lambda self, part: (item for item in dense(self, part) if "norm" not in item[0])  # noqa: E731
    monkeypatch.setattr(ledger.Ledger, "dense", losing)
    with pytest.raises(CheckpointError, match=r"model.layers.0.input_layernorm.weight .* neither copied nor packed"):
        tiny.quantize(tiny.build("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_shared_between_blocks_are_solved_and_stored_once(tmp_path):
    model = build("zamba2").bfloat16()
    model.save_pretrained(tmp_path / "dense")
    report = tiny.quantize(tmp_path / "dense", tmp_path / "out", group_size=32, ignore=["adapter_list"])
    names = [layer.name for layer in report.layers]
    assert "model.layers.1.shared_transformer.self_attn.q_proj" in names
    assert not any(name.startswith("model.layers.3.shared_transformer") for name in names)
    stored = Reader(tmp_path / "out").places
    assert not any(name.startswith("model.layers.3.shared_transformer") for name in stored)
    loaded = wr.load(tmp_path / "out", kernel="reference", attn_implementation="eager")
    assert loaded.model.layers[3].shared_transformer.self_attn.q_proj is (
        loaded.model.layers[1].shared_transformer.self_attn.q_proj
    )
    dense = build("zamba2", attn_implementation="eager").bfloat16()
    assert torch.equal(tiny.logits(loaded), tiny.logits(tiny.twin(dense, tmp_path / "out")))
    loaded.save_pretrained(tmp_path / "again")
    assert Reader(tmp_path / "again").places.keys() == stored.keys()


# ---- models that bring their own code ----

CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "own_code"

    def __init__(self, width=64, depth=3, vocab_size=320, **kwargs):
        self.width, self.depth, self.hidden_size, self.num_hidden_layers = width, depth, width, depth
        super().__init__(vocab_size=vocab_size, **kwargs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale):
        return x + scale * self.down(torch.relu(self.up(self.norm(x))))


class OwnModel(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.width)
        self.body = nn.ModuleList(Block(config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.table(input_ids)
        for number, block in enumerate(self.body):
            x = block(x, 1.0 + number)
        return CausalLMOutput(logits=self.head(x))
"""


@pytest.fixture
def own_code(tmp_path):
    """A directory whose model is none of transformers'."""
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "own_code.py").write_text(CODE)
    config = {
        "model_type": "own_code", "architectures": ["OwnModel"], "width": 64, "depth": 3, "vocab_size": 320,
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"},
        "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory, trust_remote_code=True), trust_remote_code=True
    ).bfloat16()
    from safetensors.torch import save_file

    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer().save_pretrained(directory)
    return directory, model.eval()


def test_a_model_that_brings_its_code_goes_the_same_way(own_code, tmp_path):
    directory, model = own_code
    report = tiny.quantize(directory, tmp_path / "out", group_size=32, trust_remote_code=True)
    assert [layer.name for layer in report.layers] == [f"body.{n}.{part}" for n in range(3) for part in ("up", "down")]
    assert not report.problems()
    loaded = wr.load(tmp_path / "out", kernel="reference", trust_remote_code=True)
    assert packed(loaded) == {layer.name for layer in report.layers}
    expected, seen = tiny.logits(tiny.twin(model, tmp_path / "out")), tiny.logits(loaded)
    assert (seen - expected).norm() < 0.01 * expected.norm()  # a bias is added to what is rounded already


def test_without_trust_its_code_does_not_run(own_code, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json: .*(trust_remote_code|custom code)"):
        tiny.quantize(own_code[0], tmp_path / "out")


# ---- layers that cannot be packed ----


def test_layers_too_small_for_any_group_are_named(tmp_path):
    model = tiny.build("llama", hidden_size=48, intermediate_size=100, num_attention_heads=4)
    with pytest.raises(UsageError, match=r"(group|nothing to quantize)"):
        tiny.quantize(model, tmp_path / "out", group_size=128)
