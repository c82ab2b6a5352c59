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

DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def headers(files: list[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every tensor in safetensors files."""
    found = {}
    for file in files:
        for name, entry in read_header(Path(file))[0].items():
            found[name] = (tuple(entry["shape"]), DTYPES.get(entry["dtype"]))
    return found


def packed_layers(model: nn.Module, recipe: Recipe, stored: dict, prefix: str) -> dict[str, Any]:
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
