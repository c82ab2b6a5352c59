"""`wellrounded eval --tasks`: what the harness is given, and what becomes of what it counts. The harness is a fake."""

import json
import sys
from types import ModuleType

import pytest

from wellrounded import cli
from wellrounded.nn import QuantLinear

RESULTS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.25},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": "N/A"},
    },
    "n-samples": {"arc_easy": {"original": 9, "effective": 7}},
    "n-shot": {"arc_easy": 0, "gsm8k": 5},
}


class HFLM:
    def __init__(self, **given):
        self.given = given


class TaskManager:
    def match_tasks(self, names):
        return [name for name in names if name in RESULTS["results"]]


@pytest.fixture
def asked(monkeypatch):
    """A harness that answers with RESULTS and a list of what it was asked."""
    calls = []

    def simple_evaluate(model, **options):
        print("noise of the harness")
        calls.append({"model": model.given, **options})
        return RESULTS

    parts = {"lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "0.4.13"}}
    parts |= {"lm_eval.tasks": {"TaskManager": TaskManager}, "lm_eval.models": {}}
    parts |= {"lm_eval.models.huggingface": {"HFLM": HFLM}}
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def evaluate(capsys, *words):
    code = cli.main(["eval", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_harness_gets_the_model_of_our_loader(asked, capsys, quantized):
    evaluate(capsys, quantized, "--tasks", "arc_easy,gsm8k", "--limit", 7)
    (call,) = asked
    assert any(isinstance(module, QuantLinear) for module in call["model"]["pretrained"].modules())
    assert call["model"]["tokenizer"]("the")["input_ids"]
    assert (call["tasks"], call["limit"]) == (["arc_easy", "gsm8k"], 7)


def test_scores_are_a_table(asked, capsys, quantized):
    code, out, err = evaluate(capsys, quantized, "--tasks", "arc_easy,gsm8k")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and "noise" in err
    assert lines[1:] == [
        ["task", "metric", "examples", "value", "+-"],
        ["arc_easy", "acc", "7", "0.5000", "0.2500"],
        ["gsm8k", "exact_match,", "strict-match", "0.1250"],
    ]


def test_scores_are_one_json_object_with_the_original_beside_them(asked, capsys, quantized, llama):
    code, out, _ = evaluate(capsys, quantized, "--tasks", "arc_easy", "--against", llama, "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == {"tasks", "lm_eval", "seconds"} and found["lm_eval"] == "0.4.13"
    assert found["tasks"][0] == {
        "task": "arc_easy", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.25, "examples": 7, "shots": 0,
        "original": 0.5,
    }  # fmt: skip
    assert found["tasks"][1]["stderr"] is None
    kinds = [any(isinstance(m, QuantLinear) for m in call["model"]["pretrained"].modules()) for call in asked]
    assert kinds == [True, False]


def test_a_file_may_name_a_task(asked, capsys, quantized, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine")
    assert evaluate(capsys, quantized, "--tasks", tmp_path / "mine.yaml")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    {
        "unknown": (["--tasks", "arc_easy,arc_eazy"], "arc_eazy is not among the tasks"),
        "none": (["--tasks", ","], "nothing is not among the tasks"),
        "and a text": (["--tasks", "arc_easy", "--text", "a.txt"], "--text was asked for together with --tasks"),
        "and a length": (["--tasks", "arc_easy", "--length", "8"], "--length was asked for together with --tasks"),
        "limit alone": (["--limit", "8"], "--limit was asked for without --tasks"),
    }.values(),
)
def test_what_cannot_be_asked_together_is_refused(asked, capsys, quantized, words, said):
    code, out, err = evaluate(capsys, quantized, *words)
    assert (code, out, asked) == (2, "", []) and said in err


def test_data_that_cannot_be_had_is_a_sentence(asked, capsys, quantized, monkeypatch):
    def no_network(model, **options):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", no_network)
    code, _, err = evaluate(capsys, quantized, "--tasks", "arc_easy")
    assert code == 2 and "arc_easy: their data cannot be read (Couldn't reach the hub)" in err


def test_without_the_harness_it_is_said_how_to_install_it(capsys, quantized, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = evaluate(capsys, quantized, "--tasks", "arc_easy")
    assert code == 2 and "pip install lm-eval" in err
