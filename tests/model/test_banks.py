"""What reaches the experts of a layer: each one's own Hessian, and what is filled in where too few tokens came."""

from functools import partial

import pytest
import torch
from torch import nn

import tiny
import tiny_configs
from wellrounded.core.hessian import Hessian
from wellrounded.model import inputs
from wellrounded.model.blocks import linears
from wellrounded.model.experts import Experts, fused_experts, take_apart
from wellrounded.model.inputs import Bank
from wellrounded.model.siblings import anew, observe, staged
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import meta_copy

FIRST = [f"experts.{e}.{leaf}" for e in range(4) for leaf in ("gate_proj", "up_proj")]
SECOND = [f"experts.{e}.down_proj" for e in range(4)]
NAMES = ["before", *FIRST, *SECOND, "after"]
KNOWN = [["before"], FIRST, SECOND, ["after"]]


class Fused(nn.Module):
    """Four experts as transformers holds them: 8 inputs, 6 in between."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(4, 12, 8)), nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn = nn.SiLU()

    def forward(self, hidden, index, weights):
        raise AssertionError("it is taken apart before it is called; its arguments say how that is done")


class Block(nn.Module):
    """A token's first number says by its whole part which two experts it goes to: this one and the next."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.experts, self.after = nn.Linear(8, 8), Fused(), nn.Linear(8, 8)
        take_apart(self, fused_experts(self))

    def forward(self, x):
        rows = self.before(x).reshape(-1, 8)
        first = x.reshape(-1, 8)[:, 0].long()
        routed = self.experts(rows, torch.stack([first, (first + 1) % 4], 1), torch.full((len(rows), 2), 0.5))
        return self.after(x + routed.reshape(x.shape))


def batches(*ways):
    """One batch [2, 5, 8] for each list of experts that its ten tokens go to."""
    made = torch.randn(len(ways), 10, 8, generator=torch.Generator().manual_seed(1))
    for batch, way in zip(made, ways):
        batch[:, 0] = torch.tensor(way) + 0.5
    return list(made.reshape(-1, 2, 5, 8))


EVERYWHERE = batches([0, 1, 2, 3, 0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 2, 3, 0, 1, 3], [0, 0, 1, 1, 2, 2, 3, 3, 1, 2])
SCARCE = batches([1, 1, 1, 1, 1, 1, 1, 1, 2, 2], [2, 2, 2, 2, 2, 2, 2, 2, 3, 3])
STARVED = batches([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1])  # none for 0 and 3


def runs(block, seen, masks=None):
    return [(partial(block, batch), mask) for batch, mask in zip(seen, masks or [None] * len(seen))]


def read(block, seen, masks=None):
    """By hand: what every expert's first projections read, and what its last one reads, padding left out."""
    first, second = [[] for _ in range(4)], [[] for _ in range(4)]

    def note(experts, args):
        for e in range(4):
            mine = (args[1] == e).any(1) & (real if real is not None else True)
            own = [experts.get_submodule(f"{e}.{leaf}").weight for leaf in ("gate_proj", "up_proj")]
            first[e].append(args[0][mine])
            gate, up = (args[0][mine] @ weight.T for weight in own)
            second[e].append(nn.functional.silu(gate) * up)

    handle = block.experts.register_forward_pre_hook(note)
    for batch, mask in zip(seen, masks or [None] * len(seen)):
        real = None if mask is None else mask.flatten()
        with torch.no_grad():
            block(batch)
    handle.remove()
    return [torch.cat(rows) for rows in first], [torch.cat(rows) for rows in second]


def members_of(sets):
    """All members of every bank among the sets of siblings, in order."""
    return [[member for stack in s.stacks() for member in stack] for s in sets if isinstance(s, Bank)]


def seen_by(how, block, seen, masks=None):
    """Both banks' members, found either way; nothing is quantized."""
    return [members for s in sets_of(how, block, seen, masks) for members in members_of([s])]


def sets_of(how, block, seen, masks=None):
    batches = runs(block, seen, masks)
    if how == "observe":
        return observe(block, NAMES, batches)
    return (staged if how == "staged" else anew)(block, NAMES, KNOWN, batches)


HOW = pytest.mark.parametrize("how", ["observe", "staged", "anew"])


def assert_seen(member, rows):
    assert member.hessian.tokens == member.tokens == len(rows) and not member.filled
    assert torch.allclose(member.hessian.matrix(), rows.T @ rows / len(rows), atol=1e-4)


# ---- each expert's own ----


