"""Presets: each does what the one before it does and comes closer; what best has trained is what is stored."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
import tiny_configs
import wellrounded as wr
from teams import run
from test_kill import DONE, KILLED, contents, in_child, kill
from wellrounded import cli, presets, tensorfile, training, tuning
from wellrounded import writer as writing
from wellrounded.checkpoint import Writer
from wellrounded.core.gptq import Settings
from wellrounded.errors import OutOfMemory, UsageError
from wellrounded.hf.source import open_source
from wellrounded.learned import divergence
from wellrounded.presets import BEST, DEFAULT, FAST, preset
from wellrounded.report import Report
from wellrounded.request import Request
from wellrounded.training import Training, train

QUICK = Training(steps=6, windows_per_step=8, every=2, scale_rate=1e-2, norm_rate=5e-3)


TEXT = tiny.ids(160)  # enough to calibrate on 64 windows, to hold 16 out, and to train on others


def correlated(kind: str = "llama", **changes) -> torch.nn.Module:
    """A random model of whose activations a few directions hold most: what is lost in one layer meets the next."""
    model, random = tiny.build(kind, **changes), torch.Generator().manual_seed(3)
    table = model.get_input_embeddings().weight.data
    some = torch.randn(len(table), 8, generator=random) @ torch.randn(8, table.shape[1], generator=random)
    table.copy_(0.3 * some + 0.1 * torch.randn(table.shape, generator=random))
    return model.bfloat16()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save(correlated(), tmp_path_factory.mktemp("presets") / "source")


def quantize(source, out, name, **options) -> Report:
    return tiny.quantize(source, out, preset=name, **{"calibration": TEXT, "bits": 3, "group_size": 32, **options})


@pytest.fixture(scope="module")
def made(source):
    """The source, quantized by each preset, and as best does it without the training, which is short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "best", replace(BEST, training=QUICK))
        patch.setitem(presets.PRESETS, "untrained", replace(BEST, training=None))
        return {name: quantize(source, source.parent / name, name) for name in presets.PRESETS}


@pytest.fixture
def quick(monkeypatch):
    """While a test runs, best takes a few large steps, and there is a preset that takes none of them."""
    monkeypatch.setitem(presets.PRESETS, "best", replace(BEST, training=QUICK))
    monkeypatch.setitem(presets.PRESETS, "untrained", replace(BEST, training=None))


def held_out(source, **options) -> torch.Tensor:
    """int64 [windows, length]: those that a result is proved on."""
    asked = Request(**{"calibration": TEXT, "samples": 64, "length": tiny.LENGTH, "device": "cpu", **options})
    return asked._calibration(open_source(source)).held_out.ids


def kl(original, other, ids: torch.Tensor) -> float:
    """Mean KL of two models over these windows, in nats."""
    p, q = (tiny.logits(model, ids) for model in (original, other))
    return divergence(p, q, None, False)[0] / ids.numel()


def dense(directory):
    return tiny.in_turn(directory)


# ---- what they are ----


def test_every_preset_has_all_that_the_one_before_has():
    assert FAST.settings == Settings() and FAST.training is None
    on = {"upstream": True, "residual": True, "token_weights": True}
    assert all(vars(DEFAULT.settings)[name] is True and vars(FAST.settings)[name] is False for name in on)
    assert DEFAULT.settings.paired and not FAST.settings.paired and DEFAULT.training is None
    assert BEST.settings == replace(DEFAULT.settings, outer=BEST.settings.outer, biases=True)
    assert BEST.settings.outer > DEFAULT.settings.outer and not DEFAULT.settings.biases
    assert isinstance(BEST.training, Training) and BEST.rotates and not DEFAULT.rotates
    assert [preset(name) for name in ("fast", "default", "best")] == [FAST, DEFAULT, BEST]
    assert Request().settings == DEFAULT.settings and Request(preset="fast").settings == Settings()
    assert Request(preset="best", settings=Settings(damping=0.5)).settings == Settings(damping=0.5)


def test_fast_is_the_solver_with_its_own_settings(source, made, tmp_path):
    tiny.quantize(source, tmp_path / "out", calibration=TEXT, bits=3, group_size=32, settings=Settings())
    assert contents(tmp_path / "out") == contents(source.parent / "fast")


