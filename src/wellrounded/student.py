"""The quantized model as something that learns: its codes stay, the scales of its groups and its norms' gains do not.

The teacher is the dense model, present only as what its last block returned; what is learned falls with
KL(original || quantized), summed over tokens. One block is in memory at a time: a step runs all of them without a
graph, keeps what entered each, and then goes back from the last to the first, running each again with one (Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", 2016).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .core.weight import QuantizedWeight
from .errors import UsageError
from .learned import Gain, Learned, Scales, divergence, is_norm
from .model import blocks as layers_of
from .model.calls import Box, Carried, boxes_in, carried_in, flat, replaced
from .model.stream import Stream
from .model.walk import BlockWalk
from .model.weights import materialize, release

WINDOWS = -3  # a hidden state is [windows, length, size], or [streams, windows, length, size] (Gemma 3n)
Place = tuple[nn.Module, str, Learned]  # the module whose parameter of this name is computed from it
Owed = dict[tuple, torch.Tensor]  # slopes of what a block hands to later ones besides its hidden state


class Student:
    """A quantized model on a walk: `scales` by layer and `gains` by parameter, and how they change its answers.

    Every quantized layer of the blocks learns, single experts too; one that no token reaches keeps its scales. Of what
    lies behind the blocks only norms learn; a quantized head answers with the scales that it has. What `owners` says
    to share another module's tensors learns with it (see shared_modules); parameters in `fixed` stay as they are.
    """

    def __init__(
        self, walk: BlockWalk, quantized: Mapping[str, QuantizedWeight], owners: Mapping[str, str] | None = None,
        fixed: Container[str] = (),
    ) -> None:  # fmt: skip
        self.walk, self.quantized, self.owners, self.fixed = walk, quantized, owners or {}, fixed
        self.scales: dict[str, Scales] = {}
        self.gains: dict[str, Gain] = {}
        self.blocks: list[list[Place]] = []
        self.behind: list[Place] = []  # what replaces the dense model's own behind the blocks
        self.tokens = 0  # that what was learned comes from

    @property
    def learned(self) -> dict[str, Learned]:
        """All that is trained, by the name of its layer or parameter."""
        return {**self.scales, **self.gains}

    def _places(self, block: str, module: nn.Module) -> list[Place]:
        places: list[Place] = []
        for inside, part in module.named_modules():
            name = f"{block}.{inside}"
            owner = self.owners.get(name, name)
            if owner in self.quantized:
                if owner not in self.scales:
                    self.scales[owner] = Scales(self.quantized[owner], self.walk.device)
                places.append((part, "weight", self.scales[owner]))
            places += self._norm(name, part) if is_norm(part) else []
        return places

    def _norm(self, name: str, norm: nn.Module) -> list[Place]:
        owner = self.owners.get(name, name)
        places: list[Place] = []
        for attr, parameter in norm._parameters.items():
            if parameter is None or parameter.ndim != 1 or not parameter.is_floating_point():
                continue
            full = f"{owner}.{attr}"
            if full in self.fixed:
                continue
            if full not in self.gains and (value := self.walk.read(full)) is not None:
                self.gains[full] = Gain(value, self.walk.device)
            if full in self.gains:
                places.append((norm, attr, self.gains[full]))
        return places

    def begin(self, stream: Stream) -> None:
        """Be what was quantized, with nothing learned yet; `stream` may be anywhere on its way.

        Raises UsageError for hidden states that are not laid out window by window, and for a model without logits.
        """
        shape, windows = tuple(stream.hidden(0).shape), len(stream.ids[0])
        if len(shape) < 3 or shape[WINDOWS] != windows:
            kind = type(self.walk.model).__name__
            raise UsageError(f"{kind}: its scales cannot be trained: hidden states of {windows} windows are {shape}")
        self.scales, self.gains, self.tokens = {}, {}, 0
        self.blocks = [self._places(name, block) for name, block in zip(self.walk.names, self.walk.blocks)]
        self.behind = self._behind(stream)

    def _behind(self, stream: Stream) -> list[Place]:
        """The norms, and the head if it is quantized, that stand between the last block and the logits."""
        inside = tuple(f"{name}." for name in self.walk.names)
        modules = [(n, m) for n, m in self.walk.model.named_modules() if not f"{n}.".startswith(inside)]
        ran: set[str] = set()
        handles = []

        def note(module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
            if any(isinstance(one, torch.Tensor) and one.requires_grad for one in (*args, *kwargs.values())):
                ran.add(name)

        for name, module in modules:
            handles.append(module.register_forward_pre_hook(partial(note, name=name), with_kwargs=True))
        try:
            with torch.enable_grad():
                self._logits(stream, 0, 0, stream.hidden(0).narrow(WINDOWS, 0, 1).detach().clone().requires_grad_())
        finally:
            for handle in handles:
                handle.remove()
        places: list[Place] = []
        for name, module in modules:
            if name in ran and is_norm(module):
                places += self._norm(name, module)
            elif name in ran and name in self.quantized:
                places.append((module, "weight", Scales(self.quantized[name], self.walk.device)))
        return places

    # ---- one step ----

    @torch.no_grad()
    def learn(self, teacher: list[torch.Tensor], stream: Stream) -> float:
        """Add to every slope what a stream at the first block's door teaches; the mean KL over its tokens, in nats.

        `teacher` has what the dense model's last block returned for each batch of the stream.
        """
        entered: list[dict[int, torch.Tensor]] = []
        carried: list[dict[Carried, torch.Tensor]] = [{} for _ in stream.ids]
        for index in range(len(self.blocks)):
            entered.append({batch: stream.hidden(batch) for batch in stream.rest(index)})
            self._advance(index, stream)
            carried = [{**old, **new} for old, new in zip(carried, stream.carried)]
        found = [self._compare(original, stream, batch, learning=True) for batch, original in enumerate(teacher)]
        slopes = [slope for _, _, slope in found]
        tokens = sum(count for _, count, _ in found)
        owed: list[Owed] = [{} for _ in stream.ids]
        for index in reversed(range(len(self.blocks))):
            entered_here = entered.pop()
            with self._resident(index, learning=True):
                for batch, hidden in entered_here.items():
                    stream.carried[batch] = {one: carried[batch][one] for one in carried_in(stream.calls[batch][index])}
                    slopes[batch] = self._back(index, stream, batch, hidden, slopes[batch], owed[batch])
        self.tokens += tokens
        return sum(kl for kl, _, _ in found) / max(tokens, 1)

    @torch.no_grad()
    def divergence(self, teacher: list[torch.Tensor], stream: Stream) -> tuple[float, int]:
        """Sum of KL over the tokens of a stream at the first block's door, in nats, and how many they are."""
        for index in range(len(self.blocks)):
            self._advance(index, stream)
        found = [self._compare(original, stream, batch, learning=False)[:2] for batch, original in enumerate(teacher)]
        return sum(kl for kl, _ in found), sum(count for _, count in found)

    def _advance(self, index: int, stream: Stream) -> None:
        if any(True for _ in stream.rest(index)):
            with self._resident(index):
                self.walk.advance(index, stream)

    @contextmanager
    def _resident(self, index: int, learning: bool = False) -> Iterator[None]:
        """While it lasts, the block has its weights; those that learn do so when a graph is followed back to them."""
        block = self.walk.blocks[index]
        for place in self.blocks[index]:
            module, attr, _ = place
            module._parameters[attr] = _computed(place, learning)
        materialize(block, self.walk.read, f"{self.walk.names[index]}.", self.walk.device)
        try:
            yield
        finally:
            release(block)

    def _back(
        self, index: int, stream: Stream, batch: int, entered: torch.Tensor, slope: torch.Tensor, owed: Owed
    ) -> torch.Tensor:
        """Run a block on what entered it, and follow its graph back from the slope of what it returned.

        Gives the slope of what entered. `owed` are the slopes of what it returned besides, which later blocks were
        given; what this one was given by earlier ones is added to them.
        """
        entering = entered.detach().requires_grad_()
        boxes = boxes_in(stream.calls[batch][index])
        stream.carried[batch] = replaced(stream.carried[batch], _leaf)
        for box in boxes:
            box.update({key: replaced(value, _leaf) for key, value in box.items()})
        given = _handed(stream.carried[batch], boxes)
        with torch.enable_grad():
            stream.leave(batch, index - 1, entering.clone())  # a block may write into what it is given
            output = self.walk._run(index, stream, batch)
        returned = output if isinstance(output, (tuple, list)) else [output]
        made = _handed({Carried(index, place): value for place, value in enumerate(returned)}, boxes)
        later = [place for place, one in made.items() if place in owed and one is not given.get(place)]
        roots = [(returned[0], slope), *((made[place], owed.pop(place)) for place in later)]
        roots = [(root, slope) for root, slope in roots if root.requires_grad]
        torch.autograd.backward([root for root, _ in roots], [slope for _, slope in roots])
        for place, one in given.items():
            if one.grad is not None:
                owed[place] = one.grad + owed.get(place, 0)
        assert entering.grad is not None
        return entering.grad

    # ---- behind the blocks ----

    def _compare(
        self, original: torch.Tensor, stream: Stream, batch: int, learning: bool
    ) -> tuple[float, int, torch.Tensor]:
        """KL over the tokens of a batch that left the last block, how many, and the slope of what left it.

        One window at a time: its logits exist twice, and a vocabulary is large.
        """
        total, tokens, mask = 0.0, 0, stream.masks[batch]
        hidden = stream.hidden(batch)
        slope = torch.zeros_like(hidden) if learning else hidden
        mine = [_computed(place, learning and isinstance(place[2], Gain)) for place in self.behind]
        for window in range(len(stream.ids[batch])):
            one = slice(window, window + 1)
            leaf = hidden.narrow(WINDOWS, window, 1).detach().clone().requires_grad_(learning)
            before = self._logits(stream, batch, window, original.narrow(WINDOWS, window, 1))
            with self._behind_is(mine), torch.set_grad_enabled(learning):
                after = self._logits(stream, batch, window, leaf)
            kl, count, downhill = divergence(before, after.detach(), None if mask is None else mask[one], learning)
            if learning:
                after.backward(downhill)
                assert leaf.grad is not None
                slope.narrow(WINDOWS, window, 1).copy_(leaf.grad)
            total, tokens = total + kl, tokens + count
        return total, tokens, slope

    def _logits(self, stream: Stream, batch: int, window: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the model says if its last block returned `hidden` [..., 1, length, size] for this window."""
        one, mask = slice(window, window + 1), stream.masks[batch]
        mask = None if mask is None else mask[one]
        output = self.walk.hollow.answer(hidden, stream.ids[batch][one], mask, stream.more[batch])
        if (logits := getattr(output, "logits", None)) is None:
            kind = type(self.walk.model).__name__
            raise UsageError(f"{kind}: gives no logits, so there is no KL to train its scales by")
        return logits

    @contextmanager
    def _behind_is(self, mine: list[nn.Parameter]) -> Iterator[None]:
        """While it lasts, what lies behind the blocks is the student's, not the teacher's."""
        dense = [module._parameters[attr] for module, attr, _ in self.behind]
        for (module, attr, _), parameter in zip(self.behind, mine):
            module._parameters[attr] = parameter
        try:
            yield
        finally:
            for (module, attr, _), kept in zip(self.behind, dense):
                module._parameters[attr] = kept


def _computed(place: Place, learning: bool) -> nn.Parameter:
    """A module's parameter from what is learned; its gradient becomes a slope as soon as it is there."""
    module, attr, learned = place
    old = module._parameters[attr]
    assert old is not None
    turn = partial(layers_of.oriented, module) if old.ndim == 2 else torch.Tensor.contiguous
    new = nn.Parameter(turn(learned.dense(old.dtype)).contiguous(), requires_grad=learning)

    def taken(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        learned.learn(turn(parameter.grad))
        parameter.grad = None

    if learning:
        new.register_post_accumulate_grad_hook(taken)
    return new


def _leaf(value: Any) -> Any:
    """A tensor whose gradient will be known; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _handed(carried: dict[Carried, Any], boxes: list[Box]) -> dict[tuple, torch.Tensor]:
    """Every tensor that a block is given, or has made, besides its hidden state, by where it is found.

    Some models pass a box to all blocks, in which one leaves keys and values for others (transformers' KVSharingDict).
    """
    places = [*carried.items(), *(((id(box), key), value) for box in boxes for key, value in box.items())]
    tensors = ((place, [one for one in flat(value) if isinstance(one, torch.Tensor)]) for place, value in places)
    return {(place, number): one for place, found in tensors for number, one in enumerate(found)}
