"""A rotation of the residual stream: it changes every weight that reads or writes it, and nothing that a model says.

What is added up from block to block may be seen in another basis, `r Q`, Q orthogonal: what writes to it gets
`W <- Q^T W`, what reads it `W <- W Q`, if between the two there is nothing but a norm by the root mean square, which no
rotation changes; the norm's gains go into what reads it before. Rotated weights have no outliers, and few channels that
matter more than others: the error of rounding is spread. Source: R1 of Liu et al., "SpinQuant" (2024), after QuaRot
(Ashkboos et al. 2024).

Who reads and who writes is found by running a model once, block by block; that nothing was overlooked is proven by
running it rotated beside: any kind of model is rotated, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import nn

from .blocks import oriented, shape_of
from .blocks import towers as find_towers
from .experts import Experts
from .stream import Stream
from .walk import BlockWalk
from .weights import Change, Read, changed

Divergence = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], tuple[float, int]]
MOST = 0.02  # nats per token: how far rounding the rotated weights to their dtype may move a model
APART = 0.1  # how far, beside its own size, a rotated hidden state may be from the original's: rounded to bfloat16
PIECE = 2**22  # float64 weights that are rotated at a time


class NotExact(Exception):  # noqa: N818  # a property of a model
    """The model cannot be rotated without changing it; the message says why."""


class Orthogonal:
    """x [..., size] -> x Q: signs, and then a Kronecker product of two small rotations, which mixes all of x.

    A dense Q would cost as much as a pass of all tokens through the model. Sizes are factored as near to a square as
    they can be; a prime is rotated by a dense Q.
    """

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        left = next(n for n in range(isqrt(size), 0, -1) if size % n == 0)

        def random(size: int) -> torch.Tensor:
            return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q

        self.signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        self.left, self.right = random(left), random(size // left)

    def __call__(self, rows: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [..., size], of any float dtype before, and scaled by `gain` [size]; computed in float64."""
        flat = rows.reshape(-1, len(self.signs))
        turned = torch.empty(flat.shape, dtype=torch.float32, device=rows.device)
        scaled = self.signs if gain is None else self.signs * gain.cpu()
        signs, left, right = (each.to(rows.device) for each in (scaled, self.left, self.right))
        for some in range(0, len(flat), max(1, PIECE // len(signs))):
            part = slice(some, some + max(1, PIECE // len(signs)))
            square = (flat[part].double() * signs).unflatten(-1, (len(left), len(right)))
            turned[part] = (left.T @ square @ right).flatten(-2)
        return turned.view(rows.shape)


@dataclass
class Rotation:
    """What becomes of tensors of a source, by their names in the model, and how far that moved the model.

    kl  mean KL(original || rotated) in nats per token of the windows it was proven on: weights are rounded once more
    """

    changes: dict[str, Change] = field(default_factory=dict)
    kl: float = 0.0


def ends_of(model: Any) -> tuple[nn.Module, nn.Module]:
    """The embeddings, and the output head. Raises NotExact where these alone stand in the way."""
    try:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        raise NotExact("it does not say what its embeddings are") from None
    if find_towers(model):
        raise NotExact("it reads more than text")
    if head is None or not isinstance(getattr(embeddings, "weight", None), torch.Tensor):
        raise NotExact("it has no output head")
    if head.weight is embeddings.weight:
        raise NotExact("its output head is its embeddings, too, in which norms cannot be folded")
    return embeddings, head


@torch.no_grad()
def find(walk: BlockWalk, enter: Callable[[BlockWalk], Stream], divergence: Divergence) -> Rotation:
    """The rotation of a model's residual stream, proven on the stream that `enter` makes at a walk's first block.

    `divergence` gives the sum of the KL between two tensors of logits, with a mask, and over how many tokens. Raises
    NotExact for a model that cannot be rotated.
    """
    model = walk.model
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = ends_of(model)
    plain = enter(walk)
    turn, rotation = Orthogonal(plain.hidden(0).shape[-1], seed=0), Rotation()
    changes, source = rotation.changes, walk.read
    rotated = BlockWalk(model, changed(source, changes), walk.device)
    changes[f"{names[embeddings]}.weight"] = lambda value: turn(value).to(value.dtype)
    moved = enter(rotated)
    _compare(plain, moved, turn, "the embeddings")
    for index, name in enumerate(walk.names):
        with walk.at(index) as block:
            changes |= {f"{name}.{part}": change for part, change in _of_block(walk, index, block, plain, turn).items()}
            walk.advance(index, plain)
        with rotated.at(index):
            rotated.advance(index, moved)
        _compare(plain, moved, turn, name)
    changes |= _of_head(walk, plain, head, turn)
    said = [divergence(walk.logits(plain, n), rotated.logits(moved, n), mask) for n, mask in enumerate(plain.masks)]
    rotation.kl = sum(kl for kl, _ in said) / max(sum(tokens for _, tokens in said), 1)
    if not rotation.kl < MOST:
        raise NotExact(f"rotated, it would be {rotation.kl:.3g} nats per token from what it is")
    return rotation


def _compare(plain: Stream, moved: Stream, turn: Orthogonal, where: str) -> None:
    expected = turn(plain.hidden(0))
    if not (moved.hidden(0).float() - expected).norm() < APART * expected.norm():
        raise NotExact(f"{where}: more is done to hidden states than adding to them, and reading them through a norm")


# ---- who reads, who writes ----


def _of_block(walk: BlockWalk, index: int, block: nn.Module, stream: Stream, turn: Orthogonal) -> dict[str, Change]:
    """What becomes of the parameters of a block that has its weights, by their names in it."""
    if not any(True for _ in stream.rest(index)):
        return {}
    size = len(turn.signs)
    with _readers(block, size) as readers:
        walk._run(index, stream, 0)
    layers = {name: module for name, module in block.named_modules() if _is_matrix(module)}
    reading = {name for _, read in readers.values() for name in read}
    inner = {name for name in layers if any(name.startswith(f"{experts}.") for experts in _experts(block))}
    writers = [name for name in layers if name not in reading | inner and shape_of(layers[name])[0] == size]
    writers += _last_of_experts(block, reading)  # which of these do not write will be noticed
    if missing := {*reading, *writers} - layers.keys():
        raise NotExact(f"{walk.names[index]}.{missing.pop()}: its experts are not apart")
    changes: dict[str, Change] = {}
    for norm, read in readers.values():
        if read:  # others belong to queries and keys, or stand behind a layer, and then hidden states will not agree
            changes |= _folded(block, norm, read, turn, partial(_own, walk, walk.names[index]))
    for name in writers:
        layer = layers[name]
        changes[f"{name}.weight"] = partial(_written, layer, turn)
        if getattr(layer, "bias", None) is not None:
            changes[f"{name}.bias"] = lambda value: turn(value).to(value.dtype)
    return changes


def _of_head(walk: BlockWalk, stream: Stream, head: nn.Module, turn: Orthogonal) -> dict[str, Change]:
    """What becomes of the head, and of the norm that it reads from, by their names in the model."""
    with walk.outside():
        with _readers(walk.model, len(turn.signs), leave=tuple(walk.names)) as readers:
            walk.output(stream, 0)
        for norm, read in readers.values():
            if [walk.model.get_submodule(name) for name in read] == [head]:
                return _folded(walk.model, norm, read, turn, walk.read)
    raise NotExact("its output head does not read from a norm")


Readers = dict[int, tuple[str, list[str]]]  # by where a norm's output lies: the norm, and what read it


@contextmanager
def _readers(module: nn.Module, size: int, leave: tuple[str, ...] = ()) -> Iterator[Readers]:
    """While it lasts, which matrices read what a norm over `size` features gives, by names inside the module."""
    found: Readers = {}
    kept: list[torch.Tensor] = []  # so that no address is used again

    def normed(norm: nn.Module, args: tuple, output: torch.Tensor, name: str) -> None:
        kept.append(output)
        found[output.data_ptr()] = (name, [])

    def reads(layer: nn.Module, args: tuple, names: list[str]) -> None:
        read = found.get(args[0].data_ptr()) if args and isinstance(args[0], torch.Tensor) else None
        if read is not None and args[0].shape[-1] == size:
            read[1].extend(name for name in names if name not in read[1])

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if f"{name}.".startswith(tuple(f"{one}." for one in leave)):
                continue
            if _is_norm(part, size):
                handle = part.register_forward_hook(partial(normed, name=name))
            elif isinstance(part, Experts):
                inside = [f"{name}.{one}" for expert in part.names(0) for one in expert]
                handle = part.register_forward_pre_hook(partial(reads, names=inside))
            elif _is_matrix(part) and shape_of(part)[1] == size:
                handle = part.register_forward_pre_hook(partial(reads, names=[name]))
            else:
                continue
            hooks.callback(handle.remove)
        yield found


def _is_norm(module: nn.Module, size: int) -> bool:
    return "norm" in type(module).__name__.lower() and all(p.shape == (size,) for p in module.parameters())


def _is_matrix(module: nn.Module) -> bool:
    """Linear layers, and the routers of experts, which hold a weight like theirs."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _experts(block: nn.Module) -> dict[str, Experts]:
    return {name: part for name, part in block.named_modules() if isinstance(part, Experts)}


def _last_of_experts(block: nn.Module, reading: set[str]) -> list[str]:
    """The last layers of experts whose first ones read a norm."""
    mine = [(name, part) for name, part in _experts(block).items() if f"{name}.{part.names(0)[0][0]}" in reading]
    return [f"{name}.{one}" for name, part in mine for expert in part.names(-1) for one in expert]


# ---- what becomes of them ----


def _own(walk: BlockWalk, block: str, name: str) -> torch.Tensor | None:
    return walk.read(f"{block}.{name}")


def _folded(owner: nn.Module, norm: str, read: list[str], turn: Orthogonal, tensor: Read) -> dict[str, Change]:
    """The norm's gains are 1, and its readers' columns are scaled by what they were, and rotated."""
    module = owner.get_submodule(norm)
    gain, unit = _gain(norm, module, tensor, len(turn.signs))
    changes: dict[str, Change] = {
        f"{norm}.{name}": partial(torch.full_like, fill_value=unit) for name in _own_of(module)
    }
    return changes | {f"{name}.weight": partial(_read, owner.get_submodule(name), turn, gain) for name in read}


def _gain(name: str, norm: nn.Module, tensor: Read, size: int) -> tuple[torch.Tensor, float]:
    """By what a norm multiplies, float32 [size], and what its parameter is when that is 1."""
    own = _own_of(norm)
    if len(own) > 1:
        raise NotExact(f"{name}: has a {own[-1]}")
    given = next(iter(norm.parameters()), torch.ones(1))
    probe = norm(torch.ones(1, size, dtype=given.dtype, device=given.device))[0].float()
    weight = tensor(f"{name}.{own[0]}") if own else torch.ones(size)
    assert weight is not None
    weight = weight.float().to(probe.device)
    for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
        if torch.allclose(weight + offset, probe, rtol=0.02, atol=0.02):
            return weight + offset, 1.0 - offset
    raise NotExact(f"{name}: is no norm by the root mean square")


def _own_of(norm: nn.Module) -> list[str]:
    return [name for name, _ in norm.named_parameters()]


def _read(layer: nn.Module, turn: Orthogonal, gain: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return oriented(layer, turn(oriented(layer, value), gain)).contiguous()


def _written(layer: nn.Module, turn: Orthogonal, value: torch.Tensor) -> torch.Tensor:
    return oriented(layer, turn(oriented(layer, value).T).T).contiguous()
