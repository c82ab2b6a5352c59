"""Perplexity, KL and agreement against sums in float64 over one position at a time."""

import math

import pytest
import torch

from wellrounded.core import fidelity as module
from wellrounded.core.fidelity import Fidelity, Perplexity

VOCABULARY = 50

# A float32 log-softmax over V entries is off by a few half-units of its largest intermediate, about 2^-24 * V at worst
# if the sum is sequential; numbers of a size around 5 nats are then right to 2^-24 * V * 5 = 1.5e-5 nats.
NATS = 2.0**-24 * VOCABULARY * 5


def windows(seed: int = 0, count: int = 3, length: int = 40, size: float = 2.0):
    """(logits [count, length, vocabulary], ids [count, length])."""
    random = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(count, length, VOCABULARY, generator=random)
    return logits, torch.randint(VOCABULARY, (count, length), generator=random)


def padding(count: int = 3, length: int = 40) -> torch.Tensor:
    """True for real tokens: whole, padded left, padded right."""
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[1, :11] = False
    mask[2, 25:] = False
    return mask


def predictions(logits, ids, mask=None):
    """(float64 log-probabilities, next id) of every real token that follows a real token."""
    for n in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            if mask is None or (mask[n, t] and mask[n, t + 1]):
                row = logits[n, t].double()
                yield row - row.exp().sum().log(), int(ids[n, t + 1])


def perplexity(logits, ids, mask=None) -> float:
    nats = [-row[following].item() for row, following in predictions(logits, ids, mask)]
    return math.exp(sum(nats) / len(nats))


def divergences(logits, other, ids, mask=None) -> list[float]:
    pairs = zip(predictions(logits, ids, mask), predictions(other, ids, mask))
    return [(p.exp() * (p - q)).sum().item() for (p, _), (q, _) in pairs]


def compared(logits, other, ids, mask=None) -> dict:
    fidelity = Fidelity()
    fidelity.update(logits, other, ids, mask)
    return fidelity.to_dict()


# Perplexity


@pytest.mark.parametrize("mask", [None, padding()], ids=["whole", "padded"])
def test_perplexity_is_the_exponential_of_the_mean_loss(mask):
    logits, ids = windows()
    measured = Perplexity()
    measured.update(logits, ids, mask)
    assert measured.value == pytest.approx(perplexity(logits, ids, mask), rel=NATS)
    assert measured.tokens == (3 * 39 if mask is None else 39 + 28 + 24)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    _, ids = windows()
    measured = Perplexity()
    measured.update(torch.zeros(3, 40, VOCABULARY), ids)
    assert measured.value == pytest.approx(VOCABULARY, rel=NATS)


def test_a_model_that_knows_everything_is_not_perplexed():
    _, ids = windows()
    logits = torch.zeros(3, 40, VOCABULARY)
    logits[:, :-1].scatter_(2, ids[:, 1:, None], 1000.0)
    measured = Perplexity()
    measured.update(logits, ids)
    assert measured.value == 1.0


def test_updates_add_up():
    logits, ids = windows()
    at_once, in_parts = Perplexity(), Perplexity()
    at_once.update(logits, ids)
    for n in range(3):
        in_parts.update(logits[n : n + 1], ids[n : n + 1])
    assert (in_parts.nll, in_parts.tokens) == (at_once.nll, at_once.tokens)


def test_the_last_logits_predict_nothing():
    logits, ids = windows()
    other = logits.clone()
    other[:, -1] = torch.nan
    measured, expected = Perplexity(), Perplexity()
    measured.update(other, ids)
    expected.update(logits, ids)
    assert measured.value == expected.value


def test_what_lies_at_padding_does_not_matter():
    logits, ids = windows()
    mask = padding()
    expected = compared(logits, logits + 0.1 * windows(1)[0], ids, mask)
    hidden = logits.clone()
    hidden[~mask] = torch.nan
    ids = torch.where(mask, ids, 0)
    assert compared(hidden, hidden + 0.1 * windows(1)[0], ids, mask) == expected


def test_without_tokens_there_is_no_perplexity():
    assert math.isnan(Perplexity().value)
    numbers = Fidelity().to_dict()
    assert numbers["tokens"] == 0 and math.isnan(numbers["kl_mean"]) and math.isnan(numbers["perplexity"])


