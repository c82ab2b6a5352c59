"""Open a dense model to be quantized: a hub id, a directory, a .gguf file, or a transformers model in memory."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from ..calibration import Processor
from ..card import companions, copy_files
from ..checkpoint import Reader, Source
from ..errors import CheckpointError, UsageError
from ..model.weights import meta_copy
from ..tensorfile import Stamp
from . import attention
from .stored import Stored

AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
    "AutoModel",
)  # what a model that brings its code may be, the first that it names
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
    return from_directory(directory, str(model), tokenizer, trust_remote_code)


def download(name: str, only: list[str] | None = None) -> Path:
    """The hub's snapshot of a model, without weights that are not safetensors; UsageError if there is none.

    `only` are the patterns of those files that are wanted, if not all are.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local:
        raise UsageError(f"{name}: no such directory, and not a hub id (ORGANIZATION/NAME) either")
    pickles = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx"]
    with delivered(name):
        return Path(snapshot_download(name, allow_patterns=only, ignore_patterns=pickles))


@contextmanager
def delivered(name: str) -> Iterator[None]:
    """What goes wrong between here and the hub is a UsageError about this model."""
    try:
        yield
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{name}: no such directory here, and the hub did not deliver it ({reason})") from None


def from_directory(
    directory: Path, label: str, tokenizer: Any, trust_remote_code: bool, reader: Reader | None = None
) -> Source:
    """The dense model in a directory of Hugging Face's layout; `reader` knows the tensors, if that is not all files."""
    companions(directory)  # a link that leads elsewhere is refused before anything follows it
    config = load_config(directory, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        method = config.to_dict()["quantization_config"].get("quant_method", "some method")
        raise UsageError(f"{label}: already quantized ({method}); start from the original model")
    tokenizer = tokenizer or load_readers(directory, trust_remote_code)
    return open_files(reader or Reader(directory), config, kind_of(config), label, tokenizer, trust_remote_code)


def open_files(
    reader: Reader, config: Any, kind: Any, label: str, tokenizer: Any, trust_remote_code: bool = False
) -> Source:
    """The dense model in the files of one directory, which is a `kind`: a model's class, or an Auto class."""
    directory = reader.directory
    stored = Stored(skeleton(kind, config, trust_remote_code), reader.places, reader.read)
    if missing := stored.missing():
        raise none_has(directory, missing)
    return stored.source(
        label=label,
        config=json.loads((directory / "config.json").read_bytes()),
        write_files=lambda target: copy_files(directory, target),
        bytes=reader.bytes,
        fingerprint=reader.fingerprint(),
        tokenizer=tokenizer,
        sizes=reader.sizes,
        verify=reader.check_unchanged,
    )


def refuse_gaps(directory: Path, found: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers and a warning; here it is an error."""
    for name, stored, needed in sorted(found["mismatched_keys"]):
        raise wrong_shape(name, stored, needed)
    if missing := sorted(name for name in found["missing_keys"] if not name.endswith(".g_idx")):  # may be left out
        raise none_has(directory, missing)


def none_has(directory: Path, missing: list[str]) -> CheckpointError:
    """The error for tensors that the model needs and no file has."""
    more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
    return CheckpointError(f"{directory}: none of its files has {missing[0]}{more}; download it again")


def wrong_shape(name: str, stored: torch.Size, needed: torch.Size) -> CheckpointError:
    """The error for a tensor of the files that does not fit the model."""
    return CheckpointError(
        f"{name} is {list(stored)}, the model needs {list(needed)}; the files and config.json do not belong together, "
        "download both again"
    )


def _from_gguf(path: Path) -> Source:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError(f'{path}: GGUF files are read by the gguf package: pip install "wellrounded[gguf]"') from None
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    stamp = Stamp.of(path.stat())  # of the file that is read now, whole: what becomes of it later does not matter
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
    return Stored(model, tensors, tensors.__getitem__).source(
        label=path.stem,
        config=_plain_config(config, model),
        write_files=lambda target: _save_files(model, tokenizer, target),
        bytes=sum(_sizes(tensors).values()),
        fingerprint={path.name: stamp.words()},
        tokenizer=tokenizer,
        sizes=_sizes(tensors),
    )


def _from_memory(model: torch.nn.Module, tokenizer: Any, label: str) -> Source:
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise UsageError(f"{label}: already quantized; start from the original model")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    distinct = {t.data_ptr(): t for t in tensors.values()}.values()
    tied = getattr(model, "all_tied_weights_keys", {})
    as_saved = revert_weight_conversion(model, {name: t for name, t in tensors.items() if name not in tied})
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.double().sum().item()!r}".encode())
    return Stored(meta_copy(model, COMPUTE).eval(), as_saved, as_saved.__getitem__).source(
        label=label,
        config=_plain_config(model.config, model),
        write_files=lambda target: _save_files(model, tokenizer, target),
        bytes=sum(t.numel() * t.element_size() for t in distinct),
        fingerprint=digest.hexdigest(),
        tokenizer=tokenizer,
        sizes=_sizes(as_saved),
    )


def _sizes(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


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
    kind_of(config)
    return config


def kind_of(config: transformers.PretrainedConfig) -> Any:
    """The class that a configuration's model is built with, as it says itself: one of transformers, or an Auto class.

    Raises UsageError if transformers can build no such model.
    """
    own = (getattr(config, "auto_map", None) or {}) if "transformers_modules" in type(config).__module__ else {}
    for name in AUTO:
        if name in own:
            return getattr(transformers, name)
    for name in getattr(config, "architectures", None) or []:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not encoder:
        return AutoModelForCausalLM
    made = ", ".join(getattr(config, "architectures", None) or ["nothing"])
    raise UsageError(
        f"{config.name_or_path}: a {config.model_type!r} model ({made}), which transformers {transformers.__version__} "
        "cannot build; if its code comes with it, pass --trust-remote-code"
    )


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


def load_readers(directory: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer; where it has a processor of pictures too, both, this one loaded when it is needed."""
    tokenizer = load_tokenizer(directory, trust_remote_code)
    if not any((directory / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        return tokenizer
    return Processor(tokenizer, lambda: load_processor(directory, trust_remote_code))


def load_processor(directory: Path, trust_remote_code: bool = False) -> Any:
    """The directory's processor; UsageError if something that it needs is not installed, or its files are no good."""
    try:
        return AutoProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"{directory}: its processor of pictures cannot be loaded: {reason.strip()}; install what it needs "
            "(pip install pillow torchvision), or pass tokenizer="
        ) from None


def skeleton(kind: Any, config: Any, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """A `kind` (a model's class, or an Auto class) with parameters on the meta device and computed buffers."""
    with init_empty_weights(include_buffers=False):
        if hasattr(kind, "from_config"):
            model = kind.from_config(config, dtype=COMPUTE, trust_remote_code=trust_remote_code)
        else:
            model = kind._from_config(config, dtype=COMPUTE)
    model.tie_weights()
    _as_loaded(model)
    attention.use(model)
    return model.eval()


def _as_loaded(model: transformers.PreTrainedModel) -> None:
    """What a model that is loaded has and one that is built has not: parts in float32, buffers computed in float32."""
    if plan := model._get_dtype_plan(COMPUTE):
        pattern, groups, _ = build_glob_alternation(list(plan))
        for path, owner in model.named_modules():
            for held in (owner._parameters, owner._buffers):
                for name, tensor in held.items():
                    match = tensor is not None and pattern.search(f"{path}.{name}" if path else name)
                    if match:
                        exact = tensor.detach().to(plan[groups[match.lastgroup]])
                        held[name] = torch.nn.Parameter(exact, False) if held is owner._parameters else exact
    for module in model.modules():
        module._is_hf_initialized = not module._non_persistent_buffers_set
    model.initialize_weights()


def _plain_config(config: transformers.PretrainedConfig, model: torch.nn.Module) -> dict[str, Any]:
    plain = json.loads(config.to_json_string())
    return {**plain, "architectures": plain.get("architectures") or [type(model).__name__]}


def _save_files(model: torch.nn.Module, tokenizer: Any, target: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(target)
