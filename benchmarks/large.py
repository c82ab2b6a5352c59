"""A model larger than memory, quantized under a hard limit: what it takes, beside what `--dry-run` says it will take.

    python benchmarks/large.py write llama DIR --gb 8       # or moe, with experts; or tiny-llama, tiny-moe
    python benchmarks/large.py run DIR OUT --limit 3GB --trace trace.csv -- --samples 32 --group-size 128

`write` makes a checkpoint in bfloat16, one shard per block and one for what lies outside, with never more than a shard
in memory. `run` quantizes it in a process that cannot get more memory than the limit; what follows -- goes to
`wellrounded quantize`. The limit holds by a memory cgroup where one can be made (Linux, usually as root). It counts
the page cache too, so its peak comes near the limit whenever files are larger than it; the kernel drops such pages
when memory is short, and they stop nobody. What another process has mapped first, torch's libraries say, is charged to
that one: the resident set may exceed the limit by as much. Elsewhere the limit is RLIMIT_DATA, on what a process
allocates, not on the files that it maps. The dry run is told the same limit with `--max-memory`. `--trace` writes a
CSV, five lines per second: where memory was, and how many parts were finished.

Exit code: that of the quantization, 1 if it was killed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from random_llama import layers

SHAPES: dict[str, dict[str, Any]] = {  # Llama-2-7B's, and Qwen3-30B-A3B's with half of its experts
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "moe": {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
    },
    "tiny-llama": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 256,
    },
    "tiny-moe": {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    },
}  # fmt: skip
POOL = 2**26 - 5  # random numbers; a prime, so that no two rows of a matrix are the same
UNITS = {"": 1, "B": 1} | {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}  # as --max-memory has them
UNITS |= {f"{letter}{end}": 1024**n for n, letter in enumerate("KMGT", 1) for end in ("", "IB")}
EVERY = 0.2  # seconds
COMPARED = {"peak_memory_bytes": "peak resident", "output_bytes": "output", "disk_bytes": "disk", "seconds": "time"}


def inside(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a block by their names in it, as files have them: (outputs, inputs), or a norm's size."""
    hidden, head = shape["hidden_size"], shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    tensors: dict[str, tuple[int, ...]] = dict.fromkeys(["input_layernorm", "post_attention_layernorm"], (hidden,))
    if "num_experts" not in shape:
        return tensors | layers(hidden, shape["intermediate_size"], head * shape["num_key_value_heads"])
    q, kv = head * shape["num_attention_heads"], head * shape["num_key_value_heads"]
    tensors |= {
        "self_attn.q_proj": (q, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate": (shape["num_experts"], hidden),
    }
    tensors |= dict.fromkeys(["self_attn.k_proj", "self_attn.v_proj"], (kv, hidden))
    tensors |= dict.fromkeys(["self_attn.q_norm", "self_attn.k_norm"], (head,))
    inner = shape["moe_intermediate_size"]
    for expert in range(shape["num_experts"]):
        name = f"mlp.experts.{expert}"
        tensors |= {f"{name}.gate_proj": (inner, hidden), f"{name}.up_proj": (inner, hidden)}
        tensors[f"{name}.down_proj"] = (hidden, inner)
    return tensors


def outside(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors outside the blocks."""
    table = (shape["vocab_size"], shape["hidden_size"])
    return {"model.embed_tokens": table, "model.norm": table[1:], "lm_head": table}


def write(kind: str, directory: Path, gb: float) -> None:
    """A random checkpoint of about this size, shard by shard; tiny ones have two blocks."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, Qwen3MoeConfig

    from smoke import byte_tokenizer

    if directory.exists() and any(directory.iterdir()):
        raise SystemExit(f"{directory} exists and is not empty; name another directory")
    shape, many = SHAPES[kind], lambda tensors: 2 * sum(map(math.prod, tensors.values()))
    blocks = max(2, round((gb * 1e9 - many(outside(shape))) / many(inside(shape)))) if "tiny" not in kind else 2
    make = Qwen3MoeConfig if "num_experts" in shape else LlamaConfig
    name = "Qwen3MoeForCausalLM" if "num_experts" in shape else "LlamaForCausalLM"
    fixed = {"architectures": [name], "dtype": "bfloat16", "tie_word_embeddings": False}
    directory.mkdir(parents=True, exist_ok=True)
    make(num_hidden_layers=blocks, max_position_embeddings=4096, **shape, **fixed).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    draw, weight_map, total = numbers(), {}, 0
    for block in range(blocks + 1):
        start = f"model.layers.{block}."
        shapes = {f"{start}{name}": s for name, s in inside(shape).items()} if block < blocks else outside(shape)
        file = f"model-{block + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file({f"{name}.weight": draw(s) for name, s in shapes.items()}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys((f"{name}.weight" for name in shapes), file)
        total += many(shapes)
        if sys.stderr.isatty():
            print(f"\r{file}: {size(total)}", end="", file=sys.stderr, flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"\r{directory}: {blocks} blocks, {size(total)} in bfloat16 {' ' * 20}", file=sys.stderr)


def numbers() -> Callable[[tuple[int, ...]], Any]:
    """Draws tensors: ones for a norm, else normal numbers of 0.02, cut out of one supply at a random place and scaled.

    To draw each number anew would take about as long as to write them.
    """
    import torch

    torch.manual_seed(0)
    pool = torch.randn(POOL).mul_(0.02).bfloat16()

    def draw(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        count, at = math.prod(shape), int(torch.randint(POOL, ()))
        pieces, left = [pool[at : at + count]], count - (POOL - at)
        while left > 0:
            pieces.append(pool[:left])
            left -= POOL
        return torch.cat(pieces).mul_(torch.rand(()) + 0.5).view(shape)

    return draw


class Group:
    """A memory cgroup with a limit, of either version, which lasts as long as its `with` block.

    Raises OSError where none can be made.
    """

    FILES = (  # limit, limit with swap, what is used, the most that was, where kills are counted
        ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes",
         "memory.oom_control"],
        ["memory.max", "memory.swap.max", "memory.current", "memory.peak", "memory.events"],
    )  # fmt: skip

    def __init__(self, limit: int) -> None:
        root = Path("/sys/fs/cgroup")
        self.version = 2 if (root / "cgroup.controllers").exists() else 1
        self.limit, self.swap, self.used, self.most, self.events = self.FILES[self.version - 1]
        if self.version == 1:
            root /= "memory"
        elif "memory" not in (root / "cgroup.subtree_control").read_text():
            (root / "cgroup.subtree_control").write_text("+memory")
        self.place = root / f"wellrounded-{os.getpid()}"
        self.place.mkdir()
        try:
            (self.place / self.limit).write_text(str(limit))
            if (self.place / self.swap).exists():  # swap is not memory, and would make the limit a slow one
                (self.place / self.swap).write_text(str(limit if self.version == 1 else 0))
        except OSError:
            self.place.rmdir()
            raise

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(50):  # a process that was killed leaves its group a little later
            try:
                return self.place.rmdir()
            except OSError:
                time.sleep(0.1)
        print(f"{self.place} could not be removed", file=sys.stderr)

    def enter(self) -> None:
        """Put this process in."""
        (self.place / "cgroup.procs").write_text(str(os.getpid()))

    def read(self, file: str, key: str = "") -> int:
        """A number in one of its files, 0 if that is not there: `memory.peak` is younger than the rest."""
        path = self.place / file
        found = re.search(rf"^{key} ?(\d+)$", path.read_text(), re.MULTILINE) if path.exists() else None
        return int(found[1]) if found else 0


def bytes_of(size: str) -> int:
    """3GB, 2.5GiB or 3000000000, in bytes."""
    found = re.fullmatch(r"(\d+|\d*\.\d+) ?([KMGT]?(?:I?B)?)", size.strip(), re.IGNORECASE)
    if not found or found[2].upper() not in UNITS:
        raise SystemExit(f"--limit {size}: not a size; write it as 3GB, 2.5GiB or 3000000000")
    return int(float(found[1]) * UNITS[found[2].upper()])


def memory_of(pid: int) -> tuple[int, int, int]:
    """Resident bytes of a process: all, allocated, of mapped files; the parts are 0 where only psutil tells."""
    try:
        status = dict(
            re.findall(r"^(VmRSS|RssAnon|RssFile):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
        )
        return tuple(1024 * int(status.get(key, 0)) for key in ("VmRSS", "RssAnon", "RssFile"))
    except FileNotFoundError:
        import psutil

        return psutil.Process(pid).memory_info().rss, 0, 0


def written(out: Path) -> tuple[int, int, str]:
    """What a run has on disk so far: bytes, how many parts are finished, and the last of them."""
    try:
        files = {path: path.stat() for path in out.with_name(f"{out.name}.partial").rglob("*") if path.is_file()}
    except FileNotFoundError:  # it is being put together
        return 0, 0, ""
    parts = sorted((stat.st_mtime, path.stem) for path, stat in files.items() if path.suffix == ".part")
    return sum(stat.st_size for stat in files.values()), len(parts), parts[-1][1] if parts else ""


def predict(model: Path, out: Path, limit: str, options: list[str]) -> dict[str, Any]:
    """What a dry run says; empty, with a line on standard error, if it says nothing."""
    given = options if any(word.startswith("--max-memory") for word in options) else [*options, "--max-memory", limit]
    ran = subprocess.run(quantize(model, out, given, "--dry-run"), capture_output=True, text=True)
    try:
        return json.loads(ran.stdout)
    except ValueError:
        reason = (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        print(f"no prediction: --dry-run ended with {ran.returncode}: {reason}", file=sys.stderr)
        return {}


def quantize(model: Path, out: Path, options: list[str], *more: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "wellrounded", "quantize", str(model), "-o", str(out), "--json", *more, *options]


@contextmanager
def limited(limit: int) -> Iterator[tuple[Callable[[], None], Group | None, str]]:
    """What a child has to call to come under the limit, its cgroup if there is one, and what keeps the limit."""
    try:
        group = Group(limit)
    except OSError as error:
        how = f"RLIMIT_DATA: what it allocates, not files that it maps (no cgroup: {error})"
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)), None, how
        return
    with group:
        yield group.enter, group, f"memory cgroup, version {group.version}: page cache included, no swap"


def run(model: Path, out: Path, limit: str, options: list[str], trace: Path | None) -> int:
    """Quantize under the limit and print what it took; the exit code."""
    predicted, start, rows = predict(model, out, limit, options), time.perf_counter(), []
    with limited(bytes_of(limit)) as (enter, group, how), tempfile.TemporaryFile("w+") as stdout:
        child = subprocess.Popen(quantize(model, out, options), stdout=stdout, preexec_fn=enter)
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            used = group.read(group.used) if group else 0
            rows.append((time.perf_counter() - start, *memory_of(child.pid), used, *written(out)))
            time.sleep(EVERY)
        child.returncode = os.waitstatus_to_exitcode(ended[1])
        seconds = time.perf_counter() - start
        peak = ended[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        facts = {"limit": f"{size(bytes_of(limit))}, {how}", "exit code": str(child.returncode)}
        if group:
            kills = group.read(group.events, "oom_kill")
            failed = group.read("memory.failcnt") if group.version == 1 else group.read(group.events, "max")
            facts["cgroup"] = f"at most {size(group.read(group.most))}, at the limit {failed} times, killed {kills}"
        stdout.seek(0)
        printed = stdout.read()
    if trace:
        lines = ["seconds,rss_bytes,allocated_bytes,mapped_bytes,cgroup_bytes,disk_bytes,parts,last_part"]
        trace.write_text("\n".join([*lines, *(f"{at:.1f},{','.join(map(str, rest))}" for at, *rest in rows)]) + "\n")
    if rows:
        top = max(rows, key=lambda row: row[1])
        facts["peak seen"] = f"at {top[0]:.1f} s, after {top[6]} parts{f' ({top[7]})' if top[7] else ''}: " + (
            f"{size(top[1])}, {size(top[2])} of it allocated, {size(top[3])} mapped from files"
        )
    if child.returncode == -signal.SIGKILL:
        facts["exit code"] += ": killed, most likely by the limit"
    measured = {"peak_memory_bytes": peak, "seconds": seconds, "disk_bytes": max([0, *(row[5] for row in rows)])}
    if child.returncode in (0, 3):
        measured["output_bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        facts["its own report"] = f"peak {size(json.loads(printed).get('peak_rss_bytes', 0))}"
    show(facts, measured, predicted)
    return 1 if child.returncode < 0 else child.returncode


def show(facts: dict[str, str], measured: dict[str, float], predicted: dict[str, Any]) -> None:
    """Everything, as text."""
    for name, fact in facts.items():
        print(f"{name:16} {fact}")
    print(f"{'':16} {'measured':>12} {'predicted':>12} {'ratio':>7}")
    for key, name in COMPARED.items():
        found, said = measured.get(key), predicted.get(key)
        cells = [
            "-" if value is None else f"{value:.0f} s" if key == "seconds" else size(value) for value in (found, said)
        ]
        print(f"{name:16} {cells[0]:>12} {cells[1]:>12} {f'{found / said:.2f}' if found and said else '-':>7}")


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def main() -> None:
    """The two commands."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write", help="make a random checkpoint")
    one.add_argument("kind", choices=SHAPES)
    one.add_argument("directory", type=Path)
    one.add_argument("--gb", type=float, default=8, help="its size (default: 8)")
    two = commands.add_parser("run", help="quantize it under a hard limit")
    two.add_argument("model", type=Path)
    two.add_argument("out", type=Path)
    two.add_argument("--limit", default="3GB", help="memory it may have (default: 3GB)")
    two.add_argument("--trace", type=Path, metavar="FILE", help="write a CSV: memory and progress over time")
    asked = parser.parse_args(sys.argv[1:at])
    if asked.command == "write":
        write(asked.kind, asked.directory, asked.gb)
    else:
        sys.exit(run(asked.model, asked.out, asked.limit, sys.argv[at + 1 :], asked.trace))


if __name__ == "__main__":
    main()
