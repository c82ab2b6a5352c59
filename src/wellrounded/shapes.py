"""What a block's layers look like from outside: who reads how much, and what is alive together, by shapes and names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from .model import blocks as layers_of
from .model.experts import Experts
from .plan import Plan


@dataclass(frozen=True)
class Siblings:
    """Layers with the same inputs, as far as shapes tell; `share` of the tokens reach each of the `experts`."""

    inputs: int
    outputs: int
    weights: tuple[int, ...]
    experts: int = 1
    share: float = 1.0

    @property
    def width(self) -> float:
        """Elements per token that these layers read."""
        return self.inputs * self.share * self.experts


@dataclass(frozen=True)
class Block:
    """One block: bytes in memory, sets of siblings to be solved, and widths in elements per token.

    working  alive while a batch runs through it, besides its hidden state;  waiting  while it waits in it
    active   weights that one token meets;  graph  alive while a slope is followed back through it
    keys     what it keeps of a token for those that follow, about
    """

    bytes: int
    sets: tuple[Siblings, ...]
    working: int
    waiting: int
    active: int
    graph: int
    keys: int


def block_of(name: str, block: nn.Module, plan: Plan, hidden: int, model: nn.Module) -> Block:
    """Its layers by the module they are in: what they read and write is alive together."""
    banks = {path: module for path, module in block.named_modules() if isinstance(module, Experts)}
    parents: dict[str, list[Siblings]] = {}
    planned: list[Siblings] = []
    for path, layer in layers_of.linears(block).items():
        outputs, inputs = layers_of.shape_of(layer)
        owner = next((bank for bank in banks if path.startswith(f"{bank}.")), None)
        experts = banks[owner].count if owner else 1
        if owner and not path.startswith(f"{owner}.0."):
            continue  # the experts are alike
        share = min(1.0, _chosen(model, experts) / experts)
        parent = owner or path.rpartition(".")[0]
        mine = parents.setdefault(parent, [])
        # An attention's last layer is as wide as its first ones, but reads something else.
        reads_another = "att" in parent.lower() and len(mine) == 1 and len(mine[0].weights) >= 3
        like = [] if reads_another else [n for n, one in enumerate(mine) if one.inputs == inputs]
        if like:
            old = mine[like[0]]
            mine[like[0]] = replace(old, outputs=old.outputs + outputs, weights=(*old.weights, outputs))
        else:
            mine.append(Siblings(inputs, outputs, (outputs,), experts, share))
        if f"{name}.{path}" in plan.schemes:
            planned.append(Siblings(inputs, 0, (), experts))
    working = max((_alive(mine) + 2 * mine[-1].width for mine in parents.values()), default=0)
    waiting = max((_waiting(parent, mine) for parent, mine in parents.items()), default=0)
    active = sum(s.inputs * s.outputs * s.share * s.experts for mine in parents.values() for s in mine)
    widths = {one.inputs for one in planned}
    sets = tuple(one for mine in parents.values() for one in mine if one.inputs in widths)
    graph = sum(2 * _alive(mine) + sum(one.width for one in mine) for mine in parents.values())
    return Block(
        bytes_of(block),
        sets,
        int(working) + 3 * hidden,
        int(waiting) + 2 * hidden,
        int(active),
        int(graph) + 12 * hidden,
        max(map(_keys, parents.items()), default=0),
    )


def _alive(mine: list[Siblings]) -> float:
    return sum(one.outputs * one.share * one.experts for one in mine)


def _waiting(parent: str, mine: list[Siblings]) -> float:
    """An attention keeps what its first layers wrote while the last one is solved, an MLP only the product."""
    first = sum(one.outputs for one in mine[:1]) if "att" in parent.lower() else 0
    return first + mine[-1].width


def _keys(parent: tuple[str, list[Siblings]]) -> int:
    """What an attention's first layers write beside its queries."""
    name, mine = parent
    return sum(mine[0].weights[1:]) if "att" in name.lower() else 0


def _chosen(model: nn.Module, experts: int) -> int:
    """To how many of its experts a token goes."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"):
        if isinstance(value := getattr(text, name, None), int):
            return min(value, experts)
    return experts


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
