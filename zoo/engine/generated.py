"""Generated weights: one module of an adapter makes the weights of many points, once for each forward pass.

`points.generate(name, generator, *values)` registers a generator (a module, shared by the points) and gives a `Made`. Before the
backbone runs, `generator(*values)` is called, with what `values` (of `points.context`: a task's name, say) are in this pass; the
adapter's modules read the result in their forward:

    made = points.generate("hyper", HyperNetwork(...), points.context("task", per="batch", choices=tasks))    attach
    weight = self.made.get()[self.index]                                                                      forward

Of values for each sample it may make something for each sample, which the modules read by `self.made.rows(x)`.

The result belongs to the frame of the forward pass (`zoo.engine.context`). So a block that is recomputed in backward reads the
very tensors of its forward, and their graph ends in one run of the generator; per-sample adapters each have their own; a compiled
model has the generator at the head of its graph. In evaluation without gradients the result is kept, for each combination of
values, until a parameter of the generator changes (a change through `parameter.data`, which autograd cannot see, is noticed only
at the next `model.train()` or `model.eval()`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engine.context import Context, Value, Want, spread
from zoo.engine.memory import state_of
from zoo.errors import ContextError

__all__ = ["Made"]


@dataclass(eq=False)
class Made:
    """What a generator made for the forward pass under way."""

    context: Context
    owner: str
    name: str
    generator: nn.Module
    values: tuple[Value, ...] = ()
    windows: bool = False  # whether rows may be windows of an image
    # values -> the state of the generator's tensors, these tensors, and the result
    _kept: dict[tuple[Any, ...], tuple[Any, list[Tensor], Any]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Under which the result stands among the values of a frame."""
        return (self.owner, f"made.{self.name}")

    def get(self) -> Any:
        """The generator's result.

        Raises:
            ContextError: outside of a forward pass of the model.
        """
        frame = self.context.frame
        if frame is None or self.key not in frame.values:
            raise ContextError(
                f"'{self.owner}' read what '{self.name}' generates outside of a forward pass; it is there only inside of "
                "model(...) and model.features(...)."
            )
        return frame.values[self.key]

    def rows(self, like: Tensor) -> Tensor:
        """(len(like), ...) of a result (n, ...) that has one row for each sample, as `Value.rows` gives them.

        Raises:
            ContextError: as `Value.rows`.
        """
        return spread(Want(self.owner, self.name, windows=self.windows), self.get(), like)

    def make(self) -> Any:
        """Called once at the beginning of a forward pass."""
        given = tuple(value.get() if value.given else None for value in self.values)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.generator.training:
            return self.generator(*given)
        if any(isinstance(value, Tensor) for value in given):  # two equal ones would not be recognised
            return self.generator(*given)
        tensors = [*self.generator.parameters(), *self.generator.buffers()]
        state = state_of(tensors)
        kept = self._kept.get(given)
        if kept is not None and state is not None and kept[0] == state:
            return kept[2]
        result = self.generator(*given)
        if state is not None:
            # Aliases are held with the tensors: nothing else can come to stand at their addresses.
            self._kept[given] = (state, [*tensors, *(t.detach() for t in tensors)], result)
        return result

    def forget(self) -> None:
        """Drop what is kept for evaluation."""
        self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model keeps nothing: its tensors are others."""
        return {**self.__dict__, "_kept": {}}
