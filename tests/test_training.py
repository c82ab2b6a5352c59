"""Training: codes stay, KL falls, slopes are autograd's, and what comes back is the best of what will be stored."""

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import tiny
import tiny_configs
from wellrounded.core import rtn
from wellrounded.core.fidelity import Fidelity
from wellrounded.core.scheme import Scheme
from wellrounded.core.weight import QuantizedWeight
from wellrounded.errors import CheckpointError, NumericsError, UsageError
from wellrounded.hf.source import open_source
from wellrounded.learned import Gain, Moments, Scales, divergence, is_norm, shared_modules
from wellrounded.model.blocks import linears, oriented
from wellrounded.model.experts import Experts, fused_experts, take_apart
from wellrounded.model.stream import SpillFile
from wellrounded.model.walk import BlockWalk
from wellrounded.model.weights import meta_copy
from wellrounded.student import Student
from wellrounded.training import Training, _picked, _windows, train

SHORT = Training(steps=6, windows_per_step=4, every=2, scale_rate=1e-2, norm_rate=1e-3)
SCHEME = Scheme(3, 32)


def padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -10:] = mask[2, :7] = False
    return mask


class Pupil:
    """A tiny model, its plainly rounded twin on a walk, and what the dense one's last block returns."""

    def __init__(self, kind="llama", dtype=torch.float32, scheme=SCHEME, padded=False, spill=None) -> None:
        self.model = tiny_configs.build(kind).to(dtype)
        take_apart(self.model, fused_experts(self.model))
        self.walk = BlockWalk(meta_copy(self.model, dtype), self.model.state_dict().get)
        self.owners = shared_modules(self.walk.model)
        self.quantized = {}
        for name, block in zip(self.walk.names, self.walk.blocks):
            for layer in (f"{name}.{inside}" for inside in linears(block)):
                if layer not in self.owners:
                    module = self.model.get_submodule(layer)
                    self.quantized[layer] = rtn.solve(oriented(module, module.weight), None, scheme)
        self.ids, self.held_ids = tiny.ids(10), tiny.ids(4, seed=7)
        self.mask = padding(self.ids) if padded else None
        self.teacher = self.walked(self.ids, self.mask, spill)
        self.held = self.walked(self.held_ids, None, spill)

    def walked(self, ids, mask, spill):
        stream = self.walk.stream(ids, mask, 3, (), spill)
        for index, _, _ in self.walk:
            self.walk.advance(index, stream)
        return stream

    def student(self) -> Student:
        return Student(self.walk, self.quantized, self.owners)

    def train(self, settings=SHORT, path=None, tell=lambda *seen: None):
        return train(self.student(), self.teacher, self.held, settings, path, tell)

    def learned(self) -> tuple[Student, float]:
        """A student after one look at all windows, and their mean KL."""
        student = self.student()
        with self.walk.outside():
            student.begin(self.teacher)
            return student, student.learn(*_picked(student, self.teacher, _windows(self.teacher)))

    def logits(self, parameters=None, ids=None, mask=None) -> torch.Tensor:
        """What the model says with other parameters, with a graph: the slow twin of every walk."""
        inputs = {"input_ids": ids, "attention_mask": None if mask is None else mask.long(), "use_cache": False}
        return functional_call(self.model, parameters or {}, kwargs=inputs).logits

    def divergence(self, trained) -> float:
        """Mean KL of the held-out windows with what would be stored, in the model itself."""
        new = {f"{name}.weight": self.placed(name, weight.dequantize()) for name, weight in trained.weights.items()}
        new |= {name: gain.to(self.model.dtype) for name, gain in trained.dense.items()}
        with torch.no_grad():
            p, q = self.logits(ids=self.held_ids), self.logits(new, self.held_ids)
        return divergence(p, q, None, False)[0] / self.held_ids.numel()

    def placed(self, name, dense) -> torch.Tensor:
        return oriented(self.model.get_submodule(name), dense.to(self.model.dtype))


