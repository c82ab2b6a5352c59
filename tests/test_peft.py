"""Adapters on packed layers, by PEFT and transformers as they are: they train, save, reload, and merge into nothing."""

import re
import weakref
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tiny
import wellrounded as wr
from wellrounded.errors import UsageError
from wellrounded.nn import QuantLinear

TOKENS = tiny.ids(4, length=24, seed=11)
ALL = "all-linear"
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = partial(LoraConfig, r=4, target_modules=ALL)

# A configuration, and the learning rate at which a few steps show.
TUNERS = {
    "LoRA": (LORA, 1e-2),
    "DoRA": (partial(LORA, use_dora=True), 1e-2),
    "AdaLora": (
        partial(peft.AdaLoraConfig, init_r=6, target_r=2, tinit=1, tfinal=1, total_step=10, target_modules=ALL),
        5e-2,
    ),
    "IA3": (partial(peft.IA3Config, target_modules=NAMES, feedforward_modules=["down_proj"]), 5e-2),
    "OFT": (partial(peft.OFTConfig, oft_block_size=8, target_modules=ALL), 1e-2),
    "VeRA": (partial(peft.VeraConfig, r=24, target_modules=ALL), 5e-2),
}
MERGING = {
    **{name: make for name, (make, _) in TUNERS.items()},
    "DeLoRA": partial(peft.DeloraConfig, r=4, target_modules=ALL),
    "HiRA": partial(peft.HiraConfig, r=4, target_modules=ALL),
    "LoHa": partial(peft.LoHaConfig, r=4, target_modules=ALL),
    "PEANuT": partial(peft.PeanutConfig, target_modules=ALL),
}


def adapted(model, config, seed: int = 0):
    """`model` with an adapter, the same one for the same seed."""
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def shaken(model, seed: int = 0):
    """The same adapter with random numbers in it, so that it has an effect."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def loss(model, tokens=TOKENS) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def train(model, rate: float = 1e-2, steps: int = 8) -> list[float]:
    """The losses on the way."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        value = loss(model.train())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    model.eval()
    return losses


def packed(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def buffers(model) -> list[torch.Tensor]:
    return [tensor.clone() for layer in packed(model).values() for tensor in layer.tensors().values()]


def same(some, others) -> bool:
    return len(some) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(some, others))


@pytest.fixture
def twin(llama, quantized):
    """The dense model, in float32, with the weights that `quantized` stands for."""
    return tiny.twin(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), quantized)


# ---- one adapter ----


@pytest.mark.parametrize("tuner", TUNERS)
def test_an_adapter_sits_on_every_packed_layer_and_nowhere_else(quantized, tuner):
    model = adapted(wr.load(quantized), TUNERS[tuner][0]())
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    assert len(wrapped) == 21 and packed(model).keys() == {f"{name}.base_layer" for name in wrapped}
    assert type(model.get_submodule("base_model.model.lm_head")) is nn.Linear


@pytest.mark.parametrize("tuner", TUNERS)
def test_it_learns_what_it_would_learn_on_the_dense_weights(quantized, twin, tuner):
    make, rate = TUNERS[tuner]
    model = adapted(wr.load(quantized, dtype=torch.float32), make())
    before = buffers(model)
    losses = train(model, rate)
    assert losses[-1] < losses[0] - 0.4
    assert losses == pytest.approx(train(adapted(twin, make()), rate), abs=1e-3)
    assert same(buffers(model), before)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_saved_adapter_holds_nothing_else_and_comes_back_exactly(quantized, tmp_path, tuner):
    """AdaLora in float32 only: on any bfloat16 model PEFT trains its rank along and does not store it."""
    make, rate = TUNERS[tuner]
    load = partial(wr.load, quantized, dtype=torch.float32 if tuner == "AdaLora" else torch.bfloat16)
    model = adapted(load(), make())
    train(model, rate, steps=2)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) >= 21 and all(re.search(r"\.(lora|ia3|oft|vera)_", name) for name in stored)
    again = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert not torch.equal(tiny.logits(again), tiny.logits(load()))


