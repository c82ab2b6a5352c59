"""A tiny random model of every causal language model that the installed transformers knows, for tests and benchmarks.

A type's own defaults are shrunk by rules on the names of their fields, in sub-configurations too. What the rules cannot
serve stands in `SPECIAL`, and what cannot be built, or run on token ids alone, in `UNBUILDABLE`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# The most that a number may be by the whole name of its field; the first pattern that matches counts. The inputs of
# linear layers come out as multiples of 32, their outputs as multiples of 8.
LIMITS = [
    (r".*vocab_size.*|.*_vocab", 320),
    (r".*position_embeddings|.*positions|n_ctx|.*max_length|max_seq_len", 256),
    (r"(.*moe_|.*expert).*(intermediate|hidden)_size", 64),
    (r".*(intermediate_size(_mlp)?|ffn_(dim|hidden_size)|dim_ff|feed_forward_size|mlp_dim)|dff|d_ff|d_inner", 128),
    (r".*hidden_size.*|d_model|n_embd|(dim|d)_model|.*emb(ed|edding)?_(dim|size)", 64),
    (r".*(in|out|input|output)_dim|.*(_out_channel|conv_channels)|(adapter_)?input_size", 64),
    (r".*hidden_layers|n_layers?|(num_)?((en|de)coder_)?layers|depth|num_blocks", 3),
    (r"mamba_d_ssm", 128),
    (r"(mamba_|n_mamba_|ssm_).*heads", 8),
    (r".*(key_value|kv)_(n_)?heads", 2),
    (r".*(attention_heads|num_heads|n_heads?|num_(key|value)_heads)", 4),
    (r".*(head_dim|d_head|head_size|dim_head)|d_kv|kv_channels|rotary_dim", 16),
    (r".*_(low)?rank", 32),
    (r"(n_routed|num(_local)?|moe_num)_experts|zero_expert_num", 4),
    (r".*experts_per_tok(en)?|moe_?top_?k|top_k_experts|moe_k", 2),
    (r"n_group|num_expert_groups?|topk_group", 1),
    (r".*n_?groups", 2),
    (r".*(sliding|attention|keep)_window.*|window_size|attention_chunk_size|local_attention", 8),
    (r"(mamba_d_|ssm_)?state(_size)?", 16),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r".*(dropout|layerdrop|_pdrop|dropout_prob)", 0),
]

# What a field becomes, whatever it was.
VALUES = [
    (r"(pad|sep|cls|mask|unk)_token_id|pad_index", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 2),
    (r".*(initializer_range|init_std)", 0.1),  # large enough for a wrong mask or weight to show in the logits
    (r"is_decoder", True),  # the encoders that have a causal variant
]

# What the rules cannot know, by model type: fields whose default is of no use, sizes that must fit each other, patterns
# of layers that the defaults leave out.
SPECIAL: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 32},
    "bamba": {"attn_layer_indices": [1]},
    "blenderbot": {"encoder_layers": 3},  # the cache has as many layers as the encoder
    "blt": {"num_hidden_layers": 3},  # `generate` sizes the cache by it, and the type has no such field
    "blt_local_encoder": {"intermediate_size": 128},
    "cohere_compass_text": {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "head_dim": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "sliding_window": 8,
    },
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": 128, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3},
    "kimi_linear": {"linear_head_dim": 32},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "olmo_hybrid": {"linear_key_head_dim": 16, "linear_value_head_dim": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "ple_layer_ids": [1],
    },
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (32, 32), "num_buckets": 8,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "hash_seed": 0,  # without, no two passes are equal
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}  # fmt: skip

_ASSISTANT = (
    "all its layers take keys and values from the model that it drafts for, and its text model refuses to be built so "
    "(ValueError: The set of layer types producing a cache is different than the set of layer types using them); nor "
    "does it take token ids (inputs_embeds and shared_kv_states cannot be None)"
)
_MUSIC = (
    "AutoModelForCausalLM gives the class the configuration of the whole instead of the decoder's that it expects "
    "(AttributeError: the configuration has no attribute 'dropout'), and its tokens are rows of audio codebooks"
)
UNBUILDABLE = {
    "gemma3n": "its vision tower comes from timm (ImportError: TimmWrapperModel requires the timm library)",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}


def types() -> list[str]:
    """Every model type with a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of this type; a change goes to the text model's part where the whole has no such field."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"transformers has no causal language model of type {model_type}.")
    if model_type in UNBUILDABLE:
        raise ValueError(f"{model_type} cannot be made tiny: {UNBUILDABLE[model_type]}.")
    return _shrunk(AutoConfig.for_model(model_type), changes)


