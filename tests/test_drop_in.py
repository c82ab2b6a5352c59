"""Code written for transformers' GPTQConfig, and for loading in 4 bits, runs on this engine unchanged."""

import json
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

import hub
import tiny
import wellrounded as wr
from wellrounded import native
from wellrounded.checkpoint import Reader
from wellrounded.errors import UsageError
from wellrounded.nn import QuantLinear
from wellrounded.presets import preset

ROWS = tiny.ids(80).tolist()
USUAL = "torch-int4" if native.missing() else "cpu"  # the kernel of a layer of 4 bits that nobody asked for another


def layers(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.fixture
def registered():
    wr.register()


def load(source, *, config=None, **options):
    """transformers' own call, which says nothing but what a test expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if config is not None:
            options["quantization_config"] = config
        return AutoModelForCausalLM.from_pretrained(source, **options)


def assert_same_layers(model, directory) -> None:
    """The packed layers of a model are those of a finished checkpoint, bit by bit."""
    stored = load_file(directory / "model.safetensors")
    mine = layers(model)
    assert {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")} == mine.keys()
    for name, layer in mine.items():
        assert all(torch.equal(tensor, stored[f"{name}.{key}"]) for key, tensor in layer.tensors().items())


# ---- quantizing while loading ----


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_a_gptq_config_quantizes_as_the_command_does(llama, registered, tmp_path, device_map):
    config = GPTQConfig(bits=4, dataset=ROWS, tokenizer=tiny.tokenizer(), model_seqlen=tiny.LENGTH)
    model = load(llama, config=config, device_map=device_map, max_memory={"cpu": "1GiB"} if device_map else None)
    tiny.quantize(llama, tmp_path / "out", calibration=ROWS, samples=128)
    assert len(layers(model)) == 21
    assert_same_layers(model, tmp_path / "out")
    assert torch.equal(tiny.logits(model), tiny.logits(wr.load(tmp_path / "out")))
    found, stored = model.hf_quantizer.report, json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert found.fidelity == pytest.approx(stored["fidelity"]) and found.problems() == []


@pytest.mark.parametrize(
    ("wish", "same"),
    [
        ({"bits": 3}, {"bits": 3}),
        ({"group_size": 32}, {"group_size": 32}),
        ({"sym": False}, {"sym": False}),
        ({"desc_act": True}, {"act_order": True}),
        ({"damp_percent": 0.1}, {"settings": replace(preset("default").settings, damping=0.1)}),
        ({"true_sequential": False}, {"settings": replace(preset("default").settings, true_sequential=False)}),
        ({"model_seqlen": 16}, {"length": 16}),
        (
            {"modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]},
            {"ignore": ["q_proj", "o_proj", "gate_proj", "up_proj"]},
        ),
    ],
    ids=lambda wish: next(iter(wish), "nothing") if isinstance(wish, dict) else None,
)
def test_what_a_gptq_config_asks_for_is_what_is_done(llama, registered, tmp_path, wish, same):
    wish = {"bits": 4, "model_seqlen": tiny.LENGTH, **wish}
    model = load(llama, config=GPTQConfig(dataset=ROWS, tokenizer=str(llama), **wish))
    tiny.quantize(llama, tmp_path / "out", **{"calibration": ROWS, "samples": 128, **same})
    assert_same_layers(model, tmp_path / "out")
    tiny.quantize(llama, tmp_path / "usual", calibration=ROWS, samples=128)
    same_as_usual = (tmp_path / "usual" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert not same_as_usual, "the wish must make a difference"


def test_windows_per_forward_are_those_asked_for(llama, registered, monkeypatch):
    sizes = set()
    forward = transformers.LlamaForCausalLM.forward
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "forward",
        lambda self, input_ids, **rest: sizes.add(len(input_ids)) or forward(self, input_ids, **rest),
    )  # fmt: skip
    load(llama, config=GPTQConfig(4, dataset=ROWS, tokenizer=str(llama), model_seqlen=tiny.LENGTH, batch_size=7))
    assert max(sizes) == 7


@pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new"])
def test_a_data_set_is_taken_by_its_name(llama, registered, monkeypatch, name):
    asked = []

    def load_dataset(path, *names, **options):
        asked.append(path)
        return [{"text": tiny.TEXT * 20}] * 40

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    model = load(llama, config=GPTQConfig(bits=4, dataset=name, model_seqlen=tiny.LENGTH))
    assert asked == ["Salesforce/wikitext" if name == "wikitext2" else "allenai/c4"]
    assert model.hf_quantizer.report.calibration["windows"] == 128


def test_one_sentence_is_taken_and_said_to_be_little(llama, registered):
    sentence = "auto-gptq is an easy-to-use model quantization library with user-friendly apis."
    with pytest.warns(UserWarning, match=r"calibrated on \d+ tokens, hardly better than plain rounding; give 2,048"):
        model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=GPTQConfig(bits=4, dataset=[sentence]))
    assert len(layers(model)) == 21 and model.hf_quantizer.report.coverage()["gptq"] > 0.5


def test_what_has_no_meaning_is_said_once_and_what_was_not_given_is_not_mentioned(llama, registered):
    config = GPTQConfig(bits=4, dataset=None, cache_block_outputs=False, pad_token_id=0, flavour="lemon")
    with pytest.warns(UserWarning) as caught:
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert [str(warning.message) for warning in caught] == [
        "GPTQConfig: without meaning here, and ignored: cache_block_outputs (they always are), "
        "pad_token_id (windows are packed, or carry a mask), flavour (unknown)"
    ]


def test_neither_texts_nor_tokenizer_end_up_in_a_file(llama, registered, tmp_path):
    secret = "nobody else shall read this " * 400
    config = GPTQConfig(bits=4, dataset=[secret], tokenizer=tiny.tokenizer(), model_seqlen=tiny.LENGTH)
    load(llama, config=config).save_pretrained(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.json"):
        assert "nobody else" not in path.read_text()
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert not {"dataset", "tokenizer", "_given"} & stored.keys() and stored["bits"] == 4
    assert "_given" not in config.to_dict() and "_given" not in repr(config)


@pytest.mark.parametrize(
    ("wish", "options", "message"),
    [
        ({"modules_in_block_to_quantize": [["mlp.sideways"]]}, {}, "only 'mlp.sideways' was asked for, but no layer's"),
        ({"model_seqlen": 4096}, {}, "length=4096 was asked for, but the model reads at most 256 tokens"),
        ({"group_size": 4096}, {}, "group_size=4096 was asked for, but the widest layer has 128 inputs"),
        ({"backend": "fastest"}, {}, "'fastest' was asked for; there are auto, triton, cpu, torch-int4, reference"),
        ({"tokenizer": "no/such/thing"}, {}, "calibration needs a tokenizer; give GPTQConfig one, 'no/such/thing' has"),
        ({"tokenizer": 5}, {}, "tokenizer is a int; give a tokenizer, or the name of one"),
        ({}, {"device_map": {"model": "disk", "lm_head": "cpu"}}, "the device map puts layers on disk, where only a"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(llama, registered, wish, options, message):
    with pytest.raises(UsageError, match=message):
        load(llama, config=GPTQConfig(**{"bits": 4, "dataset": ["some text " * 500], **wish}), **options)


def test_a_model_that_predicts_no_tokens_is_refused(llama, registered):
    with pytest.raises(UsageError, match="LlamaModel has no head to predict tokens with"):
        transformers.AutoModel.from_pretrained(llama, quantization_config=GPTQConfig(bits=4))


def test_transformers_is_itself_again_afterwards():
    model = transformers.PreTrainedModel
    owners = [(GPTQConfig, "__init__"), (GPTQConfig, "to_dict"), (model, "save_pretrained"), (model, "push_to_hub"),
              (transformers.modeling_utils, "get_hf_quantizer")]  # fmt: skip
    before = [(getattr(owner, name), name in vars(owner)) for owner, name in owners]
    wr.register()
    assert GPTQConfig(bits=4, modules_in_block_to_quantize=[["q_proj"]]).modules_in_block_to_quantize == [["q_proj"]]
    assert GPTQConfig(bits=4, use_exllama=False).backend == "reference"
    assert all(getattr(owner, name) is not old for (owner, name), (old, _) in zip(owners, before))
    wr.unregister()
    assert [(getattr(owner, name), name in vars(owner)) for owner, name in owners] == before
    assert GPTQConfig(bits=4, use_exllama=False).backend == "auto"


# ---- the kernel ----


@pytest.mark.parametrize(
    ("wish", "kernels"),
    [
        ({"backend": "reference"}, {"reference"}),
        ({"backend": "torch"}, {"reference"}),
        ({"use_exllama": False}, {"reference"}),
        ({"disable_exllama": True}, {"reference"}),
        ({"backend": "torch-int4", "use_exllama": False}, {"torch-int4"}),
        ({"backend": "auto"}, {USUAL}),
        ({"use_exllama": True, "exllama_config": {"version": 2}}, {USUAL}),
        ({}, {USUAL}),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_the_kernel_is_the_one_asked_for_whatever_the_file_says(quantized, copy_of, registered, wish, kernels):
    copy = copy_of(quantized)
    change_config(copy, use_exllama=False, backend="marlin")
    model = AutoModelForCausalLM.from_pretrained(copy, quantization_config=GPTQConfig(bits=4, **wish))
    assert {layer.kernel for layer in layers(model).values()} == kernels
    dense = AutoModelForCausalLM.from_pretrained(copy)
    assert {layer.kernel for layer in layers(dense).values()} == {USUAL}


def change_config(directory, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_another_tools_kernel_is_named_and_replaced(quantized, registered):
    with pytest.warns(UserWarning, match=r"backend='marlin' is another tool's kernel; each layer takes the best"):
        AutoModelForCausalLM.from_pretrained(quantized, quantization_config=GPTQConfig(bits=4, backend="marlin"))


@pytest.mark.parametrize("buffers", [True, False])
def test_offloaded_layers_compute_from_the_files_own_layout(quantized, registered, tmp_path, buffers):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(quantized, device_map=places, offload_folder=tmp_path / "scratch", offload_buffers=buffers)
    on_disk = [layer for name, layer in layers(model).items() if "layers.0" not in name]
    assert {layer.qweight.device.type for layer in on_disk} == ({"meta"} if buffers else {"cpu"})
    expected = tiny.logits(wr.load(quantized, kernel="reference"))
    for _ in range(2):
        assert torch.equal(tiny.logits(model), expected)
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(wr.load(tmp_path / "saved", kernel="reference")), expected)
    with pytest.raises(UsageError, match=r"'torch-int4' was asked for, but model\.layers\.1\.\S+ is offloaded"):
        wr.load(quantized, kernel="torch-int4", device_map=places, offload_folder=tmp_path / "scratch")


def test_an_offloaded_layer_without_a_group_index_is_refused(quantized, copy_of, tmp_path):
    copy = copy_of(quantized)
    with tiny.rewritten(copy) as tensors:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]
    with pytest.raises(UsageError, match="its files hold no g_idx to load with it; load and save the model once"):
        wr.load(copy, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "scratch")


# ---- saving and pushing ----


@pytest.mark.parametrize("moved", [True, False])
def test_what_was_quantized_while_loading_is_saved_whole(llama, registered, tmp_path, moved):
    model = load(llama, config=GPTQConfig(bits=4, dataset=ROWS, tokenizer=str(llama), model_seqlen=tiny.LENGTH))
    if moved:
        model = model.to("cpu")
    model.save_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors",
                     "quantization_report.json", "quantize_config.json"}  # fmt: skip
    assert torch.equal(tiny.logits(wr.load(tmp_path / "out")), tiny.logits(model))
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "KL to original" in (tmp_path / "out" / "README.md").read_text()
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored == json.loads((tmp_path / "out" / "quantize_config.json").read_text())


def test_what_was_loaded_is_saved_with_what_was_said_of_it(quantized, tmp_path):
    wr.load(quantized).save_pretrained(tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name in ("README.md", "quantization_report.json", "quantize_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (quantized / name).read_bytes()
    assert torch.equal(tiny.logits(wr.load(tmp_path / "out")), tiny.logits(wr.load(quantized)))


def test_a_model_without_a_report_gets_a_short_card(quantized, copy_of, tmp_path):
    copy = copy_of(quantized)
    (copy / "README.md").unlink()
    (copy / "quantization_report.json").unlink()
    wr.load(copy).save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A model in the GPTQ format, 4 bits, groups of 64." in card and "tags: [gptq, 4-bit, wellrounded]" in card


def test_dense_models_are_saved_as_ever(llama, registered, tmp_path):
    load(llama).save_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


PUSH = """if True:
    import sys
    import torch, transformers, tiny
    import wellrounded as wr
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, GPTQConfig

    wr.register()
    source, old = sys.argv[1:]
    config = GPTQConfig(bits=4, dataset=tiny.ids(80).tolist(), tokenizer=source, model_seqlen=32)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="auto")
    model.push_to_hub("someone/packed", tags=["tasty"])
    tiny.tokenizer().push_to_hub("someone/packed")
    expected = tiny.logits(model)
    for again in (AutoModelForCausalLM.from_pretrained("someone/packed"), wr.load("someone/packed")):
        assert torch.equal(tiny.logits(again), expected)

    api = HfApi()
    api.create_repo("someone/carded")
    api.upload_file(repo_id="someone/carded", path_in_repo="README.md", path_or_fileobj=b"# Mine")
    wr.load("someone/packed").save_pretrained(sys.argv[2] + "/here", push_to_hub=True, repo_id="someone/carded")

    api.create_repo("someone/old-GPTQ")
    api.upload_folder(repo_id="someone/old-GPTQ", folder_path=old)
    model = AutoModelForCausalLM.from_pretrained("someone/old-GPTQ", device_map="auto")
    assert torch.equal(tiny.logits(model), tiny.logits(wr.load(old)))

    from wellrounded.autogptq import AutoGPTQForCausalLM
    model = AutoGPTQForCausalLM.from_quantized("someone/old-GPTQ", device="cpu", use_triton=False)
    model.push_to_hub("someone/again", use_auth_token=True, commit_message="from AutoGPTQ's names", private=True)
    assert torch.equal(tiny.logits(wr.load("someone/again")), tiny.logits(wr.load(old)))
