"""Where a matrix is least like one of low rank: greedy bilateral decomposition W = U V + S, as in DSEE.

    V_0 ~ N(0, 1) (1, i)
    round:   S <- 0, and twice:   U <- Q of qr((W - S) V^T),   V <- U^T (W - S),   R = W - U V,   S <- R where |R| >= 0.01
             E = R - S;   V <- [V; the first 5 rows of R of qr(E)], so that the rank is 1, 6, 11 ...

The places are those of the largest |S| of the last round. A round that leaves fewer than are wanted is not taken, nor one whose
rank the matrix has not: the one before it is the last. If the first does, the largest |R| of that are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["outliers"]

THRESHOLD, GROWTH, STEPS = 0.01, 5, 2


def outliers(weight: Tensor, count: int, rounds: int, start: Tensor) -> Tensor:
    """Flat places (count,) int32, rising, of the entries of a weight (o, i) that are furthest from low rank.

    Args:
        start: V_0 (1, i). Products are formed in its precision, on the weight's device.
    """
    w, v = weight.to(start.dtype), start.to(weight.device)
    furthest = w.abs()
    for number in range(rounds):
        if len(v) > min(w.shape):
            break
        sparse = torch.zeros_like(w)
        for _ in range(STEPS):
            u = torch.linalg.qr((w - sparse) @ v.T).Q
            v = u.T @ (w - sparse)
            rest = w - u @ v
            sparse = torch.where(rest.abs() < THRESHOLD, 0.0, rest)
        if int(sparse.count_nonzero()) < count:
            furthest = rest.abs() if number == 0 else furthest
            break
        furthest = sparse.abs()
        error = rest - sparse
        # the first rows of R need no more than the first columns of Q
        v = torch.cat([v, torch.linalg.qr(error[:, :GROWTH]).Q.T @ error])
    order = furthest.flatten().argsort(descending=True, stable=True)  # equal ones in their order, on every device
    return order[:count].sort().values.to(torch.int32)
