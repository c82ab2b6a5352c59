"""The GPU benchmark's own parts, on a CPU: whoever multiplies wrongly is not timed, and time that is spent is said."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import gpu
import gpu_peers
from wellrounded import kernels

SCRIPT = Path(gpu.__file__)
FEW = 16


def rows_of(results, section):
    return results["sections"][section]["rows"]


# ---- all of it, once ----


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What a smoke run prints as JSON, and its directory."""
    out = tmp_path_factory.mktemp("smoke") / "out"
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out


def test_every_section_has_the_rows_that_were_asked_for(smoke):
    results, _ = smoke
    assert list(results["sections"]) == list(gpu.WEIGHTS) and not results["skipped"]
    assert not any("failed" in section for section in results["sections"].values())
    assert len(rows_of(results, "copy")) == 2
    small = gpu.SMOKE
    sizes = [(shape, 4) for shape in small.shapes] + [(small.shapes[0], bits) for bits in small.other_bits]
    asked = [(*shape, bits, rows) for shape, bits in sizes for rows in small.rows]
    assert [(r["in"], r["out"], r["bits"], r["rows"]) for r in rows_of(results, "kernels")] == asked
    asked = [(kind, batch, False) for kind in ("dense", "packed") for batch in small.batches]
    assert [(r["model"], r["batch"], r["compiled"]) for r in rows_of(results, "model")] == asked
    assert [r["blocks"] for r in rows_of(results, "quantize")] == [small.blocks]


def test_figures_of_a_row_belong_together(smoke):
    results, _ = smoke
    copied, product = rows_of(results, "copy")
    assert copied["gb_s"] == pytest.approx(copied["work"] / copied["microseconds"] / 1e3)
    assert copied["work"] == 2 * gpu.SMOKE.copied and product["work"] == 2 * gpu.SMOKE.product**3
    for row in rows_of(results, "kernels"):
        ours, dense = row["contenders"]["wellrounded"], row["contenders"]["cuBLAS"]
        assert ours["bytes"] < dense["bytes"] == 2 * row["in"] * row["out"]
        for one in row["contenders"].values():
            assert one["flop"] == 2 * row["in"] * row["out"] * row["rows"]
            assert one["speedup"] == pytest.approx(dense["microseconds"] / one["microseconds"])
            if row["rows"] <= FEW:
                assert one["gb_s"] == pytest.approx(one["bytes"] / one["microseconds"] / 1e3)
                assert one["of_copy"] == pytest.approx(one["gb_s"] / copied["gb_s"])
            else:
                assert one["tflop_s"] == pytest.approx(one["flop"] / one["microseconds"] / 1e6)
        assert ("tinygemm" in row["contenders"]) == (row["bits"] == 4)
        ways = {name: one for name, one in row["contenders"].items() if name in ("packed", "restored")}
        assert all(one == ours for name, one in ways.items() if row["kernel"].endswith(name))
        assert len(ways) == (0 if row["kernel"] == "reference" else 1 if row["rows"] < 64 else 2)
    for row in rows_of(results, "model"):
        assert row["prefill_tokens_s"] > 0 < row["decode_tokens_s"]
        assert bool(row["kernels"]) == (row["model"] == "packed")
    (row,) = rows_of(results, "quantize")
    parts = [row["opening_seconds"], row["blocks"] * row["block_seconds"], row["closing_seconds"]]
    assert sum(parts) == pytest.approx(row["seconds"])
    more = (row["whole_blocks"] - row["blocks"]) * row["block_seconds"]
    assert row["whole_seconds"] == pytest.approx(row["seconds"] + more) and row["peak_rss_bytes"] > 2**25


def test_what_is_printed_and_kept_says_that_it_is_of_a_cpu(smoke):
    results, out = smoke
    assert results["smoke"] and results["machine"]["device"] == "cpu"
    page = (out / "gpu.md").read_text()
    assert page.startswith("A smoke test on a CPU") and page.count("no figures of a GPU)") == len(gpu.WEIGHTS)
    assert page.count("\n| 64x96 | 3 | ") == len(gpu.SMOKE.rows)
    assert json.loads((out / "gpu.json").read_text()) == results
    for name in gpu.WEIGHTS:
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert [*lines[0]] == ["machine"] and sum("row" in line for line in lines) == len(rows_of(results, name))


# ---- who multiplies ----


