"""Which linear layers a checkpoint's files hold packed, read from the files' headers before any tensor is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import read_header
from ..core.recipe import Recipe
from ..errors import CheckpointError
from ..formats import gptq as gptq_format
from ..model.blocks import find_blocks, is_linear, shape_of
from ..model.experts import fused_experts, take_apart
from .on_the_fly import experts_with
from .stored import Names

DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def headers(model: nn.Module, files: list[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every tensor in safetensors files by its name in `model`; of one that is converted, just that.

    Packed tensors have the names that they will have once their layers are packed.
    """
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    names, known = Names(model), model.state_dict().keys()
    for file in files:
        for stored, entry in read_header(Path(file))[0].items():
            shape = (tuple(entry["shape"]), DTYPES.get(entry["dtype"]))
            conversion = names.converted(stored, known)
            made = (
                names.targets(*conversion, known)
                if conversion
                else [names.in_model(stored, known) or names.nearest(stored)]
            )
            found |= dict.fromkeys(made, shape)
    return found


def packed_layers(model: nn.Module, recipe: Recipe, stored: dict) -> dict[str, Any]:
    """Each linear layer that the files hold packed, with its scheme, its tensors' shapes checked.

    `stored` is what the files hold, by name in the model. Fused experts that the files hold packed are taken apart in
    `model`. Raises CheckpointError for a layer that is neither packed nor dense in the files, for tensors of the wrong
    shape, and for packed tensors that no layer of the model would take.
    """
    packed = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    layouts, apart = experts_with(model, packed)
    take_apart(model, layouts, apart)
    blocks = tuple(f"{name}." for name in find_blocks(model))
    ties = getattr(model, "all_tied_weights_keys", {})
    planned: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        owner = ties.get(f"{name}.weight", name).removesuffix(".weight")
        scheme = recipe.scheme_of(owner)
        if f"{owner}.qweight" in stored and scheme is not None:
            planned[name] = scheme
            _check_shapes(owner, module, scheme, stored)
        elif f"{owner}.weight" not in stored and name.startswith(blocks):
            raise CheckpointError(
                f"{name}.qweight is missing, and so is a dense {name}.weight; fetch the checkpoint again"
            )
    for path in [*fused_experts(model), *layouts]:
        for name in (f"{path}.{own}" for own, _ in model.get_submodule(path).named_parameters()):
            if name.rpartition(".")[0] not in planned and name not in stored:
                raise CheckpointError(f"{name} is missing, packed and dense; fetch the checkpoint again")
    stray = [name for name in packed if name not in planned]
    if stray:
        raise CheckpointError(
            f"{stray[0]}.qweight and {len(stray) - 1} more packed weights belong to no linear layer of "
            f"{type(model).__name__}; this version of wellrounded cannot load this checkpoint"
        )
    return planned


def _check_shapes(name: str, layer: nn.Module, scheme: Any, stored: dict) -> None:
    outputs, inputs = shape_of(layer)
    for key, (shape, dtype) in gptq_format.layout(scheme, inputs, outputs).items():
        tensor = f"{name}.{key}"
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
