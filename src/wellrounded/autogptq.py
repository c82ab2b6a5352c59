"""AutoGPTQ's names on this engine: code written for it runs with its import line changed.

from wellrounded.autogptq import AutoGPTQForCausalLM, BaseQuantizeConfig
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UsageError
from .hf.gptq_config import asking
from .hf.load import load, load_directory, resolve
from .hf.quantizer import Quantizer
from .hf.register import register
from .hf.source import open_source, read_quantization
from .presets import preset
from .request import Request

# Arguments that chose among AutoGPTQ's kernels or the ways it moved data; what they did is decided here otherwise.
IDLE = (
    "use_triton", "use_cuda_fp16", "use_marlin", "use_qigen", "use_tritonv2", "inject_fused_attention",
    "inject_fused_mlp", "warmup_triton", "disable_exllama", "disable_exllamav2", "low_cpu_mem_usage", "trainable",
    "autotune_warmup_after_quantized", "cache_examples_on_gpu", "safetensors_metadata", "torch_compile",
)  # fmt: skip


@dataclass
class BaseQuantizeConfig:
    """How to quantize, with AutoGPTQ's defaults: one group per output, and columns in the order of their activations.

    `static_groups`, `is_marlin_format` and the names of files are accepted because old files have them.
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    is_marlin_format: bool = False
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None
    checkpoint_format: str | None = None
    quant_method: str = "gptq"

    def to_dict(self) -> dict[str, Any]:
        """As quantize_config.json has it; keys that say nothing are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def save_pretrained(self, save_dir: str | Path) -> None:
        """Write quantize_config.json into a directory."""
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        Path(save_dir, "quantize_config.json").write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path) -> BaseQuantizeConfig:
        """Read quantize_config.json of a directory or a hub repository; keys that are unknown here are left out."""
        stored = read_quantization(resolve(str(save_dir)) / "quantize_config.json")
        return cls(**{key: value for key, value in stored.items() if key in cls.__dataclass_fields__})

    def request(self, examples: Any, batch_size: int | None = None) -> Request:
        """The quantization it asks for, calibrated on `examples`."""
        return Request(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            act_order=self.desc_act and not self.static_groups,
            calibration=examples,
            length=None,
            settings=replace(
                preset("default").settings, damping=self.damp_percent, true_sequential=self.true_sequential
            ),
            batch=batch_size,
            min_tokens=1,
        )


class AutoGPTQForCausalLM(nn.Module):
    """A causal language model to quantize, or one that is quantized; `model` is the transformers model inside.

    A model from `from_pretrained` is read when it is first needed: quantizing it reads its files block by block, and
    the dense model never is in memory as a whole.
    """

    def __init__(self, source: str, quantize_config: BaseQuantizeConfig | None, options: dict[str, Any]) -> None:
        super().__init__()
        register()
        self.quantize_config, self._source, self._options = quantize_config, source, options
        self._inside: nn.Module | None = None
        self.quantized = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: dict | None = None,
        trust_remote_code: bool = False,
        **model_init_kwargs: Any,
    ) -> AutoGPTQForCausalLM:
        """A dense model, to be quantized. Raises UsageError if there is none."""
        options = {"trust_remote_code": trust_remote_code, **_without_idle(model_init_kwargs)}
        if max_memory is not None:
            options |= {"max_memory": max_memory, "device_map": options.get("device_map", "auto")}
        options["dtype"] = options.pop("torch_dtype", options.pop("dtype", "auto"))
        resolve(str(pretrained_model_name_or_path))
        return cls(str(pretrained_model_name_or_path), quantize_config, options)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: Any = None,
        max_memory: dict | None = None,
        device: str | int | torch.device | None = None,
        quantize_config: BaseQuantizeConfig | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> AutoGPTQForCausalLM:
        """A quantized model: a directory or a hub repository, of AutoGPTQ or of any other tool.

        Without `device` and `device_map` it goes to the first GPU, if there is one. `quantize_config` counts where the
        checkpoint does not describe itself. Raises UsageError for a device that is not there.
        """
        if not use_safetensors:
            _say("weights are read from safetensors files only; use_safetensors=False is ignored")
        options = _without_idle(kwargs)
        options["dtype"] = options.pop("torch_dtype", options.pop("dtype", "auto"))
        if max_memory is not None and device_map is None and device is None:
            device_map = "auto"
        if device_map is None:
            place = ("cuda:0" if torch.cuda.is_available() else "cpu") if device is None else device
            device_map = {"": _present(place)}
        self = cls(str(model_name_or_path), quantize_config, options)
        self._inside = load_directory(
            resolve(self._source),
            quantization=quantize_config.to_dict() if quantize_config else None,
            weights=f"{model_basename.removesuffix('.safetensors')}.safetensors" if model_basename else None,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            max_memory=max_memory,
            **options,
        )
        stored = self._inside.config.quantization_config.to_dict()
        fields = BaseQuantizeConfig.__dataclass_fields__
        self.quantize_config = BaseQuantizeConfig(**{key: value for key, value in stored.items() if key in fields})
        self.quantized = True
        return self

    @property
    def model(self) -> nn.Module:
        """The transformers model; a dense one is read now if it was not yet."""
        if self._inside is None:
            self._inside = load(self._source, **self._options)
        return self._inside

    def quantize(self, examples: list[dict[str, Any]], batch_size: int | None = None, **kwargs: Any) -> None:
        """Calibrate on `examples`, dicts with `input_ids` and `attention_mask`, and pack every linear layer.

        Texts and chats are taken too, if the model has a tokenizer. Raises UsageError if it is quantized already.
        """
        _without_idle(kwargs, refuse=True)
        if self.quantized or self.quantize_config is None:
            raise UsageError(f"{self._source}: quantized already; load the original with from_pretrained")
        trust = self._options.get("trust_remote_code", False)
        request = self.quantize_config.request(examples, batch_size)
        if self._inside is None:
            self._inside = load_directory(resolve(self._source), quantization_config=asking(request), **self._options)
        else:  # it has been looked at, and may have been changed
            Quantizer.asked(request).pack(self._inside, open_source(self._inside, None, trust))
        self.quantized = True

    def save_quantized(self, save_dir: str | Path, use_safetensors: bool = True, **kwargs: Any) -> None:
        """Write the quantized model into a directory, with its configuration twice, a report and a model card."""
        _without_idle(kwargs, refuse=True)
        if not use_safetensors:
            _say("use_safetensors=False is ignored; weights are written as safetensors")
        if not self.quantized:
            raise UsageError(f"{self._source}: not quantized yet; call quantize(examples) first")
        self.model.save_pretrained(save_dir)

    save_pretrained = save_quantized

    def push_to_hub(
        self, repo_id: str, save_dir: str | Path | None = None, use_auth_token: bool | str | None = None, **kwargs: Any
    ) -> Any:
        """Upload the quantized model; with `save_dir` it is saved there as well."""
        options = _without_idle(kwargs)
        options.pop("use_safetensors", None)
        if save_dir is not None:
            self.save_quantized(save_dir)
        return self.model.push_to_hub(repo_id, token=options.pop("token", use_auth_token), **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's own, in inference mode."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def to(self, device: str | torch.device) -> AutoGPTQForCausalLM:
        """Move the model."""
        self.model.to(device)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self.model, name)


def _present(device: str | int | torch.device) -> torch.device:
    """The device. Raises UsageError if this machine does not have it."""
    place = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {str(place)!r} was asked for, but torch sees no such GPU here; use device='cpu'")
    return place


def _without_idle(kwargs: dict[str, Any], refuse: bool = False) -> dict[str, Any]:
    """The arguments that mean something here; those that do not are named in one warning, if they ask for anything."""
    asked = [name for name in IDLE if kwargs.get(name)]
    if asked:
        _say(f"{', '.join(asked)}: without meaning here, and ignored")
    rest = {name: value for name, value in kwargs.items() if name not in IDLE}
    if rest and refuse:
        raise TypeError(f"unexpected arguments: {', '.join(rest)}")
    return rest


def _say(what: str) -> None:
    warnings.warn(f"AutoGPTQ: {what}", UserWarning, stacklevel=3)
