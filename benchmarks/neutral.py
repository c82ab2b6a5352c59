"""One reader for everybody's checkpoints: packed tensors become a dense state dict, by what the formats say.

It shares no code with wellrounded, so that nobody's own reader judges its own files. It understands GPTQ (v1 and v2,
`dynamic` overrides, activation order), what AutoRound writes (the same layout, or AWQ's for asymmetric weights), and
compressed-tensors' `pack-quantized`. In all of them codes are a stream of bits in int32 words, lowest bits first.

    python benchmarks/neutral.py DIRECTORY [ORIGINAL]      what is in it, and whether it is all that the original has
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]
GPTQ = ("qweight", "qzeros", "scales", "g_idx")
HEAD = ("lm_head.weight", "model.embed_tokens.weight")
PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


class UnreadableError(Exception):
    """The checkpoint is not what its configuration says, or of a kind that is not understood here."""


def read(directory: str | Path) -> Tensors:
    """Every weight of a checkpoint, dense: quantized ones in float32, all others as they are stored."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tensors = stored(directory)
    quantization = config.get("quantization_config")
    if quantization is None:
        return tensors
    method = quantization.get("quant_method")
    if method in ("gptq", "auto-round"):
        return _from_gptq(tensors, quantization)
    if method == "compressed-tensors":
        return _from_packed(tensors, quantization)
    raise UnreadableError(f"{directory}: quant_method {method!r} is none of gptq, auto-round and compressed-tensors")


def stored(directory: Path) -> Tensors:
    """All tensors of all safetensors files, under the names in the files."""
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in tensors:
                    raise UnreadableError(f"{path}: {name} is in another file as well")
                tensors[name] = file.get_tensor(name)
    if not tensors:
        raise UnreadableError(f"{directory}: no safetensors files")
    return tensors


def compare(dense: Tensors, original: Tensors, tied: bool) -> None:
    """Raise unless names and shapes are the original's: nothing missing, nothing left over, nothing broken.

    A head that is `tied` to the embedding may be there once or twice.
    """
    optional = set(HEAD) if tied else set()
    if optional and optional <= dense.keys() and not torch.equal(*(dense[name] for name in sorted(optional))):
        raise UnreadableError("the head and the embedding are one in the original and differ here")
    missing = sorted(original.keys() - dense.keys() - optional)
    extra = sorted(dense.keys() - original.keys() - optional)
    other = sorted(n for n in dense.keys() & original.keys() if dense[n].shape != original[n].shape)
    broken = sorted(name for name, tensor in dense.items() if not torch.isfinite(tensor).all())
    if optional and not optional & dense.keys():
        missing += sorted(optional)
    for what, names in (("missing", missing), ("left over", extra), ("of another shape", other), ("broken", broken)):
        if names:
            raise UnreadableError(f"{len(names)} tensors are {what}: {', '.join(names[:5])}")


# ---- GPTQ, and AutoRound's form of it ----


