"""Which linear layer inside the blocks gets which scheme, decided and said before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .core.recipe import Recipe
from .core.scheme import Scheme
from .errors import UsageError
from .formats.readers import objections
from .model import blocks as layers_of

ASKED = "ignored on request"


@dataclass(frozen=True)
class Plan:
    """What a recipe means for one model.

    schemes  by full layer name, for every layer that will be quantized
    kept     by full name, why a linear layer or a matrix inside the blocks stays dense
    inputs   by full layer name, the number of inputs
    overlooked  fraction of the blocks' parameters that stay dense although nobody asked for it
    """

    schemes: dict[str, Scheme]
    kept: dict[str, str]
    inputs: dict[str, int]
    overlooked: float

    def notes(self) -> list[str]:
        """Who will not load the result, as sentences."""
        return objections(self.schemes, self.inputs, self.kept)


def make_plan(model: nn.Module, blocks: list[str], recipe: Recipe) -> Plan:
    """Ask the recipe about every layer of the named blocks. Raises UsageError if not a single one can be quantized."""
    schemes: dict[str, Scheme] = {}
    kept: dict[str, str] = {}
    inputs: dict[str, int] = {}
    total = covered = 0
    for block in blocks:
        module = model.get_submodule(block)
        weights = {f"{block}.{name}": layer for name, layer in layers_of.linears(module).items()}
        for name, layer in weights.items():
            scheme = recipe.scheme_of(name)
            outputs, inputs[name] = layers_of.shape_of(layer)
            reason = ASKED if scheme is None else scheme.refuses(inputs[name], outputs)
            if reason:
                kept[name] = reason
            elif scheme is not None:
                schemes[name] = scheme
        for path, parameter in module.named_parameters():
            name, _, leaf = f"{block}.{path}".rpartition(".")
            fused = name not in weights and parameter.ndim == 3  # experts, and small convolutions
            if fused:
                kept[f"{name}.{leaf}"] = "a three-dimensional weight, not a linear layer"
            asked = kept.get(name) == ASKED or recipe.scheme_of(f"{name}.{leaf}") is None
            total += parameter.numel()
            covered += parameter.numel() if name in schemes or asked or parameter.ndim < 2 else 0
    if not schemes:
        first = next(iter(kept.items()), (blocks[0], "it holds no linear layer"))
        count, (name, reason) = len(inputs), first
        raise UsageError(f"nothing to quantize: all {count} linear layers stay dense, first {name}: {reason}")
    return Plan(schemes, kept, inputs, 1 - covered / max(total, 1))
