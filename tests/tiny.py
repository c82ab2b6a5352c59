"""Tiny models with random weights, built from configurations: nothing is downloaded, everything takes milliseconds."""

import copy
import json
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import wellrounded as wr
from wellrounded.checkpoint import Reader
from wellrounded.core.weight import QuantizedWeight
from wellrounded.formats import config as config_format
from wellrounded.formats.gptq import from_tensors
from wellrounded.model.blocks import oriented
from wellrounded.model.experts import fused_experts
from wellrounded.report import Report

VOCABULARY = 320
LENGTH = 32  # tokens per calibration window

TEXT = "The quick brown fox jumps over the lazy dog. A model reads tokens, and every token is a row of numbers.\n"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Weights of 0.1 are large enough for a wrong mask or a wrong window to show in the logits.
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
STATES = {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16, "expand": 2}

# What each architecture needs besides COMMON; GPT-2 and Bloom have names of their own.
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere": {},
    "phi": {},
    "phi3": {},
    "gpt2": GPT2,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.1},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "mamba2": STATES,
}


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """A causal language model of this architecture."""
    special = ARCHITECTURES.get(kind, {})
    base = {} if kind in ("gpt2", "bloom") else COMMON
    options = {**base, **special, **changes}
    if "layer_types" in options:
        options["num_hidden_layers"] = len(options["layer_types"])
    config = AutoConfig.for_model(kind, **options)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, special tokens and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


def ids(rows: int = 80, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """int64 [rows, length] random tokens, without the special ones."""
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def save(model: PreTrainedModel, directory: Path, **options) -> Path:
    """The model and the tokenizer as Hugging Face lays them out."""
    model.save_pretrained(directory, **options)
    tokenizer().save_pretrained(directory)
    return directory


def quantize(model, out: Path, **options) -> Report:
    """`wellrounded.quantize`, calibrated on a few thousand random tokens unless told otherwise."""
    return wr.quantize(model, out, **{"calibration": ids(), "samples": 64, "length": LENGTH, **options})


def stored_weights(out: Path) -> dict[str, QuantizedWeight]:
    """The quantized weights of a finished checkpoint by layer name, as the file format defines them."""
    config = config_format.from_config(json.loads((out / "config.json").read_text())["quantization_config"])
    reader, weights = Reader(out), {}
    for tensor in reader.places:
        name, _, leaf = tensor.rpartition(".")
        if leaf == "qweight":
            scheme = config.recipe.scheme_of(name)
            tensors = {key: reader.read(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
            outputs = tensors["qweight"].shape[1]
            weights[name] = from_tensors(tensors, scheme, len(tensors["g_idx"]), outputs, config.version, name)
    return weights


def twin(model: PreTrainedModel, out: Path) -> PreTrainedModel:
    """The dense model with the weights that the checkpoint `out` stands for, put in one by one: what `load` must match.

    Layers may be stored without the base model's prefix, as in GPT-2's own files; those of experts go into the
    parameters in which they are fused.
    """
    model = copy.deepcopy(model)
    fused = fused_experts(model)
    for name, weight in stored_weights(out).items():
        dense = weight.dequantize(model.dtype)
        path, _, inside = in_model(name).partition(".experts.")
        if f"{path}.experts" in fused:
            expert, leaf = inside.split(".")
            piece = fused[f"{path}.experts"].pieces[leaf]
            whole = model.get_parameter(f"{path}.experts.{piece.parameter}").data
            piece.weight(whole, int(expert), len(whole)).copy_(dense)
            continue
        layer = model.get_submodule(
            name if name in dict(model.named_modules()) else f"{model.base_model_prefix}.{name}"
        )
        layer.weight.data = oriented(layer, dense.to(layer.weight.dtype)).contiguous()
    return model


MIXTRAL = {".block_sparse_moe.experts.": ".mlp.experts.", ".w1": ".gate_proj", ".w3": ".up_proj", ".w2": ".down_proj"}


def in_model(name: str) -> str:
    """The name of an expert's layer in the model by its name in Mixtral's own files; others stay as they are."""
    for stored, spelled in MIXTRAL.items() if ".experts." in name else ():
        name = name.replace(stored, spelled)
    return name


def in_turn(directory: Path) -> PreTrainedModel:
    """The dense model of a directory, its experts called one after another, as experts taken apart are."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", experts_implementation="eager").eval()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Everything that a directory's files hold."""
    reader = Reader(directory)
    return {name: reader.read(name) for name in reader.places}


@contextmanager
def rewritten(directory: Path):
    """The tensors of a directory, stored again as the block has left them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def logits(model: PreTrainedModel, tokens: torch.Tensor | None = None, mask: torch.Tensor | None = None):
    """[rows, length, vocabulary] on a few windows that no calibration saw."""
    tokens = ids(4, seed=7) if tokens is None else tokens
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
