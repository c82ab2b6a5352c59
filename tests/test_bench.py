"""`wellrounded bench`: what it measures is there and positive; how fast anything is, no test can know."""

import json
import re

import pytest
import torch

from wellrounded import cli, kernels
from wellrounded.benchmark import layers
from wellrounded.benchmark.clock import alternate
from wellrounded.core.scheme import Scheme

SHORT = ("--seconds", "0")
LAYER = ("bench", "--shape", "64x64", "--rows", "1", *SHORT)
TOKENS = ("--prompt-length", "16", "--new-tokens", "3", *SHORT)
MACHINE = {"device", "processor", "threads", "torch"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nothing of this needs hundreds of MiB."""
    monkeypatch.setattr("wellrounded.benchmark.layers.COLD_BYTES", 2**16)
    monkeypatch.setattr("wellrounded.benchmark.clock.READ_BYTES", 2**20)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, llama, quantized):
    """Calls a command where `llama` and its `quantized` form are: its exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(llama)
    (tmp_path / "quantized").symlink_to(quantized)

    def call(*words):
        try:
            code = cli.main(list(words))
        except SystemExit as stopped:
            code = stopped.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def found(run, *words):
    code, out, err = run(*words, "--json")
    assert code == 0, err
    return json.loads(out)


# ---- layers ----


def test_layers_are_listed_by_shape_rows_and_kernel(run):
    code, out, err = run("bench", "--shape", "64x64", "--shape", "32x128", "--rows", "1", "--rows", "40", *SHORT)
    assert code == 0 and "measuring, number of rows: 4/4" in err
    assert re.search(r"^weights +cold: .*; 4-bit g128 sym, dense in bfloat16$", out, re.MULTILINE)
    assert re.search(r"^reading +[\d.]+ GB/s, measured$", out, re.MULTILINE)
    assert re.findall(r"^\d+x\d+$", out, re.MULTILINE) == ["64x64", "32x128"]
    for rows in (1, 40):
        for name in ("dense", r"reference\*"):
            line = rf"^{rows} +{name} +[\d.,]+ +[\d.]+x +[\d.]+ +[\d.]+ +\d+%$"
            assert len(re.findall(line, out, re.MULTILINE)) == 2, (rows, name)
    assert "* restores the dense weight" in out


def test_json_of_layers_has_the_documented_keys(run):
    result = found(run, *LAYER, "--bits", "8", "--group-size", "32", "--asym", "--warm")
    assert result.keys() == MACHINE | {"read_gb_s", "cold", "scheme", "dtype", "layers", "refused"}
    assert (result["cold"], result["scheme"], result["dtype"]) == (False, "8-bit g32 asym", "bfloat16")
    assert result["read_gb_s"] > 0
    lines = {line["kernel"]: line for line in result["layers"]}
    refused = {line["kernel"] for line in result["refused"]}
    assert {"dense", *(kernel.NAME for kernel in kernels.table())} == lines.keys() | refused
    assert "torch-int4" in refused and all(line["refuses"] for line in result["refused"])
    for line in lines.values():
        assert line.keys() == {"out", "in", "rows", "kernel", "microseconds", "speedup", "bytes", "gb_s",
                               "bandwidth_share", "restores", "samples"}  # fmt: skip
        assert all(line[key] > 0 for key in ("microseconds", "speedup", "gb_s", "bandwidth_share"))
        assert line["samples"] >= 3 and (line["out"], line["in"], line["rows"]) == (64, 64, 1)
    assert lines["dense"]["speedup"] == 1 and lines["dense"]["bytes"] == 64 * 64 * 2
    packed = 64 * 64 + 64 * 2 * (2 + 1) + 64 * 4  # codes, scales and zeros of two groups, g_idx
    assert lines["reference"]["bytes"] == packed and lines["reference"]["restores"]


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 64), Scheme(3, 32, symmetric=False), Scheme(2, -1), Scheme(8, 128)], ids=str
)
def test_all_candidates_compute_the_same_product_whichever_copy_they_take(scheme):
    weight = layers.random_weight(64, 96, scheme, "cpu")
    candidates, _ = layers.candidates(weight, cold=True)
    x = torch.randn(3, 96).bfloat16()
    expected = x.float() @ weight.dequantize().T
    for candidate in candidates:
        for _ in range(3):
            torch.testing.assert_close(candidate(x).float(), expected, rtol=0.03, atol=0.03)


def test_cold_weights_are_other_memory_at_each_call():
    tensors = [torch.zeros(2**12)]
    cold, warm = layers._turns(tensors, cold=True), layers._turns(tensors, cold=False)
    assert len({next(cold)[0].data_ptr() for _ in range(10)}) == 4  # of 16 KiB each, as 64 KiB have to be passed
    assert len({next(warm)[0].data_ptr() for _ in range(10)}) == 1


def test_candidates_take_turns():
    order = []
    samples = alternate([lambda: order.append("a"), lambda: order.append("b")], seconds=0)
    assert order == ["a", "b"] * 4 and [len(seen) for seen in samples] == [3, 3]


# ---- models ----


