"""How fast this machine is at what quantizing does: measured in about a second, for forecasts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from .core import gptq, rtn
from .core.hessian import Hessian
from .core.scheme import Scheme
from .formats.gptq import to_tensors
from .model.inputs import Member
from .solving import solve

SHORT = 0.15  # seconds per measurement, at least
FEW = 64  # tokens: what solving takes does not depend on them


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
    return Rates(products, gram, square, linear, 1 / gram / 3, rounding, comparing / 3)


def _solve(weight: torch.Tensor, x: torch.Tensor, scheme: Scheme, settings: gptq.Settings) -> None:
    """All that happens to a layer once its inputs are counted: solved, judged, put back and packed."""
    hessian = Hessian(x.shape[1], x.device)
    hessian.update(x[: 2 * FEW])
    member = Member(["layer"], hessian, hessian.tokens)
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
