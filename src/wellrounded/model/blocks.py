"""Where the decoder blocks are, and which linear layers they hold."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import torch
from torch import nn

from ..errors import UsageError


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks: the members of the ModuleList (or Sequential of like modules) that holds most parameters.

    Lists inside a block (experts, say) and lists of bare linear layers do not count. Where a model says which part of
    it reads text (`get_decoder`), the list is looked for there; and a list that lies less deep wins over one of at most
    four times its size, which is what reads images or sound. Raises UsageError if the model has no list of blocks.
    """
    prefix = _text_part(model)
    found = _lists(model.get_submodule(prefix), f"{prefix}." if prefix else "") or _lists(model, "")
    if not found:
        raise UsageError(
            f"{type(model).__name__} holds no list of blocks: no torch.nn.ModuleList, or Sequential of like modules, "
            "whose members hold linear layers; wellrounded quantizes block by block, so put its layers into one"
        )
    largest = max(size for size, _ in found)
    chosen = min((name.count("."), -size, name) for size, name in found if 4 * size >= largest)[2]
    return [f"{chosen}.{i}" for i in range(len(model.get_submodule(chosen)))]  # type: ignore[arg-type]


def output_head(model: nn.Module) -> str:
    """The name of the layer that turns hidden states into logits, as the model says, or by its shape; "" if none."""
    said = getattr(model, "get_output_embeddings", lambda: None)()
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for name, module in model.named_modules():
        if module is said or (said is None and is_linear(module) and shape_of(module)[0] == vocabulary):
            return name
    return ""


def towers(model: nn.Module) -> set[str]:
    """Names of the modules beside the part that reads text: they serve pictures or sound.

    What an encoder-decoder model reads with its encoder is text: it has none.
    """
    text = _text_part(model)
    if not text or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    found = idle_parts(model, [name for name, _ in model.get_submodule(text).named_modules(prefix=text)])
    parts = text.split(".")
    for depth in range(len(parts)) if len(parts) > 1 else ():  # "model.language_model": whatever lies beside it
        outer = ".".join(parts[:depth])
        beside = {f"{outer}.{name}".lstrip(".") for name, _ in model.get_submodule(outer).named_children()}
        found |= beside - {".".join(parts[: depth + 1]), output_head(model)}
    return found


def idle_parts(model: nn.Module, ran: Collection[str]) -> set[str]:
    """The parts with other blocks of their own of which no module `ran` when the model read text."""
    blocks, found = find_blocks(model)[0].rpartition(".")[0], set()
    for _, name in _lists(model, ""):
        parts = name.split(".")
        paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
        apart = [path for path in paths if not f"{blocks}.".startswith(f"{path}.")]
        idle = (path for path in apart if not any(f"{one}.".startswith(f"{path}.") for one in ran))
        found |= set(list(idle)[:1])
    return found


def _text_part(model: nn.Module) -> str:
    """The name of the part that reads text, where the model says which it is; "" is the whole."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    return next((name for name, module in model.named_modules() if module is decoder), "") if decoder else ""


def _lists(module: nn.Module, prefix: str) -> list[tuple[int, str]]:
    """Outermost lists of modules that hold linear layers, below `module`: (parameters, name)."""
    found: list[tuple[int, str]] = []
    for name, child in module.named_children():
        like = isinstance(child, nn.Sequential) and len(child) > 1 and len({type(one) for one in child}) == 1
        if isinstance(child, nn.ModuleList) or like:
            if any(linears(one) and not is_linear(one) for one in child):
                found.append((sum(p.numel() for p in child.parameters()), f"{prefix}{name}"))
        else:
            found += _lists(child, f"{prefix}{name}.")
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T + b, with its weight as [out, in] or, in a Conv1D, as [in, out]."""
    return (isinstance(module, nn.Linear) and _computes_linear(type(module))) or _is_transposed(module)


@cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether this kind of nn.Linear still multiplies and adds, and nothing else: asked of a small one of its kind."""
    if kind.forward is nn.Linear.forward:
        return True
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    small.in_features, small.out_features = 2, 3
    small.weight, small.bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
    x = torch.randn(4, 2)
    try:
        y = small(x)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False  # it needs more than a weight and a bias
    return isinstance(y, torch.Tensor) and torch.allclose(y, nn.functional.linear(x, small.weight, small.bias))


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by their name inside it."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    rows, columns = layer.weight.shape
    return (columns, rows) if _is_transposed(layer) else (rows, columns)


def oriented(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """[out, in] from the layer's own orientation, or back: its own inverse."""
    return weight.T if _is_transposed(layer) else weight


def _is_transposed(module: nn.Module) -> bool:
    # GPT-2's Conv1D, recognized by shape and name so that transformers need not be imported.
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
