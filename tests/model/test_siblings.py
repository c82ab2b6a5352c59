"""Which layers share an input, and what reaches them: once without touching the block, once stage by stage."""

from functools import partial

import pytest
import torch
from torch import nn

import tiny
from wellrounded.model.blocks import linears
from wellrounded.model.siblings import observe, staged
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import meta_copy

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj"]
SEQUENTIAL = [QKV, ["self_attn.o_proj"], GATED, ["mlp.down_proj"]]
SIBLINGS = {
    "llama": SEQUENTIAL,
    "qwen3": SEQUENTIAL,
    "gemma2": SEQUENTIAL,
    "gemma3_text": SEQUENTIAL,
    "cohere": [QKV + GATED, ["self_attn.o_proj"], ["mlp.down_proj"]],  # attention and MLP read the same tensor
    "phi": [[*QKV, "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "opt": [QKV, ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    "mamba2": [["mixer.in_proj"], ["mixer.out_proj"]],
}


class Mlp(nn.Module):
    """Two siblings, one that follows them, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, x):
        return self.down(self.gate(x) * self.up(x))


def runs(block, batches, masks=None):
    return [(partial(block, batch), mask) for batch, mask in zip(batches, masks or [None] * len(batches))]


def batches(count=3):
    return list(torch.randn(count, 2, 5, 8, generator=torch.Generator().manual_seed(0)))


# ---- observing ----


@pytest.mark.parametrize("kind", SIBLINGS)
def test_siblings_are_the_layers_that_read_the_same_tensor(kind):
    model = tiny.build(kind)
    walk = BlockWalk(meta_copy(model, torch.float32), model.state_dict().get)
    stream = walk.stream(tiny.ids(4), None, batch=2)
    for index, _, block in walk:
        assert [s.names for s in walk.observe(index, stream, list(linears(block)))] == SIBLINGS[kind]
        walk.advance(index, stream)


def test_falcon_feeds_attention_and_mlp_the_same_tensor():
    model = tiny.build("falcon")
    walk = BlockWalk(meta_copy(model, torch.float32), model.state_dict().get)
    stream = walk.stream(tiny.ids(4), None, batch=2)
    visits = iter(walk)
    _, _, block = next(visits)
    sets = walk.observe(0, stream, list(linears(block)))
    assert [s.names for s in sets] == [
        ["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], ["mlp.dense_4h_to_h"],
    ]  # fmt: skip


def test_equal_inputs_at_different_addresses_make_no_siblings():
    class Copies(Mlp):
        def forward(self, x):
            return self.down(self.gate(x) * self.up(x.clone()))

    block = Copies()
    sets = observe(block, ["gate", "up"], runs(block, batches()))
    assert [s.names for s in sets] == [["gate"], ["up"]]


def test_a_layer_that_is_never_called_does_not_appear():
    block = Mlp()
    sets = observe(block, ["gate", "up", "down", "idle"], runs(block, batches()))
    assert [s.names for s in sets] == [["gate", "up"], ["down"]]


def test_siblings_share_the_second_moment_of_all_batches():
    block, seen = Mlp(), batches()
    sets = observe(block, ["gate", "up", "down"], runs(block, seen))
    rows = torch.stack(seen).reshape(-1, 8)
    assert sets[0].hessian.tokens == sets[1].hessian.tokens == len(rows)
    assert torch.allclose(sets[0].hessian.matrix(), rows.T @ rows / len(rows), atol=1e-5)


def test_padding_does_not_count():
    block, seen = Mlp(), batches(2)
    masks = [torch.ones(2, 5, dtype=torch.bool), torch.tensor([[True] * 5, [False, False, True, True, True]])]
    sets = observe(block, ["gate", "down"], runs(block, seen, masks))
    rows = torch.cat([batch[mask] for batch, mask in zip(seen, masks)])
    assert [s.hessian.tokens for s in sets] == [18, 18]
    assert torch.allclose(sets[0].hessian.matrix(), rows.T @ rows / 18, atol=1e-5)


def test_a_layer_called_first_in_a_later_batch_still_counts_only_what_it_read():
    class Sparse(Mlp):
        def forward(self, x):
            return self.up(x) if x.mean() > 0 else self.gate(x)

    block = Sparse()
    positive, negative = torch.rand(2, 5, 8), -torch.rand(2, 5, 8)
    sets = observe(block, ["gate", "up"], runs(block, [positive, negative, negative]))
    assert [(s.names, s.hessian.tokens) for s in sets] == [(["gate"], 20), (["up"], 10)]


def test_no_hook_and_no_input_is_kept_even_after_an_error():
    block = Mlp()
    seen = batches(1)
    with pytest.raises(RuntimeError):
        observe(block, ["gate", "up"], runs(block, [*seen, torch.randn(2, 5, 7)]))
    assert not any(layer._forward_pre_hooks for layer in block.modules())
    sets = observe(block, ["gate", "up"], runs(block, seen))
    assert sets[0]._input is None


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.shared(self.shared(x)))


def test_a_layer_that_is_called_twice_is_seen_both_times():
    block = Twice()
    shared, last = observe(block, ["shared", "last"], runs(block, batches()))
    assert (shared.hessian.tokens, last.hessian.tokens) == (60, 30)


# ---- in stages ----


def coarse(layer):
    """A layer's weight rounded so coarsely that whatever follows must notice."""
    step = layer.weight.abs().max() / 2
    return nn.Parameter((layer.weight / step).round() * step, requires_grad=False)


def place(block, names):
    for name in names:
        layer = block.get_submodule(name)
        layer.weight = coarse(layer)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", SIBLINGS)
def test_stages_see_what_observing_anew_before_every_set_sees(kind, padded):
    """The slow twin runs the block once for every set; all must agree in every bit, and in what leaves the block."""
    model = tiny.build(kind)
    mask = torch.ones(5, tiny.LENGTH, dtype=torch.bool)
    mask[1, :7] = mask[4, :3] = False
    seen = []
    for how in ("staged", "anew", "observe"):
        walk = BlockWalk(meta_copy(model, torch.bfloat16), model.state_dict().get)
        stream = walk.stream(tiny.ids(5), mask if padded else None, batch=2)
        moments = []
        for index, _, block in walk:
            names = list(linears(block))
            known = walk.siblings(index, stream, names)
            assert known == SIBLINGS[kind]
            if how == "observe":
                sets = (walk.observe(index, stream, mine)[0] for mine in known)
            else:
                sets = getattr(walk, how)(index, stream, names, known)
            for siblings in sets:
                moments.append((siblings.names, siblings.hessian.tokens, siblings.hessian.matrix()))
                place(block, siblings.names)
            walk.advance(index, stream)  # whoever has not left
        seen.append((moments, torch.cat([stream.hidden(batch) for batch in range(len(stream.ids))])))
    *quicker, (slow, slow_out) = seen
    for fast, fast_out in quicker:
        assert torch.equal(fast_out, slow_out) and not fast_out.requires_grad
        assert len(fast) == len(slow) == len(walk.blocks) * len(SIBLINGS[kind])
        for (names, tokens, moment), (slow_names, slow_tokens, slow_moment) in zip(fast, slow):
            assert names == slow_names and tokens == slow_tokens and torch.equal(moment, slow_moment)


class Routed(nn.Module):
    """Every batch goes through the experts that its first number names, in order, and through the last layer."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        for expert in range(4):
            if int(x.flatten()[0]) >> expert & 1:
                x = torch.cat([x.flatten()[:1], self.experts[expert](x).flatten()[1:]]).reshape(x.shape)
        return self.last(x)


@pytest.mark.parametrize("known", [[], [["experts.1"], ["experts.2"], ["last"]], [["last"]]])
def test_batches_that_take_different_ways_are_all_counted(known):
    """Experts 1; 0 and 2; 2; 0 and 1: of expert 3 nobody hears, expert 0 may be unknown until a batch arrives there."""
    block, seen = Routed(), batches(4)
    for batch, way in zip(seen, (0b0010, 0b0101, 0b0100, 0b0011)):
        batch.view(-1)[0] = way
    names = list(linears(block))
    met = {s.names[0]: s.hessian.tokens for s in staged(block, names, known, runs(block, seen))}
    assert met == {"experts.0": 20, "experts.1": 20, "experts.2": 20, "last": 40}


def test_what_a_later_batch_reaches_first_is_placed_where_it_is_called():
    block, seen = Routed(), batches(3)
    for batch, way in zip(seen, (0b0010, 0b0101, 0b1001)):
        batch.view(-1)[0] = way
    sets = observe(block, list(linears(block)), runs(block, seen))
    assert [s.names for s in sets] == [["experts.0"], ["experts.1"], ["experts.2"], ["experts.3"], ["last"]]
    assert [s.hessian.tokens for s in sets] == [20, 10, 10, 10, 30]


def test_the_first_input_of_a_layer_that_is_called_twice_counts():
    block = Twice()
    sets = list(staged(block, ["shared", "last"], [["shared"], ["last"]], runs(block, batches())))
    assert [(s.names, s.hessian.tokens) for s in sets] == [(["shared"], 30), (["last"], 30)]


def test_an_error_or_an_end_in_between_leaves_no_hook_and_no_walker():
    block, ended = Mlp(), []

    def forward(x):
        try:
            return block(x)
        finally:
            ended.append(torch.is_grad_enabled())

    known = [["gate", "up"], ["down"]]
    stages = staged(block, ["gate", "up", "down"], known, runs(forward, batches()))
    assert next(stages).names == ["gate", "up"] and ended == [] and torch.is_grad_enabled()
    stages.close()
    assert len(ended) == 3 and not any(layer._forward_pre_hooks for layer in block.modules())
    wrong = [*batches(), torch.randn(2, 5, 7)]
    with pytest.raises(RuntimeError, match="shapes"):
        list(staged(block, ["up", "down"], known, runs(forward, wrong)))
    assert len(ended) == 7 and not any(layer._forward_pre_hooks for layer in block.modules())
    assert torch.is_grad_enabled()
