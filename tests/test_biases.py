"""Layers with a bias put the mean of their error into it, which is stored, resumed and shared as all else."""

import os
from dataclasses import replace

import pytest
import torch

import tiny
import wellrounded as wr
from teams import run
from test_kill import KILLED, contents, in_child, kill
from test_presets import QUICK, dense, held_out, kl
from wellrounded import presets
from wellrounded.presets import BEST, DEFAULT
from wellrounded.report import Report

TEXT = tiny.ids(100)
ABSORBING = replace(DEFAULT.settings, biases=True)


def biased(kind):
    """A model whose layers have biases, and read what has a mean."""
    model, random = tiny.build(kind), torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3, generator=random)
    table = model.get_input_embeddings().weight.data
    table += torch.randn(table.shape[1], generator=random) * table.std()
    return model.bfloat16()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("biases")
    return {kind: tiny.save(biased(kind), root / kind) for kind in ("opt", "qwen2", "gpt2")}


def quantize(source, out, **options):
    asked = {"calibration": TEXT, "bits": 2, "group_size": 32, "settings": ABSORBING, **options}
    return tiny.quantize(source, out, **asked)


@pytest.mark.parametrize("kind", ["opt", "qwen2", "gpt2"])
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_biases_absorb_what_errors_have_in_common(kind, preset, sources, tmp_path):
    settings = presets.PRESETS[preset].settings
    before = quantize(sources[kind], tmp_path / "before", settings=settings)
    after = quantize(sources[kind], tmp_path / "after", settings=replace(settings, biases=True))
    old, new, source = (tiny.tensors(one) for one in (tmp_path / "before", tmp_path / "after", sources[kind]))
    quantized = [name.removesuffix(".qweight") for name in new if name.endswith(".qweight")]
    biases = {f"{name}.bias" for name in quantized} & new.keys()
    assert biases == {f"{name}.bias" for name in quantized} & source.keys() and biases
    for name in new.keys() & source.keys():
        assert new[name].dtype == source[name].dtype
        assert torch.equal(new[name], source[name]) == (name not in biases), name
        assert torch.equal(old[name], source[name])
    assert after.fidelity["kl_mean"] < (0.97 if kind == "opt" else 1.03) * before.fidelity["kl_mean"]
    loaded = wr.load(tmp_path / "after", kernel="reference")
    windows = held_out(sources[kind], calibration=TEXT)
    assert kl(dense(sources[kind]), loaded, windows) == pytest.approx(after.fidelity["kl_mean"], rel=0.05)


def test_what_is_trained_knows_of_them(sources, monkeypatch, tmp_path):
    monkeypatch.setitem(presets.PRESETS, "best", replace(BEST, training=QUICK))
    report = quantize(sources["qwen2"], tmp_path / "out", preset="best", settings=BEST.settings)
    assert BEST.settings.biases and report.training["steps"] == 6
    loaded, proving = wr.load(tmp_path / "out", kernel="reference"), held_out(sources["qwen2"], calibration=TEXT)[1::2]
    assert kl(dense(sources["qwen2"]), loaded, proving) == pytest.approx(report.fidelity["kl_mean"], rel=0.05)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(sources, tmp_path):
    def killed(progress):
        if progress.done == 2:
            kill()

    def work():
        torch.set_num_threads(1)  # threads do not survive a fork
        quantize(sources["opt"], tmp_path / "whole")
        quantize(sources["opt"], tmp_path / "out", progress=killed)

    assert in_child(work).how == KILLED
    assert in_child(lambda: (torch.set_num_threads(1), quantize(sources["opt"], tmp_path / "out"))).how == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("preset", ["fast", "default"])
def test_several_processes_absorb_what_one_does(preset, sources, tmp_path):
    pytest.importorskip("fcntl", reason="needs fork")
    asked = {"bits": 4, "group_size": 32, "settings": replace(presets.PRESETS[preset].settings, biases=True)}
    alone = quantize(sources["opt"], tmp_path / "alone", **asked)
    found = run(sources["opt"], tmp_path / "team", calibration=TEXT, **asked)
    assert [one.error for one in found] == ["", ""]
    assert Report.read(tmp_path / "team").fidelity["kl_mean"] == pytest.approx(alone.fidelity["kl_mean"], rel=0.2)
    one, other, source = (tiny.tensors(each) for each in (tmp_path / "alone", tmp_path / "team", sources["opt"]))
    changed = [name for name in one.keys() & source.keys() if not torch.equal(one[name], source[name])]
    assert len(changed) == 6 * 3  # layers of each block
    for name in (name for name in changed if "layers.0.self_attn.q" in name):  # before small differences add up
        moved = (one[name].float() - source[name].float()).norm()
        assert (one[name].float() - other[name].float()).norm() < 0.1 * moved, name