def _from_gptq(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    layers = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    packing = _packing(config)
    dense: Tensors = {}
    for name in sorted(layers):
        own = {key: tensors.pop(f"{name}.{key}") for key in GPTQ if f"{name}.{key}" in tensors}
        bits, group_size = _wanted(config, name)
        try:
            if packing == "awq":
                dense[f"{name}.weight"] = awq_weight(own, bits)
            else:
                dense[f"{name}.weight"] = gptq_weight(own, bits, group_size, plus_one=packing == "gptq")
        except UnreadableError as error:
            raise UnreadableError(f"{name}: {error}") from None
    return tensors | dense


def _packing(config: dict[str, Any]) -> str:
    """gptq (zero points are stored minus one), gptq_v2 (as they are) or awq."""
    if config["quant_method"] == "gptq":
        said = config.get("checkpoint_format", config.get("format", "gptq"))
        found = said if said in ("gptq", "gptq_v2") else None
    else:
        said = config.get("packing_format")
        known = {"auto_gptq": "gptq", "gptqmodel": "gptq_v2", "auto_awq": "awq"}
        found = {f"auto_round:{name}": kind for name, kind in known.items()}.get(said)
    if found is None:
        raise UnreadableError(f"{config['quant_method']} packed as {said!r} is not understood")
    return found


def _wanted(config: dict[str, Any], name: str) -> tuple[int, int]:
    """Bits and group size of a layer: those of the first `dynamic` or `extra_config` entry for it, else everyone's."""
    bits, group = config["bits"], config["group_size"]
    for pattern, change in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
            if pattern.startswith("-:"):
                raise UnreadableError(f"dynamic says {pattern!r}, so it should not be packed")
            return change.get("bits", bits), change.get("group_size", group)
    change = (config.get("extra_config") or {}).get(name, {})
    return change.get("bits", bits), change.get("group_size", group)


def gptq_weight(tensors: Tensors, bits: int, group_size: int, plus_one: bool) -> torch.Tensor:
    """float32 [out, in] from qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out].

    `g_idx` int32 [in] has the last word on which group an input belongs to; without it groups follow each other.
    """
    _expect({"qweight", "qzeros", "scales"} <= tensors.keys(), f"only {', '.join(sorted(tensors))} are there")
    qweight, scales = tensors["qweight"], tensors["scales"].float()
    groups, outputs = scales.shape
    inputs = qweight.shape[0] * 32 // bits
    index = tensors.get("g_idx")
    if index is None:
        index = torch.arange(inputs) // (group_size if group_size > 0 else inputs)
    seen = (tuple(qweight.shape), tuple(tensors["qzeros"].shape), len(index), int(index.max()) + 1)
    wanted = ((inputs * bits // 32, outputs), (groups, outputs * bits // 32), inputs, groups)
    _expect(seen == wanted, f"shapes {seen}, where {bits} bits in groups of {group_size} mean {wanted}")
    codes = unpack(qweight.T, bits, inputs)  # [out, in]
    # Zero point 0 was stored as -1, all bits set: it wraps back.
    zeros = (unpack(tensors["qzeros"], bits, outputs) + plus_one) % 2**bits  # [groups, out]
    index = index.long()
    return (codes - zeros.T[:, index]) * scales.T[:, index]


def awq_weight(tensors: Tensors, bits: int) -> torch.Tensor:
    """float32 [out, in] from qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; 4 bits only."""
    _expect(tensors.keys() == {"qweight", "qzeros", "scales"} and bits == 4, f"{bits} bits in {', '.join(tensors)}")
    scales = tensors["scales"].float()
    groups, outputs = scales.shape
    inputs = len(tensors["qweight"])
    columns = torch.arange(outputs).unflatten(0, (-1, 8))[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten()  # where each is stored
    codes, zeros = (unpack(tensors[key], bits, outputs)[:, columns] for key in ("qweight", "qzeros"))
    index = torch.arange(inputs) // (inputs // groups)
    return ((codes - zeros[index]) * scales[index]).T


# ---- compressed-tensors ----


def _from_packed(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    wanted = [group["weights"] for group in config["config_groups"].values()]
    kinds = {(w["num_bits"], w["symmetric"], w["type"]) for w in wanted}
    formats = {config.get("format"), *(group.get("format") for group in config["config_groups"].values())} - {None}
    if formats != {"pack-quantized"} or len(kinds) != 1 or wanted[0]["type"] != "int":
        raise UnreadableError(f"formats {formats} with {kinds}; pack-quantized with one width is understood")
    layers = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    dense: Tensors = {}
    for name in sorted(layers):
        own = {key: tensors.pop(f"{name}.{key}") for key in PACKED if f"{name}.{key}" in tensors}
        try:
            dense[f"{name}.weight"] = packed_weight(own, wanted[0]["num_bits"], wanted[0]["symmetric"])
        except UnreadableError as error:
            raise UnreadableError(f"{name}: {error}") from None
    return tensors | dense


def packed_weight(tensors: Tensors, bits: int, symmetric: bool) -> torch.Tensor:
    """float32 [out, in] from weight_packed [out, in * bits / 32] and weight_scale [out, groups]; codes are signed."""
    outputs, inputs = tensors["weight_shape"].tolist()
    packed, scales = tensors["weight_packed"], tensors["weight_scale"].float()
    words = -(-inputs * bits // 32)
    _expect(packed.shape == (outputs, words), f"weight_packed is {list(packed.shape)}, expected {[outputs, words]}")
    _expect(symmetric != ("weight_zero_point" in tensors), f"symmetric is {symmetric}, but the zero points disagree")
    groups = scales.shape[1]
    _expect(inputs % groups == 0, f"{groups} groups do not divide {inputs} inputs")
    index = tensors.get("weight_g_idx", torch.arange(inputs) // (inputs // groups)).long()
    middle = 2 ** (bits - 1)
    codes = unpack(packed, bits, inputs) - middle
    zeros = torch.zeros_like(scales)
    if not symmetric:  # packed along the outputs
        zeros = (unpack(tensors["weight_zero_point"].T, bits, outputs) - middle).T
    return (codes - zeros[:, index]) * scales[:, index]


# ---- bits ----


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """float32 [rows, count], the first numbers of each row of int32 [rows, n]: a stream of bits, lowest first."""
    stream = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : count * bits].reshape(len(words), count, bits)
    return torch.from_numpy(stream @ (1 << np.arange(bits)).astype(np.float32))


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnreadableError(otherwise)


def main() -> None:
    """Look into a checkpoint by hand."""
    dense = read(sys.argv[1])
    print(f"{len(dense)} tensors, {sum(tensor.numel() for tensor in dense.values()):,} weights")
    if sys.argv[2:]:
        tied = json.loads((Path(sys.argv[1]) / "config.json").read_text()).get("tie_word_embeddings", False)
        original = read(sys.argv[2])
        compare(dense, original, tied)
        print(f"names and shapes are those of {sys.argv[2]}")
        pairs = [(dense[name], original[name].float()) for name in dense if dense[name].dtype != original[name].dtype]
        off = sum((one - other).square().sum().item() for one, other in pairs)
        size = sum(other.square().sum().item() for _, other in pairs)
        print(f"{len(pairs)} packed, relative error {(off / size) ** 0.5 if pairs else 0:.4f}")


if __name__ == "__main__":
    main()
