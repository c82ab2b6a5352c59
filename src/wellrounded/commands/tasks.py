"""wellrounded eval MODEL --tasks NAME,...: lm-eval asks and counts, the model is the one that our loader gives."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UsageError
from .terminal import print_columns, print_json, stdout

BATCH = 8  # sequences; the harness sorts them by length


def run(args: argparse.Namespace) -> int:
    """The scores of the model, and with --against those of the original beside them."""
    for option in ("text", "length", "windows"):
        if getattr(args, option):
            raise UsageError(f"--{option} was asked for together with --tasks, which bring their own texts; choose one")
    harness = _harness()
    names = [name for name in args.tasks.split(",") if name]
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):  # whatever the harness and its data sets print
        manager = _manager(names)
        rows = _score(harness, manager, args.model, names, args)
        if args.against:
            originals = _score(harness, manager, args.against, names, args)
            rows = [row | {"original": other["value"]} for row, other in zip(rows, originals)]
    seconds = time.perf_counter() - started
    if args.json:
        print_json({"tasks": rows, "lm_eval": getattr(harness, "__version__", None), "seconds": seconds})
        return 0
    stdout.print(args.model, style="italic")
    header = ["task", "metric", "examples", "value", "+-", *(["original"] if args.against else [])]
    print_columns(header, [[_shown(row, key) for key in header] for row in rows], left=2)
    return 0


def _harness() -> ModuleType:
    try:
        import lm_eval
    except ImportError:
        raise UsageError("--tasks needs lm-eval, which is not installed here; pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is there already
    return lm_eval


def _manager(names: list[str]) -> Any:
    """What knows the tasks; a name may be a pattern, a group, or the path of a task's own .yaml file."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in names if not Path(name).is_file() and not manager.match_tasks([name])]
    if unknown or not names:
        raise UsageError(
            f"--tasks: {', '.join(unknown) or 'nothing'} is not among the tasks that lm-eval has here; "
            "`lm-eval ls tasks` lists them, and a task of your own is named by its .yaml file"
        )
    return manager


def _score(
    harness: ModuleType, manager: Any, model: str, names: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each metric of each task: task, metric, filter, value, stderr, examples, shots."""
    from lm_eval.models.huggingface import HFLM

    from ..hf.load import load_with_tokenizer

    loaded, tokenizer = load_with_tokenizer(model, trust_remote_code=args.trust_remote_code)
    if tokenizer is None:
        raise UsageError(f"{model}: it has no tokenizer, and tasks are made of text; put one into its directory")
    asked = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=BATCH)
    try:
        found = harness.simple_evaluate(asked, tasks=names, task_manager=manager, limit=args.limit, log_samples=False)
    except OSError as error:  # from the data sets: no network, no such file
        raise UsageError(f"--tasks {args.tasks}: their data cannot be read ({error})") from error
    return [row for task, metrics in found["results"].items() for row in _rows(task, metrics, found)]


def _rows(task: str, metrics: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):  # its name, its number of samples
            continue
        error = metrics.get(f"{metric}_stderr,{chosen}")
        rows.append({
            "task": task, "metric": metric, "filter": chosen, "value": value,
            "stderr": error if isinstance(error, float) else None,
            "examples": found.get("n-samples", {}).get(task, {}).get("effective"), "shots": found["n-shot"].get(task),
        })  # fmt: skip
    return rows


def _shown(row: dict[str, Any], column: str) -> str:
    if column == "metric" and row["filter"] != "none":
        return f"{row['metric']}, {row['filter']}"
    value = row["stderr" if column == "+-" else column]
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
