"""One run in several processes: it gives what one process gives. How one ends that fails: test_team_ends.py.

A sum of products in another order has other last bits, a code that was about to fall either way falls the other
way, and those after it make up for it: so do other batches in a single process, by as much (measured here).
"""

import json
import os
from typing import NamedTuple

import pytest
import torch
from torch import nn

import tiny
import wellrounded as wr
from teams import quantize, run, together, use
from tiny import ids, stored_weights
from wellrounded.core.hessian import Hessian
from wellrounded.model.walk import BlockWalk
from wellrounded.prediction import Room
from wellrounded.request import Request
from wellrounded.team import Team, merged
from wellrounded.torchrun import joined

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ROOM = Room(256)


def report_of(processes):
    assert [one.error for one in processes] == [""] * len(processes)
    return processes[0].result


def assert_same(out, one, report, alone, mean=0.95, db=0.3):
    """`out` and `report` are what a single process made, `one` and `alone`, but for a sum in another order."""
    stored, expected = tiny.tensors(out), tiny.tensors(one)
    assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    for name in ("config.json", "quantize_config.json"):
        assert (out / name).read_bytes() == (one / name).read_bytes()
    mine, theirs = stored_weights(out), stored_weights(one)
    equal = [float((mine[name].codes == theirs[name].codes).float().mean()) for name in mine]
    assert sum(equal) / len(equal) >= mean
    for name in mine:
        there = theirs[name].dequantize()
        assert (mine[name].dequantize() - there).norm() < 0.15 * there.norm(), name
    dense = [name for name in stored if name.rpartition(".")[0] not in mine]
    assert dense and all(torch.equal(stored[name], expected[name]) for name in dense)
    assert [layer.name for layer in report.layers] == [layer.name for layer in alone.layers]
    for layer, other in zip(report.layers, alone.layers):
        assert abs(layer.tokens - other.tokens) <= 0.02 * other.tokens + 2, "routers see other last bits too"
        assert (layer.error_db is None) == (other.error_db is None) and layer.scheme == other.scheme
        assert layer.error_db is None or abs(layer.error_db - other.error_db) < db
    assert (report.fidelity is None) == (alone.fidelity is None)
    if alone.fidelity is not None:
        assert report.fidelity["tokens"] == alone.fidelity["tokens"]
        assert report.fidelity["kl_mean"] == pytest.approx(alone.fidelity["kl_mean"], rel=0.1)


