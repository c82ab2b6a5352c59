"""The whole path: what is quantized is what is stored, what is stored is what runs, and the report tells the truth."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
import wellrounded as wr
from wellrounded import blockwise
from wellrounded import evaluation as evaluate
from wellrounded.calibration import gather
from wellrounded.checkpoint import Reader
from wellrounded.core.scheme import BITS
from wellrounded.errors import CheckpointError, NumericsError, UsageError

LINEARS = [f"model.layers.{i}.{name}" for i in range(3) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)]  # fmt: skip


def dense(directory, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def read_all(directory) -> dict[str, torch.Tensor]:
    reader = Reader(directory)
    return {name: reader.read(name) for name in reader.places}


def weight_bytes(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors*"))}


def assert_runs_as_stored(out, model) -> None:
    """Loading the checkpoint gives, to the last bit, the dense model with its weights replaced one by one."""
    got = tiny.logits(wr.load(out, kernel="reference"))
    assert torch.equal(got, tiny.logits(tiny.twin(model, out)))
    assert not torch.equal(got, tiny.logits(model))


def one_block(**changes):
    return tiny.build("llama", torch.bfloat16, num_hidden_layers=1, **changes)


# ---- from wherever the model comes ----


@pytest.mark.parametrize("name", ["llama", "tied", "sharded"])
def test_a_directory_is_quantized_and_runs_as_stored(name, request, tmp_path):
    source = request.getfixturevalue(name)
    report = tiny.quantize(source, tmp_path / "out")
    assert [layer.name for layer in report.layers] == LINEARS
    assert set(tiny.stored_weights(tmp_path / "out")) == set(LINEARS)
    assert_runs_as_stored(tmp_path / "out", dense(source))


def test_shards_make_no_difference(quantized, sharded, tmp_path):
    tiny.quantize(sharded, tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == weight_bytes(quantized)


def test_a_model_in_memory_gives_what_its_directory_gives_and_is_left_untouched(llama, quantized, tmp_path):
    model = dense(llama).train()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    tiny.quantize(model, tmp_path / "out", tokenizer=tiny.tokenizer())
    after = model.state_dict()
    assert before.keys() == after.keys() and model.training
    assert all(after[n].data_ptr() == place and torch.equal(after[n], value) for n, (place, value) in before.items())
    assert all(p.requires_grad for p in model.parameters())
    got, wanted = read_all(tmp_path / "out"), read_all(quantized)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "generation_config.json").exists()
    assert wr.load(tmp_path / "out").config.architectures == ["LlamaForCausalLM"]


def test_a_tied_head_is_stored_once(tied, tmp_path):
    tiny.quantize(tied, tmp_path / "out")
    assert "lm_head.weight" not in Reader(tmp_path / "out").places
    model = wr.load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_float32_source_stays_float32_where_it_is_dense(tmp_path):
    source = tiny.save(tiny.build("llama", torch.float32), tmp_path / "source")
    tiny.quantize(source, tmp_path / "out")
    model = wr.load(tmp_path / "out")
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, dense(source).lm_head.weight)
    assert_runs_as_stored(tmp_path / "out", dense(source))


def test_a_float32_source_is_rounded_from_its_own_values(tmp_path):
    fine = one_block().float()
    with torch.no_grad():
        for p in fine.parameters():
            p.mul_(1.001)  # no longer what bfloat16 can hold
    tiny.quantize(fine, tmp_path / "fine", calibration="none")
    tiny.quantize(fine.bfloat16(), tmp_path / "coarse", calibration="none")
    one, other = tiny.stored_weights(tmp_path / "fine"), tiny.stored_weights(tmp_path / "coarse")
    assert any(not torch.equal(one[name].scales, other[name].scales) for name in one)


# ---- whatever is stored ----


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_scheme_runs_as_stored_and_beats_plain_rounding(bits, sym, act_order, tmp_path):
    model = one_block()
    report = tiny.quantize(model, tmp_path / "out", bits=bits, sym=sym, act_order=act_order, group_size=32)
    assert_runs_as_stored(tmp_path / "out", model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("bits", "sym", "desc_act", "group_size")} == {
        "bits": bits, "sym": sym, "desc_act": act_order, "group_size": 32,
    }  # fmt: skip
    assert config["checkpoint_format"] == config["format"] == ("gptq" if sym else "gptq_v2")
    assert all(layer.error_db <= layer.rtn_error_db for layer in report.layers)
    weights = tiny.stored_weights(tmp_path / "out").values()
    assert any(not weight.trivially_grouped for weight in weights) == act_order
    assert report.problems() == []


def test_more_bits_mean_less_error(tmp_path):
    model = one_block()
    reports = [tiny.quantize(model, tmp_path / str(bits), bits=bits) for bits in BITS]
    errors = [sum(layer.error_db for layer in report.layers) for report in reports]
    assert errors == sorted(errors, reverse=True)
    assert [r.fidelity["kl_mean"] for r in reports] == sorted((r.fidelity["kl_mean"] for r in reports), reverse=True)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_reported_error_is_that_of_the_stored_weight_on_what_quantized_blocks_make(block, llama, tmp_path):
    model, quantized = dense(llama), tmp_path / "out"
    tiny.quantize(llama, quantized, preset="fast")
    weight, name = model.model.layers[block].self_attn.q_proj.weight.double(), LINEARS[7 * block]
    inputs, so_far = [], tiny.twin(model, quantized)
    so_far.model.layers[block].self_attn.q_proj.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    tiny.logits(so_far, gather(tiny.ids(), None, samples=64, length=tiny.LENGTH).windows.ids)
    x = inputs[0].reshape(-1, 64).double()
    error = weight - tiny.stored_weights(quantized)[name].dequantize().double()
    expected = 10 * torch.log10((x @ error.T).square().sum() / (x @ weight.T).square().sum()).item()
    reported = json.loads((quantized / "quantization_report.json").read_text())["layers"][7 * block]
    assert reported["name"] == name and reported["tokens"] == len(x)
    assert reported["error_db"] == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group"), [(128, 256, 128), (64, 128, 64), (128, 192, 64), (96, 160, 32)]
)
def test_the_default_group_divides_every_layer(hidden, intermediate, group, tmp_path):
    model = one_block(hidden_size=hidden, intermediate_size=intermediate)
    tiny.quantize(model, tmp_path / "out", calibration="none")
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["group_size"] == group
    assert all(w.scheme.group_size == group for w in tiny.stored_weights(tmp_path / "out").values())


def test_one_group_per_output(tmp_path):
    model = one_block()
    tiny.quantize(model, tmp_path / "out", group_size=-1)
    assert {tuple(w.scales.shape)[1] for w in tiny.stored_weights(tmp_path / "out").values()} == {1}
    assert_runs_as_stored(tmp_path / "out", model)


def test_without_data_every_layer_is_rounded_plainly(llama, tmp_path):
    report = tiny.quantize(llama, tmp_path / "out", calibration="none")
    assert report.coverage()["gptq"] == 0 and report.coverage()["rtn"] > 0.7
    assert report.calibration is None and report.fidelity is None and report.problems() == []
    assert all((x.tokens, x.error_db, x.fallback) == (0, None, None) for x in report.layers)
    assert_runs_as_stored(tmp_path / "out", dense(llama))


# ---- what stays dense ----


def test_ignored_layers_stay_dense_everywhere(llama, tmp_path):
    report = tiny.quantize(llama, tmp_path / "out", ignore=["down_proj", r"layers\.1\.self_attn"])
    kept = {name for name in LINEARS if "down_proj" in name or "layers.1.self_attn" in name}
    assert set(report.kept) == kept and set(report.kept.values()) == {"ignored on request"}
    assert set(tiny.stored_weights(tmp_path / "out")) == set(LINEARS) - kept
    source, stored = read_all(llama), read_all(tmp_path / "out")
    assert all(torch.equal(stored[f"{name}.weight"], source[f"{name}.weight"]) for name in kept)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"]) == ["-:.*(?:down_proj)", r"-:.*(?:layers\.1\.self_attn)"]
    assert_runs_as_stored(tmp_path / "out", dense(llama))


def test_a_single_pattern_is_not_taken_for_a_list_of_letters(tmp_path):
    report = tiny.quantize(one_block(), tmp_path / "out", ignore="down_proj", calibration="none")
    assert list(report.kept) == ["model.layers.0.mlp.down_proj"]


def test_a_pattern_that_is_found_nowhere_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"ignore='down_prj' was asked for, but .* called like model\.layers\.0"):
        tiny.quantize(one_block(), tmp_path / "out", ignore=["lm_head", "down_prj"])


def test_layers_that_cannot_be_packed_stay_dense_with_a_reason(tmp_path):
    model = one_block(intermediate_size=72)
    report = tiny.quantize(model, tmp_path / "out", bits=2, group_size=32)
    assert set(report.kept) == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert report.kept["model.layers.0.mlp.down_proj"] == (
        "2-bit packing needs inputs in multiples of 16, this layer has 72"
    )
    assert_runs_as_stored(tmp_path / "out", model)


def test_nothing_left_to_quantize_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nothing to quantize: all 7 linear layers stay dense, first .*: ignored on"):
        tiny.quantize(one_block(), tmp_path / "out", ignore=["proj"])
    assert not list(tmp_path.iterdir())


def test_a_recipe_decides_layer_by_layer(tmp_path):
    model = one_block()
    recipe = wr.Recipe(
        wr.Scheme(4, 32), (wr.Rule(r".*down_proj", wr.Scheme(8, 64)), wr.Rule(r".*v_proj", wr.Scheme(3, 32)))
    )
    tiny.quantize(model, tmp_path / "out", recipe=recipe)
    stored = {name.rpartition(".")[2]: str(w.scheme) for name, w in tiny.stored_weights(tmp_path / "out").items()}
    assert stored["down_proj"] == "8-bit g64 sym" and stored["v_proj"] == "3-bit g32 sym"
    assert stored["q_proj"] == stored["k_proj"] == stored["up_proj"] == "4-bit g32 sym"
    assert_runs_as_stored(tmp_path / "out", model)


# ---- what lies beside ----


def test_everything_else_is_the_source_bit_for_bit(llama, quantized):
    source, stored = read_all(llama), read_all(quantized)
    kept = {name for name in source if name.removesuffix(".weight") not in LINEARS}
    assert len(kept) == 9 and all(torch.equal(stored[name], source[name]) for name in kept)
    packed = {f"{name}.{leaf}" for name in LINEARS for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    assert stored.keys() == kept | packed


def test_tensors_the_model_does_not_know_are_kept(llama, copy_of, tmp_path):
    source = copy_of(llama)
    with tiny.rewritten(source) as tensors:
        tensors["mtp.head.weight"] = torch.arange(6.0).bfloat16()
    tiny.quantize(source, tmp_path / "out", calibration="none")
    assert torch.equal(Reader(tmp_path / "out").read("mtp.head.weight"), tensors["mtp.head.weight"])


def test_every_other_file_of_the_source_is_there(llama, copy_of, tmp_path):
    source = copy_of(llama)
    (source / "README.md").write_text("# The original")
    (source / "configuration_own.py").write_text("x = 1")
    tiny.quantize(source, tmp_path / "out", calibration="none")
    for path in source.iterdir():
        if path.name not in ("model.safetensors", "config.json", "README.md"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / "out" / "README.source.md").read_text() == "# The original"
    assert not (tmp_path / "out.partial").exists()


def test_the_configuration_is_the_sources_with_one_key_more(llama, quantized):
    source, config = (json.loads((d / "config.json").read_text()) for d in (llama, quantized))
    stored = config.pop("quantization_config")
    assert config == source
    assert stored == json.loads((quantized / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False,
                "checkpoint_format": "gptq", "format": "gptq", "lm_head": False}  # fmt: skip
    assert expected.items() <= stored.items()
    assert stored["meta"]["quantizer"] == [f"wellrounded:{wr.__version__}"]


def test_the_card_says_what_it_is_and_how_good(quantized):
    card = (quantized / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gptq, 4-bit,")
    report = json.loads((quantized / "quantization_report.json").read_text())
    assert f"{report['fidelity']['kl_mean']:.4f} mean" in card
    assert str(quantized.parent) not in card, "a path on this machine means nothing to a reader"


# ---- the report ----


def test_the_report_has_the_documented_keys(llama, quantized):
    report = json.loads((quantized / "quantization_report.json").read_text())
    assert report["out"] == str(quantized) and report["source"] == str(llama)
    size = (quantized / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in dense(llama).parameters())
    assert (report["size_bytes"], report["parameters"]) == (size, parameters)
    assert report["bits_per_weight"] == pytest.approx(8 * size / parameters)
    assert report["source_bytes"] == Reader(llama).bytes
    packed = sum(w.codes.numel() for w in tiny.stored_weights(quantized).values())
    assert report["coverage"] == pytest.approx({"gptq": packed / parameters, "rtn": 0, "kept": 1 - packed / parameters})
    assert sum(report["coverage"].values()) == pytest.approx(1)
    assert 0 < report["seconds"]["total"] < 60 and report["peak_rss_bytes"] > 2**20
    assert report["problems"] == [] and report["notes"] == [] and report["kept"] == {}
    assert [layer["name"] for layer in report["layers"]] == LINEARS
    for layer in report["layers"]:
        assert (layer["scheme"], layer["tokens"], layer["fallback"]) == ("4-bit g64 sym", 2048, None)
        assert layer["error_db"] <= layer["rtn_error_db"] < -10


def test_the_report_returned_is_the_report_written(tmp_path):
    report = tiny.quantize(one_block(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text()) == json.loads(
        json.dumps(report.to_dict())
    )


def test_the_fidelity_is_what_evaluation_finds_on_the_same_windows(llama, quantized):
    windows = gather(tiny.ids(), None, samples=64, length=tiny.LENGTH).held_out.ids
    measured = evaluate.evaluate(wr.load(quantized, kernel="reference"), windows, against=dense(llama))
    reported = json.loads((quantized / "quantization_report.json").read_text())["fidelity"]
    assert measured["tokens"] == reported["tokens"] == 8 * 31
    assert measured["perplexity"] == pytest.approx(reported["perplexity"], rel=1e-4)
    assert measured["against"]["perplexity"] == pytest.approx(reported["original_perplexity"], rel=1e-4)
    for key in ("kl_mean", "kl_median", "kl_p99"):
        assert measured[key] == pytest.approx(reported[key], rel=0.02), key
    assert measured["top1_agreement"] == pytest.approx(reported["top1_agreement"], abs=0.02)


def test_a_layer_that_no_token_reaches_stays_dense_and_is_a_problem_unless_it_is_ignored(tmp_path):
    model = one_block()
    model.model.layers[0].unused = torch.nn.Linear(64, 256, bias=False)
    report = tiny.quantize(model, tmp_path / "out")
    (problem,) = report.problems()
    assert re.match(r"model\.layers\.\*\.unused\.weight, 1\d\.\d% of the model, stayed dense \(no calibration", problem)
    assert torch.equal(read_all(tmp_path / "out")["model.layers.0.unused.weight"], model.model.layers[0].unused.weight)
    pattern = re.search("--ignore '(.*)'", problem)[1]
    assert not tiny.quantize(model, tmp_path / "again", ignore=[pattern]).problems()


# ---- again ----


def test_two_runs_give_the_same_bytes(llama, quantized, tmp_path):
    tiny.quantize(llama, tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == weight_bytes(quantized)
    for name in ("config.json", "quantize_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (quantized / name).read_bytes()


def test_progress_is_told_block_by_block(llama, tmp_path):
    told = []
    tiny.quantize(llama, tmp_path / "out", progress=told.append)
    assert [(p.done, p.total, p.what) for p in told] == [(i + 1, 3, f"model.layers.{i}") for i in range(3)]
    assert [p.seconds for p in told] == sorted(p.seconds for p in told)


def stop_after(blocks):
    def progress(told):
        if told.done == blocks:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(
    blocks, llama, quantized, tmp_path, monkeypatch
):
    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(llama, tmp_path / "out", progress=stop_after(blocks))
    assert not (tmp_path / "out").exists()
    solved = []
    solve = blockwise.solve
    monkeypatch.setattr(blockwise, "solve", lambda *args: solved.append(1) or solve(*args))
    report = tiny.quantize(llama, tmp_path / "out")
    assert len(solved) == (3 - blocks) * 4, "finished blocks are not solved again"
    assert weight_bytes(tmp_path / "out") == weight_bytes(quantized)
    undisturbed = json.loads((quantized / "quantization_report.json").read_text())
    assert json.loads(json.dumps(report.to_dict()["layers"])) == undisturbed["layers"]
    assert report.fidelity == undisturbed["fidelity"]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"bits": 3}, "recipe: was"), ({"calibration": tiny.ids(seed=2)}, "calibration: was"),
     ({"settings": wr.Settings(damping=0.1)}, "settings: was")],
)  # fmt: skip
def test_an_interrupted_run_is_not_finished_by_another_request(change, named, llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(llama, tmp_path / "out", progress=stop_after(1))
    with pytest.raises(UsageError, match=f"holds another request's unfinished run .*{named}.*--fresh starts over"):
        tiny.quantize(llama, tmp_path / "out", **change)
    tiny.quantize(llama, tmp_path / "out", **change, fresh=True)
    assert not (tmp_path / "out.partial").exists()


# ---- what cannot be done ----


def test_a_weight_that_is_no_number_is_named_and_nothing_is_left_behind(llama, copy_of, tmp_path):
    source = copy_of(llama)
    with tiny.rewritten(source) as tensors:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    for calibration in (None, "none"):
        options = {"calibration": calibration} if calibration else {}
        with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: .* NaN or Inf"):
            tiny.quantize(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_tensor_the_files_lack_is_named(llama, copy_of, tmp_path):
    source = copy_of(llama)
    with tiny.rewritten(source) as tensors:
        del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        tiny.quantize(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_windows_longer_than_the_model_reads_are_refused(tmp_path):
    with pytest.raises(UsageError, match="length=512 was asked for, but the model reads at most 256 tokens; use 256"):
        wr.quantize(one_block(), tmp_path / "out", calibration=tiny.ids(), length=512)


@pytest.mark.parametrize("place", ["source", "source/out", "."])
def test_a_result_and_its_source_must_not_lie_one_inside_the_other(place, llama, copy_of, tmp_path):
    source = copy_of(llama, "source")
    with pytest.raises(UsageError, match="lie one inside the other; name a directory beside the model"):
        tiny.quantize(source, tmp_path / place, force=True)
    assert Reader(source).places and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_unknown_device_is_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(UsageError, match="device 'cuda:99' was asked for"):
        wr.quantize("no/such-model", tmp_path / "out", device="cuda:99")


def test_what_the_blocks_hold_besides_linear_layers_is_said_and_fails_the_check(tmp_path):
    model = one_block()
    model.model.layers[0].mixers = torch.nn.Parameter(torch.randn(4, 64, 64))
    report = tiny.quantize(model, tmp_path / "out")
    assert report.kept == {"model.layers.0.mixers": "a 3-dimensional parameter, not a linear layer"}
    assert report.overlooked == pytest.approx(4 * 64 * 64 / report.parameters)
    assert any(re.match(r"model\.layers\.\*\.mixers, .*stayed dense", problem) for problem in report.problems())
    asked = tiny.quantize(model, tmp_path / "asked", ignore=["mixers"])
    assert not asked.overlooked and not asked.problems()
