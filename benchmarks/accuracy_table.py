"""From what was measured to one JSON object, and from that to Markdown."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import paired

TEXTS = ("wikitext", "prose", "code")
TITLES = {"wikitext": "WikiText-2", "prose": "Prose", "code": "Code"}
END = "<!-- end -->"


def results(
    args: argparse.Namespace, about: dict[str, Any], measured: dict[str, dict[str, paired.Seen]],
    made: dict[str, Any], missing: dict[str, str], titles: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Every number of the table, and where it comes from."""
    reference = args.reference if args.reference in measured else None
    rows = {}
    for name, texts in measured.items():
        noted = {key: value for key, value in made[name].items() if key not in ("request", "command")}
        row: dict[str, Any] = {"title": titles[name], **noted}
        for text, seen in texts.items():
            row[text] = paired.summary(seen)
            if reference and name != reference:
                other = measured[reference][text]
                row[text]["against"] = {key: paired.difference(seen[key], other[key]) for key in ("kl", "nll")}
        rows[name] = row
    some = next(iter(measured.values()))
    return {
        "model": Path(args.model).name, "bits": args.bits, "group_size": args.group_size, "asym": args.asym,
        "reference": reference, "machine": machine(), "texts": about,
        "dense": {text: paired.summary({**seen, "nll": seen["dense"]})["perplexity"] for text, seen in some.items()},
        "contenders": rows, "left_out": {titles[name]: why for name, why in missing.items()},
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What it was measured on."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return {
        "processor": models[0] if models else platform.processor(), "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }  # fmt: skip


def scheme(results: dict[str, Any]) -> str:
    """What is stored, in words."""
    kind = "asymmetric" if results["asym"] else "symmetric"
    return f"{results['bits']} bits, groups of {results['group_size']}, {kind}"


def markdown(results: dict[str, Any]) -> str:
    """A table of what it took, and one for each text."""
    cores = results["machine"]["cores"]
    windows, length = results["texts"]["calibration"]["windows"]
    lines = [
        f"{results['model']}, {scheme(results)}, calibrated on {windows} windows of {length} tokens "
        f"(`{results['texts']['calibration']['sha256']}`); {results['machine']['processor']}, {cores} cores, "
        f"Python {results['machine']['python']}.", "",
        "| | seconds | peak GiB | MB on disk | versions |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in results["contenders"].values():
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
        lines.append(
            f"| {row['title']} | {row['seconds']:.0f} | {row['peak_rss_bytes'] / 2**30:.2f} | {row['bytes'] / 1e6:.1f} "
            f"| {versions} |"
        )
    for text in TEXTS:
        lines += ["", *_of_text(results, text)]
    for title, why in results["left_out"].items():
        lines += ["", f"Left out: {title}, {why}."]
    return "\n".join(lines) + "\n"


def _of_text(results: dict[str, Any], text: str) -> list[str]:
    about, reference = results["texts"][text], results["reference"]
    passed = f"; {about['passed_over']} of {about['of']} passed over" if about["passed_over"] else ""
    count, length = about["windows"]
    against = f" - that of {results['contenders'][reference]['title']}" if reference else " difference"
    lines = [
        f"**{TITLES[text]}**: {count} windows of {length} tokens (`{about['sha256']}`{passed})",
        "",
        f"| | perplexity | KL mean | median | p99 | same top token | KL{against} | NLL{against} |",
        "|---|---|---|---|---|---|---|---|",
        f"| original, bfloat16 | {results['dense'][text]:.2f} | 0 | 0 | 0 | 100% | | |",
    ]
    for row in results["contenders"].values():
        found = row[text]
        differences = [_interval(found["against"][key]) if "against" in found else "" for key in ("kl", "nll")]
        lines.append(
            f"| {row['title']} | {found['perplexity']:.2f} | {found['kl_mean']:.4f} | {found['kl_median']:.4f} "
            f"| {found['kl_p99']:.3f} | {found['top1']:.1%} | {' | '.join(differences)} |"
        )
    return lines


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def marker(results: dict[str, Any]) -> str:
    """The line of a page after which this table stands, up to the next END."""
    return f"<!-- benchmarks/accuracy.py: {scheme(results)} -->"


def write(page: Path, results: dict[str, Any]) -> None:
    """Put the table between its markers; a page without them is left alone, and said so."""
    content = page.read_text(encoding="utf-8")
    before, begin, rest = content.partition(marker(results))
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{page}: no line {marker(results)} with {END} after it; add both where the table shall stand")
    page.write_text(f"{before}{begin}\n\n{markdown(results)}\n{end}{after}", encoding="utf-8")
