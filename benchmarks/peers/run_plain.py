"""Plain rounding, as a baseline: each group's largest weight decides its scale, and nothing else is looked at.

The textbook's grid: symmetric, scale = 2 * absmax / (2^bits - 1) around the middle code; asymmetric, scale =
(max - min) / (2^bits - 1) with a rounded zero point. Written as a GPTQ checkpoint by code of its own.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import job
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

IN_BLOCKS = re.compile(r"\.\d+\.")  # a linear of a decoder block; embeddings and head lie outside


def round_plainly(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int64 [out, in], scales float16 [out, groups] and zero points int64 [out, groups]."""
    top = 2**bits - 1
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-7).half()
    wide = scales.float()
    zeros = torch.full_like(low, (top + 1) // 2) if symmetric else (-low / wide).round().clamp(0, top)
    codes = (groups / wide[..., None]).round().add(zeros[..., None]).clamp(0, top)
    return codes.flatten(1).long(), scales, zeros.long()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, count * bits / 32] from int64 [rows, count]: a stream of bits, lowest first."""
    stream = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


def main() -> None:
    """Round every matrix inside the blocks, write one file."""
    args = job.asked()
    source, out = Path(args.model), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                layer = name.removesuffix(".weight")
                if tensor.ndim != 2 or layer == name or not IN_BLOCKS.search(name):
                    tensors[name] = tensor
                    continue
                codes, scales, zeros = round_plainly(tensor, args.bits, args.group_size, not args.asym)
                tensors[f"{layer}.qweight"] = pack(codes, args.bits).T.contiguous()
                tensors[f"{layer}.qzeros"] = pack(zeros.T, args.bits)
                tensors[f"{layer}.scales"] = scales.T.contiguous()
                tensors[f"{layer}.g_idx"] = (torch.arange(tensor.shape[1]) // args.group_size).int()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": args.bits, "group_size": args.group_size, "sym": not args.asym,
        "desc_act": False, "checkpoint_format": "gptq_v2",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.glob("*token*"):
        shutil.copy(path, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    job.finished(args, "torch")


if __name__ == "__main__":
    main()
