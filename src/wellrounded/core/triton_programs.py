"""The programs of core/triton.py, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-24)  # as core.grid has them
LARGEST = tl.constexpr(65504.0)
WHOLE = tl.constexpr(1.5 * 2.0**23)  # the sum of this and anything below 2^22 has no room for fractions


@triton.jit
def _round(x, least, most):
    """The nearest whole number, even ones where two are as near, of at least `least` and at most `most`."""
    x = tl.minimum(tl.maximum(x, least - 1), most + 1)
    return tl.minimum(tl.maximum((x + WHOLE) - WHOLE, least), most)


@triton.jit
def sweep(
    weights, target, steps, feedback, scales, low, errors, outputs, most, of_member, of_feedback, of_row,
    COLUMNS: tl.constexpr, PANEL: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Round COLUMNS columns of OUTPUTS outputs of one member; what is owed to later columns stays in registers.

    of_member and of_feedback are the strides from member to member of the first three and of `feedback`, whose rows are
    `of_row` apart; the others are contiguous.
    """
    n, member = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1).to(tl.int64)
    here, p = n < outputs, tl.arange(0, PANEL)
    first, own = member * of_member + n, member * COLUMNS * outputs + n
    inside = (p[:, None] < COLUMNS) & here[None, :]
    wanted = tl.load(target + p[:, None] * outputs + first[None, :], mask=inside, other=0.0)
    for j in range(COLUMNS):
        mine = tl.sum(tl.where(p[:, None] == j, wanted, 0.0), 0)
        weight = tl.load(weights + j * outputs + first, mask=here, other=0.0)
        scale = tl.load(scales + j * outputs + own, mask=here, other=1.0)
        least = tl.load(low + j * outputs + own, mask=here, other=0.0)
        step = _round(tl.div_rn(mine, scale), least, least + most)
        error = weight - step * scale
        tl.store(steps + j * outputs + first, step, mask=here)
        tl.store(errors + j * outputs + own, error, mask=here)
        owed = tl.load(feedback + member * of_feedback + j * of_row + p, mask=(p > j) & (p < COLUMNS), other=0.0)
        wanted += owed[:, None] * error[None, :]


@triton.jit
def _storable(scale):
    """What a float16 gives back, and never zero."""
    scale = tl.where(tl.abs(scale) < TINY, tl.where(scale < 0, -TINY, TINY), scale)
    return tl.minimum(tl.maximum(scale, -2 * LARGEST), 2 * LARGEST).to(tl.float16).to(tl.float32)


@triton.jit
def _judge(weight, energy, scale, zero, gain, kept, kept_zero, LAST: tl.constexpr):
    """The gain, scale and zero of each row, once this scale and zero have been tried: see core.grid."""
    steps = _round(weight * tl.div_rn(1.0, scale)[:, None], -zero[:, None], (LAST - zero)[:, None])
    weighted = steps * energy[None, :]
    along, norm = tl.sum(weight * weighted, 1), tl.sum(steps * weighted, 1)
    found = tl.div_rn(along * along, tl.maximum(norm, 1e-30))
    better = found > gain
    best = tl.where(norm > 0, tl.div_rn(along, tl.maximum(norm, 1e-30)), scale)
    return tl.where(better, found, gain), tl.where(better, best, kept), tl.where(better, zero, kept_zero)


@triton.jit
def search(
    weights, energies, shares, scales, zeros, rows, groups, width,
    SHARES: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scale and zero of one group in ROWS rows: every candidate is judged while the weights stay in registers."""
    r, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    member, c = tl.program_id(2).to(tl.int64), tl.arange(0, WIDTH)
    last: tl.constexpr = 2**BITS - 1
    there, place = r < rows, (member * rows + r) * groups + group
    read = there[:, None] & (c < width)[None, :]
    weight = tl.load(weights + place[:, None] * width + c[None, :], mask=read, other=0.0)
    energy = tl.load(energies + (member * groups + group) * width + c, mask=c < width, other=0.0)
    high, low = tl.maximum(tl.max(weight, 1), 0.0), tl.minimum(tl.min(weight, 1), 0.0)
    gain, kept = tl.full((ROWS,), -1.0, tl.float32), tl.full((ROWS,), float("inf"), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    if SYMMETRIC:
        middle = tl.full((ROWS,), 2.0 ** (BITS - 1), tl.float32)
        whole = tl.where(high >= -low, high, low) * (-1.0 / 2.0 ** (BITS - 1))
        gain, kept, zero = _judge(weight, energy, _storable(whole), middle, gain, kept, zero, last)
        for n in range(SHARES):
            share = tl.load(shares + n)
            gain, kept, zero = _judge(weight, energy, _storable(whole * share), middle, gain, kept, zero, last)
            gain, kept, zero = _judge(weight, energy, _storable(whole * -share), middle, gain, kept, zero, last)
    else:
        span = tl.div_rn(high - low, tl.full((ROWS,), last, tl.float32))
        for n in range(SHARES):
            share = tl.load(shares + n)
            scale = tl.where(span == 0, TINY, span * share)
            centre = tl.div_rn(-low * share, scale)
            floor = tl.minimum(tl.maximum(tl.floor(centre), 0.0), last * 1.0)
            ceil = tl.minimum(tl.maximum(tl.ceil(centre), 0.0), last * 1.0)
            gain, kept, zero = _judge(weight, energy, _storable(scale), floor, gain, kept, zero, last)
            gain, kept, zero = _judge(weight, energy, _storable(scale), ceil, gain, kept, zero, last)
    tl.store(scales + place, _storable(kept), mask=there)
    tl.store(zeros + place, zero, mask=there)


@triton.jit
def product(
    a, b, total, tokens, lefts, rights, of_a, of_b,
    TRIANGLE: tl.constexpr, LEFTS: tl.constexpr, RIGHTS: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of total [lefts, rights] += a^T b; with TRIANGLE, none that lies below the diagonal.

    WIDE multiplies in float32: the interpreter takes bfloat16 for whole numbers there.
    """
    first, second = tl.program_id(0) * LEFTS, tl.program_id(1) * RIGHTS
    if TRIANGLE and second + RIGHTS <= first:
        return
    i, j, t = tl.arange(0, LEFTS), tl.arange(0, RIGHTS), tl.arange(0, TOKENS)
    of_left, of_right = first + i < lefts, second + j < rights
    a += first + t[None, :] * of_a + i[:, None]
    b += second + t[:, None] * of_b + j[None, :]
    sums = tl.zeros((LEFTS, RIGHTS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        here = t < tokens - start
        left = tl.load(a, mask=here[None, :] & of_left[:, None], other=0.0)
        right = tl.load(b, mask=here[:, None] & of_right[None, :], other=0.0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums)
        a += TOKENS * of_a
        b += TOKENS * of_b
    total += first.to(tl.int64) * rights + second
    place, inside = i[:, None] * rights + j[None, :], of_left[:, None] & of_right[None, :]
    tl.store(total + place, tl.load(total + place, mask=inside, other=0.0) + sums, mask=inside)
