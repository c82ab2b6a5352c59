"""`register`: every place where transformers is made to use this engine, and `unregister`, which restores them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import modeling_utils
from transformers.quantizers import auto
from transformers.utils import cached_file

from . import attention, saving
from .gptq_config import GPTQConfig, forgetting, remembering
from .quantizer import Quantizer
from .source import read_quantization

_before: list[tuple[Any, str, Any]] = []  # (owner, name, what was there), in the order of replacing


def register() -> None:
    """Let transformers' own calls use this engine for GPTQ: `from_pretrained`, `save_pretrained`, `push_to_hub`.

    Doing it again changes nothing; `unregister` undoes it. The class GPTQConfig stays the same object, so code that
    has imported it already is served too.
    """
    attention.offer()  # a name of our own, which changes nothing for others: it stays
    if _before:
        return
    config, model = transformers.GPTQConfig, transformers.PreTrainedModel
    for owner, name, new in (
        (auto.AUTO_QUANTIZER_MAPPING, "gptq", Quantizer),
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", GPTQConfig),
        (config, "__init__", remembering(config.__init__)),
        (config, "to_dict", forgetting(config.to_dict)),
        (modeling_utils, "get_hf_quantizer", finding_old_files(modeling_utils.get_hf_quantizer)),
        (model, "save_pretrained", saving.with_everything(model.save_pretrained)),
        (model, "push_to_hub", saving.with_own_card(model.push_to_hub)),
    ):
        mapping = isinstance(owner, dict)
        # What a class inherits is not its own: restoring it means deleting what was put in front of it.
        _before.append((owner, name, owner[name] if mapping else vars(owner).get(name)))
        if mapping:
            owner[name] = new
        else:
            setattr(owner, name, new)


def unregister() -> None:
    """Give everything back as it was before `register`."""
    while _before:
        owner, name, old = _before.pop()
        if isinstance(owner, dict):
            owner[name] = old
        elif old is None:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


def finding_old_files(original: Any) -> Any:
    """transformers' `get_hf_quantizer`, which then also knows checkpoints as AutoGPTQ laid them out.

    Those describe the quantization in quantize_config.json only, and their weights are called like
    gptq_model-4bit-128g.safetensors.
    """

    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("gguf_file"):
            describe(config)
        return original(config, quantization_config, *args, **kwargs)

    return get_hf_quantizer


def describe(config: Any) -> None:
    """Complete the configuration of an old checkpoint: its quantization, and the name of its weights."""
    name = config.name_or_path
    if not name:
        return
    if getattr(config, "quantization_config", None) is None:
        path = _find(name, "quantize_config.json", config)
        if path is None:
            return
        config.quantization_config = read_quantization(path)
    stored = config.quantization_config
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method == "gptq" and getattr(config, "transformers_weights", None) is None:
        config.transformers_weights = _weights(name, config)


def _find(name: str, file: str, config: Any) -> Path | None:
    """A file of a directory or a hub repository, None if there is none."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    quietly = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    found = cached_file(name, file, revision=getattr(config, "_commit_hash", None), **quietly)
    return Path(found) if found else None


def _weights(name: str, config: Any) -> str | None:
    """The name of the weights, or of their index, if it is not the one that transformers looks for."""
    if Path(name).is_dir():
        files = [path.name for path in Path(name).iterdir()]
    else:
        try:
            files = HfApi().list_repo_files(name, revision=getattr(config, "_commit_hash", None))
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            return None  # transformers looks for its own names next, and says what it does not find
    if any(file in ("model.safetensors", "model.safetensors.index.json") for file in files):
        return None
    found = [file for file in sorted(files) if file.endswith(".safetensors.index.json")]
    found = found or [file for file in sorted(files) if file.endswith(".safetensors")]
    return found[0] if found else None
