"""Merge an adapter: onto dequantized weights, never into packed ones, which could not hold the sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..checkpoint import Source
from ..core.recipe import Recipe
from ..errors import UsageError
from ..nn import QuantLinear
from .load import load, resolve
from .on_the_fly import fuse_experts
from .source import load_config, load_tokenizer, open_source


class Merged(NamedTuple):
    """A dense float32 model that an adapter has been merged into, and what its base was."""

    model: PreTrainedModel
    tokenizer: Any
    base: str
    recipe: Recipe | None  # None if the base was dense
    dtype: torch.dtype  # of the base
    packed: frozenset[str]  # the weights that the base had packed

    def source(self) -> Source:
        """The model ready to be quantized: what was packed in float32, the rest in the base's dtype, as it was."""
        source = open_source(self.model, self.tokenizer)

        def read(name: str, read: Any = source.read) -> torch.Tensor | None:
            tensor = read(name)
            return tensor if tensor is None or name in self.packed else tensor.to(self.dtype)

        source.read = read
        return source


def merge(adapter: str | Path, base: str | Path | None = None, trust_remote_code: bool = False) -> Merged:
    """The base model of a PEFT adapter with the adapter merged into it.

    Raises UsageError if there is no such adapter, or no such base; PEFT's own error for an adapter that cannot merge.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise UsageError('merging an adapter needs the package peft: pip install "wellrounded[peft]"') from None
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, OSError) as error:
        raise UsageError(f"{adapter}: no PEFT adapter ({str(error).strip().splitlines()[0]})") from None
    name = str(base or config.base_model_name_or_path or "")
    if not name:
        raise UsageError(f"{adapter}: it does not say what model it was trained on; name it with --base")
    try:
        directory = resolve(name)
    except UsageError as error:
        hint = (
            "" if base else f"; the adapter says it was trained on {name}: if that lies elsewhere, name it with --base"
        )
        raise UsageError(f"{error}{hint}") from None
    model = load(directory, dtype=torch.float32, trust_remote_code=trust_remote_code)
    recipe, packed = None, {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    if packed:
        recipe = model.hf_quantizer.stored.recipe
        model.hf_quantizer.fuses_experts = False  # the adapter was made for experts that are taken apart
        model = model.dequantize(torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    fuse_experts(model)
    dtype = load_config(directory, trust_remote_code).dtype or torch.float32
    model.config.dtype = dtype
    return Merged(model, load_tokenizer(directory, trust_remote_code), name, recipe, dtype, frozenset(packed))
