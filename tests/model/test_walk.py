"""The walk gives exactly what the model gives, with one block in memory at a time."""

import threading

import pytest
import torch
from torch import nn

import tiny
import tiny_configs
from wellrounded.errors import CheckpointError, NumericsError, UsageError
from wellrounded.model.stream import SpillFile
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import Ahead, materialize, meta_copy

TOKENS = tiny.ids(4, seed=7)
PADDED = torch.ones_like(TOKENS, dtype=torch.bool)
PADDED[1, -10:] = False  # on the right
PADDED[2, :7] = False  # on the left


def walk_of(model) -> BlockWalk:
    return BlockWalk(meta_copy(model, torch.float32), model.state_dict().get)


def walked(walk, tokens=TOKENS, mask=None, tamper=lambda stream: None) -> torch.Tensor:
    """Logits after all blocks, two windows at a time."""
    stream = walk.stream(tokens, mask, batch=2)
    tamper(stream)
    for index, _, _ in walk:
        walk.advance(index, stream)
    return torch.cat([walk.logits(stream, batch) for batch in range(len(stream.ids))])


def expected(model, tokens=TOKENS, mask=None) -> torch.Tensor:
    pairs = zip(tokens.split(2), [None] * 2 if mask is None else mask.long().split(2))
    return torch.cat([tiny.logits(model, part, part_mask) for part, part_mask in pairs])


def meta_blocks(walk) -> list[bool]:
    return [all(p.device.type == "meta" for p in block.parameters()) for block in walk.blocks]


# ---- exactness ----


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_the_chain_of_blocks_is_the_model_to_the_last_bit(kind):
    model = tiny.build(kind)
    assert torch.equal(walked(walk_of(model)), expected(model))


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_padding_masks_reach_the_blocks_as_the_model_makes_them(kind):
    model = tiny.build(kind)
    got, want = walked(walk_of(model), mask=PADDED), expected(model, mask=PADDED)
    assert torch.equal(got[PADDED], want[PADDED])
    assert not torch.equal(want[PADDED], expected(model)[PADDED]), "the mask should matter"


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_handing_every_block_what_the_first_one_got_would_be_wrong(kind):
    model = tiny.build(kind)

    def reuse(stream):
        stream.calls = [[calls[0]] * len(calls) for calls in stream.calls]

    difference = (walked(walk_of(model), tamper=reuse) - expected(model)).abs().max()
    assert difference > 1e-2


def test_batches_with_equal_masks_share_what_their_blocks_are_given():
    stream = walk_of(tiny.build("gemma3_text")).stream(TOKENS, None, batch=1)
    assert all(calls is stream.calls[0] for calls in stream.calls)
    stream = walk_of(tiny.build("gemma3_text")).stream(TOKENS, PADDED, batch=1)
    assert [calls is stream.calls[0] for calls in stream.calls] == [True, False, False, True]


def test_observing_a_block_leaves_the_stream_where_it_is():
    model = tiny.build("llama")
    walk = walk_of(model)
    stream = walk.stream(TOKENS, None, batch=2)
    for index, _, _ in walk:
        walk.observe(index, stream, ["mlp.down_proj"])
        walk.advance(index, stream)
    assert torch.equal(torch.cat([walk.logits(stream, 0), walk.logits(stream, 1)]), expected(model))


# ---- memory ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_one_block_holds_its_weights_at_a_time(kind):
    walk = walk_of(tiny.build(kind))
    assert meta_blocks(walk) == [True] * 3
    for index, name, block in walk:
        assert name == walk.names[index] and block is walk.blocks[index]
        assert not any(p.device.type == "meta" for p in block.parameters())
        assert meta_blocks(walk) == [i != index for i in range(3)]
    assert meta_blocks(walk) == [True] * 3


