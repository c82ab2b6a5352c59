"""How fast this machine is at what quantizing does: measured in about a second, for forecasts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .core import gptq, rtn
from .core.hessian import Hessian
from .core.scheme import Scheme

SHORT = 0.15  # seconds per measurement


@dataclass(frozen=True)
class Rates:
    """All per second: floating-point operations of bfloat16 products, multiply-adds of X^T X, weights, and bytes.

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
    reading: float = 1e9
    writing: float = 5e8
    startup: float = 8.0

    def solving(self, inputs: int, outputs: int, with_data: bool) -> float:
        """Seconds for one layer."""
        weights = inputs * outputs
        if not with_data:
            return weights * self.rounding
        return weights * (inputs * self.square + self.linear) + inputs**3 * self.cubic


def measure(device: str, settings: gptq.Settings) -> Rates:
    """The rates of this machine's `device`, now."""
    x = torch.randn(2048, 1024, device=device).bfloat16()
    weight = torch.randn(2048, 1024, device=device).bfloat16() * 0.02
    scheme = Scheme(4, 128)
    products = 2 * x.numel() * len(weight) / _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    gram = len(x) * 1024**2 / _seconds(lambda: Hessian(1024, device).update(x), device)
    narrow, wide = Hessian(256, device), Hessian(1024, device)
    narrow.update(x[:, :256])
    wide.update(x)
    small = _seconds(lambda: gptq.solve(weight[:, :256], narrow, scheme, settings), device)
    large = _seconds(lambda: gptq.solve(weight, wide, scheme, settings), device)
    # Two equations: each is weights * (inputs * square + linear).
    per_small, per_large = small / (2048 * 256), large / (2048 * 1024)
    square = max((per_large - per_small) / 768, 1e-14)
    linear = max(per_small - 256 * square, 1e-10)
    rounding = _seconds(lambda: rtn.solve(weight, None, scheme), device) / weight.numel()
    logits = torch.randn(32, 32768, device=device)
    comparing = 2 * logits.numel() / _seconds(lambda: torch.log_softmax(logits.bfloat16().float(), -1).exp(), device)
    return Rates(products, gram, square, linear, 1 / gram / 3, rounding, comparing / 3)


def _seconds(work: Callable[[], object], device: str) -> float:
    """The best of a few runs."""
    best, ends = float("inf"), time.perf_counter() + SHORT
    while True:
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - started)
        if now > ends:
            return best
