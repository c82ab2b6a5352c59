"""Who takes part in `accuracy.py`: a tool, its settings, and the command that lets it quantize."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
OURS = ("-m", "wellrounded", "quantize")
FURTHER = 256  # windows of the same text that `best` trains on


@dataclass(frozen=True)
class Contender:
    """A tool with its settings: the environment it runs in (None: this one), its runner and the runner's options."""

    title: str
    peer: str | None = None
    runner: str | None = None  # in peers/; None for wellrounded's own command
    options: tuple[str, ...] = ()
    calibration: str = "windows.jsonl"  # of those that `accuracy.py` writes


CONTENDERS = {
    "plain": Contender("plain rounding", runner="run_plain.py"),
    "none": Contender("wellrounded, no data", options=("--calibration", "none")),
    "fast": Contender("wellrounded, fast", options=("--preset", "fast")),
    "default": Contender("wellrounded"),
    "best": Contender("wellrounded, best", options=("--preset", "best"), calibration="further.jsonl"),
    "llmcompressor": Contender("llm-compressor GPTQ", "llmcompressor", "run_llmcompressor.py"),
    "gptqmodel": Contender("GPTQModel", "gptqmodel", "run_gptqmodel.py"),
    "gptqmodel-best": Contender(
        "GPTQModel, mse=2.4, damp 0.01", "gptqmodel", "run_gptqmodel.py", ("--variant", "best")
    ),
    "autoround": Contender("AutoRound", "autoround", "run_autoround.py"),
}
PEERS = ("gptqmodel", "autoround", "llmcompressor")


def command_of(name: str, args: argparse.Namespace, original: Path, out: Path) -> list[str]:
    """The contender's process."""
    contender = CONTENDERS[name]
    scheme = ["--bits", str(args.bits), "--group-size", str(args.group_size), *(["--asym"] if args.asym else [])]
    if contender.runner:
        python = python_of(getattr(args, contender.peer)) if contender.peer else sys.executable
        words = [str(HERE / "peers" / contender.runner), str(original), str(out), "--windows", "windows.npy"]
        return [python, *words, *scheme, *contender.options, "--iterations", str(args.iterations)]
    data = [] if "--calibration" in contender.options else ["--calibration", contender.calibration]
    asked = ["--samples", str(args.samples), "--length", str(args.length), "--json", "--fresh"]
    return [sys.executable, *OURS, str(original), "-o", str(out), *scheme, *data, *asked, *contender.options]


def python_of(environment: str) -> str:
    """The interpreter of a virtual environment, named by its directory or directly."""
    path = Path(environment).absolute()
    return str(path / "bin" / "python" if path.is_dir() else path)
