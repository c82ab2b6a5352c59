"""A whole model: tokens per second, and how much of the time its linear layers take."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..model.blocks import is_linear
from ..nn import QuantLinear
from ..request import chosen_device, refuse_longer
from .clock import Clock, alternate, machine

PARTS = ("packed", "linear", "rest")


class Watch:
    """Marks where each forward pass of a model begins and ends, and with `parts` each of its linear layers too."""

    def __init__(self, model: nn.Module, clock: Clock, parts: bool = False) -> None:
        self.clock = clock
        self.passes: list[list[Any]] = []  # [start, end]
        self.calls: list[tuple[int, str, list[Any]]] = []  # (pass, part, [start, end])
        self.handles = self._hook(model, self._begin)
        for module in model.modules() if parts else ():
            if part := _part(module):
                self.handles += self._hook(module, lambda part=part: self._call(part))

    def _hook(self, module: nn.Module, begin: Callable[[], list[Any]]) -> list[Any]:
        spans: list[list[Any]] = []

        def before(*_: Any) -> None:
            spans.append(begin())
            spans[-1].append(self.clock.mark())

        def after(*_: Any) -> None:
            spans.pop().append(self.clock.mark())

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _begin(self) -> list[Any]:
        self.passes.append([])
        return self.passes[-1]

    def _call(self, part: str) -> list[Any]:
        self.calls.append((len(self.passes) - 1, part, []))
        return self.calls[-1][2]

    def seconds(self) -> tuple[float, float]:
        """Of the prefill, which is the first pass, and of decoding one token, all that lies between passes included."""
        first, last = self.passes[0], self.passes[-1]
        return self.clock.between(*first), self.clock.between(first[1], last[1]) / (len(self.passes) - 1)

    def shares(self) -> tuple[dict[str, float], dict[str, float]]:
        """Fractions of the prefill and of decoding by part; what no linear layer takes is the rest."""
        prefill, step = self.seconds()
        phases = []
        for whole, is_prefill in ((prefill, True), (step * (len(self.passes) - 1), False)):
            share = dict.fromkeys(PARTS, 0.0)
            for number, part, span in self.calls:
                if (number == 0) == is_prefill:
                    share[part] += self.clock.between(*span) / whole
            phases.append({**share, "rest": 1 - share["packed"] - share["linear"]})
        return phases[0], phases[1]


def _part(module: nn.Module) -> str | None:
    if isinstance(module, QuantLinear):
        return "packed"
    return "linear" if is_linear(module) else None


@contextmanager
def watching(model: nn.Module, clock: Clock, parts: bool = False) -> Iterator[Watch]:
    """A Watch whose hooks are gone afterwards."""
    watch = Watch(model, clock, parts)
    try:
        yield watch
    finally:
        for handle in watch.handles:
            handle.remove()


def compare_models(
    name: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool = True,
    prompt_length: int = 512,
    new_tokens: int = 64,
    dense: bool = True,
    seconds: float = 0.5,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Prefill and greedy decoding of one row, by the quantized model and by the same weights dense in bfloat16.

    A model that is not quantized is measured by itself, or packed while it is loaded if `bits` are given. Each runs
    for `seconds`, at least LEAST times. Raises UsageError for what the model cannot do.
    """
    from ..hf.load import load

    device = chosen_device(device)
    clock = Clock(device)
    if new_tokens < 2:
        raise UsageError(
            f"new_tokens={new_tokens} was asked for, but the first one belongs to the prefill; use 2 or more"
        )

    def fetch() -> Any:
        model = load(name, bits=bits, group_size=group_size, sym=sym, trust_remote_code=trust_remote_code)
        return model.to(device)

    models = _side_by_side(fetch, prompt_length + new_tokens, dense, name)
    found = _measure(models, clock, prompt_length, new_tokens, seconds)
    both = len(found) == 2
    ratios = {
        f"{phase}_speedup": found["quantized"][key] / found["dense"][key] if both else None
        for phase, key in (("prefill", "prefill_tokens_s"), ("decode", "decode_tokens_s"))
    }
    return {
        **machine(device), "model": str(name), "prompt_length": prompt_length, "new_tokens": new_tokens,
        "quantized": found.get("quantized"), "dense": found.get("dense"), **ratios,
    }  # fmt: skip


def _side_by_side(fetch: Callable[[], Any], tokens: int, dense: bool, name: str) -> dict[str, Any]:
    """The models to measure: "quantized", "dense", or both."""
    model = fetch()
    try:
        refuse_longer(tokens, model)
    except UsageError as error:
        raise UsageError(f"prompt and new tokens together: {error}") from None
    if _packed(model):
        return {"quantized": model, **({"dense": fetch().dequantize(torch.bfloat16)} if dense else {})}
    if not dense:
        raise UsageError(f"{name}: not quantized, and its dense form was not asked for; pack it with bits=4")
    return {"dense": model}


def _packed(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def _measure(
    models: dict[str, Any], clock: Clock, prompt_length: int, new_tokens: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """The figures of each model; the pass that tells the parts apart is not among those that are timed."""
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
    prompt = torch.randint(vocabulary, (1, prompt_length), generator=torch.Generator().manual_seed(0)).to(clock.device)

    def generate(model: Any, parts: bool = False) -> Watch:
        with watching(model, clock, parts) as watch:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return watch

    for model in models.values():
        model.generation_config.eos_token_id = None  # or it might end early
    samples = alternate([lambda m=m: generate(m).seconds() for m in models.values()], seconds)  # type: ignore[misc]
    found = {}
    for (kind, model), seen in zip(models.items(), samples):
        prefill, step = (statistics.median(times) for times in zip(*seen))
        shares = generate(model, parts=True).shares()
        found[kind] = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernels": dict(Counter(layer.kernel for layer in _packed(model))),
            "prefill_tokens_s": prompt_length / prefill,
            "decode_tokens_s": 1 / step,
            "prefill_share": shares[0],
            "decode_share": shares[1],
            "samples": len(seen),
        }
    return found
