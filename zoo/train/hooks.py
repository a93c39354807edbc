"""The training hooks of the active adapters, for `zoo.fit` and for your own loop.

    hooks = zoo.training_hooks(model)
    hooks.calibrate(batches)                             # before the optimizer is made
    hooks.fit_start(optimizer, total_steps)
    for step, (inputs, targets) in enumerate(batches):
        hooks.step_start(step)
        outputs = model(inputs)
        loss = cross_entropy(outputs, targets) + hooks.extra_loss(outputs, targets)
        loss.backward()
        hooks.after_backward(step)                       # then clip
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad(set_to_none=True)
        hooks.step_end(step)
    hooks.fit_end()

`optimizer` is any torch optimizer; methods that need its services get it wrapped in an `OptimizerService`. What a method
does not define costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from zoo.adapters.base import Adapter
from zoo.errors import ConfigError
from zoo.train.optimizer import OptimizerService

if TYPE_CHECKING:
    from zoo.model import Model
    from zoo.tasks import Task

__all__ = ["HOOKS", "Hooks", "Unheard", "training_hooks"]

HOOKS = (
    "fit_start",
    "epoch_start",
    "step_start",
    "extra_loss",
    "after_backward",
    "after_step",
    "step_end",
    "epoch_end",
    "eval_start",
    "eval_end",
    "fit_end",
)


class Hooks:
    """Calls the hooks of every active adapter, in the order of attachment, then those of `callbacks`.

    Args:
        model: the model; adapters that are switched off take no part.
        callbacks: further objects with any of these methods, called as an adapter's would be (`step_start(model, step)`).
    """

    def __init__(self, model: Model, callbacks: Sequence[Any] = ()) -> None:
        self.model = model
        self.callbacks = tuple(callbacks)

    @property
    def receivers(self) -> list[Any]:
        return [*self.adapters, *self.callbacks]

    @property
    def adapters(self) -> list[Adapter]:
        """The active adapters."""
        return [self.model.adapters[name] for name in self.model.active]  # type: ignore[misc]

    def _call(self, hook: str, *arguments: Any) -> list[Any]:
        """An adapter has every hook; a callback has those that it defines."""
        called = [getattr(adapter, hook)(self.model, *arguments) for adapter in self.adapters]
        return called + [getattr(c, hook)(self.model, *arguments) for c in self.callbacks if hasattr(c, hook)]

    @property
    def needs_calibration(self) -> bool:
        """Whether an active adapter has to see data before its parameters are final, and has not yet (it has no `plan`)."""
        return any(_uncalibrated(r) for r in self.receivers)

    def calibrate(self, batches: Iterable[tuple[Any, Tensor]], task: Task | None = None) -> None:
        """Before training, and before an optimizer is made. `batches` must be iterable more than once.

        An adapter that has a `plan` was calibrated before, or was loaded, and is left alone. `task`: what it is trained for, by
        default what the model is for; handed to those whose `calibrate` asks for it.
        """
        for receiver in self.receivers:
            if _uncalibrated(receiver):
                self.calibrate_one(receiver, batches, task)

    def calibrate_one(self, receiver: Any, batches: Iterable[tuple[Any, Tensor]], task: Task | None = None) -> None:
        """As `calibrate`, for one adapter or callback, whatever it knows already."""
        told = task is not None and "task" in inspect.signature(receiver.calibrate).parameters
        receiver.calibrate(self.model, batches, **({"task": task} if told else {}))

    def fit_start(self, optimizer: OptimizerService | Optimizer, total_steps: int) -> None:
        """Training begins."""
        if isinstance(optimizer, Optimizer):
            optimizer = OptimizerService.wrap(optimizer, self.model, total_steps=total_steps)
        for adapter in self.adapters:
            adapter.join(optimizer)
        self._call("fit_start", optimizer, total_steps)

    def epoch_start(self, epoch: int) -> None:
        """An epoch (counted from 0) begins; not called again when training goes on in the middle of one."""
        self._call("epoch_start", epoch)

    def step_start(self, step: int) -> None:
        """In front of the forward pass of an optimizer step (counted from 0)."""
        self._call("step_start", step)

    def extra_loss(self, outputs: Any, targets: Any) -> Tensor | float:
        """The sum of the adapters' loss terms; 0.0 if none has one."""
        total: Tensor | float = 0.0
        for term in self._call("extra_loss", outputs, targets):
            if term is not None:
                total = total + term
        return total

    def after_backward(self, step: int) -> None:
        """Gradients are complete and unscaled, and not yet clipped."""
        self._call("after_backward", step)

    def after_step(self, step: int) -> None:
        """The optimizer has stepped; gradients are not yet zeroed."""
        self._call("after_step", step)

    def step_end(self, step: int) -> None:
        """A step is over, gradients are zeroed."""
        self._call("step_end", step)

    def epoch_end(self, epoch: int) -> None:
        """An epoch (counted from 0) is over; before its evaluation."""
        self._call("epoch_end", epoch)

    def by_layer(self) -> dict[str, dict[str, dict[str, float]]]:
        """What each layer has now, by adapter or class of a callback, and by what it is; without those that say nothing."""
        told = {n: a.by_layer(self.model) for n, a in zip(self.model.active, self.adapters, strict=True)}
        told |= {type(c).__name__: c.by_layer(self.model) for c in self.callbacks if hasattr(c, "by_layer")}
        found = {owner: {what: layers for what, layers in said.items() if layers} for owner, said in told.items()}
        return {owner: said for owner, said in found.items() if said}

    def eval_start(self) -> None:
        """An evaluation begins."""
        self._call("eval_start")

    def eval_end(self) -> None:
        """An evaluation is over."""
        self._call("eval_end")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """`eval_start` and `eval_end` around a block; what the first swapped in, the second takes out, also after an error."""
        self.eval_start()
        try:
            yield
        finally:
            self.eval_end()

    def fit_end(self) -> None:
        """Training is over, the chosen weights are in the model."""
        self._call("fit_end")
        for adapter in self.adapters:
            adapter.join(None)

    def ready(self) -> bool:
        """Whether every active adapter has reached what it trains towards (`Adapter.ready`)."""
        return all(adapter.ready() for adapter in self.adapters)


