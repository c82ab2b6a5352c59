"""OUT.log tells what happened from the first second on; on screens there is a bar, elsewhere a line for every block."""

import io
import json
import math
import re
import warnings

import pytest
from rich.console import Console

import tiny
import wellrounded as wr
from wellrounded.card import to_json
from wellrounded.commands import terminal
from wellrounded.errors import NumericsError, UsageError
from wellrounded.progress import Progress, duration
from wellrounded.report import LayerResult, Report
from wellrounded.runlog import RunLog, lines

LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \d+ (INFO|WARNING|ERROR) \S")


def stop_after(blocks):
    def progress(told):
        if told.done == blocks:
            raise KeyboardInterrupt

    return progress


def test_the_log_holds_the_request_every_block_and_the_table(llama, tmp_path):
    report = tiny.quantize(llama, tmp_path / "out", ignore=["k_proj"])
    said = (tmp_path / "out.log").read_text().splitlines()
    assert all(LINE.match(line) for line in said)
    assert f"wellrounded {wr.__version__}: quantize({str(llama)!r}, {str(tmp_path / 'out')!r}, bits=4" in said[0]
    assert "ignore=['k_proj']" in said[0] and "samples=64" in said[0] and "seed=0" in said[0]
    blocks = [line for line in said if "quantizing, block: " in line]
    assert [re.search(r"block: (\d)/3, model\.layers\.(\d), ", line).groups() for line in blocks] == [
        ("1", "0"), ("2", "1"), ("3", "2"),
    ]  # fmt: skip
    for label, value in report.summary():
        assert any(label in line and value in line for line in said), label
    assert said[-1].endswith(f"finished: {tmp_path / 'out'}")


def test_a_resumed_run_goes_on_in_the_same_file(llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(llama, tmp_path / "out", progress=stop_after(2))
    first = (tmp_path / "out.log").read_text()
    assert "block: 2/3" in first and first.rstrip().endswith("ERROR stopped by Ctrl-C; the same command goes on")
    tiny.quantize(llama, tmp_path / "out")
    whole = (tmp_path / "out.log").read_text()
    assert whole.startswith(first) and "going on after outside, model.layers.0, model.layers.1" in whole


def test_an_error_is_there_with_its_traceback(llama, copy_of, tmp_path):
    source = copy_of(llama)
    with tiny.rewritten(source) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    with pytest.raises(NumericsError) as caught:
        tiny.quantize(source, tmp_path / "out")
    said = (tmp_path / "out.log").read_text()
    assert f"ERROR {caught.value}\nTraceback (most recent call last):\n" in said


@pytest.mark.parametrize("before", [False, True])
def test_a_run_that_came_to_nothing_leaves_no_log_but_one_that_was_there(llama, tmp_path, before):
    log = tmp_path / "new" / "out.log"
    if before:
        log.parent.mkdir()
        log.write_text("earlier\n")
    with pytest.raises(UsageError, match="length=512"):
        tiny.quantize(llama, tmp_path / "new" / "out", length=512)
    if before:
        assert log.read_text().startswith("earlier\n") and "ERROR length=512" in log.read_text()
    else:
        assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_said(llama, tmp_path):
    (tmp_path / "out.log").mkdir()
    with pytest.raises(UsageError, match=r"out\.log: the log of the run cannot be written \(.*\); move it elsewhere"):
        tiny.quantize(llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.log"]


def test_warnings_go_where_they_went_and_into_the_log(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        shown = warnings.showwarning
        with RunLog(tmp_path / "out", "a test"):
            warnings.warn("the disk is slow", UserWarning, stacklevel=1)
        assert warnings.showwarning is shown
    assert [str(warning.message) for warning in seen] == ["the disk is slow"]
    assert "WARNING UserWarning: the disk is slow (" in (tmp_path / "out.log").read_text()


def test_nothing_is_logged_once_the_run_has_ended(tmp_path):
    from wellrounded.runlog import LOGGER

    level = LOGGER.level
    with RunLog(tmp_path / "out", "a test") as log:
        log.say("one")
    LOGGER.warning("two")
    assert "one" in (tmp_path / "out.log").read_text() and "two" not in (tmp_path / "out.log").read_text()
    assert LOGGER.level == level and not LOGGER.handlers


# ---- progress ----

HALF = Progress(3, 6, 63.0, "model.layers.2", 21, 12345.6, 400.0, -27.12)


def test_a_block_is_one_line_of_what_is_known():
    assert lines(HALF) == [
        "quantizing, block: 3/6, model.layers.2, 21 layers, 63 s so far, 12,346 tokens/s, about 7 min left, "
        "error -27.1 dB"
    ]
    assert lines(Progress(1, 2, 1.0, "h.0")) == ["quantizing, block: 1/2, h.0, 0 layers, 1 s so far"]
    assert lines(Progress(1, 2, 1.0, "", message="out of memory: going on with half the batch")) == [
        "out of memory: going on with half the batch"
    ]
    assert [duration(s) for s in (0.2, 119, 121, 7199, 9000)] == ["0 s", "119 s", "2 min", "2 h 00 min", "2 h 30 min"]


@pytest.fixture
def screen(monkeypatch):
    """What standard error shows, on a terminal or not."""

    def make(is_terminal):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=160, **terminal.PLAIN)
        monkeypatch.setattr(terminal, "stderr", console)
        return file

    return make


def test_without_a_terminal_there_is_a_line_for_every_block_and_no_control_character(screen):
    shown = screen(False)
    with terminal.progress("quantizing, block") as bar:
        bar.tell(HALF)
        bar.tell(Progress(3, 6, 64.0, "", message="half the batch"))
        bar.tell(Progress(4, 6, 80.0, "model.layers.3"))
    assert shown.getvalue().splitlines() == [
        *lines(HALF), "half the batch", "quantizing, block: 4/6, model.layers.3, 0 layers, 80 s so far",
    ]  # fmt: skip
    assert shown.getvalue().replace("\n", "").isprintable()


def test_on_a_terminal_there_is_a_bar_with_layers_speed_time_left_and_error(screen):
    shown = screen(True)
    with terminal.progress("quantizing, block") as bar:
        bar.bar.refresh()  # before the first block, when the number of blocks is not known
        bar.tell(HALF)
        bar.tell(Progress(3, 6, 64.0, "", message="half the batch"))
        bar.bar.refresh()
    assert "3/6" in shown.getvalue() and "\x1b[" in shown.getvalue() and "half the batch" in shown.getvalue()
    assert "21 layers, 12,346 tokens/s, about 7 min left, error -27.1 dB" in shown.getvalue()
    assert "63 s so far" not in shown.getvalue()


# ---- reports that are read again ----


def test_a_report_is_read_as_it_was_written(quantized):
    report = Report.read(quantized)
    stored = json.loads((quantized / "quantization_report.json").read_text())
    assert json.loads(json.dumps(report.to_dict())) == stored
    assert dict(report.summary())["bits per weight"].endswith("4.31 in quantized layers")


def test_figures_that_were_no_numbers_fail_the_check_again():
    report = Report("a", "b", "4-bit", fidelity={"kl_mean": math.nan, "tokens": 3})
    report.add(LayerResult("x", "4-bit", 10, 5, -20.0, -10.0, 0.1), 4.25)
    again = Report.from_dict(json.loads(to_json(report.to_dict())))
    assert again.problems() == ["KL to the original is nan nats per token: the model is damaged"]
    assert again.layers == report.layers
