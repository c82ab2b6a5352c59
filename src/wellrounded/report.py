"""What a run did and how good the result is: one record, printed as a table and written as JSON and model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .core.recipe import role_of
from .core.weight import QuantizedWeight
from .errors import CheckpointError

OVERLOOKED = 0.01  # of the model: a weight that stays dense unasked and is larger is a problem


@dataclass(frozen=True)
class LayerResult:
    """One linear layer: error_db is the output error relative to the output, 10 log10(|WX - QX|^2 / |WX|^2).

    rtn_error_db is what plain rounding, the same grid without data, would have given. Both are None where no
    calibration token reached the layer. `fallback` says in a sentence why the layer was not solved as asked. `upstream`
    and `residual` are the shares of the errors in what it reads, and in what its output is added to, that the layer
    makes up for: its errors are then those against the weight W* that it aimed for instead of W.
    """

    name: str
    scheme: str
    parameters: int
    tokens: int
    error_db: float | None
    rtn_error_db: float | None
    damping: float | None
    fallback: str | None = None
    upstream: float = 0.0
    residual: float = 0.0

    @property
    def rounded(self) -> bool:
        """Whether the layer was rounded plainly although a solution was asked for."""
        return self.damping is None


@dataclass
class Report:
    """Everything that is known about one run. `to_dict` is what `--json` prints and quantization_report.json holds."""

    source: str
    out: str
    scheme: str
    layers: list[LayerResult] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # layer inside the blocks -> why it stayed dense
    overlooked_weights: dict[str, float] = field(default_factory=dict)  # see plan.Plan.overlooked
    calibration: dict[str, Any] | None = None
    fidelity: dict[str, float | int] | None = None
    parameters: int = 0
    size_bytes: int = 0
    source_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    version: str = ""
    generates: bool = True  # whether the model continues a text
    expert_modules: list[str] = field(default_factory=list)
    tensors: dict[str, int] = field(default_factory=dict)  # of the source: what became of them
    training: dict[str, Any] | None = None  # of scales and norms: steps, and what was seen on the way
    rotation: dict[str, Any] | None = None  # of the residual stream: whether, and why, see rotating.prepare
    budget: dict[str, Any] | None = None  # of bits: what was asked, tried and written, see contest.Contest

    def coverage(self) -> dict[str, float]:
        """Fractions of all parameters of the model that were solved, rounded plainly, and kept dense."""
        rounded = sum(layer.parameters for layer in self.layers if layer.rounded)
        solved = sum(layer.parameters for layer in self.layers) - rounded
        total = max(self.parameters, 1)
        return {"gptq": solved / total, "rtn": rounded / total, "kept": 1 - (solved + rounded) / total}

    @property
    def overlooked(self) -> float:
        """Fraction of the model's parameters that stayed dense inside the blocks without being asked to."""
        return sum(self.overlooked_weights.values())

    @property
    def bits_per_weight(self) -> float:
        """Bytes on disk times eight over parameters: embeddings and everything else that stayed dense included."""
        return 8 * self.size_bytes / max(self.parameters, 1)

    def problems(self) -> list[str]:
        """Reasons to distrust the result, as sentences; a run with any of them exits with code 3."""
        found = []
        asked = sum(layer.parameters for layer in self.layers)
        fallen = sum(layer.parameters for layer in self.layers if layer.fallback and layer.rounded)
        if fallen > 0.01 * asked:
            found.append(f"{fallen / asked:.1%} of the quantized weights fell back to plain rounding")
        worse = [
            x
            for x in self.layers
            if x.error_db is not None and not x.fallback and x.error_db > (x.rtn_error_db or 0) + 0.01 and not x.rounded
        ]
        if worse:
            found.append(f"{len(worse)} layers are worse than plain rounding, first {worse[0].name}")
        found += [
            f"{role}, {part:.1%} of the model, stayed dense ({why}); if that is right: --ignore '{pattern}'"
            for role, part, why, pattern in self.unexplained()
        ]
        if self.fidelity and not self.fidelity.get("kl_mean", 0.0) < 2.0:
            found.append(f"KL to the original is {self.fidelity['kl_mean']:.3g} nats per token: the model is damaged")
        if self.fidelity and not self.fidelity.get("cosine_mean", 1.0) > 0.9:
            found.append(f"embeddings have turned, cosine {self.fidelity['cosine_mean']:.3f}: the model is damaged")
        return found

    def unexplained(self) -> list[tuple[str, float, str, str]]:
        """Large weights that stayed dense unasked: role, fraction of the model, why, and the pattern that allows it."""
        quantized = {role_of(layer.name) for layer in self.layers}
        found = []
        for role, part in sorted(self.overlooked_weights.items(), key=lambda item: -item[1]):
            layer = role.rpartition(".")[0]
            kept = {name: why for name, why in self.kept.items() if role_of(name) in (role, layer)}
            if part <= OVERLOOKED or not kept:
                continue
            pattern = re.escape(role_of(next(iter(kept)))).replace(r"\*", r"\d+")
            if layer in quantized:  # elsewhere they are quantized: name these alone
                numbers = dict.fromkeys(re.findall(r"(?<![^.])\d+(?![^.])", name)[0] for name in kept)
                pattern = pattern.replace(r"\d+", f"({'|'.join(numbers)})", 1)
            found.append((role, part, next(iter(kept.values())), f"^{pattern}$"))
        return found

    def experts(self) -> dict[str, dict[str, float]]:
        """Per module of experts, how many calibration tokens reached each, and how many had to be filled in."""
        layers: dict[str, dict[str, LayerResult]] = {module: {} for module in self.expert_modules}
        for layer in self.layers:
            module, _, expert = layer.name.rpartition(".")[0].rpartition(".")
            layers.get(module, {}).setdefault(expert, layer)
        found = {}
        for module, each in layers.items():
            if tokens := sorted(layer.tokens for layer in each.values()):
                few = sum("from all experts" in (layer.fallback or "") for layer in each.values())
                middle = tokens[len(tokens) // 2]
                found[module] = {
                    "count": len(tokens),
                    "min": tokens[0],
                    "median": middle,
                    "max": tokens[-1],
                    "filled": few,
                }
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the keys are documented in docs/json.md and do not change meaning."""
        return {
            "source": self.source,
            "out": self.out,
            "scheme": self.scheme,
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            "source_bytes": self.source_bytes,
            "parameters": self.parameters,
            "coverage": self.coverage(),
            "fidelity": self.fidelity,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "calibration": self.calibration,
            "kept": self.kept,
            "overlooked": self.overlooked,
            "overlooked_weights": self.overlooked_weights,
            "tensors": self.tensors,
            "experts": self.experts() or None,
            "notes": self.notes,
            "problems": self.problems(),
            "version": self.version,
            "generates": self.generates,
            "rotation": self.rotation,
            "training": self.training,
            "budget": self.budget,
            "layers": [{**asdict(layer), "bits_per_weight": self._bits.get(layer.name)} for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """The report of which `to_dict`, or its JSON, is this; figures that were NaN are NaN again."""
        own = {field.name for field in fields(cls)}
        report = cls(**{key: value for key, value in content.items() if key in own - {"layers", "fidelity"}})
        if (fidelity := content["fidelity"]) is not None:
            report.fidelity = {key: math.nan if value is None else value for key, value in fidelity.items()}
        report.expert_modules = list(content["experts"] or {})
        for layer in content["layers"]:
            bits = layer.get("bits_per_weight")
            report.layers.append(LayerResult(**{key: v for key, v in layer.items() if key != "bits_per_weight"}))
            if bits is not None:
                report._bits[layer["name"]] = bits
        return report

    @classmethod
    def read(cls, directory: Path) -> Report:
        """The report that lies in a finished directory. Raises CheckpointError if there is none."""
        path = directory / "quantization_report.json"
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a report of a run ({type(error).__name__}: {error})") from None

    def summary(self) -> list[tuple[str, str]]:
        """The closing table as (label, value) rows."""
        cover, mib = self.coverage(), 2**20
        rows = [
            ("scheme", self.scheme),
            (
                "size",
                f"{self.size_bytes / mib:,.1f} MiB, was {self.source_bytes / mib:,.1f} MiB "
                f"({self.source_bytes / max(self.size_bytes, 1):.1f}x smaller)",
            ),
            (
                "bits per weight",
                f"{self.bits_per_weight:.2f} over all parameters, {self._layer_bits():.2f} in quantized layers",
            ),
            (
                "coverage",
                f"{len(self.layers)} layers: gptq {cover['gptq']:.1%}, plain rounding {cover['rtn']:.1%}, "
                f"kept dense {cover['kept']:.1%} of parameters",
            ),
        ]
        if (found := list(self.experts().values())) and self.calibration:
            few, of = sum(x["filled"] for x in found), sum(x["count"] for x in found)
            spread = f"{min(x['min'] for x in found):,} to {max(x['max'] for x in found):,} tokens each"
            rows.append(("experts", f"{of:,} in {len(found)} layers, {spread}; {few:,} filled in from all of a layer"))
        measured = [x for x in self.layers if x.error_db is not None]
        if measured:
            mean = sum(x.error_db or 0 for x in measured) / len(measured)
            plain = sum(x.rtn_error_db or 0 for x in measured) / len(measured)
            worst = max(measured, key=lambda x: x.error_db or 0)
            rows.append(
                (
                    "layer error",
                    f"{mean:.1f} dB mean (plain rounding {plain:.1f} dB), "
                    f"worst {worst.error_db:.1f} dB in {worst.name}",
                )
            )
        rows += fidelity_rows(self.fidelity or {})
        rows += rotation_rows(self.rotation or {})
        rows += training_rows(self.training or {})
        rows += budget_rows(self.budget or {})
        rows.append(
            ("time", f"{self.seconds.get('total', 0):.0f} s, peak memory {self.peak_rss_bytes / 2**30:.2f} GiB")
        )
        return rows

    def _layer_bits(self) -> float:
        weights = sum(layer.parameters for layer in self.layers)
        bits = sum(layer.parameters * self._bits[layer.name] for layer in self.layers if layer.name in self._bits)
        return bits / max(weights, 1)

    _bits: dict[str, float] = field(default_factory=dict, repr=False)

    def add(self, result: LayerResult, bits_per_weight: float) -> None:
        """Take in one layer; bits_per_weight counts its scales and zeros."""
        self.layers.append(result)
        self._bits[result.name] = bits_per_weight


def fidelity_rows(f: Mapping[str, float], digits: int = 2) -> list[tuple[str, str]]:
    """What of these figures there is, as (label, value) rows; `digits` of perplexities."""
    rows = []
    if "perplexity" in f:
        original = f", original {f['original_perplexity']:.{digits}f}" if "original_perplexity" in f else ""
        rows.append(("perplexity", f"{f['perplexity']:.{digits}f}{original}"))
    if "kl_mean" in f:
        kl = f"{f['kl_mean']:.4f} mean, {f['kl_median']:.4f} median, {f['kl_p99']:.3f} at 99%"
        label, unit = ("same top token", " tokens") if "perplexity" in f else ("same first choice", "")
        rows += [("KL to original", kl), (label, f"{f['top1_agreement']:.1%} of {f['tokens']:,} held-out{unit}")]
    if "cosine_mean" in f:
        pooled = f"{f['cosine_mean']:.4f} mean, {f['cosine_worst']:.4f} worst of the windows"
        rows.append(("cosine", f"{pooled}, {f['cosine_tokens']:.4f} token by token"))
    return rows


def rotation_rows(rotation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whether the residual stream was rotated, and why, as a (label, value) row."""
    if not rotation:
        return []
    if "tried" not in rotation:
        return [("rotation", f"none: {rotation['why']}")]
    tried = rotation["tried"]
    better = "rotated" if rotation["used"] else "none"
    return [
        (
            "rotation",
            f"{better}; tried on fewer windows: KL {tried['rotated']:.4f} with it, {tried['plain']:.4f} without",
        )
    ]


def training_rows(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What training scales and norms did, as a (label, value) row."""
    if not training:
        return []
    written = f", {training['written']} of them written by the original" if training["written"] else ""
    text = f"step {training['best_step']} of {training['steps']}, {training['windows']} windows{written}"
    looks = {step: held_out for step, _, held_out in training["kl"]}
    first, best = looks.get(0), looks.get(training["best_step"])
    if first is not None and best is not None:
        text += f"; on the text it was chosen by, KL {first:.4f} before and {best:.4f} then"
    return [("training", text)]


def budget_rows(budget: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, and how far from the original all that was tried turned out to be."""
    if not budget:
        return []
    rows = [("bit budget", f"{budget['asked']}, of which {budget['used']} are used")]
    for one in budget["tried"]:
        far = "not compared" if one["distance"] is None else f"KL {one['distance']:.4f}"
        written = " (written)" if one["scheme"] == budget["written"] else ""
        rows.append(("tried", f"{one['scheme']}: {far}{written}"))
    return rows


def error_db(weight: torch.Tensor, quantized: QuantizedWeight, second_moment: torch.Tensor) -> float:
    """10 log10 of the relative output error `tr(E H E^T) / tr(W H W^T)`, E = W - Q; weight [out, in]."""
    error = weight - quantized.dequantize()
    lost = ((error @ second_moment) * error).sum()
    signal = ((weight @ second_moment) * weight).sum()
    return 10 * torch.log10(lost.clamp_min(1e-30) / signal.clamp_min(1e-30)).item()
