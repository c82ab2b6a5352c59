"""Triton's programs without a GPU: tests of them in the interpreter, and machine code for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def pass_interpreted(file: Path) -> None:
    """Run a file of tests in a process of its own, where triton was not imported otherwise."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def compiled(program: Any, tensors: dict[str, str], constants: dict[str, Any], generation: int, **options: int) -> Any:
    """What the assembler that comes with triton makes of it; whatever is neither tensor nor constant is an int32."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    own = {name: value for name, value in constants.items() if name in program.arg_names}
    kinds = {name: f"*{tensors[name]}" if name in tensors else "i32" for name in program.arg_names}
    source = ASTSource(program, kinds | dict.fromkeys(own, "constexpr"), constexprs=own)
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