def build(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model of `tiny` in float32, with random weights."""
    config = tiny(model_type, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        gain = weight.dim() == 1 and not name.endswith("bias") and not weight.any()  # switches off what it scales
        if gain or (weight.dim() > 1 and weight.min() == weight.max()):  # as some routers are until they are trained
            torch.nn.init.normal_(weight, std=0.1)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # DeepSeek-V4's experts of each token, all zeros without a checkpoint
            table.copy_(torch.rand(len(table), config.num_local_experts).argsort(-1)[:, : table.shape[1]])
    return model


def _shrunk(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """The same configuration made anew from small values, so that it derives and checks all that it does."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.name not in inherited}
    # Not getattr, which refuses the fields that a layer may have for itself.
    old = {name: vars(config).get(config.attribute_map.get(name, name)) for name in defaults}
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    layers = _kept(old, old.get(depth))
    if depth in changes:
        layers = (layers * changes[depth])[: changes[depth]]
    inner = {name: value for name, value in changes.items() if "text_config" in old and name not in old}
    new: dict[str, Any] = {}
    for name, value in old.items():
        if isinstance(value, PreTrainedConfig):
            new[name] = _shrunk(value, inner if name == "text_config" else {})
        elif layers and name == depth:
            new[name] = len(layers)
        elif layers and _are_layers(name, value):
            new[name] = [place for place, layer in enumerate(layers) if layer in value]
        elif layers and isinstance(value, list) and len(value) == old[depth]:
            new[name] = [_limited(name, value[layer]) for layer in layers]
        elif defaults[name] is None and isinstance(value, int | float) and not re.search("(kv|key_value)_heads", name):
            continue  # a number derived from others, as it will be from the small ones
        else:
            new[name] = _limited(name, value)
    if old.get("kv_lora_rank"):
        new["num_key_value_heads"] = new["num_attention_heads"]  # latent attention expands to all of them
    own = {name: value for name, value in changes.items() if name not in inner}
    return type(config)(**{**new, **SPECIAL.get(config.model_type, {}), **own})


def _kept(old: dict[str, Any], depth: int | None) -> list[int]:
    """Which layers to keep where some differ: between them they show all that the lists say of layers, two at least."""
    listed = [value for name, value in old.items() if value and _are_layers(name, value)]
    described = [value for value in old.values() if isinstance(value, list) and value not in listed]
    described = [value for value in described if value and len(value) == depth]
    seen: set[tuple[int, Any]] = set()
    kept = []
    for layer in range(depth) if listed or described else ():
        shown = [str(value[layer]) for value in described] + [str(layer in value) for value in listed]
        if not seen.issuperset(enumerate(shown)) or len(kept) < 2:
            kept.append(layer)
        seen.update(enumerate(shown))
    return kept


def _are_layers(name: str, value: Any) -> bool:
    """Whether a field lists layers by their numbers."""
    if not isinstance(value, list | tuple) or not re.fullmatch(r".*(layers|idxs|ids|indices|indexes)", name):
        return False
    return all(isinstance(item, int) for item in value) and list(value) == sorted(set(value))


def _limited(name: str, value: Any) -> Any:
    """The value that the rules give this field."""
    for pattern, fixed in VALUES:
        if re.fullmatch(pattern, name):
            return fixed
    if isinstance(value, int | float) and not isinstance(value, bool):
        for pattern, limit in LIMITS:
            if re.fullmatch(pattern, name):
                return type(value)(min(value, limit))
    return value
