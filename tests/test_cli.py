"""The command line: tables for people, one JSON object for programs, and a sentence for whatever goes wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from transformers import BertConfig, LlamaForCausalLM

import tiny
from wellrounded import cli, pipeline
from wellrounded.report import Report

CALIBRATION = ["--calibration", "text.txt", "--samples", "32", "--length", "64"]


@pytest.fixture
def here(tmp_path, monkeypatch, llama, quantized):
    """The current directory: `llama`, its `quantized` form, and a `text.txt`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(llama)
    (tmp_path / "quantized").symlink_to(quantized)
    (tmp_path / "text.txt").write_text("".join(f"{i} {tiny.TEXT}" for i in range(120)))
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Calls a command: its exit code, what it printed to standard output, and to standard error."""

    def call(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stopped:  # how argparse ends
            code = stopped.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def process(*words, **options):
    command = [sys.executable, "-m", "wellrounded", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def tree(directory) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


# ---- help ----


def test_help_is_shown_without_loading_torch():
    script = """if True:
        import sys
        import wellrounded, wellrounded.cli
        for words in (["--help"], ["quantize", "--help"], ["--version"]):
            try:
                wellrounded.cli.main(words)
            except SystemExit as stopped:
                assert stopped.code == 0
        heavy = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "rich"}
        sys.exit(", ".join(heavy & set(sys.modules)) or 0)"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Turn a language model into a few-bit GPTQ checkpoint" in ran.stdout and "--group-size" in ran.stdout


