"""Quantize while a model is being loaded: block by block from its files, the result straight into the model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..calibration import ENOUGH
from ..checkpoint import Reader
from ..core.scheme import Scheme
from ..errors import UsageError
from ..ledger import OUTSIDE
from ..model.blocks import shape_of
from ..model.experts import Experts, Layout, fused_experts, take_apart
from ..nn import KEYS, QuantLinear
from ..pipeline import Run
from ..request import NONE, Request
from .adapters import leave_apart
from .source import open_files, skeleton
from .stored import Names

MIXTRAL = ("w1", "w3", "w2")  # gate, up, down in the files of Mixtral and its heirs


class Memory:
    """A store.Store that keeps the packed layers, and nothing else."""

    def __init__(self) -> None:
        self.finished: dict[str, Any] = {OUTSIDE: None}
        self.scratch = None
        self.layers: dict[str, dict[str, torch.Tensor]] = {}  # by name in the model

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None:
        """Keep what is packed of one block."""
        for name, tensor in tensors.items():
            layer, _, key = name.rpartition(".")
            if f"{layer}.qweight" in tensors and key in KEYS:
                # Siblings share one group index; transformers refuses to save tensors that share memory.
                self.layers.setdefault(layer, {})[key] = tensor.clone() if key == "g_idx" else tensor

    def read_part(self, part: str) -> dict[str, torch.Tensor]:
        """Never called: a run that finds nothing finished replays nothing."""
        raise KeyError(part)


def quantize_files(model: nn.Module, files: list[str] | None, request: Request, tokenizer: Any) -> tuple[Run, Memory]:
    """Quantize the dense checkpoint in `files`, whose architecture is `model`'s; one block is in memory at a time.

    Raises UsageError if there are no files, or the model is no causal language model.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        seen = Path(files[0]).name if files else "a state_dict"
        raise UsageError(
            f"quantizing while loading reads safetensors files, and {seen} was given; convert it with transformers' "
            "save_pretrained first"
        )
    if model.get_output_embeddings() is None:
        raise UsageError(f"{type(model).__name__} has no head to predict tokens with; load it as a causal model")
    config = copy.copy(model.config)
    del config.quantization_config
    name = config.name_or_path
    if isinstance(tokenizer, str) or (tokenizer is None and request.calibration != NONE):
        tokenizer = _tokenizer(tokenizer or name)
    elif tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(f"tokenizer is a {type(tokenizer).__name__}; give a tokenizer, or the name of one")
    reader = Reader(Path(files[0]).parent, map(Path, files))
    source = open_files(reader, config, type(model), name, tokenizer)
    source.packed_name = lambda layer: layer
    return quantize_in_memory(request.run(source))


def quantize_in_memory(run: Run) -> tuple[Run, Memory]:
    """Carry out `run`; its packed layers are in the Memory. Warns of what is wrong with its data or its result."""
    memory = Memory()
    bar = logging.tqdm(total=len(run.walk.names), desc="Quantizing blocks")
    report = run.quantize(memory, lambda progress: bar.update())
    bar.close()
    little = run.calibration.note if run.calibration and run.calibration.windows.tokens < ENOUGH else ""
    for problem in filter(None, [little, *report.problems()]):
        warnings.warn(f"{report.source}: {problem}", UserWarning, stacklevel=2)
    return run, memory


def put_layers(model: nn.Module, schemes: dict[str, Scheme], version: str, dtype: torch.dtype) -> None:
    """Replace the named linear layers of `model` by QuantLinear without tensors, on the same device.

    Fused experts are taken apart where layers of theirs are named; what of them is not named stays fused.
    """
    layouts, apart = experts_with(model, schemes)
    take_apart(model, layouts, apart)
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        leave_apart()
        for module in experts.modules():
            module._is_hf_initialized = True  # what transformers would initialize there is gone
    for name, scheme in schemes.items():
        layer = model.get_submodule(name)
        outputs, inputs = shape_of(layer)
        with torch.device("meta"):
            packed = QuantLinear(inputs, outputs, scheme, version, layer.bias is not None, name, dtype)
        if layer.weight.device.type != "meta":
            packed.to_empty(device=layer.weight.device).bias = None if layer.bias is None else layer.bias.detach()
        packed._is_hf_initialized = True  # or transformers would give first values to a weight that is not there
        model.set_submodule(name, packed)


def tied(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Of these layers, those whose weight transformers ties to another's, and to which."""
    ties = getattr(model, "all_tied_weights_keys", {})
    found = {name: ties.get(f"{name}.weight", "").removesuffix(".weight") for name in layers}
    return {name: owner for name, owner in found.items() if owner}


def untie(model: nn.Module, owners: dict[str, str]) -> None:
    """Tell transformers that packed layers are not to be tied, nor missed: `share` does it once all is read."""
    for name in owners:
        del model.all_tied_weights_keys[f"{name}.weight"]
    missing = {rf"^{re.escape(name)}\.({'|'.join(KEYS)})$" for name in owners}
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *missing}


def share(model: nn.Module, owners: dict[str, str]) -> None:
    """Let packed layers whose weights were tied be one; saving the model writes it once."""
    for name, owner in owners.items():
        model.set_submodule(name, model.get_submodule(owner))
        model.all_tied_weights_keys.update({f"{name}.{key}": f"{owner}.{key}" for key in KEYS})


def experts_with(model: nn.Module, layers: Iterable[str]) -> tuple[dict[str, Layout], dict[str, list[int]]]:
    """The modules of fused experts to which layers of these names belong: their layouts, and the banks of each.

    The names decide what the projections are called: as the model's files call them, or as is usual.
    """
    found: dict[str, set[str]] = {}
    for name in layers:
        if match := re.fullmatch(r"(.+)\.\d+\.(\w+)", name):
            found.setdefault(match[1], set()).add(match[2])
    layouts, apart = {}, {}
    names = Names(model)
    for path, layout in fused_experts(model).items():
        leaves = found.get(path, set())
        for spelling in (names.expert_leaves(path), None, MIXTRAL):
            spelled = layout.renamed(spelling)
            banks = [number for number, bank in enumerate(spelled.banks) if leaves and leaves.issuperset(bank)]
            if banks:
                layouts[path], apart[path] = spelled, banks
                break
    return layouts, apart


def fuse_experts(model: nn.Module, original: nn.Module | None = None) -> None:
    """Put dense experts together again, as the model's own class has them; `original` is a skeleton of it."""
    apart = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    if apart and original is None:
        original = skeleton(type(model), copy.deepcopy(model.config))
    for path, experts in apart:
        model.set_submodule(path, experts.fused(original.get_submodule(path), experts.get_parameter))


def fill(model: nn.Module, layers: dict[str, dict[str, torch.Tensor]]) -> None:
    """Give each named QuantLinear its packed tensors, on the device where its buffers are, if they are on one."""
    for name, tensors in layers.items():
        layer = model.get_submodule(name)
        for key, tensor in tensors.items():
            place = getattr(layer, key).device
            setattr(layer, key, tensor if place.type == "meta" else tensor.to(place))


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"calibration needs a tokenizer; give GPTQConfig one, {name!r} has none ({reason})") from None
