"""Load a model to run it: a quantized directory, a dense one, or a .gguf file, packed on the way if that is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, TextStreamer

from .. import kernels
from ..checkpoint import Reader
from ..errors import CheckpointError, UsageError
from ..formats.config import from_config
from ..model.walk import materialize
from ..request import NONE, Request
from .on_the_fly import quantize_in_memory
from .quantizer import Quantizer
from .register import register
from .source import download, load_config, load_tokenizer, open_source, refuse_gaps

__all__ = ["TextStreamer", "load", "load_with_tokenizer"]


def load(
    model: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool = True,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    device_map: Any = None,
    max_memory: dict | None = None,
    dtype: torch.dtype | str = "auto",
    kernel: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A transformers model from a checkpoint that wellrounded (or another GPTQ tool) wrote, or from a dense one.

    bits, group_size, sym   pack a dense model while it is loaded, one block at a time, by plain rounding without data;
                            `load_in_4bit` and `load_in_8bit` are short for bits=4 and bits=8
    kernel                  the one that every quantized layer must use (see kernels.table), instead of the first that
                            fits each
    device_map, max_memory, dtype, options   transformers' own, for `from_pretrained`

    It calls `wellrounded.register()`, so that the model is also saved and pushed whole. Raises UsageError if there is
    no such model or what is asked does not fit it, CheckpointError naming the tensor if it is damaged or incomplete.
    """
    register()
    bits = bits or (4 if load_in_4bit else 8 if load_in_8bit else None)
    request = Request(bits=bits, group_size=group_size, sym=sym, calibration=NONE) if bits else None
    if kernel is not None:
        kernels.named(kernel)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path, request, kernel)[0]
    directory = _resolve(path, str(model))
    config = load_config(directory, trust_remote_code)
    # Whatever can be refused is refused before anything is built: an unknown format, damaged or missing files.
    stored = getattr(config, "quantization_config", None)
    if stored:
        _refuse_unknown(stored, directory)
        if request:
            raise UsageError(f"{model}: bits={bits} was asked for, but it is quantized already; leave bits out")
        config.quantization_config = {**stored, "kernel": kernel}
    elif request:
        options["quantization_config"] = _as_config(request, kernel)
    elif kernel is not None:
        raise _no_kernel_for(model, kernel)
    Reader(directory)
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
        **options,
    )
    refuse_gaps(directory, found)
    return loaded.eval()


def load_with_tokenizer(model: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The model as `load` gives it, and its tokenizer (None if there is none)."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path, None, options.get("kernel"))
    directory = _resolve(path, str(model))
    return load(directory, **options), load_tokenizer(directory, options.get("trust_remote_code", False))


def _as_config(request: Request, kernel: str | None) -> transformers.GPTQConfig:
    """A user's GPTQConfig that asks for the same; made while registered, so that it remembers what was given."""
    grouping = {} if request.group_size is None else {"group_size": request.group_size}
    return transformers.GPTQConfig(bits=request.bits, sym=request.sym, backend=kernel, **grouping)


def _no_kernel_for(model: Any, kernel: str) -> UsageError:
    return UsageError(f"{model}: kernel {kernel!r} was asked for, but this model is not quantized")


def _refuse_unknown(quantization: dict[str, Any], directory: Path) -> None:
    try:
        from_config(quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None


def _from_gguf(path: Path, request: Request | None, kernel: str | None) -> tuple[PreTrainedModel, Any]:
    if kernel is not None and request is None:
        raise _no_kernel_for(path, kernel)
    source = open_source(path)
    if request is None:
        materialize(source.model, source.read)
        return source.model, source.tokenizer
    # What from_pretrained does with a quantizer, which it refuses to do with a .gguf file.
    quantizer = source.model.hf_quantizer = Quantizer(_as_config(request, kernel), pre_quantized=False)
    quantizer.preprocess_model(source.model)
    quantizer.take(source.model, *quantize_in_memory(request.run(source)))
    materialize(source.model, source.read)
    quantizer.postprocess_model(source.model)
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
