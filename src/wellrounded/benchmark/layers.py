"""One layer, every kernel, the dense product beside it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .. import kernels
from ..core.scheme import Scheme
from ..core.weight import QuantizedWeight
from ..errors import UsageError
from ..formats import gptq as gptq_format
from ..native import on_large_pages
from ..ops import dense_weight
from ..request import chosen_device
from .clock import Clock, alternate, machine, read_bandwidth

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 2, 4, 8, 32, 512)
COLD_BYTES = 256 * 2**20  # of each candidate: by the time it comes round again, no usual cache still holds it
MOST_COPIES = 4096  # so that tiny layers do not spend their time on being copied
BURST = 20  # calls between two looks at a GPU's clock
VERSION = "gptq_v2"

Tensors = list[torch.Tensor]


class Candidate:
    """A way to multiply by a weight, which takes another copy of it at each call."""

    def __init__(self, name: str, tensors: Tensors, stored: Stored, multiply: Callable[..., torch.Tensor]) -> None:
        self.name, self.stored, self.multiply = name, stored, multiply
        self.own_bytes = _bytes(tensors)
        self.turns = _turns(tensors, stored.cold)
        self.restores = False  # whether the latest calls asked for the dense weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, next(self.turns), self._dense)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        self.restores = True
        return self.stored.dense(dtype)

    @property
    def bytes(self) -> int:
        """Of the weight as it is read: the kernel's own layout, or the file's where the dense weight is restored."""
        return self.stored.bytes if self.restores else self.own_bytes


class Stored:
    """A layer's tensors as a file holds them, for the kernels that read those."""

    def __init__(self, weight: QuantizedWeight, cold: bool) -> None:
        tensors = gptq_format.to_tensors(weight, VERSION)
        self.scheme, self.cold = weight.scheme, cold
        self.keys, self.bytes = list(tensors), _bytes(list(tensors.values()))
        self.turns = _turns(list(tensors.values()), cold)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, as QuantLinear restores it."""
        return dense_weight(dict(zip(self.keys, next(self.turns))), self.scheme, VERSION, dtype)


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _turns(tensors: Tensors, cold: bool) -> Iterator[Tensors]:
    """The tensors again and again: cold, in so many copies that each has left the caches when its turn comes."""
    count = min(-(-COLD_BYTES // max(_bytes(tensors), 1)), MOST_COPIES) if cold and tensors else 1
    return itertools.cycle([[_copy(tensor) for tensor in tensors] for _ in range(count)])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return on_large_pages(torch.empty_like(tensor)).copy_(tensor)  # every candidate's, as the native core's are anyway


def random_weight(outputs: int, inputs: int, scheme: Scheme, device: str) -> QuantizedWeight:
    """Codes, scales and zero points of a layer that nobody trained."""
    generator = torch.Generator().manual_seed(0)
    groups = scheme.groups(inputs)
    codes = torch.randint(0, scheme.max_code + 1, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(outputs, groups, generator=generator) + 0.5) / (scheme.max_code * inputs**0.5)
    zeros = torch.full((outputs, groups), scheme.midpoint, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, zeros.shape, generator=generator, dtype=torch.uint8)
    index = scheme.trivial_group_index(inputs)
    return QuantizedWeight(codes.to(device), scales.half().to(device), zeros.to(device), index.to(device), scheme)


def candidates(weight: QuantizedWeight, cold: bool) -> tuple[list[Candidate], dict[str, str]]:
    """The dense product in bfloat16 and every kernel that can, and what the others say why they cannot."""
    outputs, inputs = weight.shape
    device, dtype = weight.codes.device.type, torch.bfloat16
    need = kernels.Need(weight.scheme, inputs, outputs, device, dtype, weight.evenly_grouped)
    stored = Stored(weight, cold)
    dense = Candidate("dense", [weight.dequantize(dtype)], stored, lambda x, tensors, _: F.linear(x, tensors[0]))
    found, refused = [dense], {}
    for kernel in kernels.table():
        if reason := kernel.refuses(need):
            refused[kernel.NAME] = reason
        else:
            found.append(Candidate(kernel.NAME, kernel.prepare(weight, need), stored, kernel.matmul))
    return found, refused


@torch.no_grad()
def compare_layers(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    *,
    scheme: Scheme | None = None,
    cold: bool = True,
    seconds: float = 0.5,
    device: str = "auto",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Every kernel against the dense product in bfloat16, for each shape (outputs, inputs) and number of rows.

    With `cold` weights come from memory, as in a model whose layers take turns, not from a cache; `seconds` is spent
    on each shape and number of rows. Raises UsageError for a shape that cannot be packed.
    """
    scheme, device = scheme or Scheme(), chosen_device(device)
    clock = Clock(device)
    for outputs, inputs in shapes:
        if reason := scheme.refuses(inputs, outputs):
            raise UsageError(f"{outputs}x{inputs}: {reason}; give another shape")
    speed = read_bandwidth(device, seconds)
    lines: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for number, (outputs, inputs) in enumerate(shapes):
        place = {"out": outputs, "in": inputs}
        found, reasons = candidates(random_weight(outputs, inputs, scheme, device), cold)
        refused += [{**place, "kernel": name, "refuses": reason} for name, reason in reasons.items()]
        for done, count in enumerate(rows, number * len(rows) + 1):
            lines += [
                {**place, "rows": count, **line} for line in _compare(found, count, inputs, clock, seconds, speed)
            ]
            tell(done, len(shapes) * len(rows))
    return {
        **machine(device), "read_gb_s": speed / 1e9, "cold": cold, "scheme": str(scheme), "dtype": "bfloat16",
        "layers": lines, "refused": refused,
    }  # fmt: skip


def _compare(
    found: list[Candidate], rows: int, inputs: int, clock: Clock, seconds: float, speed: float
) -> Iterator[dict[str, Any]]:
    x = torch.randn(rows, inputs, device=clock.device).bfloat16()
    for candidate in found:
        candidate.restores = False
    times = BURST if clock.gpu else 1
    samples = alternate([lambda c=c: clock(lambda: c(x), times) for c in found], seconds)  # type: ignore[misc]
    medians = [statistics.median(seen) for seen in samples]
    for candidate, median in zip(found, medians):
        yield {
            "kernel": candidate.name,
            "microseconds": median * 1e6,
            "speedup": medians[0] / median,
            "bytes": candidate.bytes,
            "gb_s": candidate.bytes / median / 1e9,
            "bandwidth_share": candidate.bytes / median / speed,
            "restores": candidate.restores,
            "samples": len(samples[0]),
        }
