"""wellrounded bench [MODEL]: how fast it is here, next to dense bfloat16."""

from __future__ import annotations

import argparse
import time
from itertools import groupby
from typing import Any

from ..errors import UsageError
from .terminal import print_columns, print_json, print_table, progress, stdout

LAYERS_ONLY = ("shape", "rows", "warm")
MODEL_ONLY = ("prompt_length", "new_tokens", "no_dense", "trust_remote_code")
PARTS = {"packed": "packed layers", "linear": "other linear layers", "rest": "the rest"}


def run(args: argparse.Namespace) -> int:
    """Tokens per second of a model, or without one microseconds of typical layers."""
    without = LAYERS_ONLY if args.model else MODEL_ONLY
    for name in without:
        if getattr(args, name):
            where = "without MODEL" if args.model else "with MODEL"
            raise UsageError(f"--{name.replace('_', '-')} has a meaning only {where}; leave one of them out")
    result = _model(args) if args.model else _layers(args)
    if args.json:
        print_json(result)
    else:
        (_print_model if args.model else _print_layers)(result)
    return 0


def _layers(args: argparse.Namespace) -> dict[str, Any]:
    from ..benchmark.layers import ROWS, SHAPES, compare_layers

    started = time.perf_counter()
    with progress("measuring, number of rows") as bar:
        return compare_layers(
            args.shape or SHAPES,
            args.rows or ROWS,
            scheme=_scheme(args),
            cold=not args.warm,
            seconds=args.seconds,
            device=args.device,
            tell=lambda done, total: bar.step(done, total, time.perf_counter() - started),
        )


def _scheme(args: argparse.Namespace) -> Any:
    from ..core.scheme import Scheme

    given = {"bits": args.bits, "group_size": args.group_size}
    return Scheme(**{key: value for key, value in given.items() if value is not None}, symmetric=not args.asym)


def _model(args: argparse.Namespace) -> dict[str, Any]:
    from ..benchmark.models import compare_models
    from ..hf.quiet import quiet

    if args.asym and args.bits is None:
        raise UsageError("--asym was asked for without --bits; say --bits 4 to pack the model while it is loaded")
    _scheme(args)  # a wrong value is said at once
    quiet()
    return compare_models(
        args.model,
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asym,
        prompt_length=args.prompt_length or 512,
        new_tokens=args.new_tokens or 64,
        dense=not args.no_dense,
        seconds=args.seconds,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )


def _machine(result: dict[str, Any]) -> list[tuple[str, str]]:
    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    return [("machine", f"{result['device']} ({result['processor']}){threads}, torch {result['torch']}")]


def _print_layers(result: dict[str, Any]) -> None:
    weights = "cold: each call takes another copy, from memory" if result["cold"] else "warm: in the caches if they fit"
    print_table(
        [
            *_machine(result),
            ("reading", f"{result['read_gb_s']:.1f} GB/s, measured"),
            ("weights", f"{weights}; {result['scheme']}, dense in {result['dtype']}"),
        ]
    )
    header = ["rows", "kernel", "µs", "speed-up", "MB", "GB/s", "of reading"]
    for (outputs, inputs), lines in groupby(result["layers"], lambda line: (line["out"], line["in"])):
        stdout.print()
        stdout.print(f"{outputs}x{inputs}", style="italic")
        print_columns(header, [_cells(line) for line in lines], left=2)
    if any(line["restores"] for line in result["layers"]):
        stdout.print("\n* restores the dense weight at each call; MB are those of the packed one")
    for line in result["refused"]:
        stdout.print(f"\nnot {line['kernel']} for {line['out']}x{line['in']}: {line['refuses']}")


def _cells(line: dict[str, Any]) -> list[str]:
    return [
        str(line["rows"]),
        line["kernel"] + ("*" if line["restores"] else ""),
        f"{line['microseconds']:,.0f}" if line["microseconds"] >= 100 else f"{line['microseconds']:.1f}",
        f"{line['speedup']:.2f}x",
        f"{line['bytes'] / 1e6:.3g}",
        f"{line['gb_s']:.1f}",
        f"{line['bandwidth_share']:.0%}",
    ]


def _print_model(result: dict[str, Any]) -> None:
    found = {kind: result[kind] for kind in ("quantized", "dense") if result[kind]}
    both = len(found) == 2
    kernels = found.get("quantized", {}).get("kernels", {})
    print_table(
        [
            *_machine(result),
            ("run", f"1 row, {result['prompt_length']:,} tokens of prompt, {result['new_tokens']:,} decoded greedily"),
            *([("kernels", ", ".join(f"{n} x {kernel}" for kernel, n in kernels.items()))] if kernels else []),
        ],
        result["model"],
    )
    stdout.print()
    rows = []
    for phase in ("prefill", "decode"):
        speedup = [f"{result[f'{phase}_speedup']:.2f}x"] if both else []
        rows.append([f"{phase}, tokens/s", *(f"{x[f'{phase}_tokens_s']:,.1f}" for x in found.values()), *speedup])
    for phase in ("prefill", "decode"):
        for part, label in PARTS.items():
            shares = [x[f"{phase}_share"][part] for x in found.values()]
            if any(shares):
                rows.append([f"{phase}, {label}", *(f"{share:.0%}" for share in shares), *([""] if both else [])])
    names = [f"{kind} {x['dtype']}" for kind, x in found.items()]
    print_columns(["", *names, *(["speed-up"] if both else [])], rows)
