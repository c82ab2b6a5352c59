"""Who will not load a checkpoint, said before it is made: the limits of the engines that read this format.

From vLLM 0.33 (quantization/auto_gptq.py, marlin_utils.py) and SGLang 0.5.23 (quantization/gptq).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..core.scheme import Scheme
from .config import FUSED

ENGINES = "vLLM and SGLang"
GROUPS = (-1, 32, 64, 128)


def objections(schemes: Mapping[str, Scheme], inputs: Mapping[str, int], kept: Collection[str]) -> list[str]:
    """One sentence per reason why a serving engine refuses these layers; empty if everybody loads them.

    schemes and inputs by full layer name; `kept` are the linear layers inside the blocks that stay dense.
    """
    found: dict[str, None] = {}
    for name, scheme in schemes.items():
        if scheme.bits not in (4, 8):
            found[f"{ENGINES} load 4 and 8 bits only, not {scheme.bits}"] = None
        if not scheme.symmetric:
            found[f"{ENGINES} load symmetric GPTQ checkpoints only; use --sym for them"] = None
        if scheme.group_size not in GROUPS:
            found[f"{ENGINES} load groups of {', '.join(map(str, GROUPS))} only, not {scheme.group_size}"] = None
        elif inputs[name] % scheme.columns_per_group(inputs[name]):
            found[f"{ENGINES} refuse ragged groups: {scheme.group_size} does not divide {inputs[name]} inputs"] = None
        if scheme.act_order:
            found["vLLM refuses activation order (desc_act); the default order is as accurate without it"] = None
    for fused, parts in FUSED.items():
        for name in kept:
            parent, _, leaf = name.rpartition(".")
            if leaf in parts and any(f"{parent}.{part}" in schemes for part in parts):
                found[f"{ENGINES} fuse {', '.join(parts)} into {fused}: keep all of them dense, or none"] = None
    return list(found)
