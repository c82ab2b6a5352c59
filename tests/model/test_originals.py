"""What is known of the original beside the quantized model, against dense copies with hooks and sums made by hand."""

import copy
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import tiny
import tiny_configs
from wellrounded.model.blocks import linears
from wellrounded.model.experts import fused_experts, take_apart
from wellrounded.model.inputs import Bank, Paired
from wellrounded.model.originals import HELD_OUT, Twin
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import meta_copy

WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "phi": ["self_attn.dense", "mlp.fc2"],
    "cohere": ["self_attn.o_proj", "mlp.down_proj"],
    "mamba2": ["mixer.out_proj"],
    "mixtral": ["self_attn.o_proj"],
    "gemma2": [],  # what they write is normed first
    "gemma3_text": [],
    "olmo2": [],
}
KINDS = ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "mixtral", "qwen3_moe"]
WINDOWS = 9
SHARE = 0.01  # how well it is known which part of what is written arrives, and with it all that it decides


def dense(kind: str, **changes: Any) -> nn.Module:
    model = tiny_configs.build(kind, **changes) if kind not in tiny.ARCHITECTURES else tiny.build(kind, **changes)
    take_apart(model, fused_experts(model))
    return model


def padding() -> torch.Tensor:
    """Some windows begin with padding, one ends with it."""
    mask = torch.ones(WINDOWS, tiny.LENGTH, dtype=torch.bool)
    mask[0, :7] = mask[3, :3] = mask[7, :9] = mask[1, -2:] = False
    return mask


class Known(NamedTuple):
    """What Paired knew of a set when it was solved."""

    block: int
    names: list[str]
    moments: Any
    held_out: Any


class Seen(NamedTuple):
    """What reaches the layers in a model, hooked: by full name, [windows, length, in]; and what their blocks read."""

    read: dict[str, torch.Tensor]
    wrote: dict[str, torch.Tensor]
    entered: dict[str, torch.Tensor]


def hooked(model: nn.Module, blocks: list[str], ids: torch.Tensor, mask: torch.Tensor | None) -> Seen:
    seen, handles = Seen({}, {}, {}), []

    def called(name):
        def hook(layer, args, output):
            seen.read[name], seen.wrote[name] = args[0], output

        return hook

    def entered(name):
        return lambda block, args, kwargs: seen.entered.update({name: args[0] if args else kwargs["hidden_states"]})

    for name in blocks:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(entered(name), with_kwargs=True))
        handles += [layer.register_forward_hook(called(f"{name}.{n}")) for n, layer in linears(block).items()]
    tiny.logits(model, ids, None if mask is None else mask.long())
    for handle in handles:
        handle.remove()
    return seen


class Walked:
    """A walk through a model whose layers are rounded coarsely as they are solved, its original beside it."""

    def __init__(self, kind: str, how: str = "staged", padded: bool = False, batch: int = 4, tracks: bool = True,
                 weighs: bool = True, **changes: Any) -> None:  # fmt: skip
        self.model, self.ids = dense(kind, **changes), tiny.ids(WINDOWS)
        self.mask = padding() if padded else None
        self.walk = BlockWalk(meta_copy(self.model, torch.float32), self.model.state_dict().get)
        self.original = hooked(self.model, self.walk.names, self.ids, self.mask)
        self.mixed = copy.deepcopy(self.model)  # what is solved so far is coarse, the rest is dense
        self.how, self.tracks, self.weighs = how, tracks, weighs
        self.stream = self.walk.stream(self.ids, self.mask, batch)
        self.stream.original = self.stream.twin()
        self.writers: list[dict[str, float]] = []

    def sets(self):
        """Each set of siblings that is compared, as it stands when it is to be solved."""
        for index, name, block in self.walk:
            names = list(linears(block))
            known = self.walk.siblings(index, self.stream, names)
            self.writers.append(self.walk.writers(index, self.stream, known))
            twin = Twin(copy.deepcopy(block), self.writers[-1], self.weighs, self.tracks)
            for one in getattr(self.walk, self.how)(index, self.stream, names, known, twin):
                if isinstance(one, Paired):
                    for member in one.stacks():
                        yield Known(index, one.names, member[0].moments, member[0].held_out)
                else:
                    assert isinstance(one, Bank)
                self.place(name, block, one.names)
                one.forget()
            self.walk.advance(index, self.stream)
            self.walk.advance(index, self.stream.original, block=twin.block)

    def place(self, name: str, block: nn.Module, names: list[str]) -> None:
        for inside in names:
            layer = block.get_submodule(inside)
            step = layer.weight.abs().max() / 2
            layer.weight = nn.Parameter((layer.weight / step).round() * step, requires_grad=False)
            self.mixed.get_submodule(f"{name}.{inside}").weight.data = layer.weight.data.clone()

    def now(self) -> Seen:
        """What reaches the layers of the model as far as it is quantized."""
        return hooked(self.mixed, self.walk.names, self.ids, self.mask)


