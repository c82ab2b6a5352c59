"""What is known of a layer's inputs in two models, token by token: the original one and the quantized one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .engines import added_product
from .hessian import Hessian, exact_products
from .means import Means


def add_product(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor) -> None:
    """total float32 [m, n] += left^T right, of rows [tokens, m] and [tokens, n] of any dtype, summed in float32."""
    if not added_product(left, right, total):
        with exact_products(right):
            total.addmm_(left.float().T, right.float())


class Moments:
    """Sums over input rows, x in the original model and x_q in the quantized one, each row with a weight.

    hessian   of x_q: the sum of x_q x_q^T
    drift     D, float32 [n, n], the sum of (x - x_q) x_q^T: what quantizing has done so far to what the layer reads
    residual  G, float32 [out, n], the sum of (r - r_q) x_q^T, of a layer that writes to the residual r; else None
    means     of the same rows, where a bias can absorb the mean of the error; else None

    With them, and the original's weight W, a layer's error is known up to a constant for any quantized Q:
    `|r + W x - r_q - Q x_q|^2 = const + tr(Q H Q^T) - 2 tr((W (H + D) + G) Q^T)`.
    """

    def __init__(self, hessian: Hessian, drift: torch.Tensor, means: Means | None = None) -> None:
        self.hessian, self.drift, self.means = hessian, drift, means
        self.residual: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many rows have been counted."""
        return self.hessian.tokens

    def update(
        self, rows: torch.Tensor, original: torch.Tensor, weights: torch.Tensor | None = None,
        apart: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Count rows [tokens, n] of the quantized model and those of the original.

        weights are [tokens], or all 1; `apart` [tokens, out] is the original's residual minus the quantized model's.
        """
        if not len(rows):
            return
        drift, root = original - rows, None
        if weights is not None:
            root = weights.float().sqrt().unsqueeze(1)
            if rows.dtype == torch.bfloat16:  # the range of float32, so that nothing has to be copied to be multiplied
                root = root.bfloat16()
            rows, drift = ((each * root).to(rows.dtype) for each in (rows, drift))
            apart = None if apart is None else (apart * root).to(rows.dtype)
        self.hessian.update(rows)
        add_product(drift, rows, self.drift)
        if apart is not None:
            add_product(apart, rows, self.gather(apart.shape[1]))
        if self.means is not None:
            self.means.update(rows, None if root is None else root.squeeze(1), drift, apart)

    def gather(self, outputs: int) -> torch.Tensor:
        """The sum for a residual of so many features."""
        if self.residual is None:
            self.residual = torch.zeros(outputs, self.hessian.size, device=self.hessian.device)
        return self.residual

    def merge(self, other: Moments, sign: int = 1) -> None:
        """Add, or with sign -1 take away again, what another one has counted."""
        self.hessian.merge(other.hessian, sign)
        self.drift.add_(other.drift, alpha=sign)
        if other.residual is not None:
            self.gather(len(other.residual)).add_(other.residual, alpha=sign)
        if self.means is not None and other.means is not None:
            self.means.merge(other.means, sign)

    @contextmanager
    def without(self, part: Moments) -> Iterator[None]:
        """While it lasts, a part of what was counted is not."""
        self.merge(part, -1)
        try:
            yield
        finally:
            self.merge(part)

    def sum_over(self, all_reduce: Callable[[torch.Tensor], Any], outputs: int = 0) -> None:
        """Make it the sum of those that several processes have; `all_reduce` does so in place, for one tensor.

        `outputs` are the features of the residual, if any process has counted one.
        """
        self.hessian.sum_over(all_reduce)
        all_reduce(self.drift)
        if outputs:
            all_reduce(self.gather(outputs))
        if self.means is not None:
            self.means.sum_over(all_reduce, outputs)

    def wanted(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """`W (H + D) + G`, a sum like the others, for float32 [some, n], `rows` of the layer's weight."""
        found = (weight @ self.hessian.mirrored()).addmm_(weight, self.drift)
        return found if self.residual is None else found.add_(self.residual[rows])
