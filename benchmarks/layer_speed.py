"""Every kernel against the dense product, for one layer: microseconds by number of rows.

    python benchmarks/layer_speed.py [--shape 1536x576] [--bits 4] [--group-size 64] [--seconds 0.3]

The dense product in the same dtype runs alternately with each kernel in the same process; medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from wellrounded import kernels
from wellrounded.core import rtn
from wellrounded.core.scheme import Scheme

ROWS = (1, 4, 8, 16, 24, 32, 64, 256, 512)


def timed(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median microseconds of each call, all of them run in turn for about `seconds`."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 3:
        for call, times in zip(calls, samples):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e6)
    return [statistics.median(times) for times in samples]


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1536x576", help="OUTPUTSxINPUTS")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.3, help="per number of rows")
    args = parser.parse_args()
    outputs, inputs = map(int, args.shape.split("x"))
    dense = torch.randn(outputs, inputs)
    weight = rtn.solve(dense, None, Scheme(args.bits, args.group_size))
    need = kernels.Need(weight.scheme, inputs, outputs, "cpu", torch.bfloat16)
    fitting = [kernel for kernel in kernels.table() if kernel.refuses(need) is None]
    prepared = [(kernel, kernel.prepare(weight, need)) for kernel in fitting]
    bf16 = dense.bfloat16()
    print(f"{outputs}x{inputs}, {weight.scheme}, bfloat16, {torch.get_num_threads()} threads, microseconds")
    print("| rows | dense | " + " | ".join(kernel.NAME for kernel in fitting) + " |")
    print("|---" * (len(fitting) + 2) + "|")
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        calls = [lambda x=x: F.linear(x, bf16)]
        calls += [lambda k=k, p=p, x=x: k.matmul(x, p, weight.dequantize) for k, p in prepared]
        print(f"| {rows} | " + " | ".join(f"{t:.0f}" for t in timed(calls, args.seconds)) + " |", flush=True)


if __name__ == "__main__":
    main()
