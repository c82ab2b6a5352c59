"""The last step of the best preset: what is quantized is trained, and what was learned is put into tensors to store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .calibration.mixture import Calibration
from .calibration.windows import Windows, join
from .core.weight import QuantizedWeight
from .learned import shared_modules
from .ledger import Ledger
from .model.stream import Stream
from .model.walk import BlockWalk
from .progress import Pace
from .sampling import sampled
from .student import Student
from .training import Training, train


class Tuning:
    """Trains scales and norm gains of a model whose blocks are all quantized, codes frozen.

    It is made before the walk begins, when it can still be seen which modules share their weights.
    """

    def __init__(self, walk: BlockWalk, ledger: Ledger, version: str, training: Training) -> None:
        self.walk, self.ledger, self.version, self.training = walk, ledger, version, training
        self.owners = shared_modules(walk.model)
        self.written = 0  # windows of what is trained on that the original wrote

    def text(self, calibration: Calibration, states: Callable[[str], Path], say: Callable[[str], None]) -> Windows:
        """What to train on instead of the calibration windows, which have been fitted to already.

        That is further text of the same sources, and where they do not have enough, what the original writes. If it
        cannot, the same is seen several times, in the worst case the calibration windows.
        """
        windows, own = calibration.windows, calibration.further
        missing = self.training.windows - (len(own) if own else 0)
        if not missing and own:
            return own
        causal = getattr(self.walk.model, "can_generate", lambda: False)()
        plain = windows.mask is None and not windows.more
        if plain and causal:
            written = sampled(self.walk, windows.ids, missing, self.training.seed, states("sampled"), say)
            if written is not None:
                self.written = missing
                return join([own, Windows(written)]) if own else Windows(written)
        if not own:
            say("training on the calibration text: there is no other, and the original writes none")
        return own or windows

    def tune(
        self, quantized: Mapping[str, QuantizedWeight], teacher: Stream, held: Stream | None, state: Path,
        say: Callable[[str], None],
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
        """What is to be stored by its name in the files, and what the report says of it.

        teacher and held have gone through all blocks of the original; the step that is best on `held` is taken. A run
        that is stopped goes on from `state`.
        """
        student = Student(self.walk, quantized, self.owners, self._fixed())
        every = self.training.every

        pace: Pace | None = None

        def tell(step: int, total: int, kl: float | None, held_out: float | None) -> None:
            nonlocal pace
            pace = pace or Pace(step)
            if held_out is not None or step % every == 0:
                seen = [f"KL {kl:.4f}"] if kl is not None else []
                seen += [f"{held_out:.4f} on held-out text"] if held_out is not None else []
                left = pace.left(step, total)
                say(f"training scales and norms: step {step} of {total}, {', '.join(seen)}{left}")

        trained = train(student, teacher, held, self.training, state, tell)
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in trained.weights.items():
            if name not in self.ledger.owners:
                packed = self.ledger.packed(name, weight, self.version)
                tensors |= {key: tensor for key, tensor in packed.items() if key.endswith(".scales")}
        tensors |= {self.ledger.stored[name]: gain for name, gain in trained.dense.items()}
        return tensors, {
            "steps": self.training.steps,
            "best_step": trained.best_step,
            "windows": self.training.windows,
            "written": self.written,
            "kl": [[row.step, row.kl, row.held_out] for row in trained.history],
        }

    def gains(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of tensors as they are stored, parameters of the model that are not packed, by the model's names."""
        return {name: tensors[stored] for name, stored in self.ledger.stored.items() if stored in tensors}

    def _fixed(self) -> set[str]:
        """Parameters that the files do not hold just as the model has them: what was learned had no place there."""
        return {name for name, _ in self.walk.model.named_parameters() if name not in self.ledger.stored}
