"""How far one model's predictions are from another's: perplexity, KL divergence and top-1 agreement, streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

ROWS = 32  # token positions turned into float32 log-probabilities at a time: a vocabulary is large


@dataclass
class Perplexity:
    """exp of the mean negative log-likelihood (nats) of next tokens."""

    nll: float = 0.0
    tokens: int = 0

    def update(self, logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add windows: logits [n, length, vocabulary] predict ids [n, length] one position later; no padding."""
        for rows, targets in _positions(logits, ids, mask):
            self.nll += F.cross_entropy(rows.float(), targets, reduction="sum").item()
            self.tokens += len(targets)

    @property
    def value(self) -> float:
        """The perplexity; NaN before any token."""
        return math.exp(min(self.nll / self.tokens, 700.0)) if self.tokens else math.nan


@dataclass
class Fidelity:
    """A quantized model against its original on the same text, position by position."""

    original: Perplexity = field(default_factory=Perplexity)
    quantized: Perplexity = field(default_factory=Perplexity)
    kl: list[float] = field(default_factory=list)
    agreeing: int = 0

    def update(
        self, original: torch.Tensor, quantized: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Add windows of logits [n, length, vocabulary] from both models; only per-token numbers are kept."""
        self.original.update(original, ids, mask)
        self.quantized.update(quantized, ids, mask)
        pairs = zip(_positions(original, ids, mask), _positions(quantized, ids, mask))
        for (p_rows, _), (q_rows, _) in pairs:
            p, q = F.log_softmax(p_rows.float(), -1), F.log_softmax(q_rows.float(), -1)
            self.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            # Plain numbers: a small tensor kept between large temporary ones would pin their memory.
            mass = p.exp()
            self.kl += (mass * (p - q)).masked_fill_(mass == 0, 0).sum(-1).tolist()  # -inf logits: 0 * log 0 is 0

    def to_dict(self) -> dict[str, float | int]:
        """KL(original || quantized) in nats per token, agreement as a fraction, both perplexities, tokens compared."""
        kl = torch.tensor(self.kl or [math.nan], dtype=torch.float64)
        return {
            "perplexity": self.quantized.value,
            "original_perplexity": self.original.value,
            "kl_mean": kl.mean().item(),
            "kl_median": kl.median().item(),
            "kl_p99": kl.quantile(0.99).item(),
            "top1_agreement": self.agreeing / max(self.original.tokens, 1),
            "tokens": self.original.tokens,
        }


def _positions(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None):  # type: ignore[no-untyped-def]
    """(rows [ROWS, vocabulary], targets [ROWS]) for every position that predicts a real token from a real one."""
    for window in range(len(ids)):
        targets = ids[window, 1:]
        rows = logits[window, :-1]
        if mask is not None:
            keep = mask[window, 1:] & mask[window, :-1]
            rows, targets = rows[keep], targets[keep]
        yield from zip(rows.split(ROWS), targets.split(ROWS))
