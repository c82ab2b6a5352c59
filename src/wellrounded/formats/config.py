"""`quantization_config`, the JSON beside a GPTQ checkpoint, to and from a Recipe.

Rules become entries of `dynamic`, `{regex: overrides}`: "-:" before the pattern keeps a layer dense, "+:" (or nothing)
gives it its own scheme. Readers match from the start of the name and take the first match, as a Recipe does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..core.recipe import Recipe, Rule
from ..core.scheme import Scheme
from ..errors import CheckpointError, UsageError
from .gptq import VERSIONS

Json = dict[str, Any]

KEYS = ("bits", "group_size", "sym", "desc_act")  # what a scheme is called here

# Serving engines load these siblings as one matrix and match rules against its name only.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

REQUANTIZE = "quantize the original model again, or use the tool that wrote this checkpoint"


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's configuration says: the recipe, the file version, and whether the output head is packed."""

    recipe: Recipe
    version: str
    lm_head: bool


def version_for(*schemes: Scheme | None) -> str:
    """The file version that holds all these schemes: "gptq" if every one is symmetric, else "gptq_v2".

    v1 is what most readers know, but it cannot hold a zero point of 0, and GPTQModel refuses asymmetric v1 files that
    it did not write itself. Dense layers, None, have no say.
    """
    return "gptq" if all(scheme is None or scheme.symmetric for scheme in schemes) else "gptq_v2"


def patterns_for(names: Iterable[str]) -> list[str]:
    r"""Regular expressions that match exactly these layers; siblings that engines fuse share one, with the fused name.

    >>> patterns_for(["model.layers.3.mlp.down_proj", "model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"])
    ['model\\.layers\\.3\\.mlp\\.down_proj$', 'model\\.layers\\.3\\.mlp\\.(gate_proj|up_proj|gate_up_proj)$']
    """
    return list(_patterns(names))


def to_config(
    recipe: Recipe, version: str, kept: Iterable[str] = (), meta: Json | None = None, lm_head: bool = False
) -> Json:
    """The JSON object for `config.json["quantization_config"]`.

    `kept` are full names of linears inside decoder blocks that stayed dense for whatever reason: engines that do not
    look at the tensors need a rule for each. `meta` is added to the informative part, beside the tool's version.
    `lm_head` says that the output head is packed too.
    """
    if version not in VERSIONS:
        raise UsageError(f"version {version!r} was asked for; use 'gptq' or 'gptq_v2'")
    act_order = any(scheme.act_order for scheme in (recipe.scheme, *(rule.scheme for rule in recipe.rules)) if scheme)
    config = {
        "quant_method": "gptq",
        **_overrides(recipe.scheme),
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "lm_head": lm_head,
        # Beside desc_act this promises a trivial g_idx, as AutoGPTQ wrote it: ours is not, so the promise is not made.
        "static_groups": not act_order,
        "meta": {"quantizer": [f"wellrounded:{__version__}"], **(meta or {})},
    }
    dynamic: Json = {}
    for rule in (*_kept_rules(recipe, kept), *recipe.rules):
        key = f"-:{rule.pattern}" if rule.scheme is None else f"+:{rule.pattern}"
        dynamic.setdefault(key, {} if rule.scheme is None else _overrides(rule.scheme))
    return {**config, "dynamic": dynamic} if dynamic else config


def from_config(config: Json) -> Stored:
    """What a `quantization_config` says, ours or another tool's; keys that do not change the tensors are ignored.

    Left out, `checkpoint_format` is `format` or "gptq", `sym` is true and `desc_act` false.

    Raises CheckpointError for a format this version does not read, or a value that no GPTQ layer can have.
    """
    method = config.get("quant_method") or "gptq"
    if method != "gptq":
        raise CheckpointError(f"quant_method is {method!r}, expected 'gptq'; load this model with transformers instead")
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        version = "marlin"
    if version not in VERSIONS:
        raise CheckpointError(f"checkpoint_format is {version!r}, expected 'gptq' or 'gptq_v2'; {REQUANTIZE}")
    words = config.get("pack_dtype") or "int32"
    if words != "int32":
        raise CheckpointError(f"pack_dtype is {words!r}, expected 'int32'; {REQUANTIZE}")
    values = {key: config[key] for key in KEYS if key in config}
    recipe = Recipe(_scheme(values, "quantization_config"), (*_dynamic_rules(config, values), *_unlisted(config)))
    return Stored(recipe, version, bool(config.get("lm_head", False)))


