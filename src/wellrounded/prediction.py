"""What a run will take, before it begins: memory, disk and time, from the model's shapes alone; and how to take less.

The model is on the meta device; nothing of it is read. What is alive when is counted for the phases of a run, whose
largest is its peak. Every number here is checked against runs in dev/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from torch import nn

from .checkpoint import Source
from .core import gptq
from .errors import UsageError
from .formats.gptq import layout
from .memory import shown
from .model import blocks as layers_of
from .model.inputs import STACK_BYTES
from .model.stream import LARGE
from .plan import Plan
from .progress import duration
from .rates import Rates
from .shapes import Block, Siblings, block_of, bytes_of

OVERHEAD = 340 * 2**20  # of a process at work: buffers of matrix products, threads, what the allocator holds back
CONTEXT = 600 * 2**20  # what a GPU's driver takes for a process
BATCH_TOKENS = 4096  # enough for matmuls at full speed


@dataclass(frozen=True)
class Room:
    """How much a run keeps in memory, from fast to frugal.

    batch_tokens  per forward pass, one window at least; only this changes the last bits of the result
    waits         batches wait inside a block for its layers to be solved (siblings.staged), or run anew for each set
    spills        hidden states, and what a batch alone is given, lie in a file
    maps          large Hessians and factors lie in files that are mapped into memory
    """

    batch_tokens: int = BATCH_TOKENS
    waits: bool = True
    spills: bool = False
    maps: bool = False

    def __str__(self) -> str:
        parts = [f"batches of {self.batch_tokens:,} tokens"]
        parts += [] if self.waits else ["blocks run again for each set of layers"]
        parts += ["activations on disk"] if self.spills else []
        parts += ["large matrices on disk"] if self.maps else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Workload:
    """One process's share of a run: windows to calibrate on, and held-out ones, of one length; none for no data.

    processes  how many there are, to share the layers of a set of siblings too
    """

    windows: int
    held_out: int
    length: int
    padded: bool = False
    processes: int = 1

    @property
    def tokens(self) -> int:
        """Of the calibration windows, padding included."""
        return self.windows * self.length


@dataclass(frozen=True)
class Forecast:
    """What a run will take, all in bytes and seconds. `phases` says what is in memory when; the largest is the peak.

    disk counts the result and what is needed beside it while the run goes on.
    """

    room: Room
    peak_memory_bytes: int
    peak_vram_bytes: int
    output_bytes: int
    disk_bytes: int
    seconds: float
    phases: dict[str, int]
    blocks: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, for JSON."""
        return asdict(self)

    def summary(self) -> list[tuple[str, str]]:
        """As (label, value) rows."""
        largest = max(self.phases, key=self.phases.__getitem__)
        memory = f"{shown(self.peak_memory_bytes)}, most of it while {largest} ({self.room})"
        rows = [("peak memory", memory)]
        if self.peak_vram_bytes:
            rows = [("peak GPU memory", f"{shown(self.peak_vram_bytes)}, most while {largest} ({self.room})")]
            rows.append(("peak memory", shown(self.peak_memory_bytes)))
        return [
            *rows,
            ("size", shown(self.output_bytes)),
            ("disk", f"{shown(self.disk_bytes)} while it runs, the result included"),
            ("time", f"about {duration(self.seconds)} on this {self.device}, for {self.blocks} blocks"),
        ]


