"""The sweep over architectures: a dozen of them from end to end, and what the table says of one that cannot be."""

import pytest

import architectures
import tiny_configs

DOZEN = [
    "llama", "qwen3", "gemma3_text", "phi3", "gpt2", "opt", "bloom", "gpt_neox", "falcon", "mamba2", "mixtral",
    "qwen3_moe", "deepseek_v3", "gpt_oss",
]  # fmt: skip


@pytest.mark.parametrize("kind", DOZEN)
def test_an_architecture_is_quantized_whole_and_comes_back_exact(kind):
    row = architectures.check(kind)
    assert row.green, row.reason
    assert (row.built, row.walked, row.reload, row.transformers, row.generates) == ("yes",) * 5
    assert row.coverage == 1.0 and row.ignored == []


def test_what_cannot_be_quantized_says_why():
    row = architectures.check("xlm")
    assert not row.green and (row.built, row.walked, row.reload) == ("yes", "no", "")
    assert "its blocks (transformer.ffns.0 ... transformer.ffns.2) cannot be walked one after another" in row.reason


@pytest.mark.parametrize("kind", tiny_configs.UNBUILDABLE)
def test_what_cannot_be_built_says_why(kind):
    row = architectures.check(kind)
    assert not row.green and row.built == "no" and tiny_configs.UNBUILDABLE[kind] in row.reason


def test_the_table_has_a_line_for_each_and_the_number_counts_those_that_can_be_built():
    green = architectures.Row("llama", *("yes", "yes", 1.0), reload="yes", transformers="yes", generates="yes")
    helped = architectures.Row("falcon", "yes", "yes", 0.995, ignored=["h.*.odd (a 3-dimensional parameter)"])
    red = architectures.Row("xlm", "yes", "no", reason="UsageError: one | another")
    never = architectures.Row("musicgen", "no", reason="no")
    rows = [green, helped, red, never]
    lines = architectures.table(rows).splitlines()
    assert [line.split()[0] for line in lines] == ["type", "llama", "falcon", "xlm", "musicgen"]
    assert "100.0%" in lines[1] and lines[2].endswith("with --ignore: h.*.odd (a 3-dimensional parameter)")
    assert lines[3].endswith("one | another") and "%" not in lines[3]
    marked = architectures.table(rows, markdown=True).splitlines()
    assert len({line.count(" | ") for line in marked}) == 1 and marked[1].count("---") == 8
    assert architectures.number(rows) == (
        "2 of 3 types that can be built are green (66.7%), 1 of them without a single flag"
    )
