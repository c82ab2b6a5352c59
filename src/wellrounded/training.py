"""train(): with codes frozen, the scales and norm gains that bring a quantized model closest to its original.

The last step of the `best` preset: KL(original || quantized) over tokens falls by Adam, for as many steps as asked for,
and what is best on text that it was not trained on is what comes back. EfficientQAT (Chen et al. 2024) calls training
of scales alone E2E-QP; taking the original's distribution for target instead of the text keeps a model's manner.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .core.weight import QuantizedWeight
from .errors import CheckpointError, NumericsError, UsageError
from .learned import Gain, Learned, Moments
from .model.stream import Stream
from .student import WINDOWS, Student
from .tensorfile import TensorFile, sync, write

WARM_UP = 4  # steps


@dataclass(frozen=True)
class Training:
    """How scales and gains are trained: so many steps of so many windows, each at these rates when they are highest.

    scale_rate of logarithms of scales, norm_rate of gains; both rise for four steps and fall to zero as a cosine.
    every      steps from one look at held-out text, and one writing of the checkpoint, to the next
    """

    steps: int = 32
    windows_per_step: int = 8
    scale_rate: float = 1e-3
    norm_rate: float = 3e-4
    every: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.windows_per_step, self.every) < 1 or min(self.scale_rate, self.norm_rate) < 0:
            raise UsageError(f"{self}: steps, windows_per_step and every are at least 1, and no rate is negative")

    @property
    def windows(self) -> int:
        """How many are trained on."""
        return self.steps * self.windows_per_step

    def share(self, step: int) -> float:
        """Which part of its highest rate step 0, 1, ... has."""
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Row(NamedTuple):
    """What was seen at a step: mean KL of its own windows before it, and of held-out text after it, nats per token."""

    step: int
    kl: float | None
    held_out: float | None


Tell = Callable[[int, int, "float | None", "float | None"], None]  # step, of how many, KL, held-out KL


@dataclass
class Trained:
    """What is to be stored: of the step with the least held-out KL, of the last one if nothing was held out.

    weights  the quantized weights by layer, codes and zeros as they were
    dense    parameters of norms by name, in the source's dtype; those that are not there stay as they are
    """

    weights: dict[str, QuantizedWeight]
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    best_step: int = 0
    history: list[Row] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        """Whether any step was better than none; otherwise the weights are those that training began with."""
        return self.best_step > 0


@torch.no_grad()
def train(
    student: Student, teacher: Stream, held: Stream | None, settings: Training,
    path: Path | None = None, tell: Tell = lambda step, total, kl, held_out: None,
) -> Trained:  # fmt: skip
    """Train a student on the windows of `teacher`, a stream that has gone through all of the dense model's blocks.

    `held` is another such stream, of text to choose the best step by. A run that is stopped goes on from `path`, where
    its state is kept, with the very same result. Raises CheckpointError if another run's state lies there, and
    NumericsError where a KL is not finite.
    """
    with student.walk.outside():
        student.begin(teacher)
        state = _State(student, settings, _digest(student, teacher, held, settings))
        if path is not None and path.exists():
            state.load(path)
        elif held is not None:
            state.judge(_held_out(student, held))
            tell(0, settings.steps, None, state.history[-1].held_out)
        order = _order(_windows(teacher), settings)
        while state.step < settings.steps:
            kl = state.learn(teacher, order[state.step])
            state.step += 1
            look = state.step % settings.every == 0 or state.step == settings.steps
            state.judge(_held_out(student, held) if held is not None and look else None, kl)
            if path is not None and look:
                state.save(path)
            tell(*(state.step, settings.steps, kl, state.history[-1].held_out))
    return state.result(held is not None)


class _State:
    """What a training run knows after a step: enough to go on from there."""

    def __init__(self, student: Student, settings: Training, digest: bytes) -> None:
        self.student, self.settings, self.digest = student, settings, digest
        self.step, self.best_step, self.least = 0, 0, math.inf
        self.history: list[Row] = []
        self.moments = {name: Moments.of(learned) for name, learned in student.learned.items()}
        self.best: dict[str, torch.Tensor] = {}  # as stored; nothing as long as nothing was better than the start

    def learn(self, teacher: Stream, places: list[tuple[int, int]]) -> float:
        """Take the next step on these windows; the mean KL that they had before it."""
        student = self.student
        kl = student.learn(*_picked(student, teacher, places))
        if not math.isfinite(kl):
            raise NumericsError(f"training step {self.step + 1}: the KL to the original is {kl}; use lower rates")
        share, tokens = self.settings.share(self.step), student.tokens
        for name, learned in student.learned.items():
            rate = self.settings.norm_rate if isinstance(learned, Gain) else self.settings.scale_rate
            self.moments[name].step(learned, share * rate, self.step + 1, tokens)
        student.tokens = 0
        return kl

    def judge(self, held_out: float | None, kl: float | None = None) -> None:
        """Note what was seen after a step, and keep its result if it is the best so far."""
        self.history.append(Row(self.step, kl, held_out))
        if held_out is not None and held_out < self.least:
            self.least, self.best_step = held_out, self.step
            self.best = self._stored() if self.step else {}

    def result(self, judged: bool) -> Trained:
        """The best if there was held-out text to tell by, else the last."""
        student = self.student
        best, step = (self.best, self.best_step) if judged else (self._stored(), self.step)
        weights = dict(student.quantized)
        for name in student.scales if step else ():
            weights[name] = student.scales[name].quantized(best[name])
        weights |= {name: weights[owner] for name, owner in student.owners.items() if owner in weights}
        return Trained(weights, {name: best[name] for name in student.gains if step}, step, self.history)

    def _stored(self) -> dict[str, torch.Tensor]:
        return {name: learned.stored().cpu() for name, learned in self.student.learned.items()}

    def save(self, path: Path) -> None:
        """Replace the file at once: whoever stops the process leaves the old one or the new."""
        rows = [[math.nan if value is None else value for value in row] for row in self.history]
        tensors = {
            "digest": torch.frombuffer(bytearray(self.digest), dtype=torch.uint8),
            "steps": torch.tensor([self.step, self.best_step]),
            "least": torch.tensor([self.least], dtype=torch.float64),
            "history": torch.tensor(rows, dtype=torch.float64).view(-1, 3),
            **{f"best.{name}": value for name, value in self.best.items()},
        }
        for name, learned in self.student.learned.items():
            moments = self.moments[name]
            tensors |= {
                f"value.{name}": learned.value,
                f"first.{name}": moments.first,
                f"second.{name}": moments.second,
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        try:
            write(new, tensors)
            new.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Go on from what was saved there."""
        file = TensorFile(path)
        if "digest" not in file.entries or bytes(file.read("digest").tolist()) != self.digest:
            raise CheckpointError(f"{path}: the state of another training run; delete it, or train as that run did")
        self.step, self.best_step = file.read("steps").tolist()
        self.least = file.read("least").item()
        rows = file.read("history").tolist()
        self.history = [Row(int(step), *(None if math.isnan(v) else v for v in rest)) for step, *rest in rows]
        self.best = {name.removeprefix("best."): file.read(name) for name in file.entries if name.startswith("best.")}
        for name, learned in self.student.learned.items():
            for what, value in self._running(name, learned).items():
                value.copy_(file.read(f"{what}.{name}"))

    def _running(self, name: str, learned: Learned) -> dict[str, torch.Tensor]:
        moments = self.moments[name]
        return {"value": learned.value, "first": moments.first, "second": moments.second}