def test_a_hopeless_model_has_a_finite_perplexity():
    """A thousand nats per token would overflow a float64."""
    assert math.isfinite(Perplexity(nll=1000.0, tokens=1).value)


# Fidelity


def test_the_same_logits_agree_and_do_not_diverge():
    logits, ids = windows()
    numbers = compared(logits, logits.clone(), ids)
    assert numbers["kl_mean"] == numbers["kl_median"] == numbers["kl_p99"] == 0
    assert numbers["top1_agreement"] == 1 and numbers["tokens"] == 3 * 39
    assert numbers["perplexity"] == numbers["original_perplexity"]


@pytest.mark.parametrize("mask", [None, padding()], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_agreement_are_what_they_are_one_by_one(mask, dtype):
    logits, ids = windows()
    original, quantized = logits.to(dtype), (logits + 0.5 * windows(1)[0]).to(dtype)
    numbers = compared(original, quantized, ids, mask)
    kl = torch.tensor(divergences(original, quantized, ids, mask), dtype=torch.float64)
    assert numbers["kl_mean"] == pytest.approx(kl.mean().item(), abs=NATS)
    assert numbers["kl_median"] == pytest.approx(kl.median().item(), abs=NATS)
    assert numbers["kl_p99"] == pytest.approx(kl.quantile(0.99).item(), abs=NATS)
    assert numbers["original_perplexity"] == pytest.approx(perplexity(original, ids, mask), rel=NATS)
    assert numbers["perplexity"] == pytest.approx(perplexity(quantized, ids, mask), rel=NATS)
    pairs = list(zip(predictions(original, ids, mask), predictions(quantized, ids, mask)))
    agreeing = sum(p.argmax() == q.argmax() for (p, _), (q, _) in pairs).item()
    assert numbers["top1_agreement"] == agreeing / len(pairs)
    assert 0 < agreeing < len(pairs) == numbers["tokens"]


def test_divergence_is_from_the_original_to_the_quantized_model():
    sure, unsure = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    sure[..., 0] = 3.0
    ids = torch.zeros(1, 2, dtype=torch.int64)
    there, back = (compared(*pair, ids)["kl_mean"] for pair in ((sure, unsure), (unsure, sure)))
    p = math.exp(3) / (math.exp(3) + 3)
    assert there == pytest.approx(p * math.log(4 * p) + (1 - p) * math.log(4 * (1 - p) / 3), abs=NATS)
    assert abs(there - back) > 0.1


@pytest.mark.parametrize("other", [-torch.inf, 0.0])
def test_tokens_that_the_original_rules_out_cost_nothing(other):
    """Logits of -inf: 0 log 0 is 0."""
    logits, ids = windows()
    ids = ids.clamp_min(1)
    original, quantized = logits.clone(), 1.1 * logits
    original[..., 0], quantized[..., 0] = -torch.inf, other
    numbers = compared(original, quantized, ids)
    one, two = original[..., 1:], quantized[..., 1:]
    exact = torch.tensor(divergences(one, two, ids - 1), dtype=torch.float64)
    if other == 0.0:  # the mass that the quantized model wastes on the token lowers all its other probabilities
        lost = torch.logsumexp(quantized[:, :-1].double(), -1) - torch.logsumexp(two[:, :-1].double(), -1)
        exact = exact + lost.flatten()
    assert numbers["kl_mean"] == pytest.approx(exact.mean().item(), abs=NATS)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_how_many_positions_are_taken_at_a_time_does_not_matter(monkeypatch, rows):
    logits, ids = windows()
    quantized = logits + 0.5 * windows(1)[0]
    expected = compared(logits, quantized, ids, padding())
    monkeypatch.setattr(module, "ROWS", rows)
    numbers = compared(logits, quantized, ids, padding())
    exact = {"kl_mean", "kl_median", "kl_p99", "top1_agreement", "tokens"}
    assert {key: numbers[key] for key in exact} == {key: expected[key] for key in exact}
    for key in numbers.keys() - exact:  # losses are summed in float32, 91 of them
        assert numbers[key] == pytest.approx(expected[key], rel=91 * 2.0**-24 * 5)