def test_a_bank_is_one_set_of_all_experts_layers_in_order():
    block = Block()
    sets = observe(block, NAMES, runs(block, EVERYWHERE))
    assert [s.names for s in sets] == KNOWN
    assert [isinstance(s, Bank) for s in sets] == [False, True, True, False]
    assert sets[1].experts == [[f"experts.{e}.gate_proj", f"experts.{e}.up_proj"] for e in range(4)]
    assert [s.names for s in observe(block, NAMES, runs(block, EVERYWHERE), weigh=False)] == KNOWN
    assert [s.names for s in staged(block, NAMES, KNOWN, runs(block, EVERYWHERE))] == KNOWN


@HOW
def test_an_experts_hessian_is_that_of_the_rows_routed_to_it(how):
    block = Block()
    for members, rows in zip(seen_by(how, block, EVERYWHERE), read(block, EVERYWHERE), strict=True):
        assert [len(own) for own in rows] == [14, 15, 16, 15]
        for member, own in zip(members, rows, strict=True):
            assert_seen(member, own)


@HOW
def test_padding_does_not_count(how):
    block, masks = Block(), [torch.ones(2, 5, dtype=torch.bool) for _ in EVERYWHERE]
    masks[0][0, :3] = masks[2][1, 4:] = False
    for members, rows in zip(seen_by(how, block, EVERYWHERE, masks), read(block, EVERYWHERE, masks), strict=True):
        assert sum(len(own) for own in rows) == 2 * (30 - 4)
        for member, own in zip(members, rows, strict=True):
            assert_seen(member, own)


@HOW
def test_an_expert_may_be_met_in_some_batches_only(how):
    """Expert 0 in the second batch, expert 2 in the first: neither batch goes to both."""
    block, seen = Block(), batches([1] * 10, [3] * 10, [1] * 10)
    for members, rows in zip(seen_by(how, block, seen), read(block, seen), strict=True):
        assert [len(own) for own in rows] == [10, 20, 20, 10]
        for member, own in zip(members, rows, strict=True):
            assert_seen(member, own)


def test_a_layer_may_be_left_out_of_every_expert():
    block = Block()
    for left_out, expected in (("down_proj", [["before"], FIRST, ["after"]]), ("gate_proj", None)):
        names = [name for name in NAMES if left_out not in name]
        sets = observe(block, names, runs(block, EVERYWHERE))
        assert [s.names for s in sets] == (expected or [["before"], FIRST[1::2], SECOND, ["after"]])
        for member, own in zip(members_of(sets)[0], read(block, EVERYWHERE)[0]):
            assert_seen(member, own)


def test_nobody_is_told_any_more_once_it_is_over_even_after_an_error():
    block = Block()
    observe(block, NAMES, runs(block, EVERYWHERE))
    assert block.experts.told is None
    wrong = [*EVERYWHERE, torch.randn(2, 5, 7)]
    with pytest.raises(RuntimeError):
        observe(block, NAMES, runs(block, wrong))
    assert block.experts.told is None
    stages = staged(block, NAMES, KNOWN, runs(block, EVERYWHERE))
    assert next(stages).names == ["before"] and next(stages).names == FIRST and block.experts.told is not None
    stages.close()
    assert block.experts.told is None and not any(layer._forward_pre_hooks for layer in block.modules())


# ---- too few tokens ----


@HOW
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("seen", "tokens"), [(SCARCE, [2, 8, 18, 12]), (STARVED, [0, 20, 20, 0])])
def test_what_an_expert_lacks_is_filled_in_with_what_all_of_them_read(how, seen, tokens, padded):
    block, masks = Block(), [torch.ones(2, 5, dtype=torch.bool) for _ in seen]
    masks[0][0, :2] = not padded
    for members, rows in zip(seen_by(how, block, seen, masks), read(block, seen, masks), strict=True):
        everyone, size = torch.cat(rows), rows[0].shape[1]
        assert len(everyone) == sum(tokens) - 4 * padded and (padded or [len(own) for own in rows] == tokens)
        for member, own in zip(members, rows, strict=True):
            if len(own) >= size:
                assert_seen(member, own)
                continue
            missing = size - len(own)
            expected = (own.T @ own + missing * everyone.T @ everyone / len(everyone)) / size
            assert member.filled and member.tokens == len(own)
            assert torch.allclose(member.hessian.matrix(), expected, atol=1e-4)


def test_what_is_filled_in_is_blended_as_the_hessian_defines_it():
    block, hidden = Block(), 8
    first, together = read(block, SCARCE)[0], Hessian(hidden)
    for own in first:
        together.update(own)
    few = Hessian(hidden)
    few.update(first[0])
    expected = few.blended(together, floor=hidden)
    member = seen_by("observe", block, SCARCE)[0][0]
    assert member.hessian.tokens == expected.tokens == hidden and member.tokens == few.tokens == 2
    assert torch.allclose(member.hessian.matrix(), expected.matrix(), atol=1e-5)


