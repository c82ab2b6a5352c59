"""Means of what a layer reads: a layer with a bias can make up for all that its error has in common over the tokens.

With `b' = b + mean(r - r_q) + W mean(x) - Q mean(x_q)` the mean of the error is zero, whatever Q is. What Q has to be
good at is the rest: second moments are taken around the means, `H - mean(x_q) mean(x_q)^T`, and so are the others. The
same loss, with one more parameter per output at its best value, in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Means:
    """Sums over input rows, each with its weight: the counterpart of Moments in the first power.

    mass      the sum of weights
    inputs    float32 [n], of x_q
    drift     float32 [n], of x - x_q
    residual  float32 [out], of r - r_q, None for a layer that writes to no residual
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.mass = torch.zeros((), dtype=torch.float64, device=device)
        self.inputs, self.drift = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.residual: torch.Tensor | None = None

    def update(
        self, rows: torch.Tensor, root: torch.Tensor | None = None, drift: torch.Tensor | None = None,
        apart: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Count rows [tokens, n] of the quantized model, `drift` [tokens, n] to the original's, `apart` [tokens, out].

        All are multiplied already by the roots of their weights, `root` [tokens], just as second moments count them:
        what is rounded here and not there would be taken for variance.
        """
        root = torch.ones(len(rows), device=rows.device) if root is None else root.float()
        self.mass += root.square().sum(dtype=torch.float64)
        self.inputs += root @ rows.float()
        if drift is not None:
            self.drift += root @ drift.float()
        if apart is not None:
            self._residual(apart.shape[1]).add_(root @ apart.float())

    def merge(self, other: Means, sign: int = 1) -> None:
        """Add, or with sign -1 take away again, what another one has counted."""
        self.mass += sign * other.mass
        self.inputs.add_(other.inputs, alpha=sign)
        self.drift.add_(other.drift, alpha=sign)
        if other.residual is not None:
            self._residual(len(other.residual)).add_(other.residual, alpha=sign)

    def _residual(self, outputs: int) -> torch.Tensor:
        if self.residual is None:
            self.residual = torch.zeros(outputs, device=self.inputs.device)
        return self.residual

    def sum_over(self, all_reduce: Callable[[torch.Tensor], Any], outputs: int = 0) -> None:
        """Make it the sum of those that several processes have, `outputs` features of a residual included."""
        for one in (self.mass, self.inputs, self.drift, *([self._residual(outputs)] if outputs else [])):
            all_reduce(one)

    @contextmanager
    def centred(
        self, hessian: torch.Tensor, drift: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> Iterator[None]:
        """While it lasts, second moments of the same rows are those around the means; in place."""
        pairs = ((hessian, self.inputs), (drift, self.drift), (residual, self.residual))
        sums = [(matrix, left) for matrix, left in pairs if matrix is not None and left is not None]
        share = 1 / max(float(self.mass), 1e-30)
        for matrix, left in sums:
            matrix.addr_(left, self.inputs, alpha=-share)
        try:
            yield
        finally:
            for matrix, left in sums:
                matrix.addr_(left, self.inputs, alpha=share)

    def absorbed(
        self, weight: torch.Tensor, quantized: torch.Tensor, upstream: float = 0.0, residual: float = 0.0,
        rows: slice = slice(None),
    ) -> torch.Tensor:  # fmt: skip
        """float32 [some]: what is to be added to the bias for the mean of the error to be zero; weights are [some, n].

        They are `rows` of the layer's. Of the errors made before it, as much as these shares say.
        """
        mass = max(float(self.mass), 1e-30)
        weight = weight.float()
        found = (weight - quantized.float()) @ (self.inputs / mass)
        if upstream:
            found += upstream * (weight @ (self.drift / mass))
        if residual and self.residual is not None:
            found += residual * self.residual[rows] / mass
        return found
