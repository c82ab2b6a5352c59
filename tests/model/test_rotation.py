"""A rotation between values and output of attention heads: folded in where it is exact, left out where it is not."""

import copy

import pytest
import torch

import tiny
import tiny_configs
from wellrounded.model.blocks import linears
from wellrounded.model.rotation import orthogonal
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import meta_copy

ROTATED = {
    "llama": ["self_attn.v_proj", "self_attn.o_proj"],
    "qwen2": ["self_attn.v_proj", "self_attn.o_proj"],  # with a bias on the values
    "qwen3": ["self_attn.v_proj", "self_attn.o_proj"],
    "gemma2": ["self_attn.v_proj", "self_attn.o_proj"],
    "opt": ["self_attn.v_proj", "self_attn.out_proj"],
    "mixtral": ["self_attn.v_proj", "self_attn.o_proj"],
    "phi3": [],  # one layer makes queries, keys and values
    "bloom": [],
    "gemma4_text": ["self_attn.v_proj", "self_attn.o_proj"],  # its values are normed, which a rotation does not change
}


def walked(kind, change):
    """Logits of the model when `change(walk, index, stream)` has been done to each block before the stream goes on."""
    model = tiny.build(kind) if kind in tiny.ARCHITECTURES else tiny_configs.build(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    tensors = {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    walk = BlockWalk(meta_copy(copy.deepcopy(model), torch.float32), tensors.get)
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    stream, found = walk.stream(ids, None, 2), []
    for index, _, _ in walk:
        found.append(change(walk, index, stream))
        walk.advance(index, stream)
    return walk.logits(stream, 1), found, walk


def rotate(walk, index, stream):
    return walk.rotate(index, stream, walk.siblings(index, stream, list(linears(walk.blocks[index]))))


@pytest.mark.parametrize("kind", ROTATED)
def test_a_rotation_changes_weights_and_not_what_the_model_says(kind):
    before, _, _ = walked(kind, lambda *about: None)
    after, found, walk = walked(kind, rotate)
    assert all(one == ROTATED[kind] for one in found), found
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert bool(walk.changes) == bool(ROTATED[kind])
    for name in walk.changes:
        old, new = walk._read(name), walk.read(name)
        assert new.norm() == pytest.approx(float(old.norm()), rel=1e-4) and (new - old).norm() > 0.5 * old.norm(), name


@pytest.mark.parametrize("size", [16, 24, 80])
def test_the_matrix_is_orthogonal_and_mixes_all_of_a_head(size):
    matrix = orthogonal(size, seed=3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert (matrix != 0).all() and not torch.equal(matrix, orthogonal(size, seed=4))


def test_a_layer_that_is_not_to_be_quantized_is_not_rotated_either():
    def some(walk, index, stream):
        names = [name for name in linears(walk.blocks[index]) if not name.endswith("v_proj")]
        return walk.rotate(index, stream, walk.siblings(index, stream, names))

    before, _, _ = walked("llama", lambda *about: None)
    after, found, walk = walked("llama", some)
    assert not any(found) and not walk.changes and torch.equal(after, before)
