"""What every runner is told on its command line, and what it says when its checkpoint is finished.

    PYTHON RUNNER MODEL OUT --windows FILE --bits 4 --group-size 64 [--asym] [--variant NAME] [--iterations N]

FILE holds token ids, int64 [windows, length]. The last line on standard output is one JSON object. Standard library and
numpy only: this is imported in every peer's environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any


def asked() -> argparse.Namespace:
    """The request; `windows` is read already."""
    import numpy as np

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--windows", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--variant", default="default")
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    args.windows = np.load(args.windows)
    args.started = time.perf_counter()
    return args


def finished(args: argparse.Namespace, *packages: str, **more: Any) -> None:
    """Say how long it took after the imports, and with which versions."""
    if not list(Path(args.out).glob("*.safetensors")):
        raise SystemExit(f"{args.out}: no safetensors were written")
    versions = {name: importlib.metadata.version(name) for name in packages}
    seconds = time.perf_counter() - args.started
    print("\n" + json.dumps({"versions": versions, "seconds_without_imports": seconds, **more}), flush=True)
