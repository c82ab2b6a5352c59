"""The tensors of a GPTQ layer, `qweight`, `qzeros`, `scales` and `g_idx`, to and from a QuantizedWeight.

The file holds the transpose of a linear's weight: inputs run along dim 0. Its two versions differ in one number:
"gptq" (v1) stores every zero point minus one, "gptq_v2" stores it as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.scheme import Scheme
from ..core.weight import QuantizedWeight
from ..errors import CheckpointError, UsageError
from . import bits

Tensors = dict[str, torch.Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

VERSIONS = ("gptq", "gptq_v2")
SCALES = (torch.float16, torch.bfloat16, torch.float32)  # what tools have written; float16 is the convention


def layout(scheme: Scheme, in_features: int, out_features: int) -> Layout:
    """Shape and dtype of each stored tensor of one layer; the last group may be ragged.

    qweight  int32    [in * bits / 32, out]      packed along the inputs
    qzeros   int32    [groups, out * bits / 32]  packed along the outputs
    scales   float16  [groups, out]
    g_idx    int32    [in]                       group of each input column

    Raises UsageError if a layer of this shape cannot be packed.
    """
    if reason := scheme.refuses(in_features, out_features):
        raise UsageError(f"{reason}; use another width, or keep this layer dense")
    groups = scheme.groups(in_features)
    return {
        "qweight": ((in_features * scheme.bits // 32, out_features), torch.int32),
        "qzeros": ((groups, out_features * scheme.bits // 32), torch.int32),
        "scales": ((groups, out_features), torch.float16),
        "g_idx": ((in_features,), torch.int32),
    }


def to_tensors(weight: QuantizedWeight, version: str) -> Tensors:
    """The four tensors of `layout`, contiguous, on the weight's device.

    Raises UsageError if the shape cannot be packed, or for version "gptq" if a zero point is 0: it would be stored
    as -1, which wraps, and readers disagree about what that means.
    """
    _check_version(version)
    rows, columns = weight.shape
    shapes = layout(weight.scheme, columns, rows)
    zeros = weight.zeros
    if version == "gptq":
        if wrapped := int((zeros == 0).sum()):
            raise UsageError(
                f"version 'gptq' was asked for, which stores zero points minus one; {wrapped} of {zeros.numel()} zero "
                "points of this layer are 0 and would wrap around; write 'gptq_v2' instead"
            )
        zeros = zeros - 1
    tensors = {
        "qweight": bits.pack(weight.codes.T, weight.scheme.bits, dim=0),
        "qzeros": bits.pack(zeros.T, weight.scheme.bits, dim=1),
        "scales": weight.scales.T,
        "g_idx": weight.group_index,
    }
    return {key: tensor.to(shapes[key][1]).contiguous() for key, tensor in tensors.items()}


def from_tensors(
    tensors: Tensors, scheme: Scheme, in_features: int, out_features: int, version: str, name: str
) -> QuantizedWeight:
    """The weight that the tensors of layer `name` hold; other keys, such as bias, are left alone.

    `g_idx` has the last word on grouping: where it is not trivial, the returned scheme has `act_order`, whatever the
    configuration said; it may be missing only if `scheme` has no act_order. A v1 zero that was stored as 2^bits - 1
    is read as zero point 0. Scales of any float type become float16.

    Raises CheckpointError naming the tensor that is missing, or whose shape, dtype or contents cannot be right.
    """
    _check_version(version)
    if reason := scheme.refuses(in_features, out_features):
        raise CheckpointError(f"{name}: {reason}, so this cannot be a GPTQ layer; the configuration must keep it dense")
    shapes = layout(scheme, in_features, out_features)
    for key, dtypes in (("qweight", (torch.int32,)), ("qzeros", (torch.int32,)), ("scales", SCALES)):
        _take(tensors, name, key, shapes[key][0], dtypes)
    index, scheme = _group_index(tensors, scheme, in_features, name)
    weight = decode({**tensors, "g_idx": index.to(tensors["qweight"].device)}, scheme, version)
    _check_scales(tensors["scales"], weight.scales, name)
    _check_zeros(weight.zeros, scheme, version, name)
    return weight


def decode(tensors: Tensors, scheme: Scheme, version: str) -> QuantizedWeight:
    """What `from_tensors` gives for the same tensors once it has found them good, without looking again.

    `scheme` must have act_order if `g_idx` is not trivial.
    """
    zeros = bits.unpack(tensors["qzeros"], scheme.bits, dim=1, count=tensors["scales"].shape[1])
    if version == "gptq":
        # AutoGPTQ wrote zero point 0 as -1, all bits set. Some old kernels read that as 2^bits, which no code reaches;
        # GPTQModel and the kernels descended from it wrap back to 0, the value the quantizer meant.
        zeros = (zeros + 1) & scheme.max_code
    return QuantizedWeight(
        codes=bits.unpack(tensors["qweight"], scheme.bits, dim=0, count=len(tensors["g_idx"])).T,
        scales=tensors["scales"].T.to(torch.float16).contiguous(),
        zeros=zeros.T.contiguous(),
        group_index=tensors["g_idx"],
        scheme=scheme,
    )


def _check_version(version: str) -> None:
    if version not in VERSIONS:
        raise UsageError(f"version {version!r} was asked for; use 'gptq' or 'gptq_v2'")


def _take(
    tensors: Tensors, name: str, key: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> torch.Tensor:
    """The tensor `key`, if it is there and as expected."""
    expected = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {list(shape)}"
    if key not in tensors:
        raise CheckpointError(
            f"{name}.{key} is missing, expected {expected}; fetch the checkpoint again if it is incomplete, or if this "
            'layer was never quantized, add a "-:" rule for it under "dynamic" in quantization_config'
        )
    tensor = tensors[key]
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        seen = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise CheckpointError(
            f"{name}.{key} is {seen}, expected {expected}; check bits and group_size in quantization_config"
        )
    return tensor


def _group_index(tensors: Tensors, scheme: Scheme, in_features: int, name: str) -> tuple[torch.Tensor, Scheme]:
    """int32 [in] from g_idx, and the scheme it belongs to."""
    trivial = scheme.trivial_group_index(in_features)
    if "g_idx" not in tensors and not scheme.act_order:
        return trivial, scheme
    index = _take(tensors, name, "g_idx", (in_features,), (torch.int32,))
    groups, low, high = scheme.groups(in_features), int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{name}.g_idx holds groups {low} to {high}, expected 0 to {groups - 1}; the file is damaged, or "
            "group_size in quantization_config is not the one it was written with"
        )
    # Tools disagree about when desc_act may be left out of the configuration; reading the columns by position would
    # give a weight that looks healthy and is wrong.
    return index, replace(scheme, act_order=scheme.act_order or not torch.equal(index.cpu(), trivial))


def _check_scales(stored: torch.Tensor, scales: torch.Tensor, name: str) -> None:
    broken = int((~torch.isfinite(scales)).sum())
    if broken and torch.isfinite(stored).all():
        raise CheckpointError(
            f"{name}.scales is beyond float16 in {broken} of {scales.numel()} values, the largest "
            f"{stored.float().abs().max():g}, expected at most 65504; quantize the original model again"
        )
    if broken:
        raise CheckpointError(
            f"{name}.scales is NaN or Inf in {broken} of {scales.numel()} values, expected none; fetch the "
            "checkpoint again, or quantize the original model again"
        )


def _check_zeros(zeros: torch.Tensor, scheme: Scheme, version: str, name: str) -> None:
    if scheme.symmetric and not (zeros == scheme.midpoint).all():
        low, high = int(zeros.min()), int(zeros.max())
        other = VERSIONS[1 - VERSIONS.index(version)]
        raise CheckpointError(
            f"{name}.qzeros holds zero points {low} to {high} when read as {version!r}, expected {scheme.midpoint} "
            f'everywhere because the layer is symmetric; in quantization_config set "sym": false'
            + (f', or "checkpoint_format": {other!r} if that is how it was written' if low == high else "")
        )