def plain_slopes(pupil: Pupil, student: Student) -> tuple[dict[str, torch.Tensor], float]:
    """Autograd through the whole model at once, its weights a plain formula of what is learned."""
    values = {name: learned.value.clone().requires_grad_() for name, learned in student.learned.items()}
    new: dict[str, torch.Tensor] = {name: values[name] for name in student.gains}
    for name, scales in student.scales.items():
        weight, group = scales.weight, scales.weight.group_index.long()
        steps = weight.codes.float() - weight.zeros.float()[:, group]
        new[f"{name}.weight"] = pupil.placed(name, steps * (weight.scales.float() * values[name].exp())[:, group])
    with torch.no_grad():
        p = F.log_softmax(pupil.logits(ids=pupil.ids, mask=pupil.mask), -1)
    q = F.log_softmax(pupil.logits(new, pupil.ids, pupil.mask), -1)
    kl = (p.exp() * (p - q)).sum(-1)
    kl = kl.flatten() if pupil.mask is None else kl[pupil.mask]
    kl.sum().backward()
    none = {name: torch.zeros_like(value) for name, value in values.items()}  # experts that nothing was routed to
    return {name: none[name] if v.grad is None else v.grad for name, v in values.items()}, kl.mean().item()


# ---- slopes ----

KINDS = ["llama", "gemma2", "gpt2", "qwen3_moe", "mamba2", "zamba2", "gemma3n_text"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_every_slope_is_what_autograd_finds_in_the_whole_model(kind, padded):
    pupil = Pupil(kind, padded=padded)
    student, kl = pupil.learned()
    expected, mean = plain_slopes(pupil, student)
    assert kl == pytest.approx(mean, rel=1e-4)
    for name, learned in student.learned.items():
        apart = (learned.slope - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert apart < 1e-3, name
    assert student.tokens == (pupil.ids.numel() if pupil.mask is None else int(pupil.mask.sum()))


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(2, 24), Scheme(8, -1, symmetric=False), Scheme(3, 32, False)])
@pytest.mark.parametrize("ordered", [False, True])
def test_scales_learn_from_any_grid_what_autograd_finds(scheme, ordered, monkeypatch):
    monkeypatch.setattr("wellrounded.learned.PIECE", 300)  # three rows at a time
    weight = rtn.solve(torch.randn(16, 96 if not ordered else 80), None, scheme)
    if ordered:
        index = weight.group_index[torch.randperm(80)]
        weight = QuantizedWeight(weight.codes, weight.scales, weight.zeros, index, scheme)
    scales = Scales(weight, torch.device("cpu"))
    scales.value.normal_(0, 0.1)
    slope, value = torch.randn(weight.shape), scales.value.clone().requires_grad_()
    group = weight.group_index.long()
    dense = (weight.codes.float() - weight.zeros.float()[:, group]) * (weight.scales.float() * value.exp())[:, group]
    dense.backward(slope)
    scales.learn(slope)
    scales.learn(slope)
    torch.testing.assert_close(scales.slope, 2 * value.grad, rtol=1e-4, atol=1e-3)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(scales.dense(dtype), scales.quantized(scales.stored()).dequantize(dtype))


def test_a_scale_keeps_its_sign_and_never_becomes_zero_or_infinite():
    weight = rtn.solve(torch.randn(4, 32), None, Scheme(4, 8))
    start = torch.tensor([[1e-7, -1e-7, 6e4, -6e4]] * 4).half()
    start[3, 3] = 0
    scales = Scales(QuantizedWeight(weight.codes, start, weight.zeros, weight.group_index, weight.scheme), "cpu")
    for value in (-9.0, 9.0):
        scales.value.fill_(value)
        stored = scales.stored()
        assert torch.equal(stored.sign(), start.sign()) and bool(stored.isfinite().all())
    scales.value.zero_()
    assert torch.equal(scales.stored(), start)


