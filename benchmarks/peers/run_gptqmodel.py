"""GPTQModel with its defaults, or (--variant best) with its search for scales (`mse=2.4`) and damping of 0.01.

On a machine with few cores it needs GPTQMODEL_CPU_WORKERS=2 in the environment.
"""

from __future__ import annotations

import os

import job

BEST = {"mse": 2.4, "damp_percent": 0.01}
BATCH = 8


def main() -> None:
    """Load, quantize, save."""
    args = job.asked()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    chosen = {"default": {}, "best": BEST}[args.variant]
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=not args.asym, **chosen)
    windows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in args.windows.tolist()]
    model = GPTQModel.load(args.model, config, device="cpu")
    model.quantize(windows, batch_size=min(BATCH, len(windows)))
    model.save(args.out)
    job.finished(args, "gptqmodel", "torch", "transformers", settings=chosen)


if __name__ == "__main__":
    main()