def test_gpt2_takes_one_as_well_and_learns_as_its_own_layers_do(tmp_path):
    """Its layers were Conv1D, with weights the other way round."""
    dense = tiny.build("gpt2")
    tiny.quantize(tiny.save(dense, tmp_path / "gpt2"), tmp_path / "out")
    model = adapted(wr.load(tmp_path / "out", kernel="reference"), LORA())
    assert len(packed(model)) == 12 and all(name.endswith(".base_layer") for name in packed(model))
    losses = train(model)
    assert losses[-1] < losses[0] - 0.4
    assert losses == pytest.approx(train(adapted(tiny.twin(dense, tmp_path / "out"), LORA())), abs=1e-3)


# ---- several adapters, and none ----


def test_adapters_are_switched_and_switched_off(quantized, tmp_path):
    base = tiny.logits(wr.load(quantized))
    model = shaken(adapted(wr.load(quantized), LORA()))
    model.save_pretrained(tmp_path)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj", "v_proj"], init_lora_weights=False))
    model.load_adapter(tmp_path, "loaded")
    logits = {}
    for name in ("default", "other", "loaded"):
        model.set_adapter(name)
        logits[name] = tiny.logits(model.eval())
    assert torch.equal(logits["default"], logits["loaded"])
    assert not torch.equal(logits["default"], logits["other"]) and not torch.equal(logits["other"], base)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), logits["loaded"])


@pytest.mark.parametrize("tuner", MERGING)
def test_taken_off_it_leaves_the_model_that_was_there(quantized, tuner):
    model = shaken(adapted(wr.load(quantized), MERGING[tuner]())).unload()
    assert not any(hasattr(module, "base_layer") for module in model.modules())
    assert len(packed(model)) == 21 and torch.equal(tiny.logits(model), tiny.logits(wr.load(quantized)))


def test_transformers_own_adapters_work(quantized, tmp_path):
    model = wr.load(quantized)
    base = tiny.logits(model)
    model.add_adapter(LORA(), "mine")
    losses = train(model)
    assert losses[-1] < losses[0] - 0.4
    logits = tiny.logits(model)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))
    model.disable_adapters()
    assert torch.equal(tiny.logits(model), base)
    other = wr.load(quantized)
    other.load_adapter(str(tmp_path))
    assert torch.equal(tiny.logits(other), logits)
    other.delete_adapter("default")
    assert torch.equal(tiny.logits(other), base)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits)  # finds the base itself


