"""Triplets that become more while they are trained, and the sensitivity of a whole projection to its change.

    y = W x + b + s P diag(e) Q dropout(x)         s = alpha / (r + 1e-5) for the present rank r
    S = sum |D * dL/dD| / sqrt(o i)                D = s P diag(e) Q (o, i)

The triplets stand in blocks (`lora_p`, `lora_p1`, `lora_p2` ...), each with a learning-rate schedule of its own. A last block
without e is a reserve, whose directions learn in front of their use: its e is 1e-5, and it does not count in r.

The gradient of D is as large as W. It is formed in backward, one projection after the other, and reduced to S at once. Where a
batch comes in parts (accumulated, or on several processes) it is kept until they are all there, since S is no sum over parts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.parts.budget import forget
from zoo.adapters.parts.low_rank import add_low_rank
from zoo.adapters.parts.triplets import NAMES, OfTriplets, Triplets
from zoo.engine.memory import dropped, recomputable
from zoo.engine.second_order import exact, first_order
from zoo.errors import ConfigError

__all__ = ["Growing", "OfGrowing"]

RESERVE = 1e-5  # e of directions that wait


def _directions(like: Triplets, count: int) -> tuple[Tensor, Tensor]:
    """Fresh P (o, count) and Q (count, i), drawn on the CPU: the same on every device."""
    assert like.lora_p is not None and like.lora_q is not None
    return torch.randn(like.lora_p.shape[0], count) * 0.02, torch.randn(count, like.lora_q.shape[1]) * 0.02


def _stacked(*parts: Tensor) -> Tensor:
    """diag(e_1) Q_1, diag(e_2) Q_2 ... one below the other, of e_1, e_2 ... Q_1, Q_2 ..."""
    half = len(parts) // 2
    return torch.cat([e[:, None] * q for e, q in zip(parts[:half], parts[half:])])


def _beside(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


class Growing(Triplets):
    """`x (..., dim_in) -> alpha / (r + 1e-5) * P diag(e) Q dropout(x) (..., dim_out)`."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(dim_in, dim_out, rank, alpha, dropout)
        # A leaf of the graph whose gradient is S, or with the shape of W that of D; None: nothing is measured
        self.sink: Tensor | None = None

    @property
    def scale(self) -> float:
        """s of the equations."""
        return self.fixed / (self.rank + 1e-5)

    @property
    def rank(self) -> int:
        """Triplets in use."""
        return sum(len(e) for _, e, _ in self.blocks() if e is not None)

    def suffixes(self) -> list[str]:
        """Of the names of all blocks, "" first."""
        found = [""]
        while getattr(self, f"lora_p{len(found)}", None) is not None:
            found.append(str(len(found)))
        return found

    def blocks(self) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """P, e and Q of each block; a reserve has no e."""
        return [(getattr(self, f"lora_p{s}"), getattr(self, f"lora_e{s}", None), getattr(self, f"lora_q{s}"))
                for s in self.suffixes()]  # fmt: skip

    @property
    def reserve(self) -> str | None:
        """The suffix of the block that waits."""
        last = self.suffixes()[-1]
        return last if getattr(self, f"lora_e{last}", None) is None else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(e) Q and P of all blocks, the reserve among them."""
        blocks = self.blocks()
        if len(blocks) == 1:
            return super().factors()
        values = [q.new_full((len(q),), RESERVE) if e is None else e for _, e, q in blocks]
        return recomputable(_stacked, *values, *(q for _, _, q in blocks)), recomputable(
            _beside, *(p for p, _, _ in blocks)
        )

    def matrices(self) -> list[Tensor]:
        """P^T and Q of the first block, and of every direction that came later by itself, as (n, 1, d)."""
        later = [m[:, None] for p, _, q in self.blocks()[1:] for m in (p.T, q)]
        return [*super().matrices(), *later]

    def measure(self, whole: bool | None) -> None:
        """Measure from now on: `whole` the gradient of D, else S; None: nothing any more."""
        assert self.lora_p is not None and self.lora_q is not None
        p, q = self.lora_p, self.lora_q
        zero = torch.zeros((), device=p.device)
        shown = zero.expand(len(p), q.shape[1]) if whole else zero
        self.sink = None if whole is None else shown.requires_grad_()

    def sensitivity(self, gradient: Tensor) -> Tensor:
        """S from the gradient of D (o, i)."""
        return _sensitivity(self.delta(), gradient)

    @staticmethod
    def add_group(parts: tuple[tuple[Growing, int, int], ...], x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """`y[..., start:stop] += delta(x)` for all parts of one projection at once; y is changed in place and returned."""
        x = dropped(x, parts[0][0].drop)
        slices = tuple((start, stop, part.scale) for part, start, stop in parts)
        factors = [f for part, _, _ in parts for f in part.factors()]
        y = add_low_rank(x, y, slices, factors)
        sinks = [part.sink for part, _, _ in parts if part.sink is not None]
        if len(sinks) == len(parts) and y.requires_grad and not exact():
            return _Watched.apply(y, x, slices, len(sinks), *sinks, *factors)
        return y


class OfGrowing(OfTriplets):
    """Methods whose triplets grow: the blocks, and what is measured of their projections while they are trained."""

    scores_mean: Tensor  # (n,) of all projections, in a fit
    scores_spread: Tensor

    def growing(self) -> dict[str, Growing]:
        """The modules by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Growing)}

    # -- measuring --------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Measure from now on."""
        service, parts = self.training_service, self.growing().values()
        device = next(self.parameters()).device
        for kind in ("mean", "spread"):
            self.register_buffer(f"scores_{kind}", torch.zeros(len(parts), device=device), persistent=False)
        for part in parts:
            part.measure(whole=service is not None and service.parts > 1)

    def unwatch(self) -> None:
        """Measure nothing any more, and drop what was measured."""
        forget(self)
        for part in self.growing().values():
            part.measure(None)

    def clear(self) -> None:
        """Forget what passes since the last step have measured."""
        for part in self.growing().values():
            if part.sink is not None:
                part.sink.grad = None

    def sensitivities(self) -> Tensor:
        """I of every projection (n,), the same on all processes; sinks are empty afterwards."""
        service: Any = self.training_service
        reduce, factor = (lambda g: g), 1.0
        if service is not None:
            reduce, factor = service.reduce, service.factor
        parts = self.growing().values()
        sinks = [part.sink for part in parts]
        found = []
        for part, sink in zip(parts, sinks):
            assert sink is not None
            gradient = torch.zeros(sink.shape, device=sink.device) if sink.grad is None else sink.grad
            found.append(part.sensitivity(reduce(gradient)) if sink.ndim else gradient)
        mine = sum(s is not None and s.grad is not None for s in sinks)
        measured = reduce(torch.tensor(float(mine), device=found[0].device))  # a process may have had no batch
        if not mine and any(p.grad is not None for p in self.parameters()) and not measured.item():
            raise ConfigError(
                f"{self.method}: its parameters have gradients, and nothing was measured: the forward pass ran inside of "
                "zoo.second_order, or before hooks.fit_start. It grows in training with ordinary first derivatives alone."
            )
        self.clear()
        return factor * torch.stack(found)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def reserve(self, name: str, part: Growing, count: int) -> str:
        """Directions that wait; returns the suffix of their names."""
        suffix = str(len(part.suffixes()))
        p, q = _directions(part, count)
        self.grow(f"{name}.lora_p{suffix}", p, like=f"{name}.lora_p")
        self.grow(f"{name}.lora_q{suffix}", q, like=f"{name}.lora_q")
        return suffix

    def extend(self, name: str, part: Growing, gain: int, more: int) -> None:
        """A projection gets `gain` directions, and `more` others wait from then on."""
        waiting = part.reserve
        if waiting is None:
            waiting = self.reserve(name, part, gain)
            value = 0.0
        else:
            value = RESERVE
            if gain < len(part.get_parameter(f"lora_q{waiting}")):
                self.resize(f"{name}.lora_p{waiting}", keep=range(gain), dim=1)
                self.resize(f"{name}.lora_q{waiting}", keep=range(gain))
        self.grow(f"{name}.lora_e{waiting}", torch.full((gain,), value), like=f"{name}.lora_e")
        if more:
            self.reserve(name, part, more)

    def drop_reserve(self, name: str, part: Growing) -> None:
        """Nothing waits any more."""
        if (waiting := part.reserve) is not None:
            self.drop(f"{name}.lora_p{waiting}", f"{name}.lora_q{waiting}")

    def fold(self, name: str, part: Growing) -> None:
        """Make one block of all."""
        later = part.suffixes()[1:]
        if later:
            rank = part.rank
            for which in NAMES:
                dim = int(which == "lora_p")
                more = torch.cat([part.get_parameter(which + s) for s in later], dim).detach()
                self.resize(f"{name}.{which}", rows=rank, new=more, dim=dim)
            self.drop(*(f"{name}.{which}{s}" for s in later for which in NAMES))


def _sensitivity(change: Tensor, gradient: Tensor) -> Tensor:
    return (change.float() * gradient.float()).abs().sum() / math.sqrt(gradient.numel())


class _Watched(torch.autograd.Function):
    """y as it is; the gradients of the sinks are what is measured of the changes D_j of its slices."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, slices: tuple[tuple[int, int, float], ...], count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.slices, ctx.whole, ctx.count = slices, tensors[0].ndim > 0, count
        ctx.save_for_backward(x, *tensors[count:])
        if torch.compiler.is_compiling():
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *factors = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]).to(grad.dtype), grad.reshape(-1, grad.shape[-1])
        found = []
        for (start, stop, scale), q, p in zip(ctx.slices, factors[::2], factors[1::2]):
            gradient = g[:, start:stop].T @ rows
            found.append(gradient.float() if ctx.whole else _sensitivity(scale * (p @ q), gradient))
        return (grad, None, None, None, *found, *[None] * len(factors))
