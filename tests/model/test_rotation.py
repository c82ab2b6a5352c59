"""A rotation of the residual stream: folded in where it is exact, refused with the reason where it is not."""

import copy

import pytest
import torch

import tiny
import tiny_configs
from wellrounded.learned import divergence
from wellrounded.model.experts import fused_experts, take_apart
from wellrounded.model.rotation import NotExact, Orthogonal, find
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import changed, meta_copy

IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
ROTATED = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "phi3", "gemma", "olmoe"]
REFUSED = {
    "gemma2": "layers.0: more is done",  # norms behind what writes
    "gemma3_text": "layers.0: more is done",
    "olmo2": "layers.0: more is done",
    "opt": "the embeddings: more is done",  # places are added to them
    "gpt2": "the embeddings: more is done",
    "bloom": "the embeddings: more is done",  # a norm of their own
    "stablelm": "has a bias",
}


def walked(kind, loud=1.0):
    """A walk over a model with other gains than 1, its head untied, and as `loud` a multilayer perceptron."""
    model = tiny.build(kind) if kind in tiny.ARCHITECTURES else tiny_configs.build(kind)
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.3)
        for name, parameter in model.named_parameters():
            if "down_proj" in name:
                parameter.mul_(loud)
    take_apart(model, fused_experts(model))
    tensors = {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    return BlockWalk(meta_copy(model, torch.float32), tensors.get)


def found(walk):
    def enter(walk):
        return walk.stream(IDS, None, 1)

    def apart(one, other, mask):
        return divergence(one, other, mask, False)[:2]

    return find(walk, enter, apart)


def logits(walk):
    stream = walk.stream(IDS, None, 2)
    for index, _, _ in walk:
        walk.advance(index, stream)
    return walk.logits(stream, 0)


@pytest.mark.parametrize("kind", ROTATED)
def test_a_rotation_changes_weights_and_not_what_the_model_says(kind):
    walk = walked(kind)
    rotation = found(walk)
    rotated = BlockWalk(walk.model, changed(walk.read, rotation.changes))
    torch.testing.assert_close(logits(rotated), logits(walk), rtol=1e-3, atol=1e-3)
    assert abs(rotation.kl) < 1e-6
    for name in rotation.changes:
        old, new = walk.read(name), rotated.read(name)
        assert new.shape == old.shape
        assert (new == new.flatten()[0]).all() if "norm" in name else (new - old).norm() > 0.5 * old.norm(), name
    blocks = {name.split(".")[2] for name in rotation.changes if ".layers." in name}
    assert len(blocks) == len(walk.blocks)


def test_what_writes_little_beside_others_is_rotated_too():
    """In the first block of a real model, attention is next to nothing beside what follows it."""
    walk = walked("llama", loud=300.0)
    rotation = found(walk)
    assert {f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "o_proj")} <= rotation.changes.keys()
    rotated = BlockWalk(walk.model, changed(walk.read, rotation.changes))
    torch.testing.assert_close(logits(rotated), logits(walk), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_rotation_would_change_is_refused_with_the_reason(kind):
    with pytest.raises(NotExact, match=REFUSED[kind]):
        found(walked(kind))


def test_a_tied_head_is_refused():
    model = tiny.build("llama", tie_word_embeddings=True)
    tensors = dict(model.named_parameters())
    with pytest.raises(NotExact, match="its embeddings"):
        found(BlockWalk(meta_copy(model, torch.float32), tensors.get))


def test_what_reads_the_stream_without_a_norm_is_noticed():
    walk = walked("llama")
    layer = walk.blocks[1].mlp.down_proj  # bends what it writes
    layer.register_forward_hook(lambda layer, args, output: output.relu())
    with pytest.raises(NotExact):
        found(walk)


@pytest.mark.parametrize("size", [7, 16, 24, 80, 576])
def test_the_matrix_is_orthogonal_and_mixes_everything(size):
    matrix = Orthogonal(size, seed=3)(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    assert (matrix != 0).all() and not torch.equal(matrix, Orthogonal(size, seed=4)(torch.eye(size)))
    rows = torch.randn(3, 5, size)
    torch.testing.assert_close(Orthogonal(size, seed=3)(rows), rows @ matrix, rtol=1e-4, atol=1e-5)