class Forecaster:
    """Knows a model's shapes and predicts runs of it in various rooms.

    base  what the process holds already, in bytes
    """

    def __init__(
        self, source: Source, plan: Plan, names: list[str], work: Workload, device: str = "cpu", base: int = 0
    ) -> None:
        self.source, self.plan, self.work, self.device, self.base = source, plan, work, device, base
        model = source.model
        self.hidden = _width(model)
        self.blocks = [block_of(name, model.get_submodule(name), plan, self.hidden, model) for name in names]
        inside = sum(block.bytes for block in self.blocks)
        self.outside = max(0, bytes_of(model) - inside)
        config = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = getattr(text, "vocab_size", 0) or 0
        self.single = max(source.sizes.values(), default=0)

    def phases(self, room: Room) -> dict[str, int]:
        """Bytes alive at the peak of each phase of a run, the process itself included."""
        base = CONTEXT if self.device.startswith("cuda") else self.base + OVERHEAD
        largest = max(block.bytes for block in self.blocks)
        if not self.work.windows:
            rows = max(self._solving(block, room, with_data=False) for block in self.blocks)
            return {"reading": base + self.outside * 2, "solving": base + largest + self.single + rows}
        kept = self._kept(room)
        batch = max(self.work.length, room.batch_tokens // self.work.length * self.work.length)
        found = {"reading": base + kept + self.outside + largest}
        forward, solving = 0, 0
        for block in self.blocks:
            here = base + kept + block.bytes * (1 + self.plan_bits / 16)
            if room.waits:
                here += self.work.tokens * block.waiting * 2
            hessians = max((_at_once(s) * _square(s, room) for s in block.sets), default=0)
            forward = max(forward, here + hessians + batch * block.working * 2)
            solving = max(solving, here + self._solving(block, room))
        found |= {"running a block": int(forward), "solving": int(solving)}
        # Two windows' logits, in bfloat16, and the rows of them that are compared in float32.
        logits = self.work.length * self.vocabulary * 2 * 2 + 32 * self.vocabulary * 4 * 6
        if self.work.held_out:
            found["comparing"] = base + kept + self.outside + logits
        return found

    @property
    def plan_bits(self) -> float:
        """The mean bits of the planned layers."""
        schemes = self.plan.schemes.values()
        return sum(scheme.bits for scheme in schemes) / max(len(schemes), 1)

    def _kept(self, room: Room) -> int:
        """Hidden states of all windows, and masks where each batch has its own."""
        if room.spills:
            return 0
        tokens = self.work.tokens + 2 * self.work.held_out * self.work.length
        return tokens * self.hidden * 2 + (tokens * self.work.length if self.work.padded else 0)

    def _solving(self, block: Block, room: Room, with_data: bool = True) -> int:
        """Hessians, and what solving takes, of the set of the block that takes most."""
        most = 0
        for one in block.sets:
            members = _at_once(one) if with_data else 1
            matrices = 4 * one.inputs**2
            working = gptq.working_bytes(one.inputs, one.outputs, members) - members * matrices
            squares = 2 * members * _square(one, room) if with_data else 0
            most = max(most, squares + working + 2 * members * one.outputs * one.inputs)
        return most

    def output_bytes(self) -> int:
        """The size of the result's tensors, to the byte but for headers."""
        packed = {f"{name}.weight" for name in self.plan.schemes}
        copied = sum(size for stored, size in self.source.sizes.items() if not {*self.source.made[stored]} & packed)
        return copied + sum(self._packed(name) for name in self.plan.schemes)

    def _packed(self, name: str) -> int:
        outputs, inputs = layers_of.shape_of(self.source.model.get_submodule(name))
        shapes = layout(self.plan.schemes[name], inputs, outputs).values()
        return sum(prod(shape) * dtype.itemsize for shape, dtype in shapes)

    def peak(self, room: Room) -> int:
        """The most bytes at once, of the GPU's memory where one computes."""
        return max(self.phases(room).values())

    def choices(self, batch: int | None = None) -> list[Room]:
        """From the fastest room to the most frugal, with `batch` windows per pass if somebody said how many."""
        length = self.work.length
        return list(rooms(batch * length if batch else BATCH_TOKENS, length))

    def room(self, limit: int | None, batch: int | None = None) -> Room:
        """The fastest room that fits into `limit` bytes, with `batch` windows per pass if somebody said how many.

        Raises UsageError naming the least that would do, if none does.
        """
        choices = self.choices(batch)
        for room in choices:
            if limit is None or self.peak(room) <= limit:
                return room
        least = min(choices, key=self.peak)
        phases = self.phases(least)
        raise UsageError(
            f"{shown(limit or 0)} of memory was allowed, but this run needs {shown(self.peak(least))} at least, while "
            f"{max(phases, key=phases.__getitem__)}; allow that much, or use fewer or shorter windows"
        )

    def predict(self, room: Room, rates: Rates) -> Forecast:
        """The forecast of a run in this room, on a machine of these rates."""
        phases = self.phases(room)
        peak = max(phases.values())
        output = self.output_bytes()
        spilled = self._kept(replace(room, spills=False)) if room.spills else 0
        disk = output + min(output, 4 * 2**30) + spilled
        cuda = self.device.startswith("cuda")
        host = self.base + OVERHEAD + self.outside + max(block.bytes for block in self.blocks) if cuda else peak
        seconds = self._seconds(room, rates)
        vram = peak if cuda else 0
        return Forecast(room, int(host), int(vram), output, int(disk), seconds, phases, len(self.blocks), self.device)

    def _seconds(self, room: Room, rates: Rates) -> float:
        work = self.work
        total = rates.startup + 2 * self.source.bytes / rates.reading + self.output_bytes() / rates.writing
        for block in self.blocks:
            runs = 1.0 if room.waits else 1 + sum(range(len(block.sets))) / max(len(block.sets), 1)
            tokens = work.tokens * runs + 2 * work.held_out * work.length + min(work.length, work.tokens)
            attention = 2 * work.length * self.hidden
            total += tokens * (2 * block.active + attention) / rates.products
            for one in block.sets:
                reached = work.tokens * one.share * one.experts
                total += reached * one.inputs**2 / rates.gram
                experts = -(-one.experts // work.processes)
                outputs = one.outputs if one.experts > 1 else _largest_share(one.weights, work.processes)
                total += experts * rates.solving(one.inputs, outputs, bool(work.windows))
        compared = work.held_out * work.length * self.vocabulary
        return total + 2 * compared * (2 * self.hidden / rates.products + 1 / rates.comparing)


def rooms(tokens: int, length: int) -> Iterator[Room]:
    """From the fastest to the most frugal."""
    yield Room(tokens)
    yield Room(tokens, waits=False)
    while True:
        yield Room(tokens, waits=False, spills=True)
        if tokens <= length:
            break
        tokens = max(length, tokens // 2)
    yield Room(tokens, waits=False, spills=True, maps=True)


def _largest_share(outputs: tuple[int, ...], processes: int) -> int:
    """Outputs of the layers that one process solves, in turn, where that is most."""
    return max(sum(outputs[rank::processes]) for rank in range(min(processes, len(outputs))))


def _width(model: nn.Module) -> int:
    """Elements of a hidden state, as wide as an embedding; 0 if the model has none that says so."""
    with suppress(NotImplementedError, AttributeError):
        return int(model.get_input_embeddings().weight.shape[-1])  # type: ignore[operator,union-attr]
    return 0


def _square(one: Siblings, room: Room) -> int:
    """Bytes of a Hessian, or a factor, as far as memory must hold them."""
    return 0 if room.maps and one.inputs >= LARGE else 4 * one.inputs**2


def _at_once(one: Siblings) -> int:
    """How many experts are solved together, and one Hessian of all of them besides."""
    if one.experts == 1:
        return 1
    return max(1, min(one.experts, STACK_BYTES // (6 * 4 * one.inputs**2))) + 1