"""


def test_models_go_to_the_hub_with_their_own_card_and_come_back(llama, quantized, copy_of, tmp_path):
    old = as_autogptq_laid_it_out(copy_of(quantized, "old"))
    with hub.serve(tmp_path / "hub") as server:
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(llama), str(old)], env=server.environment(tmp_path / "home"),
            cwd=hub.__file__.rpartition("/")[0], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not server.unknown
        pushed = server.root / "someone" / "packed"
    assert {"README.md", "config.json", "model.safetensors", "quantize_config.json", "quantization_report.json",
            "tokenizer.json"} <= {path.name for path in pushed.iterdir()}  # fmt: skip
    card = (pushed / "README.md").read_text()
    assert "# packed" in card and "KL to original" in card and "tasty" in card
    carded = server.root / "someone" / "carded"
    assert (carded / "README.md").read_text() == "# Mine", "a card that is there already stays"
    assert (carded / "model.safetensors").read_bytes() == (pushed / "model.safetensors").read_bytes()


# ---- checkpoints of the community ----


def as_autogptq_laid_it_out(directory, sharded: bool = False):
    """No quantization in config.json, and weights under AutoGPTQ's own name."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    stored = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    old = {key: stored[key] for key in ("bits", "group_size", "desc_act", "sym")}
    old |= {"damp_percent": 0.01, "static_groups": False, "true_sequential": True, "model_name_or_path": None,
            "model_file_base_name": "gptq_model-4bit-64g"}  # fmt: skip
    (directory / "quantize_config.json").write_text(json.dumps(old))
    for name in ("README.md", "quantization_report.json"):
        (directory / name).unlink(missing_ok=True)
    for file in list(directory.glob("model*")):
        text = file.name.replace("model", "gptq_model-4bit-64g", 1)
        if file.suffix == ".json":
            file.write_text(file.read_text().replace("model-0", "gptq_model-4bit-64g-0"))
        file.rename(directory / text)
    return directory


