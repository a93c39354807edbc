"""A fit that fails: before its first step it leaves the model as it was; after it, the error says what the model holds."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.train.states import State, take

if TYPE_CHECKING:
    from pathlib import Path

    from zoo.model import Model

__all__ = ["Before"]


class Before:
    """A model as it was before a fit. What it copied is let go with the first step."""

    def __init__(self, model: Model, folder: Path | None) -> None:
        self.model, self.folder = model, folder
        self.mode, self.device = model.training, model.device
        self.trained = {id(p): p.requires_grad for p in model.parameters()}
        self.state: State | None = take(model)
        self.step, self.total = 0, 0

    def passed(self, step: int, total: int) -> None:
        """So many steps of the run are done."""
        self.state, self.step, self.total = None, step, total

    def settle(self, error: BaseException) -> None:
        """The fit broke off: put back the mode, and what was not yet trained; say what was."""
        for adapter in self.model.adapters.values():
            adapter.join(None)  # type: ignore[operator]
        if self.state is not None:
            with contextlib.suppress(ZooError):
                self.undo()
                self.model.to(self.device)
        else:
            self._thaw()  # what a method froze for the step that broke off is still to be trained
            _say(error, self._words())
        self.model.train(self.mode)

    def undo(self) -> None:
        """Put back numbers, structure, mode, and what is frozen."""
        assert self.state is not None
        for adapter in self.model.adapters.values():
            adapter.join(None)  # type: ignore[operator]
        self.state.put(self.model)
        self._thaw()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.model.train(self.mode)

    def _thaw(self) -> None:
        """What was trained or frozen before is so again; parameters that came since keep what they are."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(self.trained.get(id(parameter), parameter.requires_grad))

    def _words(self) -> str:
        further = (
            f"The checkpoint in '{self.folder}' goes on from the last one that was written."
            if self.folder is not None
            else "With checkpoint=... the same call goes on from there."
        )
        return f"The model holds what was trained up to step {self.step} of {self.total}. {further}"


def _say(error: BaseException, words: str) -> None:
    if isinstance(error, ZooError) and error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} {words}", *error.args[1:])
    elif hasattr(error, "add_note"):
        note: Any = error
        note.add_note(words)
