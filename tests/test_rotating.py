"""Best rotates a model where that turns out to be better: the choice, what is stored, and what is said of it."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import wellrounded as wr
from test_kill import KILLED, contents, in_child, kill
from test_presets import correlated, dense, held_out, kl
from wellrounded import presets, rotating
from wellrounded.places import unfinished
from wellrounded.presets import BEST

TEXT = tiny.ids(100)


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "best", replace(BEST, training=None))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model, random = correlated(), torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return tiny.save(model, tmp_path_factory.mktemp("rotating") / "source")


def quantize(source, out, **options):
    return tiny.quantize(source, out, **{"preset": "best", "calibration": TEXT, "bits": 3, "group_size": 32, **options})


@pytest.fixture
def verdict(monkeypatch):
    """Decides a trial: sets how far the model as it is turns out to be, beside its rotated form; and counts trials."""
    seen, attempt = [], rotating.attempt

    def decided(better):
        def tried(request, source, place, tell):
            report, is_rotated = attempt(request, source, place, tell), len(seen) % 2 == 1
            seen.append(request.samples)
            report.fidelity["kl_mean"] = 0.1 if is_rotated == better else 0.2
            return report

        monkeypatch.setattr(rotating, "attempt", tried)
        return seen

    return decided


def norms(directory):
    return {name: value for name, value in tiny.tensors(directory).items() if "norm" in name}


def test_what_is_better_rotated_is_stored_so_and_says_the_same(source, verdict, tmp_path):
    seen, said = verdict(better=True), []
    report = quantize(source, tmp_path / "out", progress=said.append)
    about = report.rotation
    assert seen == [32, 32] and about["used"] and about["tried"]["plain"] == 0.2
    assert about["tried"]["rotated"] == pytest.approx(0.1 + about["kl"]) and 0 <= about["kl"] < 1e-3
    assert len(norms(tmp_path / "out")) == 7 and all((one == 1).all() for one in norms(tmp_path / "out").values())
    before, after = tiny.tensors(source), tiny.tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].dtype == before[name].dtype and not torch.equal(after[name], before[name])
    loaded, windows = wr.load(tmp_path / "out", kernel="reference"), held_out(source, calibration=TEXT)
    assert kl(dense(source), loaded, windows) == pytest.approx(report.fidelity["kl_mean"], rel=0.2)
    assert "rotated; tried on fewer windows: KL 0.1" in dict(report.summary())["rotation"]
    assert any("0.2000 as it is, 0.1" in one.message for one in said)
    stored = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert stored["rotation"] == about
    assert not list(tmp_path.glob(".out*")), "trials leave nothing behind"


def test_what_is_better_as_it_is_stays_so(source, verdict, monkeypatch, tmp_path):
    verdict(better=False)
    report = quantize(source, tmp_path / "out")
    assert not report.rotation["used"] and dict(report.summary())["rotation"].startswith("none; tried")
    monkeypatch.setitem(presets.PRESETS, "best", replace(BEST, training=None, rotates=False))
    assert quantize(source, tmp_path / "plain").rotation is None
    mine, plain = tiny.tensors(tmp_path / "out"), tiny.tensors(tmp_path / "plain")
    assert mine.keys() == plain.keys() and all(torch.equal(mine[name], plain[name]) for name in plain)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_was_killed_goes_on_with_its_choice(source, verdict, tmp_path):
    seen, out = verdict(better=True), tmp_path / "out"

    def killed(progress):
        if progress.done == 1 and unfinished(out):  # of the run itself, not of a trial
            kill()

    def work():
        torch.set_num_threads(1)  # threads do not survive a fork
        quantize(source, tmp_path / "whole")
        quantize(source, out, progress=killed)

    assert in_child(work).how == KILLED
    assert unfinished(out)["rotation"]["used"]
    quantize(source, out)
    assert not seen and contents(out) == contents(tmp_path / "whole")
    quantize(source, out, force=True, fresh=True)
    assert len(seen) == 2


def test_a_tied_head_is_said_to_be_the_reason(tmp_path):
    source = tiny.save(correlated(tie_word_embeddings=True), tmp_path / "source")
    report = quantize(source, tmp_path / "out")
    assert not report.rotation["used"] and "its output head is its embeddings" in report.rotation["why"]
    assert dict(report.summary())["rotation"].startswith("none: its output head")


def test_a_speculative_head_would_not_know_of_it(source, tmp_path):
    other = tmp_path / "source"
    other.mkdir()
    for file in source.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors") | {"mtp.proj.weight": torch.ones(2, 2)}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    report = quantize(other, tmp_path / "out")
    assert "mtp.proj.weight, which it does not read" in report.rotation["why"]


def test_a_model_in_memory_is_left_untouched(source, verdict, tmp_path):
    verdict(better=True)
    model = dense(source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert quantize(model, tmp_path / "out", tokenizer=tiny.tokenizer()).rotation["used"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_budget_is_served_with_the_rotated_model(source, verdict, tmp_path):
    verdict(better=True)
    report = quantize(source, tmp_path / "out", bits=None, group_size=None, bpw=5.0)
    assert report.rotation["used"] and report.budget["tried"]
    assert all((one == 1).all() for one in norms(tmp_path / "out").values())
