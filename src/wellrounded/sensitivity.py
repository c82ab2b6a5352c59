"""What a scheme would cost the model, set of layers by set of layers: measured where it counts, at the model's end.

Each set of layers that read the same tensor is rounded coarsely, it alone, and the rest of the model runs on as it is:
how far the output moves, in KL, is what the set is worth. Other schemes of the set move it in proportion to their
layers' output error, `tr(E H E^T)`, which needs no further run. All of it takes one walk: what a set's error has become
goes through the remaining blocks beside the dense hidden state.

In bfloat16 any change moves the output, as all roundings behind it fall differently: on SmolLM2-135M by 0.001 to 0.0016
nats, as much as 4 bits in one set do. So errors are doubled, which makes four times the KL, and what a change that is
next to nothing makes of it, measured in every block, is taken away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from .calibration import Windows
from .core import gptq, rtn
from .core.fidelity import Fidelity, Likeness
from .core.hessian import Hessian
from .core.scheme import Scheme
from .errors import NumericsError, UsageError
from .model import blocks as layers_of
from .model.inputs import Member
from .model.stream import SpillFile, Stream
from .model.walk import BlockWalk
from .prediction import Room
from .progress import Progress
from .ties import ties_of, together

BITS, GROUPS = (3, 4, 8), (128, 64, 32)  # what is chosen from: symmetric, without activation order
OBSERVED = 32  # calibration windows that Hessians are counted on
PROBED = 2  # windows of which the model's output is compared: between single ones, costs correlate at 0.97
POSITIONS = 256  # in each of them
DOUBLED = 2.0  # times the error, and its square times the KL
CERTAIN = 0.1  # of what is seen counts in any case: what is taken away is known no better
ROWS = 128  # of a layer that stand for all when schemes are compared
Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class Sensitivity:
    """Layers that are to have one scheme, by their full names, and what each scheme there is for them would cost.

    Costs are nats per token (of models that only embed, one minus the cosine), and add up, roughly, to the model's.
    """

    names: tuple[str, ...]
    costs: dict[Scheme, float]


@dataclass
class _Set:
    """Layers that are rounded together: output errors by scheme, the coarsest rounding, and where that leads.

    errors  in units of the first scheme's, the coarsest
    rough   the layers' weights by full name, with that scheme's error doubled
    moved   how far these move the model's output
    floor   what moves it as far as any change does
    """

    names: list[str]
    errors: dict[Scheme, float]
    rough: dict[str, torch.Tensor]
    stream: Stream | None = None
    moved: float = 0.0
    floor: _Set | None = None

    def costs(self) -> dict[Scheme, float]:
        """By scheme, in units of the model's output."""
        seen = max(self.moved - (self.floor.moved if self.floor else 0.0), CERTAIN * self.moved) / DOUBLED**2
        return {scheme: error * seen for scheme, error in self.errors.items()}


def schemes_for(shapes: Iterable[tuple[int, int]]) -> list[Scheme]:
    """What layers of these shapes (outputs, inputs) can have, the coarsest first: groups that divide their inputs.

    Where none of 128, 64 and 32 does, groups of 32 are ragged.
    """
    shapes = list(shapes)
    groups = [group for group in GROUPS if all(inputs % group == 0 for _, inputs in shapes)] or [GROUPS[-1]]
    found = [Scheme(bits, group) for bits in BITS for group in groups]
    return [one for one in found if not any(one.refuses(inputs, outputs) for outputs, inputs in shapes)]


