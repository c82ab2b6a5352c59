"""llm-compressor's GPTQModifier with its defaults: damping of 0.01, static activation order, min-max scales."""

from __future__ import annotations

import job


def main() -> None:
    """Load, quantize, save packed."""
    args = job.asked()
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    ids = args.windows.tolist()
    count, length = args.windows.shape
    weights = {
        "num_bits": args.bits, "type": "int", "symmetric": not args.asym, "strategy": "group",
        "group_size": args.group_size,
    }  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=args.model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length for _ in ids]}),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=length,
        num_calibration_samples=count,
        output_dir=args.out,
    )
    job.finished(args, "llmcompressor", "compressed-tensors", "torch", "transformers")


if __name__ == "__main__":
    main()
