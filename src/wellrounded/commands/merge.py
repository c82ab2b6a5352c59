"""wellrounded merge ADAPTER -o OUT"""

from __future__ import annotations

import argparse

from ..errors import UsageError
from .quantize import calibration_of, show
from .terminal import print_json, progress, stdout


def run(args: argparse.Namespace) -> int:
    """Merge onto dequantized weights, then quantize again or, with --dense, save the sum; says which it did."""
    from ..api import merge
    from ..hf.quiet import quiet

    quiet()
    where = {"base": args.base, "force": args.force, "trust_remote_code": args.trust_remote_code}
    if args.dense:
        if args.calibration or args.bits:
            raise UsageError("--dense was asked for together with --bits or --calibration; a dense model needs neither")
        merge(args.adapter, args.out, dense=True, **where)
        if args.json:
            print_json({"out": args.out, "dense": True})
        else:
            stdout.print(f"{args.adapter}: merged into the dequantized base; {args.out} is a dense model")
        return 0
    scheme = {"bits": args.bits} if args.bits else {}
    with progress("quantizing, block") as bar:
        report = merge(
            args.adapter,
            args.out,
            calibration=calibration_of(args.calibration),
            samples=args.samples,
            length=args.length,
            seed=args.seed,
            progress=bar.tell,
            **where,
            **scheme,
        )
    if not args.json:
        stdout.print(f"{args.adapter}: merged into the dequantized base, and quantized again")
    return show(report, args.json, None)