class Unheard(Hooks):
    """Hooks that nobody is told of: for a pass that is no part of the training."""

    def _call(self, hook: str, *arguments: Any) -> list[Any]:
        return []


class OwnLoop(Hooks):
    """Hooks that are called by hand: a step that was not ended is ended in front of the next; what was forgotten is said."""

    def __init__(self, model: Model, callbacks: Sequence[Any] = ()) -> None:
        super().__init__(model, callbacks)
        self._open: int | None = None  # the step whose `step_end` was not called yet

    def step_start(self, step: int) -> None:
        """In front of the forward pass of an optimizer step (counted from 0).

        Raises:
            ConfigError: an adapter was not calibrated, or plans its steps and was not told how many there are.
        """
        self._end()
        for name, adapter in zip(self.model.active, self.adapters):
            if _uncalibrated(adapter):
                raise ConfigError(
                    f"The adapter '{name}' ({adapter.method}) has to see data before it is trained. Call "
                    "hooks.calibrate(batches) before the optimizer is made."
                )
            if adapter.plans_steps and adapter.training_service is None:
                raise ConfigError(
                    f"The adapter '{name}' ({adapter.method}) has a schedule over all steps, and was not told how many there "
                    "are. Call hooks.fit_start(optimizer, total_steps) before the first step."
                )
        super().step_start(step)

    def after_step(self, step: int) -> None:
        """The optimizer has stepped; gradients are not yet zeroed."""
        super().after_step(step)
        self._open = step

    def step_end(self, step: int) -> None:
        """A step is over, gradients are zeroed."""
        self._open = None
        super().step_end(step)

    def fit_end(self) -> None:
        """Training is over."""
        self._end()
        super().fit_end()

    def _end(self) -> None:
        if self._open is not None:
            self.step_end(self._open)


def _uncalibrated(receiver: Any) -> bool:
    return getattr(receiver, "needs_calibration", False) and getattr(receiver, "plan", None) is None


def training_hooks(model: Model, callbacks: Sequence[Any] = ()) -> Hooks:
    """The training hooks of a model's active adapters, for your own loop; see `zoo.train.hooks`."""
    return OwnLoop(model, callbacks)
