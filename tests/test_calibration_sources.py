"""Specifications, files and data sets become rows; the hub is a function that these tests replace."""

import json
import sys

import pytest

from wellrounded.calibration import KNOWN, Source, gather, parse, sources
from wellrounded.errors import UsageError

CHAT = [{"role": "user", "content": "hi"}]


def tokenizer(text):
    return {"input_ids": list(text.encode())}


def rows(spec: str) -> list:
    return parse(spec).read(tokens=100).rows


def write(path, *lines) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


# ---- specifications ----


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("wikitext2", Source("wikitext2", "train")),
        ("c4:validation", Source("c4", "validation")),
        ("ultrachat::96", Source("ultrachat", "train_sft", 96)),
        ("pile:validation:8", Source("pile", "validation", 8)),
        ("builtin::4", Source("builtin", None, 4)),
        ("someone/some-data.v2", Source("someone/some-data.v2", "train")),
        ("someone/data:test:5", Source("someone/data", "test", 5)),
    ],
)
def test_a_specification_is_name_split_number(spec, source):
    assert parse(spec) == source


def test_a_file_takes_a_number_after_two_colons(tmp_path):
    path = write(tmp_path / "mine.txt", "text")
    assert parse(f"{path}::64") == Source(path, None, 64)
    odd = write(tmp_path / "a:b.txt", "text")
    assert parse(odd) == Source(odd)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext", r"not a known data set \(wikitext2, c4, ultrachat, pile, builtin\).*was a path meant\?"),
        ("", "not a known data set"),
        ("c4:train:many", "'many' is not a number of windows"),
        ("c4:train:0", "'0' is not a number of windows"),
        ("c4:train:5:6", "'5:6' is not a number of windows"),
        ("c4:dev", "c4 has no split 'dev'; it has train, validation"),
        ("builtin:64", "builtin has no splits; for a number of windows: builtin::64"),
        ("nowhere/missing.txt", "'nowhere/missing.txt': no such file"),
        ("a: text: of\ntwo lines", "this is a text, not a name; give texts in a list"),
        ("word " * 5000, "this is a text, not a name"),
        ("/", "this is a directory; name one file of it"),
    ],
)
def test_a_specification_of_nothing_is_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        gather(spec, tokenizer)


# ---- files ----


def test_json_lines_hold_texts_chats_or_ids(tmp_path):
    texts = write(tmp_path / "t.jsonl", '{"text": "a\u2028b", "id": 1}', "", '{"text": "c"}')
    assert [row["text"] for row in rows(texts)] == ["a\u2028b", "c"]
    for row in ({"messages": CHAT}, {"input_ids": [1, 2]}, "a text", CHAT):
        assert rows(write(tmp_path / "r.jsonl", json.dumps(row))) == [row]


def test_a_json_file_is_a_list_of_rows_or_lines(tmp_path):
    expected = [{"text": "a"}, {"text": "b"}]
    assert rows(write(tmp_path / "list.json", json.dumps(expected))) == expected
    assert rows(write(tmp_path / "lines.json", *map(json.dumps, expected))) == expected


@pytest.mark.parametrize("column", [{"text": ["a", "b"]}, {"messages": [CHAT, CHAT]}, {"input_ids": [[1, 2], [3]]}])
def test_parquet_holds_the_same_and_only_its_column_is_read(tmp_path, column):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = str(tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table(column | {"other": [1, 2]}), path)
    (name, values) = next(iter(column.items()))
    assert rows(path) == [{name: value} for value in values]


def test_parquet_goes_all_the_way_to_windows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = str(tmp_path / "rows.parquet")
    parquet.write_table(
        pyarrow.table({"input_ids": [[1, 2, 0], [3, 4, 5]], "attention_mask": [[1, 1, 0], [1] * 3]}), path
    )
    got = gather(path, None, samples=2, length=3, min_tokens=1)
    assert got.windows.ids.tolist() == [[1, 2, 0], [3, 4, 5]] and got.windows.tokens == 5


