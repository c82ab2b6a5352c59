"""Where the decoder blocks are, which linear layers they hold, and which of those read the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn

from ..core.hessian import Hessian
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


@dataclass
class Siblings:
    """Layers of one block that read the same tensor, in call order, and the Hessian they share."""

    names: list[str]
    hessian: Hessian
    _input: torch.Tensor | None = field(default=None, repr=False)

    def reads(self, x: torch.Tensor) -> bool:
        """Whether `x` is the very tensor that the first of these layers read."""
        mine = self._input
        return mine is not None and (mine.data_ptr(), mine.shape, mine.stride()) == (x.data_ptr(), x.shape, x.stride())


def observe(block: nn.Module, names: Iterable[str], run: Callable[[], Iterable[torch.Tensor | None]]) -> list[Siblings]:
    """Run the block over all calibration batches and collect one Hessian per set of siblings.

    `run()` yields once per batch, *before* it runs the block on it, with the batch's padding mask (bool
    [batch, length], or None). Siblings are found in the first batch in which a layer is called: inputs are compared
    by address, shape and stride while a reference keeps them alive. A layer that is never called has no siblings and
    does not appear in the result.
    """
    found: dict[str, Siblings] = {}
    sets: list[Siblings] = []
    mask: torch.Tensor | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def before_forward(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in found:
                match = next((s for s in sets if s.reads(x)), None)
                if match is None:
                    match = Siblings([], Hessian(x.shape[-1], x.device), x)
                    sets.append(match)
                match.names.append(name)
                found[name] = match
            mine = found[name]
            if mine.names[0] == name and x.numel():
                mine.hessian.update(x, mask if mask is not None and mask.shape == x.shape[:-1] else None)

        return before_forward

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for mask in run():  # noqa: B007  # the hooks read it
            for siblings in sets:
                siblings._input = None  # the batch that named them is over; its memory may be reused by another
    finally:
        for handle in handles:
            handle.remove()
        for siblings in sets:
            siblings._input = None
    return sets