@pytest.mark.parametrize("shards", [True, False])
def test_what_autogptq_laid_out_loads_by_every_door(quantized, copy_of, tmp_path, shards):
    if shards:
        wr.load(quantized).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    old = as_autogptq_laid_it_out(copy_of(tmp_path / "shards" if shards else quantized, "old"))
    assert not (old / "model.safetensors").exists()
    wr.register()
    expected = tiny.logits(wr.load(quantized))
    for model in (load(old), load(old, device_map="auto"), wr.load(old)):
        assert len(layers(model)) == 21 and torch.equal(tiny.logits(model), expected)
    load(old).save_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(load(tmp_path / "saved")), expected)
    assert "transformers_weights" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize(
    "old",
    [
        {"use_exllama": True, "exllama_config": {"version": 2}, "max_input_length": None},
        {"disable_exllama": False, "use_cuda_fp16": True},
        {"is_marlin_format": False, "model_name_or_path": "x", "model_file_base_name": "model"},
        {"dataset": "c4", "tokenizer": None, "batch_size": 1, "damp_percent": 0.1, "pad_token_id": None,
         "block_name_to_quantize": "model.layers", "module_name_preceding_first_block": ["model.embed_tokens"],
         "cache_block_outputs": True, "modules_in_block_to_quantize": None, "model_seqlen": 4096},
        {"modules_in_block_to_quantize": [
            ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.o_proj"],
            ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]},
        {"damp_percent": None, "backend": "exllama_v2", "meta": {"quantizer": ["optimum:1.24", "gptqmodel:2.0"]}},
    ],
)  # fmt: skip
def test_keys_of_older_tools_do_no_harm_and_stay(quantized, copy_of, registered, tmp_path, old):
    copy = copy_of(quantized)
    change_config(copy, **old)
    model = load(copy)
    assert torch.equal(tiny.logits(model), tiny.logits(wr.load(quantized)))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert {key: saved.get(key) for key in old} == {**old, **dict.fromkeys({"dataset", "tokenizer"} & old.keys())}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", [{}, {"sym": False}, {"act_order": True}], ids=str)