def test_where_only_padding_came_nothing_is_known_of_any_expert():
    block, masks = Block(), [torch.zeros(2, 5, dtype=torch.bool)] * 3
    for how in ("observe", "staged", "anew"):
        for members in seen_by(how, block, EVERYWHERE, masks):
            assert [(member.hessian, member.tokens, member.filled) for member in members] == [(None, 0, False)] * 4


# ---- in stages ----


def coarse(layer):
    step = layer.weight.abs().max() / 2
    return nn.Parameter((layer.weight / step).round() * step, requires_grad=False)


def solved(block, members):
    """What members side by side know; their layers are then rounded so coarsely that all that follows must notice."""
    known = []
    for member in members:
        known.append((member.names, member.tokens, member.hessian and member.hessian.matrix()))
        for layer in map(block.get_submodule, member.names):
            layer.weight = coarse(layer)
    return known


def all_solved(block, sets):
    """For every set, and in it for every stack, what its members knew when they were solved."""
    return [[solved(block, members) for members in one.stacks()] for one in sets]


def flat(sets):
    return [known for one in sets for stack in one for known in stack]


def assert_equal(some, others, tolerance=0.0):
    assert len(some) == len(others)
    for (names, tokens, moment), (other_names, other_tokens, other_moment) in zip(some, others):
        assert names == other_names and tokens == other_tokens
        assert torch.allclose(moment, other_moment, atol=tolerance, rtol=0)


def test_the_second_bank_sees_the_error_of_the_first():
    block, again, before = Block(), Block(), Block()
    in_stages = flat(all_solved(block, staged(block, NAMES, KNOWN, runs(block, EVERYWHERE))))
    anew = [flat(all_solved(again, observe(again, names, runs(again, EVERYWHERE)))) for names in KNOWN]
    assert_equal(in_stages, [known for one in anew for known in one])
    untouched = {tuple(m.names): m.hessian.matrix() for ms in seen_by("observe", before, EVERYWHERE) for m in ms}
    for names, _, moment in in_stages:
        if names[0] in SECOND:
            assert not torch.allclose(moment, untouched[tuple(names)], rtol=0.01)


@HOW
@pytest.mark.parametrize("room", [1, 3])
@pytest.mark.parametrize("seen", [EVERYWHERE, SCARCE, STARVED], ids=["everywhere", "scarce", "starved"])
def test_a_stack_holds_as_many_experts_as_there_is_room_for_and_all_see_the_same(how, seen, room, monkeypatch):
    masks = [torch.ones(2, 5, dtype=torch.bool) for _ in seen]
    masks[0][0, :2] = False

    def found():
        block = Block()
        return all_solved(block, sets_of(how, block, seen, masks))

    whole = found()
    assert [[len(stack) for stack in one] for one in whole] == [[1], [4], [4], [1]]
    monkeypatch.setattr(inputs, "STACK_BYTES", room * 6 * 4 * 8**2)  # of the first bank; the second is narrower
    pieces = found()
    sizes = {1: [[1], [1, 1, 1, 1], [1, 1, 1, 1], [1]], 3: [[1], [3, 1], [4], [1]]}
    assert [[len(stack) for stack in one] for one in pieces] == sizes[room]
    assert_equal(flat(whole), flat(pieces), 1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "llama4_text", "jetmoe", "inkling_text", "gpt_oss"])
def test_stages_of_a_model_see_what_observing_anew_before_every_set_sees(kind, padded):
    model = tiny_configs.build(kind)
    take_apart(model, fused_experts(model))
    mask = torch.ones(4, tiny.LENGTH, dtype=torch.bool)
    mask[1, :7] = mask[3, :3] = False
    seen = []
    for how in ("staged", "anew", "observe"):
        walk = BlockWalk(meta_copy(model, torch.bfloat16), model.state_dict().get)
        stream = walk.stream(tiny.ids(4), mask if padded else None, batch=2)
        moments = []
        for index, _, block in walk:
            names = list(linears(block))
            known = walk.siblings(index, stream, names)
            if how == "observe":
                sets = (one for mine in known for one in walk.observe(index, stream, mine))
            else:
                sets = getattr(walk, how)(index, stream, names, known)
            moments += flat(all_solved(block, sets))
            walk.advance(index, stream)  # whoever has not left
        seen.append((moments, torch.cat([stream.hidden(batch) for batch in range(len(stream.ids))])))
    *quicker, (slow, slow_out) = seen
    assert any(isinstance(module, Experts) for module in model.modules())
    for fast, fast_out in quicker:
        assert torch.equal(fast_out, slow_out)
        assert_equal(fast, slow)
