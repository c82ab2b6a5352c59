"""What the kernel for GPUs becomes, read from the machine code: no GPU is needed, and no speed is measured.

    python benchmarks/machine_code.py [--generations 80,90] [--bits 2,3,4,8] [--rows 16,64,128]

A product of few rows is bound by memory only if a processor has time for every weight as it comes in: 128 lanes a
clock, so that on an H100 (132 processors, 1.75 GHz, 3.35 TB/s) there is time for 4.4 instructions per weight of 4 bits.
The table has, of one turn of the loop over columns: instructions per weight, and those that would tell of a detour,
stores to shared memory (STS), spilled registers (LDL, STL) and conversions (I2F); registers and shared memory say how
many programs fit on a processor. Prints Markdown.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TENSORS = {
    "x": "bf16", "y": "bf16", "dense": "bf16", "words": "i32", "scales": "fp16", "zeros": "u8", "parts": "fp32",
    "counters": "i32",
}  # fmt: skip
DETOURS = ("STS", "LDL", "STL", "I2F")


def compiled(
    program: Any, tensors: dict[str, str], constants: dict[str, Any], generation: int,
    aligned: Collection[str] = (), **options: int,
) -> Any:  # fmt: skip
    """What the assembler that comes with triton makes of it; whatever is neither tensor nor constant is an int32.

    `aligned` are arguments that are known to be multiples of 16, as triton finds them when it runs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = program.arg_names
    own = {name: value for name, value in constants.items() if name in names}
    kinds = {name: f"*{tensors[name]}" if name in tensors else "i32" for name in names}
    attributes = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in {*aligned} - {*own}}
    source = ASTSource(program, kinds | dict.fromkeys(own, "constexpr"), constexprs=own, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)


@dataclass(frozen=True)
class Turn:
    """One turn of a program's loop: a thread's instructions by name, and all per weight of it; what it occupies."""

    counts: Counter[str]
    per_weight: float
    registers: int
    stack_bytes: int
    shared_bytes: int


def turn(programs: Any, bits: int, rows: int, config: Any, generation: int, chunk: int = 4) -> Turn:
    """Of kernels.triton_products.packed, for symmetric weights in groups of chunk * 32 columns."""
    constants = {"BITS": bits, "CHUNK": chunk, "MIDDLE": 1 << (bits - 1), "ROWS": rows, "TIMES": 4 // chunk}
    constants |= {"WIDE": False, "per_group": 1, "OUTPUTS": config.kwargs["OUTPUTS"]}
    made = compiled(
        programs.packed, TENSORS, constants, generation, [*TENSORS, "outputs"],
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    code, usage = (_dumped(made.asm["cubin"], what) for what in ("-sass", "-res-usage"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    loop = Counter(_loop(code))
    threads, weights = 32 * config.num_warps, 128 * config.kwargs["OUTPUTS"]
    return Turn(loop, loop.total() * threads / weights, int(found[1]), int(found[2]), made.metadata.shared)


def _loop(code: str) -> list[str]:
    """The instructions of the longest loop with a product in it, without what they are about."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", code)]
    loops: list[list[str]] = []
    for at, text in lines:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            inside = [line for place, line in lines if int(back[1], 16) <= place <= at]
            loops.append([re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in inside])
    return max((loop for loop in loops if any("MMA" in name for name in loop)), key=len, default=[])


def _dumped(cubin: bytes, what: str) -> str:
    """What the disassembler that comes with triton prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("generations", "80,90"), ("bits", "2,3,4,8"), ("rows", "16,64,128")):
        parser.add_argument(f"--{name}", default=usual, help="(default: %(default)s)")
    args = parser.parse_args()
    generations, widths, talls = (
        [int(n) for n in each.split(",")] for each in (args.generations, args.bits, args.rows)
    )

    import triton

    from wellrounded.kernels import triton_products as programs

    print(f"triton {triton.__version__}, groups of 128, symmetric, bfloat16\n")
    print(
        "| sm | bits | rows | outputs | warps | instructions per weight | registers | shared kB | detours in a turn |"
    )
    print("|" + "---|" * 9)
    for generation, bits, rows in ((g, b, r) for g in generations for b in widths for r in talls):
        shapes = {(c.kwargs["OUTPUTS"], c.num_warps, c.num_stages): c for c in programs.kinds(rows)}
        for (outputs, warps, _), config in shapes.items():
            found = turn(programs, bits, rows, config, generation)
            detours = ", ".join(f"{found.counts[name]} {name}" for name in DETOURS if found.counts[name])
            print(f"| {generation} | {bits} | {rows} | {outputs} | {warps} | {found.per_weight:.2f} | {found.registers}"
                  f" | {found.shared_bytes / 1024:.0f} | {detours} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
