"""Every token of a window can be named: the tokenizer here turns a text into its bytes."""

import json
import re
from itertools import pairwise

import pytest
import torch

from wellrounded.calibration import Windows, builtin, gather, parse
from wellrounded.calibration.mixture import _shares
from wellrounded.errors import UsageError

EOS, BOS = 256, 257


class Bytes:
    """A tokenizer of bytes, with a beginning-of-text token if told so, and a template of one letter a turn."""

    eos_token_id = EOS
    chat_template = "a program"

    def __init__(self, bos: bool = False):
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS] * (self.bos and add_special_tokens) + list(text.encode())}

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True) -> str:
        assert not tokenize
        return "".join(f"<{turn['role'][0]}>{turn['content']}" for turn in messages)


def take(calibration, tokenizer=None, **options):
    options = {"samples": 4, "length": 8, "held_out": 1, "min_tokens": 1} | options
    return gather(calibration, tokenizer or Bytes(), **options)


def numbers(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def text_of(windows: Windows) -> list[str]:
    return [bytes(row).decode() for row in windows.ids.tolist()]


# ---- windows of a stream ----


def test_windows_are_spread_evenly_over_a_long_text_whose_tail_is_held_out():
    got = take([numbers(1000)], None, samples=5, length=10, held_out=3)
    step = (970 - 10) // 5
    assert got.windows.ids.tolist() == [numbers(10, start=i * step) for i in range(5)]
    assert got.held_out.ids.tolist() == [numbers(10, start=970 + 10 * i) for i in range(3)]
    assert got.windows.mask is None and got.held_out.mask is None


def test_a_text_file_is_tokenized_whole(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\nIt was a dark night.\r\nThe end.\n\n\n" * 40, newline="")
    ids = Bytes(bos=True)(path.read_text())["input_ids"]
    got = take(str(path), Bytes(bos=True), samples=7, length=16, held_out=2)
    left = ids[: len(ids) - 32]
    step = (len(left) - 16) // 7
    assert got.windows.ids.tolist() == [left[i * step : i * step + 16] for i in range(7)]
    assert got.held_out.ids.flatten().tolist() == ids[-32:]


@pytest.mark.parametrize("kind", ["text", "chat", "token row"])
def test_every_window_begins_as_a_text_does(kind):
    """With the token that the tokenizer puts there; what is given as ids stays as it is."""
    tokenizer = Bytes(bos=True)
    tokenizer.bos_token_id = BOS
    tokenizer.chat_template = "a program"
    text = "It was a dark night. " * 40
    ids = tokenizer(text)["input_ids"]
    given = {"text": [text], "token row": [ids], "chat": [[{"role": "user", "content": text}]]}[kind]
    got = take(given, tokenizer, samples=7, length=16, held_out=2, further=5)
    all_ = torch.cat([got.windows.ids, got.held_out.ids, got.further.ids])
    assert len(all_) == 14
    begun = (all_[:, 0] == BOS).sum()
    assert begun == {"text": 14, "token row": 1, "chat": 0}[kind], "this chat template writes none"
    plain = take(given, Bytes(bos=True), samples=7, length=16, held_out=2, further=5)
    assert torch.equal(all_[:, 1:], torch.cat([plain.windows.ids, plain.held_out.ids, plain.further.ids])[:, 1:])


@pytest.mark.parametrize("count", [24, 31, 32, 33, 39, 40, 41, 47, 48, 200])
def test_windows_never_overlap_each_other_or_what_is_held_out(count):
    got = take([numbers(count)])
    used = got.windows.ids.flatten().tolist() + got.held_out.ids.flatten().tolist()
    assert len(set(used)) == len(used)
    assert len(got.windows) == min(4, (count - 8) // 8)


@pytest.mark.parametrize("count", [40, 47, 100, 200, 333])
def test_further_windows_lie_between_and_the_others_stay_where_they_are(count):
    usual, got = take([numbers(count)]), take([numbers(count)], further=9)
    assert torch.equal(usual.windows.ids, got.windows.ids) and torch.equal(usual.held_out.ids, got.held_out.ids)
    further = got.further.ids.tolist() if got.further else []
    assert all(window == numbers(8, start=window[0]) for window in further)
    used = torch.cat([got.windows.ids, got.held_out.ids, torch.tensor(further, dtype=torch.int64).view(-1, 8)])
    assert len(used.unique()) == used.numel()
    assert len(further) == {40: 0, 47: 0, 100: 4, 200: 9, 333: 9}[count]
    assert usual.further is None and usual.further_digest is None and usual.digest == got.digest
    assert (got.further_digest is None) is (not further) and got.further_digest != got.digest


def test_further_windows_are_spread_and_every_source_gives_its_share():
    got = take([numbers(1000)], samples=5, length=10, held_out=3, further=4)
    starts = [window[0] for window in got.further.ids.tolist()]
    assert len(starts) == 4 and all(200 < after - before < 250 for before, after in pairwise(starts))
    rows = torch.arange(20 * 8).reshape(20, 8)
    some = take(rows, held_out=2, further=30)
    assert sorted(some.further.ids[:, 0].tolist()) == [8 * n for n in range(20) if n not in (0, 4, 9, 10, 14, 19)]
    assert some.sources[0].dropped == 0 and "not needed" not in some.describe()


def test_a_short_text_gives_what_it_has_and_says_so():
    got = take([numbers(47)], samples=100)
    assert got.windows.ids.tolist() == [numbers(8, start=8 * i) for i in range(4)]
    assert (got.sources[0].asked, got.sources[0].used, got.sources[0].tokens) == (100, 4, 32)


def test_a_tenth_is_held_out_at_most_but_one_window_from_three_on():
    assert [len(take([numbers(count)], held_out=5).held_out) for count in (24, 79, 160, 239, 240, 4000)] == [
        1, 1, 2, 2, 3, 5,
    ]  # fmt: skip


def test_nothing_is_held_out_where_nothing_is_wanted():
    got = take([numbers(32)], held_out=0)
    assert (len(got.windows), len(got.held_out), got.note) == (4, 0, "")


def test_too_little_to_hold_out_means_built_in_proof():
    got = take(["twenty characters..."])
    assert text_of(got.windows) == ["twenty c", "haracter"]
    assert text_of(got.held_out) == [builtin.proof_text()[:8]]
    assert got.note == (
        "too little data to hold any out: the result is proven on 1 window of built-in text, English and code instead"
    )
    assert got.sources[0].held_out == 0


def test_without_a_tokenizer_there_is_no_built_in_proof():
    got = gather([numbers(20)], None, samples=4, length=8, min_tokens=1)
    assert got.held_out.ids.shape == (0, 8)
    assert "nothing is held out" in got.note


def test_batches_are_consecutive_windows():
    ids = torch.arange(10).reshape(5, 2)
    batches = list(Windows(ids, ids > 0).batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch.mask for batch in batches]), ids > 0)
    assert sum(batch.tokens for batch in batches) == 9


# ---- texts, chats, ids ----


def test_texts_are_joined_by_the_end_of_text_token():
    got = take(["abc", "", "de", "   "], Bytes(bos=True), samples=1, length=8, held_out=0)
    assert got.windows.ids.tolist() == [[BOS, *b"abc", EOS, BOS, *b"de"]]
    assert got.sources[0].dropped == 2  # the blank ones


def test_a_tokenizer_without_an_end_token_joins_texts_directly():
    def tokenizer(text):
        return {"input_ids": list(text.encode())}

    assert text_of(take(["abcd", "efgh"], tokenizer, held_out=0).windows) == ["abcdefgh"]


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled():
    class Closing(Bytes):
        def __call__(self, text):
            return {"input_ids": [*text.encode(), EOS]}

    assert take(["abc", "def"], Closing(), held_out=0).windows.ids.tolist() == [[*b"abc", EOS, *b"def", EOS]]


def test_a_tokenizer_that_warns_of_long_texts_is_asked_not_to():
    class Loud(Bytes):
        def __call__(self, text, verbose=True):
            assert not verbose
            return super().__call__(text)

    assert len(take(["some text of no importance"], Loud(), held_out=0).windows) == 3


def test_an_object_that_can_only_encode_is_a_tokenizer():
    class Encoder:
        def encode(self, text):
            return list(text.encode())

    assert text_of(take(["abcdefgh"], Encoder(), held_out=0).windows) == ["abcdefgh"]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize("chat", [CHAT, {"messages": CHAT}, {"conversations": SHAREGPT}, SHAREGPT])
def test_chats_go_through_the_template_of_the_model_and_get_no_tokens_besides(chat):
    got = take([chat, chat], Bytes(bos=True), length=20, held_out=0)
    assert text_of(got.windows) == ["<u>hi<a>ho<u>hi<a>ho"]
    assert got.describe().startswith("given chats: asked 4 windows of 20, used 1, 20 tokens")


def test_ids_of_several_lengths_are_packed():
    for ids in ([numbers(5), numbers(11, start=5)], [torch.arange(5), torch.arange(5, 16)[None]]):
        assert take(ids, held_out=0).windows.ids.tolist() == [numbers(8), numbers(8, start=8)]


@pytest.mark.parametrize(
    "rows", [numbers(16), torch.arange(16), torch.arange(16)[None], torch.arange(16).reshape(4, 4)]
)
def test_a_flat_list_or_a_tensor_is_packed_too(rows):
    assert take(rows, held_out=0).windows.ids.tolist() == [numbers(8), numbers(8, start=8)]


def test_rows_that_are_windows_already_stay_whole_and_every_kth_is_held_out():
    rows = torch.arange(20 * 8).reshape(20, 8)
    got = take(rows, held_out=2)
    assert torch.equal(got.held_out.ids, rows[[9, 19]])
    assert torch.equal(got.windows.ids, rows[[0, 4, 10, 14]])  # evenly among the 18 that are left
    assert got.describe() == (
        "given token rows: asked 4 windows of 8, used 4, 32 tokens (14 rows blank or not needed); 2 windows held out"
    )


def test_fewer_than_eight_rows_are_too_few_to_hold_one_out():
    got = take(torch.arange(7 * 8).reshape(7, 8), samples=7)
    assert len(got.windows) == 7 and "built-in text" in got.note
    assert len(take(torch.arange(8 * 8).reshape(8, 8), samples=8).windows) == 7


def test_masked_rows_keep_their_side_of_padding_and_are_padded_to_one_length():
    right = {"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 1, 0]}
    left = {"input_ids": torch.tensor([[0, 4, 5]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    plain = {"input_ids": [6], "attention_mask": [1]}
    got = take([right, left, plain], held_out=0)
    assert got.windows.ids.tolist() == [[1, 2, 3, 0], [0, 0, 4, 5], [6, 0, 0, 0]]
    assert got.windows.mask.tolist() == [[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]
    assert got.windows.tokens == got.sources[0].tokens == 6


def test_a_long_masked_row_is_cut_to_real_tokens_and_the_note_counts_it():
    long = {"input_ids": [0] * 9 + numbers(10, start=1), "attention_mask": [0] * 9 + [1] * 10}
    short = {"input_ids": [0] * 12 + [7], "attention_mask": [0] * 12 + [1]}
    got = take([long, short], held_out=0)
    assert got.windows.ids.tolist() == [numbers(8, start=1), [7] + [0] * 7]
    assert got.windows.mask.sum(1).tolist() == [8, 1]
    assert got.note == "1 of 2 rows were longer than 8 tokens and are cut"


def test_masks_without_padding_are_no_masks_and_rows_of_padding_are_dropped():
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4}] * 4
    got = take([*rows, {"input_ids": [0, 0], "attention_mask": [0, 0]}], held_out=0)
    assert got.windows.mask is None and len(got.windows) == 2
    assert got.sources[0].dropped == 1


def test_padding_outside_the_vocabulary_becomes_id_zero():
    got = take([{"input_ids": [5, 6, -1, 300], "attention_mask": [1, 1, 0, 0]}], vocab_size=10, held_out=0)
    assert got.windows.ids.tolist() == [[5, 6, 0, 0]]


# ---- mixtures ----


@pytest.fixture
def two_files(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "b.txt").write_text("b" * 1000)
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


def test_a_mixture_takes_each_share_holds_out_in_proportion_and_shuffles(two_files):
    a, b = two_files
    mixture = [parse(f"{a}::12"), parse(b)]
    got = take(mixture, samples=16, held_out=4)
    order = "".join(text[0] for text in text_of(got.windows))
    assert sorted(order) == ["a"] * 12 + ["b"] * 4 and order != "a" * 12 + "b" * 4
    assert [(use.asked, use.used, use.held_out) for use in got.sources] == [(12, 12, 3), (4, 4, 1)]
    assert text_of(got.held_out) == ["a" * 8] * 3 + ["b" * 8]
    assert take(mixture, samples=16, held_out=4).digest == got.digest
    assert take(mixture, samples=16, held_out=4, seed=1).digest != got.digest


def test_sources_without_a_number_share_the_rest_evenly():
    sources = [parse("c4::10"), parse("pile"), parse("wikitext2"), parse("builtin")]
    assert _shares(sources, 128) == [10, 39, 39, 40]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["c4::64"], "ask for 64 windows, but samples is 128"),
        (["c4::100", "pile::29"], "ask for 129 windows, but samples is 128"),
        (["c4::128", "pile"], "ask for 128 windows and 1 more without a number, but samples is 128"),
        (["c4", "c4"], "names c4 (train) more than once"),
    ],
)
def test_shares_that_do_not_add_up_are_refused(specs, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        gather([parse(spec) for spec in specs], Bytes())


def test_a_mixture_with_padded_rows_has_a_mask_for_all(tmp_path, two_files):
    padded = tmp_path / "rows.jsonl"
    padded.write_text(json.dumps({"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}))
    got = take([parse(f"{padded}::1"), parse(two_files[0])], samples=3, held_out=1)
    assert sorted(zip(got.windows.ids[:, 0].tolist(), got.windows.mask.sum(1).tolist())) == [(1, 2), (97, 8), (97, 8)]


def test_one_source_keeps_its_order_whatever_the_seed(two_files):
    assert take([numbers(200)], seed=1).digest == take([numbers(200)], seed=2).digest


# ---- built-in text ----


def test_without_data_the_built_in_text_is_used_and_named():
    got = gather(None, Bytes(), samples=128, length=512)
    assert len(got.windows) == 128 and len(got.held_out) == 16
    assert got.note.startswith("no calibration data named: using English and code from the Python standard library")
    assert got.digest == gather("builtin", Bytes(), samples=128, length=512).digest
    assert gather("builtin", Bytes()).note == ""


def test_the_built_in_text_is_plenty_of_both_kinds_throughout():
    text = builtin.text()
    assert len(text) > 600_000
    for part in range(8):
        eighth = text[part * len(text) // 8 : (part + 1) * len(text) // 8]
        assert eighth.count("self.") > 50 and eighth.count(" the ") > 200


def test_no_paragraph_of_built_in_proof_is_in_the_built_in_text():
    known = set(builtin.text().split("\n\n"))
    repeated = [p for p in builtin.proof_text().split("\n\n") if len(p) > 200 and p in known]
    assert not repeated


def test_a_file_that_shadows_a_module_of_the_standard_library_is_not_read(tmp_path, monkeypatch):
    before = builtin.text()
    (tmp_path / "textwrap.py").write_text('"""' + "mine " * 100 + '"""')
    monkeypatch.syspath_prepend(tmp_path)
    builtin._passages.cache_clear()
    assert builtin.text() == before


# ---- what is said ----


def test_the_description_is_a_line_for_each_source(two_files):
    got = take([parse(f"{two_files[0]}::3"), parse("builtin")], samples=5, held_out=2)
    assert got.describe().splitlines() == [
        f"{two_files[0]}: asked 3 windows of 8, used 3, 24 tokens; 1 window held out",
        "builtin: asked 2 windows of 8, used 2, 16 tokens; 1 window held out",
    ]


def test_the_report_is_json():
    got = take(["some text that is long enough", ""])
    report = json.loads(json.dumps(got.to_dict()))
    assert report["sources"] == [
        {"name": "given texts", "asked": 4, "used": 2, "dropped": 1, "tokens": 16, "held_out": 1}
    ]
    assert report["windows"] == 2 and report["length"] == 8 and report["tokens"] == 16
    assert report["held_out_windows"] == 1 and report["sha256"] == got.digest


# ---- what is refused ----


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (["text"], {"samples": 0}, "samples is 0"),
        (["text"], {"length": 1}, "length is 1"),
        (["text"], {"held_out": -1}, "held_out is -1"),
        ([], {}, "calibration is empty"),
        (["", " "], {}, "all 2 rows are blank"),
        (5, {}, "calibration is a int"),
        ({"input_ids": [1]}, {}, "calibration is a dict"),
        (["short"], {}, "it holds 5 tokens and 8 are needed; give more text, or ask for windows shorter than 8"),
        (["x" * 100], {"min_tokens": 2048}, "it holds 100 tokens and 2,048 are needed; give more text$"),
        ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], {"min_tokens": 2}, "it holds 1 tokens and 2 are needed"),
        (["text", [1, 2]], {}, "row 0 is a text, row 1 a token row"),
        ([CHAT, "text"], {}, "row 0 is a chat, row 1 a text"),
        ([parse("c4"), "text"], {}, "mixes sources and rows"),
        (["wikitext2", "c4"], {}, r"a list of strings is a list of texts; for these sources parse\(\) each"),
        (CHAT, {}, "seen: role, content; a chat is a list of such messages: wrap each chat in a list"),
        ([{"body": "x"}], {}, "none of the columns text, messages, conversations, input_ids; seen: body"),
        ([{"text": 5}], {}, "seen int 5, asked for a text"),
        ([{"messages": "hello"}], {}, "seen str 'hello', asked for a chat"),
        ([3.5], {}, "seen float 3.5, asked for a row"),
        ([[1.5, 2.5]], {}, r"whole numbers of shape \[L\] or \[1, L\], seen torch.float32 of shape \[2\]"),
        ([[1, "two"]], {}, "not a row of whole numbers"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), {}, r"seen torch.int64 of shape \[3, 4\]"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], {}, "1 entries in attention_mask, 2 in input_ids"),
        ([numbers(20)], {"vocab_size": 10}, "token id 10, but the model knows ids 0 to 9"),
        ([[-100] * 20], {}, "token id -100, but ids start at 0"),
        ([{"input_ids": [70, 0], "attention_mask": [1, 0]}], {"vocab_size": 50}, "token id 70"),
        (["abcdefghij"], {"vocab_size": 98}, "token id 98, but the model knows ids 0 to 97"),
    ],
)
def test_bad_data_is_refused_with_what_was_asked_and_seen(calibration, options, message):
    with pytest.raises(UsageError, match=message):
        take(calibration, **options)


def test_a_mixture_of_too_little_is_counted_together(two_files):
    with pytest.raises(UsageError, match="together hold 2,000 tokens, 2,048 are needed"):
        take([parse(file) for file in two_files], min_tokens=2048)


def test_texts_and_chats_need_a_tokenizer_and_chats_a_template():
    with pytest.raises(UsageError, match="texts need a tokenizer"):
        gather(["text"], None)
    plain = Bytes()
    plain.chat_template = None
    with pytest.raises(UsageError, match="this tokenizer has none; give texts instead"):
        take([CHAT], plain)


def test_a_template_that_refuses_is_quoted():
    class Strict(Bytes):
        def apply_chat_template(self, messages, tokenize):
            raise ValueError("System role not supported")

    with pytest.raises(UsageError, match="chat template refuses chat 0: System role not supported"):
        take([CHAT], Strict())
