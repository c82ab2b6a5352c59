"""A model's tensors under the names and in the shapes of its files: read, bit for bit, as the model has them."""

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

import tiny
import tiny_configs
import wellrounded as wr
from wellrounded.checkpoint import Reader
from wellrounded.errors import CheckpointError
from wellrounded.hf.source import open_source, skeleton
from wellrounded.hf.stored import Names, Stored
from wellrounded.model.blocks import linears
from wellrounded.model.experts import Experts, take_apart
from wellrounded.model.weights import materialize

KINDS = [kind for kind in tiny_configs.types() if kind not in tiny_configs.UNBUILDABLE]


def stored(directory, model):
    """The files of `directory` as a model of this kind finds them."""
    reader = Reader(directory)
    return Stored(skeleton(type(model), AutoConfig.from_pretrained(directory)), reader.places, reader.read)


def apart(model, like):
    """The model's own tensors, its experts taken apart as they are in `like`."""
    take_apart(model, {path: m.layout for path, m in like.named_modules() if isinstance(m, Experts)})
    return model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_read_as_the_model_has_it_and_nothing_is_left_over(kind, tmp_path):
    model = tiny_configs.build(kind)
    model.save_pretrained(tmp_path)
    found = stored(tmp_path, model)
    fused, names = Names(model), {name: found.packed_name(name) for name in linears(found.model)}
    for name, packed in names.items():
        assert found.names.in_model(f"{packed}.qweight", {f"{name}.qweight"}) == f"{name}.qweight"
        assert found.names.nearest(f"{packed}.qweight") == f"{name}.qweight"
        assert fused.nearest(f"{packed}.qweight") == f"{name}.qweight", "while the experts are still fused"
    wanted = apart(model, found.model)
    assert found.missing() == []
    for name in found.model.state_dict():
        assert torch.equal(found.read(name), wanted[name]), name
    for key in Reader(tmp_path).places:
        assert found.made[key] and set(found.made[key]) <= wanted.keys(), key


@pytest.mark.parametrize("kind", ["gpt_oss", "dbrx", "inkling2_text", "phi3", "mixtral"])
def test_each_stored_tensor_is_read_once_for_all_that_it_makes(kind, tmp_path):
    model = tiny_configs.build(kind)
    model.save_pretrained(tmp_path)
    found, read = stored(tmp_path, model), Counter()
    inner = found.read_stored
    found.read_stored = lambda key: read.update([key]) or inner(key)
    materialize(found.model, found.read)
    assert set(read) == set(Reader(tmp_path).places) and set(read.values()) == {1}


@pytest.mark.parametrize(
    ("kind", "leaves"),
    [("mixtral", ("w1", "w3", "w2")), ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")), ("gpt_oss", None),
     ("nemotron_h", ("up_proj", "down_proj")), ("inkling2_text", None), ("lfm2_moe", ("w1", "w3", "w2"))],
)  # fmt: skip
def test_projections_are_called_as_in_the_files_where_these_hold_experts_one_by_one(kind, leaves):
    model = tiny_configs.build(kind)
    paths = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    assert {Names(model).expert_leaves(path) for path in paths} == {leaves}


def test_experts_that_are_turned_around_on_the_way_have_no_names_of_their_own():
    names = Names(tiny.build("mixtral"))
    assert names.expert_leaves("model.layers.0.mlp.experts") == ("w1", "w3", "w2")
    for converter in names.converters:
        converter.operations.append(Transpose(1, 2))
    assert names.expert_leaves("model.layers.0.mlp.experts") is None


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_an_expert_that_the_files_lack_is_missed(kind, tmp_path):
    source = tiny.save(tiny_configs.build(kind), tmp_path / "source")
    lost = {"mixtral": "2.block_sparse_moe.experts.1.w2.weight", "deepseek_v3": "2.mlp.experts.1.up_proj.weight"}
    with tiny.rewritten(source) as tensors:
        del tensors[f"model.layers.{lost.get(kind, '1.mlp.experts.down_proj_bias')}"]
    named = {"mixtral": r"2\.mlp\.experts\.1\.w2\.weight", "deepseek_v3": r"2\.mlp\.experts\.1\.up_proj\.weight"}
    name = named.get(kind, r"1\.mlp\.experts\.0\.down_proj\.bias and 3 more tensors")
    with pytest.raises(CheckpointError, match=rf"none of its files has model\.layers\.{name}"):
        open_source(source)


def test_a_layer_that_would_be_loaded_under_no_name_is_refused():
    names = Names(tiny.build("llama"))
    names.converters = [WeightConverter("mlp.up_proj", ["mlp.left", "mlp.right"], [Chunk(dim=0)])]
    assert names.for_packed("model.layers.0.mlp.gate_proj") == "model.layers.0.mlp.gate_proj"
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.up_proj: no name in a file .*; ignore it"):
        names.for_packed("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v3", "gpt_oss"])
def test_what_the_model_does_not_know_is_kept_bit_for_bit(kind, tmp_path):
    """Layers that guess the tokens after the next one come as a block of another name, or as one block more."""
    model = tiny_configs.build(kind)
    last = model.config.num_hidden_layers - 1
    source, more = tiny.save(model.to(torch.bfloat16), tmp_path / "source"), {}
    with tiny.rewritten(source) as tensors:
        for name in [name for name in tensors if f"layers.{last}." in name]:
            for place in ("mtp.layers.0.", f"model.layers.{last + 1}."):
                more[name.replace(f"model.layers.{last}.", place)] = torch.randn_like(tensors[name])
        more |= {"mtp.layers.0.eh_proj.weight": torch.randn(64, 128), "mtp.norm.weight": torch.randn(64)}
        tensors |= more
    report = tiny.quantize(source, tmp_path / "out", group_size=32, calibration="none")
    assert report.problems() == []
    kept = tiny.tensors(tmp_path / "out")
    assert all(torch.equal(kept[name], tensor) and kept[name].dtype == tensor.dtype for name, tensor in more.items())
    expected = tiny.logits(wr.load(tmp_path / "out"))
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("there", [False, True])
def test_fused_experts_are_held_of_one_block_and_of_two_where_one_is_read_ahead(there, tmp_path, monkeypatch):
    model = tiny_configs.build("gpt_oss")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    found, blocks = stored(tmp_path, model), set()
    for name in found._pieces:
        found.read(name)
        blocks.add(name.split(".mlp")[0])
        held = {one.split(".mlp")[0] for one in found._held}
        assert name.split(".mlp")[0] in held and len(held) == min(len(blocks), 1 + there)
    assert len(blocks) > 1