def test_a_step_is_that_of_adamw():
    gain, twin = Gain(torch.randn(9), "cpu"), None
    twin = torch.nn.Parameter(gain.value.clone())
    moments, adam = Moments.of(gain), torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    for number in range(1, 6):
        slope = torch.randn(9)
        gain.learn(slope)
        twin.grad = slope / 7
        moments.step(gain, 0.01, number, tokens=7)
        adam.step()
    torch.testing.assert_close(gain.value, twin.data)
    assert not gain.slope.any()


def test_divergence_is_that_of_the_report_and_padding_does_not_count():
    p, q, ids = torch.randn(2, 40, 50), torch.randn(2, 40, 50).requires_grad_(), torch.randint(0, 50, (2, 40))
    p[..., 3] = float("-inf")
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 30:] = False
    report = Fidelity(causal=False)
    report.update(p, q.detach(), ids, mask)
    total, tokens, slope = divergence(p, q.detach(), mask, True)
    assert tokens == 70 and total / 70 == pytest.approx(report.to_dict()["kl_mean"], rel=1e-5)
    F.kl_div(F.log_softmax(q, -1)[mask], F.softmax(p, -1)[mask], reduction="sum").backward()
    torch.testing.assert_close(slope, q.grad, rtol=1e-4, atol=1e-6)


# ---- training ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_training_brings_the_model_closer_and_says_how_close_what_is_stored_is(kind):
    pupil = Pupil(kind, torch.bfloat16)
    trained = pupil.train(Training(steps=24, windows_per_step=5, every=4, scale_rate=1e-2, norm_rate=1e-3))
    start, best = trained.history[0].held_out, min(row.held_out for row in trained.history if row.held_out is not None)
    assert trained.improved and best < start * (0.99 if kind == "qwen3_moe" else 0.9)  # few windows reach an expert
    assert pupil.divergence(trained) == pytest.approx(best, rel=0.02)
    for name, weight in pupil.quantized.items():
        new = trained.weights[name]
        assert torch.equal(new.codes, weight.codes) and torch.equal(new.zeros, weight.zeros)
        assert new.scales.dtype == torch.float16 and torch.equal(new.scales.sign(), weight.scales.sign())
    norms = {n for n, m in pupil.model.named_modules() if is_norm(m)}
    assert {name.rpartition(".")[0] for name in trained.dense} == norms
    assert all(gain.dtype == torch.bfloat16 for gain in trained.dense.values())


def test_what_the_house_has_quantized_comes_closer_to_its_original(llama, tmp_path):
    """The whole of it: a finished checkpoint, its source opened again, and windows walked through the dense blocks."""
    tiny.quantize(llama, tmp_path / "out", bits=3, group_size=32, calibration="none")
    source = open_source(llama, None)
    walk = BlockWalk(source.model, source.read)
    student = Student(walk, tiny.stored_weights(tmp_path / "out"), shared_modules(walk.model))
    teacher, held = walk.stream(tiny.ids(), None, 8), walk.stream(tiny.ids(6, seed=7), None, 2)
    for index, _, _ in walk:
        walk.advance(index, teacher, held)
    trained = train(student, teacher, held, Training(steps=20, every=5, scale_rate=2e-2, norm_rate=5e-3))

    original = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    before, after = (tiny.twin(original, tmp_path / "out") for _ in range(2))
    for name, weight in trained.weights.items():
        after.get_submodule(name).weight.data = weight.dequantize(torch.bfloat16)
    for name, gain in trained.dense.items():
        after.get_parameter(name).data = gain
    p, q, r = (tiny.logits(model, tiny.ids(6, seed=7)) for model in (original, before, after))
    assert divergence(p, r, None, False)[0] < 0.9 * divergence(p, q, None, False)[0]


