"""Modules of fused experts as tiny models call them, for tests of what they become when they are taken apart."""

import copy
from functools import cache

import torch

import tiny
import tiny_configs
from wellrounded.model.experts import Experts, fused_experts, layout_of

TOKENS = tiny.ids(2)
KINDS = [
    "mixtral", "aria_text", "gpt_oss", "nemotron_h", "llama4_text", "jetmoe", "dbrx", "longcat_flash", "inkling_text",
    "deepseek_v4", "minimax_m3_vl_text",
]  # fmt: skip


@cache
def built(kind, dtype=torch.float32):
    """A model whose experts are called one after another, as the original code does; nobody changes it."""
    model = tiny_configs.build(kind).to(dtype)
    model.set_experts_implementation("eager")
    return model


@cache
def met(kind, dtype=torch.float32):
    """The model's fused modules with what each is called with: (module, arguments)."""
    model, found = built(kind, dtype), []

    def note(module, args, kwargs):
        found.append((module, (*args, *kwargs.values())))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in fused_experts(model)
    ]
    tiny.logits(model, TOKENS)
    for handle in handles:
        handle.remove()
    return found


def apart(fused, banks=None):
    """Taken apart, or the banks of these numbers; `fused` stays as it is."""
    return Experts(copy.deepcopy(fused), layout_of(fused), banks)


@torch.no_grad()
def output(module, arguments):
    """What a module makes of its arguments."""
    return module(*arguments)
