"""`load(compile=True)`: every decode step of `generate` runs compiled, over a cache whose length does not change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CompileConfig, PreTrainedModel

from ..errors import UsageError

LENGTH = 2048  # tokens of the cache, unless the model ends before
COMPILERS = ("c++", "g++", "clang++", "cl")


def compile_steps(model: PreTrainedModel, length: int | None = None) -> None:
    """Let `generate` compile its decode step, at its first call, for a cache of `length` tokens (LENGTH at most else).

    A call that needs more gets it, for a compilation of its own. Raises UsageError where nothing can be compiled.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise UsageError(f"compile=True needs a C++ compiler, none of {', '.join(COMPILERS)} was found; install one")
    if not getattr(model, "_can_compile_fullgraph", False):
        raise UsageError(f"{type(model).__name__} cannot be compiled as a whole, transformers says; leave compile out")
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if spread:
        raise UsageError("compile=True needs the whole model on one device; leave out compile, or device_map")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    if length is not None and not 0 < length <= most:
        raise UsageError(f"cache_length={length} was asked for; this model can use 1 to {most}")
    settings = CompileConfig(fullgraph=True, mode="default")
    settings._compile_all_devices = True  # transformers would compile on a GPU only
    model.generation_config.compile_config = settings
    model.generation_config.cache_implementation = "static"
    model._previous_max_cache_length = length or min(LENGTH, most)  # `generate` makes no shorter one


@contextmanager
def as_stored(model: Any) -> Iterator[None]:
    """While it lasts, the model's generation settings do not say that its steps are compiled: it is saved without."""
    settings = getattr(model, "generation_config", None)
    compiled = getattr(settings, "compile_config", None) is not None
    kept = settings.cache_implementation if compiled else None
    if compiled:
        settings.cache_implementation = None
    try:
        yield
    finally:
        if compiled:
            settings.cache_implementation = kept
