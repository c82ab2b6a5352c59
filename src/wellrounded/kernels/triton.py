"""GPUs: the packed weight goes through the tensor cores as it is read, restored in registers.

Up to 64 rows one kernel reads the packed words once. Where there are too few outputs for all processors, several
programs share the columns of an output, and the last of them adds up, always in the same order. For more rows the
weight is either read once per 64 of them, or restored once, in the dtype of the input, and multiplied by torch: up to
1024 rows what is faster is measured. Codes minus zeros are whole numbers below 256, exact in bfloat16 and in float16;
their products are summed in float32 within a group, and scaled once per group.

What is measured on a device is measured once: the shape of a program by triton, which keeps that in its own cache, and
where restoring becomes faster in ~/.cache/wellrounded. While a CUDA graph is captured, nothing is measured.

Layout: columns in blocks of 32, each in as many words as a code has bits, outputs side by side. A word of a block holds
32 / bits codes, the first in the lowest bits; of 3 bits, two words hold the lower two of each code, one the highest.
Where groups are not whole blocks, or columns are in another order, columns are gathered, and each group is filled up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..core.scheme import Scheme
from ..core.triton import interpreted
from ..core.weight import QuantizedWeight

if TYPE_CHECKING:
    from . import Dense, Need

NAME = "triton"
DTYPES = (torch.bfloat16, torch.float16)
BLOCK = 32  # columns
FEW_ROWS = 64  # of a program; more read the weight again
MANY_ROWS = 1024  # from here on, restoring the weight for a dense product is faster
OUTPUTS = 64  # of a program that restores
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
    """Words int32 [blocks, bits, out], scales float16 and zeros uint8 [groups, out], and the columns' order int32.

    Zeros are empty where all are the middle of the range; the order is where columns are in that of the words.
    """
    codes, order = _blocked(weight)
    bits = weight.scheme.bits
    blocks = codes.T.contiguous().view(-1, BLOCK, len(codes))
    words = torch.cat([_packed(blocks & 3, 2), _packed(blocks >> 2, 1)], 1) if bits == 3 else _packed(blocks, bits)
    middle = bool((weight.zeros == weight.scheme.midpoint).all())
    zeros = weight.zeros.new_empty(0) if middle else weight.zeros.T.contiguous()
    return [words.contiguous(), weight.scales.T.contiguous(), zeros, order]


def matmul(x: torch.Tensor, prepared: Sequence[torch.Tensor], dense: Dense) -> torch.Tensor:
    """[..., in] to [..., out]."""
    rows = x.numel() // x.shape[-1]
    if not rows or x.dtype not in DTYPES:
        return F.linear(x, dense(x.dtype))
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    if rows <= FEW_ROWS or _reads_faster(flat, prepared):
        return _read(flat, prepared).view(*x.shape[:-1], -1)
    return F.linear(x, restored(prepared, x.shape[-1], x.dtype))


def _read(x: torch.Tensor, prepared: Sequence[torch.Tensor], tunes: bool = True) -> torch.Tensor:
    """The product of [rows, in], from packed words, by the programs that are fastest where `tunes`."""
    words, scales, zeros, order = prepared
    (rows, columns), (blocks, bits, outputs) = x.shape, words.shape
    y = x.new_empty(rows, outputs)
    tall = 16 if rows <= 16 else 32 if rows <= 32 else FEW_ROWS
    towers, whole = -(-rows // tall), blocks // scales.shape[0]  # the latter of a group
    chunk = max(n for n in (1, 2, 4) if whole % n == 0)
    programs, ordered = _programs(), order.numel() > 0

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return _grid(outputs, blocks // chunk, towers, meta)

    shares, counted = _most(outputs, blocks // chunk, towers)
    parts, counters = _workspace(x.device, shares * rows * outputs if shares > 1 else 0, counted)
    key = (x.device, x.dtype, columns, outputs, bits, tall, ordered)
    tunes = tunes and not interpreted() and (key in _tuned or not _capturing(x.device))
    if tunes:
        _tuned.add(key)
    program, kind = (programs.tuned, {}) if tunes else (programs.packed, programs.CONFIGS[0].kwargs)
    with torch.cuda.device_of(x):  # triton launches on the current one
        program[grid](
            x, words, scales, zeros, order, y, parts, counters, rows, columns, outputs, blocks // chunk, whole // chunk,
            BITS=bits, CHUNK=chunk, MIDDLE=1 << (bits - 1) if not zeros.numel() else -1, ORDERED=ordered, ROWS=tall,
            WIDE=interpreted() and x.dtype == torch.bfloat16, **kind,
        )  # fmt: skip
    return y


def restored(prepared: Sequence[torch.Tensor], columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]: the dense weight, rounded once to `dtype`."""
    words, scales, zeros, order = prepared
    blocks, bits, outputs = words.shape
    dense = torch.empty(outputs, columns, dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        _programs().restore[(-(-outputs // OUTPUTS), blocks)](
            words, scales, zeros, order, dense, outputs, columns, blocks // scales.shape[0],
            BITS=bits, MIDDLE=1 << (bits - 1) if not zeros.numel() else -1, ORDERED=order.numel() > 0, OUTPUTS=OUTPUTS,
        )  # fmt: skip
    return dense


# ---- what is faster ----

_tuned: set[Any] = set()  # what `_read` has been tuned for, in this process
_known: dict[Any, bool] = {}  # what `_reads_faster` has found, or read


def _reads_faster(x: torch.Tensor, prepared: Sequence[torch.Tensor]) -> bool:
    """Whether so many rows are multiplied faster from packed words than by restoring the weight."""
    if len(x) > MANY_ROWS or interpreted():
        return False
    words, order = prepared[0], prepared[3]
    rows = 1 << (len(x) - 1).bit_length()
    key = (x.device, x.dtype, rows, x.shape[1], *words.shape[1:], order.numel() > 0)
    if key not in _known:
        if _capturing(x.device):
            return False
        name = ", ".join(map(str, (torch.cuda.get_device_name(x.device), _programs().triton.__version__, *key[1:])))
        kept = _remembered()
        if name not in kept:
            bench = _programs().triton.testing.do_bench
            reading = bench(lambda: _read(x, prepared))
            kept[name] = reading < bench(lambda: F.linear(x, restored(prepared, x.shape[1], x.dtype)))
            _remember(kept)
        _known[key] = kept[name]
    return _known[key]


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


def _blocked(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, whole blocks for every group], and which column each is: int32, -1 for none, empty if in order."""
    inputs = weight.shape[1]
    groups, index = weight.scales.shape[1], weight.group_index.long()
    sizes = torch.bincount(index, minlength=groups)
    width = -(-int(sizes.max()) // BLOCK) * BLOCK
    if weight.trivially_grouped and width * groups == inputs:
        return weight.codes, index.new_empty(0, dtype=torch.int32)
    columns = torch.argsort(index, stable=True)
    place = torch.arange(inputs, device=index.device) - (sizes.cumsum(0) - sizes)[index[columns]]
    place += index[columns] * width
    order = torch.full((groups * width,), -1, dtype=torch.int32, device=index.device)
    order[place] = columns.int()
    codes = weight.zeros.repeat_interleave(width, 1)  # what is filled up stands for 0
    codes[:, place] = weight.codes[:, columns]
    return codes, order


def _packed(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [blocks, bits, out] of codes uint8 [blocks, 32, out]."""
    per = 32 // bits
    codes = blocks.view(len(blocks), bits, per, -1)
    words = codes[:, :, 0].int()
    for place in range(1, per):
        words |= codes[:, :, place].int() << (place * bits)
    return words


def _grid(outputs: int, steps: int, towers: int, kind: dict[str, Any]) -> tuple[int, int, int]:
    """How many programs there are side by side, to share the columns of an output, and for further rows."""
    wide = -(-outputs // kind["OUTPUTS"])
    return wide, _shares(wide * towers, steps, kind["SPLIT"]), towers


@cache
def _most(outputs: int, steps: int, towers: int) -> tuple[int, int]:
    """The most shares, and the most programs that share, of whatever kind of program may be tuned to."""
    grids = [_grid(outputs, steps, towers, config.kwargs) for config in _programs().CONFIGS]
    return max(grid[1] for grid in grids), max(grid[0] for grid in grids) * towers


def _shares(programs: int, steps: int, split: int) -> int:
    """Among how many programs the columns of an output are divided, where there are so many programs otherwise."""
    return max(1, min(-(-PROGRAMS * split // (2 * programs)), steps // 4, 16))


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
    """A small product, in both ways, against the dense weight's: a sentence if this device computes something else."""
    random = torch.Generator().manual_seed(bits)
    scheme = Scheme(bits, 32)
    weight = QuantizedWeight(
        codes=torch.randint(scheme.max_code + 1, (32, 64), generator=random).to(device, torch.uint8),
        scales=torch.randn(32, 2, generator=random).to(device, torch.float16),
        zeros=torch.full((32, 2), scheme.midpoint, dtype=torch.uint8, device=device),
        group_index=scheme.trivial_group_index(64).to(device),
        scheme=scheme,
    )
    x = torch.randn(FEW_ROWS + 1, 64, generator=random).to(device, dtype)
    try:
        prepared = prepare(weight, None)  # type: ignore[arg-type]  # which asks nothing of the need
        expected = x.float() @ weight.dequantize().T
        for found in (_read(x, prepared, tunes=False), F.linear(x, restored(prepared, 64, dtype))):
            error = (found.float() - expected).norm() / expected.norm()
            if not error < 0.02:
                return f"it computes something else on this {device}: a product is {float(error):.3g} off"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"it does not run on this {device} ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    return None
