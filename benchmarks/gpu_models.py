"""Whole models for benchmarks/gpu.py: a Llama of random weights under `generate`, and a quantization of one."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import large
import wellrounded as wr
from wellrounded.benchmark.layers import random_weight
from wellrounded.core.scheme import Scheme
from wellrounded.formats.gptq import to_tensors
from wellrounded.hf.on_the_fly import put_layers
from wellrounded.hf.quiet import quiet

if TYPE_CHECKING:
    from gpu import Ask, Job, Lines


def model_section(ask: Ask) -> Iterator[Job]:
    """Both models step by step, then as `generate` compiles them; one of them is in memory at a time."""
    held: dict[str, Any] = {}

    def fetch(kind: str) -> Any:
        if kind not in held:
            dense = held.pop("dense", None) if kind == "packed" else held.clear()
            gc.collect()
            dense = dense or dense_llama(ask)
            held[kind] = pack(dense, ask) if kind == "packed" else dense
        return held[kind]

    jobs = [(kind, batch, False) for kind in ("dense", "packed") for batch in ask.sizes.batches]
    if not ask.smoke:  # transformers compiles on a GPU only; in an order that builds models as seldom as can be
        first, second = ask.sizes.batches
        jobs += [("packed", first, True), ("dense", first, True), ("dense", second, True), ("packed", second, True)]
    for kind, batch, compiled in jobs:
        name = f"{kind}, batch of {batch}{', compiled' * compiled}"
        yield name, generating(ask, fetch, kind, batch, compiled)


def dense_llama(ask: Ask) -> Any:
    """Random weights in bfloat16, made where the model will run."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    fixed = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    config = LlamaConfig(**ask.llama(), num_hidden_layers=ask.sizes.blocks, **fixed)
    with torch.device(ask.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def pack(llama: Any, ask: Ask) -> Any:
    """The same model, in place, with random codes in the layers of its blocks: those of one shape have the same."""
    scheme, version, linear = Scheme(4, ask.sizes.group), "gptq_v2", torch.nn.Linear
    names = [f"model.{name}" for name, module in llama.model.named_modules() if isinstance(module, linear)]
    put_layers(llama, dict.fromkeys(names, scheme), version, torch.bfloat16)
    made: dict[tuple[int, int], dict[str, Any]] = {}
    for layer in map(llama.get_submodule, names):
        shape = (layer.out_features, layer.in_features)
        if shape not in made:
            made[shape] = to_tensors(random_weight(*shape, scheme, ask.device), version)
        for key, tensor in made[shape].items():
            setattr(layer, key, tensor.clone())
        layer.bind(torch.bfloat16)
    return llama


def generating(ask: Ask, fetch: Callable[[str], Any], kind: str, batch: int, compiled: bool) -> Lines:
    """One row: medians of three calls of `generate`, after one that compiles."""
    from peers_cpu import Stamps

    sizes, llama = ask.sizes, fetch(kind)
    if compiled:
        torch.compiler.reset()  # or the second number of rows would be compiled as one that varies
    settings = llama.generation_config
    settings.eos_token_id, settings.cache_implementation, settings.disable_compile = None, "static", not compiled
    ids = torch.randint(10, llama.config.vocab_size, (batch, sizes.prompt), device=ask.device)
    words = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def call() -> tuple[float, float, float]:
        """Seconds: of all, until the first token, and of a step."""
        stamps, started = Stamps(), time.perf_counter()
        llama.generate(input_ids=ids, max_new_tokens=sizes.new, streamer=stamps, **words)
        first, *_, last = stamps.times[1:]
        return last - started, first - started, (last - first) / (sizes.new - 1)

    warm, _, _ = call()
    if not ask.smoke:
        torch.cuda.reset_peak_memory_stats()
    _, first, step = map(statistics.median, zip(*(call() for _ in range(3))))
    kernels = sorted({layer.kernel for layer in llama.modules() if hasattr(layer, "wanted_kernel")})
    yield {
        "model": kind, "kernels": kernels, "batch": batch, "compiled": compiled, "prompt": sizes.prompt,
        "new": sizes.new, "prefill_tokens_s": batch * sizes.prompt / first, "decode_tokens_s": batch / step,
        "first_call_seconds": warm, "peak_vram_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


def quantize_section(ask: Ask) -> Iterator[Job]:
    """A checkpoint of some blocks, written and quantized."""
    yield f"{ask.layers} blocks", quantizing(ask)


def quantizing(ask: Ask) -> Lines:
    """One row, what the whole model would take by the time per block in it, and what the report says is wrong."""
    sizes, scratch, shape = ask.sizes, Path(ask.scratch), ask.llama()
    outside, block = (2 * sum(map(math.prod, part(shape).values())) for part in (large.outside, large.inside))
    size, free = outside + ask.layers * block, shutil.disk_usage(scratch).free
    if free < 1.5 * size:
        found = f"{ask.layers} blocks need {1.5 * size / 1e9:.1f} GB in {scratch}, {free / 1e9:.1f} GB are free"
        raise OSError(f"{found}; give fewer --layers, or set TMPDIR")
    # Forked, for the memory that it takes to write is none that quantizing takes.
    fork = multiprocessing.get_context("fork")
    writer = fork.Process(target=large.write, args=(ask.kind, scratch / "dense", size / 1e9))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise RuntimeError(f"the checkpoint was not written, see standard error (exit code {writer.exitcode})")
    random.seed(0)
    ids = random.choices(range(shape["vocab_size"]), k=(sizes.samples + 40) * sizes.length)
    (scratch / "rows.jsonl").write_text(json.dumps({"input_ids": ids}))
    quiet()
    marks, started = [], time.perf_counter()
    report = wr.quantize(
        scratch / "dense", scratch / "packed", bits=4, group_size=sizes.group, preset="fast", device=ask.device,
        calibration=str(scratch / "rows.jsonl"), samples=sizes.samples, length=sizes.length,
        progress=lambda step: None if step.message else marks.append(time.perf_counter()),
    )  # fmt: skip
    seconds, blocks, each = time.perf_counter() - started, len(marks), (marks[-1] - marks[0]) / (len(marks) - 1)
    yield from report.problems()
    yield {
        "blocks": blocks, "tokens": sizes.samples * sizes.length, "seconds": seconds, "block_seconds": each,
        "opening_seconds": marks[0] - each - started, "closing_seconds": started + seconds - marks[-1],
        "whole_blocks": sizes.blocks, "whole_seconds": seconds + (sizes.blocks - blocks) * each,
        "peak_vram_bytes": torch.cuda.max_memory_allocated(), "reserved_vram_bytes": torch.cuda.max_memory_reserved(),
        "peak_rss_bytes": report.peak_rss_bytes, "phases": report.seconds,
    }  # fmt: skip
