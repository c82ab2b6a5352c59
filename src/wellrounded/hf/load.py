"""Load a model to run it: a quantized directory, a dense one, or a .gguf file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TextStreamer

from ..checkpoint import Reader
from ..errors import CheckpointError, UsageError
from ..formats.config import from_config
from ..model.walk import materialize
from ..nn import QuantLinear
from .quantizer import registered
from .source import download, load_config, load_tokenizer, open_source, refuse_gaps

__all__ = ["TextStreamer", "load", "load_with_tokenizer"]


def load(
    model: str | Path,
    *,
    device_map: Any = None,
    max_memory: dict | None = None,
    dtype: torch.dtype | str = "auto",
    kernel: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A transformers model from a checkpoint that wellrounded (or another GPTQ tool) wrote, or from a dense one.

    `kernel` names the kernel every quantized layer must use (see kernels.table); by default each takes the first that
    fits. `device_map`, `max_memory` and `dtype` are transformers' own.

    Raises UsageError if there is no such model, CheckpointError naming the tensor if it is damaged or incomplete.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path)[0]
    directory = _resolve(path, str(model))
    config = load_config(directory, trust_remote_code)
    # Whatever can be refused is refused before anything is built: an unknown format, damaged or missing files.
    if quantization := getattr(config, "quantization_config", None):
        _refuse_unknown(quantization, directory)
    elif kernel is not None:
        raise UsageError(f"{model}: kernel {kernel!r} was asked for, but this model is not quantized")
    Reader(directory)
    with registered():
        loaded, found = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_gaps(directory, found)
    if kernel is not None:
        for layer in (m for m in loaded.modules() if isinstance(m, QuantLinear)):
            layer.wanted_kernel = kernel
            layer.bind(loaded.dtype)
    return loaded.eval()


def _refuse_unknown(quantization: dict[str, Any], directory: Path) -> None:
    try:
        from_config(quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None


def load_with_tokenizer(model: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The model as `load` gives it, and its tokenizer (None if there is none)."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path)
    directory = _resolve(path, str(model))
    return load(directory, **options), load_tokenizer(directory, options.get("trust_remote_code", False))


def _from_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    source = open_source(path)
    materialize(source.model, source.read)
    return source.model, source.tokenizer


def _resolve(path: Path, name: str) -> Path:
    directory = path if path.is_dir() else None
    unfinished = path.with_name(path.name + ".partial")
    if unfinished.is_dir() and directory is None:
        raise CheckpointError(
            f"{name}: unfinished, its finished blocks lie in {unfinished.name}; run the same "
            "quantize command again to go on"
        )
    if path.name.endswith(".partial") and (path / "journal.jsonl").exists():
        raise UsageError(f"{name}: an unfinished run, not a model; run the same quantize command again to go on")
    return directory or download(name)