def peer(change):
    """One whose dense weight is right, and whose product is changed."""

    def made(weight):
        dense = weight.dequantize(torch.bfloat16)
        return [dense], lambda x, tensors: change(F.linear(x, tensors[0])), dense

    return made


def absent(weight):
    import no_such_package  # noqa: F401


def refuse(*_):
    raise RuntimeError("not on this machine\nand more about it")


def test_who_multiplies_wrongly_is_named_and_not_timed(monkeypatch):
    peers = {
        "right": peer(lambda y: y), "doubled": peer(lambda y: 2 * y), "cut": peer(lambda y: y[:, 1:]),
        "not a number": peer(lambda y: y / 0 * 0), "raises": peer(refuse), "unbuilt": refuse, "absent": absent,
    }  # fmt: skip
    monkeypatch.setattr(gpu_peers, "PEERS", peers)
    found = [*gpu_peers.products(gpu.Ask("kernels", "", "", 0, smoke=True), 64, 32, 4)]
    notes, rows = [x for x in found if isinstance(x, str)], [x for x in found if not isinstance(x, str)]
    assert len(rows) == len(gpu.SMOKE.rows)
    for row in rows:
        contenders = row["contenders"]
        assert contenders["right"]["microseconds"] > 0 and not {"unbuilt", "absent"} & contenders.keys()
        for name in ("doubled", "cut", "not a number", "raises"):
            assert [*contenders[name]] == ["wrong"]
        _, off, rest = contenders["doubled"]["wrong"].split(" ", 2)
        assert abs(float(off) - 1) < 0.01 and rest == "off the dense product"
        assert contenders["cut"]["wrong"].startswith("wrong: [") and "nan off" in contenders["not a number"]["wrong"]
        assert contenders["raises"]["wrong"] == "failed: RuntimeError: not on this machine"
        assert (gpu.cell(row, "doubled/microseconds"), gpu.cell(row, "raises/microseconds")) == ("wrong", "failed")
        assert gpu.cell(row, "absent/microseconds") == ""
    said = "\n".join(notes)
    assert "absent is left out: ModuleNotFoundError" in said
    assert "unbuilt is left out of 64x32: RuntimeError: not on this machine\n" in said
    (doubled,) = (row["contenders"]["doubled"]["wrong"] for row in rows if row["rows"] == 64)
    assert f"64x32 with 4 bits, 64 rows: doubled {doubled}" in said


def test_both_ways_are_measured_where_they_may_cross_and_nothing_stays_forced():
    kernel = kernels.named("cpu")
    asked = []

    def call(x):
        asked.append(len(x) <= kernel.FEW_ROWS)
        return x

    ours, few = gpu_peers.Contender("ours", call, 1, torch.zeros(1)), kernel.FEW_ROWS
    for rows, own, others in ((1, "packed", []), (64, "restored", ["packed"]), (4096, "restored", [])):
        way, more = gpu_peers.ways(kernel, ours, rows)
        assert (way, [one.name for one in more]) == (own, others)
        for one in more:
            one.call(torch.zeros(rows, 1))
    assert asked == [True] and kernel.FEW_ROWS == few
    assert gpu_peers.ways(kernels.named("reference"), ours, 64) == ("", [])


def test_a_kernel_that_chooses_by_itself_is_measured_in_both_ways(monkeypatch):
    from wellrounded.kernels import triton as kernel

    monkeypatch.setattr(kernel, "_reads_faster", lambda *_: pytest.fail("it is not to be asked"))
    went = []

    def call(x):
        went.append("packed" if kernel._reads_faster(x) else "restored")
        return x

    ours = gpu_peers.Contender("ours", call, 1, torch.zeros(1))
    for rows, own, others in ((64, "packed", ["restored"]), (256, "", ["packed", "restored"]), (4096, "", [])):
        way, more = gpu_peers.ways(kernel, ours, rows)
        assert (way, [one.name for one in more]) == (own, others)
        went.clear()
        for one in more:
            one.call(torch.zeros(rows, 1))
        assert went == others


