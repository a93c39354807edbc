"""An offline copy of an adapter by moving average: a second adapter, not in use, that follows the first one.

    model.copy_adapter("lora", "lora-offline")
    zoo.fit(model, train, callbacks=[MovingAverage("lora", "lora-offline", decay=0.9999)])
    model.set_active("lora-offline")

After every optimizer step `offline <- a offline + (1 - a) online`, for every parameter and floating buffer, learnable scales too.
The copy is in the checkpoints of the fit, and in its choice of the best epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, UnknownNameError, nearest
from zoo.model.algebra import AdapterState, hand_over, move_towards, state_of

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["MovingAverage"]


class MovingAverage:
    """A callback of `zoo.fit`.

    Args:
        online: the adapter that is trained. offline: the one that follows it, of the same method and settings.
        decay: a.
    """

    def __init__(self, online: str, offline: str, decay: float = 0.9999) -> None:
        if not 0 <= decay <= 1:
            raise ConfigError(f"decay is {decay}; expected a number from 0 to 1.")
        if online == offline:
            raise ConfigError(
                f"'{online}' cannot follow itself; make a copy first: model.copy_adapter('{online}', ...)."
            )
        self.online, self.offline, self.decay = online, offline, decay
        self._model: Model | None = None

    def fit_start(self, model: Model, optimizer: Any, total_steps: int) -> None:
        """Both must be there, and the offline one not in use."""
        for name in (self.online, self.offline):
            if name not in model.adapters:
                raise UnknownNameError(
                    f"The model has no adapter '{name}'. {nearest(name, model.adapters)} model.copy_adapter('{self.online}', "
                    f"'{self.offline}') makes the copy that follows."
                )
        if self.offline in model.active:
            raise ConfigError(
                f"'{self.offline}' is in use, so it would be trained. model.set_active('{self.online}') first."
            )
        self._model = model
        online: Any = model.adapters[self.online]
        if online.needs_calibration and online.plan is not None and model.adapters[self.offline].plan is None:
            # a copy that was made before the calibration of this fit: what was chosen is the copy's too
            hand_over(model, self.offline, state_of(online, f"'{self.online}'"))
        state_of(model.adapters[self.offline], f"'{self.offline}'").check(state_of(online, ""), f"'{self.online}'")

    def after_step(self, model: Model, step: int) -> None:
        """Follow."""
        move_towards(model.adapters[self.offline], model.adapters[self.online], self.decay, f"'{self.offline}'")

    def extra_state(self) -> dict[str, Any]:
        """The offline copy, for the checkpoint."""
        assert self._model is not None
        state = state_of(self._model.adapters[self.offline], self.offline)
        return {"offline": dict(state), "plan": json.dumps(state.plan)}

    def load_extra_state(self, model: Model, state: Mapping[str, Any]) -> None:
        """Put the offline copy back."""
        plan = json.loads(state["plan"]) if "plan" in state else ...  # earlier checkpoints do not say it
        hand_over(model, self.offline, AdapterState(state["offline"], "the checkpoint", plan))
