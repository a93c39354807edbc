"""How far every entry moves in a full fine-tuning, after which all of the model is as it was (for `zoo.adapters.lt_sft`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, DataError
from zoo.host import Host
from zoo.points import LinearPoint, Points
from zoo.tasks.base import Task

__all__ = ["Slot", "check_labels", "linear_slots", "moved"]

CLIP = 1.0


@dataclass(frozen=True, eq=False)
class Slot:
    """The `part` ("weight" or "bias") of a projection, or of a slice of a fused one."""

    point: LinearPoint
    part: str

    @property
    def key(self) -> str:
        """`<point>.<part>`."""
        return f"{self.point.name}.{self.part}"

    @property
    def size(self) -> int:
        """How many numbers."""
        return self.point.dim_out * (self.point.dim_in if self.part == "weight" else 1)

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module and the name of the parameter that holds it, perhaps among others."""
        return self.point.holder(self.part) or (self.point.module, self.part)

    def slice(self, whole: Tensor) -> Tensor:
        """Its rows of a tensor shaped like the parameter, flat: (size,)."""
        if self.place[0] is not self.point.module:  # a bias beside the projection is this point's alone
            return whole.flatten()
        return whole[self.point.start : self.point.stop].flatten()


def linear_slots(points: Points) -> list[Slot]:
    """Weights and biases of all projections of tokens inside of blocks.

    Raises:
        AttachError: there is none.
    """
    found = [p for p in points.require("linear", "lt-sft") if p.block is not None and type(p.module) is nn.Linear]
    if not found:
        if kept := next((k for p in points if (k := getattr(p.module, "kept_in", ""))), ""):
            raise AttachError(
                f"The projections of {points.backbone} are quantised (kept in {kept}): single entries of them cannot be tuned. "
                "Use a method that adds to frozen weights, such as lora, or the backbone that was not quantised."
            )
        raise AttachError(f"{points.backbone} has no projection inside of a block whose single entries could be tuned.")
    parts = ("weight", "bias")
    return [Slot(p, part) for p in found for part in parts if part == "weight" or p.holder(part) is not None]


def moved(
    model: Host,
    slots: Sequence[Slot],
    batches: Iterable[Any],
    task: Task,
    *,
    epochs: int,
    lr: float,
    l1: float = 0.0,
) -> tuple[list[Tensor], dict[str, Any]]:
    """|theta_1 - theta_0| of every slot, (size,) in float32, and what was done.

    All slots and the head are trained by AdamW, learning rate falling to 0, on weights in float32 at least; then they get their
    values back. `batches` are the same on every process, so each finds the same.

    Raises:
        AttachError: weights that cannot be trained. DataError: no batch, or a loss or gradients that are not finite.
    """
    places = {(id(module), name): (module, name) for module, name in (slot.place for slot in slots)}
    chosen: dict[tuple[int, str], nn.Parameter] = {}
    for key, (module, name) in places.items():
        parameter = model.in_use(module, name)
        if parameter is None:
            raise AttachError(
                f"Every '{name}' is trained at first, and a {type(module).__name__} has none that can be: use a method that adds "
                "to frozen weights, such as lora, or the backbone that was not quantised."
            )
        chosen[key] = parameter
    if not hasattr(batches, "__len__"):
        batches = list(batches)
    total = epochs * len(batches)  # type: ignore[arg-type]
    if not total:
        raise DataError("There was no batch to tune with; give at least one batch of (inputs, targets).")
    trained = [*chosen.values(), *model.head.parameters()]
    starts = [p.detach().clone() for p in trained]
    wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in trained]
    optimizer = torch.optim.AdamW([w.requires_grad_(True) for w in wide], lr=lr, weight_decay=0.0)
    step = 0
    with zoo.probing(model, task) as probe:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        try:
            for inputs, targets in _rounds(batches, epochs):
                check_labels(model, task, targets)
                loss = probe.loss(inputs, targets)
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                _finite(loss, gradients, step)
                with torch.no_grad():
                    for i, (w, gradient) in enumerate(zip(wide, gradients, strict=True)):
                        w.grad = None if gradient is None else gradient.to(w.dtype)
                        if l1 and i < len(chosen) and w.grad is not None:
                            w.grad.add_((w - starts[i]).sign_(), alpha=l1)
                    nn.utils.clip_grad_norm_(wide, CLIP)
                    for group in optimizer.param_groups:
                        group["lr"] = lr * (1 - step / total)
                    optimizer.step()
                    for parameter, w in zip(trained, wide, strict=True):
                        parameter.copy_(w)
                step += 1
        finally:
            with torch.no_grad():
                for parameter, start in zip(trained, starts, strict=True):
                    parameter.copy_(start)
    if not step:
        raise DataError("There was no batch to tune with; give at least one batch of (inputs, targets).")
    with torch.no_grad():
        found = {key: (wide[i] - starts[i]).abs_().float() for i, key in enumerate(chosen)}
    changes = [slot.slice(found[id(slot.place[0]), slot.place[1]]) for slot in slots]
    return changes, {"steps": step, "epochs": epochs}


def check_labels(model: Host, task: Task, targets: Any) -> None:
    """Raise DataError unless labels of a classification have outputs in the head."""
    if task.name != "classify" or not isinstance(targets, Tensor) or targets.is_floating_point():
        return
    if int(targets.min()) < 0 or int(targets.max()) >= model.num_classes:
        raise DataError(
            f"Labels of a calibration batch run from {int(targets.min())} to {int(targets.max())}; the head has "
            f"{model.num_classes} classes. Load the model with num_classes= of the data."
        )


def _rounds(batches: Any, epochs: int) -> Iterator[tuple[Any, Any]]:
    """All batches, epoch by epoch; those of a fit are augmented anew each time."""
    for epoch in range(epochs):
        yield from batches.view(epoch) if hasattr(batches, "view") else batches


def _finite(loss: Tensor, gradients: Sequence[Tensor | None], step: int) -> None:
    if not math.isfinite(loss.item()) or not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
        raise DataError(
            f"Loss or gradients of step {step + 1} of full fine-tuning are NaN or Inf (loss {loss.item()}). Look for them in the "
            "data and in the backbone's weights, lower full_lr, or calibrate in float32."
        )
