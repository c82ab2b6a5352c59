"""How far the quantized model is from the dense one, on text that neither calibration nor training of it has seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .core.fidelity import Fidelity, Likeness, measure
from .model.stream import Stream
from .model.walk import BlockWalk
from .team import Team

Head = tuple[str, nn.Parameter]  # the name of the output head, and the weight that it has once it is quantized


def fidelity(
    walk: BlockWalk, dense: list[Stream], quantized: list[Stream], causal: bool, team: Team, head: Head | None = None
) -> dict[str, float | int] | None:
    """How far the two streams of the same windows are apart that went through the blocks, and then the head.

    None if there are none, here and in the rest of the team. `causal` models continue a text.
    """
    kept: Fidelity | Likeness | None = None
    with walk.outside():
        for before, after in zip(dense, quantized):
            for batch, (ids, mask) in enumerate(zip(before.ids, before.masks)):
                original, is_logits = walk.output(before, batch)
                with _replaced(walk.model, head):
                    other, _ = walk.output(after, batch)
                kept = kept or measure(original, is_logits, causal)
                kept.update(original, other, ids, mask)
    found = [one for one in team.all(kept) if one is not None]
    for other in found[1:]:
        found[0].merge(other)  # type: ignore[arg-type]  # they are of one kind
    return found[0].to_dict() if found else None


@contextmanager
def _replaced(model: nn.Module, head: Head | None) -> Iterator[None]:
    if head is None:
        yield
        return
    layer = model.get_submodule(head[0])
    dense, layer.weight = layer.weight, head[1]
    try:
        yield
    finally:
        layer.weight = dense