def test_a_walk_can_be_taken_twice():
    model = tiny.build("llama")
    walk = walk_of(model)
    assert torch.equal(walked(walk), walked(walk))


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_hidden_states_and_masks_can_lie_in_a_file(kind, tmp_path):
    model = tiny.build(kind)
    walk, spill = walk_of(model), SpillFile(tmp_path)
    stream = walk.stream(TOKENS, PADDED, batch=2, spill=spill)
    for index, _, _ in walk:
        walk.advance(index, stream)
    got = torch.cat([walk.logits(stream, batch) for batch in range(len(stream.ids))])
    assert torch.equal(got[PADDED], expected(model, mask=PADDED)[PADDED])
    held = [t for calls in stream.calls[1:] for t in tensors_in(calls)]
    assert not held, "what the second batch alone is given lies in the file"
    assert not list(tmp_path.iterdir()), "the file has no name"


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, (tuple, list, dict)):
        return [t for one in (value.values() if isinstance(value, dict) else value) for t in tensors_in(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    spill = SpillFile(tmp_path)

    class Full:
        def seek(self, offset):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "_file", Full())
    with pytest.raises(CheckpointError, match=r"writing .*activations.*: No space left on device; finished blocks"):
        spill.put(torch.ones(3))


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_halved_batches_go_on_where_they_were(kind, after, spilled, tmp_path):
    model = tiny.build(kind)
    walk = walk_of(model)
    stream = walk.stream(TOKENS, PADDED, batch=4, spill=SpillFile(tmp_path) if spilled else None)
    for index, _, _ in walk:
        if index == after:
            stream = walk.halved(stream)
        walk.advance(index, stream)
    assert [len(ids) for ids in stream.ids] == [2, 2]
    got = torch.cat([walk.logits(stream, batch) for batch in range(2)])
    assert torch.allclose(got[PADDED], expected(model, mask=PADDED)[PADDED], atol=1e-5)
    with pytest.raises(MemoryError, match="single window"):
        walk.halved(walk.halved(stream))


BOXES = {
    "gemma3n_text": {},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("kind", BOXES)
def test_what_blocks_leave_for_later_ones_stays_with_its_windows(kind, batch):
    """In a box that the model gives all of them: each batch has its own, and so has a stream that goes another way."""
    model = tiny_configs.build(kind, num_hidden_layers=4, **BOXES[kind])
    walk = walk_of(model)
    stream = walk.stream(TOKENS, None, batch)
    other = stream.twin()
    for index, _, _ in walk:
        if index == 1 and batch > 1:
            stream = walk.halved(stream)
        for one in range(len(other.ids)):  # what the other one leaves is wrong
            other._hidden[one] = torch.zeros_like(other.hidden(one))
        walk.advance(index, stream, other)
    got = torch.cat([walk.logits(stream, one) for one in range(len(stream.ids))])
    assert torch.allclose(got, expected(model), atol=1e-5)


# ---- the hollow walk ----


def test_the_blocks_keep_their_own_forward():
    walk = walk_of(tiny.build("llama"))
    wrapped = walk.blocks[1].forward
    walk.blocks[1].forward = wrapped  # as a hook of another library would
    walk.stream(TOKENS, None, batch=2)
    assert [block.__dict__.get("forward") for block in walk.blocks] == [None, wrapped, None]


def test_the_blocks_keep_their_own_forward_after_an_error():
    walk = walk_of(tiny.build("llama"))
    with pytest.raises(UsageError, match=r"LlamaForCausalLM: its blocks .* cannot be walked"):
        walk.stream(TOKENS + tiny.VOCABULARY, None, batch=2)
    assert not any("forward" in block.__dict__ for block in walk.blocks)


def test_a_block_that_the_model_does_not_call_is_passed_by():
    model = tiny.build("llama")
    model.config.num_hidden_layers = 2  # its forward stops one block early
    assert torch.equal(walked(walk_of(model)), expected(model))


def test_a_block_that_is_called_twice_is_refused():
    model = tiny.build("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UsageError, match=r"model.layers.0 is called 2 times in one pass"):
        walk_of(model).stream(TOKENS, None, batch=2)


def test_blocks_between_which_the_model_computes_are_refused():
    model = tiny.build("llama")
    inner = model.model.layers[1].forward
    model.model.layers[1].register_forward_pre_hook(lambda block, args: (args[0] * 2, *args[1:]))
    with pytest.raises(UsageError, match=r"model.layers.1 does not read what the block before it returns"):
        walk_of(model).stream(TOKENS, None, batch=2)
    assert model.model.layers[1].forward == inner


# ---- weights ----


def test_a_copy_on_meta_leaves_the_model_untouched_and_keeps_ties():
    model = tiny.build("llama", tie_word_embeddings=True)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    copy = meta_copy(model, torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in copy.parameters())
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert torch.equal(copy.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    after = model.state_dict()
    assert all(after[name].data_ptr() == place and torch.equal(after[name], value)
               for name, (place, value) in before.items())  # fmt: skip


def test_a_copy_on_meta_keeps_the_dtype_of_parameters_that_have_their_own():
    model = tiny.build("llama", torch.bfloat16)
    model.model.norm.float()
    assert meta_copy(model, torch.float16).model.norm.weight.dtype == torch.float32


def test_tied_tensors_stay_tied_and_are_read_once():
    model = tiny.build("llama", tie_word_embeddings=True)
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # as in the files of a tied model
    read = []

    def reader(name):
        read.append(name)
        return tensors.get(name)

    walk = BlockWalk(meta_copy(model, torch.float32), reader)
    for _ in range(2):
        with walk.outside(), walk.outside():
            assert walk.model.lm_head.weight is walk.model.model.embed_tokens.weight
            assert walk.model.lm_head.weight.device.type == "cpu"
        assert walk.model.lm_head.weight is walk.model.model.embed_tokens.weight
        assert walk.model.lm_head.weight.device.type == "meta"
    assert read.count("model.embed_tokens.weight") == 2
    assert torch.equal(walked(walk), expected(model))


def test_a_tensor_the_source_lacks_is_named():
    model = tiny.build("llama")
    tensors = model.state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    walk = BlockWalk(meta_copy(model, torch.float32), tensors.get)
    stream = walk.stream(TOKENS, None, batch=2)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: the source has no such"):
        for index, _, _ in walk:
            walk.advance(index, stream)


def test_a_tensor_of_another_shape_is_named():
    model = tiny.build("llama")
    tensors = model.state_dict() | {"model.norm.weight": torch.ones(65)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: the model needs shape \(64,\), .* has \(65,\)"):
        BlockWalk(meta_copy(model, torch.float32), tensors.get).stream(TOKENS, None, batch=2)


def test_a_stored_buffer_comes_from_the_source_and_a_computed_one_stays():
    module = nn.Module()
    module.register_buffer("stored", torch.zeros(2))
    module.register_buffer("computed", torch.ones(2), persistent=False)
    materialize(module, {"stored": torch.full((2,), 5.0), "computed": torch.full((2,), 7.0)}.get)
    assert module.stored.tolist() == [5, 5] and module.computed.tolist() == [1, 1]


def test_values_that_are_not_numbers_name_the_block():
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = 3e38  # a number still, but its products are not
    with pytest.raises(NumericsError, match=r"^model\.layers\.1: its output holds NaN or Inf"):
        walked(walk_of(model))


def test_a_weight_that_is_no_number_is_named():
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^model\.layers\.1\.mlp\.down_proj\.weight: .* NaN or Inf"):
        walked(walk_of(model))


# ---- reading ahead ----


class Slow:
    """A source that notes which thread reads what."""

    def __init__(self, tensors, broken=""):
        self.tensors, self.broken, self.by = tensors, broken, {}

    def __call__(self, name):
        self.by.setdefault(name, []).append(threading.current_thread())
        if name == self.broken:
            raise CheckpointError(f"{name} cannot be read")
        return self.tensors.get(name)


def ahead_of(model, **about) -> tuple[BlockWalk, Slow]:
    source = Slow(model.state_dict(), **about)
    walk = BlockWalk(meta_copy(model, torch.float32), source)
    walk._read = Ahead(source)  # as on a GPU
    return walk, source


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_blocks_that_are_read_ahead_are_the_same(kind):
    model = tiny.build(kind)
    walk, source = ahead_of(model)
    assert torch.equal(walked(walk), expected(model))
    first, *others = walk.names
    for name, threads in source.by.items():
        if name.startswith(tuple(f"{other}." for other in others)):
            assert threads[0] is not threading.main_thread() and len(threads) == 1, name
        elif name.startswith(f"{first}."):
            assert threads[0] is threading.main_thread()
    assert len(walk.names) > 1


def test_what_cannot_be_read_ahead_fails_at_its_own_block():
    model = tiny.build("llama")
    broken = f"{walk_of(model).names[1]}.mlp.up_proj.weight"
    walk, _ = ahead_of(model, broken=broken)
    seen = []
    with pytest.raises(CheckpointError, match="cannot be read"):
        seen.extend(index for index, _, _ in walk)
    assert seen == [0]


def test_a_loop_that_ends_early_leaves_nothing_for_the_next_one():
    model = tiny.build("llama")
    walk, _ = ahead_of(model)
    next(iter(walk))
    walk._read.announce(["no such tensor", f"{walk.names[0]}.mlp.up_proj.weight"])
    assert torch.equal(walked(walk), expected(model))
