"""Fused experts taken apart into linear layers, one per expert and projection, and put together again.

transformers keeps the experts of a layer in three-dimensional parameters. Here every expert has linear layers of its
own, under the names that checkpoints on disk give them ("experts.3.gate_proj"), so that each can be packed. They
compute the same: routed tokens are sorted by expert, and all experts' first projections come before any second one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

KINDS = ("weight", "bias")
ROW_STEP = 16
GATED, PLAIN = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")


@dataclass(frozen=True)
class Piece:
    """Where one projection of expert e lies: a part of the outputs of `parameter[e]`.

    parameter   path inside the experts' module, of a tensor [experts, outputs, inputs] or [experts * outputs, inputs]
    transposed  whether it holds [inputs, outputs] instead
    part, parts which of how many equal parts of the outputs, side by side or, if `interleaved`, every so many
    """

    parameter: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    interleaved: bool = False

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This piece's share of [outputs, ...] of one expert, a view."""
        return whole[self.part :: self.parts] if self.interleaved else whole.chunk(self.parts)[self.part]

    def weight(self, fused: torch.Tensor, expert: int, experts: int) -> torch.Tensor:
        """[outputs, inputs] of one expert, a view of `fused`."""
        whole = fused.unflatten(0, (experts, -1))[expert] if fused.ndim == 2 else fused[expert]
        return self.rows(whole.T if self.transposed else whole)


