"""Load a model to run it: a quantized directory, a dense one, or a .gguf file, packed on the way if that is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from .. import kernels
from ..checkpoint import Reader
from ..errors import CheckpointError, UsageError
from ..formats.config import from_config
from ..kernels import reference
from ..model.weights import materialize
from ..places import JOURNAL, partial_of
from ..request import NONE, Request
from . import attention
from .compiling import compile_steps
from .gptq_config import asking
from .head import pack_head
from .quantizer import Quantizer
from .register import register
from .source import download, kind_of, load_config, load_tokenizer, open_source, refuse_gaps

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
    head_bits: int | None = None,
    compile: bool = False,
    cache_length: int | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A transformers model from a checkpoint that wellrounded (or another GPTQ tool) wrote, or from a dense one.

    bits, group_size, sym   pack a dense model while it is loaded, one block at a time, by plain rounding without data;
                            `load_in_4bit` and `load_in_8bit` are short for bits=4 and bits=8
    kernel                  the one that every quantized layer must use (see kernels.table), instead of the first that
                            fits each
    head_bits               pack the output head too, while loading: of a small model it is the largest matrix, and 8
                            bits change next to nothing (docs/generation.md); such a model cannot be saved
    compile                 `generate` compiles its decode step when it is first called, half a minute for a small
                            model, over a static cache of `cache_length` tokens: 2048, or as many as the model can use
    device_map, max_memory, dtype, options   transformers' own, for `from_pretrained`

    It calls `wellrounded.register()`, so that the model is also saved and pushed whole. Raises UsageError if there is
    no such model or what is asked does not fit it, CheckpointError naming the tensor if it is damaged or incomplete.
    """
    register()
    bits = bits or (4 if load_in_4bit else 8 if load_in_8bit else None)
    request = Request(bits=bits, group_size=group_size, sym=sym, calibration=NONE) if bits else None
    if request is None and group_size is not None:
        raise UsageError(f"{model}: group_size={group_size} was asked for without bits; say bits=4 to pack the model")
    if kernel is not None:
        kernels.named(kernel)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _ready(_from_gguf(path, request, kernel)[0], head_bits, compile, cache_length)
    if request is not None:
        options["quantization_config"] = asking(request, kernel)
    loaded = load_directory(
        resolve(str(model)),
        kernel=kernel,
        device_map=device_map,
        max_memory=max_memory,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **options,
    )
    if kernel != reference.NAME and "attn_implementation" not in options:
        attention.use(loaded)
    return _ready(loaded.eval(), head_bits, compile, cache_length)


def _ready(model: PreTrainedModel, head_bits: int | None, compile: bool, cache_length: int | None) -> PreTrainedModel:
    if head_bits is not None:
        pack_head(model, head_bits)
    if compile:
        compile_steps(model, cache_length)
    elif cache_length is not None:
        raise UsageError(f"cache_length={cache_length} was asked for without compile=True; caches grow as they need")
    return model


def load_directory(
    directory: Path,
    *,
    kernel: str | None = None,
    quantization: dict[str, Any] | None = None,
    weights: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The model in a directory, after everything has been refused that can be before anything is built.

    `quantization` is what holds where the directory does not say how it was quantized, `weights` the name of the file
    to read where there are several; `options` are those of `from_pretrained`.
    """
    config = load_config(directory, trust_remote_code)
    stored = getattr(config, "quantization_config", None) or quantization
    asked = options.get("quantization_config")
    if stored:
        _refuse_unknown(stored, directory)
        if asked:
            raise UsageError(f"{directory}: bits={asked.bits} was asked for, but it is quantized already; leave it out")
        config.quantization_config = {**stored, "kernel": kernel}
    elif kernel is not None and not asked:
        raise _no_kernel_for(directory, kernel)
    if weights is not None:
        config.transformers_weights = weights
    Reader(directory, [directory / weights] if weights else None)
    loaded, found = kind_of(config).from_pretrained(
        directory,
        config=config,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **{"dtype": "auto", "offload_buffers": True, **options},  # packed weights are buffers: offload them too
    )
    refuse_gaps(directory, found)
    return loaded


def load_with_tokenizer(model: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The model as `load` gives it, and its tokenizer (None if there is none)."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        loaded, tokenizer = _from_gguf(path, None, options.get("kernel"))
        last = (options.get("head_bits"), options.get("compile", False), options.get("cache_length"))
        return _ready(loaded, *last), tokenizer
    directory = resolve(str(model))
    return load(directory, **options), load_tokenizer(directory, options.get("trust_remote_code", False))


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
    Quantizer.asked(request, kernel).pack(source.model, source)  # which from_pretrained would refuse
    return source.model, source.tokenizer


def resolve(name: str) -> Path:
    """The directory of a model: the one of this name, or the hub's snapshot. Raises UsageError if there is neither."""
    path = Path(name).expanduser()
    directory = path if path.is_dir() else None
    unfinished = partial_of(path)
    if unfinished.is_dir() and directory is None:
        raise CheckpointError(
            f"{name}: unfinished, its finished blocks lie in {unfinished.name}; run the same "
            "quantize command again to go on"
        )
    if path.name.endswith(".partial") and (path / JOURNAL).exists():
        raise UsageError(f"{name}: an unfinished run, not a model; run the same quantize command again to go on")
    return directory or download(name)
