"""wellrounded chat MODEL: streams its answers."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import UsageError
from .terminal import stderr


def run(args: argparse.Namespace) -> int:
    """Answer --prompt and exit, or talk until an empty line or end of input."""
    from ..hf.load import load_with_tokenizer
    from ..hf.quiet import quiet

    quiet()

    model, tokenizer = load_with_tokenizer(
        args.model, kernel=args.kernel, compile=args.compile, trust_remote_code=args.trust_remote_code
    )
    if tokenizer is None:
        raise UsageError(f"{args.model}: has no tokenizer, so it cannot chat")
    raw = args.raw or not getattr(tokenizer, "chat_template", None)
    if args.system and raw:
        why = "--raw was asked for" if args.raw else "this model has no chat template"
        raise UsageError(f"--system has no place to go, because {why}; put it into the prompt")
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        _answer(model, tokenizer, args, [*messages, {"role": "user", "content": args.prompt}], raw)
        return 0
    stderr.print(f"{args.model}: an empty line ends the chat")
    while prompt := _ask():
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": _answer(model, tokenizer, args, messages, raw)})
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _answer(model: Any, tokenizer: Any, args: argparse.Namespace, messages: list[dict[str, str]], raw: bool) -> str:
    """Stream the answer to the last message to standard output, and return it."""
    import time

    from ..hf.load import TextStreamer

    if raw:
        text = messages[-1]["content"]
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=raw).to(model.device)
    if not inputs["input_ids"].numel():
        raise UsageError("the prompt is empty; give at least a word to continue")
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    started = time.perf_counter()
    if raw:
        print(text, end="", flush=True)
    output = model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    made = output[0, inputs["input_ids"].shape[1] :]
    sys.stdout.flush()
    stderr.print(f"{len(made) / (time.perf_counter() - started):.1f} tokens/s", style="dim")
    return tokenizer.decode(made, skip_special_tokens=True)
