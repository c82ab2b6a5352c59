"""wellrounded doctor: what is installed, and what runs here."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from .. import __version__
from .terminal import print_json, print_table, stdout

PACKAGES = {
    "torch": "",
    "transformers": "",
    "safetensors": "",
    "huggingface_hub": "",
    "accelerate": "",
    "gguf": "reads .gguf files",
    "datasets": "calibration data sets by name",
    "peft": "fine-tuning",
    "pyarrow": "reads .parquet files",
}
EXTRAS = {"gguf": "gguf", "datasets": "data", "pyarrow": "data", "peft": "peft"}


def run(args: argparse.Namespace) -> int:
    """Versions, hardware, and for typical layers which kernel is used and why the others are not."""
    import torch

    from .. import kernels, native
    from ..core import engines
    from ..core.scheme import Scheme

    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {name: _version(name) for name in PACKAGES}
    chosen = {}
    for scheme in (Scheme(4, 128), Scheme(4, 64, symmetric=False), Scheme(3, 128), Scheme(8, 128)):
        need = kernels.Need(scheme, 4096, 4096, device, torch.bfloat16)
        chosen[str(scheme)] = kernels.explain(need)
    hardware = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")(),
        "native": native.missing() or native.levels()[-1],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "solver": engines.named(device),
    }
    if args.json:
        print_json(
            {
                "wellrounded": __version__,
                "packages": versions,
                **hardware,
                "kernels": {k: [{"kernel": n, "refuses": r} for n, r in v] for k, v in chosen.items()},
            }
        )
        return 0
    print_table([("wellrounded", __version__), *((k, v if v is not None else "none") for k, v in hardware.items())])
    stdout.print()
    print_table(
        [
            (
                name,
                versions[name]
                or f'not installed ({PACKAGES[name]}: pip install "wellrounded[{EXTRAS.get(name, "")}]")',
            )
            for name in PACKAGES
        ]
    )
    stdout.print()
    rows = []
    for scheme_name, answers in chosen.items():
        used = next(name for name, refusal in answers if refusal is None)
        why = "; ".join(f"not {name}: {refusal}" for name, refusal in answers if refusal)
        rows.append((scheme_name, f"{used}{f' ({why})' if why else ''}"))
    print_table(rows, f"kernels for a 4096 x 4096 layer in bfloat16 on {device}")
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