def measure(
    walk: BlockWalk,
    names: Sequence[str],
    windows: Windows,
    room: Room,
    tell: Tell = lambda progress: None,
    spill: SpillFile | None = None,
) -> list[Sensitivity]:
    """The sensitivity of the named layers, in the sets that must stay equal; `windows` are those of the calibration.

    Hidden states lie in `spill`, if there is one. Raises UsageError for a layer that none of the windows reached, and
    NumericsError, naming the layers, for NaN or Inf.
    """
    started = time.perf_counter()
    wanted = set(names)
    ties = ties_of(names, walk.model)  # before the walk: blocks that share weights no longer do afterwards
    counted, compared = some(windows, OBSERVED), some(windows, PROBED)
    found: list[_Set] = []
    floors: list[_Set] = []
    with walk.outside():
        batch = max(1, room.batch_tokens // windows.length)
        observed = walk.stream(counted.ids, counted.mask, batch, counted.more, spill)
        dense = walk.stream(compared.ids, compared.mask, 1, compared.more, spill)
    for index, name, block in walk:
        mine = [inside for inside in layers_of.linears(block) if f"{name}.{inside}" in wanted]
        sets = [_examined(block, name, member) for member in _members(walk, index, mine, observed, dense, room)]
        here = [_merged(each) for each in together(sets, ties)]
        walk.advance(index, *(one.stream for one in (*found, *floors) if one.stream is not None))
        if here:
            floors.append(_Set([], {}, _barely_rounded(walk.model, here[0].names)))
        for one in (*here, *floors[-1:]) if here else ():
            one.stream = dense.twin()
            with _in_place(walk.model, one.rough):
                walk.advance(index, one.stream)
            one.rough, one.floor = {}, floors[-1]
        walk.advance(index, dense)
        found += here
        what = f"measuring, block: {index + 1}/{len(walk.names)}, {name}, {len(found)} sets of layers"
        tell(Progress(index + 1, len(walk.names), time.perf_counter() - started, name, message=what))
    with walk.outside():
        head = layers_of.output_head(walk.model)
        if head in wanted:
            found.append(_head(walk, head, observed, dense))
        _compare(walk, dense, [*found, *floors])
    reached = {name for one in found for name in one.names}
    if missed := [name for name in names if name not in reached]:
        raise UsageError(
            f"{missed[0]}: no calibration token reached it, so that nobody knows how many bits it needs; give more "
            "calibration data, or keep it dense (--ignore)"
        )
    return [_summed(each) for each in together(found, ties)]


def some(windows: Windows, count: int) -> Windows:
    """At most `count` windows, evenly spaced."""
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // max(count, 1)]


def _members(
    walk: BlockWalk, index: int, names: list[str], observed: Stream, dense: Stream, room: Room
) -> Iterator[Member]:
    """The sets of siblings of a block, with Hessians; in the end the stream has left the block."""
    known = walk.siblings(index, dense, names) if room.waits else walk.all_siblings(index, observed, names)
    sets = (walk.staged if room.waits else walk.anew)(index, observed, names, known)
    for one in sets:
        for members in one.stacks():
            yield from (member for member in members if member.hessian is not None)
        one.forget()
    walk.advance(index, observed)


def _examined(block: nn.Module, name: str, member: Member) -> _Set:
    """What rounding does to the layers of one set."""
    layers = {f"{name}.{inside}": block.get_submodule(inside) for inside in member.names}
    assert member.hessian is not None, "a set that nothing reached does not come"
    return _solved(layers, member.hessian)


def _solved(layers: dict[str, nn.Module], hessian: Hessian) -> _Set:
    """Every scheme's output error, on some rows of each layer, relative to the output; and the coarsest one's weights.

    Rows do not influence each other, so that some are rounded exactly as in the whole.
    """
    weights = [layers_of.oriented(layer, layer.weight.detach()) for layer in layers.values()]
    shapes = [layers_of.shape_of(layer) for layer in layers.values()]
    rows = torch.cat([weight[:: -(-len(weight) // ROWS)] for weight in weights]).float()
    schemes = schemes_for(shapes)
    moment = hessian.mirrored()
    errors: dict[Scheme, float] = {}
    try:
        prepared = gptq.prepare([hessian], schemes[0])
        for scheme in schemes:
            # The factor does not depend on the scheme, and is what costs most.
            index = scheme.trivial_group_index(hessian.size).to(rows.device).unsqueeze(0)
            (solved,) = replace(prepared, scheme=scheme, index=index).solve(
                len(rows), lambda part: rows[part].unsqueeze(0)
            )
            error = rows - solved.dequantize()
            errors[scheme] = float(((error @ moment) * error).sum())
        whole = torch.cat(weights)
        (solved,) = prepared.solve(len(whole), lambda part: whole[part].unsqueeze(0))
    except NumericsError as error:
        raise NumericsError(f"{', '.join(layers)}: {error}") from None
    rough = {}
    for name, weight, piece in zip(layers, weights, solved.split([outputs for outputs, _ in shapes])):
        doubled = torch.lerp(weight.float(), piece.dequantize(), DOUBLED).to(weight.dtype)
        rough[name] = layers_of.oriented(layers[name], doubled).contiguous()
    unit = max(errors[schemes[0]], 1e-30)
    return _Set([*layers], {scheme: error / unit for scheme, error in errors.items()}, rough)


def _barely_rounded(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights of these layers in 8 bits: next to no error, but other last bits."""
    rounded = {}
    for name in names:
        layer = model.get_submodule(name)
        weight = layers_of.oriented(layer, layer.weight.detach())
        fine = rtn.solve(weight, None, Scheme(8, GROUPS[-1])).dequantize(weight.dtype)
        rounded[name] = layers_of.oriented(layer, fine).contiguous()
    return rounded


def _head(walk: BlockWalk, name: str, observed: Stream, dense: Stream) -> _Set:
    """The same for the output head, which is no part of a block."""
    layer = walk.model.get_submodule(name)
    hessian = Hessian(layers_of.shape_of(layer)[1], layer.weight.device)
    for batch, mask in enumerate(observed.masks):
        hessian.update(walk.reaching(layer, observed, batch), mask)
    found = _solved({name: layer}, hessian)
    found.stream = dense
    return found


def _compare(walk: BlockWalk, dense: Stream, sets: list[_Set]) -> None:
    """How far each set's rough rounding has moved the model's output, window by window."""
    counters: list[Fidelity | Likeness] = []
    for batch, (ids, mask) in enumerate(zip(dense.ids, dense.masks)):
        original, is_logits = walk.output(dense, batch)
        step = -(-original.shape[1] // POSITIONS) if is_logits and original.ndim == 3 else 1
        some = (slice(None), slice(None, None, step))
        original, mask = original[some].clone(), mask if mask is None or step == 1 else mask[some]
        counters = counters or [Fidelity(causal=False) if is_logits else Likeness() for _ in sets]
        for one, counter in zip(sets, counters):
            assert one.stream is not None
            with _in_place(walk.model, one.rough):  # of the head alone: blocks have theirs behind them
                moved = walk.output(one.stream, batch)[0]
            counter.update(original, moved[some], ids, mask)
    for one, counter in zip(sets, counters):
        one.moved = max(0.0, distance(counter.to_dict()))
        one.stream, one.rough = None, {}


def distance(fidelity: dict[str, float | int]) -> float:
    """How far a model is from its original, 0 for the same: the mean KL, or without logits one minus the cosine."""
    return float(fidelity["kl_mean"] if "kl_mean" in fidelity else 1 - fidelity["cosine_mean"])


def _summed(sets: list[_Set]) -> Sensitivity:
    """Sets of several blocks that share weights: their costs add up."""
    each = [one.costs() for one in sets]
    costs = {scheme: sum(one[scheme] for one in each) for scheme in each[0] if all(scheme in one for one in each)}
    return Sensitivity(tuple(name for one in sets for name in one.names), costs)


def _merged(sets: list[_Set]) -> _Set:
    """Sets of one block as one; schemes that not all of them can have are left out."""
    if len(sets) == 1:
        return sets[0]
    shared = [scheme for scheme in sets[0].errors if all(scheme in one.errors for one in sets)]
    mean = {scheme: sum(one.errors[scheme] for one in sets) / len(sets) for scheme in shared}
    rough = {name: weight for one in sets for name, weight in one.rough.items()}
    return _Set([name for one in sets for name in one.names], mean, rough)


@contextmanager
def _in_place(model: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """While it lasts, these layers have other weights."""
    layers = {name: model.get_submodule(name) for name in weights}
    own = {name: layer.weight for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight = nn.Parameter(weights[name], requires_grad=False)
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = own[name]
