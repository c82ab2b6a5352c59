"""What learns in a quantized model, its codes frozen: scales of groups and gains of norms; and what from: a divergence.

Both are used as they will be stored, so that what is measured is what is written, and the rounding to the stored dtype
is passed straight through: the slope of what is stored is taken for that of the exact value, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from .core.weight import QuantizedWeight

ROWS = 32  # token positions turned into float32 log-probabilities at a time: a vocabulary is large
PIECE = 2**20  # weights that exist in float32 at a time: they stay in a CPU's cache
SMALLEST, LARGEST = 2.0**-24, 65504.0  # what float16 can hold
BETAS, EPSILON = (0.9, 0.95), 1e-8


class Scales:
    """The scales of one quantized weight, `s * exp(value)`, used as they will be stored, in float16.

    EfficientQAT's E2E-QP (Chen et al. 2024, 2407.11062) trains the scales alone, w = s (c - z), so that dL/ds = sum of
    dL/dw (c - z) over a group; multiplied instead of added to, no scale changes its sign or becomes zero, and one rate
    serves all. Rounding is passed straight through.

    value  float32 [out, groups], zeros to begin with;  slope  the same, dL/dvalue of all that was learned so far
    """

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        self.weight = weight
        self.value = torch.zeros(weight.scales.shape, device=device)
        self.slope = torch.zeros_like(self.value)
        rest = weight.shape[1] % weight.scheme.columns_per_group(weight.shape[1])
        self._even = weight.trivially_grouped and not rest

    def exact(self) -> torch.Tensor:
        """float32 [out, groups], before they are rounded."""
        return self.weight.scales.to(self.value.device).float() * self.value.exp()

    def stored(self) -> torch.Tensor:
        """float16 [out, groups]; those that were zero stay so, no other becomes zero or infinite."""
        exact = self.exact()
        near = exact.abs().clamp(SMALLEST, LARGEST).copysign(exact)
        return torch.where(exact == 0, exact, near).half()

    def quantized(self, stored: torch.Tensor) -> QuantizedWeight:
        """The weight with these scales, which lie wherever its codes do."""
        return replace(self.weight, scales=stored.to(self.weight.scales.device))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]: what `QuantizedWeight.dequantize(dtype)` gives, bit for bit, on the device of the scales."""
        stored = self.stored()
        if not self._even:
            return self.quantized(stored).dequantize(dtype).to(self.value.device)
        dense = torch.empty(self.weight.shape, dtype=dtype, device=self.value.device)
        for rows in self._pieces():
            grouped = dense[rows].view(-1, *self._groups)
            grouped.copy_(self._steps(rows).mul_(stored[rows].float().unsqueeze(-1)))
        return dense

    def learn(self, slope: torch.Tensor) -> None:
        """Add what dL/dW, [out, in], means for the scales."""
        exact = self.exact()
        for rows in self._pieces():
            if self._even:
                group = self._steps(rows).mul_(slope[rows].view(-1, *self._groups)).sum(-1)
            else:
                index = self.weight.group_index.to(slope.device).long()
                codes, zeros = (t[rows].to(slope.device).float() for t in (self.weight.codes, self.weight.zeros))
                product = (codes - zeros[:, index]) * slope[rows].float()
                group = torch.zeros_like(exact[rows]).index_add_(1, index, product)
            self.slope[rows].addcmul_(group, exact[rows])

    @property
    def _groups(self) -> tuple[int, int]:
        groups = self.value.shape[1]
        return groups, self.weight.shape[1] // groups

    def _steps(self, rows: slice) -> torch.Tensor:
        """float32 [rows, groups, columns of a group]: codes minus zeros."""
        codes, zeros = (t[rows].to(self.value.device) for t in (self.weight.codes, self.weight.zeros))
        return codes.view(-1, *self._groups).float().sub_(zeros.float().unsqueeze(-1))

    def _pieces(self) -> Iterator[slice]:
        outputs, inputs = self.weight.shape
        size = PIECE if self.value.device.type == "cpu" else 64 * PIECE  # a GPU has no time for small ones
        height = max(1, size // inputs)
        return (slice(start, start + height) for start in range(0, outputs, height))


class Gain:
    """A parameter of a norm, float32, used as it will be stored: rounded to the source's dtype, straight through."""

    def __init__(self, source: torch.Tensor, device: torch.device) -> None:
        self.dtype = source.dtype
        self.value = source.to(device, torch.float32, copy=True)
        self.slope = torch.zeros_like(self.value)

    def stored(self) -> torch.Tensor:
        """[size], in the source's dtype."""
        return self.value.to(self.dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[size], as a model of this dtype sees it."""
        return self.stored().to(dtype)

    def learn(self, slope: torch.Tensor) -> None:
        """Add a slope, [size]."""
        self.slope += slope


Learned = Scales | Gain


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Modules that share their weight with one before them, and which: to be asked before any block was released."""
    first: dict[int, str] = {}
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    owners = {name: first.setdefault(id(weight), name) for name, weight in weights.items() if weight is not None}
    return {name: owner for name, owner in owners.items() if owner != name}


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalizes and scales, as its class says: LayerNorm, LlamaRMSNorm, and so on."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


@dataclass
class Moments:
    """Adam's two moments of one learned value (Kingma and Ba, 2015, algorithm 1), as AdamW without decay."""

    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, learned: Learned) -> Moments:
        """Those before the first step."""
        return cls(torch.zeros_like(learned.value), torch.zeros_like(learned.value))

    def step(self, learned: Learned, rate: float, number: int, tokens: int) -> None:
        """Take step `number`, counted from 1, down the slope, which is a sum over tokens; it is zero afterwards."""
        slope = learned.slope.div_(max(tokens, 1))
        self.first.lerp_(slope, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
        size = (self.second / (1 - BETAS[1] ** number)).sqrt_().add_(EPSILON)
        learned.value.addcdiv_(self.first, size, value=-rate / (1 - BETAS[0] ** number))
        slope.zero_()


@torch.no_grad()
def divergence(
    original: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, learning: bool
) -> tuple[float, int, torch.Tensor]:
    """KL(original || other) summed over positions that are no padding, how many, and its slope by the other's logits.

    Logits [windows, length, vocabulary], or [windows, vocabulary]; mask bool [windows, length]. The slope is the
    difference of both distributions, in the logits' dtype; it is computed if something is to be learned.
    """
    p_rows, q_rows = original.flatten(0, -2), other.flatten(0, -2)
    real = torch.ones(len(p_rows), dtype=torch.bool, device=other.device)
    if mask is not None and mask.numel() == len(real):
        real = mask.flatten()
    slope = torch.empty_like(q_rows if learning else q_rows[:0])
    total = torch.zeros((), dtype=torch.float64, device=other.device)
    for start in range(0, len(p_rows), ROWS):
        rows = slice(start, start + ROWS)
        p, q = (F.log_softmax(logits[rows].float(), -1) for logits in (p_rows, q_rows))
        mass = p.exp()
        kl = p.sub_(q).mul_(mass).masked_fill_(mass == 0, 0).sum(-1)  # -inf logits: 0 * log 0 is 0
        total += kl.masked_fill_(~real[rows], 0).sum()
        if learning:
            slope[rows] = q.exp_().sub_(mass).mul_(real[rows].unsqueeze(-1))
    return total.item(), int(real.sum()), slope.view_as(other) if learning else slope
