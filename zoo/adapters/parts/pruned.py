"""A weight of which the smallest scores are 0, where both its change and the scores are of low rank (`zoo.adapters.pst`).

    W' = W + beta U V,  S = |W'| + a1 A B + a2 (R 1^T + 1 C^T),  W <- M . W',  M: 0 for the smallest S

    dS = dM = G . W',  dW' = M . G + dS . sign(W')          G: gradient of the pruned weight; straight through M

In memory: W, the six helpers and one byte an entry, for M. W' and S are formed again in backward, and what the projection itself
keeps of M . W' is a recipe. M is found again only where something that it hangs on has changed, so once for all micro-batches of
a step, by the score of the last entry that goes: on one core 7 times as fast as putting the scores in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.parts.lowest import smallest
from zoo.engine.memory import recomputable
from zoo.engine.second_order import exact, first_order, straight

__all__ = ["Pruned"]

NAMES = ("weight_u", "weight_v", "mask_a", "mask_b", "mask_r", "mask_c")


class Pruned(nn.Module):
    """W (o, i) -> M . W' (o, i)."""

    removed: Tensor

    def __init__(
        self, dim_in: int, dim_out: int, rank: int, mask_rank: int, factors: tuple[float, float, float]
    ) -> None:
        super().__init__()
        self.weight_u = nn.Parameter(torch.randn(dim_out, rank))
        self.weight_v = nn.Parameter(torch.zeros(rank, dim_in))
        self.mask_a = nn.Parameter(torch.randn(dim_out, mask_rank))
        self.mask_b = nn.Parameter(torch.zeros(mask_rank, dim_in))
        self.mask_r = nn.Parameter(torch.zeros(dim_out))
        self.mask_c = nn.Parameter(torch.zeros(dim_in))
        # how many entries are 0; a tensor, so that a compiled model follows it
        self.register_buffer("removed", torch.zeros((), dtype=torch.int64))
        self.factors, self.numel = factors, dim_in * dim_out
        self.kept: tuple[Any, list[Tensor], Tensor | None] | None = None  # what a mask was found for, and the mask

    def prune(self, sparsity: float) -> None:
        """From now on int(numel * sparsity) entries are 0."""
        self.removed.fill_(int(self.numel * sparsity))

    def forward(self, weight: Tensor) -> Tensor:
        """M . W'."""
        helpers = [getattr(self, name) for name in NAMES]
        if torch.compiler.is_compiling() or exact():
            straight("The mask of 'pst'")
            with _plain_precision(weight):
                new, scores = _scored(weight, helpers, self.factors)
            mask = _by_sorting(scores.detach(), self.removed)
            # the last term is 0, and hands the scores the gradient that the mask would get
            return mask * new + (scores - scores.detach()) * new.detach()
        return recomputable(_Masked.apply, weight, *helpers, self.mask(weight), self.factors)

    @staticmethod
    def linear_group(
        parts: tuple[tuple[Pruned, int, int], ...],
        run: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The projection of x (..., i) with all slices of its weight pruned, each of the weight that came in."""
        pieces, at = [], 0
        for part, start, stop in parts:
            pieces += [weight[at:start], part(weight[start:stop]).to(weight.dtype)]
            at = stop
        pieces = [piece for piece in (*pieces, weight[at:]) if len(piece)]
        return run(x, pieces[0] if len(pieces) == 1 else torch.cat(pieces), bias)

    @torch.no_grad()
    def mask(self, weight: Tensor) -> Tensor | None:
        """False for the smallest scores, `removed` of them, of which those that are equal go in their order. None: all stay.

        The last one stands while the helpers hold the same numbers and W is the same tensor.
        """
        helpers = [getattr(self, name) for name in NAMES]
        if weight.is_meta:
            return None
        count = int(self.removed)
        known = (count, weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype)
        if self.kept is not None and self.kept[0] == known and all(map(torch.equal, self.kept[1][1:], helpers)):
            return self.kept[2]
        with _plain_precision(weight):
            scores = _scored(weight, helpers, self.factors)[1]
        mask = ~smallest(scores, count) if count else None
        # with the weight itself: nothing else can come to stand at its address
        self.kept = (known, [weight.detach(), *(h.detach().clone() for h in helpers)], mask)
        return mask

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps nothing: its tensors are others."""
        return {**self.__dict__, "kept": None}


def _plain_precision(like: Tensor) -> torch.autocast | nullcontext[None]:
    """No autocast: the scores of training, of its backward and of a merge must be the same numbers."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _scored(weight: Tensor, helpers: Sequence[Tensor], factors: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """W' and S (o, i)."""
    u, v, a, b, r, c = helpers
    beta, a1, a2 = factors
    new = torch.addmm(weight.to(u.dtype), u, v, alpha=beta)
    return new, torch.addmm(new.abs(), a, b, alpha=a1) + a2 * (r[:, None] + c[None, :])


def _by_sorting(scores: Tensor, count: Tensor) -> Tensor:
    """False for the `count` smallest; in operations that do not ask what `count` is."""
    order = scores.flatten().argsort(stable=True)
    stays = torch.arange(len(order), device=order.device) >= count
    return torch.zeros_like(stays).scatter(0, order, stays).view(scores.shape)


class _Masked(torch.autograd.Function):
    """M . W', whose gradient goes straight through M to the scores; of W' and S nothing is kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *inputs: Any) -> Tensor:
        *helpers, mask, factors = inputs
        ctx.straight, ctx.factors = True, factors
        ctx.save_for_backward(weight, *helpers, mask)
        with _plain_precision(weight):
            new = torch.addmm(weight.to(helpers[0].dtype), helpers[0], helpers[1], alpha=factors[0])
        return new if mask is None else new.mul_(mask)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, u, v, a, b, _, _, mask = ctx.saved_tensors
        beta, a1, a2 = ctx.factors
        grad = grad.to(u.dtype)
        with _plain_precision(weight):
            new = torch.addmm(weight.to(u.dtype), u, v, alpha=beta)
            scored = grad * new  # dS = dM
            dw = scored * new.sign_() + (grad if mask is None else grad * mask)
            helpers = (beta * (dw @ v.T), beta * (u.T @ dw), a1 * (scored @ b.T), a1 * (a.T @ scored))
        sums = (a2 * scored.sum(1), a2 * scored.sum(0))
        return dw.to(weight.dtype) if ctx.needs_input_grad[0] else None, *helpers, *sums, None, None
