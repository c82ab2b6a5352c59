"""How good a model is on a text, and how far it is from another one. Logits are streamed, never all kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .core.fidelity import Fidelity, Perplexity
from .errors import UsageError


def cut(ids: torch.Tensor, length: int, count: int | None = None) -> torch.Tensor:
    """int64 [windows, length]: the first `count` windows of a token stream, one after the other, the rest left out.

    Raises UsageError if the stream does not fill a single window.
    """
    if length < 2 or (count is not None and count < 1):
        raise UsageError(f"{count} windows of {length} tokens were asked for; ask for at least 1 of at least 2 tokens")
    whole = len(ids) // length
    if not whole:
        raise UsageError(f"the text has {len(ids)} tokens, one window needs {length}; give more text")
    return ids[: whole * length].reshape(whole, length)[:count]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: torch.Tensor,
    against: nn.Module | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Perplexity of `model` on windows int64 [n, length], every token predicted from those before it in its window.

    With `against`, the original, also its perplexity, KL(original || model) in nats per token and top-1 agreement.
    """
    started = time.perf_counter()
    alone, both = Perplexity(), Fidelity()
    for done, window in enumerate(windows.split(1)):
        logits = _logits(model, window)
        if against is None:
            alone.update(logits, window.to(logits.device))
        else:
            original = _logits(against, window).to(logits.device)
            if original.shape != logits.shape:
                raise UsageError(
                    f"the models know {logits.shape[-1]} and {original.shape[-1]} tokens; name the original of this one"
                )
            both.update(original, logits, window.to(logits.device))
        tell(done + 1, len(windows))
    figures = alone if against is None else both.quantized
    result: dict[str, Any] = {"perplexity": figures.value, "tokens": figures.tokens}
    if against is not None:
        compared = both.to_dict()
        result["against"] = {"perplexity": compared["original_perplexity"]}
        result |= {key: compared[key] for key in ("kl_mean", "kl_median", "kl_p99", "top1_agreement")}
    return result | {"seconds": time.perf_counter() - started}


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return model(input_ids=ids.to(device), use_cache=False).logits