def test_every_width_version_and_order_loads(llama, registered, tmp_path, bits, scheme):
    tiny.quantize(llama, tmp_path / "out", bits=bits, group_size=32, **scheme)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["checkpoint_format"] == ("gptq_v2" if scheme == {"sym": False} else "gptq")
    model = load(tmp_path / "out", device_map="auto")
    expected = tiny.logits(tiny.twin(wr.load(llama), tmp_path / "out"))
    for layer in layers(model).values():
        layer.wanted_kernel = "reference"
        layer.bind(torch.bfloat16)
    assert len(layers(model)) == 21 and torch.equal(tiny.logits(model), expected)


def test_a_missing_tensor_is_an_error_by_transformers_own_door_too(quantized, copy_of, registered):
    copy = copy_of(quantized)
    with tiny.rewritten(copy) as tensors:
        del tensors["model.layers.1.mlp.up_proj.qweight"]
    with pytest.raises(wr.CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.qweight is missing"):
        load(copy)


# ---- without data ----


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_dense_model_is_packed_while_it_is_loaded(llama, tmp_path, bits):
    model = wr.load(llama, bits=bits)
    tiny.quantize(llama, tmp_path / "out", bits=bits, calibration="none")
    assert_same_layers(model, tmp_path / "out")
    assert torch.equal(tiny.logits(model), tiny.logits(wr.load(tmp_path / "out")))
    by_config = load(llama, config=GPTQConfig(bits=bits, dataset=None), device_map="auto")
    assert torch.equal(tiny.logits(by_config), tiny.logits(model))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(wr.load(tmp_path / "saved")), tiny.logits(model))


