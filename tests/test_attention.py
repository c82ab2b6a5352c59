"""The native core's attention against float64, and in transformers' place: the same text, for every kind of mask."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny
import wellrounded as wr
from wellrounded import native
from wellrounded.hf import attention

pytestmark = pytest.mark.skipif(
    "avx512-bf16" not in native.levels(), reason="the native core multiplies bfloat16 with AVX-512 only"
)
SHAPES = [  # batch, heads, kv heads, queries, keys, depth
    (1, 1, 1, 1, 1, 32), (2, 6, 2, 1, 50, 64), (1, 4, 4, 5, 17, 96), (2, 4, 2, 6, 6, 32), (1, 3, 1, 47, 130, 64),
    (2, 2, 1, 48, 128, 128), (1, 2, 2, 131, 131, 160), (1, 2, 1, 100, 300, 64), (1, 1, 1, 13, 5, 32),
]  # fmt: skip


def inputs(batch, heads, kv_heads, queries, keys, depth, seed=0):
    """As models hand them over: views of [batch, tokens, heads, depth]."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, n, h, depth, generator=random).bfloat16().transpose(1, 2) for n, h in shapes]


def exact(q, k, v, mask, scale, causal):
    """The result in float64, and how far bfloat16 weights and a bfloat16 result may be from it."""
    q, k, v = q.double(), *(t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    seen = seen.tril() if causal else seen
    seen = seen if mask is None else seen & mask
    weights = torch.where(seen, scores, -torch.inf).softmax(-1).nan_to_num(0)
    # bfloat16 rounds by 2^-8 at most: each weight, and the result. Scores in float32 are off by far less.
    return (weights @ v).transpose(1, 2), (weights @ v.abs()).transpose(1, 2) * (2 * 2.0**-8 + 2.0**-14)


@pytest.mark.parametrize("seen", ["all", "causal", "some", "some of one row for all", "causal and some"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_softmax_of_the_scores_times_the_values(shape, seen):
    q, k, v = inputs(*shape)
    batch, _, _, queries, keys, depth = shape
    mask = None
    if "some" in seen:
        wide = (1, 1, 1, keys) if "one row" in seen else (batch, 1, queries, keys)
        mask = torch.rand(wide, generator=torch.Generator().manual_seed(1)) < 0.6
    output = native.attend(q, k, v, mask, depth**-0.5, "causal" in seen)
    expected, off = exact(q, k, v, mask, depth**-0.5, "causal" in seen)
    assert output.shape == (batch, queries, shape[1], depth) and output.is_contiguous()
    assert ((output - expected).abs() <= off).all()


def test_scores_of_any_size_are_stable():
    q, k, v = inputs(1, 2, 1, 20, 40, 64)
    for size in (1e3, 1e-3, 1e15):
        output, (expected, off) = (f(q * size, k, v, None, 1.0, False) for f in (native.attend, exact))
        # Scores of this size are far from exact in float32; then two keys may change places, but never more.
        assert torch.isfinite(output).all() and ((output - expected).abs() <= off).float().mean() > 0.95


@pytest.mark.parametrize("queries", [1, 20])
def test_a_query_that_sees_nothing_gives_zeros_and_no_number_stays_none(queries):
    q, k, v = inputs(1, 2, 1, queries, 40, 64)
    mask = torch.ones(1, 1, queries, 40, dtype=torch.bool)
    mask[0, 0, 0] = False
    output = native.attend(q, k, v, mask, 0.1, False)
    assert (output[:, 0] == 0).all() and (queries == 1 or (output[:, 1:] != 0).all())
    k[0, 0, 3, 5] = torch.nan
    assert torch.isnan(native.attend(q, k, v, None, 0.1, False)).all()


def test_the_number_of_threads_changes_no_bit():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([native.attend(*inputs(1, 6, 3, n, 200, 64), None, 0.1, False) for n in (1, 100)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other))


def test_what_it_is_not_for_is_left_alone():
    q, k, v = inputs(1, 2, 1, 4, 8, 32)
    mask = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    for other in (
        (q.float(), k, v, None), (q[..., :24], k[..., :24], v[..., :24], None), (q, k, v[:, :, :4], None),
        (q[:, :1].expand(1, 3, 4, 32), k.expand(1, 2, 8, 32), v.expand(1, 2, 8, 32), None), (q, k, v, mask.float()),
        (q, k, v, mask[..., :4]), (q, k, v, mask.expand(1, 2, 4, 8)), (q.to("meta"), k, v, None),
    ):  # fmt: skip
        assert native.attend(*other, 0.1, False) is None
    native.library().wr_use(1)
    try:
        assert native.attend(q, k, v, None, 0.1, False) is None
    finally:
        native.library().wr_use(len(native.levels()))
    assert native.attend(q, k, v, mask, 0.1, False) is not None


# ---- in transformers ----


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A llama in bfloat16 whose heads are deep enough."""
    model = tiny.build("llama", torch.bfloat16, num_attention_heads=2, num_key_value_heads=1)
    return tiny.save(model, tmp_path_factory.mktemp("attention") / "llama")


@pytest.fixture
def calls(monkeypatch):
    """How often the native core did it."""
    seen = []

    def counted(*args):
        output = attend(*args)
        seen.append(output is not None)
        return output

    attend = native.attend
    monkeypatch.setattr(native, "attend", counted)
    return seen


@pytest.fixture
def pair(directory):
    """(the model with it, the model with transformers' own)."""
    return wr.load(directory), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


PADDED = torch.ones(3, tiny.LENGTH, dtype=torch.long)
PADDED[0, :9] = PADDED[2, :20] = 0


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_models_compute_the_same_with_it(pair, calls, mask):
    ours, theirs = pair
    assert ours.config._attn_implementation == "wellrounded" and theirs.config._attn_implementation == "sdpa"
    with torch.no_grad():
        mine, other = (model(tiny.ids(3), attention_mask=mask).logits.float() for model in pair)
    kept = torch.ones(3, tiny.LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    assert calls == [True] * 3 and (mine - other)[kept].norm() < 0.02 * other[kept].norm()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_text_is_written_with_it(pair, calls, options):
    wish = {"attention_mask": PADDED, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    kind = {"output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (model.generate(tiny.ids(3), **wish, **kind, **options) for model in pair)
    assert len(calls) >= 6 * 3 and all(calls)
    assert (ours.logits[0] - theirs.logits[0]).abs().max() < 0.05 * theirs.logits[0].abs().max()
    assert ours.sequences.shape == theirs.sequences.shape


def test_gradients_and_what_changes_the_scores_go_the_usual_way(pair, calls):
    ours, theirs = pair
    ours(tiny.ids(2), labels=tiny.ids(2)).loss.backward()
    theirs(tiny.ids(2), labels=tiny.ids(2)).loss.backward()
    assert calls == []
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a.grad, b.grad)
    module, (q, k, v) = nn.Module(), inputs(1, 2, 2, 4, 8, 32)
    bias = torch.randn(1, 2, 4, 8).bfloat16()
    with torch.no_grad():
        mine, other = (
            f(module, q, k, v, None, is_causal=False, position_bias=bias)[0]
            for f in (attention.forward, sdpa_attention_forward)
        )
    assert calls == [] and torch.equal(mine, other)


def test_a_compiled_model_has_it_as_one_node(directory, fresh_dynamo):
    model, nodes = wr.load(directory), []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend=backend)(tiny.ids(2)).logits
        assert torch.equal(found, model(tiny.ids(2)).logits)
    assert nodes.count("wellrounded.attention") == 3


def test_nobody_is_switched_who_asked_for_another_or_compares_names(directory, monkeypatch):
    for options in ({"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}):
        assert wr.load(directory, **options).config._attn_implementation == options["attn_implementation"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    monkeypatch.setattr(attention.inspect, "getsource", lambda module: 'if config._attn_implementation == "sdpa":')
    attention.use(model)
    assert model.config._attn_implementation == "sdpa"
    wr.register()
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="wellrounded")
    assert model.config._attn_implementation == "wellrounded"
