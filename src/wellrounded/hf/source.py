"""Open a dense model to be quantized: a hub id, a directory, a .gguf file, or a transformers model in memory."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..card import copy_files
from ..checkpoint import Reader, Source
from ..errors import CheckpointError, UsageError
from ..model.walk import meta_copy
from . import attention

COMPUTE = torch.bfloat16  # fast wherever there is hardware for it, and wide enough for every model's activations


def open_source(model: str | Path | torch.nn.Module, tokenizer: Any = None, trust_remote_code: bool = False) -> Source:
    """The dense model behind a hub id, a directory, a .gguf file or an object, ready for wellrounded's pipeline.

    Weights are read from safetensors (or GGUF) only, and code from the hub runs only with `trust_remote_code`.

    Raises UsageError for a model that does not exist, is no causal language model, or is quantized already;
    CheckpointError for damaged files.
    """
    if isinstance(model, torch.nn.Module):
        return _from_memory(model, tokenizer, str(getattr(model, "name_or_path", "")) or type(model).__name__)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path)
    directory = path if path.is_dir() else download(str(model))
    return _from_directory(directory, str(model), tokenizer, trust_remote_code)


def download(name: str) -> Path:
    """The hub's snapshot of a model, without weights that are not safetensors; UsageError if there is none."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local:
        raise UsageError(f"{name}: no such directory, and not a hub id (ORGANIZATION/NAME) either")
    pickles = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx"]
    try:
        return Path(snapshot_download(name, ignore_patterns=pickles))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{name}: no such directory here, and the hub did not deliver it ({reason})") from None


