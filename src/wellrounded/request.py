"""A request: what somebody asks of a quantization, through whichever door they came."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import calibration as data
from . import rates
from .checkpoint import Source
from .core.gptq import Settings
from .core.recipe import Recipe, Rule
from .core.scheme import Scheme, default_group_size
from .errors import UsageError
from .memory import free_bytes, give_back, parse_size, rss_bytes, shown
from .model import blocks as layers_of
from .pipeline import Run
from .prediction import Forecast, Forecaster, Room, Workload
from .presets import preset
from .team import Team
from .torchrun import neighbours

NONE = "none"  # calibration="none": plain rounding, in seconds
ALONE = Team()
HELD_OUT = 16  # windows to prove the result on, at most


@dataclass(frozen=True)
class Request:
    """The options of `wellrounded.quantize`, which explains them, and those that only transformers' GPTQConfig has:

    settings    instead of those of the preset
    endings     of layers' names; every other linear layer stays dense
    batch       windows per forward pass; by default as many as keep the machine busy
    min_tokens  calibration data of fewer tokens is refused
    max_memory  bytes, or text like "4GiB": what the run may use, of the GPU's memory where one computes

    A `length` of None is 512, or what the model can read if that is less.
    """

    bits: int = 4
    group_size: int | None = None
    sym: bool = True
    act_order: bool = False
    calibration: Any = None
    samples: int = 128
    length: int | None = None
    seed: int = 0
    ignore: Sequence[str] = ()
    only: Sequence[str] = ()
    lm_head: bool = False
    endings: Sequence[str] = ()
    recipe: Recipe | None = None
    preset: str = "default"
    settings: Settings = None  # type: ignore[assignment]  # those of the preset
    device: str = "auto"
    batch: int | None = None
    min_tokens: int = data.ENOUGH
    max_memory: int | str | None = None

    def __post_init__(self) -> None:
        if self.settings is None:
            object.__setattr__(self, "settings", preset(self.preset).settings)
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", parse_size(self.max_memory))
        if self.recipe is None:  # a wrong value is said at once, before anything is read
            Scheme(self.bits, 128 if self.group_size is None else self.group_size, self.sym, self.act_order)
        for name in ("ignore", "only"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, [patterns] if isinstance(patterns, str) else list(patterns))
            for pattern in getattr(self, name):
                Rule(pattern, None)

    @property
    def rotates(self) -> bool:
        """Whether it is to be tried if the model is better rotated."""
        return preset(self.preset).rotates and self.calibration != NONE

    def run(self, source: Source, team: Team = ALONE) -> Run:
        """The run that carries it out. Raises UsageError if `source` and the request do not fit together."""
        calibration = None if self.calibration == NONE else self._calibration(source)
        run = self._run(source, calibration)
        windows, held = (calibration.windows, calibration.held_out) if calibration else ((), ())
        padded = calibration is not None and calibration.windows.mask is not None
        length = calibration.windows.length if calibration else 1
        mine, theirs = (-(-len(all_) // team.size) for all_ in (windows, held))
        further = len(calibration.further or ()) if calibration else 0
        share = Workload(mine, theirs, length, padded, team.size, further)
        run.work.room, run.foretold_bytes, run.caution = self._room(run, share)
        if team.size > 1:
            run.join(team)
        return run

    def forecast(self, source: Source) -> Forecast:
        """What the run would take; no data is gathered, and no tensor of the source read."""
        run = self._run(source, None)
        length = self._window(source)
        work = Workload(0, 0, 1) if self.calibration == NONE else Workload(self.samples, HELD_OUT, length)
        room, _, _ = self._room(run, work)
        return self._forecaster(run, work).predict(room, rates.measure(run.device, self.settings))

    def _run(self, source: Source, calibration: data.Calibration | None) -> Run:
        recipe = self.recipe or self._recipe(source)
        return Run(
            source,
            recipe,
            calibration,
            self.settings,
            chosen_device(self.device),
            self.lm_head,
            preset(self.preset).training,
        )

    def _forecaster(self, run: Run, work: Workload) -> Forecaster:
        give_back()
        chosen = replace(preset(self.preset), settings=self.settings)
        return Forecaster(run.source, run.plan, run.walk.names, work, run.device, rss_bytes(), chosen)

    def _room(self, run: Run, work: Workload) -> tuple[Room, int, str]:
        """How much the run keeps in memory, its peak in bytes, and what to be afraid of.

        What was allowed binds; what is free only warns.
        """
        forecaster, limit = self._forecaster(run, work), self.max_memory
        if limit is None and (limit := free_bytes(run.device)) is not None and run.device == "cpu":
            limit //= neighbours()
        caution = ""
        try:
            room = forecaster.room(None if limit is None else int(limit), self.batch)
        except UsageError:
            if self.max_memory is not None:
                raise
            room = forecaster.choices(self.batch)[-1]
            needed = shown(forecaster.peak(room))
            caution = f"only {shown(int(limit or 0))} of memory are free, and this run is likely to need {needed}"
        peak = forecaster.peak(room)
        run.tight = limit is not None and 2 * peak > int(limit)
        return room, peak, caution

    def _window(self, source: Source) -> int:
        """Tokens per window. Raises UsageError if the model cannot read as many as were asked for."""
        length = self.length or min(512, limit(source.model) or 512)
        refuse_longer(length, source.model)
        return length

    def _calibration(self, source: Source) -> data.Calibration:
        length = self._window(source)
        training = preset(self.preset).training
        vocabulary = source.config.get("vocab_size") or source.model.get_input_embeddings().num_embeddings
        calibration = data.gather(
            self.calibration, source.tokenizer, self.samples, length, self.seed, HELD_OUT,
            vocab_size=vocabulary, min_tokens=self.min_tokens, little=self.min_tokens < length,
            inputs=inspect.signature(source.model.forward).parameters, further=training.windows if training else 0,
        )  # fmt: skip
        if (tokens := calibration.windows.tokens) >= data.ENOUGH:
            return calibration
        little = f"calibrated on {tokens:,} tokens, hardly better than plain rounding; give {data.ENOUGH:,} or more"
        return replace(calibration, note="\n".join(filter(None, [calibration.note, little])))

    def _recipe(self, source: Source) -> Recipe:
        names = [name for name, module in source.model.named_modules() if layers_of.is_linear(module)]
        example = next(iter(names), "none")
        tensors = [name for name, _ in source.model.named_parameters()]
        known = [*tensors, *(name.rpartition(".")[0] for name in tensors)]
        for option, patterns, among in (("ignore", self.ignore, known), ("only", self.only, names)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in among):
                    raise UsageError(
                        f"{option}={pattern!r} was asked for, but no layer's name holds it; layers are called like "
                        f"{example}"
                    )
        for ending in self.endings:
            if not any(f".{name}".endswith(f".{ending}") for name in names):
                raise UsageError(
                    f"only {ending!r} was asked for, but no layer's name ends so; layers are called like {example}"
                )

        def recipe(group_size: int) -> Recipe:
            whole = Recipe.of(Scheme(self.bits, group_size, self.sym, self.act_order), self.ignore, self.only)
            return Recipe(whole.scheme, (*whole.rules, Rule.all_but(self.endings))) if self.endings else whole

        inputs = _inputs(source, recipe(-1))
        if self.group_size is None:
            return recipe(default_group_size(inputs))
        if inputs and self.group_size > max(inputs):
            raise UsageError(
                f"group_size={self.group_size} was asked for, but the widest layer has {max(inputs)} inputs; use "
                f"{default_group_size(inputs)}, or -1 for one group per output"
            )
        return recipe(self.group_size)


def refuse_longer(length: int, model: Any) -> None:
    """Raises UsageError if the model cannot read windows of `length` tokens."""
    most = limit(model)
    if most and length > most:
        raise UsageError(f"length={length} was asked for, but the model reads at most {most} tokens; use {most}")


def limit(model: Any) -> int | None:
    """The most tokens that the model can read at once, as far as it says so."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a model with pictures, say
    most = getattr(text, "max_position_embeddings", None)
    return most if most and most > 0 else None  # XLNet says -1, for there is none


def chosen_device(name: str) -> str:
    """ "auto" is the first GPU if there is one. Raises UsageError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} was asked for: {str(error).splitlines()[0]}") from None
    return name


def _inputs(source: Source, recipe: Recipe) -> list[int]:
    """The number of inputs of every layer in the blocks that the recipe does not keep dense."""
    return [
        layers_of.shape_of(layer)[1]
        for block in layers_of.find_blocks(source.model)
        for name, layer in layers_of.linears(source.model.get_submodule(block)).items()
        if recipe.scheme_of(f"{block}.{name}") is not None
    ]
