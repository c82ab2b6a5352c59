"""Tokens as a layer of a quantized model and of its original see them, and their errors counted one by one."""

from typing import NamedTuple

import torch

from wellrounded.core.hessian import Hessian
from wellrounded.core.moments import Moments

OUT, IN = 12, 24
ALL = slice(None)


class Seen(NamedTuple):
    """Tokens in both models: what a layer reads [tokens, IN], and the residual that it writes to [tokens, OUT]."""

    x: torch.Tensor
    x_q: torch.Tensor
    r: torch.Tensor
    r_q: torch.Tensor
    weights: torch.Tensor | None = None

    def moments(self, residual: bool = True) -> Moments:
        found = Moments(Hessian(IN), torch.zeros(IN, IN))
        found.update(self.x_q, self.x, self.weights, self.r - self.r_q if residual else None)
        return found

    def error(self, weight: torch.Tensor, quantized: torch.Tensor, residual: bool = True) -> float:
        """The mean of |r + W x - r_q - Q x_q|^2, token by token, in float64."""
        wanted = self.x.double() @ weight.double().T + (self.r - self.r_q).double() * residual
        lost = (wanted - self.x_q.double() @ quantized.double().T).square().sum(1)
        return float((lost * (1 if self.weights is None else self.weights.double())).mean())

    def best(self, weight: torch.Tensor, upstream: float = 1, residual: float = 1) -> torch.Tensor:
        """What loses least, by least squares in float64."""
        root = torch.ones(len(self.x)) if self.weights is None else self.weights.sqrt()
        read, residuals = self.x_q.double(), (self.r - self.r_q).double()
        wanted = (read + upstream * (self.x.double() - read)) @ weight.double().T + residual * residuals
        root = root.double().unsqueeze(1)
        return torch.linalg.lstsq(root * read, root * wanted).solution.T


def seen(tokens: int = 600, seed: int = 0, drift: float = 0.3, weighted: bool = False) -> Seen:
    """Inputs with a few strong directions, and errors that have to do with them, as in a model."""
    random = torch.Generator().manual_seed(seed)
    mix, bend, write = (torch.randn(IN, n, generator=torch.Generator().manual_seed(99 + n)) for n in (IN, IN + 1, OUT))
    x = torch.randn(tokens, IN, generator=random) @ (torch.eye(IN) + 0.3 * mix)
    x_q = x + drift * (0.2 * x @ bend[:, :IN] + torch.randn(tokens, IN, generator=random))
    r = torch.randn(tokens, OUT, generator=random)
    r_q = r + drift * (0.3 * x @ write + torch.randn(tokens, OUT, generator=random))
    return Seen(x, x_q, r, r_q, torch.rand(tokens, generator=random) * 3 if weighted else None)


def some_weight(seed: int = 5) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def sums(moments: Moments) -> dict[str, torch.Tensor]:
    """Copies of all that was counted."""
    residual = torch.zeros(OUT, IN) if moments.residual is None else moments.residual
    hessian = moments.hessian.mirrored()
    tokens = torch.tensor(float(moments.tokens))
    return {"H": hessian.clone(), "D": moments.drift.clone(), "G": residual.clone(), "tokens": tokens}


def assert_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, one in some.items():
        assert (one - others[name]).norm() <= tolerance * others[name].norm(), name
