"""AutoRound with its defaults: SignSGD over rounding and clipping, 200 iterations per block, batches of 8."""

from __future__ import annotations

from pathlib import Path

import job

BATCH = 8  # its default


def main() -> None:
    """Load, tune, save in its own format."""
    args = job.asked()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count, length = args.windows.shape
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asym,
        dataset=list(torch.from_numpy(args.windows).split(min(BATCH, count))),
        nsamples=count,
        seqlen=length,
        iters=args.iterations,
        batch_size=min(BATCH, count),
        device_map="cpu",
    )
    rounding.quantize_and_save(args.out, format="auto_round")
    (made,) = Path(args.out).iterdir()  # it names a directory of its own
    for path in made.iterdir():
        path.rename(Path(args.out) / path.name)
    made.rmdir()
    job.finished(args, "auto-round", "torch", "transformers", settings={"iters": args.iterations})


if __name__ == "__main__":
    main()
