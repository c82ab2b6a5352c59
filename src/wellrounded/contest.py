"""A mixture of schemes against the best uniform one that fits: both are quantized, and the better one is written.

The uniform one is tried first, beside the result; then the mixture is written, and where it turns out to be further
from the original on held-out text, the uniform one in its place. What was measured, and how good what was tried is, is
kept in a file, by which a run that was stopped comes to the same choice, and another budget is served at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import measurement
from .budget import Account, Budget, described, mixture, recipe_of, refuse_out_of_range, uniform
from .checkpoint import Source
from .core.recipe import Recipe
from .core.scheme import Scheme
from .errors import OutOfMemory, UsageError, WellRoundedError
from .formats.config import to_config, version_for
from .measurement import Foreign, Measurement
from .memory import exhausted
from .model.stream import SpillFile
from .pipeline import Run
from .places import nearest, unfinished
from .report import Report
from .request import NONE, Request
from .sensitivity import distance, measure, schemes_for
from .trial import Tell, attempt, say

ELSEWHERE = ("calibration", "device", "batch", "max_memory", "min_tokens")  # what the file is about, or changes no byte


class Beaten(WellRoundedError):  # noqa: N818  # a signal, not an error
    """The mixture is further from the original than the uniform scheme: it is not to be written."""


@dataclass(frozen=True)
class Rival:
    """What competes: a recipe in words, its size, what asks for it, and under which name its result is kept."""

    what: str
    size: str
    request: Request
    digest: str

    @classmethod
    def of(cls, what: str, size: str, request: Request, recipe: Recipe) -> Rival:
        """The `request` with another recipe."""
        asked = replace(request, recipe=recipe)
        options = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name not in (*ELSEWHERE, "recipe")}
        stored = {**_stored(recipe), "meta": None}  # which names our version
        return cls(what, size, asked, measurement.digest([repr(options), stored]))


@dataclass
class Contest:
    """A budget, the mixture and the uniform scheme that it allows (None if none fits, or it is the mixture itself).

    known, path  what was measured and tried, and its file
    proof        whether there is held-out text to compare them on: else the mixture is not trusted
    gap          how much less than the mixture the best one might cost, as measured; 0 if it is the best
    """

    budget: Budget
    mixed: Rival
    uniform: Rival | None
    known: Measurement
    path: Path
    proof: bool = True
    gap: float = 0.0

    def moved(self, rival: Rival | None) -> float | None:
        """How far its result is from the original, None if that is not known."""
        return None if rival is None else self.known.tried.get(rival.digest)

    @property
    def chosen(self) -> Rival:
        """What is to be written: the mixture, unless the uniform scheme is known to be better, or nothing can be."""
        if self.uniform is None:
            return self.mixed
        mixed, plain = self.moved(self.mixed), self.moved(self.uniform)
        beaten = mixed is not None and plain is not None and (plain < mixed or mixed != mixed)
        return self.uniform if beaten or not self.proof else self.mixed

    def discards(self, out: Path) -> bool:
        """Whether a stopped run has left parts of a mixture there that is not to be written."""
        recipe = self.mixed.request.recipe
        assert recipe is not None
        return self.chosen is not self.mixed and unfinished(out).get("recipe") == _stored(recipe)

    def judge(self, report: Report) -> None:
        """Note how good the result of what was chosen is, in the report too. Raises Beaten if it is not to be."""
        rival = self.chosen
        if report.fidelity is not None:
            # A second run that differs in its last bits does not change the verdict.
            self.known.tried.setdefault(rival.digest, distance(report.fidelity))
            self.known.write(self.path)
        if self.chosen is not rival:
            raise Beaten(f"{rival.what}: {self.moved(rival):.4f} from the original, {self.chosen.what} is better")
        report.scheme = rival.what
        report.budget = {
            "asked": str(self.budget),
            "used": rival.size,
            "written": rival.what,
            "gap": self.gap,
            "tried": [{"scheme": one.what, "distance": self.moved(one)} for one in (self.mixed, self.uniform) if one],
        }
        if rival is not self.mixed:
            mixed, plain = self.moved(self.mixed), self.moved(rival)
            why = "cannot be proven to be better: no text is held out"
            if mixed is not None and plain is not None:
                why = f"was tried and is worse, {mixed:.4f} against {plain:.4f} from the original"
            report.notes.append(f"{self.mixed.what} {why}; every layer is {rival.what} instead")


def prepare(
    budget: Budget, request: Request, opened: Callable[[], Source], out: Path, file: str | Path | None, tell: Tell
) -> Contest:
    """Measure, unless that has been done, choose a mixture, and try the uniform scheme that fits, unless that has been.

    `file` is where the measurement is, or is to be; by default OUT.measurement.json.

    Raises UsageError for a budget that is out of range or cannot be served, or a file that is of something else.
    """
    path = Path(file).expanduser() if file else out.with_name(f"{out.name}.measurement.json")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: no such directory for the measurement; make it, or name another file")
    if request.calibration == NONE:
        raise UsageError(f"{budget} were asked for with calibration={NONE!r}, but what layers need is measured on data")
    run = request.run(opened())
    assert run.calibration is not None
    proof = len(run.calibration.held_out) > 0
    account = Account.of(run, budget)
    each = [schemes_for([shape]) for shape in account.shapes.values()]
    refuse_out_of_range([[name] for name in account.shapes], each, account, budget)  # before hours of measuring
    known = _measured(run, path, strict=file is not None, home=out.absolute().parent, tell=tell)
    chosen, gap = mixture(known.sets, account, budget)
    scheme = uniform(known.sets, account)

    def rival(schemes: list[Scheme]) -> Rival:
        size = account.said(sum(account.size(one.names, s) for one, s in zip(known.sets, schemes)))
        return Rival.of(described(run, known.sets, schemes), size, request, recipe_of(run, known.sets, schemes))

    plain = rival([scheme] * len(chosen)) if scheme is not None and {*chosen} != {scheme} else None
    contest = Contest(budget, rival(chosen), plain, known, path, proof, gap)
    if plain is not None and proof and contest.moved(plain) is None:
        _try(contest, plain, opened, out, tell)
    return contest


def _measured(run: Run, path: Path, strict: bool, home: Path, tell: Tell) -> Measurement:
    """From the file, if it holds what is needed; else measured now, and put there."""
    assert run.calibration is not None
    about = measurement.about(run.source.fingerprint, run.plan.schemes, run.calibration.digest)
    if path.exists():
        try:
            found = Measurement.read(path, about)
            say(tell, f"what layers need was measured before: {path}")
            return found
        except Foreign as error:
            if strict:
                raise
            say(tell, f"measuring again: {error}")
    with TemporaryDirectory(prefix=".measuring-", dir=nearest(home)) as scratch:
        spill = SpillFile(Path(scratch)) if run.work.room.spills else None
        try:
            sets = measure(run.walk, [*run.plan.schemes], run.calibration.windows, run.work.room, tell, spill)
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
            why = str(error).splitlines()[0]
            raise OutOfMemory(f"measuring: memory does not suffice ({why}); use shorter windows (--length)") from None
        finally:
            if spill is not None:
                spill.close()
    found = Measurement(about, sets)
    found.write(path)
    return found


def _try(contest: Contest, rival: Rival, opened: Callable[[], Source], out: Path, tell: Tell) -> None:
    """Quantize, to know how good that is."""
    say(tell, f"trying {rival.what} everywhere, which the mixture has to beat")
    report = attempt(rival.request, opened(), out.with_name(f".{out.name}.uniform"), tell)
    if report.fidelity is not None:
        moved = contest.known.tried[rival.digest] = distance(report.fidelity)
        contest.known.write(contest.path)
        say(tell, f"{rival.what}: {moved:.4f} from the original")


def _stored(recipe: Recipe) -> dict[str, Any]:
    """As a run's request has it."""
    return to_config(recipe, version_for(recipe.scheme, *(rule.scheme for rule in recipe.rules)))
