"""Blocks and siblings are found by structure: no architecture is named in the code under test, only here."""

import pytest
import torch
from torch import nn

import tiny
from wellrounded.errors import UsageError
from wellrounded.model.blocks import find_blocks, linears, oriented, shape_of

BLOCKS = {"gpt2": "transformer.h", "bloom": "transformer.h", "falcon": "transformer.h", "opt": "model.decoder.layers",
          "gpt_neox": "gpt_neox.layers", "mamba2": "backbone.layers"}  # fmt: skip

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
    with pytest.raises(UsageError, match=r"Sequential holds no list of blocks: .* block by block, so put"):
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
