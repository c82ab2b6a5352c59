"""The command line: one verb per module of `commands`, imported only when it is used."""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import nullcontext, redirect_stderr
from importlib import import_module
from typing import Any

from . import __version__
from .errors import UsageError, WellRoundedError

EPILOG = """exit codes: 0 good, 1 failed, 2 wrong usage, 3 finished but the result failed its own check
with --json, standard output holds one JSON object and nothing else; progress goes to standard error"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; every error the package raises ends as one sentence."""
    first = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    with nullcontext() if first else redirect_stderr(io.StringIO()):  # one of many that are all asked for the same
        args = parser().parse_args(argv)
    try:
        code = import_module(f".commands.{args.command}", __package__).run(args)
        sys.stdout.flush()  # a reader that has gone shows here, not when Python ends
        return code
    except WellRoundedError as error:
        if error.speaks and (first or not isinstance(error, UsageError)):
            print(f"wellrounded {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if first:
            print(f"\nwellrounded {args.command}: stopped{args.when_stopped}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    """Every option of every command."""
    top = argparse.ArgumentParser(
        "wellrounded",
        description="Turn a language model into a few-bit GPTQ checkpoint, prove it, run it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"wellrounded {__version__}")
    verbs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _quantize(verbs)
    _merge(verbs)
    _eval(verbs)
    _chat(verbs)
    _inspect(verbs)
    _bench(verbs)
    doctor = _verb(verbs, "doctor", "say what is installed and which kernels run here")
    doctor.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return top


def _verb(verbs: Any, name: str, does: str, when_stopped: str = "") -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(when_stopped=when_stopped)
    return verb


def _model(verb: argparse.ArgumentParser, optional: str = "") -> None:
    """`optional` says what happens without a model."""
    help_ = f"a hub id, a directory, or a .gguf file{optional}"
    verb.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=help_)
    verb.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given; give 1 or more")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} was given; give 0 or more")
    return value


def _shape(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} was given; give OUTPUTSxINPUTS, such as 4096x4096")
    return int(sides[0]), int(sides[1])


def _quantize(verbs: Any) -> None:
    verb = _verb(
        verbs,
        "quantize",
        "quantize a model to 2, 3, 4 or 8 bits",
        "; finished blocks are kept, and the same command goes on where it stopped",
    )
    _model(verb)
    verb.add_argument("-o", "--out", metavar="OUT", help="directory for the result")
    scheme = verb.add_argument_group("what is stored")
    scheme.add_argument("--bits", type=int, help="2, 3, 4 or 8 (default: 4)")
    scheme.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale, -1 for all of an output "
        "(default: the largest of 128, 64, 32 that divides every layer)",
    )
    budget = scheme.add_mutually_exclusive_group()
    budget.add_argument(
        "--bpw", type=float, metavar="BITS", help="instead: layer by layer what is best at so many bits per weight"
    )
    budget.add_argument("--size", metavar="SIZE", help="instead: the same, for files of so many bytes, such as 4.2GB")
    scheme.add_argument(
        "--measurement",
        metavar="FILE",
        help="what --bpw and --size know of the layers, measured if FILE is not there (default: OUT.measurement.json)",
    )
    symmetry = scheme.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", dest="sym", action="store_true", default=True, help="no zero points (default)")
    symmetry.add_argument("--asym", dest="sym", action="store_false", help="integer zero points; fewer engines load it")
    scheme.add_argument("--act-order", action="store_true", help="store an activation order (desc_act); few load it")
    scheme.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep weights dense in whose name this regular expression is found (repeatable)",
    )
    scheme.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep weights dense in whose name no such regular expression is found (repeatable)",
    )
    scheme.add_argument("--lm-head", action="store_true", help="quantize the output head too")
    _calibration(verb)
    run = verb.add_argument_group("the run")
    run.add_argument("--preset", default="default", help="fast, default or best: how much is done for accuracy")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    run.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="use no more than this, such as 4GiB (of the GPU's memory, where one computes; default: what is free)",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="only say what it would take: memory, disk, size, time; -o is optional"
    )
    run.add_argument("--force", action="store_true", help="replace OUT if it exists")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an unfinished run (what happens anyway)")
    again.add_argument("--fresh", action="store_true", help="start over instead of going on with an unfinished run")
    run.add_argument("--json", action="store_true", help="print the report as one JSON object on standard output")


def _calibration(verb: argparse.ArgumentParser) -> None:
    data = verb.add_argument_group("calibration")
    data.add_argument(
        "--calibration",
        action="append",
        metavar="SPEC",
        help="wikitext2, c4, ultrachat, pile, builtin, a hub data set, a .txt, .jsonl or .parquet file, "
        "NAME:split:num, or none for plain rounding (repeatable; default: builtin)",
    )
    data.add_argument("--samples", type=int, default=128, metavar="N", help="windows (default: 128)")
    data.add_argument("--length", type=int, metavar="N", help="tokens per window (default: 512, or what can be read)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="order of mixed sources (default: 0)")


def _merge(verbs: Any) -> None:
    verb = _verb(verbs, "merge", "merge a PEFT adapter into its base, and quantize the sum")
    verb.add_argument("adapter", metavar="ADAPTER", help="a directory that PEFT wrote, or a hub id")
    verb.add_argument("-o", "--out", required=True, metavar="OUT", help="directory for the result")
    verb.add_argument("--base", metavar="MODEL", help="the model it was trained on (default: what the adapter says)")
    verb.add_argument("--dense", action="store_true", help="write a dense model instead of a quantized one")
    verb.add_argument("--bits", type=int, help="2, 3, 4 or 8 for every layer (default: what each layer had)")
    _calibration(verb)
    verb.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    verb.add_argument("--force", action="store_true", help="replace OUT if it exists")
    verb.add_argument("--json", action="store_true", help="print the report as one JSON object on standard output")


def _eval(verbs: Any) -> None:
    verb = _verb(verbs, "eval", "measure perplexity, and the distance to the original")
    _model(verb)
    verb.add_argument("--against", metavar="ORIGINAL", help="the original: adds KL, top-1 agreement, its perplexity")
    verb.add_argument("--text", action="append", metavar="FILE", help="text to evaluate on (repeatable)")
    verb.add_argument("--length", type=int, metavar="N", help="tokens per window (default: 1024, or what can be read)")
    verb.add_argument(
        "--windows", type=_positive, metavar="N", help="use the first N windows (default: all, 16 of builtin)"
    )
    verb.add_argument("--tasks", metavar="NAME,...", help="instead: tasks of lm-eval, such as arc_easy,hellaswag")
    verb.add_argument("--limit", type=_positive, metavar="N", help="with --tasks: the first N examples of each")
    verb.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _chat(verbs: Any) -> None:
    verb = _verb(verbs, "chat", "talk to a model, or let it continue a prompt")
    _model(verb)
    verb.add_argument("--prompt", metavar="TEXT", help="answer this and exit, instead of asking")
    verb.add_argument("--system", metavar="TEXT", help="system message")
    verb.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    verb.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="(default: 256)")
    verb.add_argument(
        "--temperature",
        type=_not_negative,
        default=0.0,
        metavar="T",
        help="0 always takes the likeliest token (default)",
    )
    verb.add_argument("--kernel", metavar="NAME", help="use this kernel or fail (see doctor)")
    verb.add_argument("--compile", action="store_true", help="compile first, for half a minute, and answer faster")


def _inspect(verbs: Any) -> None:
    verb = _verb(verbs, "inspect", "show what a quantized directory holds, and check it")
    verb.add_argument("model", metavar="DIRECTORY", help="a quantized directory")
    verb.add_argument("--layers", action="store_true", help="a line per layer")
    verb.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _bench(verbs: Any) -> None:
    verb = _verb(verbs, "bench", "measure the speed of a model, or of single layers, next to dense bfloat16")
    _model(verb, optional="; without it, single layers are measured")
    verb.add_argument("--bits", type=int, help="of the layers (default: 4); with MODEL, pack a dense one while loading")
    verb.add_argument("--group-size", type=int, metavar="N", help="of the layers (default: 128), or with --bits")
    verb.add_argument("--asym", action="store_true", help="layers with zero points")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    verb.add_argument(
        "--seconds", type=_not_negative, default=0.5, metavar="S", help="per measurement, or longer (default: 0.5)"
    )
    layers = verb.add_argument_group("single layers")
    layers.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="OUTxIN",
        help="repeatable (default: 4096x4096, 11008x4096, 4096x11008)",
    )
    layers.add_argument(
        "--rows", action="append", type=_positive, metavar="N", help="repeatable (default: 1, 2, 4, 8, 32, 512)"
    )
    layers.add_argument(
        "--warm", action="store_true", help="use the same weights again and again (default: cold, from memory)"
    )
    model = verb.add_argument_group("a whole model")
    model.add_argument("--prompt-length", type=_positive, metavar="N", help="tokens (default: 512)")
    model.add_argument("--new-tokens", type=_positive, metavar="N", help="tokens to decode (default: 64)")
    model.add_argument("--no-dense", action="store_true", help="leave out the dense model beside it")
    verb.add_argument("--json", action="store_true", help="one JSON object on standard output")
