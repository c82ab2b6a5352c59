"""quantize(): the single path from a dense model to a finished checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from . import __version__, card
from .calibration import Calibration
from .checkpoint import Source, Writer
from .core import gptq, rtn
from .core.fidelity import Fidelity
from .core.hessian import FactorError, Hessian
from .core.recipe import Recipe
from .core.scheme import Scheme
from .core.weight import QuantizedWeight
from .errors import NumericsError
from .formats import config as config_format
from .formats import gptq as gptq_format
from .memory import peak_rss_bytes
from .model import blocks as layers_of
from .model.siblings import Siblings
from .model.walk import BlockWalk, Stream
from .plan import make_plan
from .report import LayerResult, Report, error_db

BATCH_TOKENS = 4096  # enough for matmuls at full speed
OUTSIDE = "outside"  # the part that holds everything outside the blocks


@dataclass(frozen=True)
class Progress:
    """Told to the caller after every block: how many are done, of how many, and seconds since the start."""

    done: int
    total: int
    seconds: float
    what: str


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
    ) -> None:
        self.batch = batch
        self.source, self.recipe, self.calibration, self.settings = source, recipe, calibration, settings
        self.walk = BlockWalk(source.model, source.read, device)
        self.plan = make_plan(source.model, self.walk.names, recipe)
        self.version = config_format.version_for(recipe.scheme, *(rule.scheme for rule in recipe.rules))
        self.report = Report(source.label, "", str(recipe.scheme), kept=self.plan.kept, version=__version__)
        self.report.notes, self.report.overlooked = self.plan.notes(), self.plan.overlooked

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
        if OUTSIDE not in writer.finished:
            writer.add(OUTSIDE, dict(self._outside()))
        for index, name, block in self.walk:
            self.walk.advance(index, *dense)
            if name in writer.finished:
                self._replay(name, block, writer)
                self.walk.advance(index, *calibrating)
            else:
                tensors, results = self._quantize_block(index, name, block, calibrating, dense)
                writer.add(name, tensors, [asdict(result) for result in results])
            self.walk.advance(index, *quantized)
            done = time.perf_counter() - started
            tell(Progress(index + 1, len(self.walk.names), done, name))
        self.report.fidelity = self._fidelity(dense, quantized)
        self.report.calibration = self.calibration.to_dict() if self.calibration else None
        self.report.parameters = sum(p.numel() for p in self.source.model.parameters())
        self.report.source_bytes, self.report.peak_rss_bytes = self.source.bytes, peak_rss_bytes()
        self.report.seconds = {"total": time.perf_counter() - started}
        return self.report

    def _streams(self) -> tuple[list[Stream], list[Stream], list[Stream]]:
        """Calibration windows, and the held-out ones twice: through the dense blocks and through the quantized."""
        if self.calibration is None:
            return [], [], []
        windows, held = self.calibration.windows, self.calibration.held_out
        batch = self.batch or max(1, BATCH_TOKENS // windows.length)
        calibrating = [self.walk.stream(windows.ids, windows.mask, batch)]
        if not len(held):
            return calibrating, [], []
        # One window at a time: at the end each batch's logits exist twice, and a vocabulary is large.
        return calibrating, *([self.walk.stream(held.ids, held.mask, batch=1)] for _ in range(2))

    def _quantize_block(
        self, index: int, block_name: str, block: nn.Module, calibrating: list[Stream], dense: list[Stream]
    ) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
        """Solve every layer of the block, put the result back into it, and return what belongs on disk."""
        mine = [n for n in layers_of.linears(block) if f"{block_name}.{n}" in self.plan.schemes]
        tensors: dict[str, torch.Tensor] = {}
        results: list[LayerResult] = []
        for names, hessian in self._observed(index, mine, calibrating, dense):
            for group in self._same_scheme(block_name, names):
                for name, quantized, result in self._solve(block_name, block, group, hessian):
                    self._place(block.get_submodule(name), quantized)
                    tensors |= self._to_disk(result.name, quantized)
                    results.append(result)
                    self.report.add(result, quantized.scheme.bits_per_weight(quantized.shape[1]))
        return tensors | dict(self._dense_tensors(block_name, block, set(mine))), results

    def _observed(
        self, index: int, names: list[str], calibrating: list[Stream], dense: list[Stream]
    ) -> Iterator[tuple[list[str], Hessian | None]]:
        """Sets of siblings with their Hessian; layers that no token reached come last, one by one, without one.

        A set is to be rounded before the next is asked for. In the end the calibrating streams have left the block.
        """
        unseen = dict.fromkeys(names)
        for stream in calibrating:
            for siblings in self._sets(index, names, stream, dense):
                yield siblings.names, siblings.hessian
                for name in siblings.names:
                    del unseen[name]
        for name in unseen:
            yield [name], None

    def _sets(self, index: int, names: list[str], stream: Stream, dense: list[Stream]) -> Iterator[Siblings]:
        if self.settings.true_sequential:
            known = self.walk.siblings(index, dense[0] if dense else stream, names)
            yield from self.walk.staged(index, stream, names, known)
        else:
            yield from self.walk.observe(index, stream, names)
            self.walk.advance(index, stream)

    def _same_scheme(self, block_name: str, names: list[str]) -> list[list[str]]:
        """Siblings cut into runs that share a scheme: each run is solved as one tall matrix."""
        by_scheme: dict[Scheme, list[str]] = {}
        for name in names:
            by_scheme.setdefault(self.plan.schemes[f"{block_name}.{name}"], []).append(name)
        return list(by_scheme.values())

    def _solve(
        self, block_name: str, block: nn.Module, names: list[str], hessian: Hessian | None
    ) -> Iterator[tuple[str, QuantizedWeight, LayerResult]]:
        """Quantize layers that share an input and a scheme; yields (name in block, weight, result) for each."""
        full = [f"{block_name}.{name}" for name in names]
        scheme = self.plan.schemes[full[0]]
        weights = [self._dense_weight(block.get_submodule(n), f) for n, f in zip(names, full)]
        tall = torch.cat(weights) if len(weights) > 1 else weights[0]
        rows = [len(weight) for weight in weights]
        fallback, damping, moment = None, None, None
        try:
            if hessian is None:
                fallback = None if self.calibration is None else "no calibration token reached this layer"
                solved = rtn.solve(tall, None, scheme)
            else:
                moment = hessian.matrix()
                try:
                    solved, factored = gptq.solve(tall, hessian, scheme, self.settings)
                    damping = factored.damping
                    if damping > self.settings.damping:
                        fallback = f"damping raised from {self.settings.damping:g} to {damping:g}"
                except FactorError as error:
                    fallback, solved = f"plain rounding: {error}", rtn.solve(tall, hessian, scheme)
            plain = rtn.solve(tall, None, scheme).split(rows) if moment is not None else [None] * len(rows)
        except NumericsError as error:
            raise NumericsError(f"{', '.join(full)}: {error}") from None
        for name, layer, weight, piece, rounded in zip(names, full, weights, solved.split(rows), plain):
            after = error_db(weight, piece, moment) if moment is not None else None
            before = error_db(weight, rounded, moment) if moment is not None and rounded is not None else None
            tokens = hessian.tokens if hessian is not None else 0
            result = LayerResult(layer, str(scheme), weight.numel(), tokens, after, before, damping, fallback)
            yield name, piece, result

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

    def _replay(self, name: str, block: nn.Module, writer: Writer) -> None:
        """Take a block that an earlier run finished from its part."""
        stored = writer.read_part(name)
        for note in writer.finished[name]:
            result = LayerResult(**note)
            inside = result.name.removeprefix(f"{name}.")
            layer = block.get_submodule(inside)
            outputs, inputs = layers_of.shape_of(layer)
            prefix = self._stored_layer(result.name)
            tensors = {t.removeprefix(f"{prefix}."): v for t, v in stored.items() if t.startswith(f"{prefix}.")}
            scheme = self.plan.schemes[result.name]
            weight = gptq_format.from_tensors(tensors, scheme, inputs, outputs, self.version, prefix)
            self._place(layer, weight)
            self.report.add(result, scheme.bits_per_weight(inputs))

    def _stored_layer(self, name: str) -> str:
        return self.source.stored_name(f"{name}.weight").removesuffix(".weight")

    def _to_disk(self, name: str, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
        prefix = self._stored_layer(name)
        return {f"{prefix}.{k}": v for k, v in gptq_format.to_tensors(quantized, self.version).items()}

    def _dense_tensors(self, prefix: str, module: nn.Module, quantized: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """What a module stores besides its quantized weights, as the source has it."""
        for name in module.state_dict(keep_vars=True):
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and layer in quantized:
                continue
            full = f"{prefix}.{name}" if prefix else name
            value = self.source.read(full)
            if value is not None:
                yield self.source.stored_name(full), value

    def _outside(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stored tensor outside the blocks, and those that the model does not know."""
        blocks = tuple(f"{name}." for name in self.walk.names)
        seen: set[int] = set()
        for name, tensor in self.walk.model.state_dict(keep_vars=True).items():
            if name.startswith(blocks) or id(tensor) in seen:
                continue
            value = self.source.read(name)
            if value is not None:
                seen.add(id(tensor))  # tied tensors are stored once, under the name that the source uses
                yield self.source.stored_name(name), value
        for name, read in self.source.extras.items():
            yield name, read()

    def _fidelity(self, dense: list[Stream], quantized: list[Stream]) -> dict[str, float | int] | None:
        """KL, perplexity and agreement on the held-out windows, from the two streams that went through the blocks."""
        if not dense:
            return None
        fidelity = Fidelity()
        for before, after in zip(dense, quantized):
            for batch, (ids, mask) in enumerate(zip(before.ids, before.masks)):
                fidelity.update(self.walk.logits(before, batch), self.walk.logits(after, batch), ids, mask)
        return fidelity.to_dict()

    def _finish(self, writer: Writer, started: float) -> None:
        self.report.out = str(writer.out)
        writer.finish([OUTSIDE, *self.walk.names], lambda directory: self._write_rest(directory, started))

    def _write_rest(self, directory: Path, started: float) -> None:
        self.source.write_files(directory)
        self.report.size_bytes = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
        self.report.seconds = {"total": time.perf_counter() - started}
        card.write_files(directory, self.source.config, self.stored_config(), self.report)

    def request(self) -> dict[str, Any]:
        """What decides every byte of the result, JSON-ready: a run is continued only by an equal request."""
        return {
            "source": str(Path(self.source.label).resolve()) if Path(self.source.label).exists() else self.source.label,
            "tensors": self.source.fingerprint,
            "recipe": config_format.to_config(self.recipe, self.version),
            "settings": asdict(self.settings),
            "calibration": self.calibration.digest if self.calibration else None,
        }

    def stored_config(self) -> dict[str, Any]:
        """The `quantization_config` of the result; how the codes were found is in it too, though no reader needs it."""
        meta = {"damp_percent": self.settings.damping, "order": self.settings.order}
        stored = config_format.to_config(self.recipe, self.version, self.plan.kept, meta)
        return {**stored, "true_sequential": self.settings.true_sequential}
