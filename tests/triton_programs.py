"""Tests of Triton's programs without a GPU, in its interpreter; benchmarks/machine_code.py compiles them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def pass_interpreted(file: Path) -> None:
    """Run a file of tests in a process of its own, where triton was not imported otherwise."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
