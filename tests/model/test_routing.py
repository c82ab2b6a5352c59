"""Every token gets what its experts make of it, wherever it is routed, and who asks is told who reads what."""

import pytest
import torch
from torch import nn

from fused import KINDS, apart, met, output
from wellrounded.model.blocks import linears

# ---- who is routed where ----


def by_hand(fused, hidden, index, weights):
    """Token by token, slot by slot; an index that no expert has adds nothing."""
    result = torch.zeros_like(hidden)
    for token, slot in torch.cartesian_prod(torch.arange(len(index)), torch.arange(index.shape[1])).tolist():
        if (e := int(index[token, slot])) < 4:
            gate, up = (fused.gate_up_proj[e] @ hidden[token]).chunk(2)
            inner = nn.functional.silu(gate) * up
            result[token] += weights[token, slot] * (fused.down_proj[e] @ inner)
    return result.detach()


@pytest.mark.parametrize(
    "index",
    [
        pytest.param([[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]], id="everyone"),
        pytest.param([[2, 0], [0, 2], [2, 0], [2, 0], [0, 2]], id="some experts, and no token to the others"),
        pytest.param([[3, 4], [3, 4], [3, 4], [3, 4], [3, 4]], id="one expert, and one that is elsewhere"),
        pytest.param([[4, 0], [4, 4], [1, 4], [4, 2], [0, 1]], id="some that are elsewhere"),
        pytest.param([[4, 4]] * 5, id="nobody here"),
        pytest.param(torch.empty(0, 2, dtype=torch.int64), id="no tokens"),
        pytest.param([[0, 1, 2, 3]] * 5, id="all experts for every token"),
        pytest.param([[1, 1], [0, 0], [2, 1], [0, 0], [3, 3]], id="one expert twice for a token"),
    ],
)
def test_each_token_gets_what_its_experts_here_make_of_it(index):
    index = torch.as_tensor(index)
    fused, _ = met("mixtral")[0]
    hidden, weights = torch.randn(len(index), 64), torch.rand(index.shape)
    for banks in (None, [0], [1]):
        result = output(apart(fused, banks), (hidden, index, weights))
        assert torch.allclose(result, by_hand(fused, hidden, index, weights), atol=1e-5)


def test_an_expert_that_does_nothing_gives_back_what_it_gets():
    fused, _ = met("longcat_flash")[0]
    hidden, weights = torch.randn(3, 64), torch.rand(3, 2)
    result = output(apart(fused), (hidden, torch.tensor([[4, 7], [5, 4], [6, 5]]), weights))
    assert torch.allclose(result, hidden * weights.sum(1, keepdim=True))


class Normed(nn.Module):
    """Mixtral's experts with a norm behind each, as some models have."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn, self.post_expert_norm, self.has_post_expert_norm = nn.ReLU(), nn.RMSNorm(8), True

    def forward(self, hidden, index, weights):
        one = [self.post_expert_norm(self.act_fn(hidden @ u.T) @ d.T) for u, d in zip(self.up_proj, self.down_proj)]
        picked = torch.stack(one, 1)[torch.arange(len(hidden))[:, None], index]
        return (picked * weights[..., None]).sum(1)


def test_a_norm_behind_each_expert_is_kept():
    torch.manual_seed(0)
    fused, index = Normed(), torch.tensor([[0, 2], [2, 3], [3, 0]])
    arguments = torch.randn(3, 8), index, torch.rand(3, 2)
    assert torch.allclose(output(apart(fused), arguments), output(fused, arguments), atol=1e-5)


# ---- being told ----


def told_and_read(experts, arguments):
    """What happens in order, ("bank", number, Routed) or ("layer", name, input), while the experts are called."""
    events = []
    experts.told = lambda bank, routed: events.append(("bank", bank, routed))
    for name, layer in linears(experts).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: events.append(("layer", name, args[0])))
    output(experts, arguments)
    return events


@pytest.mark.parametrize("kind", KINDS)
def test_who_asks_is_told_of_every_bank_before_its_layers_run(kind):
    for fused, arguments in met(kind):
        experts = apart(fused)
        events = told_and_read(experts, arguments)
        expected = []
        for bank, routed in [event[1:] for event in events if event[0] == "bank"]:
            expected.append(("bank", bank))
            for e, names in enumerate(experts.names(bank)):
                assert len(routed.rows(e)) == routed.counts[e]
                read = {name: x for what, name, x in events if what == "layer" and name in names}
                assert all(torch.equal(x, routed.rows(e)) for x in read.values())
                expected += [("layer", name) for name in names if routed.counts[e]]
        assert [event[:2] for event in events] == expected, "one expert after another, those without tokens left out"
        assert [number for what, number in expected if what == "bank"] == list(range(len(experts.layout.banks)))


@pytest.mark.parametrize("kind", KINDS)
def test_who_asks_is_told_which_tokens_each_expert_reads(kind):
    for fused, arguments in met(kind):
        experts = apart(fused)
        hidden, call = arguments[0], experts.layout.call
        rows = hidden.reshape(experts.count if call == "all" else 1, -1, hidden.shape[-1])
        for routed in [event[2] for event in told_and_read(experts, arguments) if event[0] == "bank"]:
            assert routed.total == rows.shape[1]
            if call == "sorted":  # by the model, which keeps to itself in what way
                assert routed.counts == list(arguments[1]) and routed.tokens is None
                continue
            for e in range(experts.count):
                tokens = routed.tokens(e)
                if call == "routed":
                    assert tokens.tolist() == (arguments[1] == e).any(-1).nonzero().flatten().tolist()
                elif call == "shared":
                    assert tokens.tolist() == list(range(routed.total))
                else:
                    assert tokens.tolist() == rows[e].any(-1).nonzero().flatten().tolist()
                assert routed.counts[e] == len(tokens)
        first = next(event[2] for event in told_and_read(experts, arguments) if event[0] == "bank")
        for e in range(experts.count if first.tokens else 0):
            assert torch.equal(first.rows(e), rows[e if call == "all" else 0][first.tokens(e)])
