"""The native core's attention as one of transformers' implementations, `attn_implementation="wellrounded"`.

It serves bfloat16 on the CPU without gradients; everything else goes through transformers' own "sdpa", whose masks it
shares, call by call.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import native

NAME = "wellrounded"
STRANGE = (
    "position_bias",
    "cache",
    "softcap",
    "s_aux",
    "head_mask",
)  # what changes the scores, or where keys come from


_served = False  # by this machine: settled before anything is traced, which cannot ask the core


def offer() -> None:
    """Let transformers know it by its name."""
    global _served
    _served = native.has_bfloat16()
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: PreTrainedModel) -> None:
    """Switch a model that computes on the CPU over to it, if it uses "sdpa" now and asks nobody how it is called."""
    if (
        not native.has_bfloat16()
        or model.config._attn_implementation != "sdpa"
        or not model._can_set_attn_implementation()
    ):
        return
    home = sys.modules[type(model).__module__]
    if '_attn_implementation == "sdpa"' not in inspect.getsource(home):
        offer()
        model.set_attn_implementation(NAME)


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[batch, queries, heads, depth] from a query [batch, heads, queries, depth], keys and values of no more heads."""
    plain = not dropout and all(kwargs.get(name) is None for name in STRANGE)
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if plain and not gradients and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = query.shape[2] > 1 and attention_mask is None and asked
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        if torch.compiler.is_compiling():
            if _served and native.attends(query, key, value, attention_mask):
                return torch.ops.wellrounded.attention(query, key, value, attention_mask, scale, causal), None
        else:
            output = native.attend(query, key, value, attention_mask, scale, causal)
            if output is not None:
                return output, None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
