"""transformers' own `from_pretrained` on this engine: the quantizer behind quant_method "gptq"."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

from .. import kernels
from ..checkpoint import Source
from ..errors import UsageError
from ..formats import config as config_format
from ..model.blocks import oriented
from ..model.experts import Experts
from ..model.weights import materialize
from ..nn import QuantLinear
from ..pipeline import Run
from ..report import Report
from ..request import Request
from .gptq_config import GPTQConfig, asking, kernel_of, request_of
from .on_the_fly import (
    Memory,
    fill,
    fuse_experts,
    put_layers,
    quantize_files,
    quantize_in_memory,
    share,
    tied,
    untie,
)
from .packed import headers, packed_layers
from .source import skeleton, wrong_shape


class Quantizer(HfQuantizer):
    """Swaps linear layers for QuantLinear before the weights are read, and fills and binds them after.

    The packed tensors come from the checkpoint, or, if that is dense, from a quantization that runs before anything
    else is read, one block at a time: the dense model never is in memory as a whole. `report` is what it found.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: Report | None = None
        self.files: list[str] = []
        self.to_quantize: nn.Module | None = None
        self.kernel = kernel_of(quantization_config.backend)
        if self.pre_quantized:
            self.stored = config_format.from_config(quantization_config.to_dict())
        else:
            self.request = request_of(quantization_config)
            self.tokenizer = quantization_config.tokenizer
        self.made: dict[str, dict[str, torch.Tensor]] = {}  # packed tensors that are in no file, by layer
        self.fuses_experts = True  # when the model is dequantized
        self.owners: dict[str, str] = {}  # layers that are packed once for several places, and where that is
        self.without_index: set[str] = set()  # layers whose g_idx is not in the files, which makes it trivial
        self.shapes: dict[str, torch.Size] = {}  # of all tensors, as the model needs them

    @classmethod
    def asked(cls, request: Request, kernel: str | None = None) -> Quantizer:
        """One for `pack`, outside of `from_pretrained`."""
        return cls(asking(request, kernel), pre_quantized=False)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises UsageError for a device map that a model cannot be quantized onto."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError(
                "the device map puts layers on disk, where only a finished checkpoint can lie; quantize into a "
                "directory first (wellrounded quantize), then load that"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UsageError("tensor parallel layouts of packed weights are not implemented; use device_map instead")
        self.files = list(checkpoint_files or [])
        if not self.pre_quantized:
            self.to_quantize = model  # see update_weight_conversions
            return
        stored = headers(model, self.files)
        schemes = packed_layers(model, self.stored.recipe, stored)
        put_layers(model, schemes, self.stored.version, model.config.dtype)
        self.owners = tied(model, schemes)
        untie(model, self.owners)
        self.without_index = {name for name in schemes if f"{name}.g_idx" not in stored}
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def update_weight_conversions(self, weight_conversions: list, *args: Any) -> list:
        """Quantizes, if that is what was asked for.

        Of all hooks before the weights are read it is the first one outside the contexts in which transformers builds
        a model: there, every new tensor would be on the meta device and in the model's dtype.
        """
        if self.to_quantize is not None:  # newer versions of transformers pass the model as well
            model, self.to_quantize = self.to_quantize, None
            self.take(model, *quantize_files(model, self.files, self.request, self.tokenizer))
        return super().update_weight_conversions(weight_conversions, *args)

    def pack(self, model: nn.Module, source: Source) -> None:
        """Quantize outside of `from_pretrained`: `model` gets its packed layers, the rest of it stays as it is.

        `source` delivers its dense weights; its skeleton may be `model` itself, whose other tensors are read then.
        """
        model.hf_quantizer = self
        run, memory = quantize_in_memory(self.request.run(source))
        model.is_quantized, model.quantization_method = True, self.quantization_config.quant_method
        self.take(model, run, memory)
        materialize(model, source.read)
        self.postprocess_model(model)

    def take(self, model: nn.Module, run: Run, memory: Memory) -> None:
        """Put the packed layers that `run` made into `model`, whose other tensors are still to be read."""
        put_layers(model, run.plan.schemes, run.version, model.config.dtype)
        self.owners = tied(model, run.plan.schemes)
        untie(model, self.owners)
        experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
        for name in run.plan.schemes:
            owner = name.rpartition(".")[0].rpartition(".")[0]
            if owner in experts and model.get_submodule(name).bias is not None:  # it is a piece of one in the files
                memory.layers[name]["bias"] = run.source.read(f"{name}.bias").to(model.config.dtype).clone()
        fill(model, memory.layers)
        self.made, self.report = memory.layers, run.report
        self.quantization_config = GPTQConfig.from_dict(run.stored_config())
        # transformers would warn that the files lack what was just made, and hold what it was made from.
        leaves = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in self.made}))
        inside = "|".join(map(re.escape, experts)) or "$^"
        missing = rf"\.(qweight|qzeros|scales|g_idx)$|^({inside})\.\d+\.\w+\.bias$"
        unexpected = rf"(^|\.)({leaves})\.weight$|^({inside})\."
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), missing}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), unexpected}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model.config.quantization_config = self.quantization_config
        for name, tensor in model.state_dict().items() if self.pre_quantized else ():
            if tensor.shape != self.shapes[name]:  # older versions of transformers take whatever they find
                raise wrong_shape(name, tensor.shape, self.shapes[name])
        fill(model, self.made)
        self.made = {}
        share(model, self.owners)
        for layer in (m for m in model.modules() if isinstance(m, QuantLinear)):
            if layer.qweight.device.type == "meta":  # offloaded: its tensors come when it is called
                self._check_offloading(layer)
                layer.read_in_place()
                continue
            if layer.name in self.without_index:  # its buffer holds whatever was in memory
                layer.g_idx = layer.scheme.trivial_group_index(layer.in_features).to(layer.qweight.device)
            layer.wanted_kernel = self.kernel
            layer.bind(model.dtype)
        return model

    def _check_offloading(self, layer: QuantLinear) -> None:
        if self.kernel not in (None, kernels.reference.NAME):
            raise UsageError(
                f"kernel {self.kernel!r} was asked for, but {layer.name} is offloaded, and only the reference kernel "
                "reads a file's own layout; leave the choice to wellrounded"
            )
        if layer.name in self.without_index:
            raise UsageError(
                f"{layer.name} is offloaded, and its files hold no g_idx to load with it; load and save the model once "
                "without offloading, which adds it"
            )
        held = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
        if held is not None and held["qweight"].dtype != torch.int32:
            raise UsageError(
                f"{layer.name} is offloaded, and transformers {transformers.__version__} hands its packed weight back "
                f"as {held['qweight'].dtype}; update transformers, or pass offload_buffers=False"
            )

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Every QuantLinear becomes the layer that it was, with the weight that it stands for."""
        before, dtype = model.dtype, dtype or model.dtype
        if isinstance(dtype, str):  # what a configuration holds once a model has been saved
            dtype = getattr(torch, dtype)
        layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)]
        if away := [name for name, layer in layers if layer.qweight.device.type == "meta"]:
            raise UsageError(f"{away[0]} is offloaded; load the model without offloading to dequantize it")
        original = skeleton(type(model), copy.deepcopy(model.config))  # it sets the attention of its own
        known = dict(original.named_modules())
        for name, layer in layers:
            with torch.device("meta"):
                dense = known.get(name) or nn.Linear(layer.in_features, layer.out_features)  # an expert's
            dense.weight = nn.Parameter(oriented(dense, layer.dense_weight(dtype)).contiguous())
            dense.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype))
            model.set_submodule(name, dense.train(layer.training))
        if self.fuses_experts:
            fuse_experts(model, original)
        for parameter in model.parameters():
            if parameter.dtype == before:  # some stay in float32 on purpose
                parameter.data = parameter.data.to(dtype)
        return model

    @property
    def origin(self) -> Path | None:
        """The directory that the files were read from."""
        return Path(self.files[0]).parent if self.files else None

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A layer is one operator in a compiled graph."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The buffers are the file's tensors."""
        return True