def test_experts_learn_too_but_not_those_that_nothing_is_routed_to():
    pupil = Pupil("qwen3_moe")
    student, _ = pupil.learned()
    experts = {name for name, module in pupil.model.named_modules() if isinstance(module, Experts)}
    slopes = {n: bool(s.slope.any()) for n, s in student.scales.items() if any(n.startswith(e) for e in experts)}
    assert slopes and any(slopes.values())


def test_modules_that_share_a_weight_learn_together():
    pupil = Pupil("zamba2")
    assert any(owner in pupil.quantized for owner in pupil.owners.values())
    trained = pupil.train()
    for name, owner in pupil.owners.items():
        if owner in pupil.quantized:
            assert trained.weights[name] is trained.weights[owner]
        assert not any(full.startswith(f"{name}.") for full in trained.dense)


def test_what_made_nothing_better_gives_back_what_it_was_given():
    pupil = Pupil()
    trained = pupil.train(Training(steps=4, every=1, scale_rate=3.0, norm_rate=3.0))
    assert not trained.improved and trained.best_step == 0 and trained.dense == {}
    assert all(trained.weights[name] is weight for name, weight in pupil.quantized.items())


def test_without_held_out_text_the_last_step_counts():
    pupil = Pupil()
    trained = train(pupil.student(), pupil.teacher, None, SHORT)
    assert trained.best_step == SHORT.steps and all(row.held_out is None for row in trained.history)


def test_the_teacher_may_lie_on_disk_and_the_model_is_empty_again_afterwards(tmp_path):
    one, other = Pupil(padded=True), Pupil(padded=True, spill=SpillFile(tmp_path))
    assert same(one.train(), other.train())
    assert all(p.device.type == "meta" for p in one.walk.model.parameters())


# ---- the same again ----


def same(one, other) -> bool:
    assert one.history == other.history and one.best_step == other.best_step
    assert one.weights.keys() == other.weights.keys() and one.dense.keys() == other.dense.keys()
    scales = (torch.equal(w.scales, other.weights[name].scales) for name, w in one.weights.items())
    return all(scales) and all(torch.equal(gain, other.dense[name]) for name, gain in one.dense.items())


def test_a_seed_decides_everything():
    pupil = Pupil()
    assert same(pupil.train(), pupil.train())
    other = pupil.train(Training(**{**vars(SHORT), "seed": 1}))
    assert other.history[1] != pupil.train().history[1]


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(stop, tmp_path):
    pupil, path, seen = Pupil(dtype=torch.bfloat16), tmp_path / "training.safetensors", []
    whole = pupil.train()

    def tell(step, total, kl, held_out):
        seen.append(step)
        if step == stop and seen.count(step) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pupil.train(SHORT, path, tell)
    assert same(pupil.train(SHORT, path, tell), whole)
    assert len(seen) < SHORT.steps + 1 + SHORT.every + 1, "finished steps are not taken again"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert same(pupil.train(SHORT, path, tell), whole), "a finished run only gives its result"


def test_the_state_of_another_run_is_refused(tmp_path):
    pupil, path = Pupil(), tmp_path / "training.safetensors"
    pupil.train(SHORT, path)
    with pytest.raises(CheckpointError, match="another training run"):
        pupil.train(Training(**{**vars(SHORT), "seed": 1}), path)


def test_a_model_whose_hidden_states_are_not_window_by_window_is_refused():
    with pytest.raises(UsageError, match="hidden states of 3 windows are"):
        Pupil("xlnet").train()


def test_settings_and_numbers_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        Training(steps=0)
    with pytest.raises(NumericsError):
        Pupil().train(Training(steps=4, every=9, scale_rate=1e6, norm_rate=1e6))


def test_rates_rise_for_four_steps_and_fall_to_zero():
    shares = [Training(steps=32).share(step) for step in range(33)]
    assert shares[0] == 0.25 and shares[3] == max(shares) and shares[32] == pytest.approx(0)
    assert shares[3:] == sorted(shares[3:], reverse=True)