def test_a_text_without_a_known_suffix_is_a_text(tmp_path):
    assert rows(write(tmp_path / "NOTES", "some notes")) == ["some notes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.parquet", b"", "the file is empty"),
        ("a.txt", b" \n\n ", "nothing but white space"),
        ("a.txt", b"\x80\x81 latin", "not UTF-8 text"),
        ("a.txt", b"text\0text", "a binary file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "none of the columns text.*seen: body, id"),
        ("a.jsonl", b'{"text": "a"}\n{"messages": [{"role": "user", "content": ""}]}', "row 0 is a text, row 1 a chat"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b"5", "seen int 5"),
        ("a.parquet", b"not one", "not a parquet file"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as refusal:
        gather(str(tmp_path / name), tokenizer)
    assert str(tmp_path / name) in str(refusal.value)


def test_parquet_of_other_columns_is_refused_by_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="seen: prompt, answer"):
        gather(str(tmp_path / "a.parquet"), tokenizer)


def test_of_a_long_file_every_nth_row_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PLENTY", 0)
    path = write(tmp_path / "t.jsonl", *(json.dumps({"text": f"{i:07}"}) for i in range(1000)))
    read = parse(path).read(tokens=100)  # 1600 of 7000 characters
    assert [row["text"] for row in read.rows] == [f"{i:07}" for i in range(0, 1000, 5)]
    assert read.passed_over == 800


# ---- data sets ----


@pytest.fixture
def hub(monkeypatch):
    """Calls of `load_dataset`, answered with the rows put into `hub.rows`, or with the error in `hub.error`."""
    datasets = pytest.importorskip("datasets")

    class Hub:
        rows = ()
        error = None
        asked = None

        def load_dataset(self, *names, **options):
            self.asked = names, options
            if self.error:
                raise self.error
            return iter(self.rows)

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def test_wikitext2_is_one_text_of_its_lines(hub):
    hub.rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": "Some text.\n"}]
    assert rows("wikitext2") == ["\n\n = Title = \n\n\nSome text.\n"]
    assert hub.asked == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train", "streaming": False})


def test_c4_is_streamed_from_one_shard(hub):
    hub.rows = [{"text": "a", "url": "u"}, {"text": "b", "url": "u"}]
    assert rows("c4") == [{"text": "a"}, {"text": "b"}]
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert hub.asked == (("allenai/c4",), {"split": "train", "streaming": True, "data_files": files})


def test_any_data_set_of_the_hub_is_read_by_its_columns(hub):
    hub.rows = [{"id": 1, "messages": CHAT}]
    assert rows("ultrachat") == rows("someone/chats") == [{"messages": CHAT}]
    assert hub.asked == (("someone/chats",), {"split": "train", "streaming": True})
    hub.rows = [{"question": "why", "answer": "so"}]
    with pytest.raises(UsageError, match=r"'someone/chats': none of the columns .* seen: question, answer"):
        rows("someone/chats")


def test_a_stream_is_left_when_there_is_enough(hub, monkeypatch):
    monkeypatch.setattr(sources, "PLENTY", 0)
    hub.rows = ({"text": "x" * 100} for _ in iter(int, 1))  # it never ends
    assert len(rows("pile")) == 16


def test_a_data_set_becomes_windows_and_is_reported_with_its_split(hub):
    hub.rows = [{"text": "word " * 20_000}]
    assert gather("wikitext2", tokenizer).describe() == (
        "wikitext2 (train): asked 128 windows of 512, used 128, 65,536 tokens; 16 windows held out"
    )


@pytest.mark.parametrize("name", [*KNOWN, "someone/data"])
def test_a_failing_download_names_the_cause_and_what_works_offline(hub, name):
    hub.error = ConnectionError("Couldn't reach the hub\nand a long story")
    with pytest.raises(UsageError) as refusal:
        gather(name, tokenizer)
    message = str(refusal.value)
    assert name in message and "ConnectionError: Couldn't reach the hub; offline, name a local file" in message
    assert "builtin" in message and "long story" not in message


def test_a_stream_that_breaks_is_a_failing_download(hub):
    def broken():
        yield {"text": "a"}
        raise TimeoutError

    hub.rows = broken()
    with pytest.raises(UsageError, match="cannot read the data set allenai/c4: TimeoutError; offline"):
        rows("c4")


@pytest.mark.parametrize(("package", "spec"), [("datasets", "wikitext2"), ("pyarrow", "rows.parquet")])
def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch, package, spec):
    write(tmp_path / "rows.parquet", "anything")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf'needs the package {package}: pip install "wellrounded\[data\]"'):
        gather(spec, tokenizer)
