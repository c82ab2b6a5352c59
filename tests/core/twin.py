"""The slow twin of the solver, in float64: one weight at a time where that is clearer, never in place.

Rounding follows Frantar et al., "GPTQ" (2022), algorithm 1, with a block of one column: U is the upper Cholesky factor
of the *inverse* Hessian, `H^-1 = U^T U`. Everything is in the order of the weight's own columns.
"""

import torch


def round_to_grid(target, scale, zero, max_code):
    """Codes of the nearest points `scale * (code - zero)`; ties go to the even step, like torch.round."""
    return (torch.round(target / scale) + zero).clamp(0, max_code)


def gptq(weight, damped, scales, zeros, groups, order, max_code):
    """(codes, targets), both [out, in] float64: what each column was rounded to, and from.

    weight [out, in]; damped [in, in]; scales and zeros [out, groups]; groups [in]; order [in]: columns as they come.
    """
    weight = weight.double()[:, order].clone()
    inverse = torch.linalg.inv(damped.double()[order][:, order])
    U = torch.linalg.cholesky(inverse).T
    codes, targets = torch.empty_like(weight), torch.empty_like(weight)
    for j, column in enumerate(order.tolist()):
        scale, zero = scales[:, groups[column]].double(), zeros[:, groups[column]].double()
        targets[:, column] = weight[:, j]
        codes[:, column] = round_to_grid(weight[:, j], scale, zero, max_code)
        error = (weight[:, j] - scale * (codes[:, column] - zero)) / U[j, j]
        weight[:, j:] -= torch.outer(error, U[j, j:])
    return codes, targets


def exact_loss(weight, quantized, hessian):
    """[out] float64: the diagonal of `(Q - W) H (Q - W)^T`, whose sum is the trace."""
    error = quantized.double() - weight.double()
    return ((error @ hessian.double()) * error).sum(1)


def restore(steps, scales, groups):
    """[out, in] float64 weights of codes minus zeros."""
    return steps.double() * scales.double()[:, groups]


def refit(weight, steps, scales, groups, damped):
    """[out, groups] float16: row after row, group after group, the better of the old scale and the best one.

    The loss is a parabola in each scale; three losses give its lowest point.
    """
    scales = scales.clone()
    for r in range(len(weight)):
        row = slice(r, r + 1)

        def loss(g, scale, row=row):
            tried = scales[row].double()
            tried[0, g] = scale
            return exact_loss(weight[row], restore(steps[row], tried, groups), damped).item()

        for g in range(scales.shape[1]):
            below, middle, above = loss(g, -1.0), loss(g, 0.0), loss(g, 1.0)
            curvature, slope = below + above - 2 * middle, (above - below) / 2
            if curvature > 0:
                best = torch.tensor(-slope / curvature).half()
                if best != 0 and loss(g, best.double()) < loss(g, scales[r, g].double()):
                    scales[r, g] = best
    return scales


def damped(matrix, damping):
    """[in, in] like `matrix`, `damping * (H_jj / 2 + median of the live ones)` added to its diagonal."""
    diagonal = matrix.diagonal()
    live = sorted(diagonal[diagonal > 0].tolist())
    middle = live[(len(live) - 1) // 2] if live else 0.0
    return matrix + torch.diag(damping * (0.5 * diagonal + middle))
