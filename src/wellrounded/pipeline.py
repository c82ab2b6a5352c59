"""quantize(): the single path from a dense model to a finished checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from . import __version__, card
from .calibration import Calibration
from .checkpoint import Reader, Source, Writer
from .core import gptq
from .core.fidelity import Fidelity, Likeness, measure
from .core.hessian import Hessian
from .core.recipe import Recipe, role_of
from .core.weight import QuantizedWeight
from .formats import config as config_format
from .formats import gptq as gptq_format
from .ledger import OUTSIDE, Ledger
from .memory import peak_rss_bytes
from .model import blocks as layers_of
from .model.experts import Experts
from .model.siblings import Bank, Member, Siblings
from .model.walk import BlockWalk, Stream
from .plan import UNUSED, make_plan
from .report import LayerResult, Report
from .solving import Solved, same_scheme, solve

BATCH_TOKENS = 4096  # enough for matmuls at full speed


@dataclass(frozen=True)
class Progress:
    """Told to the caller after every block: how many are done, of how many, and seconds since the start.

    layers     quantized so far
    tokens_per_second  how fast the last block's calibration tokens went through it, solving included
    left       seconds, None while nothing is known
    error_db   mean over the layers so far, None without data
    message    something to be said once, "" if there is nothing
    """

    done: int
    total: int
    seconds: float
    what: str
    layers: int = 0
    tokens_per_second: float = 0.0
    left: float | None = None
    error_db: float | None = None
    message: str = ""


class Store(Protocol):
    """Where the parts of a result go, and which of them are there already: a checkpoint.Writer, or memory."""

    finished: dict[str, Any]

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
        self.batch = batch
        self.source, self.recipe, self.calibration, self.settings = source, recipe, calibration, settings
        pictures = calibration is not None and bool(calibration.windows.more)
        self.walk = BlockWalk(source.model, source.read, device, towers=pictures)
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

    def write(self, writer: Writer, tell: Callable[[Progress], None] = lambda progress: None) -> Report:
        """Quantize into `writer` and finish it; the report of the finished checkpoint."""
        started = time.perf_counter()
        self.quantize(writer, tell)
        self._finish(writer, started)
        return self.report

    def quantize(self, writer: Store, tell: Callable[[Progress], None] = lambda progress: None) -> Report:
        """Quantize block after block into `writer`; the report, without what only a finished checkpoint has."""
        started = time.perf_counter()
        calibrating, dense, quantized = self._streams()
        self.plan.excuse(self.walk.idle)
        if OUTSIDE not in writer.finished:
            writer.add(OUTSIDE, dict(self.ledger.dense(OUTSIDE)))
        for index, name, block in self.walk:
            mine = self._mine(name, block)
            known = None if name in writer.finished else self._known(index, mine, [*dense, *calibrating])
            self.walk.advance(index, *dense)
            if name in writer.finished:
                self._replay(name, writer)
                self.walk.advance(index, *calibrating)
            else:
                tensors, results = self._quantize_block(index, mine, known, calibrating)
                writer.add(name, tensors, [asdict(result) for result in results])
            self.walk.advance(index, *quantized)
            done = time.perf_counter() - started
            tell(Progress(index + 1, len(self.walk.names), done, name))
        packed_head = self._quantize_head(writer, calibrating) if self.plan.head else None
        self.report.fidelity = self._fidelity(dense, quantized, packed_head)
        self.report.calibration = self.calibration.to_dict() if self.calibration else None
        self.report.parameters = self.parameters
        self.report.source_bytes, self.report.peak_rss_bytes = self.source.bytes, peak_rss_bytes()
        self.report.seconds = {"total": time.perf_counter() - started}
        return self.report

    def _quantize_head(self, writer: Store, calibrating: list[Stream]) -> nn.Parameter:
        """Solve the output head on what reaches it; the weight that it then has. The model keeps its own."""
        name = self.plan.head
        head = self.source.model.get_submodule(name)
        dense = head.weight  # tied ones are the embeddings' too, which stay as they are
        if name in writer.finished:
            self._replay(name, writer)
        else:
            hessian = Hessian(layers_of.shape_of(head)[1], dense.device) if calibrating else None
            for stream in calibrating:
                for batch, mask in enumerate(stream.masks):
                    hessian.update(self.walk.reaching(head, stream, batch), mask)
            member = Member([name], hessian, hessian.tokens if hessian else 0)
            for quantized, result in self._solve("", self.source.model, [member]):
                writer.add(name, self.ledger.packed(name, quantized, self.version), [asdict(result)])
                self.report.add(result, quantized.scheme.bits_per_weight(quantized.shape[1]))
                self._place(head, quantized)
        packed, head.weight = head.weight, dense
        return packed

    def _streams(self) -> tuple[list[Stream], list[Stream], list[Stream]]:
        """Calibration windows, and the held-out ones twice: through the dense blocks and through the quantized."""
        if self.calibration is None:
            return [], [], []
        windows, held = self.calibration.windows, self.calibration.held_out
        batch = self.batch or max(1, BATCH_TOKENS // windows.length)
        calibrating = [self.walk.stream(windows.ids, windows.mask, batch, windows.more)]
        if not self.plan.head:
            calibrating[0].more = [{} for _ in calibrating[0].ids]  # pictures have done their part
        if not len(held):
            return calibrating, [], []
        # One window at a time: at the end each batch's logits exist twice, and a vocabulary is large.
        return calibrating, *([self.walk.stream(held.ids, held.mask, 1, held.more)] for _ in range(2))

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
        """Sets of siblings, found on one window, None if they will be found while observing."""
        return self.walk.siblings(index, streams[0], names) if streams and self.settings.true_sequential else None

    def _quantize_block(
        self, index: int, mine: list[str], known: list[list[str]] | None, calibrating: list[Stream]
    ) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
        """Solve every layer of the block, put the result back into it, and return what belongs on disk."""
        block_name, block = self.walk.names[index], self.walk.blocks[index]
        tensors: dict[str, torch.Tensor] = {}
        results: list[LayerResult] = []
        for members in self._observed(index, mine, known, calibrating):
            for quantized, result in self._solve(block_name, block, members):
                self._place(self.source.model.get_submodule(result.name), quantized)
                self._share(result.name, quantized)
                tensors |= self.ledger.packed(result.name, quantized, self.version)
                results.append(result)
                self.report.add(result, quantized.scheme.bits_per_weight(quantized.shape[1]))
        return tensors | dict(self.ledger.dense(block_name)), results

    def _observed(
        self, index: int, names: list[str], known: list[list[str]] | None, calibrating: list[Stream]
    ) -> Iterator[list[Member]]:
        """What is to be solved next: siblings, or experts side by side.

        They are to be rounded before the next are asked for. In the end the calibrating streams have left the block.
        Layers that no token reached come last, with the Hessian of those that differ from them in a number only (the
        other experts, in models that have a list of them); where there are none, they stay dense.
        """
        unseen = dict.fromkeys(names)
        alike: dict[tuple[str, int], Hessian] = {}
        for stream in calibrating:
            for siblings in self._sets(index, names, known, stream):
                yield from siblings.stacks()
                for name in siblings.names:
                    del unseen[name]
                if isinstance(siblings, Siblings) and siblings.hessian is not None:
                    mine = siblings.hessian
                    for role in {role_of(name) for name in siblings.names} - {*siblings.names}:
                        alike.setdefault((role, mine.size), Hessian(mine.size, mine.device)).merge(mine)
        for name in unseen:
            _, inputs = layers_of.shape_of(self.walk.blocks[index].get_submodule(name))
            like = alike.get((role_of(name), inputs))  # an expert of its own kind, that no token was routed to
            if self.calibration is None or like is not None:
                yield [Member([name], like)]
            else:
                self._leave(f"{self.walk.names[index]}.{name}")

    def _leave(self, name: str) -> None:
        """Keep a layer dense that no calibration token reached: nothing is known of what it would read."""
        layer = self.source.model.get_submodule(name)
        self.plan.keep(name, UNUSED, layer.weight.numel() / self.parameters)

    def _sets(
        self, index: int, names: list[str], known: list[list[str]] | None, stream: Stream
    ) -> Iterator[Siblings | Bank]:
        if known is not None:
            yield from self.walk.staged(index, stream, names, known)
        else:
            yield from self.walk.observe(index, stream, names)
            self.walk.advance(index, stream)

    def _solve(self, block_name: str, block: nn.Module, members: list[Member]) -> Iterator[Solved]:
        """Quantize the layers of one set of siblings, or of experts side by side, those of one scheme together."""
        for names, stack in same_scheme(members, lambda name: self.plan.schemes[f"{block_name}.{name}".lstrip(".")]):
            full = [[f"{block_name}.{name}".lstrip(".") for name in one] for one in names]
            weights = [
                [self._dense_weight(block.get_submodule(n), f) for n, f in zip(*both)] for both in zip(names, full)
            ]
            scheme = self.plan.schemes[full[0][0]]
            yield from solve(full, weights, stack, scheme, self.settings, self.calibration is not None)

    def _dense_weight(self, layer: nn.Module, name: str) -> torch.Tensor:
        """The source's own values, float32 [out, in]: not those that the block computes with, which may be bfloat16."""
        weight = self.source.read(f"{name}.weight")
        if weight is None:
            weight = layer.weight
        return layers_of.oriented(layer, weight.to(layer.weight.device).float())

    def _place(self, layer: nn.Module, quantized: QuantizedWeight) -> None:
        """What follows sees the quantized weight, rounded to the dtype that the model computes in."""
        dense = layers_of.oriented(layer, quantized.dequantize(layer.weight.dtype))
        layer.weight = nn.Parameter(dense.contiguous(), requires_grad=False)

    def _share(self, name: str, quantized: QuantizedWeight) -> None:
        if name in self.owners.values():
            self.shared[name] = quantized

    def _replay(self, name: str, writer: Store) -> None:
        """Take a block that an earlier run finished from its part."""
        stored = writer.read_part(name)
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

    def _fidelity(
        self, dense: list[Stream], quantized: list[Stream], packed_head: nn.Parameter | None
    ) -> dict[str, float | int] | None:
        """How far the two streams of held-out windows are apart that went through the blocks, and then the head."""
        if not dense:
            return None
        causal = self.report.generates
        kept: Fidelity | Likeness | None = None
        for before, after in zip(dense, quantized):
            for batch, (ids, mask) in enumerate(zip(before.ids, before.masks)):
                original, is_logits = self.walk.output(before, batch)
                with self._head_with(packed_head):
                    other, _ = self.walk.output(after, batch)
                kept = kept or measure(original, is_logits, causal)
                kept.update(original, other, ids, mask)
        return kept.to_dict() if kept else None

    @contextmanager
    def _head_with(self, weight: nn.Parameter | None) -> Iterator[None]:
        head = self.source.model.get_submodule(self.plan.head) if weight is not None else None
        dense = head.weight if head is not None else None
        try:
            if head is not None:
                head.weight = weight
            yield
        finally:
            if head is not None:
                head.weight = dense

    def _finish(self, writer: Writer, started: float) -> None:
        self.report.out = str(writer.out)
        parts = [OUTSIDE, *self.walk.names, *([self.plan.head] if self.plan.head else [])]
        writer.finish(parts, lambda directory: self._write_rest(directory, started))

    def _write_rest(self, directory: Path, started: float) -> None:
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
