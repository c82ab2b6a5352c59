"""wellrounded inspect DIRECTORY: what a quantized directory holds, every scale checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from .terminal import print_json, print_table, stdout

PACKED = ("qweight", "qzeros", "scales", "g_idx")


def run(args: argparse.Namespace) -> int:
    """Read every packed layer from the files, and summarize; damaged tensors end it with their name."""
    found = examine(Path(args.model))
    if args.json:
        print_json(found)
        return 0
    mib = 2**20
    rows = [
        ("format", f"{found['format']}, {found['scheme']}"),
        ("size", f"{found['size_bytes'] / mib:,.1f} MiB in safetensors, {found['packed_bytes'] / mib:,.1f} MiB packed"),
        (
            "layers",
            f"{len(found['layers'])} quantized, {found['weights']:,} weights, {found['bits_per_weight']:.2f} bits each",
        ),
        ("schemes", ", ".join(f"{n} x {s}" for s, n in found["schemes"].items())),
        ("dense", f"{found['dense_bytes'] / mib:,.1f} MiB in {found['dense_tensors']} tensors"),
        ("check", "every packed tensor has the right shape, every scale is finite"),
    ]
    print_table(rows, args.model)
    if args.layers:
        stdout.print()
        print_table(
            [
                (
                    x["name"],
                    f"{x['out']} x {x['in']}  {x['scheme']}  scales {x['smallest_scale']:.2g} to "
                    f"{x['largest_scale']:.2g}",
                )
                for x in found["layers"]
            ]
        )
    return 0


def examine(directory: Path) -> dict[str, Any]:
    """The facts as a dict. Raises UsageError if this is no quantized directory, CheckpointError if it is damaged."""
    from ..checkpoint import Reader
    from ..formats import config as config_format
    from ..formats import gptq as gptq_format

    stored = config_format.from_config(_quantization_config(directory))
    reader = Reader(directory)
    packed_names = [tensor for tensor in sorted(reader.places) if tensor.rpartition(".")[2] in PACKED]
    layers, packed = [], 0
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in packed_names):
        scheme = stored.recipe.scheme_of(name)
        if scheme is None:
            raise CheckpointError(f"{name}: packed, but the configuration says that this layer is dense")
        tensors = {key: reader.read(f"{name}.{key}") for key in PACKED if f"{name}.{key}" in reader.places}
        packed += sum(t.numel() * t.element_size() for t in tensors.values())
        if "qweight" not in tensors:
            raise CheckpointError(f"{name}.qweight is missing; fetch the checkpoint again")
        words, outputs = tensors["qweight"].shape
        weight = gptq_format.from_tensors(tensors, scheme, words * 32 // scheme.bits, outputs, stored.version, name)
        magnitude = weight.scales.float().abs()
        layers.append(
            {
                "name": name,
                "out": outputs,
                "in": weight.shape[1],
                "scheme": str(weight.scheme),
                "bits_per_weight": weight.scheme.bits_per_weight(weight.shape[1]),
                "smallest_scale": magnitude.min().item(),
                "largest_scale": magnitude.max().item(),
            }
        )
    if not layers:
        raise CheckpointError(f"{directory}: its configuration says GPTQ, but no tensor is packed")
    weights = sum(x["out"] * x["in"] for x in layers)
    names = [x["scheme"] for x in layers]
    return {
        "directory": str(directory),
        "format": stored.version,
        "scheme": str(stored.recipe.scheme),
        "schemes": {s: names.count(s) for s in dict.fromkeys(names)},
        "weights": weights,
        "bits_per_weight": sum(x["out"] * x["in"] * x["bits_per_weight"] for x in layers) / weights,
        "size_bytes": reader.bytes,
        "packed_bytes": packed,
        "dense_bytes": reader.bytes - packed,
        "dense_tensors": len(reader.places) - len(packed_names),
        "layers": layers,
    }


def _quantization_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory")
    for name in ("config.json", "quantize_config.json"):
        try:
            content = json.loads((directory / name).read_text())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise CheckpointError(f"{directory / name}: not JSON ({error})") from None
        config = content.get("quantization_config") if name == "config.json" else content
        if config:
            return config
    raise UsageError(f"{directory}: not a quantized model (no quantization_config in config.json)")
