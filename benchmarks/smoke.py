"""Run every benchmark at the smallest size that still goes through all of its code: CI does, so that none rots."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def byte_tokenizer() -> Any:
    """A tokenizer of 256 tokens, one for every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_model(directory: Path) -> Path:
    """A random Llama of two blocks with a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer)
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def run(script: str, *arguments: str) -> None:
    """One benchmark; its failure is ours."""
    print(f"\n# {script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


def main() -> None:
    """All of them, in a scratch directory."""
    with tempfile.TemporaryDirectory() as scratch:
        run("accuracy.py", "--smoke")  # without the peers: their environments are not CI's
        run("architectures.py", "llama", "mixtral", "xlm")  # green, green with experts, red with a reason
        for kind in ("llama", "moe"):
            written, out = Path(scratch) / kind, Path(scratch) / f"{kind}-out"
            run("large.py", "write", f"tiny-{kind}", str(written))
            run("large.py", "run", str(written), str(out), "--limit", "4GB", "--", "--samples", "8", "--length", "64")
        run("scale.py", "--models", "tiny")
        run("peers_cpu.py", "run", "tiny", "--rounds", "1")  # the same


if __name__ == "__main__":
    main()
