"""`quantization_config`: ours comes back exactly, the community's is understood, what cannot be read is refused."""

import json
import re

import pytest

from wellrounded import __version__
from wellrounded.core.recipe import Recipe, Rule
from wellrounded.core.scheme import Scheme
from wellrounded.errors import CheckpointError, UsageError
from wellrounded.formats.config import Stored, from_config, patterns_for, to_config, version_for

BLOCK = "model.layers.3"
ATTENTION = [f"{BLOCK}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]


def first_match(dynamic: dict, name: str) -> str | None:
    """The rule a serving engine applies to this module."""
    return next((key for key in dynamic if re.match(key[2:], name)), None)


def test_a_plain_recipe_becomes_what_every_reader_knows():
    assert to_config(Recipe(Scheme(bits=4, group_size=64)), "gptq") == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "static_groups": True,
        "meta": {"quantizer": [f"wellrounded:{__version__}"]},
    }


def test_meta_is_added_beside_the_tool():
    config = to_config(Recipe(Scheme()), "gptq", meta={"damp_percent": 0.01})
    assert config["meta"] == {"quantizer": [f"wellrounded:{__version__}"], "damp_percent": 0.01}


def test_a_stored_group_index_is_never_declared_ignorable():
    by_default = to_config(Recipe(Scheme(act_order=True)), "gptq")
    by_rule = to_config(Recipe(Scheme(), (Rule(".*down_proj", Scheme(act_order=True)),)), "gptq")
    assert by_default["desc_act"] and not by_default["static_groups"]
    assert not by_rule["desc_act"] and not by_rule["static_groups"]


