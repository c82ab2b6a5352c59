"""Blocks and siblings are found by structure: no architecture is named in the code under test, only here."""

import pytest
import torch
from torch import nn

import tiny
from wellrounded.errors import UsageError
from wellrounded.model.blocks import find_blocks, linears, observe, oriented, shape_of
from wellrounded.model.walk import BlockWalk, meta_copy

BLOCKS = {"gpt2": "transformer.h", "bloom": "transformer.h", "falcon": "transformer.h", "opt": "model.decoder.layers",
          "gpt_neox": "gpt_neox.layers", "mamba2": "backbone.layers"}  # fmt: skip

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


def run_on(block, batches, masks=None):
    def run():
        for i, batch in enumerate(batches):
            yield None if masks is None else masks[i]
            block(batch)

    return run


def batches(count=3):
    return list(torch.randn(count, 2, 5, 8, generator=torch.Generator().manual_seed(0)))


# ---- blocks ----


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_the_blocks_of_an_architecture_are_found(kind):
    model = tiny.build(kind)
    home = BLOCKS.get(kind, "model.layers")
    assert find_blocks(model) == [f"{home}.{i}" for i in range(model.config.num_hidden_layers)]


def test_a_list_inside_a_block_is_not_mistaken_for_the_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))

    model = nn.ModuleDict({"adapters": nn.ModuleList([nn.Linear(4, 4)]), "layers": nn.ModuleList([Block(), Block()])})
    assert find_blocks(model) == ["layers.0", "layers.1"]


def test_a_model_without_a_list_of_blocks_is_refused():
    with pytest.raises(UsageError, match=r"Sequential holds no list of blocks; .* block by block"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


# ---- layers ----


def test_a_transposed_layer_is_seen_as_outputs_by_inputs():
    block = tiny.build("gpt2").transformer.h[0]
    layer = linears(block)["mlp.c_fc"]
    assert tuple(layer.weight.shape) == (64, 256) and shape_of(layer) == (256, 64)
    assert torch.equal(oriented(layer, oriented(layer, layer.weight)), layer.weight)
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), nn.functional.linear(x, oriented(layer, layer.weight), layer.bias), atol=1e-6)


def test_a_linear_that_computes_something_else_is_left_alone():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    assert list(linears(nn.ModuleDict({"router": Router(8, 4), "up": nn.Linear(8, 4)}))) == ["up"]


# ---- siblings ----


@pytest.mark.parametrize("kind", SIBLINGS)
def test_siblings_are_the_layers_that_read_the_same_tensor(kind):
    model = tiny.build(kind)
    walk = BlockWalk(meta_copy(model, torch.float32), model.state_dict().get)
    stream = walk.stream(tiny.ids(4), None, batch=2)
    for index, _, block in walk:
        assert [s.names for s in walk.observe(index, stream, list(linears(block)))] == SIBLINGS[kind]
        walk.advance(index, stream)


def test_a_linear_class_of_a_models_own_is_recognized_by_what_it_computes():
    class Spelled(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Needy(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.gain

    assert list(linears(torch.nn.ModuleList([Spelled(8, 8), Scaled(8, 8), Needy(8, 8), torch.nn.Linear(8, 8)]))) == [
        "0", "3",
    ]  # fmt: skip


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
    sets = observe(block, ["gate", "up"], run_on(block, batches()))
    assert [s.names for s in sets] == [["gate"], ["up"]]


def test_a_layer_that_is_never_called_does_not_appear():
    block = Mlp()
    sets = observe(block, ["gate", "up", "down", "idle"], run_on(block, batches()))
    assert [s.names for s in sets] == [["gate", "up"], ["down"]]


def test_siblings_share_the_second_moment_of_all_batches():
    block, seen = Mlp(), batches()
    sets = observe(block, ["gate", "up", "down"], run_on(block, seen))
    rows = torch.stack(seen).reshape(-1, 8)
    assert sets[0].hessian.tokens == sets[1].hessian.tokens == len(rows)
    assert torch.allclose(sets[0].hessian.matrix(), rows.T @ rows / len(rows), atol=1e-5)


def test_padding_does_not_count():
    block, seen = Mlp(), batches(2)
    masks = [torch.ones(2, 5, dtype=torch.bool), torch.tensor([[True] * 5, [False, False, True, True, True]])]
    sets = observe(block, ["gate", "down"], run_on(block, seen, masks))
    rows = torch.cat([batch[mask] for batch, mask in zip(seen, masks)])
    assert [s.hessian.tokens for s in sets] == [18, 18]
    assert torch.allclose(sets[0].hessian.matrix(), rows.T @ rows / 18, atol=1e-5)


def test_a_layer_called_first_in_a_later_batch_still_counts_only_what_it_read():
    class Sparse(Mlp):
        def forward(self, x):
            return self.up(x) if x.mean() > 0 else self.gate(x)

    block = Sparse()
    positive, negative = torch.rand(2, 5, 8), -torch.rand(2, 5, 8)
    sets = observe(block, ["gate", "up"], run_on(block, [positive, negative, negative]))
    assert [(s.names, s.hessian.tokens) for s in sets] == [(["up"], 10), (["gate"], 20)]


def test_no_hook_and_no_input_is_kept_even_after_an_error():
    block = Mlp()
    seen = batches(1)
    with pytest.raises(RuntimeError):
        observe(block, ["gate", "up"], run_on(block, [*seen, torch.randn(2, 5, 7)]))
    assert not any(layer._forward_pre_hooks for layer in block.modules())
    sets = observe(block, ["gate", "up"], run_on(block, seen))
    assert sets[0]._input is None
