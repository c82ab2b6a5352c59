"""How much is done for accuracy: three compositions of steps, each with all that the one before it does."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .core.gptq import Settings
from .errors import UsageError
from .training import Training

TRIED_ON = 32  # calibration windows, to see whether a model is better rotated


@dataclass(frozen=True)
class Preset:
    """What is done for accuracy, in a sentence and in settings.

    rotates   whether the residual stream is rotated, where that is exact and turns out to be better
    training  of scales and norms once all is quantized, None for none
    """

    does: str
    settings: Settings
    rotates: bool = False
    training: Training | None = None


FAST = Preset("GPTQ with searched scales, layer after layer", Settings())
DEFAULT = Preset(
    "makes up for the error of earlier layers, as far as held-out tokens bear it out",
    replace(FAST.settings, upstream=True, residual=True, token_weights=True),
)
BEST = Preset(
    "also rotates the residual stream where that helps, rounds again on refitted scales, lets biases absorb errors, "
    "and trains scales and norms against the original's answers",
    replace(DEFAULT.settings, outer=2, biases=True),
    rotates=True,
    training=Training(),
)
PRESETS = {"fast": FAST, "default": DEFAULT, "best": BEST}


def preset(name: str) -> Preset:
    """Raises UsageError for a name that is none."""
    if name not in PRESETS:
        raise UsageError(f"preset={name!r} was asked for; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
