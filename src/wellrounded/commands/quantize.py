"""wellrounded quantize MODEL -o OUT"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .terminal import print_json, print_table, progress, stderr, stdout

if TYPE_CHECKING:
    from ..report import Report


def run(args: argparse.Namespace) -> int:
    """Quantize, print the table (or the JSON), and say how to use the result; 3 if it failed its own check."""
    from ..api import forecast, quantize
    from ..hf.quiet import quiet
    from ..torchrun import speaks

    quiet()
    options = {
        **({} if args.bits is None else {"bits": args.bits}),
        "group_size": args.group_size,
        "sym": args.sym,
        "act_order": args.act_order,
        "calibration": calibration_of(args.calibration),
        "samples": args.samples,
        "length": args.length,
        "seed": args.seed,
        "ignore": args.ignore,
        "only": args.only,
        "lm_head": args.lm_head,
        "preset": args.preset,
        "device": args.device,
        "max_memory": args.max_memory,
    }
    if args.dry_run and not speaks():
        return 0
    if args.dry_run:
        if args.bpw is not None or args.size is not None:
            raise UsageError(
                "--dry-run cannot foretell a mixture that is yet to be found; it can for --bits 4, which needs as much "
                "memory, and about a third of the time"
            )
        found = forecast(args.model, trust_remote_code=args.trust_remote_code, **options)
        if args.json:
            print_json(found.to_dict())
        else:
            print_table(found.summary(), f"{args.model} would take, predicted:")
        return 0
    if args.out is None:
        raise UsageError("no directory for the result: -o OUT, or --dry-run to see what it would take")
    with progress("quantizing, block", shown=speaks()) as bar:
        report = quantize(
            args.model,
            args.out,
            force=args.force,
            fresh=args.fresh,
            bpw=args.bpw,
            size=args.size,
            measurement=args.measurement,
            trust_remote_code=args.trust_remote_code,
            progress=bar.tell,
            **options,
        )
    if not speaks():
        return 0
    return show(report, args.json, args.model)


def show(report: Report, as_json: bool, original: str | None) -> int:
    """The table (or the JSON), how to use the result, and everything that is wrong with it; the exit code."""
    if as_json:
        print_json(report.to_dict())
    else:
        used = report.calibration["description"].splitlines() if report.calibration else ["none: plain rounding"]
        rows = [*report.summary(), *(("calibration", line) for line in used)]
        print_table(rows, f"{report.source} -> {report.out}")
        out = shlex.quote(report.out)
        stdout.print(
            f"\nrun it:   wellrounded chat {out}" if report.generates else f"\nload it:  wellrounded.load({out!r})"
        )
        if report.generates and not report.notes:
            stdout.print(f"serve it: vllm serve {out}")
        if original:
            stdout.print(f"check it: wellrounded eval {out} --against {shlex.quote(original)}")
    for note in report.notes:
        stderr.print(f"note: {note}")
    for problem in report.problems():
        stderr.print(f"check failed: {problem}", style="bold red")
    return 3 if report.problems() else 0


def calibration_of(specs: list[str] | None) -> Any:
    """What --calibration means."""
    from ..calibration import parse
    from ..request import NONE

    if specs is None:
        return None
    if NONE in specs:
        if len(specs) > 1:
            others = ", ".join(spec for spec in specs if spec != NONE)
            raise UsageError(f"--calibration none was asked for together with {others}; choose one")
        return NONE
    return [parse(spec) for spec in specs]
