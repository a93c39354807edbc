"""Low-rank changes behind gates, and a search that trains changes and gates in turn (for `zoo.adapters.diffora`).

    y = W x + b + sigmoid(a) s B A x        A (r, i), B (o, r), a one number; a = 0, B = 0 at the start

    in turn     A, B and the head on one half of the batches, a on the other half; each with the other fixed (first order)

In memory: the gate is multiplied to B, so backward needs what it needs without a gate, and o r numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.adapters.base import Adapter
from zoo.adapters.parts.low_rank import LowRank
from zoo.adapters.parts.moved import check_labels
from zoo.errors import ConfigError, DataError
from zoo.host import Host
from zoo.points import Points
from zoo.tasks.base import Task

__all__ = ["Borrowed", "Gated", "Relaxed", "search", "unequal"]


class Gated(LowRank):
    """`x (..., dim_in) -> sigmoid(a) s B A x (..., dim_out)`."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, scale: float) -> None:
        super().__init__(dim_in, dim_out, rank, scale)
        self.gate = nn.Parameter(torch.zeros(()))

    def scaled_b(self) -> Tensor:
        """sigmoid(a) B (o, r)."""
        return torch.sigmoid(self.gate) * self.lora_b


class Borrowed(nn.Module):
    """A low-rank change that belongs to several points, at one of them."""

    def __init__(self, pair: LowRank) -> None:
        super().__init__()
        self.shared = (pair,)
        self.scale = pair.scale
        self.drop = nn.Dropout(pair.drop.p)

    @property
    def lora_a(self) -> Tensor:
        """A (r, i)."""
        return self.shared[0].lora_a

    def scaled_b(self) -> Tensor:
        """B (o, r)."""
        return self.shared[0].scaled_b()

    def delta(self) -> Tensor:
        """The change of W (o, i)."""
        return self.shared[0].delta()

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        return self.scale * nn.functional.linear(nn.functional.linear(self.drop(x), self.lora_a), self.scaled_b())

    add_group = staticmethod(LowRank.add_group)  # it reads no more of a part than is here


@dataclass(eq=False)
class Relaxed(Adapter):
    """What stands in a model while it is searched: a gated change at every target. It is never saved."""

    rank: int = 8
    scale: float = 1.0
    targets: str | tuple[str, ...] = "all-linear"

    method = "diffora-search"

    def attach(self, points: Points) -> None:
        """A gated low-rank change at each target."""
        for point in points.linears(self.targets):
            point.add(Gated(point.dim_in, point.dim_out, self.rank, self.scale))


class _Wide:
    """An optimizer on float32 copies of parameters, which are too coarse for its steps in half precision."""

    def __init__(self, kind: type[torch.optim.Optimizer], parameters: Sequence[nn.Parameter], **options: Any) -> None:
        self.parameters = list(parameters)
        self.wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.parameters]
        self.optimizer = kind([w.requires_grad_(True) for w in self.wide], **options)

    def step(self, loss: Tensor, told: str) -> None:
        """One step down the gradient of the loss; `told` is said of it where it is not finite."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if not math.isfinite(loss.item()) or not all(bool(g.isfinite().all()) for g in gradients if g is not None):
            raise DataError(
                f"Loss or gradients of {told} of the search are NaN or Inf (loss {loss.item()}). Look for them in the data and "
                "in the backbone's weights, lower search_lr, or calibrate in float32."
            )
        for w, gradient in zip(self.wide, gradients, strict=True):
            w.grad = None if gradient is None else gradient.to(w.dtype)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, w in zip(self.parameters, self.wide, strict=True):
                parameter.copy_(w)


def search(
    model: Host,
    relaxed: Adapter,
    batches: Iterable[Any],
    task: Task,
    *,
    warmup: int,
    steps: int,
    lr: float,
    gate_lr: float,
    gate_decay: float,
    held_out: bool,
) -> dict[str, float]:
    """The gates a of an attached `Relaxed`, by point: `warmup` steps of A, B and head, and `steps` of these and of a in turn.

    Every second batch is for the gates alone. The head gets its values back. `batches` are the same on every process and in
    every pass, so each process finds the same, and no batch of one half ever comes to the other.

    Raises:
        DataError: no batch, one batch that should be two halves, a loss or gradients that are not finite.
    """
    gates = {n.removesuffix(".gate"): p for n, p in relaxed.named_parameters() if n.endswith(".gate")}
    factors = [p for n, p in relaxed.named_parameters() if not n.endswith(".gate")]
    head = [p for p in model.head.parameters() if p.requires_grad]
    starts = [p.detach().clone() for p in head]
    first = _Wide(torch.optim.AdamW, [*factors, *head], lr=lr)
    second = _Wide(torch.optim.Adam, list(gates.values()), lr=gate_lr, weight_decay=gate_decay)
    with zoo.probing(model, task) as probe:
        model.requires_grad_(False)
        for parameter in (*first.parameters, *second.parameters):
            parameter.requires_grad_(True)
        try:
            for step, (one, other) in zip(range(warmup + steps), _pairs(batches, held_out), strict=False):
                for (inputs, targets), optimizer in ((one, first), (other, second)):
                    if optimizer is second and step < warmup:
                        continue
                    check_labels(model, task, targets)
                    optimizer.step(probe.loss(inputs, targets), f"step {step + 1}")
        finally:
            with torch.no_grad():
                for parameter, start in zip(head, starts, strict=True):
                    parameter.copy_(start)
    return {name: float(w.detach()) for name, w in zip(gates, second.wide, strict=True)}


def _pairs(batches: Any, held_out: bool) -> Iterator[tuple[Any, Any]]:
    """A batch of each half, pass by pass without end; those of a fit are augmented anew each time. The last of an odd number is
    left out. Without halves each batch is both."""
    if iter(batches) is batches:
        batches = list(batches)
    number = 0
    while True:
        source = iter(batches.view(number) if hasattr(batches, "view") else batches)
        found = 0
        for found, one in enumerate(source, 1):
            if not held_out:
                yield one, one
            elif (other := next(source, None)) is not None:
                yield one, other
            elif found == 1:
                raise DataError(
                    "There is one batch, and the search needs two halves of the data. Give more data, a smaller batch_size, or "
                    "held_out=False."
                )
        if not found:
            raise DataError("There was no batch to search with; give at least one batch of (inputs, targets).")
        number += 1


def unequal(gates: dict[str, float], names: Sequence[str]) -> None:
    """Raise ConfigError where a layer's gates tell nothing of its modules: they are all the same."""
    if len({gates[name] for name in names}) == 1:
        raise ConfigError(
            f"diffora: the gates of {', '.join(names)} are all {gates[names[0]]:g} after the search, so nothing says which of "
            "them to keep. Search longer (steps=), or look why no gradient reaches them."
        )
