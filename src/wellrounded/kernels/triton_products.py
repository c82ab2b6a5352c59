"""The programs of kernels/triton.py, which says what they compute and how weights lie."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _plane(words, n, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """int32 [OUTPUTS, CHUNK, 4, 4]: of columns 8 a + 2 t and the next of each block, one code in each half."""
    far: tl.constexpr = 2 if BITS == 8 else 1  # words along a, and along t
    wide: tl.constexpr = BITS if BITS < 4 else 4
    c, a, t = tl.arange(0, CHUNK), tl.arange(0, far), tl.arange(0, wide)
    place = (t[None, None, :] * far + a[None, :, None]) * CHUNK + c[:, None, None]
    packed = tl.load(words + n[:, None, None, None] * (far * wide * CHUNK) + place[None, :, :, :])
    inner, outer = tl.arange(0, 4 // far), tl.arange(0, 4 // wide)
    shifts = BITS * (outer[None, None, :] * (4 // far) + inner[:, None, None])
    pairs = packed[:, :, :, None, :, None] >> shifts[None, None, None, :, :, :]
    return tl.reshape(pairs & ((1 << BITS) - 1) * 0x10001, (n.shape[0], CHUNK, 4, 4))


@triton.jit
def _as(pairs, DTYPE: tl.constexpr):
    """The numbers whose bits are in the halves: [..., 2]."""
    low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))


@triton.jit
def _eight(pairs, DTYPE: tl.constexpr):
    """[..., 2]: codes of 8 bits, minus 128: seven of the bits stand in a number, the eighth in what is subtracted."""
    return _as((pairs & 0x007F007F) | 0x43004300, DTYPE) - _as((pairs & 0x00800080) ^ 0x43804380, DTYPE)


@triton.jit
def _steps(words, zero, n, outputs, DTYPE: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """[OUTPUTS, CHUNK * 32]: codes minus zeros, whole numbers and exact, in DTYPE, in float32 if WIDE.

    A code becomes a number by standing in the last bits of one that is large enough: 1024 in float16, 128 in bfloat16,
    which has no room for 8 bits (`_eight`).
    """
    if BITS == 3:
        pairs = _plane(words, n, 2, CHUNK) + _plane(words + outputs * 2 * CHUNK, n, 1, CHUNK) * 4
    else:
        pairs = _plane(words, n, BITS, CHUNK)
    zero = (zero * 0x10001)[:, None, None, None]
    if WIDE:
        steps = (tl.join(pairs, pairs >> 16) & 0xFFFF).to(tl.float32) - (tl.join(zero, zero) & 0xFFFF).to(tl.float32)
    elif DTYPE == tl.float16:
        steps = _as(pairs | 0x64006400, DTYPE) - _as(zero | 0x64006400, DTYPE)
    elif BITS < 8:
        steps = _as(pairs | 0x43004300, DTYPE) - _as(zero | 0x43004300, DTYPE)
    else:
        steps = _eight(pairs, DTYPE) - _eight(zero, DTYPE)
    return tl.reshape(steps, (n.shape[0], CHUNK * 32))


@triton.jit
def _zero(zeros, place, n, MIDDLE: tl.constexpr):
    """int32 [OUTPUTS]."""
    if MIDDLE >= 0:
        return tl.full((n.shape[0],), MIDDLE, tl.int32)
    return tl.load(zeros + place + n).to(tl.int32)


@triton.jit
def packed(
    x, words, scales, zeros, y, parts, counters, rows, outputs, chunks, per_group, split,
    BITS: tl.constexpr, CHUNK: tl.constexpr, MIDDLE: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr,
    WIDE: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """y [rows, out] = x [rows, chunks * CHUNK * 32] W^T: ROWS rows, OUTPUTS outputs and an equal share of the chunks.

    W x^T is what is computed: a weight is restored in the registers from which a tensor core takes it, and is never
    written anywhere. TIMES chunks, of which there are whole numbers, are one turn of the loop; their scales, and zeros,
    are read a chunk ahead. WIDE multiplies in float32: the interpreter takes bfloat16 for whole numbers there. `split`
    is the caller's, for the grid: into how many shares columns are divided is the length of its second axis.
    """
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    share, shares = tl.program_id(1), tl.num_programs(1)
    there = (m[None, :] < rows) & (n < outputs)[:, None]
    place = m[None, :] * outputs + n[:, None]
    n = tl.minimum(n, outputs - 1)  # others are computed, and not stored
    turns = (chunks // TIMES + shares - 1) // shares  # of which the last share may have fewer
    first, last = share * turns * TIMES, tl.minimum((share + 1) * turns * TIMES, chunks)
    values = x + m[None, :] * (chunks * CHUNK * 32) + tl.arange(0, CHUNK * 32)[:, None]
    here = (tl.minimum(first, chunks - 1) // per_group) * outputs  # the last shares may have nothing to do
    scale, zero = tl.load(scales + here + n), _zero(zeros, here, n, MIDDLE)
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for turn in range(first, last, TIMES):
        for one in tl.static_range(TIMES):
            chunk = turn + one
            here = (tl.minimum(chunk + 1, chunks - 1) // per_group) * outputs
            next_scale, next_zero = tl.load(scales + here + n), _zero(zeros, here, n, MIDDLE)
            some = tl.load(values + chunk * CHUNK * 32, mask=m[None, :] < rows, other=0.0)
            own = words + chunk * (BITS * CHUNK * outputs)
            steps = _steps(own, zero, n, outputs, x.dtype.element_ty, BITS, CHUNK, WIDE)
            if WIDE:
                some = some.to(tl.float32)
            sums += tl.dot(steps, some, out_dtype=tl.float32) * scale.to(tl.float32)[:, None]
            scale, zero = next_scale, next_zero
    if shares == 1:
        tl.store(y + place, sums.to(y.dtype.element_ty), mask=there)
    else:
        tl.store(parts + share * rows * outputs + place, sums, mask=there)
        tl.debug_barrier()  # all of this program's part is there before it says so
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == shares - 1:
            total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
            for one in range(shares):
                total += tl.load(parts + one * rows * outputs + place, mask=there, other=0.0)
            tl.store(y + place, total.to(y.dtype.element_ty), mask=there)
            tl.store(counter, 0)


# What is tried on a device, once for each kind of layer, and remembered in triton's own cache on disk.
FEW, MANY = (
    [
        triton.Config({"OUTPUTS": outputs, "split": split}, num_warps=warps, num_stages=stages)
        for outputs, split, warps, stages in kinds
    ]
    for kinds in (
        ((64, 4, 4, 4), (64, 2, 4, 4), (128, 2, 4, 4), (128, 4, 4, 4), (128, 8, 4, 3), (64, 8, 4, 3), (32, 4, 2, 4)),
        ((128, 2, 8, 3), (128, 4, 8, 3), (256, 2, 8, 3), (64, 4, 4, 3), (64, 2, 4, 4)),  # from 64 rows on
    )
)


def kinds(rows: int) -> list[triton.Config]:
    """What is tried for a program of so many rows; the sums of one have to fit into registers."""
    return [config for config in (FEW if rows < 64 else MANY) if config.kwargs["OUTPUTS"] * rows <= 2**14]


def _tried(configs: list[triton.Config], named: dict[str, Any], **options: Any) -> list[triton.Config]:
    return kinds((named | options)["ROWS"])


def _median(run: Any, quantiles: Any) -> Any:
    """Of some 20 ms: what is tried for a kind of layer takes less than a second, compiled."""
    return triton.testing.do_bench(run, warmup=5, rep=20, quantiles=quantiles)


tuned = triton.autotune(
    [*FEW, *MANY], key=["outputs", "chunks", "BITS", "CHUNK", "ROWS"], prune_configs_by={"early_config_prune": _tried},
    do_bench=_median, cache_results=True,
)(packed)  # fmt: skip


@triton.jit
def restore(
    words, scales, zeros, dense, outputs, chunks, per_group,
    BITS: tl.constexpr, CHUNK: tl.constexpr, MIDDLE: tl.constexpr, WIDE: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """dense [out, chunks * CHUNK * 32] = s (c - z), one chunk of OUTPUTS outputs."""
    n, chunk = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1)
    there, own = n < outputs, tl.minimum(n, outputs - 1)
    here = (chunk // per_group) * outputs
    scale, zero = tl.load(scales + here + own).to(tl.float32), _zero(zeros, here, own, MIDDLE)
    dtype: tl.constexpr = dense.dtype.element_ty
    steps = _steps(words + chunk * (BITS * CHUNK * outputs), zero, own, outputs, dtype, BITS, CHUNK, WIDE)
    values = steps.to(tl.float32) * scale[:, None]
    k = chunk * CHUNK * 32 + tl.arange(0, CHUNK * 32)
    place = n[:, None].to(tl.int64) * (chunks * CHUNK * 32) + k[None, :]  # a head may have 2^31 weights
    tl.store(dense + place, values.to(dtype), mask=there[:, None])
