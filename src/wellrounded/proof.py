"""How far the quantized model is from the dense one, on text that neither calibration nor training of it has seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .core.fidelity import Fidelity, Likeness, measure
from .model.stream import Stream
from .model.walk import BlockWalk
from .team import Team

Behind = dict[str, nn.Parameter]  # by name, what the quantized model has behind its blocks instead of the original's


def fidelity(
    walk: BlockWalk, dense: list[Stream], quantized: list[Stream], causal: bool, team: Team, behind: Behind
) -> dict[str, float | int] | None:
    """How far the two streams of the same windows are apart that went through the blocks, and then the head.

    None if there are none, here and in the rest of the team. `causal` models continue a text.
    """
    kept: Fidelity | Likeness | None = None
    with walk.outside():
        for before, after in zip(dense, quantized):
            for batch, (ids, mask) in enumerate(zip(before.ids, before.masks)):
                original, is_logits = walk.output(before, batch)
                with _replaced(walk.model, behind):
                    other, _ = walk.output(after, batch)
                kept = kept or measure(original, is_logits, causal)
                kept.update(original, other, ids, mask)
    found = [one for one in team.all(kept) if one is not None]
    for other in found[1:]:
        found[0].merge(other)  # type: ignore[arg-type]  # they are of one kind
    return found[0].to_dict() if found else None


@contextmanager
def _replaced(model: nn.Module, behind: Behind) -> Iterator[None]:
    kept = {name: model.get_parameter(name) for name in behind}
    for name, parameter in behind.items():
        _put(model, name, parameter)
    try:
        yield
    finally:
        for name, parameter in kept.items():
            _put(model, name, parameter)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)
