"""How far what one model says is from what another says, streamed.

Of models that continue a text: perplexity, KL divergence and top-1 agreement. Of those that fill gaps or name classes:
the latter two. Of those that only embed a text: the angle between the embeddings.
"""

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

    def merge(self, other: Perplexity) -> None:
        """Add what another one has seen."""
        self.nll += other.nll
        self.tokens += other.tokens

    @property
    def value(self) -> float:
        """The perplexity; NaN before any token."""
        return math.exp(min(self.nll / self.tokens, 700.0)) if self.tokens else math.nan


@dataclass
class Fidelity:
    """A quantized model against its original on the same text, position by position.

    Where they are not `causal`, every position counts, there are no next tokens to predict, and logits may be one row
    per window.
    """

    causal: bool = True
    original: Perplexity = field(default_factory=Perplexity)
    quantized: Perplexity = field(default_factory=Perplexity)
    kl: list[float] = field(default_factory=list)
    agreeing: int = 0

    def update(
        self, original: torch.Tensor, quantized: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Add windows of logits [n, length, vocabulary] from both models; only per-token numbers are kept."""
        if self.causal:
            self.original.update(original, ids, mask)
            self.quantized.update(quantized, ids, mask)
            places = [[rows for rows, _ in _positions(logits, ids, mask)] for logits in (original, quantized)]
        else:
            places = [_rows(logits, mask) for logits in (original, quantized)]
        for p_rows, q_rows in zip(*places):
            p, q = F.log_softmax(p_rows.float(), -1), F.log_softmax(q_rows.float(), -1)
            self.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            # Plain numbers: a small tensor kept between large temporary ones would pin their memory.
            mass = p.exp()
            self.kl += (mass * (p - q)).masked_fill_(mass == 0, 0).sum(-1).tolist()  # -inf logits: 0 * log 0 is 0

    def merge(self, other: Fidelity) -> None:
        """Add what another one has seen."""
        self.original.merge(other.original)
        self.quantized.merge(other.quantized)
        self.kl += other.kl
        self.agreeing += other.agreeing

    def to_dict(self) -> dict[str, float | int]:
        """KL(original || quantized) in nats per token, agreement as a fraction, both perplexities, tokens compared."""
        kl = torch.tensor(self.kl or [math.nan], dtype=torch.float64)
        predicted = {"perplexity": self.quantized.value, "original_perplexity": self.original.value}
        return {
            **(predicted if self.causal else {}),
            "kl_mean": kl.mean().item(),
            "kl_median": kl.median().item(),
            "kl_p99": kl.quantile(0.99).item(),
            "top1_agreement": self.agreeing / max(len(self.kl), 1),
            "tokens": len(self.kl),
        }


@dataclass
class Likeness:
    """How far the embeddings of a text have turned: the cosine between those of two models, averaged over the text."""

    tokens: int = 0
    cosines: list[float] = field(default_factory=list)  # one per window, of the mean over its tokens
    each: float = 0.0

    def update(
        self, original: torch.Tensor, quantized: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Add windows of hidden states [n, length, size] from both models."""
        live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        for before, after, real in zip(original.float(), quantized.float(), live):
            before, after = before[real], after[real]
            self.each += F.cosine_similarity(before, after).sum().item()
            self.tokens += len(before)
            self.cosines.append(F.cosine_similarity(before.mean(0), after.mean(0), dim=0).item())

    def merge(self, other: Likeness) -> None:
        """Add what another one has seen."""
        self.tokens += other.tokens
        self.cosines += other.cosines
        self.each += other.each

    def to_dict(self) -> dict[str, float | int]:
        """Cosine of window embeddings, mean and worst, and of single tokens, mean; tokens compared."""
        pooled = self.cosines or [math.nan]
        return {
            "cosine_mean": sum(pooled) / len(pooled),
            "cosine_worst": min(pooled),
            "cosine_tokens": self.each / max(self.tokens, 1),
            "tokens": self.tokens,
        }


def measure(output: torch.Tensor, is_logits: bool, causal: bool) -> Fidelity | Likeness:
    """What compares models whose output is like this."""
    return Fidelity(causal and output.ndim == 3) if is_logits else Likeness()


def _rows(logits: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """[ROWS, vocabulary] pieces of every position that is no padding, or of every window."""
    real = logits if logits.ndim == 2 else logits.flatten(0, 1) if mask is None else logits[mask]
    return list(real.split(ROWS))


def _positions(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None):  # type: ignore[no-untyped-def]
    """(rows [ROWS, vocabulary], targets [ROWS]) for every position that predicts a real token from a real one.

    Ids beyond the vocabulary stand for pictures, which nobody predicts.
    """
    for window in range(len(ids)):
        targets = ids[window, 1:]
        keep = targets < logits.shape[-1]
        if mask is not None:
            keep &= mask[window, 1:] & mask[window, :-1]
        rows, targets = logits[window, :-1][keep], targets[keep]
        yield from zip(rows.split(ROWS), targets.split(ROWS))