RECIPES = [
    Recipe(Scheme()),
    Recipe(Scheme(bits=3, group_size=-1, symmetric=False, act_order=True)),
    Recipe.of(Scheme(bits=8), ["down_proj", r"layers\.0\."]),
    Recipe(
        Scheme(bits=4, group_size=64),
        (
            Rule(r".*\.0\.mlp\.down_proj", Scheme(bits=8, group_size=32)),
            Rule(r".*router", None),
            Rule(r"-:odd", Scheme(bits=2, group_size=64, symmetric=False)),
            Rule(r"\+:odder", None),
            Rule(r".*down_proj", Scheme(bits=4, group_size=64)),
        ),
    ),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_our_own_configuration_comes_back_exactly(recipe, version):
    config = json.loads(json.dumps(to_config(recipe, version)))
    assert from_config(config) == Stored(recipe, version, lm_head=False)


def test_asymmetric_schemes_are_written_as_v2():
    assert version_for(Scheme()) == version_for(Scheme(), None) == "gptq"
    assert version_for(Scheme(symmetric=False)) == version_for(Scheme(), Scheme(symmetric=False)) == "gptq_v2"


def test_only_known_versions_are_written():
    with pytest.raises(UsageError, match=r"'marlin'.*use 'gptq' or 'gptq_v2'"):
        to_config(Recipe(Scheme()), "marlin")


def test_a_kept_layer_gets_an_exact_rule():
    dynamic = to_config(Recipe(Scheme()), "gptq", kept=[f"{BLOCK}.mlp.down_proj"])["dynamic"]
    assert dynamic == {r"-:model\.layers\.3\.mlp\.down_proj$": {}}
    for other in ("model.layers.33.mlp.down_proj", "model.layers.3.mlp.down_proj2", "x.model.layers.3.mlp.down_proj"):
        assert first_match(dynamic, other) is None


def test_siblings_that_are_all_kept_share_a_rule_with_their_fused_name():
    kept = [*ATTENTION, f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.gate_proj"]
    dynamic = to_config(Recipe(Scheme()), "gptq", kept=kept)["dynamic"]
    assert list(dynamic) == [
        r"-:model\.layers\.3\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$",
        r"-:model\.layers\.3\.self_attn\.o_proj$",
        r"-:model\.layers\.3\.mlp\.(gate_proj|up_proj|gate_up_proj)$",
    ]
    for name in (*kept, f"{BLOCK}.self_attn.qkv_proj", f"{BLOCK}.mlp.gate_up_proj"):
        assert first_match(dynamic, name)
    assert first_match(dynamic, "model.layers.4.self_attn.qkv_proj") is None


def test_siblings_that_are_partly_kept_do_not_claim_the_fused_name():
    dynamic = to_config(Recipe(Scheme()), "gptq", kept=ATTENTION[:2])["dynamic"]
    assert first_match(dynamic, ATTENTION[0]) and first_match(dynamic, ATTENTION[1])
    assert first_match(dynamic, ATTENTION[2]) is None
    assert first_match(dynamic, f"{BLOCK}.self_attn.qkv_proj") is None


def test_a_kept_layer_wins_over_a_rule_that_would_have_packed_it():
    recipe = Recipe(Scheme(), (Rule(".*down_proj", Scheme(bits=8)),))
    config = to_config(recipe, "gptq", kept=[f"{BLOCK}.mlp.down_proj"])
    assert first_match(config["dynamic"], f"{BLOCK}.mlp.down_proj").startswith("-:")
    read = from_config(config).recipe
    assert read.scheme_of(f"{BLOCK}.mlp.down_proj") is None
    assert read.scheme_of("model.layers.4.mlp.down_proj") == Scheme(bits=8)


def test_a_kept_layer_that_the_recipe_names_already_needs_no_second_rule():
    recipe = Recipe.of(Scheme(), ["router", "q_proj", "k_proj", "v_proj"])
    kept = [f"{BLOCK}.mlp.router", *ATTENTION]
    dynamic = to_config(recipe, "gptq", kept=kept)["dynamic"]
    assert not any("layers" in key and "router" in key for key in dynamic)
    assert first_match(dynamic, f"{BLOCK}.self_attn.qkv_proj")  # which the recipe's own patterns miss
    again = from_config(to_config(from_config(to_config(recipe, "gptq", kept)).recipe, "gptq", kept)).recipe
    assert again == from_config(to_config(recipe, "gptq", kept)).recipe


def test_names_with_special_characters_match_only_themselves():
    (pattern,) = patterns_for(["blocks[0].a+b"])
    assert re.match(pattern, "blocks[0].a+b") and not re.match(pattern, "blocks0.aab")
    assert patterns_for(["q_proj", "q_proj"]) == ["q_proj$"]


def test_an_autogptq_configuration_is_v1():
    stored = from_config(
        {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.1,
            "desc_act": True,
            "sym": False,
            "true_sequential": False,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
            "is_marlin_format": False,
        }
    )
    assert stored == Stored(Recipe(Scheme(4, 128, symmetric=False, act_order=True)), "gptq", lm_head=False)


def test_what_is_left_out_has_its_customary_value():
    assert from_config({"quant_method": "gptq", "bits": 8, "group_size": -1}) == Stored(
        Recipe(Scheme(8, -1, symmetric=True, act_order=False)), "gptq", lm_head=False
    )


@pytest.mark.parametrize(
    ("keys", "version"),
    [
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "gptq"),
        ({"checkpoint_format": None, "format": "gptq_v2"}, "gptq_v2"),
    ],
)
def test_checkpoint_format_wins_over_format(keys, version):
    assert from_config({"bits": 4, "group_size": 64, **keys}).version == version


def test_a_quantized_head_is_reported():
    assert from_config({"bits": 4, "group_size": 64, "lm_head": True}).lm_head


def test_dynamic_rules_lie_on_top_of_the_base():
    recipe = from_config(
        {
            "bits": 4,
            "group_size": 128,
            "sym": False,
            "dynamic": {
                r"-:.*\.attn\..*": {},
                r".*\.18\..*gate.*": {"bits": 8, "damp_percent": 0.005},
                r"+:.*\.19\..*": {"group_size": 32, "desc_act": True, "sym": True},
                r"-:.*visual.*": None,
            },
        }
    ).recipe
    base = Scheme(4, 128, symmetric=False)
    assert recipe.scheme_of("model.layers.0.mlp.gate") == base
    assert recipe.scheme_of("model.layers.18.attn.gate") is None  # the first match wins
    assert recipe.scheme_of("model.layers.18.mlp.gate") == Scheme(8, 128, symmetric=False)
    assert recipe.scheme_of("model.layers.19.mlp.up") == Scheme(4, 32, symmetric=True, act_order=True)
    assert recipe.scheme_of("model.visual.blocks.0.mlp.up") is None


@pytest.mark.parametrize(
    "listed", [["self_attn.q_proj", "mlp.up_proj"], [["self_attn.q_proj"], ["mlp.up_proj"]]], ids=["flat", "nested"]
)
def test_layers_that_are_not_listed_stay_dense(listed):
    recipe = from_config({"bits": 4, "group_size": 64, "modules_in_block_to_quantize": listed}).recipe
    assert recipe.scheme_of(f"{BLOCK}.self_attn.q_proj") == Scheme(4, 64)
    assert recipe.scheme_of(f"{BLOCK}.mlp.up_proj") == Scheme(4, 64)
    assert recipe.scheme_of(f"{BLOCK}.self_attn.o_proj") is None
    assert recipe.scheme_of(f"{BLOCK}.cross_self_attn.q_proj") is None
    assert recipe.scheme_of("lm_head") == Scheme(4, 64)
    assert from_config(to_config(recipe, "gptq")).recipe == recipe


GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"quant_method": "awq"}, ["quant_method is 'awq'", "expected 'gptq'", "load this model with transformers"]),
        ({"checkpoint_format": "marlin"}, ["checkpoint_format is 'marlin'", "quantize the original model again"]),
        ({"is_marlin_format": True}, ["checkpoint_format is 'marlin'", "quantize the original model again"]),
        ({"format": "gptq_p"}, ["'gptq_p'", "expected 'gptq' or 'gptq_v2'", "the tool that wrote"]),
        ({"pack_dtype": "int64"}, ["pack_dtype is 'int64'", "expected 'int32'", "quantize the original"]),
        ({"bits": 5}, ["bits=5", "2, 3, 4 or 8", "quantize the original"]),
        ({"bits": "4"}, ["bits is '4'", "expected int", "correct config.json"]),
        ({"group_size": 20}, ["group_size=20", "quantize the original"]),
        ({"group_size": None}, ["group_size is None", "expected int"]),
        ({"sym": "false"}, ["sym is 'false'", "expected bool"]),
        ({"dynamic": {"+:.*up": {"bits": 6}}}, ["dynamic rule '+:.*up'", "bits=6", "2, 3, 4 or 8"]),
        ({"dynamic": {"+:.*up": {"desc_act": 1}}}, ["dynamic rule '+:.*up'", "desc_act is 1", "expected bool"]),
        ({"dynamic": {".*up": 8}}, ["dynamic rule '.*up'", "overrides are 8", "correct config.json"]),
        ({"dynamic": {"-:*up": {}}}, ["dynamic rule '-:*up'", "not a regular expression", "correct config.json"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_read_is_refused_with_advice(changes, parts):
    with pytest.raises(CheckpointError) as caught:
        from_config({**GOOD, **changes})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_bits_and_group_size_are_required(key):
    config = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(CheckpointError, match=f"no {key}; add the value"):
        from_config(config)
