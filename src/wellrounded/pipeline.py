"""quantize(): the single path from a dense model to a finished checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from . import __version__, card
from .calibration import Calibration
from .checkpoint import Reader, Source, Writer
from .core import gptq
from .core.hessian import Hessian
from .core.recipe import Recipe, role_of
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import OutOfMemory, UsageError
from .formats import config as config_format
from .formats import gptq as gptq_format
from .ledger import Ledger
from .memory import exhausted, give_back, peak_rss_bytes
from .model import blocks as layers_of
from .model.experts import Experts
from .model.siblings import Bank, Member, Siblings, anew
from .model.stream import SpillFile, Stream, mapped
from .model.walk import BlockWalk
from .plan import UNUSED, make_plan
from .prediction import Room
from .progress import Clock, Progress
from .proof import fidelity
from .report import LayerResult, Report
from .solving import Solved, same_scheme, solve
from .team import Team, merged, shared


class Store(Protocol):
    """Where the parts of a result go, and which of them are there already: a checkpoint.Writer, or memory."""

    finished: dict[str, Any]
    scratch: Path | None  # a directory for what is needed during the run, if there is one

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None: ...

    def read_part(self, part: str) -> dict[str, torch.Tensor]: ...


class Run:
    """One quantization: a source, a recipe, calibration windows (or None for plain rounding), and where it goes."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        calibration: Calibration | None,
        settings: gptq.Settings,
        device: str = "cpu",
        batch: int | None = None,
        lm_head: bool = False,
    ) -> None:
        self.batch, self.room, self.caution = batch, Room(), ""  # the latter two: see Request.run
        self.device = device
        self.source, self.recipe, self.calibration, self.settings = source, recipe, calibration, settings
        pictures = calibration is not None and bool(calibration.windows.more)
        self.walk = BlockWalk(source.model, source.read, device, towers=pictures)
        self.team = self.walk.hessians = Team()
        self.uneven = False  # whether in its processes different layers are reached
        self.parameters = sum(p.numel() for p in source.model.parameters())
        self.plan = make_plan(source.model, self.walk.names, recipe, lm_head)
        self.ledger = Ledger(source, self.plan, self.walk.names)
        self.owners = self.ledger.owners
        self.shared: dict[str, QuantizedWeight] = {}  # by name of its owner
        self.version = config_format.version_for(recipe.scheme, *(rule.scheme for rule in recipe.rules))
        self.report = Report(source.label, "", str(recipe.scheme), kept=self.plan.kept, version=__version__)
        self.report.expert_modules = [n for n, m in source.model.named_modules() if isinstance(m, Experts)]
        self.report.generates = getattr(source.model, "can_generate", lambda: True)()
        self.report.notes, self.report.overlooked_weights = self.plan.notes(), self.plan.overlooked

    def settle(self, before: dict[str, Any]) -> str:
        """Go on with the batches of the run that this one continues, if memory allows, for the same last bits.

        `before` is what that run noted (`noted`), {} for a new one. Returns what there is to be said.
        """
        tokens, mine = before.get("batch_tokens", self.room.batch_tokens), self.room.batch_tokens
        self.room = replace(self.room, batch_tokens=min(tokens, mine))
        if tokens <= mine:
            return ""
        return f"going on in batches of {mine:,} tokens, not {tokens:,}: the last bits of a result depend on it"

    def noted(self) -> dict[str, Any]:
        """What a run that continues this one wants to know, besides the request."""
        return {"batch_tokens": self.room.batch_tokens}

    def join(self, team: Team) -> None:
        """Carry this run out together with other processes, which have been asked for the same.

        Raises UsageError if they have read other data, or if the layers of a block are to be found while observing.
        """
        if not self.settings.true_sequential:
            raise UsageError("true_sequential=False was asked of several processes, which must agree on sets of layers")
        if len({*team.all(self.calibration.digest if self.calibration else "")}) > 1:
            raise UsageError("the processes of this run have read different calibration data; give them the same files")
        if any(other != [*self.plan.schemes] for other in team.all([*self.plan.schemes])):
            raise UsageError("the processes of this run have opened different models; give them the same files")
        self.team = self.walk.hessians = team

    def write(self, writer: Writer, tell: Callable[[Progress], None] = lambda progress: None) -> Report:
        """Quantize into `writer` and finish it; the report of the finished checkpoint."""
        started = time.perf_counter()
        self.quantize(writer, tell)
        self._finish(writer, started)
        return self.report

    def quantize(self, writer: Store, tell: Callable[[Progress], None] = lambda progress: None) -> Report:
        """Quantize block after block into `writer`; the report, without what only a finished checkpoint has."""
        self.room = self.team.agree(self.room)
        clock = Clock(len(self.walk.names), tell)
        if self.caution:
            clock.say(self.caution)
        for part in self.ledger.outside:
            if part not in writer.finished:
                writer.add(part, dict(self.ledger.dense(part)))
        spill = SpillFile(writer.scratch) if self.room.spills and writer.scratch else None
        if self.room.maps and writer.scratch:
            self.team.square = mapped(writer.scratch)
        try:
            self._quantize(writer, clock, spill)
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
        self.report.parameters = self.parameters
        self.report.source_bytes, self.report.peak_rss_bytes = self.source.bytes, peak_rss_bytes()
        self.report.seconds = {"total": clock.seconds}
        return self.report

    def _quantize(self, writer: Store, clock: Clock, spill: SpillFile | None) -> None:
        calibrating, dense, quantized = self._streams(spill)
        self.plan.excuse(self.walk.idle)
        give_back()
        for index, name, block in self.walk:
            mine, replayed = self._mine(name, block), name in writer.finished
            known = None if replayed else self._known(index, mine, [*dense, *calibrating])
            self.walk.advance(index, *dense)
            if replayed:
                self._replay(name, writer)
                self.walk.advance(index, *calibrating)
            else:
                tensors, results = self._quantize_block(index, mine, known, calibrating, clock)
                self.source.verify()
                writer.add(name, tensors, [asdict(result) for result in results])
                del tensors
                give_back()
            self.walk.advance(index, *quantized)
            tokens = self.calibration.windows.tokens if self.calibration else 0
            clock.passed(name, tokens, replayed, self.report)
        with self.walk.outside():
            head = (self.plan.head, self._quantize_head(writer, calibrating)) if self.plan.head else None
            self.report.fidelity = fidelity(self.walk, dense, quantized, self.report.generates, self.team, head)

    def _quantize_head(self, writer: Store, calibrating: list[Stream]) -> nn.Parameter:
        """Solve the output head on what reaches it; the weight that it then has. The model keeps its own."""
        name = self.plan.head
        head = self.source.model.get_submodule(name)
        dense = head.weight  # tied ones are the embeddings' too, which stay as they are
        if name in writer.finished:
            self._replay(name, writer)
        else:
            hessian = self.team.new(layers_of.shape_of(head)[1], dense.device) if calibrating else None
            for stream in calibrating:
                for batch, mask in enumerate(stream.masks):
                    hessian.update(self.walk.reaching(head, stream, batch), mask)
            hessian = self.team.whole(hessian, layers_of.shape_of(head)[1], dense.device) if calibrating else None
            member = Member([name], hessian, hessian.tokens if hessian else 0)
            for quantized, result in self._solve([member]):
                writer.add(name, self.ledger.packed(name, quantized, self.version), [asdict(result)])
                self.report.add(result, quantized.scheme.bits_per_weight(quantized.shape[1]))
                self._place(head, quantized)
        packed, head.weight = head.weight, dense
        return packed

    def _streams(self, spill: SpillFile | None) -> tuple[list[Stream], list[Stream], list[Stream]]:
        """Calibration windows, and the held-out ones twice: through the dense blocks and through the quantized."""
        if self.calibration is None:
            return [], [], []
        windows, held = self.team.mine(self.calibration.windows), self.team.some(self.calibration.held_out)
        batch = self.batch or max(1, self.room.batch_tokens // windows.length)
        with self.walk.outside():
            calibrating = [self.walk.stream(windows.ids, windows.mask, batch, windows.more, spill)]
            if not self.plan.head:
                calibrating[0].more = [{} for _ in calibrating[0].ids]  # pictures have done their part
            if not len(held):
                return calibrating, [], []
            # One window at a time: at the end each batch's logits exist twice, and a vocabulary is large.
            both = (self.walk.stream(held.ids, held.mask, 1, held.more, spill) for _ in range(2))
            return calibrating, *([stream] for stream in both)

    def _mine(self, name: str, block: nn.Module) -> list[str]:
        """The layers of a block that are to be solved; what it shares with earlier blocks gets their weights."""
        mine = [inside for inside in layers_of.linears(block) if f"{name}.{inside}" in self.plan.schemes]
        for inside in mine:
            if owner := self.owners.get(f"{name}.{inside}"):
                if owner in self.plan.schemes:
                    self._place(block.get_submodule(inside), self.shared[owner])
                else:
                    self.plan.keep(f"{name}.{inside}", UNUSED, 0.0)
        return [inside for inside in mine if f"{name}.{inside}" not in self.owners]

    def _known(self, index: int, names: list[str], streams: list[Stream]) -> list[list[str]] | None:
        """Sets of siblings, None if they will be found while observing.

        Found on one window, and in a team, where all must walk the same way, on all if that does not reach every layer.
        """
        if not streams or not self.settings.true_sequential:
            return None
        known = self.walk.siblings(index, streams[0], names)
        if self.team.size == 1:
            return known
        if sum(map(len, known)) < len(names):
            known = self.walk.all_siblings(index, streams[-1], names)
        found = self.team.all(known)
        self.uneven = any(other != found[0] for other in found)
        return merged(found)

    def _quantize_block(
        self, index: int, mine: list[str], known: list[list[str]] | None, calibrating: list[Stream], clock: Clock
    ) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
        """Solve every layer of the block, put the result back into it, and return what belongs on disk.

        When memory does not suffice, what is solved stays solved, and the rest goes on in less.
        """
        block_name = self.walk.names[index]
        tensors: dict[str, torch.Tensor] = {}
        results: dict[str, LayerResult] = {}
        alike: dict[tuple[str, int], Hessian] = {}
        while True:
            left = [name for name in mine if f"{block_name}.{name}" not in {*results, *self.plan.kept}]
            try:
                known = self._complete(index, left, known, calibrating)
                for members in self._observed(index, left, known, calibrating, alike):
                    for quantized, result in self._solve([member.within(block_name) for member in members]):
                        self._place(self.source.model.get_submodule(result.name), quantized)
                        self._share(result.name, quantized)
                        tensors |= self.ledger.packed(result.name, quantized, self.version)
                        results[result.name] = result
                        self.report.add(result, quantized.scheme.bits_per_weight(quantized.shape[1]))
                    del members  # and their Hessian, before the next one is counted
                return tensors | dict(self.ledger.dense(block_name)), [*results.values()]
            except (MemoryError, RuntimeError) as error:
                if not exhausted(error):
                    raise
                lack = str(error).splitlines()[0]
            self._economize(index, calibrating, clock, lack)  # here, where nothing holds on to the error

    def _complete(
        self, index: int, names: list[str], known: list[list[str]] | None, calibrating: list[Stream]
    ) -> list[list[str]] | None:
        """The sets of siblings with those that only some batches reach, where nobody waits until one does."""
        if self.team.size > 1:  # what any process knows of is among them, and all walk the same way
            return known
        if known is None or self.room.waits or {*names} <= {name for one in known for name in one}:
            return known
        return self.walk.all_siblings(index, calibrating[0], names)

    def _economize(self, index: int, calibrating: list[Stream], clock: Clock, lack: str) -> None:
        """After a failed allocation: half the batch from here on, and no batch waits any more.

        Raises OutOfMemory if every batch is a single window already.
        """
        if self.team.size > 1:  # the others do not know of it
            raise OutOfMemory(
                f"{self.walk.names[index]}: memory does not suffice ({lack}); finished blocks are kept: run the same "
                "command again with --max-memory, or with fewer processes on each machine"
            )
        waited, self.room = self.room.waits, replace(self.room, waits=False)
        try:
            for number, stream in enumerate(calibrating):
                calibrating[number] = self.walk.halved(stream)
        except MemoryError:
            if not waited or not calibrating:
                raise OutOfMemory(
                    f"{self.walk.names[index]}: memory does not suffice for a single window ({lack}); finished blocks "
                    "are kept: free some memory or use shorter windows (--length), and run the same command again"
                ) from None
        except RuntimeError as error:
            if not exhausted(error):
                raise
            raise OutOfMemory(f"{self.walk.names[index]}: not even half a batch fits ({lack})") from None
        clock.say(f"out of memory at {self.walk.names[index]} ({lack}): going on with half the batch")

    def _observed(
        self, index: int, names: list[str], known: list[list[str]] | None, calibrating: list[Stream],
        alike: dict[tuple[str, int], Hessian],
    ) -> Iterator[list[Member]]:  # fmt: skip
        """What is to be solved next: siblings, or experts side by side.

        They are to be rounded before the next are asked for. In the end the calibrating streams have left the block.
        Layers that no token reached come last, with the Hessian of those that differ from them in a number only (the
        other experts, in models that have a list of them), collected in `alike`; where there are none, they stay dense.
        """
        unseen = dict.fromkeys(names)
        for stream in calibrating:
            for siblings in self._sets(index, names, known, stream):
                yield from siblings.stacks()
                for name in siblings.names:
                    unseen.pop(name, None)
                if isinstance(siblings, Siblings) and siblings.hessian is not None:
                    for role in {role_of(name) for name in siblings.names} - {*siblings.names}:
                        like = (role, siblings.size)
                        alike.setdefault(like, Hessian(siblings.size, siblings.device)).merge(siblings.hessian)
                siblings.forget()
                give_back()
            self.walk.advance(index, stream)  # whatever has not left
        for name in unseen:
            _, inputs = layers_of.shape_of(self.walk.blocks[index].get_submodule(name))
            known_of = alike.get((role_of(name), inputs))  # an expert of its own kind, that no token was routed to
            if self.calibration is None or known_of is not None:
                yield [Member([name], known_of)]
            else:
                self._leave(f"{self.walk.names[index]}.{name}")

    def _leave(self, name: str) -> None:
        """Keep a layer dense that no calibration token reached: nothing is known of what it would read."""
        layer = self.source.model.get_submodule(name)
        self.plan.keep(name, UNUSED, layer.weight.numel() / self.parameters)

    def _sets(
        self, index: int, names: list[str], known: list[list[str]] | None, stream: Stream
    ) -> Iterable[Siblings | Bank]:
        if known is None:
            return self.walk.observe(index, stream, names)
        if self.uneven or not self.room.waits:
            return self.walk.anew(index, stream, names, known)
        sets = self.walk.staged(index, stream, names, known)
        if self.team.size == 1:
            return sets
        block = self.walk.blocks[index]
        return self.team.in_step(sets, known, lambda missing: next(anew(block, names, [missing], [], self.team)))

    def _solve(self, members: list[Member]) -> Iterator[Solved]:
        """Quantize the layers of one set of siblings, or of experts side by side, those of one scheme together.

        Each process of the team solves some of them, and has all in the end.
        """
        for names, stack in same_scheme(members, self.plan.schemes.__getitem__):
            scheme = self.plan.schemes[names[0][0]]

            def work(names: list[list[str]], stack: list[Member], scheme: Scheme = scheme) -> Iterator[Solved]:
                weights = [[self._dense_weight(name) for name in one] for one in names]
                return solve(names, weights, stack, scheme, self.settings, self.calibration is not None)

            yield from shared(self.team, names, stack, scheme, self._weight_of, work)

    def _weight_of(self, name: str) -> tuple[tuple[int, int], torch.device]:
        layer = self.source.model.get_submodule(name)
        return layers_of.shape_of(layer), layer.weight.device

    def _dense_weight(self, name: str) -> torch.Tensor:
        """The source's own values [out, in]: not those that the block computes with, which may be coarser."""
        layer = self.source.model.get_submodule(name)
        weight = self.source.read(f"{name}.weight")
        if weight is None:
            weight = layer.weight
        return layers_of.oriented(layer, weight.to(layer.weight.device))

    def _place(self, layer: nn.Module, quantized: QuantizedWeight) -> None:
        """What follows sees the quantized weight, rounded to the dtype that the model computes in."""
        dense = layers_of.oriented(layer, quantized.dequantize(layer.weight.dtype))
        layer.weight = nn.Parameter(dense.contiguous(), requires_grad=False)

    def _share(self, name: str, quantized: QuantizedWeight) -> None:
        if name in self.owners.values():
            self.shared[name] = quantized

    def _replay(self, name: str, writer: Store) -> None:
        """Take a block that an earlier run finished from its part."""
        stored = self.team.tensors(lambda: writer.read_part(name))
        for note in writer.finished[name]:
            result = LayerResult(**note)
            layer = self.source.model.get_submodule(result.name)
            outputs, inputs = layers_of.shape_of(layer)
            prefix = self.source.packed_name(result.name)
            tensors = {t.removeprefix(f"{prefix}."): v for t, v in stored.items() if t.startswith(f"{prefix}.")}
            scheme = self.plan.schemes[result.name]
            weight = gptq_format.from_tensors(tensors, scheme, inputs, outputs, self.version, prefix)
            self._place(layer, weight)
            self._share(result.name, weight)
            self.report.add(result, scheme.bits_per_weight(inputs))
        solved = {note["name"] for note in writer.finished[name]}
        solved |= self.owners.keys()
        for full in [full for full in self.plan.schemes if full.startswith(f"{name}.") and full not in solved]:
            self._leave(full)

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
        return {
            "source": str(Path(self.source.label).resolve()) if Path(self.source.label).exists() else self.source.label,
            "tensors": self.source.fingerprint,
            "recipe": config_format.to_config(self.recipe, self.version),
            "lm_head": bool(self.plan.head),
            "settings": asdict(self.settings),
            "calibration": self.calibration.digest if self.calibration else None,
        }

    def stored_config(self) -> dict[str, Any]:
        """The `quantization_config` of the result; how the codes were found is in it too, though no reader needs it."""
        meta = {"damp_percent": self.settings.damping, "order": self.settings.order}
        recipe = Recipe(self.recipe.scheme, (*self.ledger.beyond(), *self.recipe.rules))
        stored = config_format.to_config(recipe, self.version, self.ledger.kept(), meta, bool(self.plan.head))
        return {**stored, "true_sequential": self.settings.true_sequential}
