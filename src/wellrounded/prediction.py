"""What a run will take, before it begins: memory, disk and time, from the model's shapes alone; and how to take less.

The model is on the meta device; nothing of it is read. What is alive when is counted for the phases of a run, whose
largest is its peak. Every number here is checked against runs in dev/LOG.md.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from torch import nn

from .checkpoint import Source
from .core import choice, gptq
from .errors import UsageError
from .formats.gptq import layout
from .memory import shown
from .model import blocks as layers_of
from .model.inputs import STACK_BYTES
from .model.rotation import NotExact, ends_of
from .model.stream import LARGE
from .plan import Plan
from .presets import FAST, TRIED_ON, Preset
from .progress import duration
from .rates import Rates
from .room import BATCH_TOKENS, Room, Workload, rooms
from .sampling import AT_ONCE
from .shapes import Block, Siblings, block_of, bytes_of
from .training import Training

OVERHEAD = 340 * 2**20  # of a process at work: buffers of matrix products, threads, what the allocator holds back
CONTEXT = 600 * 2**20  # what a GPU's driver takes for a process
WRITING = 3.0  # times what reading takes: one token of each window at a time
STATES = 4  # hidden states of a step's windows besides what entered each block: teacher's, slopes, those on their way


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

    base    what the process holds already, in bytes
    preset  what is done for accuracy
    """

    def __init__(
        self, source: Source, plan: Plan, names: list[str], work: Workload, device: str = "cpu", base: int = 0,
        preset: Preset = FAST,
    ) -> None:  # fmt: skip
        self.source, self.plan, self.names, self.work = source, plan, names, work
        self.device, self.base = device, base
        self.preset, self.settings = preset, preset.settings
        self.training = preset.training if work.windows else None
        self.rotates = preset.rotates and work.windows > 0 and _may_rotate(source.model)
        # Whether what layers read is compared with the original, and whether that is on its way beside: see pipeline.
        self.compared = self.settings.paired and self.settings.true_sequential
        self.streams = 2 if self.settings.paired or self.training else 1
        residual, weighed = self.settings.residual, self.settings.token_weights
        # Residuals that are compared, and outputs that weigh tokens before they join one, by token.
        self.told = (residual + (residual or weighed) + weighed) if self.compared else 0
        model = source.model
        self.hidden = _width(model)
        self.blocks = [block_of(name, model.get_submodule(name), plan, self.hidden, model) for name in names]
        inside = sum(block.bytes for block in self.blocks)
        self.outside = max(0, bytes_of(model) - inside)
        config = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = getattr(text, "vocab_size", 0) or 0
        self.single = max(source.sizes.values(), default=0)
        shapes = [(*layers_of.shape_of(model.get_submodule(name)), scheme) for name, scheme in plan.schemes.items()]
        self.codes = sum(outputs * inputs for outputs, inputs, _ in shapes)
        self.groups = sum(outputs * scheme.groups(inputs) for outputs, inputs, scheme in shapes)

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
        forward, solving = 0.0, 0.0
        for block in self.blocks:
            here = base + kept + self._inside(block, room)
            matrices = max((self._matrices(one, room) for one in block.sets), default=0)
            counting = max((22 * one.inputs for one in block.sets if self._compares(one)), default=0)
            forward = max(forward, here + matrices + batch * max(block.working * 2, counting))
            solving = max(solving, here + self._solving(block, room))
        found |= {"running a block": int(forward), "solving": int(solving)}
        if self.work.held_out:
            found["comparing"] = base + kept + self.outside + self._logits(2)
        if self.rotates:
            found["rotating"] = base + self.outside + largest + 3 * self.single
        if self.training:
            found["training"] = int(base + kept + self.outside + self._training(batch))
            if self._missing():
                found["writing text to train on"] = int(base + kept + self._writing())
        return found

    def _inside(self, block: Block, room: Room) -> float:
        """A block, what of it is packed already, and what waits in it, beside the block as it was and what waits there.

        Layers that are not solved yet are in both, the last ones while most is in memory.
        What layers add to a residual is kept, too, until it has been compared.
        """
        inside = block.bytes * (1 + self.plan_bits / 16)
        if self.compared:
            inside += block.bytes - sum(2 * one.inputs * one.outputs * one.experts for one in block.sets[-1:])
        if room.waits:
            inside += self.work.tokens * (1 + self.compared) * block.waiting * 2
            inside += self.work.tokens * self.hidden * 2 * self.told
        return inside

    def _compares(self, one: Siblings) -> bool:
        """Whether it is known what these layers read in the original model."""
        return self.compared and one.experts == 1

    def _writes(self, one: Siblings) -> bool:
        """Whether this is a layer that may write to the residual stream, and is compared by that."""
        return self._compares(one) and self.settings.residual and one.weights == (self.hidden,)

    def _matrices(self, one: Siblings, room: Room) -> int:
        """Hessians of siblings; with what they read in the original, moments of all tokens and of held-out ones."""
        if not self._compares(one):
            return _at_once(one) * _square(one, room)
        return 4 * _square(one, room) + 2 * 4 * one.outputs * one.inputs * self._writes(one)

    def _logits(self, copies: int) -> int:
        """One window's logits so many times, in bfloat16, and the rows of them that are compared in float32."""
        return self.work.length * self.vocabulary * 2 * copies + 32 * self.vocabulary * 4 * 6

    def _writing(self) -> float:
        """The whole model, keys and values of the windows that it continues side by side, and their next tokens."""
        cache = sum(block.keys for block in self.blocks) * self.work.length * 2
        return bytes_of(self.source.model) + AT_ONCE * (cache + self.vocabulary * 4 * 4)

    def _training(self, batch: int) -> float:
        """Codes of all layers, what is known of each scale, and one block with the graph of one batch, or logits.

        Of a scale: itself, the best and, in float32, what is learned, its slope and two moments. What entered every
        block is kept for a step's windows.
        """
        assert self.training is not None
        step = self.training.windows_per_step * self.work.length
        states = (len(self.blocks) + STATES) * step * self.hidden * 2
        graphs = (block.bytes + min(step, batch) * block.graph * 2 for block in self.blocks)
        codes = 0 if self.device.startswith("cuda") else self.codes  # which stay on the host
        return codes + self.groups * 21 + states + max(*graphs, self._logits(4))

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
        masks = tokens * self.work.length if self.work.padded else 0
        others = (self.streams - 1) * self.work.tokens + self._learned()
        return (tokens + others) * self.hidden * 2 + masks

    def _learned(self) -> int:
        """Tokens that are trained on."""
        return self.training.windows * self.work.length if self.training else 0

    def _missing(self) -> int:
        """Tokens of these that the model must write itself."""
        return max(0, self._learned() - self.work.further * self.work.length)

    def _solving(self, block: Block, room: Room, with_data: bool = True) -> int:
        """Hessians, factors, and what else solving takes, of the set of the block that takes most."""
        most = 0
        for one in block.sets:
            members = _at_once(one) if with_data else 1
            working = gptq.working_bytes(one.inputs, one.outputs, members) - members * 4 * one.inputs**2
            if with_data:
                working += self._matrices(one, room) + members * _square(one, room)
            most = max(most, working + 2 * members * one.outputs * one.inputs)
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
        trained = self.groups * 16 + self._missing() * 8 if self.training else 0  # its state and text
        disk = output + min(output, 4 * 2**30) + spilled + trained
        cuda = self.device.startswith("cuda")
        codes = self.codes if self.training else 0
        ahead = 2 * max(block.bytes for block in self.blocks)  # one that is read while another is computed with
        host = self.base + OVERHEAD + self.outside + max(codes, ahead) if cuda else peak
        seconds = self._seconds(room, rates)
        vram = peak if cuda else 0
        return Forecast(room, int(host), int(vram), output, int(disk), seconds, phases, len(self.blocks), self.device)

    def _seconds(self, room: Room, rates: Rates) -> float:
        work = self.work
        total = rates.startup + 2 * self.source.bytes / rates.reading + self.output_bytes() / rates.writing
        for block in self.blocks:
            runs = 1.0 if room.waits else 1 + sum(range(len(block.sets))) / max(len(block.sets), 1)
            tokens = work.tokens * runs * self.streams + 2 * work.held_out * work.length
            tokens += min(work.length, work.tokens)  # to find siblings
            if self.compared:  # and writers: each is tried once, and nothing once
                tried = 1 + sum(self._writes(one) for one in block.sets)
                tokens += tried * min(max(room.batch_tokens, work.length), work.tokens)
            total += rates.running(block, tokens, work.length * self.hidden)
            total += sum(self._set_seconds(one, rates) for one in block.sets)
        if self.training:
            total += self._training_seconds(rates, self.training)
        if self.rotates:
            total += 2 * self._trial()._seconds(room, rates) + 3 * self.source.bytes / rates.reading
        return total + 2 * rates.answering(work.held_out * work.length, self.hidden, self.vocabulary)

    def _trial(self) -> Forecaster:
        """Of a run that shows whether the model is better rotated."""
        work = replace(self.work, windows=min(TRIED_ON, self.work.windows), further=0)
        preset = replace(self.preset, rotates=False, training=None)
        return Forecaster(self.source, self.plan, self.names, work, self.device, self.base, preset)

    def _set_seconds(self, one: Siblings, rates: Rates) -> float:
        """To count what layers read, and to solve them."""
        work = self.work
        seconds = work.tokens * one.share * one.experts * one.inputs**2 / rates.gram
        if self._compares(one):
            seconds += work.tokens * one.inputs * (one.inputs + one.outputs * self._writes(one)) / rates.drift
        experts = -(-one.experts // work.processes)
        outputs = one.outputs if one.experts > 1 else _largest_share(one.weights, work.processes)
        outputs += choice.ROWS * self._compares(one)  # on which it is chosen how to solve the others
        return seconds + experts * rates.solving(one.inputs, outputs, bool(work.windows))

    def _training_seconds(self, rates: Rates, training: Training) -> float:
        """A window goes through each block, again with a graph, and back for twice as much; others are looked at."""
        length = self.work.length
        learned = self._learned()
        seen = (training.steps // training.every + 2) * -(-self.work.held_out // 2) * length
        tokens = (5.5 + 1) * learned + WRITING * self._missing() + seen  # they go through the original, too
        blocks = sum(rates.running(block, tokens, length * self.hidden) for block in self.blocks)
        behind = rates.answering(3 * learned + 2 * seen, self.hidden, self.vocabulary)
        return blocks + behind + self.source.bytes / rates.reading


def _largest_share(outputs: tuple[int, ...], processes: int) -> int:
    """Outputs of the layers that one process solves, in turn, where that is most."""
    return max(sum(outputs[rank::processes]) for rank in range(min(processes, len(outputs))))


def _width(model: nn.Module) -> int:
    """Elements of a hidden state, as wide as an embedding; 0 if the model has none that says so."""
    with suppress(NotImplementedError, AttributeError):
        return int(model.get_input_embeddings().weight.shape[-1])  # type: ignore[operator,union-attr]
    return 0


def _may_rotate(model: nn.Module) -> bool:
    """Whether the model's ends allow it; what is between them shows when it runs."""
    try:
        ends_of(model)
    except NotExact:
        return False
    return True


def _square(one: Siblings, room: Room) -> int:
    """Bytes of a Hessian, or a factor, as far as memory must hold them."""
    return 0 if room.maps and one.inputs >= LARGE else 4 * one.inputs**2


def _at_once(one: Siblings) -> int:
    """How many experts are solved together, and one Hessian of all of them besides."""
    if one.experts == 1:
        return 1
    return max(1, min(one.experts, STACK_BYTES // (6 * 4 * one.inputs**2))) + 1
