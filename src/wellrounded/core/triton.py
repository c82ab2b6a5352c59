"""The solver's inner loops on GPUs, in Triton: what the native core does on CPUs, each as one launch.

    search       core.grid's, of all groups at once, weights in registers while candidates are tried
    sweep        a panel of core.rounding's: a program has some outputs, and goes through the columns by itself
    add_gram     core.hessian's X^T X: tensor cores, sums in float32, nothing below the diagonal
    add_product  core.moments' A^T B

Each is tried once per device, on small numbers, against the torch code that defines it. Where one is wrong, or does not
run, torch does it all, and a warning says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

WIDEST = 2**14  # columns of a group that fit into a program's registers
HALVES = (torch.bfloat16, torch.float16)


def serves(*tensors: torch.Tensor) -> bool:
    """Whether there are programs for these: contiguous float32 on one GPU on which they are right."""
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors) and _right(*tensors)


def search(
    weight: torch.Tensor, energy: torch.Tensor, bits: int, symmetric: bool, shares: list[float]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scales (already float16-exact) and zeros, float32 [..., rows, groups]: core.grid's search among these shares.

    weight is [..., rows, groups, width], energy [..., groups, width]; None if groups are too wide.
    """
    rows, groups, width = weight.shape[-3:]
    if width > WIDEST:
        return None
    scales, zeros = weight.new_empty(weight.shape[:-1]), weight.new_empty(weight.shape[:-1])
    tall, wide = max(1, 2048 // _power(width)), _power(width)
    grid = -(-rows // tall), groups, weight.numel() // max(rows * groups * width, 1)
    with torch.cuda.device_of(weight):  # triton launches on the current one
        _programs().search[grid](
            weight, energy, weight.new_tensor(shares), scales, zeros, rows, groups, width,
            SHARES=len(shares), BITS=bits, SYMMETRIC=symmetric, ROWS=tall, WIDTH=wide,
            num_warps=4 if wide <= 4096 else 8,
        )  # fmt: skip
    return scales, zeros


def sweep(
    weights: torch.Tensor,
    target: torch.Tensor,
    feedback: torch.Tensor,
    scales: torch.Tensor,
    low: torch.Tensor,
    most: int,
    steps: torch.Tensor,
) -> torch.Tensor:
    """core.rounding.sweep_panel: all [members, columns, out], but that `target` is left as it is.

    weights, target and steps lie alike; feedback is [members, columns, columns].
    """
    members, columns, outputs = weights.shape
    errors = weights.new_empty(members, columns, outputs)
    wide = 32
    with torch.cuda.device_of(weights):
        _programs().sweep[-(-outputs // wide), members](
            weights, target, steps, feedback, scales.contiguous(), low.contiguous(), errors, outputs, most,
            weights.stride(0), feedback.stride(0), feedback.stride(1),
            COLUMNS=columns, PANEL=_power(columns), OUTPUTS=wide, num_warps=1,
        )  # fmt: skip
    return errors


def add_gram(rows: torch.Tensor, upper: torch.Tensor) -> bool:
    """upper float32 [n, n] += rows^T rows, of bfloat16 or float16 [count, n]; False if that is not for this device.

    Products are exact, sums float32; entries below the diagonal are undefined afterwards.
    """
    return _multiplies(rows, rows, upper) and _multiply(rows, rows, upper, triangle=True)


def add_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> bool:
    """total float32 [m, n] += a^T b for a [count, m] and b [count, n]; False, dtypes and sums as above."""
    return _multiplies(a, b, total) and _multiply(a, b, total, triangle=False)


def _multiplies(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> bool:
    return a.dtype in HALVES and a.dtype == b.dtype and a.device == b.device == total.device and serves(total)


def _multiply(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor, triangle: bool) -> bool:
    assert len(a) == len(b) and total.shape == (a.shape[1], b.shape[1])
    a, b = (each if each.stride(1) == 1 else each.contiguous() for each in (a, b))
    lefts, rights = total.shape
    tile = 128 if min(lefts, rights) >= 128 else 32
    with torch.cuda.device_of(total):
        _programs().product[-(-lefts // tile), -(-rights // tile)](
            a, b, total, len(a), lefts, rights, a.stride(0), b.stride(0),
            TRIANGLE=triangle, LEFTS=tile, RIGHTS=tile, TOKENS=64 if tile == 128 else 32,
            WIDE=interpreted() and a.dtype == torch.bfloat16, num_warps=8 if tile == 128 else 4,
        )  # fmt: skip
    return True


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def interpreted() -> bool:
    """Whether Triton's programs run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _programs() -> Any:
    """What runs on the device, None without triton; loaded when it is needed, for that takes a while."""
    try:
        from . import triton_programs
    except ImportError:
        return None
    return triton_programs


def _right(*tensors: torch.Tensor) -> bool:
    device = tensors[0].device
    if any(t.device != device for t in tensors) or not (device.type == "cuda" or interpreted()):
        return False
    return _programs() is not None and wrong(device) is None


@cache
def wrong(device: torch.device) -> str | None:
    """What is not right on this device, which is warned of as well; None if all is."""
    try:
        found = next((f"{name} computes something else" for name, good in _tried(device) if not good), None)
    except Exception as error:  # whatever a compiler or a driver raises
        found = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    if found:
        text = f"{device}: layers are solved without Triton's programs, and slower: {found}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return found


def _tried(device: torch.device) -> Iterator[tuple[str, bool]]:
    """What each computes for some small numbers, and whether that is what it should."""
    from . import grid, rounding  # which ask for what is here
    from .scheme import Scheme

    random = torch.Generator().manual_seed(0)
    scheme, columns, outputs = Scheme(4, 32), 96, 48

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device)

    weight, energy = some(2, outputs, 3, 32), some(2, 3, 32).square()
    mine, losses = search(weight, energy, scheme.bits, scheme.symmetric, grid._shares(scheme, 32)), []
    assert mine is not None
    for scales, zeros in (grid.search_rows(weight, energy, scheme, 32), mine):
        steps = (weight / scales[..., None]).round_().clamp_(-zeros[..., None], scheme.max_code - zeros[..., None])
        losses.append(((weight - steps * scales[..., None]).square() * energy[:, None]).sum())
    yield "search", bool((losses[1] - losses[0]).abs() < 1e-3 * losses[0])

    weights, feedback = some(2, columns, outputs), 0.1 * some(2, columns, columns)
    about = some(2, columns, outputs).abs() + 0.1, torch.full_like(weights, -float(scheme.midpoint)), scheme.max_code
    found = []
    for by in (rounding.sweep_panel, sweep):
        steps = torch.zeros_like(weights)
        found.append((steps, by(weights, weights.clone(), feedback, *about, steps)))
    same = (found[0][0] == found[1][0]).float().mean()  # one that falls between two steps may move what comes after it
    left = weights - found[1][0] * about[0]
    yield "sweep", bool(same > 0.98) and bool((left - found[1][1]).abs().max() < 1e-5)

    for count in (40, 150):
        a, b = (some(100, count).bfloat16() for _ in range(2))
        for name, left, triangle in (("add_gram", b, True), ("add_product", a, False)):
            total = torch.zeros(count, count, device=device)
            _multiply(left, b, total, triangle)
            off = total.double() - left.double().T @ b.double()
            yield name, bool((off.triu() if triangle else off).abs().max() < 1e-4)