def _held_out(student: Student, held: Stream) -> float:
    """Mean KL over a stream's tokens, batch by batch as they come."""
    total, tokens = 0.0, 0
    for batch, ids in enumerate(held.ids):
        kl, count = student.divergence(*_picked(student, held, [(batch, window) for window in range(len(ids))]))
        total, tokens = total + kl, tokens + count
    return total / max(tokens, 1)


def _windows(stream: Stream) -> list[tuple[int, int]]:
    """Every window of a stream: its batch, and its place there."""
    return [(batch, window) for batch, ids in enumerate(stream.ids) for window in range(len(ids))]


def _order(windows: list[tuple[int, int]], settings: Training) -> list[list[tuple[int, int]]]:
    """The windows of each step: all of them shuffled, as often as it takes."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.windows
    epochs = -(-needed // len(windows))
    order = [windows[n] for _ in range(epochs) for n in torch.randperm(len(windows), generator=generator).tolist()]
    size = settings.windows_per_step
    return [order[start : start + size] for start in range(0, needed, size)]


def _picked(student: Student, source: Stream, places: list[tuple[int, int]]) -> tuple[list[torch.Tensor], Stream]:
    """What the dense model's last block returned for some windows, and the same at the first block's door, batched."""
    ids = torch.stack([source.ids[batch][window] for batch, window in places])
    masks = [source.masks[batch] for batch, _ in places]
    mask = None
    if any(one is not None for one in masks):
        whole = (torch.ones_like(source.ids[b][w], dtype=torch.bool) for b, w in places)
        mask = torch.stack([one if m is None else m[w] for one, m, (_, w) in zip(whole, masks, places)])
    more = [source.more[batch] for batch, _ in places] if any(source.more) else []
    stream = student.walk.stream(ids, mask, len(source.ids[0]), more)
    hidden = torch.cat([source.hidden(batch).narrow(WINDOWS, window, 1) for batch, window in places], WINDOWS)
    return list(hidden.split([len(part) for part in stream.ids], WINDOWS)), stream


def _digest(student: Student, teacher: Stream, held: Stream | None, settings: Training) -> bytes:
    """What decides every bit of a run, but the model itself."""
    digest = hashlib.sha256(repr(astuple(settings)).encode())
    for stream in (teacher, *(() if held is None else (held,))):
        for ids in stream.ids:
            digest.update(f"{tuple(ids.shape)}".encode() + ids.cpu().numpy().tobytes())
    for name, scales in student.scales.items():
        digest.update(name.encode() + scales.stored().cpu().numpy().tobytes())
    digest.update(" ".join(student.gains).encode())
    return digest.digest()
