"""Plain rounding to the nearest code: the baseline, the mode without data, and the visible fallback."""

from __future__ import annotations

import torch

from . import grid
from .hessian import Hessian
from .scheme import Scheme
from .weight import QuantizedWeight


def solve(weight: torch.Tensor, hessian: Hessian | None, scheme: Scheme) -> QuantizedWeight:
    """Every weight on the nearest point of its group's grid; `weight` is [out, in].

    With a Hessian the grid is searched, weighted by diag(H); without one it spans the extremes of the group. A search
    by unweighted squared error clips the largest weights, which are the ones that matter: it was measured to be worse
    than no search (SmolLM2, 4 bits: perplexity 33.6 against 29.9). The stored group index is always trivial.
    """
    weight = weight.detach().float()
    if hessian is None:
        scales, zeros = grid.search(weight, None, scheme, candidates=1)
    else:
        scales, zeros = grid.search(weight, hessian.diagonal(), scheme)
    index = scheme.trivial_group_index(weight.shape[1]).to(weight.device)
    codes = grid.encode(weight, scales, zeros, index.long(), scheme)
    return QuantizedWeight(codes, scales, zeros, index, scheme)
