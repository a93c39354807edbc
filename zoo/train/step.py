"""One optimizer step: forward and backward over the parts of a batch, sum over processes, hooks, clip, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.data.dataset import ImageDataset
from zoo.data.seeds import seed_everything
from zoo.errors import ConfigError, ZooError
from zoo.tasks import Classify, Task
from zoo.train.batches import Batch
from zoo.train.evaluation import autocast, input_dtype, supplied, to_device
from zoo.train.explained import check_gradient, explained
from zoo.train.hooks import Hooks
from zoo.train.optimizer import OptimizerService
from zoo.train.processes import Processes
from zoo.train.settings import Settings

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["LossScale", "Stepper", "TrainingError"]

SUMS = ("images", "loss", "extra", "hits", "labelled")


class TrainingError(ZooError, FloatingPointError):
    """The loss or the gradients became NaN or infinite."""


class LossScale:
    """What the loss is multiplied by in fp16, so that small gradients do not vanish.

    Halved when gradients overflow, doubled after `patience` steps without.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**16, patience: int = 2000) -> None:
        self.enabled, self.patience, self.good = enabled, patience, 0
        self.scale = scale if enabled else 1.0

    def update(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good >= self.patience:
            self.scale, self.good = self.scale * 2, 0

    def save(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self.good}

    def load(self, saved: dict[str, float]) -> None:
        self.scale, self.good = saved["scale"], int(saved["good"])


class Stepper:
    """Takes the steps; `sums` holds totals over the images since they were last set to zero (see `SUMS`)."""

    def __init__(
        self,
        model: Model,
        dataset: ImageDataset,
        service: OptimizerService,
        hooks: Hooks,
        processes: Processes,
        settings: Settings,
        task: Task,
    ) -> None:
        self.model, self.dataset, self.service, self.hooks = model, dataset, service, hooks
        self.processes, self.settings, self.task = processes, settings, task
        self.scale = LossScale(settings.precision == "fp16")
        self.device = processes.device
        self.dtype = input_dtype(model, settings.precision)
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(SUMS), dtype=exact, device=self.device)
        self._mix = _mixing(settings, model.num_classes)
        self._pending: tuple[int, Tensor, Any] | None = None

    def step(self, step: int, parts: Sequence[Batch], planned: int) -> None:
        """One optimizer step.

        Args:
            step: counted from 0.
            parts: this process's parts of the batch.
            planned: images of the whole batch; fewer may have come if some could not be read.

        Raises:
            TrainingError: loss or gradients are not finite (on a GPU it is noticed one step later, so as not to wait for it).
            DataError: a label has no output in the head.
        """
        settings, processes, service = self.settings, self.processes, self.service
        service.set_lr()
        batches = [self._to_device(b) if b.count else None for b in parts]
        service.batches = [b for b in batches if b is not None]
        seed_everything(settings.seed, "step", step)  # equal on all processes: a sampled rank or layer must be
        self.hooks.step_start(step)
        totals = torch.zeros_like(self.sums)
        for number, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            if batch is not None:
                seed_everything(settings.seed, "part", step, number * processes.world + processes.rank)
                self._backward(*batch, part.count, planned, totals)
        parameters = list(service.parameters.values())
        processes.add_gradients(parameters, totals)
        gradients = [p.grad for p in parameters if p.grad is not None]
        read = totals[0].item() if self.dataset.on_error == "skip" else planned
        service.factor = (planned / read if read else 1.0) / self.scale.scale
        if gradients and service.factor != 1.0:
            torch._foreach_mul_(gradients, service.factor)
        norm = _norm(gradients, totals)
        if self.scale.enabled:
            finite = math.isfinite(norm.item())
            self.scale.update(finite)
            if not finite and self.scale.scale > 1.0:
                self.sums += totals
                service.step_count += 1
                service.zero_grad()
                return
        self._watch(step, totals, norm)
        seed_everything(settings.seed, "update", step)
        self.hooks.after_backward(step)
        if settings.clip is not None and gradients:
            # adapters may have changed gradients, added or dropped parameters
            live = [p for p in service.parameters.values() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(live, settings.clip)
        service.step()
        self.hooks.after_step(step)
        service.zero_grad()
        service.batches = []
        self.hooks.step_end(step)
        self.sums += totals

    def _to_device(self, batch: Batch) -> tuple[Any, Tensor]:
        """(inputs, targets) of a part."""
        self.task.check_batch(self.model, self.dataset, batch.targets)
        return to_device(batch.inputs, self.device, self.dtype), to_device(batch.targets, self.device)

    def _backward(self, inputs: Any, targets: Tensor, count: int, planned: int, totals: Tensor) -> None:
        """Forward and backward of one part; the gradient is that of the mean over the whole batch."""
        labels = targets
        if self._mix is not None:
            if not isinstance(inputs, Tensor) or not 2 <= inputs.ndim <= 4:
                raise ConfigError(
                    "mixup and cutmix mix inputs that are one tensor of images or sounds; this task's are not."
                )
            if not isinstance(targets, Tensor) or targets.ndim > 2:
                raise ConfigError("mixup and cutmix mix images with classes of their own; these targets are maps.")
            shape = (
                inputs.shape
            )  # torchvision mixes (B, C, H, W): a spectrogram (B, T, mel) or a sound (B, n) has one channel
            pictures = inputs.reshape(shape[0], *([1] * (4 - inputs.ndim)), *shape[1:])
            pictures, targets = self._mix(pictures, targets)
            inputs = pictures.reshape(shape)
        given = supplied(self.model, self.task, inputs, targets, training=True)
        with autocast(self.device, self.settings.precision), given, explained(self.model, self.dataset, inputs):
            loss, outputs = self.task.loss(self.model, inputs, targets, self.settings.label_smoothing)
            extra = self.hooks.extra_loss(outputs, targets)
        check_gradient(loss + extra)
        (((loss + extra) * (count / planned)) * self.scale.scale).backward()
        with torch.no_grad():
            totals[0] += count
            totals[1] += loss.detach().to(totals.dtype) * count
            if isinstance(extra, Tensor):
                totals[2] += extra.detach().to(totals.dtype) * count
            if (
                isinstance(self.task, Classify)
                and self._mix is None
                and labels.ndim == 1
                and not labels.is_floating_point()
            ):
                totals[3] += (outputs.argmax(1) == labels).sum()
                totals[4] += count

    def _watch(self, step: int, totals: Tensor, norm: Tensor) -> None:
        """Raise if loss or gradients are not finite; on a GPU those of the step before, whose numbers have arrived by now."""
        values = torch.stack([totals[1], totals[2], norm.to(totals.dtype)])
        if values.device.type != "cuda":
            self._check(step, values)
            return
        self.check_pending()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (step, host, event)

    def check_pending(self) -> None:
        """Look at what is still on its way from the GPU."""
        if self._pending is not None:
            step, host, event = self._pending
            event.synchronize()
            self._pending = None
            self._check(step, host)

    def _check(self, step: int, values: Tensor) -> None:
        loss, extra, norm = values.tolist()
        if math.isfinite(loss) and math.isfinite(extra) and math.isfinite(norm):
            return
        what = (
            "loss" if not math.isfinite(loss) else "loss term of an adapter" if not math.isfinite(extra) else "gradient"
        )
        advice = "Try precision='bf16' or 'fp32'. " if self.settings.precision == "fp16" else ""
        raise TrainingError(
            f"The {what} became NaN or infinite at step {step} (learning rate {self.service.lr:g}). {advice}Lower lr (a third "
            "is a good next try), lengthen warmup, or set clip=1.0; if it happens at step 0, look for NaN in the images or the "
            "weights."
        )


def _norm(gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    """The norm over all gradients, 0 if there is none."""
    if not gradients:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(list(gradients))]))


def _mixing(settings: Settings, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup and cutmix of a batch (Zhang 2018, Yun 2019); with both, one of them at random."""
    if not (settings.mixup or settings.cutmix):
        return None
    from torchvision.transforms import v2

    ways: list[Any] = []
    if settings.mixup:
        ways.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
    if settings.cutmix:
        ways.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))
    return ways[0] if len(ways) == 1 else v2.RandomChoice(ways)  # type: ignore[no-any-return]