# ---- training ----


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("tuner", ["LoRA", "DoRA"])
def test_gradient_checkpointing_changes_no_gradient(quantized, tuner, prepared, reentrant):
    def gradients(checkpointing):
        base, options, calls = wr.load(quantized), {"use_reentrant": reentrant}, []
        before = buffers(base)
        if checkpointing and prepared:
            base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=options)
        elif checkpointing:
            base.gradient_checkpointing_enable(options)
            base.enable_input_require_grads()
        base.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
        model = shaken(adapted(base, TUNERS[tuner][0]()))
        loss(model.train()).backward()
        assert len(calls) == (2 if checkpointing else 1) and same(buffers(model), before)
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients(False)
    assert all(gradient.any() for gradient in plain) and same(gradients(True), plain)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_trainer_trains_it_and_goes_on_from_a_checkpoint(quantized, tmp_path, bf16):
    def trainer(seed):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, learning_rate=2e-2, lr_scheduler_type="constant", logging_steps=1,
            per_device_train_batch_size=4, bf16=bf16, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        model = adapted(wr.load(quantized), LORA(lora_dropout=0.1), seed)
        return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS])

    def adapter(model):
        return list(peft.get_peft_model_state_dict(model).values())

    through, resumed = trainer(0), trainer(1)
    before = buffers(through.model)
    through.train()
    losses = [entry["loss"] for entry in through.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.4
    assert same(buffers(through.model), before)
    assert not same(adapter(resumed.model), adapter(through.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(adapter(resumed.model), adapter(through.model))
    again = PeftModel.from_pretrained(wr.load(quantized), tmp_path / "checkpoint-6")
    assert same(adapter(again), adapter(through.model))


def test_gradients_flow_back_through_layers_that_are_offloaded(quantized, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}

    def gradients(**options):
        model = adapted(wr.load(quantized, **options), LORA(target_modules=["layers.0.mlp.up_proj"]))
        loss(shaken(model).train()).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients(kernel="reference")
    assert all(gradient.any() for gradient in plain)
    assert same(gradients(device_map=places, offload_folder=tmp_path), plain)


# ---- memory ----


class Count(TorchDispatchMode):
    """Counts the tensors that are made while it is on, have the shape of a packed weight, and are still alive."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.most = weakref.WeakSet(), 0
        shapes = [tuple(layer.weight.shape) for layer in packed(model).values()]
        self.shapes = {*shapes, *(shape[::-1] for shape in shapes)}
        self.held = {parameter.untyped_storage() for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tuple(tensor.shape) in self.shapes:
                self.alive.update({tensor.untyped_storage()} - self.held)
        self.most = max(self.most, len(self.alive))
        return out


def dense_weights(model) -> tuple[int, int]:
    """How many are alive after a forward, and the most at any one time until its backward has ended."""
    with Count(shaken(model).train()) as count:
        value = loss(model)
        kept = len(count.alive)
        value.backward()
    return kept, count.most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tuner", [*TUNERS, "LoRA and dropout", "DoRA and dropout"])
def test_one_dense_weight_is_alive_at_a_time(quantized, tuner, dtype):
    """DoRA adds a layer's update to its weight, which makes a few of that size for a moment: as many for 21 layers."""
    make = partial(TUNERS[tuner[:4]][0], lora_dropout=0.1) if "dropout" in tuner else TUNERS[tuner][0]
    kept, most = dense_weights(adapted(wr.load(quantized, dtype=dtype), make()))
    assert kept == 0
    if "DoRA" in tuner:
        single = make(target_modules=["layers.1.self_attn.q_proj"])
        assert 1 < most <= dense_weights(adapted(wr.load(quantized, dtype=dtype), single))[1]
    else:
        assert most == 1


def test_dense_weights_that_are_kept_would_be_counted(quantized, monkeypatch):
    monkeypatch.setattr(QuantLinear, "forward", lambda layer, x: F.linear(x, layer.dense_weight(x.dtype)))
    kept, most = dense_weights(adapted(wr.load(quantized), LORA()))
    assert kept == 18 and most >= kept  # nothing flows back through q, k and v of the first block


# ---- merging ----


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("tuner", MERGING)
def test_merging_is_refused_and_changes_nothing(quantized, tuner, safe):
    model = shaken(adapted(wr.load(quantized), MERGING[tuner]()))
    before, logits = buffers(model), tiny.logits(model)
    layer = next(module for module in model.modules() if hasattr(module, "base_layer"))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises((UsageError, ValueError), match=r"packed \(4-bit g64 sym\)|is gptq quantized"):
            merge(safe_merge=safe)
        assert not any(getattr(module, "merged", False) for module in model.modules())
        assert torch.equal(tiny.logits(model), logits) and same(buffers(model), before)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_begin_by_changing_the_weight_are_refused(quantized, how):
    model = wr.load(quantized)
    logits = tiny.logits(model)
    with pytest.raises(UsageError, match=r"its weight is packed \(4-bit g64 sym\) and cannot be written to"):
        adapted(model, LORA(init_lora_weights=how))
    assert torch.equal(tiny.logits(model), logits)
