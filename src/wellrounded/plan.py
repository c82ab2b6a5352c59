"""Which linear layer gets which scheme, and why every other weight stays dense: decided and said before any work."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from .core.recipe import Recipe, role_of
from .core.scheme import Scheme
from .errors import UsageError
from .formats.readers import objections
from .model import blocks as layers_of
from .model.experts import Experts

ASKED = "ignored on request"
ROUTER = "chooses the experts"
OUTSIDE = "outside the blocks"
UNUSED = "no calibration token reached it"
ROUTERS = r"(gate|router|classifier|shared_expert_gate|.*_router)"  # beside experts, whatever their kind


@dataclass(frozen=True)
class Plan:
    """What a recipe means for one model.

    schemes  by full layer name, for every layer that will be quantized
    kept     by full name, why a linear layer or a matrix inside the blocks stays dense
    inputs   by full layer name, the number of inputs
    overlooked  what stays dense although nobody asked for it: its fraction of the model's parameters, weights that
             have the same place in several blocks (or experts) taken together, their numbers written as *
    head     the output head's name if it is quantized too
    """

    schemes: dict[str, Scheme]
    kept: dict[str, str]
    inputs: dict[str, int]
    overlooked: dict[str, float]
    head: str = ""

    def keep(self, name: str, reason: str, share: float) -> None:
        """Let a layer stay dense after all; `share` is its fraction of the model's parameters."""
        del self.schemes[name]
        self.kept[name] = reason
        role = role_of(f"{name}.weight")
        self.overlooked[role] = self.overlooked.get(role, 0.0) + share

    def excuse(self, parts: Collection[str]) -> None:
        """Parts that text does not reach are not overlooked: they serve pictures or sound."""
        for names in (self.overlooked, self.kept):
            for name in [name for name in names if any(name.startswith(f"{role_of(part)}.") for part in parts)]:
                del names[name]

    def notes(self) -> list[str]:
        """Who will not load the result, as sentences."""
        return objections(self.schemes, self.inputs, self.kept)


def make_plan(model: nn.Module, blocks: list[str], recipe: Recipe, lm_head: bool = False) -> Plan:
    """Ask the recipe about every layer of the named blocks, and with `lm_head` about the output head.

    Raises UsageError if not a single one can be quantized, if the head cannot, or if experts of a layer would get
    different schemes.
    """
    schemes: dict[str, Scheme] = {}
    kept: dict[str, str] = {}
    inputs: dict[str, int] = {}
    for block in blocks:
        module = model.get_submodule(block)
        routers = {f"{block}.{name}" for name in _routers(module)}
        kept |= dict.fromkeys(routers, ROUTER)
        for path, layer in layers_of.linears(module).items():
            name = f"{block}.{path}"
            scheme = recipe.scheme_of(name)
            outputs, inputs[name] = layers_of.shape_of(layer)
            router = any(name == r or name.startswith(f"{r}.") for r in routers)
            reason = ASKED if scheme is None else ROUTER if router else scheme.refuses(inputs[name], outputs)
            if reason:
                kept[name] = reason
            elif scheme is not None:
                schemes[name] = scheme
        _refuse_unequal_experts(module, block, recipe)
    head = _head(model, recipe, schemes, inputs) if lm_head else ""
    if not schemes:
        first = next(iter(kept.items()), (blocks[0], "it holds no linear layer"))
        count, (name, reason) = len(inputs), first
        raise UsageError(f"nothing to quantize: all {count} linear layers stay dense, first {name}: {reason}")
    return Plan(schemes, kept, inputs, _overlooked(model, blocks, recipe, schemes, kept), head)


def _head(model: nn.Module, recipe: Recipe, schemes: dict[str, Scheme], inputs: dict[str, int]) -> str:
    """The name of the output head, planned."""
    name = layers_of.output_head(model)
    if not name or not layers_of.is_linear(model.get_submodule(name)):
        raise UsageError(f"the output head was asked for, but {type(model).__name__} has none that is a linear layer")
    outputs, inputs[name] = layers_of.shape_of(model.get_submodule(name))
    scheme = recipe.scheme_of(name)
    if scheme is None:
        raise UsageError(f"the output head was asked for, and {name} is ignored on request; leave one of them out")
    if reason := scheme.refuses(inputs[name], outputs):
        raise UsageError(f"the output head was asked for, but {name} cannot be packed: {reason}")
    schemes[name] = scheme
    return name


def _routers(block: nn.Module) -> Iterator[str]:
    """Modules that choose among experts: by their name, beside the experts, be these fused or a list."""
    for path, module in block.named_modules():
        if isinstance(module, Experts) or (isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts"):
            parent = path.rpartition(".")[0]
            for name, _ in block.get_submodule(parent).named_children():
                if re.fullmatch(ROUTERS, name):
                    yield f"{parent}.{name}" if parent else name


def _refuse_unequal_experts(module: nn.Module, block: str, recipe: Recipe) -> None:
    """Engines hold the experts of a layer in one tensor, and so do we once they are fused again."""
    for path, experts in module.named_modules():
        for bank in range(len(experts.layout.banks)) if isinstance(experts, Experts) else ():
            names = [f"{block}.{path}.{name}" for one in experts.names(bank) for name in one]
            found = {recipe.scheme_of(name): name for name in names}
            if len(found) > 1:
                (one, first), (other, second) = list(found.items())[:2]
                raise UsageError(
                    f"{first} would be {one or 'dense'} and {second} {other or 'dense'}; all experts of a layer have "
                    f"one scheme, so let the pattern match them all, such as '{path.rpartition('.')[2]}'"
                )


def _overlooked(
    model: nn.Module, blocks: list[str], recipe: Recipe, schemes: dict[str, Scheme], kept: dict[str, str]
) -> dict[str, float]:
    inside = tuple(f"{block}." for block in blocks)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    if head := layers_of.output_head(model):
        tables |= {id(parameter) for parameter in model.get_submodule(head).parameters()}
    towers = layers_of.towers(model)
    total = sum(p.numel() for p in model.parameters())
    found: dict[str, float] = {}
    for path, parameter in model.named_parameters():
        name, _, leaf = path.rpartition(".")
        above = [name, *(name[: m.start()] for m in re.finditer(r"\.", name))]
        flat = sum(size > 1 for size in parameter.shape) < 2 or _depthwise(model.get_submodule(name))
        if flat or name in schemes or id(parameter) in tables or (towers and towers & {*above, ""}):
            continue
        if {ASKED, ROUTER} & {kept.get(layer) for layer in above} or not all(map(recipe.scheme_of, (name, path))):
            continue
        if name not in kept:
            what = f"a {parameter.ndim}-dimensional parameter, not a linear layer"
            kept[name if leaf == "weight" else path] = what if path.startswith(inside) else OUTSIDE
        role = role_of(path)
        found[role] = found.get(role, 0.0) + parameter.numel() / max(total, 1)
    return found


def _depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution with a few numbers per channel."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels
