"""The same model in wellrounded, GPTQModel and llama.cpp on this CPU, in turn, each in a process of its own.

    python benchmarks/peers_cpu.py run MODEL --gguf FILE [--llama PYTHON] [--gptqmodel PYTHON] [--rounds 3]
    python benchmarks/peers_cpu.py run 1b|7b [--llama PYTHON]            a Llama of that shape with random weights
    python benchmarks/peers_cpu.py quantize MODEL --text FILE --gptqmodel PYTHON

MODEL is a dense directory; it is quantized with 4 bits and groups of 64 (random shapes: 32, as Q4_0 has). PYTHON are
the interpreters of environments with llama-cpp-python and with gptqmodel; a peer without one is left out. --gguf is any
file that llama.cpp can requantize to Q4_0. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_llama import SHAPES, random_checkpoint, random_gguf

PROMPT, NEW, WINDOWS, LENGTH = 512, 64, 128, 512
BACKENDS = ("GPTQ_TORCH_FUSED", "GPTQ_TORCH_INT8", "GPTQ_TORCH_ATEN", "GPTQ_TORCH")  # of GPTQModel, on a CPU


class Stamps:
    """A streamer that notes when tokens come: first the prompt, then one after another."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` at last."""


def by_generate(model: Any) -> dict[str, float]:
    """Rates of prefill and greedy decoding under transformers' `generate`, after one call to warm up."""
    import torch

    ids = torch.randint(10, min(model.config.vocab_size, 30000), (1, PROMPT))
    model.generation_config.eos_token_id = None
    for _ in range(2):
        stamps, started = Stamps(), time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                pad_token_id=0, streamer=stamps,
            )  # fmt: skip
    first, *_, last = stamps.times[1:]
    return {"prefill": PROMPT / (first - started), "decode": (NEW - 1) / (last - first)}


# ---- one measurement each, in the peer's own process ----


def wellrounded(model: str, compile: bool, head_bits: int | None) -> dict[str, float]:
    """This engine."""
    import wellrounded as wr

    return by_generate(wr.load(model, compile=compile, head_bits=head_bits))


def dense(model: str) -> dict[str, float]:
    """The dense model in bfloat16, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    return by_generate(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))


def gptqmodel(model: str, backend: str) -> dict[str, float]:
    """GPTQModel with one of its kernels."""
    from gptqmodel import BACKEND, GPTQModel

    return by_generate(GPTQModel.load(model, device="cpu", backend=BACKEND[backend]).model)


def llama(file: str) -> dict[str, float]:
    """llama.cpp, its evaluation alone: no sampling, no text."""
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(file, n_ctx=1024, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False)
    for _ in range(2):
        model.reset()
        started = time.perf_counter()
        model.eval(list(range(10, 10 + PROMPT)))
        first = time.perf_counter()
        for token in range(NEW - 1):
            model.eval([500 + token % 10])
        last = time.perf_counter()
    return {"prefill": PROMPT / (first - started), "decode": (NEW - 1) / (last - first)}


def requantize(source: str, target: str) -> dict[str, float]:
    """A Q4_0 file from any other, by llama.cpp."""
    import llama_cpp

    wish = llama_cpp.llama_model_quantize_default_params()
    wish.ftype, wish.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(wish))
    return {"failed": failed}


def quantize_ours(model: str, text: str, out: str) -> dict[str, float]:
    """Seconds of `wellrounded.quantize`, reading and writing included."""
    import wellrounded as wr

    started = time.perf_counter()
    wr.quantize(model, out, bits=4, group_size=64, calibration=text, samples=WINDOWS, length=LENGTH)
    return {"seconds": time.perf_counter() - started}


def quantize_gptqmodel(model: str, text: str, out: str) -> dict[str, float]:
    """Seconds of GPTQModel's load, quantize and save with its defaults, on as many windows of the same text."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))["input_ids"]
    starts = [i * (len(tokens) - LENGTH) // (WINDOWS - 1) for i in range(WINDOWS)]
    windows = [{"input_ids": tokens[s : s + LENGTH], "attention_mask": [1] * LENGTH} for s in starts]
    started = time.perf_counter()
    quantizer = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64), device="cpu")
    quantizer.quantize(windows, batch_size=8)
    quantizer.save(out)
    return {"seconds": time.perf_counter() - started}