@pytest.mark.parametrize("verb", ["quantize", "eval", "chat", "inspect", "bench", "doctor"])
def test_every_command_explains_itself_and_its_exit_codes(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0 and f"usage: wellrounded {verb}" in out
    assert "exit codes: 0 good, 1 failed, 2 wrong usage, 3 finished but the result failed its own check" in out


def test_importing_the_package_offers_its_names_lazily():
    script = "import sys, wellrounded; assert 'quantize' in dir(wellrounded); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- quantize ----


def test_quantizing_ends_with_a_table_and_what_to_do_next(run, here):
    code, out, err = run("quantize", "llama", "-o", "out", *CALIBRATION)
    assert code == 0
    assert out.startswith("llama -> out\n")
    for label in ("scheme", "size", "bits per weight", "coverage", "layer error", "perplexity", "KL to original",
                  "same top token", "time", "calibration"):  # fmt: skip
        assert re.search(rf"^{label}  +\S", out, re.MULTILINE), label
    assert "text.txt: asked 32 windows of 64, used 32, 2,048 tokens" in out
    for line in ("run it:   wellrounded chat out", "serve it: vllm serve out",
                 "check it: wellrounded eval out --against llama"):  # fmt: skip
        assert line in out
    assert "quantizing, block: 3/3" in err
    assert (here / "out" / "config.json").exists() and not (here / "out.partial").exists()


def test_lines_are_not_cut_to_the_width_of_a_terminal_that_is_not_there(run):
    _, out, _ = run("quantize", "llama", "-o", "out", *CALIBRATION)
    assert "…" not in out and max(map(len, out.splitlines())) > 80


def test_json_is_one_object_on_standard_output(run, here):
    code, out, err = run("quantize", "llama", "-o", "out", *CALIBRATION, "--json")
    report = json.loads(out)
    assert code == 0 and report == json.loads((here / "out" / "quantization_report.json").read_text())
    assert {"out", "bits_per_weight", "size_bytes", "source_bytes", "coverage", "seconds", "peak_rss_bytes",
            "layers"} <= report.keys()  # fmt: skip
    assert set(report["coverage"]) == {"gptq", "rtn", "kept"} and report["out"] == "out"
    assert "quantizing, block: 3/3" in err


def test_options_reach_the_result(run, here):
    code, _, err = run("quantize", "llama", "-o", "out", "--bits", 3, "--group-size", 32, "--asym", "--act-order",
                       "--ignore", "down_proj", "--ignore", "o_proj", *CALIBRATION)  # fmt: skip
    assert code == 0
    config = json.loads((here / "out" / "config.json").read_text())["quantization_config"]
    expected = {"bits": 3, "group_size": 32, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}
    assert expected.items() <= config.items() and len(config["dynamic"]) == 2
    assert "note: vLLM and SGLang load 4 and 8 bits only, not 3" in err


def test_who_will_not_load_the_result_is_said_and_vllm_not_recommended(run):
    _, out, err = run("quantize", "llama", "-o", "out", "--asym", *CALIBRATION)
    assert "note: vLLM and SGLang load symmetric GPTQ checkpoints only" in err and "vllm serve" not in out


def test_plain_rounding_needs_no_data(run):
    code, out, _ = run("quantize", "llama", "-o", "out", "--calibration", "none")
    assert code == 0 and re.search(r"^calibration +none: plain rounding", out, re.MULTILINE)


def test_names_with_brackets_are_printed_as_they_are(run, here):
    shutil.copytree(here / "quantized", here / "[red]:smile:")
    code, out, _ = run("inspect", "[red]:smile:")
    assert code == 0 and out.startswith("[red]:smile:\n")


def test_a_result_is_replaced_only_with_force(run, here):
    (here / "out").mkdir()
    (here / "out" / "precious.txt").write_text("x")
    code, _, err = run("quantize", "llama", "-o", "out", *CALIBRATION)
    assert code == 2 and "out exists and is not empty; choose another directory or pass --force" in err
    assert run("quantize", "llama", "-o", "out", *CALIBRATION, "--force")[0] == 0
    assert not (here / "out" / "precious.txt").exists()


def test_a_result_that_fails_its_own_check_exits_with_3(run, here, monkeypatch):
    monkeypatch.setattr(Report, "problems", lambda self: ["KL to the original is 7 nats per token"])
    code, out, err = run("quantize", "llama", "-o", "out", *CALIBRATION)
    assert code == 3 and "check failed: KL to the original is 7 nats per token" in err
    assert "check failed" not in out and (here / "out" / "config.json").exists()
    code, out, _ = run("quantize", "llama", "-o", "again", *CALIBRATION, "--json")
    assert code == 3 and json.loads(out)["problems"] == ["KL to the original is 7 nats per token"]


def test_a_model_that_computes_nonsense_fails_the_check_and_its_json_is_json(run, here):
    """The head lies outside the blocks: nothing but the comparison with the original notices."""
    shutil.copytree(here / "llama", here / "broken")
    with tiny.rewritten(here / "broken") as tensors:
        tensors["lm_head.weight"][5] = 3e38  # finite, but the sums over it are not
    code, out, err = run("quantize", "broken", "-o", "out", *CALIBRATION, "--json")
    assert code == 3 and "check failed: KL to the original is nan" in err
    assert json.loads(out)["fidelity"]["kl_mean"] is None
    assert json.loads((here / "out" / "quantization_report.json").read_text())["fidelity"]["kl_mean"] is None


# ---- stopping ----


@contextmanager
def stopped_at(block):
    """Ctrl-C when the block with this number is looked at."""
    siblings = pipeline.BlockWalk.siblings

    def interrupted(walk, index, *rest):
        if index == block:
            raise KeyboardInterrupt
        return siblings(walk, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.BlockWalk, "siblings", interrupted)
        yield


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(run, here):
    with stopped_at(block=2):
        code, out, err = run("quantize", "llama", "-o", "out", *CALIBRATION)
    assert code == 1 and out == ""
    assert "wellrounded quantize: stopped; finished blocks are kept, and the same command goes on where it" in err
    assert sorted(path.name for path in (here / "out.partial").glob("model*")) == [
        "model.layers.0.part", "model.layers.1.part",
    ]  # fmt: skip
    code, _, err = run("eval", "out")
    assert code == 1 and "out: unfinished, its finished blocks lie in out.partial; run the same" in err
    assert run("quantize", "llama", "-o", "out", *CALIBRATION, "--resume")[0] == 0
    assert not (here / "out.partial").exists()


def test_ctrl_c_before_the_first_block_leaves_nothing(run, here):
    before = tree(here)
    with stopped_at(block=0):
        code, _, err = run("quantize", "llama", "-o", "out", *CALIBRATION)
    assert code == 1 and "stopped" in err and tree(here) == before


def test_ctrl_c_in_another_command_is_one_line(run, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("wellrounded.api.evaluate", interrupted)
    code, _, err = run("eval", "llama", "--text", "text.txt")
    assert code == 1 and err.endswith("\nwellrounded eval: stopped\n")


def test_a_reader_that_has_gone_is_no_reason_for_a_traceback(here):
    command = [sys.executable, "-m", "wellrounded", "doctor", "--json"]  # so short that it stays in the buffer
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(60) == 1


# ---- eval ----


def test_eval_prints_perplexity_and_with_an_original_the_distance(run):
    code, out, err = run("eval", "quantized", "--text", "text.txt", "--length", 64, "--windows", 4)
    assert code == 0 and re.search(r"^perplexity  +\d+\.\d{3}$", out, re.MULTILINE) and "original" not in out
    assert "tokens      252 of text.txt, windows of 64" in out and "evaluating, window: 4/4" in err
    code, out, _ = run("eval", "quantized", "--against", "llama", "--text", "text.txt", "--length", 64)
    assert re.search(r"^perplexity  +\d+\.\d{3}, original \d+\.\d{3}$", out, re.MULTILINE)
    for label in ("KL to original", "same top token"):
        assert re.search(rf"^{label}  +\S", out, re.MULTILINE), label


def test_eval_json_has_the_documented_keys(run):
    words = ("--text", "text.txt", "--length", 64, "--windows", 4, "--json")
    _, out, _ = run("eval", "quantized", *words)
    assert json.loads(out).keys() == {"perplexity", "tokens", "seconds", "length"}
    _, out, _ = run("eval", "quantized", "--against", "llama", *words)
    result = json.loads(out)
    assert result.keys() == {"perplexity", "tokens", "seconds", "length", "against", "kl_mean", "kl_median", "kl_p99",
                             "top1_agreement"}  # fmt: skip
    assert result["tokens"] == 4 * 63 and 0 < result["kl_mean"] < 0.1
    _, out, _ = run("eval", "llama", *words)
    assert json.loads(out)["perplexity"] == pytest.approx(result["against"]["perplexity"])


def test_eval_of_a_model_against_itself_finds_no_distance(run):
    words = ("--text", "text.txt", "--length", 64, "--windows", 2, "--json")
    result = json.loads(run("eval", "llama", "--against", "llama", *words)[1])
    assert (result["kl_mean"], result["top1_agreement"]) == (0, 1)
    assert result["perplexity"] == result["against"]["perplexity"]


def test_eval_joins_several_texts(run, here):
    (here / "more.txt").write_text("More of it. " * 200)
    both = run("eval", "llama", "--text", "text.txt", "--text", "more.txt", "--length", 64, "--json")
    one = run("eval", "llama", "--text", "text.txt", "--length", 64, "--json")
    assert json.loads(both[1])["tokens"] > json.loads(one[1])["tokens"]


# ---- inspect, doctor, chat ----


def test_inspect_tells_what_a_directory_holds(run, quantized):
    code, out, _ = run("inspect", "quantized", "--layers")
    assert code == 0 and "gptq, 4-bit g64 sym" in out and "21 quantized, 110,592 weights" in out
    assert out.count("4-bit g64 sym  scales") == 21
    found = json.loads(run("inspect", "quantized", "--json")[1])
    assert (found["format"], found["schemes"], found["weights"]) == ("gptq", {"4-bit g64 sym": 21}, 110592)
    assert found["dense_tensors"] == 9 and len(found["layers"]) == 21
    assert found["packed_bytes"] + found["dense_bytes"] == found["size_bytes"]
    assert 0 < found["layers"][0]["smallest_scale"] < found["layers"][0]["largest_scale"]


def test_doctor_tells_versions_and_kernels(run):
    code, out, _ = run("doctor")
    assert code == 0 and torch.__version__ in out and "kernels for a 4096 x 4096 layer" in out
    found = json.loads(run("doctor", "--json")[1])
    assert found["packages"]["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    answers = found["kernels"]["4-bit g128 sym"]
    assert answers[-1] == {"kernel": "reference", "refuses": None}


@pytest.mark.parametrize("options", [(), ("--raw",), ("--temperature", 0.7), ("--system", "Be brief.")])
def test_chat_answers_a_prompt(run, options):
    code, out, err = run("chat", "quantized", "--prompt", "The quick", "--max-new-tokens", 8, *options)
    assert code == 0 and out.strip() and re.search(r"^[\d.]+ tokens/s$", err, re.MULTILINE)
    assert out.startswith("The quick") == ("--raw" in options)


def test_chat_streams_what_it_makes(here, monkeypatch):
    """What is written is written between one token and the next, not when all are there."""
    forward, tokens, written_after = LlamaForCausalLM.forward, [], []

    class Out(io.StringIO):
        def write(self, text):
            written_after.append(len(tokens))
            return super().write(text)

    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *args, **kw: tokens.append(1) or forward(*args, **kw))
    monkeypatch.setattr(sys, "stdout", Out())
    assert cli.main(["chat", "llama", "--raw", "--prompt", "The quick brown fox", "--max-new-tokens", "40"]) == 0
    assert len(tokens) > 5 and len(set(written_after)) > len(tokens) / 4


def test_chat_goes_on_until_an_empty_line(run, monkeypatch):
    lines = iter(["The quick", "brown", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, err = run("chat", "quantized", "--max-new-tokens", 4)
    assert code == 0 and err.count("tokens/s") == 2 and "an empty line ends the chat" in err


# ---- whatever goes wrong ----


def bert(here):
    BertConfig(hidden_size=64, architectures=["MyBert"]).save_pretrained(here / "bert")


def pickles(here):
    (here / "pickles").mkdir()
    shutil.copy(here / "llama" / "config.json", here / "pickles")
    (here / "pickles" / "pytorch_model.bin").write_bytes(b"1234")


def truncated(here):
    shutil.copytree(here / "llama", here / "truncated")
    path = here / "truncated" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def not_a_number(here):
    shutil.copytree(here / "llama", here / "nan")
    with tiny.rewritten(here / "nan") as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan


def texts(here):
    (here / "empty.txt").write_text("")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (here / "short.txt").write_text("Hello, world.")


def occupied(here):
    (here / "full").mkdir()
    (here / "full" / "x").write_text("x")


def damaged(here):
    shutil.copytree(here / "quantized", here / "damaged")
    with tiny.rewritten(here / "damaged") as tensors:
        tensors["model.layers.1.mlp.up_proj.scales"][0, 7] = torch.nan


def lacking(here):
    shutil.copytree(here / "quantized", here / "lacking")
    with tiny.rewritten(here / "lacking") as tensors:
        del tensors["model.layers.1.mlp.up_proj.qweight"]


def other_vocabulary(here):
    tiny.save(tiny.build("llama", torch.bfloat16, num_hidden_layers=1, vocab_size=330), here / "other")


def nothing(here):
    pass


def quantize(model, *words):
    return ("quantize", model, "-o", "out", *(words or CALIBRATION))


EMPTY = ("--calibration", "empty.txt", "--length", 64)
SHORT = ("--calibration", "short.txt", "--length", 64)
BINARY = ("--calibration", "binary.txt", "--length", 64)
TEXT = ("--text", "text.txt", "--length", 64)
WRONG = {
    # what is wrong: (what is there, the command, exit code, what the message says)
    "no such model": (nothing, quantize("nowhere"), 2, r"nowhere: no such directory, and not a hub id \(ORG"),
    "unknown class": (bert, quantize("bert"), 2, r"a 'bert' model \(MyBert\), which transformers .* cannot build"),
    "pickles": (pickles, quantize("pickles"), 2, r"read from safetensors .* only pytorch_model\.bin; convert"),
    "truncated": (truncated, quantize("truncated"), 1, r"model\.safetensors: .* bytes, its header promises"),
    "out not empty": (occupied, ("quantize", "llama", "-o", "full", *CALIBRATION), 2, "full exists .*choose another"),
    "bits": (nothing, quantize("llama", "--bits", 5), 2, "bits=5 was asked for; .* holds 2, 3, 4 or 8 bits"),
    "group size": (nothing, quantize("llama", "--group-size", 100), 2, "group_size=100 was asked for; use .* multiple"),
    "group too large": (nothing, quantize("llama", "--group-size", 256), 2, "widest layer has 128 inputs; use 64"),
    "empty text": (texts, quantize("llama", *EMPTY), 2, r"'empty\.txt': the file is empty"),
    "binary text": (texts, quantize("llama", *BINARY), 2, r"'binary\.txt': not UTF-8 .*; convert it"),
    "short text": (texts, quantize("llama", *SHORT), 2, "holds 1. tokens and 2,048 are needed; give more text"),
    "missing text": (nothing, quantize("llama", "--calibration", "gone.txt"), 2, r"'gone\.txt': no such file"),
    "unknown data": (nothing, quantize("llama", "--calibration", "wikitxt2"), 2, "'wikitxt2': not a known data set"),
    "none and some": (nothing, quantize("llama", *CALIBRATION, "--calibration", "none"), 2, "choose one"),
    "window": (nothing, quantize("llama", *CALIBRATION, "--length", 512), 2, "length=512 .* reads at most 256 tokens"),
    "nan": (not_a_number, quantize("nan"), 1, r"layers\.1\.mlp\.up_proj\.weight: .*NaN"),
    "nan, rounded": (not_a_number, quantize("nan", "--calibration", "none"), 1, r"up_proj\.weight: .*NaN"),
    "twice": (nothing, quantize("quantized"), 2, r"quantized: already quantized \(gptq\); start from the original"),
    "unknown flag": (nothing, quantize("llama", "--bitz", 4), 2, "unrecognized arguments: --bitz"),
    "no out": (nothing, ("quantize", "llama"), 2, "no directory for the result: -o OUT, or --dry-run"),
    "pattern": (nothing, quantize("llama", "--ignore", "dwn_proj"), 2, "ignore='dwn_proj' .* no layer's name holds it"),
    "broken pattern": (nothing, quantize("llama", "--ignore", "("), 2, "is not a regular expression"),
    "device": (nothing, quantize("llama", "--device", "cuda:9"), 2, "device 'cuda:9' was asked for: "),
    "eval, damaged": (damaged, ("eval", "damaged", *TEXT), 1, r"1\.mlp\.up_proj\.scales is NaN or Inf in 1 of 128"),
    "chat, damaged": (damaged, ("chat", "damaged", "--prompt", "x"), 1, r"1\.mlp\.up_proj\.scales is NaN or Inf in 1"),
    "inspect, damaged": (damaged, ("inspect", "damaged"), 1, r"1\.mlp\.up_proj\.scales is NaN or Inf in 1 of 128"),
    "eval, lacking": (lacking, ("eval", "lacking", *TEXT), 1, r"1\.mlp\.up_proj\.qweight is missing"),
    "inspect, lacking": (lacking, ("inspect", "lacking"), 1, r"1\.mlp\.up_proj\.qweight is missing; fetch the"),
    "inspect, dense": (nothing, ("inspect", "llama"), 2, r"llama: not a quantized model \(no quantization_config"),
    "inspect, nowhere": (nothing, ("inspect", "nowhere"), 2, "nowhere: no such directory"),
    "eval, no text": (nothing, ("eval", "llama", "--text", "gone.txt"), 2, r"--text gone\.txt: cannot be read"),
    "eval, short text": (texts, ("eval", "llama", "--text", "short.txt", "--length", 64), 2, "one window needs 64"),
    "eval, no windows": (nothing, ("eval", "llama", *TEXT, "--windows", 0), 2, "'0' was given; give 1 or more"),
    "eval, one token": (nothing, ("eval", "llama", "--text", "text.txt", "--length", 1), 2, "at least 2 tokens"),
    "eval, other": (other_vocabulary, ("eval", "llama", "--against", "other", *TEXT), 2, "know 320 and 330 tokens"),
    "chat, empty": (nothing, ("chat", "llama", "--raw", "--prompt", ""), 2, "the prompt is empty; give"),
    "chat, no kernel": (nothing, ("chat", "quantized", "--prompt", "x", "--kernel", "fast"), 2, "no kernel is called"),
    "chat, system": (nothing, ("chat", "llama", "--raw", "--system", "x", "--prompt", "x"), 2, "--system has no place"),
    "chat, cold": (nothing, ("chat", "llama", "--temperature", "-1"), 2, "'-1' was given; give 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_said_in_a_sentence_and_leaves_nothing_behind(run, here, case):
    prepare, words, expected, message = WRONG[case]
    prepare(here)
    before = tree(here)
    code, out, err = run(*words)
    assert code == expected
    assert re.search(message, err, re.DOTALL), err
    assert out == "" and "Traceback" not in err
    left = tree(here) - before
    finished = {"out.partial/model.layers.0.part"}  # the only thing worth leaving
    assert not left or finished <= left, left


def test_only_finished_blocks_are_left_by_a_layer_that_fails(run, here):
    not_a_number(here)
    assert run(*quantize("nan"))[0] == 1
    assert sorted(path.name for path in (here / "out.partial").iterdir()) == [
        "journal.jsonl", "model.layers.0.part", "outside.part",
    ]  # fmt: skip


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, llama):
    with pytest.raises(cli.WellRoundedError, match="token id 320, but the model knows ids 0 to 319; use the tokenizer"):
        tiny.quantize(llama, tmp_path / "out", calibration=torch.full((80, 32), tiny.VOCABULARY))
    assert not list(tmp_path.iterdir())


def test_a_real_process_returns_the_exit_code_and_no_traceback(here):
    ran = process("quantize", "nowhere", "-o", "out", *CALIBRATION, "--json")
    said = "wellrounded quantize: nowhere: no such directory, and not a hub id (ORGANIZATION/NAME) either\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", said)


def test_a_real_process_prints_nothing_but_json(here):
    ran = process("quantize", "llama", "-o", "out", "--json", *CALIBRATION)
    assert ran.returncode == 0 and json.loads(ran.stdout)["out"] == "out"
