"""LLM weights, well rounded.

    import wellrounded as wr
    report = wr.quantize("MODEL", "out", bits=4)
    model = wr.load("out")

Importing costs nothing and changes nothing: torch and transformers are imported when something is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "quantize": "api",
    "evaluate": "api",
    "forecast": "api",
    "merge": "api",
    "load": "hf.load",
    "register": "hf.register",
    "unregister": "hf.register",
    "parse": "calibration",
    "Scheme": "core.scheme",
    "Recipe": "core.recipe",
    "Rule": "core.recipe",
    "Settings": "core.gptq",
    "WellRoundedError": "errors",
    "UsageError": "errors",
    "CheckpointError": "errors",
    "NumericsError": "errors",
    "OutOfMemory": "errors",
}

__all__ = [
    "CheckpointError", "NumericsError", "OutOfMemory", "Recipe", "Rule", "Scheme", "Settings", "UsageError",
    "WellRoundedError", "__version__", "evaluate", "forecast", "load", "merge", "parse", "quantize", "register",
    "unregister",
]  # fmt: skip

if TYPE_CHECKING:
    from .api import evaluate, forecast, merge, quantize
    from .calibration import parse
    from .core.gptq import Settings
    from .core.recipe import Recipe, Rule
    from .core.scheme import Scheme
    from .errors import CheckpointError, NumericsError, OutOfMemory, UsageError, WellRoundedError
    from .hf.load import load
    from .hf.register import register, unregister


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
