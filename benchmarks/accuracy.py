"""wellrounded beside other tools: same model, same bits, same calibration tokens, one neutral reader for every result.

    python benchmarks/accuracy.py MODEL --work DIR --calibration FILE --wikitext FILE [--bits 4] [--group-size 64]
        [--gptqmodel VENV] [--autoround VENV] [--llmcompressor VENV] [--only NAME,...] [--json] [--write FILE]
    python benchmarks/accuracy.py --smoke

MODEL is a directory, or a .gguf file. Each contender runs as a process of its own, in its own environment, on the same
128 windows of 512 tokens; what it saved is read back by `neutral.py` and compared with the original on three texts
(`held_out.py`, `paired.py`). DIR keeps checkpoints, their time and memory, and what was measured: what is there is not
made again, so that a table can be made in pieces. docs/accuracy.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import accuracy_table as table
import held_out
import paired
from contenders import CONTENDERS, FURTHER, PEERS, command_of

HERE = Path(__file__).parent


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


# ---- before ----


def original_of(model: str, work: Path) -> Path:
    """The model as a directory of safetensors; a .gguf file is written out as one, once."""
    if not model.endswith(".gguf"):
        return Path(model).resolve()
    if not (work / "original" / "config.json").exists():
        from wellrounded.hf.load import load_with_tokenizer

        loaded, tokenizer = load_with_tokenizer(model)
        for one in (tokenizer, loaded.bfloat16()):
            one.save_pretrained(work / "original")
    return work / "original"


def texts_of(args: argparse.Namespace) -> dict[str, str]:
    """The three texts by name."""
    given = {
        name: Path(path).read_text(encoding="utf-8") if (path := getattr(args, name)) else None for name in table.TEXTS
    }
    prose = given["prose"] if given["prose"] is not None else held_out.prose(args.work / "texts")
    code = given["code"] if given["code"] is not None else held_out.code()
    return {"wikitext": given["wikitext"] or "", "prose": prose, "code": code}


def prepare(args: argparse.Namespace, original: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Write the calibration windows; say what the texts are, and cut them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(original)
    ids = held_out.tokens(tokenizer, Path(args.calibration).read_text(encoding="utf-8"))
    begin = held_out.beginning(tokenizer)
    given = held_out.calibration(ids, args.length, args.samples, begin)
    windows = given.calibration
    np.save(args.work / "windows.npy", windows)
    for name, most in (("windows", 0), ("further", FURTHER)):  # which wellrounded cuts into the very same windows again
        row = {"input_ids": held_out.with_further(given, most).tolist()}
        (args.work / f"{name}.jsonl").write_text(json.dumps(row))
    about: dict[str, Any] = {"calibration": {"sha256": held_out.digest(windows), "windows": list(windows.shape)}}
    cut = {}
    for name, text in texts_of(args).items():
        ids = held_out.tokens(tokenizer, text)
        cut[name], passed = held_out.disjoint(ids, args.eval_length, args.windows, windows, name, begin)
        about[name] = {
            "sha256": held_out.digest(text), "tokens": len(ids), "windows": list(cut[name].shape),
            "passed_over": passed, "of": len(ids) // args.eval_length,
        }  # fmt: skip
        say(f"{name}: {json.dumps(about[name])}")
    return about, cut


# ---- quantizing ----


def make(name: str, args: argparse.Namespace, original: Path, about: dict[str, Any]) -> str | None:
    """Let a contender quantize, unless it has; why there is no result, or None."""
    contender, folder = CONTENDERS[name], args.work / name
    request = {"model": str(original), "bits": args.bits, "group_size": args.group_size, "asym": args.asym}
    request |= {"calibration": about["calibration"], "options": list(contender.options)}
    request |= {"iterations": args.iterations} if contender.peer == "autoround" else {}
    if (folder / "made.json").exists():
        made = json.loads((folder / "made.json").read_text())
        if made["request"] != request:
            sys.exit(f"{folder} was made for {made['request']}, not {request}; name another --work, or remove it")
        return None
    if contender.peer and not getattr(args, contender.peer):
        return f"no environment was given (--{contender.peer} VENV)"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    say(f"{name}: quantizing")
    command = command_of(name, args, original, folder / "checkpoint")
    with (folder / "output.txt").open("w") as output, (folder / "log.txt").open("w") as log:
        timed = [sys.executable, str(HERE / "peers" / "timed.py"), str(folder / "note.json"), *command]
        done = subprocess.run(timed, stdout=output, stderr=log, stdin=subprocess.DEVNULL, cwd=args.work, env=quiet())
    said = (folder / "output.txt").read_text()
    if done.returncode not in (0, 3):  # 3: wellrounded's own check of its result failed, which is a result
        lines = [line.strip() for line in ((folder / "log.txt").read_text() or said).splitlines() if line.strip()]
        say(f"{name}: all that it said is in {folder / 'log.txt'}")
        return f"failed: {lines[-1][:200] if lines else done.returncode}"
    found = json.loads(said if contender.runner is None else said.splitlines()[-1])
    if contender.runner is None:
        check_windows(found, args)
        found = {"versions": {"wellrounded": found.get("version")}}
    note = json.loads((folder / "note.json").read_text())
    size = sum(path.stat().st_size for path in (folder / "checkpoint").glob("*.safetensors"))
    made = {"request": request, "command": command, **note, **found, "bytes": size}
    (folder / "made.json").write_text(json.dumps(made, indent=2))
    say(f"{name}: {note['seconds']:.0f} s, {note['peak_rss_bytes'] / 2**30:.2f} GiB")
    return None


def quiet() -> dict[str, str]:
    """The environment of every contender: nothing is asked of a network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def check_windows(report: dict[str, Any], args: argparse.Namespace) -> None:
    """wellrounded must have calibrated on the windows that everybody got."""
    import torch

    from wellrounded.calibration import Windows
    from wellrounded.calibration.mixture import Calibration

    if not report.get("calibration"):
        return
    windows = Windows(torch.from_numpy(np.load(args.work / "windows.npy")))
    if report["calibration"]["sha256"] != Calibration(windows, windows, ()).digest:
        sys.exit(
            "wellrounded calibrated on other windows than the ones written for everybody; see held_out.calibration"
        )