def test_what_cannot_be_put_into_a_graph_is_called_in_a_loop(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called = []
    run, how = gpu_peers.burst(lambda: called.append(1), 3, gpu=True)
    run()
    assert called == [1, 1, 1] and how == "loop: RuntimeError: not on this machine"


def test_the_table_has_a_column_for_every_peer():
    assert gpu.PEERS == (*gpu_peers.PEERS,)


# ---- time ----


class Ended:
    """A process that has ended."""

    def poll(self):
        return 0


def run(tmp_path, *words):
    args = gpu.arguments(["--out", str(tmp_path), *words])
    page = gpu.Page(tmp_path / "gpu.md", sys.stderr)
    return gpu.run(args, page, str(tmp_path)), page


def test_a_spent_budget_leaves_what_is_finished_and_says_what_was_skipped(tmp_path, monkeypatch):
    shares = {}

    def follow(child, ask, seconds):
        shares[ask.section] = seconds
        yield "row", {"what": "copy", "microseconds": 1.0, "gb_s": 2.0}
        time.sleep(0.25)

    monkeypatch.setattr(gpu, "start", lambda ask: Ended())
    monkeypatch.setattr(gpu, "follow", follow)
    results, page = run(tmp_path, "--seconds", "0.2")
    assert [*results["sections"]] == ["copy"] and rows_of(results, "copy")[0]["gb_s"] == 2
    assert [*results["skipped"]] == ["kernels", "model", "quantize"]
    assert shares["copy"] == pytest.approx(0.2 * gpu.HARD * gpu.WEIGHTS["copy"] / sum(gpu.WEIGHTS.values()), rel=0.1)
    assert "**model**: skipped, all 0.2 s were spent; `--only model` measures it alone" in page.lines
    assert "| copy | 1 | 2 |  |" in page.lines and json.loads((tmp_path / "gpu.json").read_text()) == results


def test_a_section_that_has_spent_its_time_begins_nothing_more(tmp_path, monkeypatch):
    ask = gpu.Ask("copy", str(tmp_path / "lines"), str(tmp_path), -1, smoke=True)
    assert gpu.work(ask) == 0
    machine, note = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [*machine] == ["machine"] and note["note"].endswith("copy; product")


def test_a_job_that_fails_is_a_note_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def jobs(ask):
        yield "one", map(refuse, [1])
        yield "two", iter([{"what": "two"}])

    monkeypatch.setattr(gpu_peers, "copy_section", jobs)
    assert gpu.work(gpu.Ask("copy", str(tmp_path / "lines"), str(tmp_path), 60, smoke=True)) == 1
    _, note, row = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert note == {"note": "one failed: RuntimeError: not on this machine"} and row == {"row": {"what": "two"}}
    assert "and more about it" in capsys.readouterr().err


def test_a_section_that_hangs_is_stopped_and_what_it_had_is_kept(tmp_path, monkeypatch):
    script = tmp_path / "hangs.py"
    script.write_text(
        "import json, sys, time\n"
        "ask = json.loads(sys.argv[2])\n"
        "with open(ask['lines'], 'a') as file:\n"
        "    file.write(json.dumps({'row': {'what': 'first'}}) + '\\n' + '{\"row\": {\"wh')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "WEIGHTS", {"copy": 1, "kernels": 1, "model": 1, "quantize": 1})
    started = time.monotonic()
    results, _ = run(tmp_path, "--only", "copy,quantize", "--seconds", "2")
    assert time.monotonic() - started < 20
    copied, skipped = results["sections"]["copy"], results["skipped"]
    assert copied["rows"] == [{"what": "first"}] and copied["failed"].startswith("stopped after 2 s")
    assert [*skipped] == ["quantize"]


# ---- the command line ----


def test_wrong_wishes_are_refused(capsys):
    for words, said in ((["--only", "copy,speed"], "speed unknown; known are copy"), (["--layers", "1"], "2 or more")):
        with pytest.raises(SystemExit):
            gpu.arguments(words)
        assert said in capsys.readouterr().err
    assert gpu.arguments(["--only", "model,copy"]).only == ["copy", "model"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    gpu.work(gpu.Ask("copy", str(tmp_path / "lines"), str(tmp_path), 60))
    assert "sees no CUDA GPU; --smoke" in json.loads((tmp_path / "lines").read_text())["failed"]


def test_tables_are_put_between_markers_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu.MARKER}\nold\n{gpu.END}\nafter\n")
    for _ in range(2):
        gpu.write(page, ["new"])
    assert page.read_text() == f"before\n{gpu.MARKER}\n\nnew\n\n{gpu.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match=f"no line {gpu.MARKER}"):
        gpu.write(page, ["new"])
    assert page.read_text() == "nothing"