@pytest.mark.parametrize(("habit", "bits"), [({"load_in_4bit": True}, 4), ({"load_in_8bit": True}, 8)])
def test_the_old_habit_works(llama, habit, bits):
    assert {layer.scheme.bits for layer in layers(wr.load(llama, **habit)).values()} == {bits}
    grouped = wr.load(llama, **habit, group_size=32, sym=False, dtype=torch.float32, kernel="reference")
    assert {str(layer.scheme) for layer in layers(grouped).values()} == {f"{bits}-bit g32 asym"}
    assert grouped.dtype == torch.float32 and {layer.kernel for layer in layers(grouped).values()} == {"reference"}


def test_the_dense_model_never_is_in_memory_as_a_whole(llama, monkeypatch):
    """Of the weights that are packed, those of one block at most are alive at a time, whoever reads them."""
    alive, most, read = weakref.WeakSet(), 0, Reader.read

    def counting(self, name):
        nonlocal most
        tensor = read(self, name)
        if ".layers." in name and tensor.ndim == 2:
            alive.add(tensor.untyped_storage())
            most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Reader, "read", counting)
    model = wr.load(llama, bits=4)
    assert len(layers(model)) == 21 and 0 < most <= 8, "7 layers, and one that is being read again"
    names = [name for name, tensor in model.state_dict().items() if tensor.ndim == 2 and tensor.is_floating_point()]
    assert all(name.endswith("scales") or "layers" not in name for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 was asked for; the GPTQ format holds 2, 3, 4 or 8 bits"),
        ({"group_size": 32}, "group_size=32 was asked for without bits; say bits=4"),
        ({"bits": 4, "kernel": "fast"}, "no kernel is called 'fast'"),
        ({"bits": 8, "kernel": "torch-int4"}, "'torch-int4' was asked for, but it holds at most 4 bits"),
    ],
)
def test_packing_that_cannot_be_done_is_refused(llama, options, message):
    with pytest.raises(UsageError, match=message):
        wr.load(llama, **options)