def _overrides(scheme: Scheme) -> Json:
    return dict(zip(KEYS, (scheme.bits, scheme.group_size, scheme.symmetric, scheme.act_order)))


def _scheme(values: Json, where: str) -> Scheme:
    """The scheme of these keys, checked; `where` says whose they are."""
    values = {"sym": True, "desc_act": False, **values}
    for key, kind in zip(KEYS, (int, int, bool, bool)):
        if key not in values:
            raise CheckpointError(f"{where} has no {key}; add the value that the model was quantized with")
        if type(values[key]) is not kind:
            raise CheckpointError(f"{where}: {key} is {values[key]!r}, expected {kind.__name__}; correct config.json")
    try:
        return Scheme(values["bits"], values["group_size"], values["sym"], values["desc_act"])
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}; {REQUANTIZE}") from None


def _patterns(names: Iterable[str]) -> dict[str, list[str]]:
    """Pattern -> the names it matches, fused names included, in the order of `names`."""
    present = dict.fromkeys(names)
    found: dict[str, list[str]] = {}
    for name in present:
        leaf = name.rpartition(".")[2]
        parent = name.removesuffix(leaf)
        leaves: tuple[str, ...] = (leaf,)
        for fused, parts in FUSED.items():
            # With only some of them dense the fused matrix is neither dense nor quantized: no rule can say that.
            if leaf in parts and all(parent + part in present for part in parts):
                leaves = (*parts, fused)
        ending = re.escape(leaf) if len(leaves) == 1 else f"({'|'.join(leaves)})"
        found[f"{re.escape(parent)}{ending}$"] = [parent + each for each in leaves]
    return found


def _kept_rules(recipe: Recipe, kept: Iterable[str]) -> list[Rule]:
    """A rule for every kept layer that the recipe does not keep dense already, under its own and its fused name.

    They go before the recipe's own rules: one of those may be the reason that a reader would expect a packed layer.
    """
    return [
        Rule(pattern, None)
        for pattern, names in _patterns(kept).items()
        if any(recipe.scheme_of(name) is not None for name in names)
    ]


def _dynamic_rules(config: Json, base: Json) -> list[Rule]:
    """The rules of `dynamic`, each scheme being `base` with the rule's overrides on top."""
    rules = []
    for key, overrides in (config.get("dynamic") or {}).items():
        where = f"quantization_config, dynamic rule {key!r}"
        dense = key.startswith("-:")
        if not dense and not isinstance(overrides, dict):
            raise CheckpointError(f"{where}: the overrides are {overrides!r}, expected an object; correct config.json")
        pattern = key.removeprefix("-:" if dense else "+:")
        known = {} if dense else {name: value for name, value in overrides.items() if name in KEYS}
        try:
            rules.append(Rule(pattern, None if dense else _scheme({**base, **known}, where)))
        except UsageError as error:
            raise CheckpointError(f"{where}: {error}; correct config.json") from None
    return rules


def _unlisted(config: Json) -> list[Rule]:
    """A rule that keeps every layer dense whose name does not end with an entry of `modules_in_block_to_quantize`.

    The list may be nested, one list per step. The output head is no part of a block: the list says nothing about it.
    """
    listed = config.get("modules_in_block_to_quantize") or []
    suffixes = [suffix for entry in listed for suffix in ([entry] if isinstance(entry, str) else entry)]
    if not suffixes:
        return []
    return [Rule.all_but([*suffixes, "lm_head"])]
