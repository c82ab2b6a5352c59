"""The files beside the weights: config.json, quantize_config.json, the report, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .report import Report


def write_files(directory: Path, config: dict[str, Any], quantization: dict[str, Any], report: Report) -> None:
    """Write all four; config.json goes last, since a directory without it is not a model."""
    _dump(directory / "quantize_config.json", quantization)
    _dump(directory / "quantization_report.json", report.to_dict())
    (directory / "README.md").write_text(card(report))
    _dump(directory / "config.json", {**config, "quantization_config": quantization})


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
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{origin}tags: [gptq, {report.scheme.split()[0]}, wellrounded]
---
# {name}

{source} in the GPTQ format, {report.scheme}, made with
[wellrounded](https://pypi.org/project/wellrounded) {report.version}.

| | |
|---|---|
{rows}

Calibration: {calibration}. The figures compare with the original on text that was held out from calibration; every
number, layer by layer, is in `quantization_report.json`.

```bash
wellrounded chat {name}
```
```python
import wellrounded
model = wellrounded.load("{name}")
```
{"Linear layers that stayed dense:" + chr(10) + kept if kept else ""}"""


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