@dataclass(frozen=True)
class Layout:
    """How a module holds its experts: each projection's piece, and the banks, projections that read the same input.

    call  "routed" (hidden [tokens, size], index [tokens, k], weights [tokens, k]), as transformers calls experts;
          "all" (hidden [experts * tokens, size]): every expert reads all tokens, those not meant for it being zero;
          "sorted" (hidden [tokens, size], how many for each expert)
          "shared" (hidden [..., size], weights [..., experts]): every expert reads every token
    """

    pieces: dict[str, Piece]
    banks: tuple[tuple[str, ...], ...]
    call: str = "routed"
    gated: bool = True

    def renamed(self, names: tuple[str, ...] | None) -> Layout:
        """The same with these names for the projections, in the order (gate,) up, down; None changes nothing."""
        if names is None or len(names) != len(self.pieces):
            return self
        new = dict(zip(self.pieces, names))
        banks = tuple(tuple(new[leaf] for leaf in bank) for bank in self.banks)
        return Layout({new[leaf]: piece for leaf, piece in self.pieces.items()}, banks, self.call, self.gated)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of fused experts, None if that is not what the module is.

    Most classes state theirs (transformers' `use_experts_implementation`); the few others are known by their shape.
    """
    own = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    if {first, "down_proj"} <= own.keys() and own["down_proj"].ndim == 3 and "gate_proj" not in own:
        gated, count = first == "gate_up_proj", _arguments(module)
        call = "all" if count == 1 else "routed"
        transposed = getattr(module, "is_transposed", call == "all")
        interleaved = not getattr(module, "is_concatenated", True)
        down = Piece("down_proj", transposed)
        if not gated:
            return Layout({"up_proj": Piece(first, transposed), "down_proj": down}, (PLAIN[:1], PLAIN[1:]), call, False)
        gate, up = (Piece(first, transposed, part, 2, interleaved) for part in (0, 1))
        return Layout(dict(zip(GATED, (gate, up, down))), (GATED[:2], GATED[2:]), call)
    if own.keys() == set(GATED) and own["down_proj"].ndim == 3 and _arguments(module) == 2:  # Inkling
        return Layout({leaf: Piece(leaf) for leaf in GATED}, (GATED[:2], GATED[2:]), "shared")
    alone = own.keys() == {"weight"} and own["weight"].ndim == 3 and hasattr(module, "num_experts")
    if alone and _arguments(module) == 2:  # JetMoE
        return Layout({"proj": Piece("weight")}, (("proj",),), "sorted", False)
    inner = dict(module.named_parameters())
    if inner.keys() == {"mlp.w1", "mlp.v1", "mlp.w2"} and _arguments(module) == 3:  # DBRX
        pieces = {"gate_proj": Piece("mlp.w1"), "up_proj": Piece("mlp.v1"), "down_proj": Piece("mlp.w2", True)}
        return Layout(pieces, (GATED[:2], GATED[2:]))
    return None


def _arguments(module: nn.Module) -> int:
    return len(inspect.signature(type(module).forward).parameters) - 1  # wrappers keep the signature


@dataclass
class Routed:
    """What a bank of experts reads: `rows(e)` [count, inputs], and which tokens they are, None if that is not known."""

    counts: list[int]
    rows: Callable[[int], torch.Tensor]
    tokens: Callable[[int], torch.Tensor] | None = None
    total: int = 0  # tokens that came to the layer


class Biased(nn.Linear):
    """A linear layer that rounds before it adds its bias, as experts with biases do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b."""
        return F.linear(x, self.weight) + self.bias


class Experts(nn.Module):
    """Experts as children "0", "1", ..., each with its linear layers; called as the fused module was.

    `apart` says which banks are taken apart; the others keep their fused parameters and compute from slices of them.
    `told`, if set, is called with (bank, Routed) before the layers of a bank run.
    """

    def __init__(self, fused: nn.Module, layout: Layout, apart: Iterable[int] | None = None) -> None:
        super().__init__()
        kept = {k: v for k, v in vars(fused).items() if k not in ("_parameters", "_modules", "forward")}
        self.__dict__.update({**kept, "_parameters": dict(fused._parameters), "_modules": dict(fused._modules)})
        self.kind, self.layout = type(fused), layout
        self.told: Callable[[int, Routed], None] | None = None
        last = fused.get_parameter(list(layout.pieces.values())[-1].parameter)
        self.count = len(last) if last.ndim == 3 else int(fused.num_experts)
        self.apart = tuple(range(len(layout.banks)) if apart is None else apart)
        for expert in range(self.count):
            self.add_module(str(expert), nn.Module())
        taken = dict.fromkeys(layout.pieces[leaf].parameter for bank in self.apart for leaf in layout.banks[bank])
        for bank in self.apart:
            for leaf in layout.banks[bank]:
                self._take(leaf)
        for path in taken:
            for name in (path, f"{path}_bias"):
                owner, _, attr = name.rpartition(".")
                self.get_submodule(owner)._parameters.pop(attr, None)

    def _take(self, leaf: str) -> None:
        piece = self.layout.pieces[leaf]
        fused, bias = self.get_parameter(piece.parameter), self._parameters.get(f"{piece.parameter}_bias")
        for expert in range(self.count):
            weight = piece.weight(fused, expert, self.count)
            with torch.device("meta"):
                layer = (nn.Linear if bias is None else Biased)(weight.shape[1], weight.shape[0], bias is not None)
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(piece.rows(bias[expert]).detach(), requires_grad=False)
            self.get_submodule(str(expert)).add_module(leaf, layer.train(self.training))

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the fused module's forward gives; see Layout.call."""
        args = (*args, *kwargs.values())
        return getattr(self, f"_{self.layout.call}")(hidden, *args)

    def _routed(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        shape, k = hidden.shape, index.shape[-1]
        hidden, index = hidden.reshape(-1, shape[-1]), index.reshape(-1)
        weights = weights.reshape(-1)
        order = torch.argsort(index, stable=True)
        # An index beyond the last expert is one that is elsewhere, or that does nothing: it sorts behind all others.
        counts = torch.bincount(index, minlength=self.count)[: self.count].tolist()
        places = order[: sum(counts)].split(counts)
        tokens = [place // k for place in places]
        parts = self._compute(
            Routed(counts, lambda e: hidden.index_select(0, tokens[e]), lambda e: tokens[e], len(hidden))
        )
        result = torch.zeros_like(hidden)
        add = _add_distinct if _distinct(index.reshape(-1, k)) else _add
        for place, token, part in zip(places, tokens, parts):
            if len(token):
                add(result, token, (part * weights.index_select(0, place).unsqueeze(1)).to(result.dtype))
        if hasattr(self, "identity_expert"):  # LongCat: what is routed beyond the experts comes back as it is
            place = order[sum(counts) :]
            _add(result, place // k, (hidden[place // k] * weights[place, None]).to(result.dtype))
        return result.reshape(shape)

    def _all(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = hidden.reshape(self.count, -1, hidden.shape[-1])
        live = [part.any(-1).nonzero().squeeze(1) for part in parts]  # the others are zero, and stay so
        routed = Routed([len(n) for n in live], lambda e: parts[e][live[e]], lambda e: live[e], parts.shape[1])
        result = torch.zeros_like(parts)
        for expert, part in enumerate(self._compute(routed)):
            result[expert, live[expert]] = part.to(result.dtype)
        return result.reshape(hidden.shape)

    def _sorted(self, hidden: torch.Tensor, sizes: Any) -> torch.Tensor:
        counts = sizes.tolist() if isinstance(sizes, torch.Tensor) else list(sizes)
        parts = hidden.split(counts)
        return torch.cat(self._compute(Routed(counts, lambda e: parts[e], None, len(hidden))))

    def _shared(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, scale = hidden.reshape(-1, hidden.shape[-1]), weights.reshape(-1, self.count)
        everyone = torch.arange(len(rows), device=rows.device)
        routed = Routed([len(rows)] * self.count, lambda e: rows, lambda e: everyone, len(rows))
        parts = self._compute(routed, lambda e, inner: inner * scale[:, e : e + 1])
        return torch.stack(parts).float().sum(0).to(hidden.dtype).reshape(hidden.shape)

    def _compute(self, routed: Routed, scaled: Callable | None = None) -> list[torch.Tensor]:
        """Each expert's output for its rows, before routing weights; `scaled` changes what the second bank reads."""
        first = self._bank(0, routed)
        if len(self.layout.banks) == 1:
            return [part for (part,) in first]
        inner = [self._activated(parts) for parts in first]
        if scaled is not None:
            inner = [scaled(expert, part) for expert, part in enumerate(inner)]
        del first
        outputs = self._bank(1, Routed(routed.counts, lambda e: inner[e], routed.tokens, routed.total))
        norm = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None
        return [part if norm is None or not len(part) else norm(part) for (part,) in outputs]

    def _bank(self, bank: int, routed: Routed) -> list[list[torch.Tensor]]:
        if self.told is not None:
            self.told(bank, routed)
        leaves = self.layout.banks[bank]
        return [
            [self._project(e, leaf, rows) for leaf in leaves] for e in range(self.count) for rows in [routed.rows(e)]
        ]

    def _project(self, expert: int, leaf: str, rows: torch.Tensor) -> torch.Tensor:
        layer = self._modules[str(expert)]._modules.get(leaf)  # type: ignore[union-attr]
        if layer is not None and not len(rows):
            return rows.new_zeros(0, layer.out_features)
        count, rows = len(rows), _in_steps(rows)
        if layer is not None:
            return layer(rows)[:count]
        piece = self.layout.pieces[leaf]
        bias = self._parameters.get(f"{piece.parameter}_bias")
        product = F.linear(rows, piece.weight(self.get_parameter(piece.parameter), expert, self.count))[:count]
        return product if bias is None else product + piece.rows(bias[expert])

    def _activated(self, parts: list[torch.Tensor]) -> torch.Tensor:
        activation = getattr(self, "act_fn", None) or getattr(getattr(self, "mlp", None), "activation_fn", None)
        if not self.layout.gated:
            return activation(parts[0])
        own_gate = getattr(self.kind, "_apply_gate", None)
        if own_gate is None:
            return activation(parts[0]) * parts[1]
        interleaved = next(iter(self.layout.pieces.values())).interleaved
        together = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        return own_gate(self, together)

    def names(self, bank: int) -> list[list[str]]:
        """Names inside this module of a bank's layers, expert by expert."""
        return [[f"{expert}.{leaf}" for leaf in self.layout.banks[bank]] for expert in range(self.count)]

    def origin(self, name: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]] | None:
        """For a tensor of an expert ("3.gate_proj.weight"): the fused parameter it is a part of, and how to cut it."""
        number, _, rest = name.partition(".")
        leaf, _, kind = rest.rpartition(".")
        piece = self.layout.pieces.get(leaf)
        if piece is None or not number.isdecimal():
            return None
        expert = int(number)
        if kind == "bias":
            return f"{piece.parameter}_bias", lambda fused: piece.rows(fused[expert])
        return piece.parameter, lambda fused: piece.weight(fused, expert, self.count)

    @torch.no_grad()
    def fused(self, like: nn.Module, read: Callable[[str], torch.Tensor]) -> nn.Module:
        """`like`, a fused module of the same kind and shape, with what `read` gives for each expert's tensors."""
        parts: dict[str, list[tuple[str, Callable]]] = {}
        for name in (f"{e}.{leaf}.{kind}" for e in range(self.count) for leaf in self.layout.pieces for kind in KINDS):
            path, cut = self.origin(name)  # type: ignore[misc]  # it is one of ours
            parts.setdefault(path, []).append((name, cut))
        kept = dict(self.named_parameters())
        for path, parameter in list(like.named_parameters()):
            owner, _, attr = path.rpartition(".")
            if path in kept or path not in parts:
                whole = kept[path].detach()
            else:
                whole = torch.zeros(parameter.shape, dtype=read(parts[path][0][0]).dtype)
                for name, cut in parts[path]:
                    cut(whole).copy_(read(name))
            like.get_submodule(owner)._parameters[attr] = nn.Parameter(whole)
        if hasattr(like, "config"):
            like.config = self.config  # the model's: it says which of transformers' implementations is used
        return like.train(self.training)


def _in_steps(rows: torch.Tensor) -> torch.Tensor:
    """The same rows and zeros after them, up to the next multiple of ROW_STEP.

    For every number of rows oneDNN builds its product in bfloat16 anew, which takes 5 to 10 ms; so there are fewer of
    them. What is kept of each: memory.keep_few_products.
    """
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        return rows
    return F.pad(rows, (0, 0, 0, -len(rows) % ROW_STEP))


def _add(result: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    result.index_add_(0, tokens, rows)


def _add_distinct(result: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """The same for tokens that are all different, five times as fast on a CPU."""
    result.index_copy_(0, tokens, result.index_select(0, tokens) + rows)


def _distinct(index: torch.Tensor) -> bool:
    """Whether every token [tokens, k] goes to k different experts."""
    return not bool((index.sort(-1).values.diff(dim=-1) == 0).any())


def fused_experts(model: nn.Module) -> dict[str, Layout]:
    """Every module of the model that holds fused experts, by name."""
    found = {name: layout_of(module) for name, module in model.named_modules() if not isinstance(module, Experts)}
    return {name: layout for name, layout in found.items() if layout is not None}


def take_apart(model: nn.Module, layouts: dict[str, Layout], apart: dict[str, list[int]] | None = None) -> None:
    """Replace the named modules of fused experts by Experts; `apart` may say which of their banks."""
    for name, layout in layouts.items():
        banks = None if apart is None else apart[name]
        model.set_submodule(name, Experts(model.get_submodule(name), layout, banks))
