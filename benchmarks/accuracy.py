"""Accuracy, time and memory of whole runs on a real model, each as its own process.

    python benchmarks/accuracy.py MODEL --calibration TEXT --text TEXT [--cases 4sym,3sym] [--out DIR]

Every case is `wellrounded quantize` followed by `wellrounded eval --against MODEL` on another text, so each figure is
one that a user would get. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "4sym": ["--bits", "4"],
    "4asym": ["--bits", "4", "--asym"],
    "3sym": ["--bits", "3"],
    "3asym": ["--bits", "3", "--asym"],
    "2asym": ["--bits", "2", "--asym"],
    "8sym": ["--bits", "8"],
    "4sym-act-order": ["--bits", "4", "--act-order"],
    "4sym-none": ["--bits", "4", "--calibration", "none"],
}


def wellrounded(*arguments: str) -> dict:
    """Run a command with --json; its object."""
    command = [sys.executable, "-m", "wellrounded", *arguments, "--json"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode not in (0, 3):
        sys.exit(f"{' '.join(command)}\n{finished.stderr}")
    return json.loads(finished.stdout)


def main() -> None:
    """Run the cases and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--text", required=True, help="text file to evaluate on")
    parser.add_argument("--cases", default="4sym,4asym,3sym,4sym-none", help=f"of {','.join(CASES)}")
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--samples", default="128")
    parser.add_argument("--length", default="512")
    parser.add_argument("--windows", default="10", help="windows of --eval-length tokens to evaluate on")
    parser.add_argument("--eval-length", default="1024")
    parser.add_argument("--out", type=Path, help="keep the checkpoints here")
    args = parser.parse_args()
    print("| case | ppl | dense | KL mean | same top token | bits/weight | quantize s | wall s | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for case in args.cases.split(","):
            out = str((args.out or Path(scratch)) / case)
            options = CASES[case]
            if "--calibration" not in options:
                options = [*options, "--calibration", args.calibration]
            options = [*options, "--group-size", args.group_size, "--samples", args.samples, "--length", args.length]
            started = time.perf_counter()
            made = wellrounded("quantize", args.model, "-o", out, "--force", *options)
            wall = time.perf_counter() - started
            seen = wellrounded(
                "eval", out, "--against", args.model, "--text", args.text,
                "--length", args.eval_length, "--windows", args.windows,
            )  # fmt: skip
            print(
                f"| {case} | {seen['perplexity']:.2f} | {seen['against']['perplexity']:.2f} | {seen['kl_mean']:.4f} "
                f"| {seen['top1_agreement']:.1%} | {made['bits_per_weight']:.2f} | {made['seconds']['total']:.0f} "
                f"| {wall:.0f} | {made['peak_rss_bytes'] / 2**30:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
