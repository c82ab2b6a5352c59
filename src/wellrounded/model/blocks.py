"""Where the decoder blocks are, and which linear layers they hold."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from ..errors import UsageError


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the decoder blocks: the members of the ModuleList that holds the most parameters.

    Lists inside a block (experts, say) do not count. Raises UsageError if the model has no ModuleList at all.
    """
    best: tuple[int, list[str]] = (0, [])

    def visit(module: nn.Module, prefix: str) -> None:
        nonlocal best
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child):
                size = sum(p.numel() for p in child.parameters())
                if size > best[0]:
                    best = (size, [f"{prefix}{name}.{i}" for i in range(len(child))])
            else:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    if not best[1]:
        raise UsageError(f"{type(model).__name__} holds no list of blocks; wellrounded quantizes block by block")
    return best[1]


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
