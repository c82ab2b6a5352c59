"""transformers' own `from_pretrained` on this engine: the quantizer behind quant_method "gptq"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..checkpoint import read_header
from ..core.recipe import Recipe
from ..errors import CheckpointError
from ..formats import config as config_format
from ..formats import gptq as gptq_format
from ..model.blocks import find_blocks, is_linear, shape_of
from ..nn import QuantLinear
from .source import wrong_shape

DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
LISTS = "modules_in_block_to_quantize"


class GPTQConfig(transformers.GPTQConfig):
    """What config.json says, whole: transformers' class would drop `dynamic` and every other key it does not know.

    It must carry the name of its parent: transformers compares class names when a configuration is passed for a model
    that is quantized already.
    """

    def __init__(self, bits: int, **kwargs: Any) -> None:
        self._stored = {"bits": bits, **kwargs}
        # The parent asks for the optimum package as soon as this one is set.
        super().__init__(bits=bits, **{k: v for k, v in kwargs.items() if k != LISTS})
        self.modules_in_block_to_quantize = kwargs.get(LISTS)

    def to_dict(self) -> dict[str, Any]:
        """The stored keys as they were; calibration data and tokenizers never belong into config.json."""
        return {"quant_method": "gptq", **{k: v for k, v in self._stored.items() if k not in ("dataset", "tokenizer")}}


class Quantizer(HfQuantizer):
    """Swaps linear layers for QuantLinear before the weights are read, and binds kernels after."""

    requires_calibration = True  # quantizing on the fly is not this class's business

    def __init__(self, quantization_config: GPTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored = config_format.from_config(quantization_config.to_dict())
        self.without_index: set[str] = set()  # layers whose g_idx is not in the files, which makes it trivial
        self.shapes: dict[str, torch.Size] = {}  # of all tensors, as the model needs them

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        prefix = f"{model.base_model_prefix}."
        stored = {name.removeprefix(prefix): entry for name, entry in _headers(checkpoint_files or []).items()}
        for name, scheme in _planned(model, self.stored.recipe, stored, prefix).items():
            layer = model.get_submodule(name)
            outputs, inputs = shape_of(layer)
            replacement = QuantLinear(
                inputs, outputs, scheme, self.stored.version, layer.bias is not None, name, model.config.dtype
            )
            # Some models (GPT-2, Mamba) give their layers' weights a first value before the files are read.
            replacement.weight = _nothing_to_initialize()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacement.to("meta"))
            if f"{name.removeprefix(prefix)}.g_idx" not in stored:
                self.without_index.add(name)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, tensor in model.state_dict().items():
            if tensor.shape != self.shapes[name]:  # older versions of transformers take whatever they find
                raise wrong_shape(name, tensor.shape, self.shapes[name])
        for module in (m for m in model.modules() if isinstance(m, QuantLinear)):
            del module.weight
            if module.qweight.device.type == "meta":
                continue
            if module.name in self.without_index:  # its buffer holds whatever was in memory
                module.g_idx = module.scheme.trivial_group_index(module.in_features).to(module.qweight.device)
            module.bind(model.dtype)
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The buffers are the file's tensors."""
        return True


def _nothing_to_initialize() -> torch.Tensor:
    empty = torch.empty(0)
    empty._is_hf_initialized = True
    return empty


def _headers(files: list[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every tensor in safetensors files."""
    found = {}
    for file in files:
        for name, entry in read_header(Path(file))[0].items():
            found[name] = (tuple(entry["shape"]), DTYPES.get(entry["dtype"]))
    return found


def _planned(model: nn.Module, recipe: Recipe, stored: dict, prefix: str) -> dict[str, Any]:
    """Each linear layer that the files hold packed, with its scheme, its tensors' shapes checked.

    `stored` is what the files hold, by name without the base model's `prefix`, which some of them leave out.
    Raises CheckpointError for a layer that is neither packed nor dense in the files, for tensors of the wrong shape,
    and for packed tensors that no layer of the model would take.
    """
    blocks = tuple(f"{name}." for name in find_blocks(model))
    planned: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        bare, scheme = name.removeprefix(prefix), recipe.scheme_of(name)
        if f"{bare}.qweight" in stored and scheme is not None:
            planned[name] = scheme
            _check_shapes(name, bare, module, scheme, stored)
        elif f"{bare}.weight" not in stored and name.startswith(blocks):
            raise CheckpointError(
                f"{name}.qweight is missing, and so is a dense {name}.weight; fetch the checkpoint again"
            )
    known = {name.removeprefix(prefix) for name in planned}
    stray = [name for name in stored if name.endswith(".qweight") and name.removesuffix(".qweight") not in known]
    if stray:
        raise CheckpointError(
            f"{stray[0]} and {len(stray) - 1} more packed weights belong to no linear layer of "
            f"{type(model).__name__}; this version of wellrounded cannot load this checkpoint"
        )
    return planned


def _check_shapes(name: str, bare: str, layer: nn.Module, scheme: Any, stored: dict) -> None:
    outputs, inputs = shape_of(layer)
    for key, (shape, dtype) in gptq_format.layout(scheme, inputs, outputs).items():
        tensor = f"{bare}.{key}"
        if tensor not in stored:
            if key == "g_idx" and not scheme.act_order:
                continue
            raise CheckpointError(f"{name}.{key} is missing; fetch the checkpoint again")
        seen, kind = stored[tensor]
        if seen != shape or (kind != dtype and key != "scales"):
            raise CheckpointError(
                f"{name}.{key} is {kind} {list(seen)}, expected {dtype} {list(shape)} for {scheme}; check bits and "
                "group_size in quantization_config, or fetch the checkpoint again"
            )


def register() -> None:
    """Let transformers' `from_pretrained` load GPTQ checkpoints with this engine; `unregister` undoes it."""
    if auto.AUTO_QUANTIZER_MAPPING["gptq"] is not Quantizer:
        _before.append((auto.AUTO_QUANTIZER_MAPPING["gptq"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]))
        auto.AUTO_QUANTIZER_MAPPING["gptq"] = Quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig


def unregister() -> None:
    """Give "gptq" back to whoever had it before `register`."""
    if _before:
        auto.AUTO_QUANTIZER_MAPPING["gptq"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = _before.pop()


@contextmanager
def registered() -> Iterator[None]:
    """Registered for as long as the block runs, and afterwards as it was before."""
    already = bool(_before)
    register()
    try:
        yield
    finally:
        if not already:
            unregister()


_before: list[tuple[Any, Any]] = []
