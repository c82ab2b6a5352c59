"""Single products for benchmarks/gpu.py: our kernel in each of its ways, cuBLAS, and other tools by their own code.

A peer is a function of a weight of 4 bits in symmetric groups. It gives its tensors, which are what it reads at each
call, how it multiplies by them, and the dense weight [out, in] that they stand for, None for that of the given weight.
Nobody is timed whose product is not that dense weight's.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.nn import functional as F

from wellrounded import kernels
from wellrounded.benchmark import layers
from wellrounded.benchmark.clock import Clock, alternate
from wellrounded.core.scheme import Scheme
from wellrounded.core.weight import QuantizedWeight
from wellrounded.formats import gptq as gptq_format

if TYPE_CHECKING:
    from gpu import Ask, Job, Lines

OURS, CUBLAS = "wellrounded", "cuBLAS"
TOLERANCE = 0.02  # |y - xW| / |xW|: a scale rounded to bfloat16 gives 0.002, a wrong order of codes more than 1
FEW_ROWS = 16  # up to which memory is what a product waits for, and beyond which it is arithmetic
BOTH_WAYS = range(64, 1025)  # rows for which both of our ways are measured, to see where they cross
BURST = 1e-3  # seconds that the calls between two looks at a GPU's clock take at least, if it is as fast as FLOOR
FLOOR = (2e-6, 4e12, 8e14)  # of one call: seconds, or bytes per second, or FLOP per second

Tensors = list[torch.Tensor]
Peer = tuple[Tensors, Callable[[torch.Tensor, Tensors], torch.Tensor], torch.Tensor | None]


# ---- the peers ----


def tinygemm(weight: QuantizedWeight) -> Peer:
    """torch's own int4 product, which torchao's int4 weight-only quantization calls: (code - 8) * scale + zero."""
    aten, codes = torch.ops.aten, weight.codes
    if codes.device.type == "cpu":
        packed, product = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), aten._weight_int4pack_mm_for_cpu
    else:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        packed, product = aten._convert_weight_to_int4pack(pairs, 8), aten._weight_int4pack_mm
    scales, group = weight.scales.float(), weight.scheme.columns_per_group(codes.shape[1])
    both = torch.stack([scales, (8 - weight.zeros.float()) * scales], -1).transpose(0, 1).contiguous().bfloat16()
    return [packed, both], lambda x, tensors: product(x, tensors[0], group, tensors[1]), None


def bitsandbytes(weight: QuantizedWeight) -> Peer:
    """NF4 in blocks of 128: other codes than ours, rounded from the same dense weight."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight.dequantize(torch.bfloat16), blocksize=128, quant_type="nf4")

    def multiply(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        turn = copy.copy(state)
        turn.absmax = tensors[1]
        return bnb.matmul_4bit(x, tensors[0].t(), turn)

    return [packed, state.absmax], multiply, bnb.functional.dequantize_4bit(packed, state)


def marlin(weight: QuantizedWeight) -> Peer:
    """vLLM's kernel for GPTQ weights of 4 bits."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    (outputs, inputs), device = weight.shape, weight.codes.device
    stored = gptq_format.to_tensors(weight, "gptq_v2")
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    packed = ops.gptq_marlin_repack(stored["qweight"], nothing, inputs, outputs, 4)
    group = weight.scheme.columns_per_group(inputs)
    scales = marlin_utils.marlin_permute_scales(stored["scales"].bfloat16(), inputs, outputs, group)
    workspace = marlin_utils.marlin_make_workspace_new(device)

    def multiply(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return marlin_utils.apply_gptq_marlin_linear(
            input=x, weight=tensors[0], weight_scale=tensors[1], weight_zp=nothing, g_idx=nothing,
            g_idx_sort_indices=nothing, workspace=workspace, wtype=scalar_types.uint4b8,
            output_size_per_partition=outputs, input_size_per_partition=inputs, is_k_full=True,
        )  # fmt: skip

    return [packed, scales], multiply, None


def machete(weight: QuantizedWeight) -> Peer:
    """vLLM's kernel for Hopper."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    stored, kind = gptq_format.to_tensors(weight, "gptq_v2"), scalar_types.uint4b8
    columns = stored["qweight"].t().contiguous().t()  # it wants words of an output side by side
    packed = ops.machete_prepack_B(columns, torch.bfloat16, kind, torch.bfloat16)
    group = weight.scheme.columns_per_group(weight.shape[1])

    def multiply(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return ops.machete_mm(a=x, b_q=tensors[0], b_type=kind, b_group_scales=tensors[1], b_group_size=group)

    return [packed, stored["scales"].bfloat16()], multiply, None


PEERS: dict[str, Callable[[QuantizedWeight], Peer]] = {
    "tinygemm": tinygemm, "bitsandbytes NF4": bitsandbytes, "Marlin": marlin, "Machete": machete,
}  # fmt: skip


# ---- who takes part ----


@dataclass(frozen=True)
class Contender:
    """A way to multiply, which reads another copy of its `bytes` at each call; `dense` is what they stand for."""

    name: str
    call: Callable[[torch.Tensor], torch.Tensor]
    bytes: int
    dense: torch.Tensor


def contenders(weight: QuantizedWeight, cold: bool) -> tuple[Any, list[Contender], list[str]]:
    """The kernel that serves this layer, everybody who can multiply by it, ours first, and why others cannot."""
    outputs, inputs = weight.shape
    device = weight.codes.device.type
    need = kernels.Need(weight.scheme, inputs, outputs, device, torch.bfloat16, weight.evenly_grouped)
    kernel, stored, dense = kernels.select(need), layers.Stored(weight, cold), weight.dequantize()
    notes = [f"kernel {name} is passed over: {why}" for name, why in _before(kernel, need)]
    found: list[Contender] = []

    def enter(name: str, tensors: Tensors, multiply: Callable[..., torch.Tensor], other: Any = None) -> None:
        candidate = layers.Candidate(name, tensors, stored, multiply)
        found.append(Contender(name, candidate, candidate.own_bytes or stored.bytes, dense if other is None else other))

    enter(OURS, kernel.prepare(weight, need), kernel.matmul)
    enter(CUBLAS, [dense.bfloat16()], lambda x, tensors, _: F.linear(x, tensors[0]))
    for name, peer in PEERS.items() if weight.scheme.bits == 4 else ():
        try:
            tensors, multiply, other = peer(weight)
            enter(name, tensors, lambda x, tensors, _, multiply=multiply: multiply(x, tensors), other)
        except ImportError as error:
            notes.append(f"{name} is left out: {said(error)}")
        except Exception as error:  # whatever a peer, its compiler or a driver raises: it is left out
            notes.append(f"{name} is left out of {inputs}x{outputs}: {said(error)}")
    return kernel, found, notes


def _before(kernel: Any, need: kernels.Need) -> Iterator[tuple[str, str]]:
    for name, why in kernels.explain(need):
        if name == kernel.NAME:
            return
        yield name, why or ""


def ways(kernel: Any, ours: Contender, rows: int) -> tuple[str, list[Contender]]:
    """Which way the kernel goes with so many rows, "" if it measures that itself, and ways for it to be measured in.

    A kernel reads packed words up to FEW_ROWS rows, and may restore the dense weight beyond.
    """
    few = getattr(kernel, "FEW_ROWS", None)
    if few is None:
        return "", []
    own = "packed" if rows <= few else "" if hasattr(kernel, "_reads_faster") else "restored"
    others = [way for way in ("packed", "restored") if way != own] if rows in BOTH_WAYS else []
    return own, [replace(ours, name=way, call=_forced(kernel, ours, way, rows)) for way in others]


def _forced(kernel: Any, ours: Contender, way: str, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A call that goes one way, whatever the kernel would do."""
    reads = way == "packed"
    settings = {"_reads_faster": lambda *_: reads} if hasattr(kernel, "_reads_faster") else {"FEW_ROWS": rows * reads}

    def forced(x: torch.Tensor) -> torch.Tensor:
        with patch.multiple(kernel, **settings):
            return ours.call(x)

    return forced


# ---- checking and timing ----


def said(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['without a word'])[0][:160]}"


def wrong(one: Contender, x: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Why this contender is not to be timed, as a sentence part; None if its product [rows, out] is what it must be."""
    # Left-over memory may hold the right answer of somebody else: whoever writes nothing shall find NaN there.
    torch.full(expected.shape, torch.nan, dtype=x.dtype, device=x.device)
    try:
        product = one.call(x)
        if product.shape != expected.shape:
            return f"wrong: {list(product.shape)} instead of {list(expected.shape)}"
        error = float((product.float() - expected).norm() / expected.norm())
    except Exception as problem:  # as above
        return f"failed: {said(problem)}"
    return None if error < TOLERANCE else f"wrong: {error:.3g} off the dense product"


def burst(call: Callable[[], object], times: int, gpu: bool) -> tuple[Callable[[], object], str]:
    """That many calls at once: as a CUDA graph, without the host's work between them, or in a loop, and why."""

    def loop() -> None:
        for _ in range(times):
            call()

    if not gpu:
        return loop, "loop"
    try:
        graph = torch.cuda.CUDAGraph()
        # On the stream on which it has been called before: what a kernel keeps for a stream is not made within a graph.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            loop()
    except Exception as error:  # as above
        torch.cuda.synchronize()
        return loop, f"loop: {said(error)}"
    return graph.replay, "graph"


def measure(found: list[Contender], x: torch.Tensor, clock: Clock, seconds: float) -> dict[str, dict[str, Any]]:
    """Figures of each contender, medians of rounds in which all take turns; of whoever is wrong, only what is wrong."""
    results: dict[str, dict[str, Any]] = {}
    runs, expected = [], {}
    for one in found:
        if id(one.dense) not in expected:
            expected[id(one.dense)] = x.float() @ one.dense.float().T
        flop = 2 * x.numel() * len(one.dense)
        if reason := wrong(one, x, expected[id(one.dense)]):
            results[one.name] = {"wrong": reason}
            continue
        copies = min(-(-layers.COLD_BYTES // one.bytes), layers.MOST_COPIES)
        floor = max(FLOOR[0], one.bytes / FLOOR[1], flop / FLOOR[2])
        times = max(copies, round(BURST / floor)) if clock.gpu else 1
        run, queued = burst(lambda one=one: one.call(x), times, clock.gpu)
        results[one.name] = {"bytes": one.bytes, "flop": flop, "queued": queued}
        runs.append((results[one.name], lambda run=run, times=times: clock(run) / times))
    del expected
    samples = alternate([run for _, run in runs], seconds) if runs else []
    for (result, _), seen in zip(runs, samples):
        took = statistics.median(seen)
        result |= {"microseconds": took * 1e6, "samples": len(seen)}
        result |= (
            {"gb_s": result["bytes"] / took / 1e9} if len(x) <= FEW_ROWS else {"tflop_s": result["flop"] / took / 1e12}
        )
    return results


# ---- the two sections ----


def cache_bytes(device: str) -> int:
    """Of a GPU's last cache, 0 where nobody tells."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) if device == "cuda" else 0


def copy_section(ask: Ask) -> Iterator[Job]:
    """How fast memory is copied and cuBLAS multiplies."""
    clock, times = Clock(ask.device), 10 if ask.device == "cuda" else 1

    def line(what: str, call: Callable[[], object], figure: str, work: int, per: float) -> Lines:
        took = statistics.median(alternate([lambda: clock(call, times)], 10 * ask.sizes.seconds)[0])
        yield {"what": what, "microseconds": took * 1e6, "work": work, figure: work / took / per}

    source = torch.randint(256, (ask.sizes.copied,), dtype=torch.uint8, device=ask.device)
    target, n = torch.empty_like(source), ask.sizes.product
    yield "copy", line("copy: bytes read and written", lambda: target.copy_(source), "gb_s", 2 * len(source), 1e9)
    a, b = (torch.randn(n, n, device=ask.device).bfloat16() for _ in range(2))
    yield "product", line(f"cuBLAS: bfloat16, {n} x {n} x {n}", lambda: a @ b, "tflop_s", 2 * n**3, 1e12)


def kernel_section(ask: Ask) -> Iterator[Job]:
    """One product, its weight from memory: every shape with 4 bits, then the first with other bits."""
    # The copies of a weight take turns: together they are far larger than what is cached.
    layers.COLD_BYTES = max(layers.COLD_BYTES, 4 * cache_bytes(ask.device))
    shapes = [(shape, 4) for shape in ask.sizes.shapes]
    for shape, bits in [*shapes, *((ask.sizes.shapes[0], bits) for bits in ask.sizes.other_bits)]:
        yield f"{shape[0]}x{shape[1]} with {bits} bits", products(ask, *shape, bits)


def products(ask: Ask, inputs: int, outputs: int, bits: int) -> Lines:
    """A line for each number of rows, and what there is to be said."""
    clock, where = Clock(ask.device), f"{inputs}x{outputs} with {bits} bits"
    with torch.cuda.stream(torch.cuda.Stream()) if clock.gpu else nullcontext():
        weight = layers.random_weight(outputs, inputs, Scheme(bits, ask.sizes.group), ask.device)
        kernel, everybody, notes = contenders(weight, cold=clock.gpu)
        yield from notes
        for rows in ask.sizes.rows:
            x = torch.randn(rows, inputs, device=ask.device).bfloat16()
            own, more = ways(kernel, everybody[0], rows)
            found = measure([*everybody, *more], x, clock, ask.sizes.seconds)
            dense = found[CUBLAS].get("microseconds")
            for name, one in found.items():
                if why := one.get("wrong") or one["queued"].partition("loop: ")[2]:
                    yield f"{where}, {rows} rows: {name} {why if 'wrong' in one else f'not in a graph: {why}'}"
                if "microseconds" in one:
                    one["speedup"] = dense / one["microseconds"] if dense else None
            found |= {own: found[OURS]} if own else {}
            place = {"shape": f"{inputs}x{outputs}", "in": inputs, "out": outputs, "bits": bits, "rows": rows}
            yield {**place, "kernel": f"{kernel.NAME} {own}".strip(), "contenders": found}
    if clock.gpu:
        del weight, everybody, x
        torch.cuda.empty_cache()
