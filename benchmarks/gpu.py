"""Everything about one CUDA GPU in one command of under ten minutes: products, a model, a quantization.

    python benchmarks/gpu.py [--only copy,kernels,model,quantize] [--seconds 540] [--out DIR] [--json] [--write FILE]
    python benchmarks/gpu.py --smoke        all of it on the CPU at tiny shapes, which gives no figures of a GPU

copy      how fast memory is copied and cuBLAS multiplies: what the rest is compared with
kernels   one product: our kernel, cuBLAS, and every peer of gpu_peers.py that is installed
model     a Llama of 8B shape with random weights under `generate` with a static cache, dense and packed
quantize  --layers blocks of a random checkpoint of that shape, preset fast, 128 windows of 2048 tokens

Each section runs in a process of its own with its share of the time that is left. DIR gets a line of JSON for each row
as soon as it is there, so that a run that is killed leaves what it had. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import large

Lines = Iterator[dict[str, Any] | str]  # rows of a table, and notes under it
Job = tuple[str, Lines]
WEIGHTS = {"copy": 2, "kernels": 8, "model": 7, "quantize": 6}  # shares of the time
SOFT, HARD = 0.9, 2  # parts of its share after which a section begins nothing more, and after which it is killed
MARKER, END = "<!-- benchmarks/gpu.py -->", "<!-- end -->"
PEERS = ("tinygemm", "bitsandbytes NF4", "Marlin", "Machete")
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured; shapes of products are (inputs, outputs), `seconds` those of one row of that table."""

    copied: int = 2**31
    product: int = 8192
    shapes: tuple = (
        (4096, 14336), (14336, 4096), (4096, 4096), (4096, 1024), (8192, 8192), (8192, 28672), (28672, 8192),
        (2048, 768), (768, 2048),
    )  # fmt: skip
    other_bits: tuple = (2, 3, 8)  # of the first shape
    group: int = 128
    rows: tuple = (1, 4, 16, 64, 256, 1024, 4096)
    seconds: float = 0.1
    blocks: int = 32  # of the whole model
    prompt: int = 2048
    new: int = 64
    batches: tuple = (1, 8)
    samples: int = 128
    length: int = 2048


SMOKE = Sizes(
    copied=2**20, product=64, shapes=((64, 96), (96, 64)), other_bits=(3,), group=32, rows=(1, 16, 64, 80), seconds=0,
    blocks=2, prompt=16, new=4, batches=(1, 2), samples=8, length=64,
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """What one section is to do, in which file its lines go, and in how many seconds it may begin something."""

    section: str
    lines: str
    scratch: str
    seconds: float
    smoke: bool = False
    layers: int = 8

    sizes = property(lambda self: SMOKE if self.smoke else Sizes())
    device = property(lambda self: "cpu" if self.smoke else "cuda")
    kind = property(lambda self: "tiny-llama" if self.smoke else "llama-8b")  # of model, as large.py calls it

    def llama(self) -> dict[str, int]:
        """That model's configuration but for the number of its blocks."""
        return large.SHAPES.setdefault(self.kind, LLAMA_8B)


# ---- a section's own process ----


def work(ask: Ask) -> int:
    """Carry out a section, each line of it into its file at once; 1 if a job failed, which is a note there."""
    import torch

    from gpu_models import model_section, quantize_section
    from gpu_peers import cache_bytes, copy_section, kernel_section, said
    from wellrounded.benchmark.clock import machine

    sections = copy_section, kernel_section, model_section, quantize_section
    jobs = dict(zip(WEIGHTS, sections))[ask.section]
    until, failed, left_out = time.monotonic() + ask.seconds, 0, []
    with Path(ask.lines).open("a", encoding="utf-8") as file:

        def put(kind: str, content: Any) -> None:
            file.write(json.dumps({kind: content}) + "\n")
            file.flush()

        if not ask.smoke and not torch.cuda.is_available():
            put("failed", f"torch {torch.__version__} sees no CUDA GPU; --smoke runs all of it on the CPU")
            return 1
        versions = {name: util.find_spec(name) and metadata.version(name) for name in ("triton", "transformers")}
        put("machine", machine(ask.device) | versions | {"l2_bytes": cache_bytes(ask.device)})
        for name, lines in jobs(ask):
            if time.monotonic() > until:
                left_out.append(name)
                continue
            try:
                for line in lines:
                    put("note" if isinstance(line, str) else "row", line)
            except Exception as error:  # the other jobs may do better
                traceback.print_exc()
                put("note", f"{name} failed: {said(error)}")
                failed = 1
        if left_out:
            put("note", f"not measured, for its {ask.seconds:.0f} s were spent: {'; '.join(left_out)}")
    return failed


def start(ask: Ask) -> subprocess.Popen:
    """A section's process, in a group of its own, so that it can be stopped with all that it has started."""
    Path(ask.lines).write_text("")
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(asdict(ask))]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=os.setpgrp)


