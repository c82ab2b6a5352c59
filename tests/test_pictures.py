"""The language half of a vision-language model, calibrated on chats with pictures; towers and projectors stay exact."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import tiny
import wellrounded as wr
from wellrounded.calibration import gather
from wellrounded.cli import main
from wellrounded.errors import UsageError
from wellrounded.hf import source
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import meta_copy

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}PICTURE{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = {**tiny.COMMON, "vocab_size": 384, "num_hidden_layers": 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
SQUARE = {"height": 56, "width": 56}
LONGEST = 100  # tokens: no chat here is longer


def tokenizer(**special) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a few more special tokens."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": special}
    return PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer, **names)


def llava():
    """A CLIP tower, a projector, and a Llama; a picture is 16 tokens."""
    fast = tokenizer(image_token="<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, initializer_range=0.1), text_config=LlamaConfig(**TEXT),
        image_token_id=fast.image_token_id, vision_feature_layer=-2, tie_word_embeddings=False,
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE), fast, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("PICTURE", "<image>"),
    )  # fmt: skip
    return LlavaForConditionalGeneration, config, processor


def gemma3():
    """A SigLIP tower, a projector, and a Gemma 3 whose picture tokens, 4 to a picture, see each other."""
    fast = tokenizer(boi_token="<begin>", image_token="<soft>", eoi_token="<end>")
    layers = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), mm_tokens_per_image=4,
        text_config=Gemma3TextConfig(**TEXT, **layers), image_token_id=fast.image_token_id,
        boi_token_index=fast.boi_token_id, eoi_token_index=fast.eoi_token_id, initializer_range=0.1,
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=SQUARE, do_pan_and_scan=False), fast,
        chat_template=TEMPLATE.replace("PICTURE", "<begin>"), image_seq_length=4,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration, config, processor


def built(how):
    """The model in bfloat16 and its processor."""
    kind, config, processor = how()
    torch.manual_seed(0)
    model = kind._from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("projection_weight"):  # zero at first: Gemma 3 would see nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model, processor


def saved(how, directory):
    for part in built(how):
        part.save_pretrained(directory)


@pytest.fixture(scope="session", params=[llava, gemma3], ids=lambda how: how.__name__)
def vlm(request, _made):
    """A vision-language model's directory, with its processor."""
    return _made(request.param.__name__, lambda out: saved(request.param, out))


@pytest.fixture(scope="session")
def seen(_made, vlm):
    """The same model in 4 bits, calibrated on pictures."""
    return _made(f"{vlm.name}-seen", lambda out: quantize(vlm, out))


@pytest.fixture(scope="session")
def a_llava(_made):
    return _made("llava", lambda out: saved(llava, out))


def picture(seed: int, width: int = 70, height: int = 50):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(number: int, image=None, words: int = 1) -> list[dict]:
    """A question, about a picture if there is one, and an answer."""
    question = [{"type": "text", "text": f"What is this, number {number}?" + " word" * words}]
    shown = [] if image is None else [{"type": "image", "image": image}]
    answer = [{"type": "text", "text": f"The quick brown fox {number}."}]
    return [{"role": "user", "content": shown + question}, {"role": "assistant", "content": answer}]


def chats(count: int = 40, shift: int = 0) -> list[list[dict]]:
    """Every fourth of them without a picture."""
    return [chat(n, picture(n + shift) if n % 4 else None, words=n % 5) for n in range(count)]


def quantize(model, out, calibration=None, **options):
    given = chats() if calibration is None else calibration
    return wr.quantize(model, out, calibration=given, group_size=32, **{"length": LONGEST, **options})


def inputs_of(processor, one, **options):
    return processor.apply_chat_template(one, tokenize=True, return_dict=True, return_tensors="pt", **options)


