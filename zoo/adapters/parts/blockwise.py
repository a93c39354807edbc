"""A pruned network block by block: what enters a block is what the blocks before it, pruned and tuned, hand on.

The inputs of the pruning criteria come so, and a block is reconstructed so: what the adapter has in it is tuned until the block
answers as the dense one does to the same tokens, by the mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.adapters.base import Adapter
from zoo.adapters.parts.deciding import deciding
from zoo.engine.blocks import BlockRunner, require_plain, sequences
from zoo.errors import ConfigError, DataError
from zoo.host import Host
from zoo.points import LinearPoint

__all__ = ["Samples", "by_block", "reconstruct", "untouched"]

Prune = Callable[[list[LinearPoint], Callable[[], None]], None]  # points, and a run over all samples up to them


def by_block(model: Host, points: Iterable[LinearPoint]) -> list[tuple[str, list[LinearPoint]]]:
    """Points in forward order by the block that they are in; one outside of blocks stands alone, under its own name."""
    names = [p.name for p in model.points if p.kind == "block"]
    found: dict[str, list[LinearPoint]] = {}
    for point in points:
        inside = next((name for name in names if point.name.startswith(f"{name}.")), point.name)
        found.setdefault(inside, []).append(point)
    return list(found.items())


@dataclass(eq=False)
class Samples:
    """The first samples of the training data, in batches."""

    probe: Any  # of `zoo.probing`
    batches: list[tuple[Any, Any]]

    @classmethod
    def of(cls, probe: Any, batches: Iterable[Any], count: int) -> Samples:
        """At least one batch, and `count` samples if there are as many.

        Raises:
            DataError: there is no batch.
        """
        found, seen = [], 0
        for inputs, targets in batches:
            found.append((probe.moved(inputs, cast=True), probe.moved(targets)))
            seen += _length(inputs)
            if seen >= count:
                break
        if not found:
            raise DataError("There was no batch to prune by; give at least one batch of (inputs, targets).")
        return cls(probe, found)

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(_length(inputs) for inputs, _ in self.batches)

    def run(self) -> None:
        """A forward pass over all of them, as in training."""
        for inputs, targets in self.batches:
            self.probe.loss(inputs, targets)

    def calls(self) -> Iterator[tuple[Any, ...]]:
        """The arguments of the model's calls.

        Raises:
            ConfigError: inputs with names.
        """
        for inputs, _ in self.batches:
            if isinstance(inputs, Mapping):
                raise ConfigError(
                    "perp: blocks are reconstructed from batches of plain inputs, and these have names "
                    f"({', '.join(map(str, inputs))}). Use reconstruct=0."
                )
            yield tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _length(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    return len(inputs[0]) if isinstance(inputs, (tuple, list)) else len(inputs)


@contextmanager
def untouched(adapter: Adapter) -> Iterator[None]:
    """A context whose failure leaves the adapter's numbers as they were."""
    before = {k: v.detach().clone() for k, v in [*adapter.named_parameters(), *adapter.named_buffers()]}
    try:
        with deciding(adapter):
            yield
    except BaseException:
        with torch.no_grad():
            for key, value in [*adapter.named_parameters(), *adapter.named_buffers()]:
                value.copy_(before[key])
        raise


@torch.no_grad()
def reconstruct(
    model: Host, adapter: Adapter, points: list[LinearPoint], samples: Samples, prune: Prune, steps: int, lr: float
) -> dict[str, list[float]]:
    """Prune and tune one block after the other; the mean squared error of each before and after.

    Raises:
        AttachError: the family's blocks are not a plain sequence. ConfigError: a point outside of the blocks.
        CombinationError: an adapter in use that keeps something from block to block.
    """
    require_plain(model.family, f"{adapter.method} with reconstruct")
    blocks = sequences(p for p in model.points if p.kind == "block")
    names = {p.name for run in blocks for p in run}
    groups = dict(by_block(model, points))
    if outside := [name for name in groups if name not in names]:
        raise ConfigError(
            f"{adapter.method}: '{outside[0]}' is in no block, so it cannot be reconstructed with one. Leave it out of the "
            "targets, or use reconstruct=0."
        )
    errors: dict[str, list[float]] = {}
    for sequence in blocks:
        run = BlockRunner(model, sequence)
        cursors = [run.start(*call) for call in samples.calls()]
        for at, name in enumerate(run.names):
            if name in groups:

                def passes(at: int = at, run: BlockRunner = run, cursors: list[Any] = cursors) -> None:
                    for cursor in cursors:
                        run.block(at, cursor)(cursor.tokens)

                prune(groups[name], passes)
                with zoo.damped(model, adapter.name, 0.0):
                    wanted = [run.block(at, cursor)(cursor.tokens) for cursor in cursors]
                own = [p for n, p in adapter.named_parameters() if n.startswith(f"{name}.")]
                answers = [(run.block(at, cursor), cursor.tokens) for cursor in cursors]
                errors[name] = _tune(answers, wanted, own, steps, lr)
            cursors = [run.advance(cursor, 1) for cursor in cursors]
    return errors


def _error(answers: list[tuple[Callable[[Tensor], Tensor], Tensor]], wanted: list[Tensor]) -> float:
    total = sum(float(F.mse_loss(block(x).float(), y.float())) * len(y) for (block, x), y in zip(answers, wanted))
    return total / sum(map(len, wanted))


def _tune(
    answers: list[tuple[Callable[[Tensor], Tensor], Tensor]],
    wanted: list[Tensor],
    own: list[Any],
    steps: int,
    lr: float,
) -> list[float]:
    """AdamW without weight decay, batch after batch; a tenth of the steps warms up, then the rate falls to 0, linearly."""
    before = _error(answers, wanted)
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.0)
    warm = steps // 10
    for step in range(steps):
        (block, x), y = answers[step % len(answers)], wanted[step % len(wanted)]
        for group in optimizer.param_groups:
            group["lr"] = lr * (step / warm if step < warm else (steps - step) / (steps - warm))
        with torch.enable_grad():
            for parameter in own:
                parameter.requires_grad_(True)
            loss = F.mse_loss(block(x).float(), y.float())
        if not bool(loss.isfinite()):
            raise DataError(
                f"The error of a reconstructed block is {float(loss)} in step {step + 1}. Lower reconstruct_lr, or look for NaN "
                "and Inf in the samples."
            )
        for parameter, gradient in zip(own, torch.autograd.grad(loss, own, allow_unused=True)):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return [before, _error(answers, wanted)]
