"""Averages of what is trained: `zoo.fit(model, train, ema=0.999)`.

After every optimizer step `average <- a average + (1 - a) trained`, for every trained parameter of the active adapters and of the
head, with a = min(ema, (1 + n) / (10 + n)) at step n, so that a short run is no average of its beginning. Epochs are measured and
chosen by the averages, and the model holds them afterwards; training itself goes on with what is trained. They are in the
checkpoints. A parameter that changes its shape on the way begins its average anew, and so do entries of one that are new in it
(`Adapter.rearranged`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.train.checkpoint import parameters_of

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Ema"]


class Ema:
    """Takes part in a run as a callback does."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay = model, decay
        self.steps = 0
        self.values: dict[str, Tensor] = {}
        self.names: set[str] = set()  # of all that the run trains, whatever a step leaves out

    def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
        """What is trained."""
        self.names = set(optimizer.parameters)

    def after_step(self, model: Any, step: int) -> None:
        """Follow."""
        rate = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        rests = {n: p for n, p in parameters_of(self.model).items() if n in self.names}  # some of them, for this step
        trained = {**rests, **self.model.parameters_to_train()}
        adapters: Any = self.model.adapters
        moved = {f"{name}/{n}": source for name, a in adapters.items() for n, source in a.rearranged.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                value = self.values.get(name)
                if value is not None and name in moved:
                    source = moved[name]
                    value = torch.where(source >= 0, value[source.clamp(min=0)], parameter.to(value))
                    self.values[name] = value
                if value is None or value.shape != parameter.shape:
                    self.values[name] = parameter.detach().float().clone()
                else:
                    value.lerp_(parameter.to(value), rate)
        for name in self.values.keys() - trained.keys():
            del self.values[name]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The model holds the averages in this block."""
        held = {n: p.detach().clone() for n, p in self.model.parameters_to_train().items() if n in self.values}
        self.put()
        try:
            yield
        finally:
            self._fill(held)

    def put(self) -> None:
        """The model holds the averages from now on."""
        self._fill(self.values)

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.parameters_to_train().items():
                if name in values and values[name].shape == parameter.shape:
                    parameter.copy_(values[name])

    def extra_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"steps": self.steps, "values": dict(self.values)}

    def load_extra_state(self, model: Any, state: Mapping[str, Any]) -> None:
        """Back from the checkpoint."""
        self.steps = state["steps"]
        self.values = {name: value.to(self.model.device) for name, value in state["values"].items()}
