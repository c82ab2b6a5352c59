"""The house: imports point down, and each foreign library has one room."""

import ast
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

import wellrounded
from wellrounded import native

ROOT = Path(wellrounded.__file__).parent
LEVELS = {
    **dict.fromkeys(["errors", "memory", "native"], 0),
    **dict.fromkeys(["core"], 1),
    **dict.fromkeys(["formats", "kernels", "model"], 2),
    **dict.fromkeys(
        [
            "nn",
            "ops",
            "packed_weight",
            "checkpoint",
            "journal",
            "tensorfile",
            "writer",
            "store",
            "places",
            "torchrun",
            "report",
            "calibration",
            "card",
            "plan",
            "solving",
            "ledger",
            "prediction",
            "rates",
            "room",
            "shapes",
            "progress",
            "proof",
            "team",
            "blockwise",
            "presets",
            "sensitivity",
            "ties",
            "measurement",
            "learned",
            "student",
            "training",
            "tuning",
            "sampling",
        ],
        3,
    ),
    **dict.fromkeys(["pipeline", "evaluation"], 4),
    **dict.fromkeys(["request", "runlog", "budget", "contest", "trial", "rotating"], 5),
    **dict.fromkeys(["hf"], 6),
    **dict.fromkeys(["api", "autogptq", "benchmark", "cli", "commands", "transformers", "__init__", "__main__"], 7),
}
STRANGERS = {2, 4}  # rooms on these levels do not know each other either
HOMES = {"safetensors": "nowhere", "triton": "*/triton*.py", "transformers": "hf/*", "peft": "hf/*",
         "huggingface_hub": "hf/*"}  # fmt: skip
FILES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py"))]


def imported(file: str) -> set[str]:
    """Absolute names of everything a file imports, wherever in it; `from a import b` counts as a.b."""
    package = ["wellrounded", *Path(file).parent.parts]
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names - {"wellrounded.__version__"}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    room = Path(file).parts[0].removesuffix(".py")
    for name in imported(file):
        if name.startswith("wellrounded."):
            other = name.split(".")[1]
            assert LEVELS[other] <= LEVELS[room], f"{file} imports {name} from above"
            assert other == room or LEVELS[room] != LEVELS[other] or LEVELS[room] not in STRANGERS, f"{file}: {name}"


@pytest.mark.parametrize("file", FILES)
def test_foreign_libraries_stay_in_their_rooms(file):
    for name in imported(file):
        home = HOMES.get(name.split(".")[0])
        assert home is None or fnmatch(file, home), f"{file} imports {name}, which belongs into {home}"


def test_the_rules_would_notice():
    assert {"wellrounded.core.weight.QuantizedWeight", "torch"} <= imported("nn.py")
    assert {"wellrounded.kernels", "wellrounded.formats.gptq"} <= imported("nn.py")
    assert "huggingface_hub.snapshot_download" in imported("hf/source.py")
    assert "wellrounded.hf.load.load" in imported("__init__.py")


def test_no_room_has_the_name_of_something_that_the_package_offers():
    """Once imported, a module hides the package's lazy attribute of the same name."""
    rooms = {Path(file).parts[0].removesuffix(".py") for file in FILES}
    assert not rooms & set(wellrounded.__all__)


def test_the_native_core_is_there_where_there_is_a_compiler():
    """A build that fails gives a package without it, which works: here that would hide the failure."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: nothing was to be built")
    assert native.missing() is None