def tensors(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def report_of(directory) -> dict:
    return json.loads((directory / "quantization_report.json").read_text())


def take(calibration, processor, **options):
    return gather(calibration, processor, **{"length": LONGEST, "min_tokens": 1, "samples": 20, **options})


# ---- the result ----


def test_what_sees_is_copied_bit_by_bit_and_what_speaks_is_packed(vlm, seen):
    before, after = tensors(vlm), tensors(seen)
    sees = {name for name in before if "vision_tower" in name or "projector" in name}
    assert len(sees) > 10 and all(torch.equal(before[name], after[name]) for name in sees)
    packed = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    assert packed == {
        name.removesuffix(".weight") for name in before if "layers" in name and "_proj" in name and name not in sees
    }
    assert len(packed) == 14 and not any(f"{name}.weight" in after for name in packed)


def test_every_layer_saw_every_token_those_of_pictures_too(vlm, seen):
    lengths = [inputs_of(AutoProcessor.from_pretrained(vlm), one)["input_ids"].shape[1] for one in chats()]
    report = report_of(seen)
    used = report["calibration"]
    assert used["tokens"] + used["held_out_tokens"] == sum(lengths) and used["held_out_windows"] == 4
    assert {layer["tokens"] for layer in report["layers"]} == {used["tokens"]}
    assert used["length"] == max(lengths)
    assert used["sources"][0]["name"] == "given chats with pictures"


def test_pictures_decide_the_result(vlm, seen, tmp_path):
    quantize(vlm, tmp_path / "others", chats(shift=1000))
    quantize(vlm, tmp_path / "text", [chat(n, words=20) for n in range(40)], length=32)
    codes = [tensors(out) for out in (seen, tmp_path / "others", tmp_path / "text")]
    for name in (name for name in codes[0] if name.endswith("mlp.down_proj.qweight")):
        assert not torch.equal(codes[0][name], codes[1][name]) and not torch.equal(codes[0][name], codes[2][name])


def test_it_loads_as_what_it_was_and_speaks_of_a_picture(vlm, seen):
    model, processor = wr.load(seen), AutoProcessor.from_pretrained(seen)
    assert type(model).__name__ == json.loads((vlm / "config.json").read_text())["architectures"][0]
    inputs = inputs_of(processor, chat(7, picture(7))[:1], add_generation_prompt=True)
    answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    again = model.generate(**{**inputs, "pixel_values": inputs["pixel_values"] * 0}, max_new_tokens=1)
    assert again.shape[1] == inputs["input_ids"].shape[1] + 1


def test_its_logits_are_those_of_the_dense_model_with_its_weights(vlm, seen):
    how = {"llava": llava, "gemma3": gemma3}[vlm.name]
    dense, processor = built(how)
    inputs = inputs_of(processor, chat(7, picture(7)))
    with torch.no_grad():
        got = wr.load(seen, kernel="reference")(**inputs).logits
        assert not torch.equal(got, dense(**inputs).logits)
        for name, weight in tiny.stored_weights(seen).items():  # files call the language half by another name
            layer = dense.get_submodule(f"model.language_model{name[name.index('.layers.') :]}")
            layer.weight.data = weight.dequantize(dense.dtype)
        assert torch.equal(got, dense(**inputs).logits)


def test_the_walk_on_pictures_is_the_model_to_the_last_bit(vlm):
    model, processor = built({"llava": llava, "gemma3": gemma3}[vlm.name])
    windows = take(chats(6), processor, held_out=0).windows
    walk = BlockWalk(meta_copy(model, torch.bfloat16), model.state_dict().get)
    stream = walk.stream(windows.ids, windows.mask, 1, windows.more)
    for index, _, _ in walk:
        walk.advance(index, stream)
    for batch, (one, mask) in enumerate(zip(chats(6), windows.mask)):
        with torch.no_grad():
            alone = model(**inputs_of(processor, one).to(torch.bfloat16), use_cache=False).logits
        assert torch.allclose(walk.logits(stream, batch)[0, mask].float(), alone[0].float(), atol=0.05)
        with torch.no_grad():
            padded = model(
                input_ids=windows.ids[batch : batch + 1], attention_mask=mask[None].long(), use_cache=False,
                **{k: v.bfloat16() if v.is_floating_point() else v for k, v in windows.more[batch].items()},
            ).logits  # fmt: skip
        assert torch.equal(walk.logits(stream, batch)[0, mask], padded[0, mask])


def test_a_model_in_memory_takes_its_processor_along(tmp_path):
    model, processor = built(llava)
    report = quantize(model, tmp_path / "out", tokenizer=processor)
    assert report.calibration["windows"] == 36 and not report.problems()
    assert type(AutoProcessor.from_pretrained(tmp_path / "out")) is LlavaProcessor


# ---- without pictures ----


def test_text_needs_no_processor(vlm, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "load_processor", lambda *_: pytest.fail("loaded"))
    texts = [tiny.TEXT * 80]
    report = quantize(vlm, tmp_path / "text", texts, length=32)
    whole = quantize(vlm, tmp_path / "again", texts, length=32, tokenizer=AutoProcessor.from_pretrained(vlm))
    assert report.calibration == whole.calibration and report.calibration["sources"][0]["name"] == "given texts"


@pytest.mark.parametrize("calibration", ["none", "ids"])
def test_token_ids_and_plain_rounding_need_neither(vlm, tmp_path, copy_of, calibration):
    bare = copy_of(vlm)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    given = calibration if calibration == "none" else tiny.ids()
    report = quantize(bare, tmp_path / "out", given, length=tiny.LENGTH)
    assert len(report.layers) == 14 and not report.problems()
    assert tiny.logits(wr.load(tmp_path / "out")).shape == (4, tiny.LENGTH, 384)


def test_a_text_that_the_template_reads_in_lists_only_is_given_in_lists(a_llava):
    processor = AutoProcessor.from_pretrained(a_llava)
    strings = [[{"role": "user", "content": "The quick brown fox"}]] * 8
    lists = [[{"role": "user", "content": [{"type": "text", "text": "The quick brown fox"}]}]] * 8
    got, want = (take(rows, processor, length=8) for rows in (strings, lists))
    assert torch.equal(got.windows.ids, want.windows.ids)
    assert "brown fox" in processor.tokenizer.decode(got.windows.ids.flatten())
    plain = take(lists, tiny.tokenizer(), length=8)  # whose template would print a list
    assert torch.equal(plain.windows.ids, take(strings, tiny.tokenizer(), length=8).windows.ids)


def test_the_template_may_be_the_processors_alone(a_llava):
    processor = AutoProcessor.from_pretrained(a_llava)
    want = take([chat(1)] * 9, processor, length=8).windows.ids
    processor.tokenizer.chat_template = None
    assert torch.equal(take([chat(1)] * 9, processor, length=8).windows.ids, want)


# ---- windows ----


class Letters:
    """A processor whose tokens are letters, and a picture three times @; of a picture it sees only how wide it is."""

    image_processor = object()
    chat_template = "a program"
    image_token_id = 64

    def __init__(self):
        self.tokenizer, self.calls = self, 0

    def __call__(self, text, **options):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, turns, tokenize=False, **options):
        parts = [part for turn in turns for part in turn["content"]]
        text = "".join(part["text"] if part["type"] == "text" else "@@@" for part in parts)
        if not tokenize:
            return text
        self.calls += 1
        ids = torch.tensor([list(text.encode())])
        widths = [[part["image"].width] for part in parts if part["type"] == "image"]
        seen = {"pixel_values": torch.tensor(widths).float(), "pixel_mask": ids > 0} if widths else {}
        return {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": (ids == 64).int(), **seen}


def say(text: str, *images) -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


def test_a_chat_is_a_window_padded_on_the_right_in_all_that_it_has_per_token():
    got = take([say("a", picture(0)), say("bcdef"), say("gh", picture(0, width=9), picture(0))], Letters()).windows
    assert [bytes(row).decode() for row in got.ids.tolist()] == ["@@@a\0\0\0\0", "bcdef\0\0\0", "@@@@@@gh"]
    assert got.mask.sum(1).tolist() == [4, 5, 8] and got.tokens == 17
    assert [more["token_type_ids"].tolist()[0] for more in got.more] == [
        [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [1] * 6 + [0, 0],
    ]  # fmt: skip
    assert got.more[2]["pixel_values"].tolist() == [[9.0], [70.0]] and "pixel_values" not in got.more[1]
    assert got.more[0]["pixel_mask"].shape == (1, 4)  # of pixels, not of tokens, though there are as many


def test_chats_and_texts_may_be_mixed(tmp_path):
    (tmp_path / "book.txt").write_text("x" * 100)
    picture(0).save(tmp_path / "a.png")
    lines = [json.dumps({"messages": say(letter, "a.png")}) for letter in "abcdefgh"]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    both = [wr.parse(str(tmp_path / name)) for name in ("book.txt", "chats.jsonl")]
    got = take(both, Letters(), samples=6, length=10)
    looks = sorted(bytes(row).decode() for row in got.windows.ids.tolist())
    assert looks[3:] == ["x" * 10] * 3 and all(look[:3] == "@@@" and look[4:] == "\0" * 6 for look in looks[:3])
    for ids, more in zip(got.windows.ids, got.windows.more):
        assert more["token_type_ids"].shape == (1, 10) if ids[0] == 64 else more == {}


def test_the_id_of_a_picture_may_lie_beyond_the_vocabulary_but_no_other():
    got = take([say("12", picture(0))], Letters(), vocab_size=64, held_out=0)
    assert bytes(got.windows.ids[0].tolist()) == b"@@@12"
    with pytest.raises(UsageError, match="token id 97, but the model knows ids 0 to 63"):
        take([say("a", picture(0))], Letters(), vocab_size=64)


def test_equal_pictures_have_equal_digests_and_others_have_not():
    digests = [take([say("a", picture(0, width=w))], Letters(), held_out=0).digest for w in (8, 8, 9)]
    assert digests[0] == digests[1] != digests[2]
    first, second = ([say("a", *i), say("aaaa"), say("a", *j)] for i, j in ([[picture(0)], []], [[], [picture(0)]]))
    assert take(first, Letters(), held_out=0).digest != take(second, Letters(), held_out=0).digest


def test_only_as_many_chats_are_read_as_are_needed_spread_over_all():
    letters = Letters()
    got = take([say(chr(65 + n % 50), picture(0)) for n in range(500)], letters, samples=18, held_out=2)
    assert (letters.calls, len(got.windows), len(got.held_out), got.sources[0].dropped) == (20, 18, 2, 480)
    letters = Letters()
    take([say("abcde", picture(0))] * 500, letters, samples=18, held_out=2, min_tokens=400)
    assert letters.calls == 50


def test_a_picture_is_never_cut_but_text_is():
    rows = [say("a" * 9, picture(0))] * 4 + [say("a" * n, picture(0)) for n in (1, 5)] + [say("x" * 20)] * 2
    got = take(rows, Letters(), length=8, held_out=0)
    assert [bytes(row).decode().strip("\0") for row in got.windows.ids.tolist()] == ["@@@a", "@@@aaaaa", *["x" * 8] * 2]
    assert got.windows.more[3]["token_type_ids"].shape == (1, 8)
    assert (got.sources[0].used, got.sources[0].dropped) == (4, 4)
    assert "4 of 6 chats with pictures are longer than 8 tokens and left out" in got.note
    assert "with a length (--length) of 12 none would be" in got.note and "2 of 4 rows were longer" in got.note


def test_where_every_picture_is_too_long_the_length_to_ask_for_is_said():
    with pytest.raises(
        UsageError, match=r"all 3 chats with pictures are longer than 8 tokens.*shortest has 11.*--length"
    ):
        take([*[say("a" * n, picture(0)) for n in (9, 8, 10)], say("text")], Letters(), length=8)


def test_pictures_may_lie_beside_the_chat_or_in_files(tmp_path):
    picture(0, width=9).save(tmp_path / "a.png")
    path, data = tmp_path / "a.png", (tmp_path / "a.png").read_bytes()
    bare = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "a", "image": None}]}
    ]
    rows = [
        say("a", path), say("a", str(path)), say("a", picture(0, width=9)), say("a", {"bytes": data, "path": None}),
        [{"role": "user", "content": [{"type": "image", "url": str(path)}, {"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "a"}]}],
    ]  # fmt: skip
    rows = [*({"messages": row} for row in rows), {"messages": bare, "images": [path]}]
    got = take(rows, Letters(), held_out=0).windows
    assert len(got) == 7 and {more["pixel_values"].item() for more in got.more} == {9.0}


# ---- the command line ----


def test_the_command_line_takes_a_file_of_chats(a_llava, tmp_path, capsys):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    lines = []
    for n, one in enumerate(chats(50)):
        for part in (part for part in one[0]["content"] if part["type"] == "image"):
            part.pop("image").save(tmp_path / "data" / "pictures" / f"{n}.png")
            part["path"] = f"pictures/{n}.png"
        lines.append(json.dumps({"messages": one}))
    (tmp_path / "data" / "chats.jsonl").write_text("\n".join(lines))
    args = ["quantize", str(a_llava), "-o", str(tmp_path / "out"), "--calibration", str(tmp_path / "data/chats.jsonl")]
    assert main([*args, "--samples", "40", "--group-size", "32", "--length", str(LONGEST), "--json"]) == 0
    used = json.loads(capsys.readouterr().out)["calibration"]["sources"][0]
    assert used["name"].endswith("chats.jsonl") and (used["used"], used["held_out"], used["dropped"]) == (40, 5, 5)
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_token == "<image>"

    shutil.rmtree(tmp_path / "data" / "pictures")
    assert main([*args, "--force"]) == 2
    assert f"no such picture: {tmp_path / 'data/pictures/1.png'}" in capsys.readouterr().err


# ---- what is refused ----


def test_pictures_need_a_processor(a_llava, tmp_path, copy_of):
    for given in (None, tiny.tokenizer()):
        with pytest.raises(UsageError, match=r"need the model's processor.*pass tokenizer=AutoProcessor"):
            take(chats(4), given)
    bare = copy_of(a_llava)
    (bare / "processor_config.json").unlink()
    with pytest.raises(UsageError, match=r"only a tokenizer is there; pass tokenizer=AutoProcessor"):
        quantize(bare, tmp_path / "out")
    (bare / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"')
    with pytest.raises(UsageError, match=r"copy: its processor of pictures cannot be loaded: .*pass tokenizer="):
        quantize(bare, tmp_path / "out")


def test_a_model_that_reads_text_only_takes_no_pictures(llama, a_llava, tmp_path):
    with pytest.raises(UsageError, match=r"become pixel_values, and the model takes none of these: it reads text only"):
        quantize(llama, tmp_path / "out", tokenizer=AutoProcessor.from_pretrained(a_llava))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": "a.mp4"}, "chat 1: content of type 'video' is not supported"),
        ({"type": "audio", "audio": "a.wav"}, "chat 1: content of type 'audio' is not supported"),
        ({"text": "a"}, "chat 1: content {'text': 'a'} is not supported"),
        ({"type": "image"}, "chat 1: an entry of type 'image' holds no picture"),
        (
            {"type": "image", "url": "https://example.org/a.png"},
            "chat 1: 'https://example.org/a.png' is not a file here",
        ),
        ({"type": "image", "image": "nowhere.png"}, "chat 1: no such picture: nowhere.png"),
        (
            {"type": "image", "image": __file__},
            r"chat 1: .*test_pictures.py cannot be read as a picture \(Unidentified",
        ),
        ({"type": "image", "image": torch.ones(3, 8, 8)}, "chat 1: a Tensor is given as a picture; give a PIL image"),
    ],
)
def test_a_content_that_nobody_can_read_is_named(part, message):
    with pytest.raises(UsageError, match=message):
        take([say("a", picture(0)), [{"role": "user", "content": [part]}]], Letters())


def test_a_picture_without_a_place_in_the_chat_is_refused():
    with pytest.raises(UsageError, match="row 0: 1 of its 2 images have no place in the chat"):
        take([{"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [picture(0)] * 2}], Letters())


def test_a_truncated_picture_is_refused(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"a.png cannot be read as a picture \(OSError"):
        take([say("a", tmp_path / "a.png")], Letters())


def test_without_pillow_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UsageError, match="pictures are read by the package pillow: pip install pillow"):
        take([say("a", object())], Letters())


def test_a_processor_that_loses_the_pictures_is_refused(a_llava):
    processor = AutoProcessor.from_pretrained(a_llava)
    with pytest.raises(UsageError, match="chats need a chat template and the model's processor has none"):
        processor.chat_template = None
        take(chats(4), processor)
    with pytest.raises(UsageError, match="leaves its pictures out"):
        take([say("a", picture(0))], type("Blind", (Letters,), {"image_token_id": 300})())
    with pytest.raises(UsageError, match="chat 1: the model's processor refuses it: no"):
        processor.chat_template = (
            "{% if messages[0]['content'][0]['type'] == 'image' %}{{ raise_exception('no') }}{% endif %}"
        )
        take(chats(4), processor)
