"""A bit budget: what layers need is measured, the result fits to the byte, and one scheme for all is never better."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tiny
import wellrounded as wr
from wellrounded import cli, contest
from wellrounded.budget import Budget
from wellrounded.core.scheme import Scheme
from wellrounded.errors import UsageError
from wellrounded.formats.config import from_config

SOME = 3.9  # bits per weight, for which some layers have 3 bits


def quantize(model, out, said=None, **options):
    """tiny.quantize with the preset that takes least; what the run says goes to the list `said`."""
    told = [] if said is None else said
    tell = lambda p: told.append(p.message or f"block {p.done}")  # noqa: E731
    return tiny.quantize(model, out, preset="fast", progress=tell, **options)


def schemes(out: Path) -> dict[str, Scheme]:
    """By layer, as the file stores them."""
    return {name: weight.scheme for name, weight in tiny.stored_weights(out).items()}


def costs(file: Path) -> dict[str, dict[Scheme, float]]:
    """By layer, what a measurement says that each scheme would cost its set."""
    sets = json.loads(file.read_text())["sets"]
    return {name: {Scheme(b, g): cost for b, g, cost in one["costs"]} for one in sets for name in one["layers"]}


@pytest.fixture(scope="module")
def mixed(llama, tmp_path_factory):
    """`llama` in SOME bits per weight: its directory, its report, and what the run said."""
    out, said = tmp_path_factory.mktemp("budget") / "out", []
    return out, quantize(llama, out, said, bpw=SOME), said


@pytest.fixture(scope="module")
def measured(mixed) -> Path:
    """The measurement of `llama`."""
    return mixed[0].with_name("out.measurement.json")


@pytest.fixture
def judged(monkeypatch):
    """Says how far from the original what is tried is, one after the other."""

    def say(*distances):
        left = iter(distances)
        monkeypatch.setattr(contest, "distance", lambda fidelity: next(left))

    return say


# ---- what is written ----


def test_no_byte_more_than_asked_and_hardly_one_less(mixed):
    _, report, _ = mixed
    used = report._layer_bits()
    assert SOME - 0.02 < used <= SOME
    assert report.budget["asked"] == "3.9 bits per weight" and report.budget["used"] == f"{used:.3f} bits per weight"


@pytest.mark.parametrize("head", [False, True])
def test_a_size_is_that_of_all_files_together(llama, tmp_path, head):
    asked = 170_000 if head else 180_000
    report = quantize(llama, tmp_path / "out", size=asked, lm_head=head)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert asked - 3000 < size <= asked and report.size_bytes == size
    assert ("lm_head" in schemes(tmp_path / "out")) == head


def test_layers_that_read_the_same_tensor_have_the_same_scheme(mixed):
    found = schemes(mixed[0])
    assert len({*found.values()}) > 2
    for block in range(3):
        for parent, leaves in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            assert len({found[f"model.layers.{block}.{parent}.{leaf}_proj"] for leaf in leaves}) == 1


def test_engines_that_fuse_layers_find_the_scheme_under_the_fused_name(mixed):
    stored = json.loads((mixed[0] / "config.json").read_text())["quantization_config"]
    recipe, found = from_config(stored).recipe, schemes(mixed[0])
    for name, scheme in found.items():
        assert recipe.scheme_of(name) == scheme
        fused = re.sub("(q|k|v)_proj$", "qkv_proj", re.sub("(gate|up)_proj$", "gate_up_proj", name))
        assert recipe.scheme_of(fused) == scheme


def test_the_result_computes_what_its_files_say(mixed, llama):
    dense = tiny.in_turn(llama)
    torch.testing.assert_close(
        tiny.logits(wr.load(mixed[0])), tiny.logits(tiny.twin(dense, mixed[0])), atol=0.06, rtol=0.02
    )


def test_where_four_bits_fit_there_are_none_that_serving_engines_refuse(llama, measured, tmp_path):
    report = quantize(llama, tmp_path / "out", bpw=4.6, measurement=measured)
    assert {scheme.bits for scheme in schemes(tmp_path / "out").values()} == {4, 8} and not report.notes


def test_what_is_ignored_stays_dense(llama, tmp_path):
    quantize(llama, tmp_path / "out", bpw=SOME, ignore=["down_proj"])
    assert not any("down_proj" in name for name in schemes(tmp_path / "out"))


def test_all_experts_of_a_layer_have_one_scheme(tmp_path):
    model = tiny.build("qwen3_moe", torch.bfloat16, num_hidden_layers=2)
    quantize(tiny.save(model, tmp_path / "moe"), tmp_path / "out", bpw=SOME)
    found = schemes(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        (scheme,) = {scheme for name, scheme in found.items() if name.startswith(f"{experts}.")}
        assert from_config(stored).recipe.scheme_of(experts) == scheme


# ---- what layers need ----


def test_what_has_no_effect_in_the_end_costs_nothing(tmp_path):
    """The gate's own output error says otherwise: it is the model's output that counts."""
    model = tiny.build("llama", torch.bfloat16)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    quantize(model, tmp_path / "out", bpw=SOME)
    found = costs(tmp_path / "out.measurement.json")
    for name, by_scheme in found.items():
        silent = name.startswith("model.layers.1.mlp.")
        assert (max(by_scheme.values()) == 0) == silent, name
    assert schemes(tmp_path / "out")["model.layers.1.mlp.gate_proj"] == Scheme(3, 64)


def test_more_bits_and_smaller_groups_cost_less(measured):
    for by_scheme in costs(measured).values():
        for larger, smaller in pairwise([Scheme(3, 64), Scheme(3, 32), Scheme(4, 64), Scheme(4, 32), Scheme(8, 64)]):
            if {larger, smaller} <= by_scheme.keys():
                assert by_scheme[larger] > by_scheme[smaller] > 0


def test_it_is_measured_once_for_every_budget(llama, measured, tmp_path):
    said = []
    quantize(llama, tmp_path / "out", said, bpw=4.4, measurement=measured)
    assert any(line.startswith("what layers need was measured before") for line in said)
    assert not any(line.startswith("measuring") for line in said)
    assert not (tmp_path / "out.measurement.json").exists()


def test_a_measurement_of_something_else_is_refused(llama, measured, tmp_path):
    own = Path(tmp_path / "own.json")
    own.write_text(measured.read_text())
    with pytest.raises(
        UsageError, match=r"own\.json: measured for another request \(calibration: was .*\); name another"
    ):
        quantize(llama, tmp_path / "out", bpw=SOME, measurement=own, samples=40)
    with pytest.raises(UsageError, match=r"measured for another request \(layers: was .*count"):
        quantize(llama, tmp_path / "out", bpw=SOME, measurement=own, ignore=["q_proj"])
    with pytest.raises(UsageError, match=r"measured for another request \(tensors: was "):
        quantize(tiny.build("llama", seed=1), tmp_path / "out", bpw=SOME, measurement=own)
    own.write_text('{"what": ')
    with pytest.raises(UsageError, match=r"own\.json: cannot be read as a measurement"):
        quantize(llama, tmp_path / "out", bpw=SOME, measurement=own)
    with pytest.raises(UsageError, match="no such directory for the measurement"):
        quantize(llama, tmp_path / "out", bpw=SOME, measurement=tmp_path / "nowhere" / "m.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.json"]


def test_the_file_beside_the_result_is_made_anew_when_it_no_longer_fits(llama, measured, tmp_path):
    (tmp_path / "out.measurement.json").write_text(measured.read_text())
    said = []
    quantize(llama, tmp_path / "out", said, bpw=SOME, samples=40)
    assert any(line.startswith("measuring again") for line in said)


# ---- never worse than one scheme for all ----


def test_both_are_tried_and_the_report_says_so(mixed):
    out, report, said = mixed
    mixture, plain = report.budget["tried"]
    assert plain["scheme"] == "3-bit g32 sym" and mixture["scheme"] == report.scheme == report.budget["written"]
    assert mixture["distance"] == pytest.approx(report.fidelity["kl_mean"]) and mixture["distance"] < plain["distance"]
    assert any(line == "trying 3-bit g32 sym everywhere, which the mixture has to beat" for line in said)
    assert [value for label, value in report.summary() if label == "tried"] == [
        f"{mixture['scheme']}: KL {mixture['distance']:.4f} (written)", f"3-bit g32 sym: KL {plain['distance']:.4f}"
    ]  # fmt: skip
    assert json.loads((out / "quantization_report.json").read_text())["budget"] == report.budget


def test_a_uniform_scheme_that_is_better_is_written_instead(llama, measured, tmp_path, judged):
    own = Path(tmp_path / "own.json")
    own.write_text(re.sub(r'"tried": \{[^}]*\}', '"tried": {}', measured.read_text()))
    judged(0.01, 0.02, 0.01)
    report = quantize(llama, tmp_path / "out", bpw=SOME, measurement=own)
    assert {*schemes(tmp_path / "out").values()} == {Scheme(3, 32)} and report.scheme == "3-bit g32 sym"
    assert any(
        re.match(r"mixed \(.*\) was tried and is worse, 0\.0200 against 0\.0100 .*; every layer is 3-bit g32", note)
        for note in report.notes
    )
    assert report.budget["written"] == "3-bit g32 sym" and not (tmp_path / "out.partial").exists()


def test_without_held_out_text_nothing_is_claimed(llama, tmp_path):
    model = tiny.build("llama", torch.bfloat16, max_position_embeddings=1024)
    options = {"calibration": tiny.ids(1, 2500), "samples": 2, "length": 1024}
    report = tiny.quantize(model, tmp_path / "out", preset="fast", bpw=SOME, **options)
    assert report.fidelity is None and [one["distance"] for one in report.budget["tried"]] == [None, None]
    assert {*schemes(tmp_path / "out").values()} == {Scheme(3, 32)}
    assert any("cannot be proven to be better: no text is held out" in note for note in report.notes)


# ---- a run that is stopped ----


def test_a_run_that_goes_on_neither_measures_nor_tries_again(llama, mixed, tmp_path):
    def tell(progress):
        written = (tmp_path / "out.partial").exists()
        if not progress.message and written and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(llama, tmp_path / "out", preset="fast", bpw=SOME, progress=tell)
    said = []
    quantize(llama, tmp_path / "out", said, bpw=SOME)
    assert not any(line.startswith(("measuring", "trying")) for line in said) and said.count("block 1") == 1
    again, whole = (tiny.tensors(out) for out in (tmp_path / "out", mixed[0]))
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_trial_that_was_stopped_goes_on_too_and_leaves_nothing(llama, measured, tmp_path):
    own = Path(tmp_path / "own.json")
    own.write_text(re.sub(r'"tried": \{[^}]*\}', '"tried": {}', measured.read_text()))

    def tell(progress):
        if not progress.message and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(llama, tmp_path / "out", preset="fast", bpw=SOME, measurement=own, progress=tell)
    trial = tmp_path / ".out.uniform.partial"
    assert json.loads((trial / "journal.jsonl").read_text().splitlines()[0])["request"]["recipe"]["bits"] == 3
    before = {path.name: path.stat().st_mtime_ns for path in trial.glob("*.part")}
    kept = []

    def look(progress):
        if trial.exists() and progress.done == 2 and not kept:
            kept.append({name: (trial / name).stat().st_mtime_ns for name in before})

    report = tiny.quantize(llama, tmp_path / "out", preset="fast", bpw=SOME, measurement=own, progress=look)
    assert kept == [before] and len(before) == 3 and len(report.budget["tried"]) == 2  # what is outside, two blocks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log", "own.json"]


def test_a_run_that_was_stopped_while_writing_the_uniform_scheme_goes_on_with_it(llama, measured, tmp_path, judged):
    own = Path(tmp_path / "own.json")
    own.write_text(re.sub(r'"tried": \{[^}]*\}', '"tried": {}', measured.read_text()))
    judged(0.01, 0.02)
    blocks = []

    def tell(progress):
        blocks.append("" if progress.message else progress.what)
        if len(list(filter(None, blocks))) == 8:  # the trial's three, the mixture's three, and two
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(llama, tmp_path / "out", preset="fast", bpw=SOME, measurement=own, progress=tell)
    judged(0.01)
    said = []
    report = quantize(llama, tmp_path / "out", said, bpw=SOME, measurement=own)
    assert not any(line.startswith("trying") for line in said) and report.scheme == "3-bit g32 sym"
    assert "going on after" in (tmp_path / "out.log").read_text()


def test_parts_of_a_mixture_that_has_lost_are_not_in_the_way(llama, measured, tmp_path, judged, monkeypatch):
    """The run ended between the verdict and the first block of what is written instead."""
    own = Path(tmp_path / "own.json")
    own.write_text(re.sub(r'"tried": \{[^}]*\}', '"tried": {}', measured.read_text()))
    judged(0.01, 0.02, 0.01)
    monkeypatch.setattr("wellrounded.api.Beaten", KeyError)  # nobody catches it: the process is gone
    with pytest.raises(contest.Beaten):
        quantize(llama, tmp_path / "out", bpw=SOME, measurement=own)
    assert (tmp_path / "out.partial").exists()
    assert quantize(llama, tmp_path / "out", bpw=SOME, measurement=own).scheme == "3-bit g32 sym"


# ---- what cannot be done ----


@pytest.mark.parametrize("asked", [2.5, 3.0, 8.8, 16])
def test_a_budget_that_is_out_of_range_is_refused_with_the_range_before_anything_is_measured(llama, tmp_path, asked):
    range_ = r"everything in 3 bits takes 3\.2\d\d bits per weight, and in 8 bits 8\.75\d bits per weight"
    with pytest.raises(UsageError, match=rf"{asked:g} bits per weight were asked for; of this model {range_}"):
        quantize(llama, tmp_path / "out", bpw=asked)
    with pytest.raises(UsageError, match=r"1,000 bytes were asked for; .* takes 1\d\d,\d\d\d bytes, and"):
        quantize(llama, tmp_path / "out", size=1000)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("other", [{"bits": 4}, {"group_size": 64}, {"sym": False}, {"act_order": True}])
def test_what_the_budget_decides_cannot_be_asked_for_too(llama, tmp_path, other):
    with pytest.raises(
        UsageError, match=r"3\.9 bits per weight were asked for together with .*, which the budget decides"
    ):
        quantize(llama, tmp_path / "out", bpw=SOME, **other)


def test_a_budget_is_one_number_and_makes_sense():
    for wrong in ({}, {"bpw": 4.0, "size": 10}, {"bpw": 0.0}, {"bpw": float("nan")}, {"size": "a lot"}):
        with pytest.raises(UsageError):
            Budget(**wrong)
    assert Budget(size="4.2GB").size == 4_200_000_000


def test_without_data_nothing_is_known_of_what_layers_need(llama, tmp_path):
    with pytest.raises(UsageError, match="what layers need is measured on data"):
        quantize(llama, tmp_path / "out", bpw=SOME, calibration="none")
    with pytest.raises(UsageError, match="serves bpw or size"):
        quantize(llama, tmp_path / "out", measurement=tmp_path / "m.json")


def test_the_command_line_says_what_became_of_a_budget(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{i} {tiny.TEXT}" for i in range(120)))
    data = ["--calibration", "text.txt", "--samples", "32", "--length", "64"]
    words = ["quantize", str(llama), "-o", "out", "--bpw", "3.9", "--preset", "fast", *data]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"^bit budget +3\.9 bits per weight, of which 3\.[89]\d+ bits per weight are used$", out, re.M)
    assert len(re.findall(r"^tried .*: KL \d", out, re.M)) == 2
    for wrong, why in ((["--bits", "4"], "leave one out"), (["--dry-run"], "cannot foretell a mixture")):
        assert cli.main([*words, *wrong, "--force"]) == 2
        assert why in capsys.readouterr().err
