"""quantize(): the single path from a dense model to a finished checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, card
from .blockwise import Blockwise
from .calibration import Calibration
from .checkpoint import Reader, Source, Writer
from .core import gptq
from .core.recipe import Recipe
from .core.weight import QuantizedWeight
from .errors import OutOfMemory, UsageError
from .formats import config as config_format
from .formats import gptq as gptq_format
from .ledger import Ledger
from .memory import exhausted, give_back, peak_rss_bytes, tidy
from .model import blocks as layers_of
from .model.experts import Experts
from .model.inputs import Member
from .model.stream import SpillFile, Stream, mapped
from .model.walk import BlockWalk
from .model.weights import put
from .plan import UNUSED, make_plan
from .progress import Clock, Progress
from .proof import Behind, fidelity
from .report import LayerResult, Report
from .solving import Solved
from .store import Store, WriteBehind
from .team import Team
from .training import Training
from .tuning import Tuning


class Run:
    """One quantization: a source, a recipe, calibration windows (or None for plain rounding), and where it goes."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        calibration: Calibration | None,
        settings: gptq.Settings,
        device: str = "cpu",
        lm_head: bool = False,
        training: Training | None = None,
    ) -> None:
        self.foretold_bytes, self.tight, self.caution = 0, False, ""  # of memory: see Request.run
        self.device = device
        self.source, self.recipe, self.calibration, self.settings = source, recipe, calibration, settings
        pictures = calibration is not None and bool(calibration.windows.more)
        self.walk = BlockWalk(source.model, source.read, device, towers=pictures)
        self.plan = make_plan(source.model, self.walk.names, recipe, lm_head)
        self.work = Blockwise(self.walk, self.plan, settings, calibration is not None)
        self.ledger = Ledger(source, self.plan, self.walk.names)
        self.owners = self.ledger.owners
        self.work.storable = {} if self.owners else self.ledger.stored  # what is shared has one bias, but several means
        self.shared: dict[str, QuantizedWeight] = {}  # by name of its owner
        self.version = config_format.version_for(recipe.scheme, *(rule.scheme for rule in recipe.rules))
        self.tuning = Tuning(self.walk, self.ledger, self.version, training) if training and calibration else None
        self.report = Report(source.label, "", str(recipe.scheme), kept=self.plan.kept, version=__version__)
        self.report.rotation = source.rotation
        self.report.expert_modules = [n for n, m in source.model.named_modules() if isinstance(m, Experts)]
        self.report.generates = getattr(source.model, "can_generate", lambda: True)()
        self.report.notes, self.report.overlooked_weights = self.plan.notes(), self.plan.overlooked

    def settle(self, before: dict[str, Any]) -> str:
        """Go on with the batches of the run that this one continues, if memory allows, for the same last bits.

        `before` is what that run noted (`noted`), {} for a new one. Returns what there is to be said.
        """
        tokens, mine = before.get("batch_tokens", self.work.room.batch_tokens), self.work.room.batch_tokens
        self.work.room = replace(self.work.room, batch_tokens=min(tokens, mine))
        if tokens <= mine:
            return ""
        return f"going on in batches of {mine:,} tokens, not {tokens:,}: the last bits of a result depend on it"

    def noted(self) -> dict[str, Any]:
        """What a run that continues this one wants to know, besides the request."""
        return {"batch_tokens": self.work.room.batch_tokens}

    def join(self, team: Team) -> None:
        """Carry this run out together with other processes, which have been asked for the same.

        Raises UsageError if they have read other data, or if the layers of a block are to be found while observing.
        """
        if self.tuning is not None:
            raise UsageError("training scales was asked of several processes; preset best takes one")
        if not self.settings.true_sequential:
            raise UsageError("true_sequential=False was asked of several processes, which must agree on sets of layers")
        if len({*team.all(self.calibration.digest if self.calibration else "")}) > 1:
            raise UsageError("the processes of this run have read different calibration data; give them the same files")
        if any(other != [*self.plan.schemes] for other in team.all([*self.plan.schemes])):
            raise UsageError("the processes of this run have opened different models; give them the same files")
        self.work.team = self.walk.hessians = team

    def write(
        self,
        writer: Writer,
        tell: Callable[[Progress], None] = lambda progress: None,
        judge: Callable[[Report], None] = lambda report: None,
    ) -> Report:
        """Quantize into `writer` and finish it, unless `judge` raises; the report of the finished checkpoint."""
        started = time.perf_counter()
        self.quantize(writer, tell)
        judge(self.report)
        self._finish(writer, started)
        return self.report

    def quantize(self, writer: Store, tell: Callable[[Progress], None] = lambda progress: None) -> Report:
        """Quantize block after block into `writer`; the report, without what only a finished checkpoint has."""
        self.work.room = self.work.team.agree(self.work.room)
        clock = Clock(len(self.walk.names), tell)
        if self.caution:
            clock.say(self.caution)
        for part in self.ledger.outside:
            if part not in writer.finished:
                writer.add(part, dict(self.ledger.dense(part)))
        spill = SpillFile(writer.scratch) if self.work.room.spills and writer.scratch else None
        if self.work.room.maps and writer.scratch:
            self.work.team.square = mapped(writer.scratch)
        try:
            behind = WriteBehind(writer) if self.device.startswith("cuda") else nullcontext(writer)
            with tidy() if self.tight else nullcontext(), behind as store:
                self._quantize(store, clock, spill)
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
            raise OutOfMemory(
                f"{self.walk.names[min(clock.done, clock.total - 1)]}: memory does not suffice "
                f"({str(error).splitlines()[0]}); finished blocks are kept: free some, use shorter windows (--length), "
                "and run the same command again"
            ) from None
        finally:
            if spill is not None:
                spill.close()
        self.report.calibration = self.calibration.to_dict() if self.calibration else None
        self.report.parameters = self.work.parameters
        self.report.source_bytes, self.report.peak_rss_bytes = self.source.bytes, peak_rss_bytes()
        self.report.seconds = {"total": clock.seconds}
        return self.report

    def _quantize(self, writer: Store, clock: Clock, spill: SpillFile | None) -> None:
        calibrating, dense, quantized = self._streams(spill)
        teacher = self._teacher(writer, clock, spill)
        self.plan.excuse(self.walk.hollow.idle)
        give_back()
        clock.enter()
        there = {*writer.finished}
        for index, name, block in self.walk:
            mine, replayed = self._mine(name, block), name in there
            known = None if replayed else self.work.known(index, mine, [*dense, *calibrating])
            writers = self.work.writers(index, known, [*dense, *calibrating])
            self.walk.advance(index, *dense, *teacher)
            twin = self.work.twin(index, known, writers, calibrating)
            self._inherit(name, block)
            if replayed:
                self._replay(name, writer)
                self.walk.advance(index, *calibrating)
            else:
                self._write_block(name, self.work.quantize(index, mine, known, calibrating, clock, twin), writer)
                del twin
            self.walk.advance(index, *quantized)
            tokens = self.calibration.windows.tokens if self.calibration else 0
            clock.passed(name, tokens, replayed, self.report)
        with self.walk.outside():
            packed = self._quantize_head(writer, calibrating) if self.plan.head else None
            behind = {f"{self.plan.head}.weight": packed} if packed is not None else {}
            self.report.fidelity = self._prove(self._proving(dense), self._proving(quantized), behind)
        if self.tuning is not None:
            self._tune(writer, clock, next(iter([*teacher, calibrating[0].original])), dense, behind)

    def _prove(self, dense: list[Stream], quantized: list[Stream], behind: Behind) -> dict[str, float | int] | None:
        return fidelity(self.walk, dense, quantized, self.report.generates, self.work.team, behind)

    def _proving(self, streams: list[Stream]) -> list[Stream]:
        """The held-out windows that prove the result: all but those that training chooses its best step by."""
        if self.tuning is None:
            return streams
        return [stream.some(range(1, len(stream.ids), 2)) for stream in streams]

    def _tune(self, writer: Store, clock: Clock, teacher: Stream | None, dense: list[Stream], behind: Behind) -> None:
        """Train scales and norms of what is written, amend that, and prove the result again."""
        assert self.tuning is not None and teacher is not None
        if writer.amended is None:
            quantized = {r.name: weight for part in writer.finished for weight, r in self._read(part, writer)}
            choosing = [stream.some(range(0, len(stream.ids), 2)) for stream in dense]
            tensors, notes = self.tuning.tune(
                quantized, teacher, next(iter(choosing), None), writer.state("training"), clock.say
            )
            writer.amend(tensors, notes | {"fidelity": self.report.fidelity})
            del quantized
        self.report.training = writer.amended
        gains = self.tuning.gains(writer.amendment())
        again = [self._held_out() for _ in dense]
        for index, name, block in self.walk:
            for weight, result in self._read(name, writer):
                self.work.place(result.name, weight)
            self._inherit(name, block)
            for full in [full for full in gains if full.startswith(f"{name}.")]:
                put(self.walk.model, full, gains.pop(full))
            self.walk.advance(index, *again)
        with self.walk.outside():
            for full, gain in gains.items():
                old = self.walk.model.get_parameter(full)
                behind[full] = nn.Parameter(gain.to(old.device, old.dtype), requires_grad=False)
            self.report.fidelity = self._prove(self._proving(dense), self._proving(again), behind)

    def _write_block(self, name: str, solved: Iterable[Solved], writer: Store) -> None:
        tensors: dict[str, torch.Tensor] = {}
        results: dict[str, tuple[LayerResult, float]] = {}  # of a layer that is solved again, the later one counts
        for quantized, result in solved:
            self._share(result.name, quantized)
            tensors |= self.ledger.packed(result.name, quantized, self.version)
            results[result.name] = result, quantized.scheme.bits_per_weight(quantized.shape[1])
        for result, bits in results.values():
            self.report.add(result, bits)
        tensors |= self.ledger.dense(name)
        tensors |= {self.ledger.stored[full]: value for full, value in self.walk.settled(name).items()}
        self.source.verify()
        writer.add(name, tensors, [asdict(result) for result, _ in results.values()])
        del tensors
        give_back()

    def _quantize_head(self, writer: Store, calibrating: list[Stream]) -> nn.Parameter:
        """Solve the output head on what reaches it; the weight that it then has. The model keeps its own."""
        name = self.plan.head
        head = self.source.model.get_submodule(name)
        dense = head.weight  # tied ones are the embeddings' too, which stay as they are
        if name in writer.finished:
            self._replay(name, writer)
        else:
            hessian = self.work.team.new(layers_of.shape_of(head)[1], dense.device) if calibrating else None
            for stream in calibrating:
                for batch, mask in enumerate(stream.masks):
                    hessian.update(self.walk.reaching(head, stream, batch), mask)
            hessian = self.work.team.whole(hessian, layers_of.shape_of(head)[1], dense.device) if calibrating else None
            member = Member([name], hessian, hessian.tokens if hessian else 0)
            for quantized, result in self.work.solve([member]):
                writer.add(name, self.ledger.packed(name, quantized, self.version), [asdict(result)])
                self.report.add(result, quantized.scheme.bits_per_weight(quantized.shape[1]))
                self.work.place(name, quantized)
        packed, head.weight = head.weight, dense
        return packed

    def _streams(self, spill: SpillFile | None) -> tuple[list[Stream], list[Stream], list[Stream]]:
        """Calibration windows, and the held-out ones twice: through the dense blocks and through the quantized."""
        if self.calibration is None:
            return [], [], []
        windows, held = self.work.team.mine(self.calibration.windows), self.work.team.some(self.calibration.held_out)
        batch = max(1, self.work.room.batch_tokens // windows.length)
        with self.walk.outside():
            calibrating = [self.walk.stream(windows.ids, windows.mask, batch, windows.more, spill)]
            if not self.plan.head:
                calibrating[0].more = [{} for _ in calibrating[0].ids]  # pictures have done their part
            if self.settings.paired or self.tuning:
                calibrating[0].original = calibrating[0].twin()
            if not len(held):
                return calibrating, [], []
            both = (self._held_out(spill) for _ in range(2))
            return calibrating, *([stream] for stream in both)

    def _held_out(self, spill: SpillFile | None = None) -> Stream:
        """One window at a time: at the end each batch's logits exist twice, and a vocabulary is large."""
        held = self.work.team.some(self.calibration.held_out)
        return self.walk.stream(held.ids, held.mask, 1, held.more, spill)

    def _teacher(self, writer: Store, clock: Clock, spill: SpillFile | None) -> list[Stream]:
        """What is trained on, on its way through the original; nothing if that is the calibration text itself."""
        if self.tuning is None or writer.amended is not None:
            return []
        text = self.tuning.text(self.calibration, writer.state, clock.say)
        if text is self.calibration.windows:
            return []
        return [
            self.walk.stream(text.ids, text.mask, max(1, self.work.room.batch_tokens // text.length), text.more, spill)
        ]

    def _mine(self, name: str, block: nn.Module) -> list[str]:
        """The layers of a block that are to be solved; what it shares with earlier blocks is solved there."""
        return [inside for inside in self._planned(name, block) if f"{name}.{inside}" not in self.owners]

    def _inherit(self, name: str, block: nn.Module) -> None:
        """What a block shares with earlier ones gets their weights."""
        for full in (f"{name}.{inside}" for inside in self._planned(name, block)):
            if owner := self.owners.get(full):
                if owner in self.plan.schemes:
                    self.work.place(full, self.shared[owner])
                else:
                    self.plan.keep(full, UNUSED, 0.0)

    def _planned(self, name: str, block: nn.Module) -> list[str]:
        return [inside for inside in layers_of.linears(block) if f"{name}.{inside}" in self.plan.schemes]

    def _share(self, name: str, quantized: QuantizedWeight) -> None:
        if name in self.owners.values():
            self.shared[name] = quantized

    def _replay(self, name: str, writer: Store) -> None:
        """Take a block that an earlier run finished from its part."""
        for weight, result in self._read(name, writer):
            self.work.place(result.name, weight)
            self._share(result.name, weight)
            self.report.add(result, weight.scheme.bits_per_weight(weight.shape[1]))
        solved = {note["name"] for note in writer.finished[name]}
        solved |= self.owners.keys()
        for full in [full for full in self.plan.schemes if full.startswith(f"{name}.") and full not in solved]:
            self.work.leave(full)

    def _read(self, name: str, writer: Store) -> Iterator[Solved]:
        """What a finished part has of quantized layers."""
        stored = self.work.team.tensors(lambda: writer.read_part(name))
        for full, place in self.ledger.stored.items() if self.settings.biases else ():
            layer, _, leaf = full.rpartition(".")
            if leaf == "bias" and layer in self.plan.schemes and place in stored:
                self.walk.settle(full, stored[place])
        for note in writer.finished[name] or []:
            result = LayerResult(**note)
            outputs, inputs = layers_of.shape_of(self.source.model.get_submodule(result.name))
            prefix, scheme = self.source.packed_name(result.name), self.plan.schemes[result.name]
            tensors = {t.removeprefix(f"{prefix}."): v for t, v in stored.items() if t.startswith(f"{prefix}.")}
            yield gptq_format.from_tensors(tensors, scheme, inputs, outputs, self.version, prefix), result

    def _finish(self, writer: Writer, started: float) -> None:
        self.report.out = str(writer.out)
        parts = [*self.ledger.outside, *self.walk.names, *([self.plan.head] if self.plan.head else [])]
        writer.finish(parts, lambda directory: self._write_rest(directory, started))

    def _write_rest(self, directory: Path, started: float) -> None:
        self.source.verify()
        self.report.tensors = self.ledger.account(Reader(directory).places)
        self.source.write_files(directory)
        self.report.size_bytes = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
        self.report.seconds = {"total": time.perf_counter() - started}
        untied = {"tie_word_embeddings": False} if self.plan.head else {}
        card.write_files(directory, {**self.source.config, **untied}, self.stored_config(), self.report)

    def request(self) -> dict[str, Any]:
        """What decides every byte of the result, JSON-ready: a run is continued only by an equal request."""
        further = self.calibration.further_digest if self.calibration else None
        return {
            "source": str(Path(self.source.label).resolve()) if Path(self.source.label).exists() else self.source.label,
            "tensors": self.source.fingerprint,
            "recipe": config_format.to_config(self.recipe, self.version),
            "lm_head": bool(self.plan.head),
            "settings": asdict(self.settings),
            **({"rotation": self.source.rotation} if self.source.rotation else {}),
            **({"training": {**asdict(self.tuning.training), "text": further}} if self.tuning else {}),
            "calibration": self.calibration.digest if self.calibration else None,
        }

    def stored_config(self) -> dict[str, Any]:
        """The `quantization_config` of the result; how the codes were found is in it too, though no reader needs it."""
        meta = {"damp_percent": self.settings.damping, "order": self.settings.order}
        recipe = Recipe(self.recipe.scheme, (*self.ledger.beyond(), *self.recipe.rules))
        stored = config_format.to_config(recipe, self.version, self.ledger.kept(), meta, bool(self.plan.head))
        return {**stored, "true_sequential": self.settings.true_sequential}