# ---- the result ----


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def dense(home):
    """A directory by what it is called, made once."""

    def make(kind):
        if not (home / kind).exists():
            layers = {"num_hidden_layers": int(kind[-1])} if kind[-1].isdigit() else {}
            tiny.save(tiny.build(kind.rstrip("0123456789"), torch.bfloat16, **layers), home / kind)
        return home / kind

    return make


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Listed(nn.Module):
    """Experts in a list, the best two of six, and a layer behind them."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 6, bias=False), nn.ModuleList(Expert() for _ in range(6))
        self.last = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        rows = x.reshape(-1, 64)
        weights, index = self.gate(rows).softmax(-1).topk(2)
        result = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            if len(token):
                result.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return self.last(result).reshape(x.shape)


def listing():
    model = tiny.build("llama", num_hidden_layers=2)
    torch.manual_seed(1)
    for block in model.model.layers:
        block.mlp = Listed()
        for parameter in block.mlp.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model.to(torch.bfloat16)


def alternating(words=(10, 50), rows=80):
    """Windows of one word each: in turn another one, so that two processes read different ones."""
    return torch.tensor(words).repeat(rows // len(words))[:, None].expand(-1, tiny.LENGTH).contiguous()


def test_a_single_block_has_the_codes_that_one_process_finds(dense, home):
    """What is left is the order of the sums: 99.9% of the codes were equal when this was written."""
    alone = quantize(dense("llama1"), home / "one")
    for size in (2, 3):
        report = report_of(run(dense("llama1"), home / f"{size}", size))
        assert_same(home / f"{size}", home / "one", report, alone, mean=0.99, db=0.05)
        assert {layer.tokens for layer in report.layers} == {64 * tiny.LENGTH}


CASES = {
    "llama": ("llama", {}, ROOM),
    "float32": ("float32", {}, ROOM),
    "act_order": ("llama", {"act_order": True, "sym": False, "bits": 3}, ROOM),
    "head": ("llama", {"lm_head": True}, ROOM),
    "anew": ("llama", {}, Room(256, waits=False)),
    "spilled": ("llama", {}, Room(256, spills=True)),
    "experts": ("qwen3_moe", {}, ROOM),
    "experts anew": ("qwen3_moe", {}, Room(256, waits=False, spills=True)),
    "without data": ("qwen3_moe", {"calibration": "none"}, ROOM),
    "one window held out": ("llama", {"calibration": ids(65)}, ROOM),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_what_one_makes(case, dense, home, tmp_path, monkeypatch):
    kind, options, room = CASES[case]
    model = dense("llama") if kind == "float32" else dense(kind)
    if kind == "float32":
        model = tiny.build("llama")
    monkeypatch.setattr(Request, "_room", lambda self, run, work: (room, 0, ""))
    alone = quantize(model, tmp_path / "one", **options)
    processes = run(model, tmp_path / "out", **options)
    assert_same(tmp_path / "out", tmp_path / "one", report_of(processes), alone)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "one.log", "out", "out.log"}
    assert (tmp_path / "out.log").read_text().count("quantize(") == 1, "the others write nothing"
    loaded = wr.load(tmp_path / "out", kernel="reference")
    assert torch.isfinite(tiny.logits(loaded)).all()


def test_another_batch_size_changes_as_much_as_another_process(dense, tmp_path, monkeypatch):
    """The tolerance is that of the sums, not one of ours: to the same last bits, to the same codes."""

    def differing(name):
        mine, one = stored_weights(tmp_path / name), stored_weights(tmp_path / "one")
        return sum(float((mine[n].codes != one[n].codes).float().mean()) for n in one) / len(one)

    for name, batch in (("one", 64), ("seven", 7)):
        monkeypatch.setattr(Request, "_room", lambda self, run, work, b=batch: (Room(b * tiny.LENGTH), 0, ""))
        quantize(dense("llama"), tmp_path / name)
    report_of(run(dense("llama"), tmp_path / "two"))
    assert differing("two") < 2 * differing("seven") + 0.01 < 0.1


def test_windows_that_are_padded_count_their_real_tokens(dense, tmp_path):
    texts = [" ".join(f"word{i * j}" for j in range(3 + i % 9)) for i in range(120)]
    options = {"calibration": [tiny.TEXT * 2, *texts], "samples": 40}
    alone = quantize(dense("llama"), tmp_path / "one", **options)
    report = report_of(run(dense("llama"), tmp_path / "out", 3, **options))
    assert_same(tmp_path / "out", tmp_path / "one", report, alone)
    assert [layer.tokens for layer in report.layers] == [layer.tokens for layer in alone.layers]


# ---- experts ----


def test_an_expert_that_one_process_alone_reaches_is_solved_by_what_it_has_read(dense, tmp_path):
    """Each process reads one word, and few experts know it; what few tokens reached is filled in."""
    options = {"calibration": alternating(), "samples": 64}
    seen = tmp_path / "seen"

    def spy(rank):
        count = Hessian.update

        def update(self, x, mask=None):
            count(self, x, mask)
            with seen.open("a") as file:
                file.write(f"{rank} {self.size} {len(x.reshape(-1, self.size))}\n")

        Hessian.update = update

    alone = quantize(dense("qwen3_moe1"), tmp_path / "one", **options)
    report = report_of(run(dense("qwen3_moe1"), tmp_path / "out", before=spy, **options))
    tokens = {layer.name: layer.tokens for layer in report.layers if "experts" in layer.name}
    assert tokens == {layer.name: layer.tokens for layer in alone.layers if "experts" in layer.name}
    assert 0 in tokens.values() and 32 * tiny.LENGTH in tokens.values(), "reached by nobody, and by one process alone"
    assert {line.split()[0] for line in seen.read_text().splitlines()} == {"0", "1"}
    filled = {layer.name: layer.fallback for layer in report.layers}
    assert filled == {layer.name: layer.fallback for layer in alone.layers}
    assert any(why and "the rest from all experts" in why for why in filled.values())
    assert set(tiny.tensors(tmp_path / "out")) == set(tiny.tensors(tmp_path / "one"))
    assert all(layer.error_db < layer.rtn_error_db for layer in report.layers)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_reach_different_layers_solve_all_of_them(waits, size, tmp_path, monkeypatch):
    monkeypatch.setattr(Request, "_room", lambda self, run, work: (Room(64, waits=waits), 0, ""))
    words = torch.tensor([5, 35, 71][:size]).repeat_interleave(90 // size)  # experts 0 and 4, 4 and 5, 1 and 3
    options = {"calibration": words[:, None].expand(-1, tiny.LENGTH).contiguous(), "samples": 64}
    found = tmp_path / "found"
    found.mkdir()

    def spy(rank):
        find = BlockWalk.all_siblings

        def all_siblings(self, index, stream, names):
            sets = find(self, index, stream, names)
            (found / f"{index}-{rank}").write_text(json.dumps(sets))
            return sets

        def in_a_row(self, windows):
            first, last = (len(windows) * number // self.size for number in (self.rank, self.rank + 1))
            return windows[first:last]

        BlockWalk.all_siblings, Team.some = all_siblings, in_a_row

    model = listing()
    alone = quantize(model, tmp_path / "one", **options)
    report = report_of(run(model, tmp_path / "out", size, before=spy, **options))
    reached = [json.loads((found / f"0-{rank}").read_text()) for rank in range(size)]
    assert len({frozenset(name for one in sets for name in one) for sets in reached}) > 1, "all reached the same"
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert tokens.keys() == {layer.name for layer in alone.layers} and report.kept == alone.kept
    for block in range(2):
        of = {leaf: [tokens[n] for n in tokens if f".{block}.mlp" in n and n.endswith(leaf)] for leaf in ("up", "last")}
        assert sum(of["up"]) == 2 * 64 * tiny.LENGTH and of["last"] == [64 * tiny.LENGTH]
    assert report.fidelity["kl_mean"] < 2 * alone.fidelity["kl_mean"]


@pytest.mark.parametrize("blind", [{0}, {1}, {0, 1}])
def test_a_layer_that_only_quantized_ones_lead_to_does_not_part_the_processes(blind, tmp_path):
    """Tokens go another way once earlier layers are quantized: here processes have not heard of experts at all."""

    def before(rank):
        find = BlockWalk.all_siblings

        def all_siblings(self, index, stream, names):
            sets = find(self, index, stream, names)
            return [one for one in sets if rank not in blind or not {"1", "3"} & {*one[0].split(".")}]

        BlockWalk.all_siblings = all_siblings
        use(Room(64))  # single windows, which take many ways

    report = report_of(run(listing(), tmp_path / "out", before=before))
    assert {layer.name for layer in report.layers} == set(stored_weights(tmp_path / "out"))
    assert len(report.layers) == 2 * (4 + 2 * 6 + 1) and len({layer.name for layer in report.layers}) == 34


class Set(NamedTuple):
    names: list[str]
    mine: bool = True


STEPS = {
    "the same": ("a b c", "a b c", "a b c"),
    "one reaches less": ("a b c d", "a d", "a b c d"),
    "each another": ("a b d", "a c d", "a b c d"),
    "nothing": ("", "a b", "a b"),
    "too late": ("a b c", "b a c", "a b c"),
    "unknown": ("a x b", "a b", "a x b"),
    "unknown to both": ("a x b", "a b x", "a x b"),
}


@pytest.mark.parametrize("case", STEPS)
def test_sets_come_in_step(case):
    *ways, expected = (text.split() for text in STEPS[case])

    def work(rank):
        with joined() as (team, _):
            sets = (Set([name]) for name in ways[rank])
            known = [["a"], ["b"], ["c"], ["d"]]
            return [(one.names[0], one.mine) for one in team.in_step(sets, known, lambda names: Set(names, False))]

    for rank, process in enumerate(together(work)):
        assert process.error == "" and [name for name, _ in process.result] == expected
        assert {name for name, mine in process.result if mine} <= set(ways[rank])


def test_sets_found_by_several_are_put_in_an_order_that_suits_all():
    one, other = [["q", "k"], ["up0"], ["down0"], ["last"]], [["q", "k"], ["up1"], ["down1"], ["up0"], ["last"]]
    assert merged([one, one]) == one
    assert (
        merged([one, other]) == [["q", "k"], ["up1"], ["down1"], ["up0"], ["down0"], ["last"]]
        or merged([one, other]).index(["last"]) == 5
    )
    assert merged([[["a"]], [["a", "b"], ["c"]]]) == [["a"], ["b"], ["c"]]
