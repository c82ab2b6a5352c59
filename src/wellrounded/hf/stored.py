"""A checkpoint's tensors and the model's: two sets of names, and what transformers does between them.

Most tensors are only renamed. Some are made of several (experts stacked into one parameter) or several of one; those
are made here when they are read, one at a time, by transformers' own conversions.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

from ..checkpoint import Source
from ..errors import CheckpointError
from ..model.experts import Experts, Layout, fused_experts, take_apart

BLOCK = re.compile(r".*?\.\d+(?=\.)")  # of a tensor's name: what stands for its block


class Names:
    """From names in files to names in a model, and back, as transformers renames them."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model) or []
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        back = [c.reverse_transform() for c in conversions[::-1] if isinstance(c, WeightRenaming)]
        self._back = back
        self._model = model
        self._gaps: dict[str, int] = {}  # of a module's name: how many of its parts the model lacks
        self.prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""

    def in_model(self, stored: str, known: Any) -> str | None:
        """The name among `known` of a tensor that is only renamed, None if it is converted too, or not known."""
        for name in (self._renamed(stored), stored):
            for candidate in self._spellings(name):
                if candidate in known:
                    return candidate
        return None

    def _renamed(self, name: str, renamings: list[Any] | None = None) -> str:
        for renaming in self.renamings if renamings is None else renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def _converter_of(self, name: str) -> tuple[str, str | None]:
        """What the first conversion for this tensor makes of its name, and the pattern by which it knows it."""
        found = (converter.rename_source_key(name) for converter in self.converters)
        return next(((made, pattern) for made, pattern in found if pattern is not None), (name, None))

    def _spellings(self, name: str) -> tuple[str, str, str]:
        return name, name.removeprefix(self.prefix), self.prefix + name

    def nearest(self, stored: str) -> str:
        """The name in the model of a tensor that it does not have yet: the one of whose path the most is there.

        A packed tensor's layer may still be a part of fused experts.
        """
        renamed = self._renamed(stored)
        return min((*self._spellings(renamed), *self._spellings(stored)), key=self._missing)

    def _missing(self, name: str) -> int:
        owner = name.rpartition(".")[0]
        if owner not in self._gaps:
            module, gaps = self._model, 0
            for part in owner.split("."):
                module = module._modules.get(part) if module is not None else None
                gaps += module is None
            self._gaps[owner] = gaps
        return self._gaps[owner]

    def converted(self, stored: str, known: Any) -> tuple[str, str] | None:
        """The first of the tensors among `known` that this one is made into, and the pattern that says how."""
        name, pattern = self._converter_of(self._renamed(stored))
        if pattern is None:
            return None
        for candidate in self._spellings(name):
            if candidate in known:
                return candidate, pattern
        return None

    def targets(self, first: str, pattern: str, known: Any) -> list[str]:
        """All tensors among `known` that a conversion makes whose first is `first`."""
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        patterns = [target.replace("\\", "") for target in converter.target_patterns]
        here = next((p for p in patterns if p in first), patterns[0])
        return [name for name in dict.fromkeys(first.replace(here, p, 1) for p in patterns) if name in known]

    def for_packed(self, layer: str, candidates: Iterable[str] = ()) -> str:
        """What a packed layer is called in files: the first of the candidates, or another name, that leads back to it.

        Raises CheckpointError if transformers would load a tensor of that layer under no name.
        """
        probe = f"{layer}.qweight"
        back = self._renamed(probe, self._back).removesuffix(".qweight")
        for name in (*candidates, back, layer):
            renamed = self._renamed(f"{name}.qweight")
            converted = self._converter_of(renamed)[1] is not None
            if not converted and self.in_model(f"{name}.qweight", {probe}) == probe:
                return name
        raise CheckpointError(f"{layer}: no name in a file would be read as this layer; ignore it")

    def expert_leaves(self, fused: str) -> tuple[str, ...] | None:
        """What files call the projections of the experts in module `fused`: (gate,) up, down; None if they are fused.

        Only where experts are stacked as they are does one of them equal its own tensor in the file.
        """
        found: dict[str, list[str]] = {}
        for converter in self.converters:
            kinds = {type(operation).__name__ for operation in converter.operations}
            target = converter.target_patterns[0].replace("\\", "").rpartition(".")
            belongs = f".{fused}".endswith(f".{target[0].strip('.')}") and len(converter.target_patterns) == 1
            if belongs and "MergeModulelist" in kinds and kinds <= {"MergeModulelist", "Concatenate"}:
                parts = [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in converter.source_patterns]
                found[target[2]] = parts
        first = found.get("gate_up_proj") or found.get("up_proj")
        return (*first, *found["down_proj"]) if first and "down_proj" in found else None


def experts_of(model: transformers.PreTrainedModel, names: Names) -> dict[str, Layout]:
    """The model's modules of fused experts, each with its projections named as in the files."""
    return {path: layout.renamed(names.expert_leaves(path)) for path, layout in fused_experts(model).items()}


@dataclass
class _Conversion:
    """One conversion: the stored tensors by pattern, and the first of the tensors that they are made into."""

    converter: WeightConverter
    first: str
    keys: list[tuple[str, str]] = field(default_factory=list)  # (pattern, stored name)


