"""A measurement as a file: what each set of layers is worth, and how good what was tried turned out to be.

It holds for one model, one choice of layers and one calibration, and says so; for any budget.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .core.scheme import Scheme
from .errors import CheckpointError, UsageError
from .journal import difference
from .sensitivity import Sensitivity

VERSION = 1
KIND = "wellrounded measurement"


class Foreign(UsageError):  # noqa: N818
    """The file holds a measurement of something else."""


@dataclass
class Measurement:
    """Sensitivities, and the distance to the original of the requests that were carried out, by their `digest`.

    about  what it holds for, JSON-ready: see `about`
    """

    about: dict[str, Any]
    sets: list[Sensitivity]
    tried: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, about: dict[str, Any]) -> Measurement:
        """What is in the file. Raises Foreign if it is of something else, UsageError if it is no measurement."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = content["what"] == KIND and content["version"] == VERSION
            sets = [_set(one) for one in content["sets"]] if known else []
            stored, tried = content["about"], {key: float(value) for key, value in content["tried"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise UsageError(
                f"{path}: cannot be read as a measurement ({type(error).__name__}: {error}); name another file, or "
                "remove it to measure again"
            ) from None
        if not known:
            raise UsageError(
                f"{path}: {content['what']}, version {content['version']}, expected {KIND}, version {VERSION}; name "
                "another file, or remove it to measure again"
            )
        if differing := difference(stored, about):
            raise Foreign(
                f"{path}: measured for another request ({differing}); name another file, or remove it to measure again"
            )
        return cls(about, sets, tried)

    def write(self, path: Path) -> None:
        """Put it into the file, whole or not at all. Raises CheckpointError if that cannot be written."""
        sets = [
            {"layers": one.names, "costs": [[s.bits, s.group_size, cost] for s, cost in one.costs.items()]}
            for one in self.sets
        ]
        content = {"what": KIND, "version": VERSION, "about": self.about, "tried": self.tried}
        lines = [json.dumps(content)[:-1] + ', "sets": [', ",\n".join(map(json.dumps, sets)), "]}\n"]
        half = path.with_name(f"{path.name}.writing")
        try:
            with half.open("w", encoding="utf-8") as file:
                file.write("\n".join(lines))
                file.flush()
                os.fsync(file.fileno())
            half.replace(path)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: the measurement cannot be written ({error}); make room there") from None


def _set(one: dict[str, Any]) -> Sensitivity:
    return Sensitivity(tuple(one["layers"]), {Scheme(bits, group): float(cost) for bits, group, cost in one["costs"]})


def about(fingerprint: str | dict[str, str], layers: Iterable[str], calibration: str) -> dict[str, Any]:
    """What a measurement holds for: a source's tensors, the layers to be quantized, and the calibration's digest."""
    names = sorted(layers)
    return {
        "tensors": fingerprint,
        "layers": {"count": len(names), "sha256": digest(names)},
        "calibration": calibration,
    }


def digest(content: Any) -> str:
    """Of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