# ---- measuring ----


def look(names: list[str], args: argparse.Namespace, original: Path, cut: dict[str, np.ndarray]) -> None:
    """Measure every finished checkpoint that has not been measured on these windows; all that is left goes together."""
    left = {text: [n for n in names if not place(n, text, args, cut).exists()] for text in cut}
    wanted = sorted({name for names in left.values() for name in names}, key=names.index)
    models = {name: paired.dense_model(args.work / name / "checkpoint", original) for name in wanted}
    dense = paired.dense_model(original, original) if wanted else None
    for text, some in left.items():
        if some:
            say(f"{text}: measuring {', '.join(some)}")
            found = paired.measure(dense, {name: models[name] for name in some}, cut[text], tell=passed)
            for name in some:
                np.savez(place(name, text, args, cut), **found[name], dense=found["dense"]["nll"])


def passed(done: int, total: int) -> None:
    """A line every eight windows."""
    if done % 8 == 0 or done == total:
        say(f"  {done} of {total} windows")


def place(name: str, text: str, args: argparse.Namespace, cut: dict[str, np.ndarray]) -> Path:
    """Where what was measured on these windows is kept."""
    return args.work / name / f"{text}-{held_out.digest(cut[text])}.npz"


def seen(name: str, args: argparse.Namespace, cut: dict[str, np.ndarray]) -> dict[str, paired.Seen]:
    """What was measured, by text."""
    return {text: dict(np.load(place(name, text, args, cut))) for text in cut}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for; what the table and the JSON are made of."""
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    original = original_of(args.model, args.work)
    about, cut = prepare(args, original)
    missing = {name: why for name in args.only if (why := make(name, args, original, about))}
    for name, why in missing.items():
        say(f"{name}: left out, {why}")
    there = [name for name in args.only if name not in missing]
    if not there:
        sys.exit("no contender has a result")
    look(there, args, original, cut)
    measured = {name: seen(name, args, cut) for name in there}
    made = {name: json.loads((args.work / name / "made.json").read_text()) for name in there}
    return table.results(args, about, measured, made, missing, {name: CONTENDERS[name].title for name in CONTENDERS})


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--work", type=Path, help="checkpoints and measurements are kept here")
    parser.add_argument("--calibration", metavar="FILE", help="text to calibrate on")
    for name in table.TEXTS:
        parser.add_argument(f"--{name}", metavar="FILE", help="text to measure on")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="VENV", help="environment that has it; without, it is left out")
    parser.add_argument("--only", default=",".join(CONTENDERS), help=f"of {','.join(CONTENDERS)}")
    parser.add_argument("--reference", default="default", help="the row that others are compared with")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound; its default is 200")
    parser.add_argument("--windows", type=int, default=64, help="windows of each text to measure on")
    parser.add_argument("--eval-length", type=int, default=1024, help="tokens in each of them")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, instead of Markdown")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the Markdown between FILE's markers as well")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, plain rounding and ours, in seconds")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - CONTENDERS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; known are {', '.join(CONTENDERS)}")
    if not args.smoke and not (args.model and args.work and args.calibration and args.wikitext):
        parser.error("MODEL, --work, --calibration and --wikitext are needed, or --smoke")
    return args


def smoke(args: argparse.Namespace, scratch: Path) -> None:
    """The smallest request that still goes through all of this, without a network."""
    from smoke import tiny_model

    args.model, args.work, args.only = str(tiny_model(scratch / "model")), scratch / "work", ["plain", "default"]
    code = held_out.code()
    pieces = {
        "calibration": code[-20_000:],
        "wikitext": code[:9_000],
        "prose": code[9_000:18_000],
        "code": code[18_000:27_000],
    }
    for name, text in pieces.items():
        (scratch / name).write_text(text)
        setattr(args, name, str(scratch / name))
    args.group_size, args.samples, args.length, args.windows, args.eval_length = 32, 40, 64, 2, 64


def main() -> None:
    """Run, print, write."""
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            smoke(args, Path(scratch))
        results = run(args)
    print(json.dumps(results, indent=2) if args.json else table.markdown(results), flush=True)
    if any(why.startswith("failed") for why in results["left_out"].values()):
        sys.exit(f"not written into {args.write}: see what failed" if args.write else 1)
    if args.write:
        table.write(args.write, results)


if __name__ == "__main__":
    main()
