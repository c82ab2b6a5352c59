"""The accuracy benchmark's own parts: a wrong reader or a leaking text would flatter somebody."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import accuracy
import accuracy_table
import held_out
import neutral
import paired
import tiny
from wellrounded.calibration import gather
from wellrounded.core.fidelity import Fidelity

PEERS = Path(accuracy.__file__).parent / "peers"


# ---- the neutral reader ----


@pytest.mark.parametrize(
    "options",
    {
        "4 bits": {},
        "asymmetric": {"sym": False},
        "activation order": {"act_order": True},
        "2 bits": {"bits": 2, "group_size": 32},
        "3 bits": {"bits": 3, "group_size": 32, "sym": False},
        "8 bits, one scale": {"bits": 8, "group_size": -1},
        "some kept dense": {"ignore": [r"down_proj", r"1\.self_attn"]},
    }.values(),
)
def test_it_reads_what_wellrounded_means(llama, tmp_path, options):
    tiny.quantize(llama, tmp_path / "out", **options)
    dense, original = neutral.read(tmp_path / "out"), neutral.read(llama)
    weights = tiny.stored_weights(tmp_path / "out")
    assert weights
    for name, weight in weights.items():
        torch.testing.assert_close(dense[f"{name}.weight"], weight.dequantize(torch.float32), rtol=1e-6, atol=1e-7)
    neutral.compare(dense, original, tied=False)
    kept = original.keys() - {f"{name}.weight" for name in weights}
    assert all(torch.equal(dense[name], original[name]) for name in kept)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_rounding_is_within_half_a_step(llama, tmp_path, monkeypatch, bits, symmetric):
    np.save(tmp_path / "w.npy", np.zeros((1, 2), dtype=np.int64))
    words = [str(llama), str(tmp_path / "out"), "--windows", str(tmp_path / "w.npy"), "--bits", str(bits)]
    words += ["--group-size", "32", *([] if symmetric else ["--asym"])]
    monkeypatch.syspath_prepend(PEERS)
    monkeypatch.setattr(sys, "argv", ["run_plain.py", *words])
    import run_plain

    run_plain.main()
    dense, original = neutral.read(tmp_path / "out"), neutral.read(llama)
    neutral.compare(dense, original, tied=False)
    rounded = [name for name in original if not torch.equal(dense[name], original[name].to(dense[name].dtype))]
    assert len(rounded) == 3 * 7
    for name in rounded:
        codes, scales, _ = run_plain.round_plainly(original[name], bits, 32, symmetric)
        step = scales.float().repeat_interleave(32, 1)
        assert codes.max() < 2**bits and ((dense[name] - original[name].float()).abs() < step * 1.01).all()
        assert (dense[name] - original[name].float()).abs().mean() < 0.4 * step.mean()


def test_it_reads_compressed_tensors(monkeypatch):
    monkeypatch.syspath_prepend(PEERS)
    from run_plain import pack

    codes = torch.randint(0, 8, (32, 64), generator=torch.Generator().manual_seed(0))  # 3 bits: words are straddled
    zeros = torch.randint(0, 8, (32, 2), generator=torch.Generator().manual_seed(1))
    scales = torch.rand(32, 2).bfloat16()
    tensors = {
        "weight_packed": pack(codes, 3), "weight_scale": scales, "weight_shape": torch.tensor([32, 64]),
        "weight_zero_point": pack(zeros.T, 3).T,
    }  # fmt: skip
    wide = (codes - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(32, 1)
    assert torch.equal(neutral.packed_weight(tensors, 3, symmetric=False), wide)
    del tensors["weight_zero_point"]
    wide = (codes - 4) * scales.float().repeat_interleave(32, 1)
    assert torch.equal(neutral.packed_weight(tensors, 3, symmetric=True), wide)


def test_it_reads_awq():
    word = sum(code << 4 * place for place, code in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))  # AWQ's order of 8 outputs
    words = torch.tensor([[word]], dtype=torch.int64).to(torch.int32)
    tensors = {"qweight": words.repeat(4, 1), "qzeros": torch.zeros(2, 1, dtype=torch.int32)}
    tensors["scales"] = torch.tensor([[1.0], [2.0]]).repeat(1, 8).half()
    wide = neutral.awq_weight(tensors, 4)
    assert torch.equal(wide[:, 0], torch.arange(8.0)) and torch.equal(wide[:, 3], 2 * torch.arange(8.0))


def damage(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    {
        "left over": (
            lambda t: t.update({"model.layers.0.mlp.up_proj.odd": torch.zeros(1)}),
            "left over: .*up_proj.odd",
        ),
        "missing": (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        "half": (lambda t: t.pop("model.layers.0.mlp.up_proj.scales"), "0.mlp.up_proj: only g_idx, qweight, qzeros"),
        "broken": (lambda t: t["model.norm.weight"].fill_(math.nan), "broken: model.norm.weight"),
        "shape": (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "of another shape: model.norm.weight"),
        "groups": (lambda t: t["model.layers.0.mlp.up_proj.g_idx"].fill_(9), "0.mlp.up_proj: shapes"),
    }.values(),
)
def test_it_refuses_what_it_cannot_account_for(quantized, llama, tmp_path, change, said):
    out = shutil.copytree(quantized, tmp_path / "out")
    damage(out, change)
    with pytest.raises(neutral.UnreadableError, match=said):
        neutral.compare(neutral.read(out), neutral.read(llama), tied=False)


def test_it_refuses_formats_that_it_does_not_know(quantized, tmp_path):
    out = shutil.copytree(quantized, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for change in ({"quant_method": "awq"}, {"checkpoint_format": "marlin"}, {"quant_method": "auto-round"}):
        other = config | {"quantization_config": config["quantization_config"] | change}
        (out / "config.json").write_text(json.dumps(other))
        with pytest.raises(neutral.UnreadableError, match=r"none of|not understood"):
            neutral.read(out)


def test_a_tied_head_is_the_embedding(tied, tmp_path):
    original = neutral.read(tied)
    neutral.compare(original | {"lm_head.weight": original["model.embed_tokens.weight"]}, original, tied=True)
    with pytest.raises(neutral.UnreadableError, match="are one in the original and differ here"):
        neutral.compare(original | {"lm_head.weight": original["model.embed_tokens.weight"] + 1}, original, tied=True)


# ---- measuring ----


def test_measuring_agrees_with_the_package(llama, quantized):
    windows = tiny.ids(rows=3, length=40)
    original, model = (paired.dense_model(path, llama) for path in (llama, quantized))
    found = paired.measure(original, {"one": model}, windows.numpy())
    seen, expected = paired.summary(found["one"]), Fidelity()
    with torch.no_grad():
        expected.update(original(windows).logits, model(windows).logits, windows)
    expected = expected.to_dict()
    for key, other in (("perplexity", "perplexity"), ("kl_mean", "kl_mean"), ("top1", "top1_agreement")):
        assert seen[key] == pytest.approx(expected[other], rel=1e-3)
    assert seen["tokens"] == 3 * 39 and found["one"]["kl"].shape == (3, 39)
    dense = paired.summary(found["dense"])
    assert (dense["kl_mean"], dense["top1"]) == (0, 1)


def test_an_interval_is_as_wide_as_windows_differ():
    random = np.random.default_rng(1)
    hard = random.normal(5, 3, (200, 1))  # what windows have in common for all models cancels out
    one, other = (hard + random.normal(mean, 0.5, (200, 30)) for mean in (0.2, 0.0))
    found = paired.difference(one, other)
    assert found["low"] < 0.2 < found["high"] and found["high"] - found["low"] < 0.06
    assert found == paired.difference(one, other)
    assert paired.difference(one, one) == {"mean": 0, "low": 0, "high": 0}


# ---- texts ----


@pytest.mark.parametrize("most", [0, 1, 256])
@pytest.mark.parametrize("begin", [None, 1])
@pytest.mark.parametrize("count", [3, 9, 40, 128, 200])
def test_wellrounded_calibrates_on_the_windows_that_everybody_gets(count, begin, most):
    given = held_out.calibration(np.arange(3, 3 + count * 64 * 3), 64, count, begin)
    stream = held_out.with_further(given, most).tolist()
    found = gather(
        [stream], SimpleNamespace(bos_token_id=1), samples=count, length=64, min_tokens=1, held_out=16, further=most
    )
    assert np.array_equal(found.windows.ids.numpy(), given.calibration)
    assert len(found.held_out) and rows(found.held_out.ids) <= rows(given.proof)
    assert len(found.further or ()) == most and (not most or rows(found.further.ids) <= rows(given.further))
    every = np.concatenate([*given]).flatten()
    own = every if begin is None else every[every != begin]
    assert len({*own}) == len(own) and (begin is None or all((part[:, 0] == begin).all() for part in given))


def rows(windows) -> set[tuple[int, ...]]:
    return {tuple(np.asarray(window).tolist()) for window in windows}


def test_windows_that_share_text_with_the_calibration_are_passed_over():
    ids = np.arange(1000)
    known = np.stack([ids[100:164], ids[500:564]])
    windows, passed = held_out.disjoint(ids, 50, 12, known, "text")
    begun, _ = held_out.disjoint(ids, 50, 12, known, "text", begin=0)
    assert (begun[:, 0] == 0).all() and np.array_equal(begun[:, 1:], windows[:, 1:])
    assert windows.shape == (12, 50) and passed == 4  # of 150 to 200, 14 are known
    assert not {*windows.flatten()} & {*known.flatten()}


def test_a_text_begins_with_what_its_tokenizer_puts_there():
    def tokenizer(text):
        return {"input_ids": [2, 9]}

    tokenizer.all_special_ids = [2, 3]
    assert held_out.beginning(tokenizer) == 2
    tokenizer.all_special_ids = [3]
    assert held_out.beginning(tokenizer) is None


def test_code_is_none_of_what_wellrounded_calibrates_on_by_default():
    from wellrounded.calibration import builtin

    assert not {*held_out.MODULES} & {*builtin.CODE_MODULES, *builtin.ENGLISH_MODULES}
    assert len(held_out.code()) > 1_000_000


# ---- the table ----


@pytest.fixture
def request_(llama, tmp_path):
    """A benchmark of plain rounding over a few windows of the tiny model."""
    text = tmp_path / "text"
    text.write_text("".join(f"{i * 7919 % 10007} {tiny.TEXT}" for i in range(300)))
    words = [str(llama), "--work", str(tmp_path / "work"), "--calibration", str(text), "--only", "plain,autoround"]
    for name in accuracy_table.TEXTS:
        other = tmp_path / name
        other.write_text("".join(f"{i * 31 % 1013}x{i} " for i in range(2000)))
        words += [f"--{name}", str(other)]
    return [*words, "--group-size", "32", "--samples", "4", "--length", "32", "--windows", "3", "--eval-length", "32"]


def test_what_was_made_is_not_made_again_and_a_missing_peer_is_named(request_, tmp_path, capsys):
    results = accuracy.run(accuracy.arguments(request_))
    assert results["left_out"] == {"AutoRound": "no environment was given (--autoround VENV)"}
    row = results["contenders"]["plain"]
    assert row["peak_rss_bytes"] > 2**25 and row["seconds"] > 0 and row["code"]["kl_mean"] > 0
    assert "plain: quantizing" in capsys.readouterr().err
    again = accuracy.run(accuracy.arguments(request_))
    assert "quantizing" not in capsys.readouterr().err and again == results
    with pytest.raises(SystemExit, match="name another --work"):
        accuracy.run(accuracy.arguments([*request_, "--bits", "3"]))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{accuracy_table.marker(results)}\nold\n<!-- end -->\nafter\n")
    accuracy_table.write(page, results)
    accuracy_table.write(page, results)
    content = page.read_text()
    assert content.startswith("before\n") and content.endswith("<!-- end -->\nafter\n") and "old" not in content
    assert content.count("| plain rounding |") == 4 and "Left out: AutoRound, no environment" in content


def test_a_page_without_markers_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    results = {"bits": 4, "group_size": 64, "asym": False}
    with pytest.raises(SystemExit, match="4 bits, groups of 64, symmetric"):
        accuracy_table.write(page, results)
    assert page.read_text() == "nothing"