def test_a_model_is_measured_beside_its_dense_form(run):
    result = found(run, "bench", "quantized", *TOKENS)
    assert result.keys() == MACHINE | {"model", "prompt_length", "new_tokens", "quantized", "dense", "prefill_speedup",
                                       "decode_speedup"}  # fmt: skip
    assert (result["model"], result["prompt_length"], result["new_tokens"]) == ("quantized", 16, 3)
    for kind in ("quantized", "dense"):
        figures = result[kind]
        assert figures["dtype"] == "bfloat16" and figures["samples"] == 3
        assert figures["prefill_tokens_s"] > 0 and figures["decode_tokens_s"] > 0
        for phase in ("prefill_share", "decode_share"):
            share = figures[phase]
            assert sum(share.values()) == pytest.approx(1) and 0 < share["rest"] < 1 and share["linear"] > 0
            assert (share["packed"] > 0) == (kind == "quantized")
    assert sum(result["quantized"]["kernels"].values()) == 21 and result["dense"]["kernels"] == {}
    for phase in ("prefill", "decode"):
        ratio = result["quantized"][f"{phase}_tokens_s"] / result["dense"][f"{phase}_tokens_s"]
        assert result[f"{phase}_speedup"] == pytest.approx(ratio)


def test_a_model_ends_as_a_table(run):
    code, out, _ = run("bench", "quantized", *TOKENS)
    assert code == 0 and out.startswith("quantized\n")
    assert re.search(r"^kernels +21 x \S+", out, re.MULTILINE)
    assert re.search(r"^ +quantized bfloat16 +dense bfloat16 +speed-up$", out, re.MULTILINE)
    for phase in ("prefill", "decode"):
        assert re.search(rf"^{phase}, tokens/s +[\d.,]+ +[\d.,]+ +[\d.]+x$", out, re.MULTILINE)
        assert re.search(rf"^{phase}, packed layers +\d+% +0%$", out, re.MULTILINE)
        assert re.search(rf"^{phase}, the rest +\d+% +\d+%$", out, re.MULTILINE)


def test_a_model_alone(run):
    result = found(run, "bench", "quantized", "--no-dense", *TOKENS)
    assert result["quantized"] and result["dense"] is None and result["decode_speedup"] is None
    result = found(run, "bench", "llama", *TOKENS)
    assert result["quantized"] is None and result["dense"]["decode_tokens_s"] > 0
    code, out, _ = run("bench", "llama", *TOKENS)
    assert code == 0 and "speed-up" not in out and "packed" not in out


def test_a_dense_model_is_packed_while_it_is_loaded_if_asked(run):
    result = found(run, "bench", "llama", "--bits", "8", "--group-size", "32", "--asym", *TOKENS)
    assert result["quantized"]["kernels"] and result["dense"]["decode_tokens_s"] > 0


# ---- whatever goes wrong ----

WRONG = {
    "half a shape": (("bench", "--shape", "64"), r"'64' was given; give OUTPUTSxINPUTS, such as 4096x4096"),
    "a shape of nothing": (("bench", "--shape", "0x64"), "'0x64' was given; give OUTPUTSxINPUTS"),
    "a shape that cannot be packed": ((*LAYER, "--shape", "60x60"), "60x60: 4-bit packing needs inputs in"),
    "no rows": (("bench", "--rows", "0"), "'0' was given; give 1 or more"),
    "bits": ((*LAYER, "--bits", "5"), r"bits=5 was asked for; .* holds 2, 3, 4 or 8 bits"),
    "bits of a model": (("bench", "llama", "--bits", "0"), r"bits=0 was asked for"),
    "group size": ((*LAYER, "--group-size", "0"), "group_size=0 was asked for; use -1"),
    "device": ((*LAYER, "--device", "cuda:9"), "device 'cuda:9' was asked for: "),
    "another clock": ((*LAYER, "--device", "meta"), "bench can read the clocks of cpu and cuda only"),
    "seconds": ((*LAYER, "--seconds", "-1"), "'-1' was given; give 0 or more"),
    "no such model": (("bench", "nowhere"), "nowhere: no such directory, and not a hub id"),
    "a model and a shape": (("bench", "quantized", "--shape", "64x64"), "--shape has a meaning only without MODEL"),
    "no model, but tokens": (("bench", "--new-tokens", "8"), "--new-tokens has a meaning only with MODEL"),
    "too long": (("bench", "quantized"), "prompt and new tokens together: length=576 .* at most 256"),
    "one token": (("bench", "quantized", *TOKENS, "--new-tokens", "1"), "new_tokens=1 was asked for, but the first"),
    "nothing": (("bench", "llama", *TOKENS, "--no-dense"), "llama: not quantized, and its dense form"),
    "quantized again": (("bench", "quantized", "--bits", "4"), "bits=4 was asked for, but it is quantized already"),
    "asym": (("bench", "llama", "--asym"), "--asym was asked for without --bits; say --bits 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_said_in_a_sentence(run, case):
    words, message = WRONG[case]
    code, out, err = run(*words)
    assert code == 2 and out == "" and "Traceback" not in err
    assert re.search(message, err), err