# ---- the comparison ----


def apart(python: str, function: str, *arguments: object) -> dict[str, float] | str:
    """What a function of this file returns in another process, or the last line of its complaint."""
    plain = [str(a) if isinstance(a, Path) else a for a in arguments]
    command = [python, str(Path(__file__).resolve()), "worker", function, json.dumps(plain)]
    environment = {"GPTQMODEL_CPU_WORKERS": "2", **os.environ}
    # Some leave files where they are started.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir())
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def compare(contestants: dict[str, tuple], rounds: int) -> None:
    """Runs them in turn, and prints the medians; who fails once is out."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, call in contestants.items():
            result = {} if name in failed else apart(*call)
            if isinstance(result, str):
                failed[name] = result
            elif result:
                found[name].append(result)
                print(f"{name}: {result}", file=sys.stderr, flush=True)
    keys = list(next(results[0] for results in found.values() if results))
    print("| | " + " | ".join(keys) + " | of the first |\n|---|" + "---|" * (len(keys) + 1))
    first = None
    for name, results in found.items():
        if name in failed:
            print(f"| {name} | " + " | " * len(keys) + f"{failed[name][:80]} |")
            continue
        medians = [statistics.median(result[key] for result in results) for key in keys]
        first = first or medians
        shares = ", ".join(f"{value / other:.2f}x" for value, other in zip(medians, first))
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in medians) + f" | {shares} |", flush=True)


def run(args: argparse.Namespace, scratch: Path) -> None:
    """Prefill and decode, tokens per second."""
    here, ours = sys.executable, scratch / "ours"
    contestants: dict[str, tuple] = {}
    if args.model in SHAPES:
        random_checkpoint(args.model, ours)
        file = scratch / "random.gguf" if args.llama else None
        if file:
            random_gguf(args.model, file)
    else:
        import wellrounded as wr

        contestants["dense bfloat16"] = (here, "dense", args.model)
        wr.quantize(args.model, ours, bits=4, group_size=64, calibration="none")
        file = scratch / "q4_0.gguf" if args.llama and args.gguf else None
        if file and (problem := apart(args.llama, "requantize", args.gguf, file)) != {"failed": 0}:
            sys.exit(f"llama.cpp cannot requantize {args.gguf}: {problem}")
    contestants["wellrounded"] = (here, "wellrounded", ours, False, None)
    contestants["wellrounded, compiled"] = (here, "wellrounded", ours, True, None)
    contestants["wellrounded, compiled, head of 8 bits"] = (here, "wellrounded", ours, True, 8)
    if args.gptqmodel and args.model not in SHAPES:
        contestants |= {f"GPTQModel, {name}": (args.gptqmodel, "gptqmodel", ours, name) for name in BACKENDS}
    if file:
        contestants["llama.cpp, Q4_0"] = (args.llama, "llama", file)
    compare(contestants, args.rounds)


def quantize(args: argparse.Namespace, scratch: Path) -> None:
    """Seconds to quantize 128 windows of 512 tokens, 4 bits in groups of 64."""
    contestants = {"wellrounded": (sys.executable, "quantize_ours", args.model, args.text, scratch / "ours")}
    if args.gptqmodel:
        contestants["GPTQModel"] = (args.gptqmodel, "quantize_gptqmodel", args.model, args.text, scratch / "theirs")
    compare(contestants, 1)


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["worker"]:
        print("\n" + json.dumps(globals()[sys.argv[2]](*json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "quantize"])
    parser.add_argument("model")
    parser.add_argument("--gguf", help="the same model, for llama.cpp")
    parser.add_argument("--text", help="to calibrate on")
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name in ("gguf", "text", *(() if args.model in SHAPES else ("model",))):
        if path := getattr(args, name):
            setattr(args, name, str(Path(path).resolve()))
    if args.what == "quantize" and not args.text:
        parser.error("quantize needs --text")
    with tempfile.TemporaryDirectory() as scratch:
        {"run": run, "quantize": quantize}[args.what](args, Path(scratch))


if __name__ == "__main__":
    main()