def real(walked: Walked, held_out: bool) -> torch.Tensor:
    """bool [windows, length]: the tokens that are no padding, of all windows or of every eighth."""
    some = torch.ones(WINDOWS, tiny.LENGTH, dtype=torch.bool) if walked.mask is None else walked.mask.clone()
    for window in range(WINDOWS if held_out else 0):
        some[window] &= window % HELD_OUT == HELD_OUT - 1
    return some


def close(found: torch.Tensor, expected: torch.Tensor, of: torch.Tensor | None = None, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).norm() <= tolerance * (expected if of is None else of).norm())


# ---- what layers read ----


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", ["staged", "anew"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_compared_with_what_they_read_in_the_dense_model(kind, how, padded):
    """Every token alike: the drift is that of the dense model's own inputs from those of the half-quantized one."""
    walked, drifted = Walked(kind, how, padded, weighs=False, tracks=False), list[bool]()
    for known in walked.sets():
        name = f"{walked.walk.names[known.block]}.{known.names[0]}"
        x, x_q = walked.original.read[name], walked.now().read[name]
        for moments, held_out in ((known.moments, False), (known.held_out, True)):
            rows = real(walked, held_out)
            assert moments.tokens == int(rows.sum())
            second = x_q[rows].T @ x_q[rows]
            assert close(moments.hessian.mirrored(), second), name
            assert close(moments.drift, x[rows].T @ x_q[rows] - second, second), name
            assert moments.residual is None
        drifted.append(bool(known.moments.drift.any()))
    assert not drifted[0] and sum(drifted) >= 5, "before the first set is solved nothing has drifted"


def test_the_original_goes_through_all_blocks_as_the_dense_model_does():
    for how in ("staged", "anew"):
        walked = Walked("llama", how, padded=True)
        for _ in walked.sets():
            pass
        with walked.walk.outside():
            logits = torch.cat([walked.walk.logits(walked.stream.original, batch) for batch in range(3)])
        expected = tiny.logits(walked.model, walked.ids, walked.mask.long())
        torch.testing.assert_close(logits[walked.mask], expected[walked.mask], rtol=1e-3, atol=1e-4)


# ---- what layers write ----


@pytest.mark.parametrize("kind", WRITERS)
def test_writers_are_the_layers_whose_output_joins_the_residual_as_it_is(kind):
    model = dense(kind)
    walk = BlockWalk(meta_copy(model, torch.float32), model.state_dict().get)
    stream = walk.stream(tiny.ids(2), None, batch=2)
    for index, _, block in walk:
        found = walk.writers(index, stream, walk.siblings(index, stream, list(linears(block))))
        assert found == {name: pytest.approx(1.0, abs=0.01) for name in WRITERS[kind]}
        assert not any(layer._forward_hooks for layer in block.modules())
        walk.advance(index, stream)


def test_a_residual_multiplier_is_the_share_that_arrives():
    model = dense("granite", residual_multiplier=0.22)
    walk = BlockWalk(meta_copy(model, torch.float32), model.state_dict().get)
    stream = walk.stream(tiny.ids(2), None, batch=2)
    for index, _, block in walk:
        found = walk.writers(index, stream, walk.siblings(index, stream, list(linears(block))))
        walk.advance(index, stream)
        assert found == {name: pytest.approx(0.22, rel=0.01) for name in WRITERS["llama"]}


class Residual(NamedTuple):
    """The residual by hand, [windows, length, size], before a writer's output joins it, and what joins."""

    before: torch.Tensor
    joins: torch.Tensor


def residual(seen: Seen, block: str, name: str, earlier: list[str], shares: dict[str, float]) -> Residual:
    """What enters the block, with all that layers before this one have written."""
    before = seen.entered[block] + sum(shares[one] * seen.wrote[f"{block}.{one}"] for one in earlier)
    return Residual(before, shares[name] * seen.wrote[f"{block}.{name}"])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", ["staged", "anew"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi", "granite", "mixtral"])