def follow(child: subprocess.Popen, ask: Ask, seconds: float) -> Iterator[tuple[str, Any]]:
    """What a section puts into its file, as it comes, and how it failed if it did; it is stopped after `seconds`."""
    until, rest = time.monotonic() + seconds, ""
    with Path(ask.lines).open(encoding="utf-8") as file:
        while True:
            ended, late = child.poll() is not None, time.monotonic() > until
            *lines, rest = (rest + file.read()).split("\n")
            yield from (next(iter(json.loads(line).items())) for line in lines)
            if ended or late:
                break
            time.sleep(0.05)
    if stop(child):
        yield "failed", f"stopped after {seconds:.0f} s, with what is above"
    elif child.returncode:
        yield "failed", f"it ended with {child.returncode}; what it said is on standard error"


def stop(child: subprocess.Popen) -> bool:
    """Kill it with all that it has started; whether it was still running."""
    if running := child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return running


# ---- the tables ----

OURS = "wellrounded"
TABLES = {  # a title, and where the columns' figures are in a row
    "copy": ("reference values", {
        "what": "what", "µs": "microseconds", "GB/s": "gb_s", "TFLOP/s": "tflop_s"
    }),
    "kernels": ("products of bfloat16 rows with a packed weight that comes from memory; bytes are its own", {
        "in x out": "shape", "bits": "bits", "rows": "rows", "kernel": "kernel", "µs": f"{OURS}/microseconds",
        "GB/s": f"{OURS}/gb_s", "of the copy": f"{OURS}/of_copy", "TFLOP/s": f"{OURS}/tflop_s",
        "times cuBLAS": f"{OURS}/speedup",
        **{f"{name} µs": f"{name}/microseconds" for name in ("packed", "restored", "cuBLAS", *PEERS)},
    }),
    "model": ("a Llama of random weights under `generate` with a static cache, dense in bfloat16 or in 4 bits", {
        "model": "model", "batch": "batch", "compiled": "compiled", "prompt": "prompt",
        "prefill tokens/s": "prefill_tokens_s", "decode tokens/s": "decode_tokens_s",
        "first call s": "first_call_seconds", "peak GPU GB": "peak_vram_bytes",
    }),
    "quantize": ("a random checkpoint with `--preset fast`; the whole model is extrapolated by the time per block", {
        "blocks": "blocks", "tokens": "tokens", "s": "seconds", "before blocks s": "opening_seconds",
        "per block s": "block_seconds", "after blocks s": "closing_seconds", "whole model, blocks": "whole_blocks",
        "whole model s": "whole_seconds", "peak GPU GB": "peak_vram_bytes", "peak RAM GB": "peak_rss_bytes",
    }),
}  # fmt: skip


def cell(row: dict[str, Any], place: str) -> str:
    """What stands in a row's column: bytes in GB, numbers in three digits or all before the point, or nothing."""
    name, _, figure = place.rpartition("/")
    found = row["contenders"].get(name, {}) if name else row
    value = found["wrong"].partition(":")[0] if "wrong" in found else found.get(figure)
    if isinstance(value, float) or figure.endswith("_bytes"):
        value = (value or 0) / (1e9 if figure.endswith("_bytes") else 1)
        return "" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else ("no", "yes")[value] if isinstance(value, bool) else str(value)


class Page:
    """Markdown that is printed line by line, and lies in a file as far as it is written."""

    def __init__(self, file: Path, stream: Any) -> None:
        self.file, self.stream, self.lines = file, stream, list[str]()

    def say(self, *lines: str) -> None:
        """Add lines."""
        self.lines += lines
        self.file.write_text("".join(f"{line}\n" for line in self.lines), encoding="utf-8")
        for line in lines:
            print(line, file=self.stream, flush=True)


# ---- the run ----


