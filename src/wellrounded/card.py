"""The files beside the weights: config.json, quantize_config.json, the report, and a model card."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from .checkpoint import WEIGHT_SUFFIXES, inside
from .report import Report

_CHAT = """```bash
wellrounded chat {name}
```
"""
_USE = """```python
import wellrounded
model = wellrounded.load("{name}")
```
"""


def companions(source: Path) -> list[Path]:
    """Every file of a model directory that holds no weights, subdirectories included, hidden ones not.

    Raises CheckpointError for one that is a link out of the directory.
    """
    found = []
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if hidden or not path.is_file() or path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json"):
            continue
        found.append(inside(source, path))
    return found


def copy_files(source: Path, target: Path) -> None:
    """Copy every file of a model directory that holds no weights.

    The original's README.md becomes README.source.md.
    """
    for path in companions(source):
        place = target / path.relative_to(source)
        if place == target / "README.md":
            place = target / "README.source.md"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def write_files(directory: Path, config: dict[str, Any], quantization: dict[str, Any], report: Report) -> None:
    """Write all four; config.json goes last, since a directory without it is not a model."""
    dump(directory / "quantize_config.json", quantization)
    dump(directory / "quantization_report.json", report.to_dict())
    (directory / "README.md").write_text(card(report), encoding="utf-8")
    dump(directory / "config.json", {**config, "quantization_config": quantization})


def card(report: Report) -> str:
    """A model card in Markdown: what it is, how good it is, how to run it."""
    rows = "\n".join(f"| {label} | {value} |" for label, value in report.summary())
    kept = "".join(f"- `{name}`: {reason}\n" for name, reason in list(report.kept.items())[:50])
    name = Path(report.out).name
    calibration = report.calibration["description"] if report.calibration else "none (plain rounding)"
    # A path on this machine means nothing to a reader; a hub id does.
    local = Path(report.source).exists() or report.source.count("/") != 1
    source = Path(report.source).name if local else report.source
    origin = "" if local else f"base_model: {source}\nbase_model_relation: quantized\n"
    task, chat = ("pipeline_tag: text-generation\n", _CHAT) if report.generates else ("", "")
    return f"""---
library_name: transformers
{task}{origin}tags: [gptq, {report.scheme.split()[0]}, wellrounded]
---
# {name}

{source} in the GPTQ format, {report.scheme}, made with
[wellrounded](https://pypi.org/project/wellrounded) {report.version}.

| | |
|---|---|
{rows}

Calibration: {calibration}. The figures compare with the original on text that was held out from calibration; every
number, layer by layer, is in `quantization_report.json`.

{(chat + _USE).format(name=name)}{"Weights that stayed dense:" + chr(10) + kept if kept else ""}"""


def short_card(name: str, config: dict[str, Any]) -> str:
    """A model card for packed weights of which no report tells how good they are."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gptq, {config["bits"]}-bit, wellrounded]
---
# {name}

A model in the GPTQ format, {config["bits"]} bits, groups of {config["group_size"]}.

{(_CHAT + _USE).format(name=name)}"""


def to_json(content: Any) -> str:
    """Indented JSON; NaN and Inf, which it has no words for, become null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def dump(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON."""
    path.write_text(to_json(content) + "\n", encoding="utf-8")
