"""wellrounded eval MODEL [--against ORIGINAL] [--tasks NAME,...]"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import UsageError
from ..report import fidelity_rows
from . import tasks
from .terminal import print_json, print_table, progress

BUILTIN_WINDOWS = 16


def run(args: argparse.Namespace) -> int:
    """Perplexity on the texts, and with --against the distance to the original."""
    from ..api import evaluate
    from ..calibration import builtin
    from ..hf.quiet import quiet

    quiet()
    if args.tasks is not None:
        return tasks.run(args)
    if args.limit:
        raise UsageError("--limit was asked for without --tasks, whose examples it counts; --windows limits a text")

    text = "".join(_read(name) for name in args.text) if args.text else builtin.proof_text()
    windows = args.windows if args.text or args.windows else BUILTIN_WINDOWS
    started = time.perf_counter()
    with progress("evaluating, window") as bar:
        result = evaluate(
            args.model,
            text,
            against=args.against,
            length=args.length,
            windows=windows,
            trust_remote_code=args.trust_remote_code,
            progress=lambda done, total: bar.step(done, total, time.perf_counter() - started),
        )
    if args.json:
        print_json(result)
        return 0
    original = {"original_perplexity": result["against"]["perplexity"]} if "against" in result else {}
    rows = fidelity_rows({**result, **original}, digits=3)
    text_name = ", ".join(args.text) if args.text else "built-in English and code"
    rows.append(("tokens", f"{result['tokens']:,} of {text_name}, windows of {result['length']}"))
    rows.append(("time", f"{result['seconds']:.0f} s"))
    print_table(rows, args.model)
    return 0


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {name}: cannot be read as UTF-8 text ({error})") from None
