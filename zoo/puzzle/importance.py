"""Which heads and neurons a smaller child keeps.

Neurons (`Channels`, iterative channel contribution): of the projection that reads them, W (o, i) with inputs a (n, i),

    s = W a - W (a of those that are left)                     what has been lost so far, per token
    cost_c = mean over tokens of | s + a_c w_c |               what would be lost without c, too

and the cheapest are taken out, so many in each round, a batch each: `schedule(10, 4)` is 3, 3, 2, 2. Heads (`heads_of`): mean
over tokens of the length of what the output projection makes of each head alone.

Source: NVIDIA/Model-Optimizer, `modelopt/torch/prune/importance_hooks`. Deviation: theirs takes the projection's output with
its bias for `W a`, so that with a bias, which their networks have not, what was lost is wrong by it from the first round on;
here it is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Channels", "heads_of", "schedule"]

SMALL = 1e-8  # under the root


def schedule(channels: int, rounds: int) -> list[int]:
    """How many are taken out in each round: all of them in the end, earlier rounds the odd ones."""
    if channels >= rounds:
        each, more = divmod(channels, rounds)
        return [each + (i < more) for i in range(rounds)]
    places = {i * rounds // channels - 1 for i in range(1, channels + 1)}
    return [int(i in places) for i in range(rounds)]


class Channels:
    """The order in which the inputs of a projection can go.

    Args:
        weight: W (o, i). rounds: batches that `see` will be called with.
    """

    def __init__(self, weight: Tensor, rounds: int) -> None:
        self.weight = weight.detach()
        self.plan = schedule(weight.shape[1], rounds)
        self.gone: list[int] = []
        self.costs = self.weight.new_zeros(weight.shape[1], dtype=torch.float32)

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """A round: the inputs (..., i) of a batch."""
        x, weight = x.flatten(0, -2), self.weight
        left = x.clone()
        left[:, self.gone] = 0
        lost = x @ weight.T - left @ weight.T
        squared = lost.square().sum(-1, keepdim=True) + 2 * x * (lost @ weight) + x.square() * weight.square().sum(0)
        cost = (squared + SMALL).sqrt().mean(0)
        cost[self.gone] = torch.inf
        self.costs += cost
        if count := self.plan.pop(0):
            self.gone += self.costs.topk(count, largest=False).indices.tolist()
            self.costs.zero_()

    def order(self) -> list[int]:
        """All channels, the most important first; to be asked when all rounds are over."""
        return self.gone[::-1]


@torch.no_grad()
def heads_of(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """Mean length over tokens of what a projection W (o, h width) makes of each of h heads of x (..., h width): (h,)."""
    parts = x.flatten(0, -2).unflatten(-1, (-1, width))
    return torch.einsum("nhc,ohc->nho", parts, weight.detach().unflatten(-1, (-1, width))).norm(dim=-1).mean(0)
