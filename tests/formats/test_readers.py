"""What we say about who will not load a checkpoint."""

from wellrounded.core.scheme import Scheme
from wellrounded.formats.readers import objections

NAME = "model.layers.0.mlp.down_proj"


def say(scheme: Scheme, inputs: int = 256, kept: tuple[str, ...] = ()) -> str:
    return " | ".join(objections({NAME: scheme}, {NAME: inputs}, kept))


def test_nobody_objects_to_the_default() -> None:
    assert say(Scheme()) == ""
    assert say(Scheme(8, 32)) == ""
    assert say(Scheme(4, -1)) == ""


def test_each_limit_of_the_engines_is_named() -> None:
    assert "4 and 8 bits only, not 3" in say(Scheme(3))
    assert "symmetric" in say(Scheme(symmetric=False))
    assert "not 96" in say(Scheme(4, 96))
    assert "128 does not divide 576" in say(Scheme(4, 128), inputs=576)
    assert "desc_act" in say(Scheme(act_order=True))


def test_an_objection_is_made_once_however_many_layers_cause_it() -> None:
    schemes = {f"model.layers.{i}.mlp.down_proj": Scheme(3) for i in range(5)}
    assert len(objections(schemes, dict.fromkeys(schemes, 256), ())) == 1


def test_siblings_that_engines_fuse_must_be_kept_together() -> None:
    layers = {f"model.layers.0.self_attn.{leaf}": Scheme() for leaf in ("k_proj", "v_proj")}
    some = objections(layers, dict.fromkeys(layers, 256), ["model.layers.0.self_attn.q_proj"])
    assert len(some) == 1 and "qkv_proj" in some[0]
    assert objections({NAME: Scheme()}, {NAME: 256}, ["model.layers.0.self_attn.q_proj"]) == []
