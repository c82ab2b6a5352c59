"""What models say about the same windows, token by token, and how sure a difference between two of them is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import neutral

POSITIONS = 128  # turned into float32 log-probabilities at a time
DRAWS = 10_000

Seen = dict[str, np.ndarray]


def dense_model(checkpoint: Path, original: Path) -> Any:
    """A checkpoint's weights in the original's architecture, in bfloat16; transformers sees nothing of quantization."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(original)
    weights = neutral.read(checkpoint)
    neutral.compare(weights, neutral.stored(original), bool(config.tie_word_embeddings))
    weights = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    kind = getattr(transformers, config.architectures[0])
    model, found = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.bfloat16, output_loading_info=True
    )
    if wrong := {key: list(names) for key, names in found.items() if names}:
        raise neutral.UnreadableError(f"{checkpoint}: transformers says {json.dumps(wrong, default=str)[:500]}")
    return model.eval()


@torch.no_grad()
def measure(
    original: Any,
    models: dict[str, Any],
    windows: np.ndarray,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Seen]:
    """For each model [windows, length - 1]: `nll` (nats), `kl` = KL(original || model), `same` top token.

    The original itself is in the result under "dense". Each window runs once through every model.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = {
        name: {"nll": [], "kl": [], "same": []} for name in ("dense", *models)
    }
    for done, window in enumerate(torch.from_numpy(windows).split(1)):
        targets = window[0, 1:].split(POSITIONS)
        before = [
            rows.float().log_softmax(-1) for rows in original(window, use_cache=False).logits[0, :-1].split(POSITIONS)
        ]
        for name in found:
            if name == "dense":
                after = before
            else:
                logits = models[name](window, use_cache=False).logits[0, :-1]
                after = [rows.float().log_softmax(-1) for rows in logits.split(POSITIONS)]
            for key, values in _compared(before, after, targets).items():
                found[name][key].append(values)
        tell(done + 1, len(windows))
    return {name: {key: np.stack(values) for key, values in seen.items()} for name, seen in found.items()}


def _compared(before: list[torch.Tensor], after: list[torch.Tensor], targets: tuple[torch.Tensor, ...]) -> Seen:
    parts: dict[str, list[torch.Tensor]] = {"nll": [], "kl": [], "same": []}
    for p, q, ids in zip(before, after, targets):
        parts["nll"].append(F.nll_loss(q, ids, reduction="none"))
        parts["kl"].append((p.exp() * (p - q)).nan_to_num_(nan=0.0).sum(-1))  # 0 * log 0 is 0
        parts["same"].append(p.argmax(-1) == q.argmax(-1))
    return {key: torch.cat(values).numpy() for key, values in parts.items()}


def summary(seen: Seen) -> dict[str, float]:
    """Perplexity, KL (mean, median, 99th percentile) in nats per token, and the share of same top tokens."""
    nll, kl = seen["nll"].astype(np.float64), seen["kl"].astype(np.float64)
    return {
        "perplexity": float(np.exp(nll.mean())),
        "nll": float(nll.mean()),
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(seen["same"].mean()),
        "tokens": int(nll.size),
    }


def difference(one: np.ndarray, other: np.ndarray, draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
    """The mean of one - other over [windows, tokens], and where 95% of it lies when windows are drawn again.

    A paired bootstrap: both are seen on the same windows, so what makes a window hard for both cancels out.
    """
    each = one.mean(1, dtype=np.float64) - other.mean(1, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(each), (draws, len(each)))
    low, high = np.quantile(each[drawn].mean(1), [0.025, 0.975])
    return {"mean": float(each.mean()), "low": float(low), "high": float(high)}