def test_what_is_quantized_already_is_not_packed_again(quantized):
    with pytest.raises(UsageError, match="bits=4 was asked for, but it is quantized already; leave it out"):
        wr.load(quantized, bits=4)


# ---- and back ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_dequantized_model_is_a_dense_one(kind, dtype, tmp_path):
    source = tiny.build(kind, torch.bfloat16)
    tiny.quantize(source, tmp_path / "out", group_size=32)
    packed = wr.load(tmp_path / "out", kernel="reference")
    expected = tiny.twin(source.to(torch.float32) if dtype == torch.float32 else source, tmp_path / "out")
    dense = packed.dequantize(dtype) if dtype else packed.dequantize()
    assert not layers(dense) and dense.dtype == (dtype or torch.bfloat16) and not hasattr(dense, "hf_quantizer")
    assert {type(a) for a in dense.modules()} == {type(b) for b in expected.modules()}
    for name, tensor in expected.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor), name
    assert torch.equal(tiny.logits(dense), tiny.logits(expected))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    wr.unregister()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert torch.equal(tiny.logits(again), tiny.logits(dense))
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_a_model_that_was_saved_can_be_dequantized_too(quantized, tmp_path):
    model = wr.load(quantized)
    model.save_pretrained(tmp_path / "saved")
    assert model.dequantize().dtype == torch.bfloat16


def test_an_offloaded_model_is_not_dequantized_in_part(quantized, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    model = wr.load(quantized, device_map=places, offload_folder=tmp_path)
    with pytest.raises(UsageError, match="is offloaded; load the model without offloading to dequantize it"):
        model.dequantize()
    assert len(layers(model)) == 21


def test_the_tokenizer_of_the_source_serves_where_none_is_given(llama, registered):
    model = load(llama, config=GPTQConfig(bits=4, dataset=[tiny.TEXT * 150], model_seqlen=tiny.LENGTH))
    tokens = len(AutoTokenizer.from_pretrained(llama)(tiny.TEXT * 150)["input_ids"])
    used = model.hf_quantizer.report.calibration
    assert 0.8 * tokens < used["tokens"] + used["held_out_tokens"] <= tokens
