"""How fast this machine is at what quantizing does: measured in about a second, for forecasts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from .core import gptq, rtn
from .core.scheme import Scheme
from .formats.gptq import to_tensors
from .model.inputs import HERE, Member
from .shapes import Block
from .solving import solve

SHORT = 0.15  # seconds per measurement, at least
FEW = 64  # tokens: what solving takes does not depend on them


@dataclass(frozen=True)
class Rates:
    """All per second: floating-point operations of bfloat16 products, multiply-adds of sums, weights, and bytes.

    gram, drift     multiply-adds [tokens, n, n] of X^T X, of which half are done, and of (X - X_q)^T X_q
    square, linear  seconds of solving per weight and input column, and per weight;  cubic  per input column cubed
    rounding        seconds of plain rounding per weight
    startup         seconds until work begins
    """

    products: float
    gram: float
    square: float
    linear: float
    cubic: float
    rounding: float
    comparing: float
    drift: float
    reading: float = 1e9
    writing: float = 5e8
    startup: float = 8.0

    def solving(self, inputs: int, outputs: int, with_data: bool) -> float:
        """Seconds for one layer."""
        weights = inputs * outputs
        if not with_data:
            return weights * self.rounding
        return weights * (inputs * self.square + self.linear) + inputs**3 * self.cubic

    def running(self, block: Block, tokens: float, context: int) -> float:
        """Seconds for tokens to go through a block; `context` is a window's length times a hidden state's size."""
        return tokens * 2 * (block.active + context) / self.products

    def answering(self, tokens: float, hidden: int, vocabulary: int) -> float:
        """Seconds to compute and to compare the logits of so many tokens."""
        return tokens * vocabulary * (2 * hidden / self.products + 1 / self.comparing)


def measure(device: str, settings: gptq.Settings) -> Rates:
    """The rates of this machine's `device`, now."""
    x = torch.randn(2048, 1024, device=device).bfloat16()
    weight = torch.randn(2048, 1024, device=device).bfloat16() * 0.02
    scheme = Scheme(4, 128)
    products = 2 * x.numel() * len(weight) / _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    rows, moments = len(x) * 1024**2, HERE.moments(1024, x.device)
    gram = rows / (counting := _seconds(lambda: moments.hessian.update(x), device))
    drift = rows / max(_seconds(lambda: moments.update(x, x), device) - counting, counting / 4)
    small, large = (
        _seconds(partial(_solve, weight[:, :inputs], x[:, :inputs], scheme, settings), device) for inputs in (256, 1024)
    )
    # Two equations: each is weights * (inputs * square + linear).
    per_small, per_large = small / (2048 * 256), large / (2048 * 1024)
    square = max((per_large - per_small) / 768, 1e-14)
    linear = max(per_small - 256 * square, 1e-10)
    rounding = _seconds(lambda: rtn.solve(weight, None, scheme), device) / weight.numel()
    logits = torch.randn(32, 32768, device=device)
    comparing = 2 * logits.numel() / _seconds(lambda: torch.log_softmax(logits.bfloat16().float(), -1).exp(), device)
    factors = 2 if settings.paired else 1
    return Rates(products, gram, square, linear, factors / gram / 3, rounding, comparing / 3, drift)


def _solve(weight: torch.Tensor, x: torch.Tensor, scheme: Scheme, settings: gptq.Settings) -> None:
    """All that happens to a layer once its inputs are counted: solved, judged, put back and packed."""
    moments, held_out = (HERE.moments(x.shape[1], x.device) for _ in range(2))
    for one in (moments, held_out):
        one.update(x[:FEW], x[FEW : 2 * FEW])
    moments.merge(held_out)
    more = (moments, held_out) if settings.paired else ()
    member = Member(["layer"], moments.hessian, moments.tokens, *more)
    for quantized, _ in solve([["layer"]], [[weight]], [member], scheme, settings, True):
        quantized.dequantize(torch.bfloat16)
        to_tensors(quantized, "gptq")


def _seconds(work: Callable[[], object], device: str) -> float:
    """The middle of a few runs, the first of which does not count."""
    work()
    taken: list[float] = []
    while sum(taken) < SHORT or len(taken) < 3:
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken)
