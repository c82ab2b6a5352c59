"""GPUs: the packed weight goes through the tensor cores as it is read, restored in registers.

Up to 64 rows one kernel reads the packed words once. Where there are too few outputs for all processors, several
programs share the columns of an output, and the last of them adds up, always in the same order. For more rows the
weight is either read once per 128 of them, or restored once, in the dtype of the input, and multiplied by torch: up to
1024 rows what is faster is measured. Codes minus zeros are whole numbers below 256, exact in bfloat16 and in float16;
their products are summed in float32 within a group, and scaled once per group.

What is measured on a device is measured once: the shape of a program by triton, which keeps that in its own cache, and
where restoring becomes faster in ~/.cache/wellrounded. While a CUDA graph is captured, nothing is measured.

How words lie, and why: triton_layout.py.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..core.scheme import Scheme
from ..core.triton import interpreted
from ..core.weight import QuantizedWeight
from .triton_layout import BLOCK, packed

if TYPE_CHECKING:
    from . import Dense, Need

NAME = "triton"
DTYPES = (torch.bfloat16, torch.float16)
FEW_ROWS = 64  # up to here, the weight is read once, and that is faster than restoring it
MANY_ROWS = 1024  # from here on, restoring the weight for a dense product is faster
TALLEST = 128  # rows of a program; more read the weight again
OUTPUTS = 64  # of a program that restores
TOLERANCE = 0.02  # relative, of products in bfloat16
PROGRAMS = 264  # that a GPU is to have at least: two for each of the processors of a large one
Prepared = list[torch.Tensor]


def refuses(need: Need) -> str | None:
    """Why this layer cannot use it, as a sentence."""
    if not need.device.startswith("cuda") and not interpreted():
        return f"it runs on GPUs, the layer is on {need.device}"
    if need.dtype not in DTYPES:
        return f"it computes in {', '.join(map(str, DTYPES))}, not {need.dtype}"
    if _programs() is None:
        return "the package triton is not installed"
    return _wrong(need.scheme.bits, need.dtype, need.device)


def prepare(weight: QuantizedWeight, need: Need) -> Prepared:
    """Words int32 [chunks, bits, out, blocks of a chunk], scales float16 and zeros uint8 [groups, out], and an order.

    The shape of the words is how many there are, not how they lie (triton_layout.py). Zeros are empty where all are the
    middle of the range; the order, int32, is the column that is multiplied at each place, and empty where that is it.
    """
    words, order = packed(weight)
    middle = bool((weight.zeros == weight.scheme.midpoint).all())
    zeros = weight.zeros.new_empty(0) if middle else weight.zeros.T.contiguous()
    return [words, weight.scales.T.contiguous(), zeros, order]


def matmul(x: torch.Tensor, prepared: Sequence[torch.Tensor], dense: Dense) -> torch.Tensor:
    """[..., in] to [..., out]."""
    rows = x.numel() // x.shape[-1]
    if not rows or x.dtype not in DTYPES:
        return F.linear(x, dense(x.dtype))
    flat, order = x.reshape(rows, x.shape[-1]), prepared[3]
    flat = flat.index_select(1, order) if order.numel() else flat.contiguous()
    y = _read(flat, prepared) if _reads_faster(flat, prepared) else F.linear(flat, restored(prepared, x.dtype))
    return y.view(*x.shape[:-1], -1)


def _read(x: torch.Tensor, prepared: Sequence[torch.Tensor], tunes: bool = True) -> torch.Tensor:
    """The product of [rows, in], in the order of the words, by the programs that are fastest where `tunes`."""
    words, scales, zeros, _ = prepared
    rows, (chunks, bits, outputs, chunk) = len(x), words.shape
    y = x.new_empty(rows, outputs)
    tall = next(n for n in (16, 32, FEW_ROWS, TALLEST) if rows <= n or n == TALLEST)
    times = max(n for n in (1, 2, 4) if n * chunk <= 4 and chunks % n == 0)
    towers, turns = -(-rows // tall), chunks // times

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return _grid(outputs, turns, towers, meta)

    programs, key = _programs(), (x.device, x.dtype, chunks, outputs, bits, tall)
    shares, counted = _most(outputs, turns, towers, tall)
    parts, counters = _workspace(x.device, shares * rows * outputs if shares > 1 else 0, counted)
    tunes = tunes and not interpreted() and (key in _tuned or not _capturing(x.device))
    if tunes:
        _tuned.add(key)
    first = programs.kinds(tall)[0]
    kind = {} if tunes else {**first.kwargs, "num_warps": first.num_warps, "num_stages": first.num_stages}
    with torch.cuda.device_of(x):  # triton launches on the current one
        (programs.tuned if tunes else programs.packed)[grid](
            x, words, scales, zeros, y, parts, counters, rows, outputs, chunks, chunks // len(scales),
            BITS=bits, CHUNK=chunk, MIDDLE=_middle(bits, zeros), ROWS=tall, TIMES=times, WIDE=_wide(x.dtype), **kind,
        )  # fmt: skip
    return y


def restored(prepared: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[out, in]: the dense weight, rounded once to `dtype`, with its columns in the order of the words."""
    words, scales, zeros, _ = prepared
    chunks, bits, outputs, chunk = words.shape
    dense = torch.empty(outputs, chunks * chunk * BLOCK, dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        _programs().restore[(-(-outputs // OUTPUTS), chunks)](
            words, scales, zeros, dense, outputs, chunks, chunks // len(scales),
            BITS=bits, CHUNK=chunk, MIDDLE=_middle(bits, zeros), WIDE=_wide(dtype), OUTPUTS=OUTPUTS,
        )  # fmt: skip
    return dense


def _middle(bits: int, zeros: torch.Tensor) -> int:
    """What all zeros are, -1 if they are there one by one."""
    return -1 if zeros.numel() else 1 << (bits - 1)


def _wide(dtype: torch.dtype) -> bool:
    """Whether numbers are to be float32 within: the interpreter takes bfloat16 for the whole numbers of its bits."""
    return interpreted() and dtype == torch.bfloat16


# ---- what is faster ----

_tuned: set[Any] = set()  # what `_read` has been tuned for, in this process
_known: dict[Any, bool] = {}  # what `_reads_faster` has found, or read


def _reads_faster(x: torch.Tensor, prepared: Sequence[torch.Tensor]) -> bool:
    """Whether so many rows, in the order of the words, are multiplied faster from these than by restoring the weight.

    Where that is measured, both ways must give the same, too.
    """
    if len(x) > MANY_ROWS or interpreted():
        return len(x) <= FEW_ROWS
    if len(x) <= FEW_ROWS and _has_tensor_cores(x.device):
        return True
    rows = 1 << (len(x) - 1).bit_length()
    key = (x.device, x.dtype, rows, x.shape[1], *prepared[0].shape[1:])
    if key not in _known:
        if _capturing(x.device):
            return False
        name = ", ".join(map(str, (torch.cuda.get_device_name(x.device), _programs().triton.__version__, *key[1:])))
        kept = _remembered()
        if name not in kept:
            kept[name] = _measured(x, prepared)
            _remember(kept)
        _known[key] = kept[name]
    return _known[key]


def _measured(x: torch.Tensor, prepared: Sequence[torch.Tensor]) -> bool:
    """Whether reading is right here, and faster; a program may be too large for a device."""
    x = torch.randn_like(x)  # zeros would be faster
    ways = partial(_read, x, prepared), lambda: F.linear(x, restored(prepared, x.dtype))
    try:
        if not _error(ways[0](), ways[1]()) < TOLERANCE:
            return False
        reading, restoring = map(_programs().triton.testing.do_bench, ways)
    except _programs().triton.runtime.errors.OutOfResources:
        return False
    return bool(reading < restoring)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far off a product is, relative to it."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether triton multiplies with them there: no more on those of Turing, which would be slow without."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _remembered() -> dict[str, bool]:
    """What was measured on this machine; nothing if that cannot be read, and then it is measured again."""
    with suppress(OSError, ValueError):
        found = json.loads(_kept().read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _remember(found: dict[str, bool]) -> None:
    """Replace the file at once; where that does not work, the next process measures again."""
    with suppress(OSError):
        _kept().parent.mkdir(parents=True, exist_ok=True)
        new = _kept().with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(found, indent=1))
        new.replace(_kept())


def _kept() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wellrounded" / "triton.json"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _programs() -> Any:
    """What runs on the device, None without triton; loaded when it is needed, for that takes a while."""
    try:
        from . import triton_products
    except ImportError:
        return None
    return triton_products


def _grid(outputs: int, steps: int, towers: int, kind: dict[str, Any]) -> tuple[int, int, int]:
    """How many programs there are side by side, to share the columns of an output, and for further rows."""
    wide = -(-outputs // kind["OUTPUTS"])
    return wide, _shares(wide * towers, steps, kind["split"]), towers


@cache
def _most(outputs: int, steps: int, towers: int, tall: int) -> tuple[int, int]:
    """The most shares, and the most programs that share, of whatever kind of program may be tuned to."""
    grids = [_grid(outputs, steps, towers, config.kwargs) for config in _programs().kinds(tall)]
    return max(grid[1] for grid in grids), max(grid[0] for grid in grids) * towers


def _shares(programs: int, steps: int, split: int) -> int:
    """Among how many programs the columns of an output are divided, where there are so many programs otherwise."""
    return max(1, min(-(-PROGRAMS * split // (2 * programs)), steps // 2, 16))


_counters: dict[Any, torch.Tensor] = {}  # by device and stream: zero before every product, and again after it


def _workspace(device: torch.device, size: int, counted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs put parts of sums, float32, and so many counters of how many are done, int32."""
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    counters = _counters.get(key)
    if counters is None or len(counters) < counted:
        counters = torch.zeros(max(counted, 4096), dtype=torch.int32, device=device)
        if not _capturing(device):  # else they are the graph's own, zeroed whenever it runs
            _counters[key] = counters
    return torch.empty(size, dtype=torch.float32, device=device), counters


@cache
def _wrong(bits: int, dtype: torch.dtype, device: str) -> str | None:
    """A sentence if this device computes something else, which is warned of as well: other kernels serve then."""
    try:
        found = _tried(bits, dtype, device)
    except Exception as error:  # whatever a compiler or a driver raises
        found = f"it does not run on this {device} ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    if found:
        warnings.warn(f"kernel {NAME!r} is not used for {bits} bits and {dtype}: {found}", RuntimeWarning, stacklevel=2)
    return found


def _tried(bits: int, dtype: torch.dtype, device: str) -> str | None:
    """A small product, in both ways, against the dense weight's: a sentence if one is something else."""
    random = torch.Generator().manual_seed(bits)
    scheme, outputs, columns = Scheme(bits, 128), 32, 256
    weight = QuantizedWeight(
        codes=torch.randint(scheme.max_code + 1, (outputs, columns), generator=random).to(device, torch.uint8),
        scales=torch.randn(outputs, 2, generator=random).to(device, torch.float16),
        zeros=torch.full((outputs, 2), scheme.midpoint, dtype=torch.uint8, device=device),
        group_index=scheme.trivial_group_index(columns).to(device),
        scheme=scheme,
    )
    x = torch.randn(16, columns, generator=random).to(device, dtype)
    prepared = prepare(weight, None)  # type: ignore[arg-type]  # which asks nothing of the need
    expected = x.float() @ weight.dequantize().T
    for found in (_read(x, prepared, tunes=False), F.linear(x, restored(prepared, dtype))):
        if not (error := _error(found, expected)) < TOLERANCE:
            return f"it computes something else on this {device}: a product is {error:.3g} off"
    return None