class Stored:
    """Reads a model's tensors, by their names in the model, from tensors that have other names or shapes.

    `model` is on the meta device; its fused experts are taken apart here. `keys` are the stored tensors' names, `read`
    delivers one of them.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, keys: Iterable[str], read: Callable[[str], torch.Tensor]
    ) -> None:
        self.model, self.read_stored, self.names = model, read, Names(model)
        fused = model.state_dict(keep_vars=True)
        take_apart(model, experts_of(model, self.names))
        apart = model.state_dict(keep_vars=True)
        self.made: dict[str, list[str]] = {}  # stored name -> the model's tensors that are made of it
        self._direct: dict[str, str] = {}  # the model's tensor, fused ones included -> stored name
        self._conversions: dict[str, _Conversion] = {}  # the model's tensor, fused ones included -> how it is made
        self._pieces = dict(_pieces(model))
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()  # of what is held: a block may be read while another is computed with
        whole: dict[str, list[str]] = {}
        for name, (origin, _) in self._pieces.items():
            whole.setdefault(origin, []).append(name)
        known = {*apart, *fused}
        for key in sorted(keys, key=dot_natural_key):
            self.made[key] = []
            name = self.names.in_model(key, known)
            if name is not None:
                self._direct[name] = key
                self.made[key] = [name] if name in apart else whole.get(name, [])
                continue
            found = self.names.converted(key, fused)
            if found is None:
                continue
            first, pattern = found
            if first not in self._conversions:
                owner = next(c for c in self.names.converters if pattern in c.source_patterns)
                conversion = _Conversion(deepcopy(owner), first)
                self._conversions |= dict.fromkeys(self.names.targets(first, pattern, fused), conversion)
            self._conversions[first].keys.append((pattern, key))
        for name, conversion in self._conversions.items():
            for _, key in conversion.keys:
                self.made[key] += [name] if name in apart else whole.get(name, [])
        here = {id(apart[name]): name for names in self.made.values() for name in names}
        self._tied = {name: here[id(tensor)] for name, tensor in apart.items() if id(tensor) in here}

    def source(self, **about: Any) -> Source:
        """These tensors as a Source; `about` is what else it wants to know."""
        return Source(
            model=self.model,
            read=self.read,
            made=self.made,
            read_stored=self.read_stored,
            packed_name=self.packed_name,
            **about,
        )

    def missing(self) -> list[str]:
        """Parameters of the model that no stored tensor is for, nor one that they are tied to."""
        parameters = {
            n: t for n, t in self.model.state_dict(keep_vars=True).items() if isinstance(t, torch.nn.Parameter)
        }
        made = {name for names in self.made.values() for name in names}
        held = {id(parameters[name]) for name in made & parameters.keys()}
        return sorted(name for name, parameter in parameters.items() if id(parameter) not in held)

    def read(self, name: str) -> torch.Tensor | None:
        """The model's tensor of this name, None if there is none."""
        if name not in self._direct and name not in self._pieces and name not in self._conversions:
            name = self._tied.get(name, name)
        if name in self._direct:
            return self.read_stored(self._direct[name])
        if name in self._pieces:
            origin, cut = self._pieces[name]
            whole = self._whole(origin)
            return None if whole is None else cut(whole)
        return self._whole(name)

    def _whole(self, name: str) -> torch.Tensor | None:
        with self._lock:
            return self._found(name)

    def _found(self, name: str) -> torch.Tensor | None:
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        self._forget(_block(name))
        if name in self._direct:
            made = {name: self.read_stored(self._direct[name])}
        elif name in self._conversions:
            made = self._convert(self._conversions[name])
        else:
            return None
        self._held |= made
        return made.get(name)

    def _forget(self, block: str) -> None:
        """Keep fused experts of this block only, whose parts are read in turn; of two where one is read ahead."""
        blocks = dict.fromkeys([block, *map(_block, reversed(self._held))])
        kept = [*blocks][: 2 if torch.cuda.is_available() else 1]
        for name in [name for name in self._held if _block(name) not in kept]:
            del self._held[name]

    def _convert(self, conversion: _Conversion) -> dict[str, torch.Tensor]:
        converter = deepcopy(conversion.converter)
        for pattern, key in conversion.keys:
            converter.add_tensor(conversion.first, key, pattern, lambda key=key: self.read_stored(key))
        found = converter.convert(conversion.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def packed_name(self, layer: str) -> str:
        """What the tensors of a layer of the model are called in a file, without their endings, once it is packed."""
        key = self._direct.get(f"{layer}.weight", "")
        return self.names.for_packed(layer, [key.removesuffix(".weight")] if key.endswith(".weight") else [])


def _block(name: str) -> str:
    found = BLOCK.match(name)
    return found[0] if found else ""


def _pieces(model: torch.nn.Module) -> Iterable[tuple[str, tuple[str, Callable]]]:
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for name in module.state_dict(keep_vars=True):
                origin = module.origin(name)
                if origin is not None:
                    yield f"{path}.{name}", (f"{path}.{origin[0]}", origin[1])