def _from_directory(directory: Path, label: str, tokenizer: Any, trust_remote_code: bool) -> Source:
    config = load_config(directory, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        method = config.to_dict()["quantization_config"].get("quant_method", "some method")
        raise UsageError(f"{label}: already quantized ({method}); start from the original model")
    tokenizer = tokenizer or load_tokenizer(directory, trust_remote_code)
    return open_files(Reader(directory), config, AutoModelForCausalLM, label, tokenizer, trust_remote_code)


def open_files(
    reader: Reader, config: Any, kind: Any, label: str, tokenizer: Any, trust_remote_code: bool = False
) -> Source:
    """The dense model in the files of one directory, which is a `kind`: a model's class, or an Auto class."""
    directory = reader.directory
    model = skeleton(kind, config, trust_remote_code)
    names = _stored_names(model, set(reader.places))
    if names is None:
        # The file's tensors become the model's by more than renaming (fused experts, say): transformers does it.
        loaded, found = kind.from_pretrained(
            directory,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        refuse_gaps(directory, found)
        source = _from_memory(loaded, tokenizer, label)
        source.config, source.fingerprint = json.loads((directory / "config.json").read_bytes()), reader.fingerprint()
        source.write_files = lambda target: copy_files(directory, target)
        return source

    def read(name: str) -> torch.Tensor | None:
        return reader.read(names[name]) if name in names else None

    used = set(names.values())
    extras = {name: (lambda name=name: reader.read(name)) for name in reader.places if name not in used}
    return Source(
        label=label,
        model=model,
        read=read,
        stored_name=lambda name: names.get(name, name),
        extras=extras,
        config=json.loads((directory / "config.json").read_bytes()),
        write_files=lambda target: copy_files(directory, target),
        bytes=reader.bytes,
        fingerprint=reader.fingerprint(),
        tokenizer=tokenizer,
    )


def refuse_gaps(directory: Path, found: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers and a warning; here it is an error."""
    for name, stored, needed in sorted(found["mismatched_keys"]):
        raise wrong_shape(name, stored, needed)
    if missing := sorted(name for name in found["missing_keys"] if not name.endswith(".g_idx")):  # may be left out
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory}: none of its files has {missing[0]}{more}; download it again")


def wrong_shape(name: str, stored: torch.Size, needed: torch.Size) -> CheckpointError:
    """The error for a tensor of the files that does not fit the model."""
    return CheckpointError(
        f"{name} is {list(stored)}, the model needs {list(needed)}; the files and config.json do not belong together, "
        "download both again"
    )


def _stored_names(model: transformers.PreTrainedModel, stored: set[str]) -> dict[str, str] | None:
    """Each tensor of the model by its name in the files: equal, or with or without the base model's prefix.

    Tensors that the files do not hold are left out if they are tied to one that they do; None if any other is missing.
    """
    prefix = f"{model.base_model_prefix}."
    tensors = model.state_dict(keep_vars=True)
    names: dict[str, str] = {}
    for name in tensors:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in stored:
                names[name] = candidate
                break
    held = {id(tensors[name]) for name in names}
    absent = (t for n, t in tensors.items() if n not in names and isinstance(t, torch.nn.Parameter))
    return names if all(id(t) in held for t in absent) else None


def _from_gguf(path: Path) -> Source:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError(f'{path}: GGUF files are read by the gguf package: pip install "wellrounded[gguf]"') from None
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model = skeleton(AutoModelForCausalLM, config)
        with redirect_stderr(io.StringIO()):  # its progress bar has no switch
            loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model, torch_dtype=COMPUTE)
        tensors = loaded["tensors"]
    except UsageError:
        raise
    except Exception as error:  # the reader raises whatever its bytes lead it to
        raise CheckpointError(f"{path}: cannot be read as GGUF ({type(error).__name__}: {error})") from None
    config.dtype = COMPUTE
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    stat = path.stat()
    return Source(
        label=path.stem,
        model=model,
        read=tensors.get,
        stored_name=lambda name: name,
        extras={},
        config=_plain_config(config, model),
        write_files=lambda target: _save_files(model, tokenizer, target),
        bytes=size,
        fingerprint=f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}",
        tokenizer=tokenizer,
    )


def _from_memory(model: torch.nn.Module, tokenizer: Any, label: str) -> Source:
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise UsageError(f"{label}: already quantized; start from the original model")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    skeleton = meta_copy(model, COMPUTE).eval()
    distinct = {t.data_ptr(): t for t in tensors.values()}.values()
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.double().sum().item()!r}".encode())
    return Source(
        label=label,
        model=skeleton,
        read=tensors.get,
        stored_name=lambda name: name,
        extras={},
        config=_plain_config(model.config, model),
        write_files=lambda target: _save_files(model, tokenizer, target),
        bytes=sum(t.numel() * t.element_size() for t in distinct),
        fingerprint=digest.hexdigest(),
        tokenizer=tokenizer,
    )


def load_config(directory: Path, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """The directory's configuration; UsageError unless it describes a causal language model."""
    if not (directory / "config.json").is_file():
        raise UsageError(f"{directory}: has no config.json, so it is not a model in Hugging Face's layout")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"{directory / 'config.json'}: {str(error).strip().splitlines()[0]}") from None
    apart = directory / "quantize_config.json"  # where old tools described the quantization, and nowhere else
    if not getattr(config, "quantization_config", None) and apart.is_file():
        config.quantization_config = read_quantization(apart)
    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise UsageError(
            f"{directory}: a {config.model_type!r} model, which is not a causal language model "
            "that transformers can build"
        )
    # Encoders have a causal variant in transformers, which generates only if it was trained for it.
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder:
        raise UsageError(
            f"{directory}: a {config.model_type!r} model fills gaps in a text and does not continue it; "
            "wellrounded quantizes causal language models"
        )
    return config


def read_quantization(path: Path) -> dict[str, Any]:
    """What a quantize_config.json says. Raises CheckpointError if it is no JSON object."""
    try:
        return {"quant_method": "gptq", **json.loads(path.read_bytes())}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error}); download it again") from None


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer, or None if it has none."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def skeleton(kind: Any, config: Any, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """A `kind` (a model's class, or an Auto class) with parameters on the meta device and computed buffers."""
    with init_empty_weights(include_buffers=False):
        if hasattr(kind, "from_config"):
            model = kind.from_config(config, dtype=COMPUTE, trust_remote_code=trust_remote_code)
        else:
            model = kind._from_config(config, dtype=COMPUTE)
    model.tie_weights()
    attention.use(model)
    return model.eval()


def _plain_config(config: transformers.PretrainedConfig, model: torch.nn.Module) -> dict[str, Any]:
    plain = json.loads(config.to_json_string())
    return {**plain, "architectures": plain.get("architectures") or [type(model).__name__]}


def _save_files(model: torch.nn.Module, tokenizer: Any, target: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(target)
