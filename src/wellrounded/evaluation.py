"""How good a model is on a text, and how far it is from another one. Logits are streamed, never all kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .core.fidelity import Fidelity, Likeness, Perplexity, measure
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
    Models that continue no text have no perplexity, and those without a head only the cosine of their embeddings: they
    need `against`.
    """
    started = time.perf_counter()
    alone = Perplexity()
    both: Fidelity | Likeness | None = None
    causal = getattr(model, "can_generate", lambda: True)()
    if against is None and not causal:
        raise UsageError(
            f"{type(model).__name__} predicts no next tokens; compare it with its original: --against MODEL"
        )
    for done, window in enumerate(windows.split(1)):
        output, is_logits = _output(model, window)
        if against is None:
            alone.update(output, window.to(output.device))
        else:
            original = _output(against, window)[0].to(output.device)
            if original.shape != output.shape:
                raise UsageError(
                    f"the models know {output.shape[-1]} and {original.shape[-1]} tokens; name the original of this one"
                )
            both = both or measure(output, is_logits, causal)
            both.update(original, output, window.to(output.device))
        tell(done + 1, len(windows))
    if both is None:
        result: dict[str, Any] = {"perplexity": alone.value, "tokens": alone.tokens}
    else:
        result = both.to_dict()
        if "perplexity" in result:
            result["against"] = {"perplexity": result.pop("original_perplexity")}
    return result | {"seconds": time.perf_counter() - started}


def _output(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The logits, and True; or, of a model without a head, its last hidden states."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    causal = getattr(model, "can_generate", lambda: True)()
    output = model(input_ids=ids.to(device), **({"use_cache": False} if causal else {}))
    logits = getattr(output, "logits", None)
    return (output[0], False) if logits is None else (logits, True)