def run(args: argparse.Namespace, page: Page, scratch: str) -> dict[str, Any]:
    """Every section that was asked for, as long as there is time; all that was found."""
    results: dict[str, Any] = {"smoke": args.smoke, "sections": {}, "skipped": {}}
    end, children = time.monotonic() + args.seconds, {}

    def begin(at: int) -> tuple[subprocess.Popen, Ask, float]:
        """The section at this place, and in how many seconds it has to end."""
        left, of = end - time.monotonic(), sum(WEIGHTS[name] for name in args.only[at:])
        name, share = args.only[at], left * WEIGHTS[args.only[at]] / of
        ask = Ask(name, str(args.out / f"{name}.jsonl"), scratch, SOFT * share, args.smoke, args.layers)
        return start(ask), ask, min(HARD * share, left)

    try:
        if args.smoke:  # side by side, for nobody looks at the figures
            page.say("A smoke test on a CPU: it shows that everything runs. None of these are figures of a GPU.", "")
            children = {name: begin(at) for at, name in enumerate(args.only)}
        for at, name in enumerate(args.only):
            if time.monotonic() < end:
                children[name] = children.get(name) or begin(at)
                results["sections"][name] = {"rows": [], "notes": []}
                section(name, follow(*children[name]), results, page)
            else:
                results["skipped"][name] = f"all {args.seconds:g} s were spent; `--only {name}` measures it alone"
                page.say(f"**{name}**: skipped, {results['skipped'][name]}", "")
            (args.out / "gpu.json").write_text(json.dumps(results, indent=2))
    finally:
        for child, _, _ in children.values():
            stop(child)
    page.say("Measured on " + ", ".join(f"{key} {value}" for key, value in results.get("machine", {}).items() if value))
    return results


def section(name: str, lines: Iterator[tuple[str, Any]], results: dict[str, Any], page: Page) -> None:
    """Print a section's table as it comes, and put everything into the results."""
    found, (title, columns) = results["sections"][name], TABLES[name]
    page.say(f"**{name}**: {title}{' (of a CPU: no figures of a GPU)' * results['smoke']}", "")
    page.say(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
    copied = [row["gb_s"] for row in results["sections"].get("copy", found)["rows"] if "gb_s" in row]
    for kind, content in lines:
        if kind == "row":
            for one in content.get("contenders", {}).values() if copied else ():
                one |= {"of_copy": one["gb_s"] / copied[0]} if "gb_s" in one else {}
            found["rows"].append(content)
            page.say(f"| {' | '.join(cell(content, place) for place in columns.values())} |")
        elif kind == "note" and content not in found["notes"]:
            found["notes"].append(content)
            print(f"{name}: {content}", file=sys.stderr, flush=True)
        elif kind in ("machine", "failed"):
            (results if kind == "machine" else found).setdefault(kind, content)
    failed = [f"{name} failed: {found['failed']}"] if "failed" in found else []
    page.say("", *(text for note in [*found["notes"], *failed] for text in (note, "")))


def write(file: Path, lines: list[str]) -> None:
    """Put the tables between a file's markers; a file without them is left alone, and said so."""
    before, begin, rest = file.read_text(encoding="utf-8").partition(MARKER)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{file}: no line {MARKER} with {END} after it; add both where the tables shall stand")
    text = "\n".join(lines)
    file.write_text(f"{before}{MARKER}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WEIGHTS), metavar="SECTION,...", help="of these: %(default)s")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default: 540)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the checkpoint to quantize (default: 8)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep rows, tables and JSON there, as they come")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, instead of Markdown")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the Markdown between FILE's markers as well")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, in seconds")
    args = parser.parse_args(argv)
    asked = args.only.split(",")
    if unknown := {*asked} - WEIGHTS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; known are {', '.join(WEIGHTS)}")
    args.only = [name for name in WEIGHTS if name in asked]
    if args.layers < 2:
        parser.error(f"--layers {args.layers}: the time per block is that between two; give 2 or more")
    return args


def main() -> None:
    """Run, print, write."""
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(work(Ask(**json.loads(sys.argv[2]))))
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # and what was started goes too
    with tempfile.TemporaryDirectory() as scratch:
        args.out = args.out or Path(scratch)
        args.out.mkdir(parents=True, exist_ok=True)
        page = Page(args.out / "gpu.md", sys.stderr if args.json else sys.stdout)
        results = run(args, page, scratch)
    if args.json:
        print(json.dumps(results, indent=2))
    if args.write:
        write(args.write, page.lines)
    sys.exit(any("failed" in found for found in results["sections"].values()))


if __name__ == "__main__":
    main()
