"""`load(head_bits=8)`: the output head, which checkpoints keep dense, packed while a model is loaded.

Of a small model it is the largest matrix, and each token reads all of it. The embedding that it may share its weight
with stays dense.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..core import rtn
from ..core.scheme import Scheme
from ..core.weight import QuantizedWeight
from ..errors import UsageError
from ..formats import gptq as gptq_format
from ..model.blocks import is_linear, oriented, shape_of
from ..nn import QuantLinear

GROUPS = (128, 64, 32, -1)
ROWS = 8192  # rounded at a time: a vocabulary in float32 is large


def pack_head(model: PreTrainedModel, bits: int) -> None:
    """Replace the output head by its plainly rounded self. Raises UsageError if there is none to pack."""
    head = model.get_output_embeddings()
    asked = f"head_bits={bits} was asked for, but"
    if isinstance(head, QuantLinear):
        raise UsageError(f"{asked} the head is packed in the checkpoint; leave it out")
    if head is None or not is_linear(head):
        raise UsageError(f"{asked} {type(model).__name__} has no linear output head; leave it out")
    if head.weight.device.type == "meta":
        raise UsageError(f"{asked} the head is offloaded; give it a device of its own in device_map")
    outputs, inputs = shape_of(head)
    scheme = next(s for s in (Scheme(bits, group) for group in GROUPS) if inputs % s.columns_per_group(inputs) == 0)
    if reason := scheme.refuses(inputs, outputs):
        raise UsageError(f"{asked} {reason}")
    weight = oriented(head, head.weight.detach())
    parts = [rtn.solve(rows.float(), None, scheme) for rows in weight.split(ROWS)]
    codes, scales, zeros = (torch.cat([getattr(p, key) for p in parts]) for key in ("codes", "scales", "zeros"))
    packed = QuantizedWeight(codes, scales, zeros, parts[0].group_index, scheme)
    name = next(name for name, module in model.named_modules() if module is head)
    with torch.device("meta"):
        layer = QuantLinear(inputs, outputs, scheme, "gptq", False, name, head.weight.dtype)
    for key, tensor in gptq_format.to_tensors(packed, "gptq").items():
        setattr(layer, key, tensor)
    layer.bias = None if head.bias is None else head.bias.detach()
    model.set_submodule(name, layer)
    model._packed_head = True


def refuse_saving(model: object) -> None:
    """Raises UsageError if the head was packed here: a checkpoint keeps it dense, and the dense one is gone."""
    if getattr(model, "_packed_head", False):
        raise UsageError("a model that was loaded with head_bits cannot be saved; load it without to save it")
