"""The programs of kernels/triton.py, which says what they compute and how weights lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _steps(words, zeros, block, group, outputs, n, here, BITS: tl.constexpr, CHUNK: tl.constexpr, MIDDLE: tl.constexpr):
    """int32 [CHUNK * 32, OUTPUTS]: codes minus zeros of CHUNK blocks of columns, 0 where there is no output."""
    per: tl.constexpr = 32 // (2 if BITS == 3 else BITS)
    rows: tl.constexpr = CHUNK * 32 // per
    w = tl.arange(0, rows)
    if BITS == 3:
        w = w // 2 * 3 + w % 2
    packed = tl.load(words + (block * BITS + w[:, None]) * outputs + n[None, :], mask=here[None, :], other=0)
    shifts = tl.arange(0, per) * (32 // per)
    codes = (packed[:, None, :] >> shifts[None, :, None]) & ((1 << (32 // per)) - 1)
    codes = tl.reshape(codes, (CHUNK * 32, n.shape[0]))
    if BITS == 3:
        w = tl.arange(0, CHUNK) * 3 + 2
        packed = tl.load(words + (block * BITS + w[:, None]) * outputs + n[None, :], mask=here[None, :], other=0)
        highest = (packed[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
        codes += tl.reshape(highest, (CHUNK * 32, n.shape[0])) << 2
    if MIDDLE >= 0:
        return codes - MIDDLE
    return codes - tl.load(zeros + group * outputs + n, mask=here, other=0).to(tl.int32)[None, :]


@triton.jit
def packed(
    x, words, scales, zeros, order, y, parts, counters, rows, columns, outputs, chunks, per_group,
    BITS: tl.constexpr, CHUNK: tl.constexpr, MIDDLE: tl.constexpr, ORDERED: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y [rows, out] = x [rows, in] W^T: ROWS rows, OUTPUTS outputs and an equal share of the chunks of CHUNK blocks.

    WIDE multiplies in float32: the interpreter takes bfloat16 for whole numbers there. SPLIT is the caller's, for the
    grid: into how many shares columns are divided is the length of its second axis.
    """
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    share, shares, here = tl.program_id(1), tl.num_programs(1), n < outputs
    steps = (chunks + shares - 1) // shares
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for chunk in range(share * steps, min(share * steps + steps, chunks)):  # the last share may have less to do
        group = chunk // per_group
        k = chunk * CHUNK * 32 + tl.arange(0, CHUNK * 32)
        read = m[:, None] < rows
        if ORDERED:
            k = tl.load(order + k)
            read = read & (k[None, :] >= 0)
        values = tl.load(x + m[:, None] * columns + k[None, :], mask=read, other=0.0)
        codes = _steps(words, zeros, chunk * CHUNK, group, outputs, n, here, BITS, CHUNK, MIDDLE)
        scale = tl.load(scales + group * outputs + n, mask=here, other=0.0).to(tl.float32)
        if WIDE:
            values = values.to(tl.float32)
        sums += tl.dot(values, codes.to(values.dtype), out_dtype=tl.float32) * scale[None, :]
    there = (m[:, None] < rows) & here[None, :]
    place = m[:, None] * outputs + n[None, :]
    if shares == 1:
        tl.store(y + place, sums.to(y.dtype.element_ty), mask=there)
    else:
        tl.store(parts + share * rows * outputs + place, sums, mask=there)
        tl.debug_barrier()  # all of this program's part is there before it says so
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == shares - 1:
            total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
            for one in range(shares):
                total += tl.load(parts + one * rows * outputs + place, mask=there, other=0.0)
            tl.store(y + place, total.to(y.dtype.element_ty), mask=there)
            tl.store(counter, 0)


# What is tried on a device, once for each kind of layer, and remembered in triton's own cache on disk.
CONFIGS = [
    triton.Config({"OUTPUTS": outputs, "SPLIT": split}, num_warps=warps, num_stages=stages)
    for outputs, split, warps, stages in (
        (64, 2, 4, 3), (32, 2, 2, 3), (32, 4, 4, 3), (64, 1, 4, 4), (64, 4, 4, 4), (128, 2, 4, 3), (128, 1, 8, 3),
    )
]  # fmt: skip
tuned = triton.autotune(CONFIGS, key=["columns", "outputs", "BITS", "ROWS", "ORDERED"], cache_results=True)(packed)


@triton.jit
def restore(
    words, scales, zeros, order, dense, outputs, columns,
    per_group, BITS: tl.constexpr, MIDDLE: tl.constexpr, ORDERED: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """dense [out, in] = s (c - z), one block of columns of OUTPUTS outputs."""
    n, block = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1)
    here, group = n < outputs, block // per_group
    k = block * 32 + tl.arange(0, 32)
    if ORDERED:
        k = tl.load(order + k)
    steps = _steps(words, zeros, block, group, outputs, n, here, BITS, 1, MIDDLE)
    scale = tl.load(scales + group * outputs + n, mask=here, other=0.0).to(tl.float32)
    values = steps.to(tl.float32) * scale[None, :]
    there = (k[:, None] >= 0) & here[None, :]
    tl.store(dense + n[None, :] * columns + k[:, None], values.to(dense.dtype.element_ty), mask=there)
