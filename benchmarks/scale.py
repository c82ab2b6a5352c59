"""What models of 8 to 671 billion parameters would take to quantize: the planner's own forecasts, nothing is run.

    python benchmarks/scale.py --preset fast      # a table as docs/scale.md has it
    python benchmarks/scale.py --json

Models are built from configurations of well-known shapes, on the meta device, without weights. The rates of the CPU are
measured on this machine; those of a GPU are assumptions, written out below, until somebody measures them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig

from wellrounded import rates
from wellrounded.checkpoint import Source
from wellrounded.hf.source import skeleton
from wellrounded.hf.stored import Stored
from wellrounded.memory import shown
from wellrounded.prediction import Forecast, Forecaster, Room, Workload
from wellrounded.presets import PRESETS, Preset, preset
from wellrounded.progress import duration
from wellrounded.request import HELD_OUT, NONE, Request

SAMPLES, LENGTH = 128, 512
PROCESS = 450 * 2**20  # a process before it has read anything, as measured with torch's CPU build
GPU = rates.Rates(
    products=300e12,  # a third of an H200's peak in bfloat16
    gram=10e12,  # multiply-adds of float32 sums through bfloat16 products
    square=2 * 4 / 30e12, linear=2e-10,  # float32 matrix products at half of the peak, and grids from memory
    cubic=1 / 5e12, rounding=2e-11, comparing=5e11, drift=7.5e12, reading=2e9, writing=1e9, startup=20.0,
)  # fmt: skip
AIMING = 2 * 3 / 30e12  # what more than that comparing with the original takes, in seconds per weight and column


def llama(**shape: Any) -> Callable[[], PretrainedConfig]:
    """A Llama's configuration."""
    return lambda: LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, **shape)


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "1B (Llama 3.2 shape)": llama(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, tie_word_embeddings=True
    ),
    "8B (Llama 3 shape)": llama(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "70B (Llama 3 shape)": llama(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "405B (Llama 3 shape)": llama(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128
    ),
    "671B (DeepSeek V3 shape, 256 experts)": DeepseekV3Config,
    "tiny": llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8),
}


def source_of(config: PretrainedConfig) -> Source:
    """A source whose tensors nobody can read: names, shapes and sizes in bfloat16 are all that there is."""
    model = skeleton(AutoModelForCausalLM, config)
    sizes = {name: 2 * tensor.numel() for name, tensor in model.state_dict().items()}

    def unread(name: str) -> torch.Tensor:
        raise RuntimeError(f"{name} was to be read")

    def write_files(directory: Path) -> None:
        raise RuntimeError(f"{directory} was to be written")

    stored = Stored(model, sizes, unread)
    return stored.source(
        label="shape", config=config.to_dict(), write_files=write_files, bytes=sum(sizes.values()), fingerprint="",
        sizes=sizes,
    )  # fmt: skip


def forecasts(config: PretrainedConfig, cpu: rates.Rates, does: Preset) -> Iterator[tuple[str, Forecast]]:
    """On a CPU in the fastest room and in the most frugal, and on one GPU and on eight, which cannot train."""
    run = Request(calibration=NONE, device="cpu").run(source_of(config))

    def forecaster(device: str, processes: int) -> Forecaster:
        work = Workload(-(-SAMPLES // processes), -(-HELD_OUT // processes), LENGTH, processes=processes)
        return Forecaster(run.source, run.plan, run.walk.names, work, device, PROCESS, does)

    alone = forecaster("cpu", 1)
    yield "2 CPU cores, fast", alone.predict(Room(), cpu)
    frugal = Room(LENGTH, waits=False, spills=True, maps=True)
    yield "2 CPU cores, least memory", alone.predict(frugal, cpu)
    gpu = replace(GPU, square=GPU.square + AIMING) if does.settings.paired else GPU
    for processes in (1,) if does.training else (1, 8):
        name = "1 GPU" if processes == 1 else f"{processes} GPUs, each"
        room = Room(waits=False)
        yield name, forecaster("cuda", processes).predict(room, gpu)


def table(found: list[tuple[str, str, Forecast]]) -> str:
    """Markdown."""
    lines = ["| model | on | memory | GPU memory | time | size of the result |", "|---|---|---|---|---|---|"]
    for model, where, one in found:
        vram = shown(one.peak_vram_bytes) if one.peak_vram_bytes else ""
        memory, size = shown(one.peak_memory_bytes), shown(one.output_bytes)
        lines.append(f"| {model} | {where} | {memory} | {vram} | {duration(one.seconds)} | {size} |")
    return "\n".join(lines)


def main() -> None:
    """The table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="*", choices=MODELS, metavar="MODEL", default=known, help=f"of {known}")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    does = preset(args.preset)
    cpu = replace(rates.measure("cpu", does.settings), startup=10.0)
    found = [(name, *one) for name in args.models for one in forecasts(MODELS[name](), cpu, does)]
    if args.json:
        rows: list[dict[str, Any]] = [{"model": m, "on": w, **one.to_dict()} for m, w, one in found]
        print(json.dumps({"cpu": asdict(cpu), "gpu": asdict(GPU), "forecasts": rows}, indent=2))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
