"""The native core (csrc/), if it was built for this machine: where it is, and whose threads it uses.

It has no threads of its own: a second pool would spin on the same cores as torch's. It borrows torch's OpenMP
runtime, and with it `torch.set_num_threads`.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ABI, NEWEST = 4, "wr_product"  # of csrc/wellrounded.h, and the function that came last
RUNTIMES = ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*", "libomp*.dylib")
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


@cache
def library() -> ctypes.CDLL | None:
    """The core, ready to be called, or None if it was not built, or from other sources than these."""
    places = (
        Path(__file__).parent,
        *(Path(sysconfig.get_path(kind), "wellrounded") for kind in ("platlib", "purelib")),
    )
    path = next((p for p in (place / f"libwellrounded{_SUFFIX}" for place in places) if p.is_file()), None)
    if path is None:
        return None
    core = ctypes.CDLL(str(path))
    if not hasattr(core, NEWEST) or core.wr_abi() != ABI:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    core.wr_name.restype = ctypes.c_char_p
    core.wr_threads.argtypes = [pointer] * 3
    core.wr_bytes.argtypes = [number] * 5 + [ctypes.c_int] * 2
    core.wr_bytes.restype = number
    core.wr_large_pages.argtypes = [pointer, number]
    core.wr_large_pages.restype = None
    core.wr_pack.argtypes = [pointer, *[number] * 5, *[pointer] * 4]
    core.wr_matmul.argtypes = [pointer, pointer, pointer, number, ctypes.c_int]
    core.wr_restore.argtypes = [pointer, pointer, ctypes.c_int, number, number]
    whole, single = ctypes.c_int, ctypes.c_float
    core.wr_search.argtypes = [pointer, pointer, *[number] * 4, whole, pointer, number, pointer, pointer]
    core.wr_sweep.argtypes = [pointer] * 3 + [number, pointer, pointer, single, pointer, pointer, number, number]
    core.wr_gram.argtypes = [pointer, *[number] * 3, pointer]
    core.wr_product.argtypes = [pointer, number, number] * 2 + [number, pointer]
    core.wr_attend.argtypes = [pointer] * 5 + [number] * 6 + [pointer, single, whole]
    if runtime := _runtime():
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_max_threads")
        core.wr_threads(*(ctypes.cast(getattr(runtime, name), pointer) for name in names))
    return core


def missing() -> str | None:
    """Why there is no native core, as a sentence; None if there is one."""
    if library() is None:
        return "the native core was not built from these sources; install wellrounded again where there is a compiler"
    return None


def levels() -> list[str]:
    """The instruction sets it has for this machine, the one it uses last; none without a core."""
    core = library()
    return [] if core is None else [core.wr_name(level).decode() for level in range(core.wr_best() + 1)]


def serves(*tensors: torch.Tensor) -> bool:
    """Whether there is a core for these: contiguous float32 on the CPU."""
    import torch

    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return plain and library() is not None


def on_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, still to be written, on pages of 2 MB where there is a core that can ask for them."""
    if tensor.device.type == "cpu" and (core := library()):
        core.wr_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def search(
    weight: torch.Tensor, energy: torch.Tensor, bits: int, symmetric: bool, shares: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (already float16-exact) and zeros, float32 [..., rows, groups]: core.grid's search among these shares.

    weight is [..., rows, groups, width], energy [..., groups, width].
    """
    core = library()
    assert core is not None and serves(weight, energy)
    scales, zeros = weight.new_empty(weight.shape[:-1]), weight.new_empty(weight.shape[:-1])
    tried = (ctypes.c_float * len(shares))(*shares)
    stack = (each.reshape(-1, *each.shape[-most:]) for each, most in zip((weight, energy, scales, zeros), (3, 2, 2, 2)))
    for w, h, s, z in zip(*stack):
        failed = core.wr_search(
            w.data_ptr(), h.data_ptr(), *w.shape, bits, symmetric, tried, len(shares), s.data_ptr(), z.data_ptr()
        )
        assert not failed, "core.grid gave it numbers that make no sense"
    return scales, zeros


def add_gram(rows: torch.Tensor, upper: torch.Tensor) -> bool:
    """upper float32 [n, n] += rows^T rows for bfloat16 rows [count, n]; False if that is not for this machine.

    Products are exact, sums float32; entries below the diagonal are undefined afterwards.
    """
    if (core := _core_for(upper, rows, rows)) is None:
        return False
    rows, stride = _strided(rows)
    return _added(core.wr_gram(rows.data_ptr(), len(rows), stride, rows.shape[1], upper.data_ptr()))


def add_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> bool:
    """total float32 [m, n] += a^T b for bfloat16 a [count, m] and b [count, n]; False, products and sums as above."""
    if (core := _core_for(total, a, b)) is None:
        return False
    (a, a_stride), (b, b_stride) = _strided(a), _strided(b)
    sides = a.data_ptr(), a_stride, a.shape[1], b.data_ptr(), b_stride, b.shape[1]
    return _added(core.wr_product(*sides, len(a), total.data_ptr()))


def _core_for(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> ctypes.CDLL | None:
    """The core, if it may know how to do total += a^T b."""
    import torch

    if any(each.dtype != torch.bfloat16 or each.device.type != "cpu" for each in (a, b)) or not serves(total):
        return None
    assert len(a) == len(b) and total.shape == (a.shape[1], b.shape[1])
    return library()


def _strided(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows without gaps inside, which may lie apart, and how far from one to the next."""
    if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
        rows = rows.contiguous()
    return rows, max(rows.stride(0), rows.shape[1])  # torch does not say it of a single row


def _added(done: int) -> bool:
    assert done >= 0, "core.hessian or core.moments gave it numbers that make no sense"
    return done == 0


def has_bfloat16() -> bool:
    """Whether the instruction set in use multiplies bfloat16, as `add_gram`, `add_product` and `attend` need it."""
    core = library()
    return core is not None and bool(core.wr_has_bfloat16())


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `attend` is for tensors like these: their shapes, dtypes and devices."""
    import torch

    plain = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.ndim == 4 for t in (q, k, v))
    if not plain or q.shape[3] % 32 or v.shape != k.shape or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0]:
        return False
    queries, keys = (q.shape[0], 1, q.shape[2]), k.shape[2]
    masked = mask is not None and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[3] == keys
    return mask is None or (masked and all(n in (1, most) for n, most in zip(mask.shape, queries)))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool
) -> torch.Tensor | None:
    """softmax(scale q k^T) v as [batch, queries, heads, depth]; None if it `attends` to no such tensors, or not here.

    q [batch, heads, queries, depth], k and v [batch, kv heads, keys, depth], bfloat16, the depth a multiple of 32; mask
    bool [batch or 1, 1, queries or 1, keys], True where a query sees a key; causal lets query i see the keys up to i. A
    query that sees no key gives zeros. Scores and sums are float32 (Dao et al., "FlashAttention", 2022).
    """
    if not has_bfloat16() or not attends(q, k, v, mask) or not q.numel() or not k.numel():
        return None
    core, (batch, heads, queries, depth), (kv_heads, keys) = library(), q.shape, k.shape[1:3]
    assert core is not None
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    strides, start = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0, 0], None
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        strides[9:] = [mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 2)]
        start = mask.data_ptr()
    out = q.new_empty(batch, queries, heads, depth)
    done = core.wr_attend(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), start, out.data_ptr(), batch, heads, kv_heads, queries, keys, depth,
        (ctypes.c_int64 * 11)(*strides), scale, causal,
    )  # fmt: skip
    assert not done, "attends() let something through that the core does not take"
    return out


def sweep(
    weights: torch.Tensor,
    target: torch.Tensor,
    feedback: torch.Tensor,
    scales: torch.Tensor,
    low: torch.Tensor,
    most: int,
    steps: torch.Tensor,
) -> torch.Tensor:
    """core.rounding.sweep_panel, member by member: all [members, columns, out]."""
    core = library()
    assert core is not None
    _, columns, outputs = weights.shape
    errors, feedback = weights.new_empty(weights.shape), feedback.contiguous()
    for w, t, f, s, lowest, q, e in zip(weights, target, feedback, scales, low, steps, errors):
        assert serves(w, t, f, s, lowest, q, e)
        failed = core.wr_sweep(
            w.data_ptr(), t.data_ptr(), f.data_ptr(), f.stride(0), s.data_ptr(), lowest.data_ptr(), most,
            q.data_ptr(), e.data_ptr(), columns, outputs,
        )  # fmt: skip
        assert not failed, "core.gptq gave it numbers that make no sense"
    return errors


@cache
def _runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded."""
    import torch

    home = Path(torch.__file__).parent
    for directory in (home / "lib", home.parent / "torch.libs"):
        for pattern in RUNTIMES:
            for path in sorted(directory.glob(pattern)):
                runtime = ctypes.CDLL(str(path))  # the one that is loaded already
                if hasattr(runtime, "GOMP_parallel"):
                    return runtime
    return None
