"""Whether a model's residual stream is rotated before it is quantized: where that is exact, and turns out to be better.

Rotated and as it is, the model is quantized from a part of the calibration windows, and the one that stays closer to
its original is quantized in earnest. What was found stands in the request of the run, by which one that is stopped goes
on with the same choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Source
from .learned import divergence
from .model.rotation import NotExact, Rotation, find
from .model.stream import Stream
from .model.walk import BlockWalk
from .pipeline import Run
from .places import unfinished
from .presets import TRIED_ON
from .request import Request
from .sensitivity import distance
from .trial import Tell, attempt, say

PROVEN_ON = 2  # held-out windows


def prepare(request: Request, opened: Callable[[], Source], out: Path, fresh: bool, tell: Tell) -> Callable[[], Source]:
    """What opens the source from here on, rotated or as it is; `Source.rotation` tells why.

    `fresh` makes the choice anew, even if an unfinished run in `out` has made it.
    """
    source = opened()
    run = request.run(source)
    try:
        rotation = _proven(run)
    except NotExact as found:
        why = str(found)
        say(tell, f"the residual stream is not rotated: {why}")
        return lambda: replace(opened(), rotation={"used": False, "why": why})

    def rotated(about: dict[str, Any] | None = None) -> Source:
        return replace(opened().changed(rotation.changes, "rotated"), rotation=about)

    about = None if fresh else unfinished(out).get("rotation")
    if not about or "tried" not in about:
        about = _tried(request, opened, rotated, rotation, out, tell)
    if about["used"]:
        return lambda: rotated(about)
    return lambda: replace(opened(), rotation=about)


def _proven(run: Run) -> Rotation:
    """Raises NotExact if the model cannot be rotated, or not all of it could be stored."""
    calibration, source = run.calibration, run.source
    assert calibration is not None
    text = calibration.held_out if len(calibration.held_out) else calibration.windows
    mask = None if text.mask is None else text.mask[:PROVEN_ON]

    def enter(walk: BlockWalk) -> Stream:
        return walk.stream(text.ids[:PROVEN_ON], mask, 1, text.more[:PROVEN_ON])

    def apart(original: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> tuple[float, int]:
        return divergence(original, other, mask, learning=False)[:2]

    rotation = find(run.walk, enter, apart)
    packed = run.plan.schemes
    for stored, made in source.made.items():
        if not made and stored.endswith(".weight"):
            raise NotExact(f"its files have {stored}, which it does not read, and which may read its hidden states")
        together = len(made) > 1 and {*made} & rotation.changes.keys()
        if together and any(name.rpartition(".")[0] not in packed for name in made):
            raise NotExact(f"{stored} of its files holds several tensors, and is not packed")
    return rotation


def _tried(
    request: Request, opened: Callable[[], Source], rotated: Callable[[], Source], rotation: Rotation, out: Path,
    tell: Tell,
) -> dict[str, Any]:  # fmt: skip
    """Quantize either from a part of the calibration windows; what is to be said of it, JSON-ready."""
    small = replace(request, preset="default", settings=request.settings, samples=min(TRIED_ON, request.samples))
    tried: dict[str, float] = {}
    for name, source in {"plain": opened, "rotated": rotated}.items():
        say(tell, f"trying the model {'rotated' if name == 'rotated' else 'as it is'}, on {small.samples} windows")
        report = attempt(small, source(), out.with_name(f".{out.name}.{name}"), tell)
        if report.fidelity is None:
            return {"used": False, "why": "no text is held out to compare on", "kl": rotation.kl}
        tried[name] = distance(report.fidelity)
    tried["rotated"] += rotation.kl  # which the trial does not see: it compares with the rotated original
    used = tried["rotated"] < tried["plain"]
    say(tell, f"KL {tried['plain']:.4f} as it is, {tried['rotated']:.4f} rotated: {'rotated' if used else 'as it is'}")
    return {"used": used, "kl": rotation.kl, "tried": tried}
