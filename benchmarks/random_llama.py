"""Llamas of usual shapes with random weights, for speed alone: as a GPTQ checkpoint, and as llama.cpp's Q4_0 file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, intermediate, blocks, heads, kv heads, vocabulary, and whether the head is the embedding
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "7b": (4096, 11008, 32, 32, 32, 32000, False),
    "tiny": (256, 512, 2, 4, 2, 512, True),
}


def random_checkpoint(shape: str, out: Path) -> None:
    """A GPTQ checkpoint of random codes, 4 bits in groups of 32, written tensor by tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from wellrounded.core.recipe import Recipe
    from wellrounded.core.scheme import Scheme
    from wellrounded.formats import config as config_format
    from wellrounded.formats import gptq as gptq_format

    hidden, inner, blocks, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    scheme, kv = Scheme(4, 32), hidden // heads * kv_heads
    tensors = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden).bfloat16() * 0.02}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(vocabulary, hidden).bfloat16() * 0.02
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for block in range(blocks):
        start = f"model.layers.{block}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}{norm}.weight"] = torch.ones(hidden).bfloat16()
        for name, (outputs, inputs) in layers(hidden, inner, kv).items():
            for key, (size, dtype) in gptq_format.layout(scheme, inputs, outputs).items():
                tensors[f"{start}{name}.{key}"] = _random(key, size, dtype, inputs)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    stored = {**config.to_dict(), "quantization_config": config_format.to_config(Recipe(scheme), "gptq")}
    (out / "config.json").write_text(json.dumps(stored))


def layers(hidden: int, inner: int, kv: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a Llama block: (outputs, inputs)."""
    attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {
        **{f"self_attn.{name}_proj": size for name, size in attention.items()},
        **{f"mlp.{name}_proj": size for name, size in mlp.items()},
    }


def _random(key: str, size: tuple[int, ...], dtype: Any, inputs: int) -> Any:
    import torch

    if key == "g_idx":
        return (torch.arange(inputs) // 32).to(dtype)
    if key == "scales":
        return torch.full(size, 0.2 / inputs**0.5, dtype=dtype)
    if key == "qzeros":
        return torch.full(size, 0x77777777, dtype=dtype)  # as v1 stores the middle
    return torch.randint(-(2**31), 2**31, size, dtype=torch.int64).to(dtype)


def random_gguf(shape: str, out: Path) -> None:
    """The same shape as llama.cpp has it after quantizing to Q4_0: Q6_K for the head, which may be the embedding."""
    import gguf
    import numpy as np

    hidden, inner, blocks, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    writer, random = gguf.GGUFWriter(out, "llama"), np.random.default_rng(0)
    writer.add_block_count(blocks)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    q4, q6 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K

    def add(name: str, outputs: int, inputs: int, kind: Any) -> None:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (outputs, inputs // weights, size), dtype=np.uint8)
        at = 0 if kind == q4 else size - 2  # where a scale stands; a random one may be no number
        scale = np.array([0.2 / inputs**0.5 / (1 if kind == q4 else 100)], dtype=np.float16).view(np.uint8)
        data[..., at : at + 2] = scale
        writer.add_tensor(name, data.reshape(outputs, -1), raw_dtype=kind)

    add("token_embd.weight", vocabulary, hidden, q6 if tied else q4)
    if not tied:
        add("output.weight", vocabulary, hidden, q6)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {name: f"ffn_{name}" for name in ("gate", "up", "down")}
    for block in range(blocks):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(hidden, dtype=np.float32))
        for name, (outputs, inputs) in layers(hidden, inner, hidden // heads * kv_heads).items():
            short = name.split(".")[1].removesuffix("_proj")
            add(f"blk.{block}.{names[short]}.weight", outputs, inputs, q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
