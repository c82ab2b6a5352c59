"""GPTQModel loads what wellrounded wrote, and agrees about the logits. Run once per release, by hand.

It needs an environment of its own (GPTQModel asks for a newer torch than we pin), so it has two halves:

    python benchmarks/gptqmodel_loads.py write OUT...          in wellrounded's environment: OUT/logits.safetensors
    python benchmarks/gptqmodel_loads.py check OUT...          in GPTQModel's: loads OUT, compares

On a machine with two cores GPTQModel needs GPTQMODEL_CPU_WORKERS=2.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROMPT = torch.arange(100, 164).unsqueeze(0)


def write(out: Path) -> None:
    """What wellrounded's reference kernel gives for the prompt."""
    import wellrounded

    model = wellrounded.load(out, kernel="reference", dtype=torch.float32)
    with torch.no_grad():
        save_file({"logits": model(PROMPT).logits.contiguous()}, out / "logits.safetensors.check")


def check(out: Path) -> bool:
    """Load with GPTQModel, compare on the same prompt."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH)
    with torch.no_grad():
        theirs = model.model(PROMPT).logits.float()
    ours = load_file(out / "logits.safetensors.check")["logits"].float()
    error = ((theirs - ours).norm() / ours.norm()).item()
    agree = (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    print(f"{out}: relative difference {error:.2e}, same top token {agree:.1%}, {model.model.dtype}")
    return error < 0.03 and agree > 0.95  # theirs runs in bfloat16 or float16, ours in float32


if __name__ == "__main__":
    verb, *directories = sys.argv[1:]
    if verb == "write":
        for directory in directories:
            write(Path(directory))
    else:
        results = [check(Path(directory)) for directory in directories]
        sys.exit(0 if all(results) else 1)