def test_a_preset_that_there_is_not_is_said_before_anything_is_read(tmp_path, capsys):
    sentence = "preset='great' was asked for; use one of fast, default, best"
    for ask in (
        lambda: wr.quantize("nowhere", tmp_path / "out", preset="great"),
        lambda: wr.forecast("nowhere", preset="great"),
    ):
        with pytest.raises(UsageError, match=sentence):
            ask()
    assert cli.main(["quantize", "nowhere", "-o", str(tmp_path / "out"), "--preset", "great"]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- default ----


def test_default_comes_closer_to_the_original_than_fast(source, made):
    closer = {name: report.fidelity["kl_mean"] for name, report in made.items()}
    assert closer["default"] < 0.85 * closer["fast"]
    ids = held_out(source)
    for name in ("fast", "default"):
        loaded = wr.load(source.parent / name, kernel="reference")
        assert kl(dense(source), loaded, ids) == pytest.approx(closer[name], rel=0.05)


def test_the_report_says_how_much_of_what_error_was_made_up_for(source, made):
    stored = Report.read(source.parent / "default").layers
    for layer in stored:
        block, role = layer.name.removeprefix("model.layers.").split(".", 1)
        first = block == "0" and role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        assert (layer.upstream == 0) is first and 0 <= layer.upstream <= 1, "before these nothing was lost"
        writes = role in ("self_attn.o_proj", "mlp.down_proj") and layer.name != "model.layers.0.self_attn.o_proj"
        assert (layer.residual > 0) is writes and layer.residual <= 1
    assert any(layer.upstream > 0.5 for layer in stored) and any(layer.residual > 0.3 for layer in stored)
    assert not any(layer.upstream or layer.residual for layer in Report.read(source.parent / "fast").layers)


def test_several_processes_make_up_for_what_one_does(source, made, tmp_path):
    pytest.importorskip("fcntl", reason="needs fork")
    found = run(source, tmp_path / "out", preset="default", bits=3)
    assert [one.error for one in found] == ["", ""]
    together_, alone = (Report.read(out) for out in (tmp_path / "out", source.parent / "default"))
    assert together_.fidelity["kl_mean"] == pytest.approx(alone.fidelity["kl_mean"], rel=0.2)
    for mine, theirs in zip(together_.layers, alone.layers):
        assert mine.tokens == theirs.tokens and mine.error_db == pytest.approx(theirs.error_db, abs=1.0)


# ---- best ----


def trained(name: str) -> bool:
    return name.endswith(".scales") or "norm" in name


def test_best_trains_scales_and_norms_and_leaves_every_code_as_it_was(source, made):
    before, best = (tiny.tensors(source.parent / name) for name in ("untrained", "best"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in best.items()}
    changed = {name for name in before if not torch.equal(before[name], best[name])}
    assert changed and all(map(trained, changed))
    scales = {name for name in before if name.endswith(".scales")}
    assert len(changed & scales) == len(scales) and len(changed - scales) == 7, "two norms a block, and the last"
    for name in changed & scales:
        assert torch.equal(before[name].sign(), best[name].sign())
    configs = [json.loads((source.parent / name / "config.json").read_text()) for name in ("untrained", "best")]
    assert configs[0] == configs[1]


def test_the_report_says_what_training_did_and_how_close_that_came(source, made):
    report = Report.read(source.parent / "best")
    told = report.training
    assert (told["steps"], told["windows"]) == (6, 48) and told["best_step"] in (2, 4, 6)
    steps, kls, looks = zip(*told["kl"])
    assert steps == tuple(range(7)) and kls[0] is None and all(kls[1:])
    assert [step for step, look in zip(steps, looks) if look is not None] == [0, 2, 4, 6]
    assert looks[told["best_step"]] == min(look for look in looks if look is not None) < looks[0]
    assert told["fidelity"]["kl_mean"] > 0 and Report.read(source.parent / "untrained").training is None
    loaded = wr.load(source.parent / "best", kernel="reference")
    choosing, proving = (held_out(source)[start::2] for start in (0, 1))
    assert kl(dense(source), loaded, proving) == pytest.approx(report.fidelity["kl_mean"], rel=0.05)
    assert kl(dense(source), loaded, choosing) == pytest.approx(looks[told["best_step"]], rel=0.05)
    untrained = wr.load(source.parent / "untrained", kernel="reference")
    assert kl(dense(source), untrained, choosing) == pytest.approx(looks[0], rel=0.05)
    assert kl(dense(source), untrained, proving) == pytest.approx(told["fidelity"]["kl_mean"], rel=0.05)


@pytest.mark.parametrize(("rows", "written"), [(72, 47), (100, 22), (160, 0)])
def test_it_is_trained_on_further_text_and_then_on_what_the_original_writes(rows, written, source, quick, tmp_path):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tuning, "train", lambda student, teacher, *rest: seen.append(teacher) or train(student, teacher, *rest)
        )
        report = quantize(source, tmp_path / "out", "best", calibration=tiny.ids(rows))
    assert (report.training["written"], report.training["windows"]) == (written, 48)
    ids, given = torch.cat(seen[0].ids).tolist(), tiny.ids(rows).flatten().unfold(0, tiny.LENGTH, 1).tolist()
    assert len(ids) == 48 and all(one in given for one in ids[: 48 - written])
    assert not any(one in given for one in ids[48 - written :])
    asked = Request(calibration=tiny.ids(rows), samples=64, length=tiny.LENGTH, device="cpu", preset="best")
    gathered = asked._calibration(open_source(source))
    others = [*gathered.windows.ids.tolist(), *gathered.held_out.ids.tolist()]
    assert not any(one in others for one in ids), "nothing is trained on that was calibrated on, or that proves"


@pytest.mark.parametrize("rows", [64 + 8, 100])
def test_what_cannot_write_is_trained_on_what_there_is_and_says_so(rows, source, quick, monkeypatch, tmp_path):
    def generate(*args, **kwargs):
        raise ValueError("it has no words")

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    said = []
    report = quantize(source, tmp_path / "out", "best", calibration=tiny.ids(rows), progress=said.append)
    assert report.training["written"] == 0 and report.training["steps"] == 6
    notes = " ".join(one.message for one in said)
    assert "the original writes no text (ValueError: it has no words)" in notes


def test_memory_that_ends_while_the_original_writes_ends_the_run(source, quick, monkeypatch, tmp_path):
    def generate(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        quantize(source, tmp_path / "out", "best", calibration=tiny.ids(100))


def test_best_as_it_is_is_not_worse_than_without_its_training(source, made, tmp_path):
    """With its own steps and rates, which gain little where there is little to learn."""
    report = quantize(source, tmp_path / "out", "best")
    assert report.training["steps"] == BEST.training.steps
    looks = [look for _, _, look in report.training["kl"] if look is not None]
    assert min(looks) == looks[-1] or min(looks) < looks[0] * 1.0001
    assert report.fidelity["kl_mean"] < 1.05 * made["untrained"].fidelity["kl_mean"]


def test_where_training_makes_nothing_better_the_result_is_as_it_was(source, tmp_path, monkeypatch):
    wild = Training(steps=2, windows_per_step=4, every=1, scale_rate=3.0, norm_rate=3.0)
    monkeypatch.setitem(presets.PRESETS, "best", replace(BEST, training=wild))
    report = quantize(source, tmp_path / "out", "best")
    assert report.training["best_step"] == 0
    assert contents(tmp_path / "out") == contents(source.parent / "untrained")


def test_a_head_is_quantized_too_but_keeps_the_scales_that_it_has(source, made, quick, tmp_path):
    report = quantize(source, tmp_path / "best", "best", lm_head=True)
    quantize(source, tmp_path / "untrained", "untrained", lm_head=True)
    before, best = (tiny.tensors(tmp_path / name) for name in ("untrained", "best"))
    changed = {name for name in before if not torch.equal(before[name], best[name])}
    assert "lm_head.qweight" in best and not any(name.startswith("lm_head") for name in changed)
    assert len(changed) == 28 and all(map(trained, changed))
    loaded = wr.load(tmp_path / "best", kernel="reference")
    assert kl(dense(source), loaded, held_out(source)[1::2]) == pytest.approx(report.fidelity["kl_mean"], rel=0.05)


def test_a_model_in_memory_is_left_untouched(source, made, quick, tmp_path):
    model = dense(source)
    before = copy.deepcopy(model.state_dict())
    quantize(model, tmp_path / "out", "best", tokenizer=tiny.tokenizer())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    stored, expected = tiny.tensors(tmp_path / "out"), tiny.tensors(source.parent / "best")
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_blocks_that_share_weights_learn_together_and_store_them_once(monkeypatch, tmp_path):
    short = replace(QUICK, steps=2, windows_per_step=4, every=1)
    for name, trains in {"best": short, "untrained": None}.items():
        monkeypatch.setitem(presets.PRESETS, name, replace(BEST, training=trains))
    source = tiny.save(tiny_configs.build("zamba2", attn_implementation="eager").bfloat16(), tmp_path / "source")
    report, _ = (quantize(source, tmp_path / name, name, samples=24) for name in ("best", "untrained"))
    before, best = (tiny.tensors(tmp_path / name) for name in ("untrained", "best"))
    assert before.keys() == best.keys()
    changed = {name for name in before if not torch.equal(before[name], best[name])}
    assert changed and all(map(trained, changed))
    assert any("shared_transformer" in name for name in changed)
    loaded = wr.load(tmp_path / "best", kernel="reference")
    windows = held_out(source, samples=24)[1::2]
    assert kl(dense(source), loaded, windows) == pytest.approx(report.fidelity["kl_mean"], rel=0.05)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_several_processes_refuse_to_train(source, tmp_path):
    found = run(source, tmp_path / "out", preset="best")
    assert all("training scales was asked of several processes; preset best takes one" in one.error for one in found)
    assert [one.code for one in found] == [2, 2] and not list(tmp_path.iterdir())


# ---- stopped ----


def after(calls: int, owner, name: str) -> None:
    """From here on: killed when `owner.name` has been called so many times, and done what it does."""
    does, left = getattr(owner, name), [calls]

    def counted(*args, **options):
        found = does(*args, **options)
        left[0] -= 1
        if left[0] == 0:
            kill()
        return found

    setattr(owner, name, counted)


def torn(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Only the first of the new tensors is there."""
    entries, _ = tensorfile.read_header(path)
    first = min(entries.keys() & tensors.keys())
    OVERWRITE(path, {first: tensors[first]})
    kill()


OVERWRITE = tensorfile.overwrite
STOPS = {
    "text that the original has written": lambda: after(1, tuning, "sampled"),
    "two looks at held-out text": lambda: after(2, training._State, "save"),
    "half of a state": lambda: setattr(training, "sync", lambda directory: kill()),
    "all of training": lambda: after(1, tuning, "train"),
    "what it has learned is kept": lambda: after(1, Writer, "amend"),
    "the first of several shards": lambda: after(1, tensorfile, "overwrite"),
    "the first tensor of a shard": lambda: setattr(tensorfile, "overwrite", torn),
    "all shards": lambda: after(1, Writer, "_apply"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_was_killed_after_this_goes_on_to_the_same_bytes(stop, source, made, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(writing, "SHARD_BYTES", 40_000)
    out, whole, said, trains = tmp_path / "out", tmp_path / "whole", [], []
    text = {"calibration": tiny.ids() if "written" in stop else TEXT}  # of which there are too few to train on

    def work() -> None:
        torch.set_num_threads(1)  # threads do not survive a fork
        if not whole.exists():
            quantize(source, whole, "best", **text)
        STOPS[stop]()
        quantize(source, out, "best", **text)

    assert in_child(work).how == KILLED
    assert not out.exists() and len(list(whole.glob("*.safetensors"))) > 2

    def go_on() -> None:
        torch.set_num_threads(1)
        count(trains)
        quantize(source, out, "best", **text, progress=lambda progress: said.append(progress.message))
        (tmp_path / "said").write_text("\n".join([*said, f"trained {len(trains)} times"]))

    ended = in_child(go_on)
    assert ended.how == DONE, ended.said
    assert contents(out) == contents(whole)
    mine, theirs = (json.loads((one / "quantization_report.json").read_text()) for one in (out, whole))
    assert mine["training"] == theirs["training"] and mine["fidelity"] == theirs["fidelity"]
    told = (tmp_path / "said").read_text()
    (tmp_path / "said").unlink()
    assert "the original writes" not in told
    assert ("trained 0 times" in told) is (stop not in [*STOPS][:4])
    assert "step 2 of 6" not in told or stop in [*STOPS][:3:2], "what was done is not done again"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.log", "whole", "whole.log"}


def count(trains: list) -> None:
    train = tuning.train

    def counted(*args):
        trains.append(1)
        return train(*args)

    tuning.train = counted
