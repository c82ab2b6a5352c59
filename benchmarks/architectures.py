"""Every causal language model in the installed transformers, quantized, saved, loaded again: which of them work.

    python benchmarks/architectures.py                    # all of them, as a table
    python benchmarks/architectures.py llama mixtral      # some
    python benchmarks/architectures.py --markdown docs/architectures.md

Each is built tiny and random from its configuration (`tiny_configs.py`), saved as transformers saves it, and quantized
from there to 4 bits in groups of 32. A type is green if the walk through its blocks carries it, no weight stays dense
unsaid, the loaded checkpoint computes the very logits that quantizing ended with, transformers' own `from_pretrained`
loads the same tensors, and the result generates.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

import tiny_configs
import wellrounded as wr
from wellrounded.checkpoint import Writer
from wellrounded.errors import WellRoundedError
from wellrounded.hf import attention
from wellrounded.hf.source import open_source
from wellrounded.pipeline import Run
from wellrounded.report import Report
from wellrounded.request import Request

WINDOWS, LENGTH, NEW = 80, 32, 8
YES, NO = "yes", "no"
BEGIN, END = "<!-- benchmarks/architectures.py -->", "<!-- end -->"
ROUNDING = 2**-6  # of the largest logit: transformers computes some quantized models in another order than dense ones


@dataclass
class Row:
    """What one type did. A column is "" when it did not come to that."""

    type: str
    built: str = ""
    walked: str = ""
    coverage: float = 0.0  # of the parameters of linear layers and experts inside the blocks
    reload: str = ""
    transformers: str = ""
    generates: str = ""
    seconds: float = 0.0
    ignored: list[str] = field(default_factory=list)  # what stays dense only because --ignore says so
    reason: str = ""

    @property
    def green(self) -> bool:
        """Whether everything worked."""
        return not self.reason


class Kept(Run):
    """A run that keeps the last logits of what it has quantized."""

    logits: list[torch.Tensor]

    def _prove(self, dense, quantized, head):
        self.logits = [self.walk.logits(stream, batch) for stream in quantized for batch in range(len(stream.ids))]
        self.windows = [ids for stream in quantized for ids in stream.ids]
        return super()._prove(dense, quantized, head)


def check(kind: str) -> Row:
    """Build, save, quantize, load twice, generate."""
    row = Row(kind)
    try:
        model = tiny_configs.build(kind).to(torch.bfloat16)
    except ValueError as error:
        row.built, row.reason = NO, str(error)
        return row
    row.built = YES
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "dense"), Path(scratch, "out")
        model.save_pretrained(source)
        del model
        try:
            _through(row, source, out)
        except (WellRoundedError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            lines = str(error).strip().splitlines() or [""]
            row.reason = f"{type(error).__name__}: {lines[0]}"
    return row


def _through(row: Row, source: Path, out: Path) -> None:
    row.walked = NO
    run, report = _quantized(source, out, ())
    row.walked = YES
    dense = sum(fraction for fraction in report.overlooked_weights.values())
    quantized = sum(layer.parameters for layer in report.layers) / report.parameters
    row.coverage = quantized / max(quantized + dense, 1e-9)
    if unexplained := report.unexplained():
        row.ignored = [f"{role} ({why})" for role, _, why, _ in unexplained]
        run, report = _quantized(source, out, [pattern for *_, pattern in unexplained])
    if report.problems():
        row.reason = "; ".join(report.problems())
        return
    row.reload = NO
    loaded = wr.load(out, kernel="reference")
    attention.use(loaded)  # as while quantizing: the reference kernel leaves it to torch otherwise
    worst = 0.0
    with torch.no_grad():
        for ids, logits in zip(run.windows, run.logits):
            again = loaded(input_ids=ids, use_cache=False).logits
            worst = max(worst, ((again - logits).abs().max() / logits.abs().max()).item())
    if worst > ROUNDING:
        row.reason = f"the loaded model's logits differ by {worst:.1e}"
        return
    row.reload, row.transformers = (f"to {worst:.0e}" if worst else YES), NO
    ours = loaded.state_dict()
    theirs = type(loaded).from_pretrained(out, dtype="auto").state_dict()
    different = [n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n])]
    if different or len(ours) != len(theirs):
        row.reason = f"from_pretrained loads other tensors, first {(different or ['?'])[0]}"
        return
    row.transformers, row.generates = YES, NO
    made = loaded.generate(run.windows[0][:, :8], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    if made.shape[1] == 8 + NEW:
        row.generates = YES
    else:
        row.reason = f"generated {made.shape[1] - 8} tokens of {NEW}"


def _quantized(source: Path, out: Path, ignore: Sequence[str]) -> tuple[Kept, Report]:
    ids = torch.randint(3, 256, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    asked = Request(
        bits=4, group_size=32, calibration=ids, samples=64, length=LENGTH, min_tokens=0, ignore=ignore
    )  # fmt: skip
    run = asked.run(open_source(source))
    run = Kept(run.source, run.recipe, run.calibration, run.settings)
    writer = Writer(out, run.request(), force=True)
    try:
        return run, run.write(writer)
    finally:
        writer.abandon()


def table(rows: list[Row], markdown: bool = False) -> str:
    """One row per type, and the number at the end."""
    head = ["type", "built", "walked", "coverage", "reload exact", "from_pretrained", "generates", "reason"]
    lines = [head]
    for row in rows:
        cover = f"{row.coverage:.1%}" if row.walked == YES else ""
        note = row.reason or (f"with --ignore: {'; '.join(row.ignored)}" if row.ignored else "")
        lines.append([row.type, row.built, row.walked, cover, row.reload, row.transformers, row.generates, note])
    if markdown:
        lines.insert(1, ["---"] * len(head))
        text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    else:
        widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
        text = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[-1]]).rstrip() for line in lines]
    return "\n".join(text)


def number(rows: list[Row]) -> str:
    """How many of those that can be built are green."""
    built = [row for row in rows if row.built == YES]
    green = [row for row in built if row.green]
    alone = sum(not row.ignored for row in green)
    return (
        f"{len(green)} of {len(built)} types that can be built are green ({len(green) / max(len(built), 1):.1%}), "
        f"{alone} of them without a single flag"
    )


def main() -> None:
    """Check what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="replace the table in this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wr.register()
    rows = []
    for kind in args.types or tiny_configs.types():
        started = time.perf_counter()
        rows.append(check(kind))
        rows[-1].seconds = time.perf_counter() - started
        state = "green" if rows[-1].green else "red  "
        print(f"{state} {kind} ({rows[-1].seconds:.1f} s) {rows[-1].reason}", file=sys.stderr, flush=True)
    print(table(rows))
    print(number(rows))
    if args.markdown:
        text = args.markdown.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        made = f"transformers {transformers.__version__}: **{number(rows)}**.\n\n{table(rows, markdown=True)}\n"
        args.markdown.write_text(f"{before}{BEGIN}\n{made}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