def test_a_writer_knows_how_far_the_residuals_are_apart_and_how_much_each_token_counts(kind, how, padded):
    true = 0.5 if kind == "granite" else 1.0
    walked = Walked(kind, how, padded, **({"residual_multiplier": true} if kind == "granite" else {}))
    written: dict[int, list[str]] = {}
    for known in walked.sets():
        block, name, earlier = walked.walk.names[known.block], known.names[0], written.setdefault(known.block, [])
        if name not in (writers := walked.writers[-1]):
            assert known.moments.residual is None
            continue
        share, now = writers[name], walked.now()
        assert share == pytest.approx(true, rel=SHARE)
        theirs, mine = (residual(seen, block, name, earlier, writers) for seen in (walked.original, now))
        weight = 1 / (theirs.before + theirs.joins).square().mean(-1)
        x, x_q = (seen.read[f"{block}.{name}"] for seen in (walked.original, now))
        for moments, held_out in ((known.moments, False), (known.held_out, True)):
            rows = real(walked, held_out)
            heavy = x_q[rows] * weight[rows].unsqueeze(1)
            assert close(moments.hessian.mirrored(), second := x_q[rows].T @ heavy), name
            assert close(moments.drift, (x - x_q)[rows].T @ heavy, second), name
            apart = (theirs.before - mine.before)[rows].T @ heavy / share
            assert close(moments.residual, apart, apart if apart.any() else heavy), name
            assert apart.any() or not (known.block or earlier), "later ones have something to make up for"
        earlier.append(name)
    assert [sorted(names) for names in written.values()] == [sorted(WRITERS.get(kind, WRITERS["llama"]))] * 3


# ---- however it is done ----


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "qwen3_moe"])
def test_stages_and_single_batches_know_the_same(kind, padded):
    staged, anew, other = (
        [*Walked(kind, how, padded, n).sets()] for how, n in (("staged", 4), ("anew", 4), ("staged", 5))
    )
    assert [known.names for known in staged] == [known.names for known in anew] == [known.names for known in other]
    for mine, theirs, coarser in zip(staged, anew, other):
        for what in ("moments", "held_out"):
            one, two, three = (getattr(known, what) for known in (mine, theirs, coarser))
            assert one.tokens == two.tokens == three.tokens
            assert torch.equal(one.hessian.mirrored(), two.hessian.mirrored()) and torch.equal(one.drift, two.drift)
            assert (one.residual is None) is (two.residual is None) is (three.residual is None)
            assert one.residual is None or torch.equal(one.residual, two.residual)
            assert close(three.hessian.mirrored(), one.hessian.mirrored(), tolerance=SHARE)
            assert close(three.drift, one.drift, one.hessian.mirrored(), SHARE)
            assert one.residual is None or close(three.residual, one.residual, tolerance=SHARE)


def test_layers_that_no_batch_has_been_to_are_known_of_by_name_alone():
    empty = Paired(["last"], 8, torch.device("cpu"))
    (member,) = next(empty.stacks())
    assert member.names == ["last"] and member.hessian is None and member.moments is None


def test_a_batch_that_the_original_took_another_way_counts_as_unchanged():
    paired = Paired(["expert"], 8, torch.device("cpu"), originals={"expert": {0: torch.ones(3, 8)}})
    paired.chosen_on = lambda batch, x: torch.arange(16).expand(2, 16) >= 14
    x = torch.randn(2, 16, 8)
    paired.add(x, None, 0)  # the original sent other tokens there
    paired.add(x, None, 1)  # or none
    (member,) = next(paired.stacks())
    assert member.tokens == 64 and member.held_out.tokens == 8
    assert member.moments.hessian.mirrored().any() and not member.moments.drift.any()


@pytest.mark.parametrize("how", ["staged", "anew"])
def test_the_original_computes_each_output_once_where_batches_wait(how, monkeypatch):
    """What weighs the tokens of a writer is what the twin goes on with."""
    calls, twins, forward, twin_of = Counter(), [], nn.Linear.forward, Twin
    monkeypatch.setitem(globals(), "Twin", lambda block, *about: twins.append(block) or twin_of(block, *about))
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: calls.update([layer]) or forward(layer, x))
    walked = Walked("llama", how)
    for _ in walked.sets():
        pass
    batches = len(walked.stream.ids)
    assert len(twins) == 3 and batches > 1
    for twin, writers in zip(twins, walked.writers):
        seen = [calls[twin.get_submodule(name)] for name in writers]
        assert seen == [batches] * 2 if how == "staged" else all(count > batches for count in seen)
        assert not any("forward" in vars(layer) for layer in twin.modules())


def test_nothing_is_hooked_any_more_when_a_walk_is_left_early():
    walked = Walked("llama")
    sets = walked.sets()
    for _ in range(3):
        next(sets)
    sets.close()
    block = walked.walk.blocks[0]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in block.modules())
