"""Everything transformers offers to write text with a model, on packed weights: the same text as on dense ones."""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LlamaForCausalLM,
    pipeline,
)
from transformers.generation.streamers import TextIteratorStreamer, TextStreamer

import tiny
import wellrounded as wr
from wellrounded.errors import UsageError
from wellrounded.hf import compiling
from wellrounded.nn import QuantLinear

PROMPTS = ["The quick", "A model reads tokens, and every token is a row", "lazy"]
MESSAGES = [{"role": "user", "content": "The quick brown"}]
NEW = 16  # tokens to write
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
PACKED = 21  # layers of the checkpoint
MARGIN = 1e-3  # between the two likeliest tokens; kernels and paddings move logits of float32 by some 1e-6
STREAM = {"skip_prompt": True, "skip_special_tokens": True}


@pytest.fixture
def model(quantized):
    """In float32, where every choice that is compared here is far from a tie."""
    return wr.load(quantized, dtype=torch.float32)


@pytest.fixture
def dense(llama):
    """What `quantized` was made from."""
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)


@pytest.fixture
def tokenizer(quantized):
    return AutoTokenizer.from_pretrained(quantized, padding_side="left")


def written(model, tokenizer, prompt, **options) -> str:
    """The text that follows the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, **{**GREEDY, **options})
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def calls_of(model) -> list:
    """Grows with every forward pass of the model."""
    model.register_forward_hook(lambda *_: calls.append(None))
    return (calls := [])


def packed_nodes(graph) -> int:
    packed = ("wellrounded.linear", "wellrounded.product")
    return sum(str(node.target).removesuffix(".default") in packed for node in graph.nodes)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams and a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "a static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_weights_write_what_the_same_weights_write_dense(way, model, dense, quantized, tokenizer):
    inputs = tokenizer("The quick brown fox", return_tensors="pt")

    def output(writer):
        torch.manual_seed(3)
        return writer.generate(**inputs, **{**GREEDY, **WAYS[way]})

    assert torch.equal(output(model), output(tiny.twin(dense, quantized)))
    assert not torch.equal(output(model), output(dense))  # so it does tell one model from another


def test_sampling_follows_the_seed(model, tokenizer):
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(written(model, tokenizer, PROMPTS[0], do_sample=True))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_every_row_of_a_left_padded_batch_is_written_as_it_is_alone(kernel, quantized, tokenizer):
    model = wr.load(quantized, dtype=torch.float32, kernel=kernel)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    together = model.generate(**batch, **GREEDY)[:, -NEW:]
    for prompt, row in zip(PROMPTS, together):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        best = torch.cat(alone.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > MARGIN
        assert torch.equal(alone.sequences[0, -NEW:], row)
    unmasked = model.generate(batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]), **GREEDY)
    assert not torch.equal(unmasked[:, -NEW:], together)


@pytest.mark.parametrize("pair", ["packed, helped by dense", "packed, helped by packed", "dense, helped by packed"])
def test_with_an_assistant_a_model_writes_what_it_writes_alone(pair, model, dense, quantized, tokenizer):
    target = dense if pair.startswith("dense") else model
    assistant = dense if pair.endswith("dense") else wr.load(quantized, dtype=torch.float32)
    alone = written(target, tokenizer, PROMPTS[1])
    steps, drafts = calls_of(target), calls_of(assistant)
    assert written(target, tokenizer, PROMPTS[1], assistant_model=assistant) == alone
    assert drafts and len(steps) < NEW  # what it drafts is looked at, and some of it is right


def test_a_pipeline_continues_prompts_one_by_one_and_in_a_batch(model, tokenizer):
    expected = [prompt + written(model, tokenizer, prompt) for prompt in PROMPTS]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert write(PROMPTS[0], **GREEDY) == [{"generated_text": expected[0]}]
    steps = calls_of(model)
    assert [answer["generated_text"] for (answer,) in write(PROMPTS, batch_size=3, **GREEDY)] == expected
    assert len(steps) == NEW


def test_a_pipeline_answers_a_chat(model, tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    (answer,) = pipeline("text-generation", model=model, tokenizer=tokenizer)(MESSAGES, **GREEDY)
    said = {"role": "assistant", "content": written(model, tokenizer, prompt)}
    assert answer["generated_text"] == [*MESSAGES, said]


def test_a_pipeline_opens_a_directory_once_registered(model, quantized, tokenizer):
    wr.unregister()  # as it is before anything was loaded
    wr.register()
    write = pipeline("text-generation", model=str(quantized), dtype=torch.float32)
    assert sum(isinstance(layer, QuantLinear) for layer in write.model.modules()) == PACKED
    assert write(PROMPTS[0], **GREEDY) == [{"generated_text": PROMPTS[0] + written(model, tokenizer, PROMPTS[0])}]


def test_a_streamer_prints_what_generate_returns(model, tokenizer, capsys):
    text = written(model, tokenizer, PROMPTS[0], streamer=TextStreamer(tokenizer, **STREAM))
    assert text and capsys.readouterr().out == text + "\n"


def test_an_iterator_gives_the_text_that_a_thread_writes_piece_by_piece(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=30, **STREAM)
    with ThreadPoolExecutor() as threads:
        text = threads.submit(written, model, tokenizer, PROMPTS[0], streamer=streamer)
        pieces = list(streamer)
    assert len(pieces) > 2 and "".join(pieces) == text.result()


def test_an_event_loop_reads_the_text_too(model, tokenizer):
    async def read():
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=30, **STREAM)
        writer = asyncio.create_task(asyncio.to_thread(written, model, tokenizer, PROMPTS[0], streamer=streamer))
        return [piece async for piece in streamer], await writer

    pieces, text = asyncio.run(read())
    assert len(pieces) > 2 and "".join(pieces) == text


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_several_threads_write_with_one_model(mode, model, tokenizer):
    def write(prompt):
        with mode():
            return written(model, tokenizer, prompt)

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(write, PROMPTS)) == [written(model, tokenizer, prompt) for prompt in PROMPTS]


def test_a_compiled_model_is_one_graph_with_a_node_per_layer(quantized, fresh_dynamo):
    model, nodes = wr.load(quantized), []

    def backend(graph, inputs):
        nodes.append(packed_nodes(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for tokens in (tiny.ids(1, length=12), tiny.ids(3, length=20)):  # few rows and many: two ways through a kernel
        assert torch.equal(tiny.logits(compiled, tokens), tiny.logits(model, tokens))
    assert set(nodes) == {PACKED}


def test_generate_compiles_its_steps_on_a_static_cache(model, tokenizer, fresh_dynamo):
    settings = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    settings._compile_all_devices = True  # on a CPU it would not
    static = {"cache_implementation": "static", "compile_config": settings}
    assert written(model, tokenizer, PROMPTS[0], **static) == written(model, tokenizer, PROMPTS[0])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_an_exported_model_is_stored_loaded_and_takes_other_shapes(quantized, tmp_path):
    model, example = wr.load(quantized), {"input_ids": tiny.ids(2, length=12), "use_cache": False}
    sizes = {0: torch.export.Dim("rows", max=8), 1: torch.export.Dim("length", max=64)}
    shapes = {"input_ids": sizes, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert packed_nodes(program.graph) == PACKED
    for tokens in (tiny.ids(2, length=9), tiny.ids(4, length=30)):
        found = program.module()(input_ids=tokens, use_cache=False).logits
        assert torch.equal(found, tiny.logits(model, tokens))


# ---- head_bits ----


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the second one's is tied to its embedding
def test_a_packed_head_gives_nearly_the_same_logits(kind, tmp_path):
    directory = tiny.save(tiny.build(kind), tmp_path / kind)
    whole, packed = wr.load(directory), wr.load(directory, head_bits=8)
    head = packed.get_output_embeddings()
    assert isinstance(head, QuantLinear) and str(head.scheme) == "8-bit g64 sym"
    step = 2 * whole.get_output_embeddings().weight.abs().max() / 255
    with torch.no_grad():
        hidden = whole.base_model(tiny.ids(2)).last_hidden_state
        off = (packed(tiny.ids(2)).logits - whole(tiny.ids(2)).logits).abs()
    assert 0 < off.max() and (off <= step * hidden.abs().sum(-1, keepdim=True)).all()
    assert torch.equal(packed.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    with pytest.raises(UsageError, match="loaded with head_bits cannot be saved"):
        packed.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_cannot_be_packed_is_named(tmp_path):
    odd = tiny.save(tiny.build("llama", vocab_size=321), tmp_path / "odd")
    with pytest.raises(UsageError, match="head_bits=8 was asked for, but 8-bit packing needs outputs"):
        wr.load(odd, head_bits=8)
    with pytest.raises(UsageError, match="bits"):
        wr.load(odd, head_bits=5)


# ---- compile=True ----


@pytest.mark.skipif(not any(map(shutil.which, compiling.COMPILERS)), reason="no C++ compiler")
def test_compiled_steps_write_what_the_others_write(quantized, model, tokenizer, fresh_dynamo, tmp_path):
    compiled = wr.load(quantized, dtype=torch.float32, compile=True, cache_length=128)
    for prompt in (PROMPTS[0], PROMPTS[1]):
        assert written(compiled, tokenizer, prompt) == written(model, tokenizer, prompt)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert compiled._previous_max_cache_length == 128
    compiled.save_pretrained(tmp_path / "saved")
    assert "static" not in (tmp_path / "saved" / "generation_config.json").read_text()
    assert compiled.generation_config.cache_implementation == "static"


def test_what_cannot_be_compiled_is_said_at_once(quantized, monkeypatch):
    for wish, message in (
        ({"compile": True, "cache_length": 10_000}, "cache_length=10000 was asked for; this model can use 1 to 256"),
        ({"compile": True, "cache_length": 0}, "this model can use 1 to 256"),
        ({"cache_length": 64}, "cache_length=64 was asked for without compile=True"),
    ):
        with pytest.raises(UsageError, match=message):
            wr.load(quantized, **wish)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="LlamaForCausalLM cannot be compiled as a"):
        patch.setattr(LlamaForCausalLM, "_can_compile_fullgraph", False)
        wr.load(quantized, compile=True)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"compile=True needs a C\+\+ compiler"):
        wr.load(quantized, compile=True)
