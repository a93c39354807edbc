"""What a model holds, as tensors by name: `state_dict` for others' trainers, states of adapters, and weighted sums of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.engine.sharded import refuse, reshard, spread, whole
from zoo.errors import ConfigError, MismatchError, ZooError
from zoo.model.algebra import AdapterState, hand_over, state_of
from zoo.model.combining import combine
from zoo.model.stamped import Stamped

PLANS = "plans"  # where they stand in a state_dict


class Stated(Stamped):
    """Base of `Model`."""

    # -- state_dict -------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With the plans of adapters: what a calibration chose decides which tensors there are, and where they act."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, adapter in self._planned():
            text = json.dumps(adapter.plan, sort_keys=True).encode()
            destination[f"{prefix}{PLANS}.{name}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *given: Any) -> None:
        """Adapters are attached anew by the plans of the state, before their tensors are looked up."""
        _, strict, missing, _, errors = given
        found = {name: state.pop(f"{prefix}{PLANS}.{name}", None) for name in self.adapters}
        for name, adapter in list(self.adapters.items()):
            told = found[name]
            if told is None:
                if adapter.plan is not None and strict:
                    missing.append(f"{prefix}{PLANS}.{name}")
                continue
            try:
                plan = json.loads(bytes(told.to("cpu", torch.uint8).tolist()))
                if plan != json.loads(json.dumps(adapter.plan)):
                    former, adapter.plan = adapter.plan, plan
                    try:
                        self.reattach(name)
                    except BaseException:
                        adapter.plan = former
                        raise
            except (ValueError, ZooError) as error:
                errors.append(f"the plan of '{name}' does not fit this model: {error}")
        super()._load_from_state_dict(state, prefix, *given)

    def _planned(self) -> list[tuple[str, Any]]:
        return [(name, adapter) for name, adapter in self.adapters.items() if adapter.plan is not None]

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The part of `state_dict` that belongs to adapters and heads: a small checkpoint for any trainer.

        All adapters are in it, active or not, and what a calibration chose (`plans.<name>`). The keys are those of `state_dict`,
        so both `load_adapter_state_dict` and `load_state_dict(..., strict=False)` take it. Of a sharded model (FSDP) the whole
        tensors, on every process, all of which must call this; `load_adapter_state_dict` spreads them again.
        """
        return {k: whole(v) for k, v in self.state_dict().items() if not k.startswith("backbone.")}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `adapter_state_dict` gave, into a model with the same adapters and heads; the backbone stays as it is.

        An adapter that chose differently from its data takes over what the state says (`plans.<name>`), as one loaded from disk.

        Raises:
            MismatchError: keys that are missing or unknown, or shapes that differ; nothing is changed.
        """
        before = {k: v.detach().clone() for k, v in self.adapter_state_dict().items()}
        unplanned = [name for name, adapter in self.adapters.items() if adapter.plan is None]
        trouble = ""
        try:
            found = self.load_state_dict(spread(state, self.state_dict()), strict=False)
            wrong = {"unknown": found.unexpected_keys, "missing": found.missing_keys}
            wrong["missing"] = [k for k in wrong["missing"] if not k.startswith("backbone.")]
            wrong["missing"] += [k for k in before if k.startswith(f"{PLANS}.") and k not in state]
            wrong["unknown"] += [k for k in state if k.startswith("backbone.")]
            trouble = "; ".join(f"{len(k)} keys are {what}, first '{k[0]}'" for what, k in wrong.items() if k)
        except RuntimeError as error:
            trouble = " ".join(str(error).split())
        if trouble:
            for name in unplanned:
                if self.adapters[name].plan is not None:  # what it took from this state
                    self.adapters[name].plan = None  # type: ignore[assignment]
                    self.reattach(name)
            self.load_state_dict(spread(before, self.state_dict()), strict=False)
            raise MismatchError(
                f"the state does not fit the adapters and heads of this model: {trouble}. Attach the same adapters with the same "
                "settings and heads first."
            )

    # -- states of single adapters --------------------------------------------------------------------------------------

    def adapter_state(self, name: str) -> AdapterState:
        """Copies of all tensors of an adapter, which can be added, scaled and averaged (`zoo.model.algebra`)."""
        self._known(name)
        reshard(self)
        return state_of(self.adapters[name], f"'{name}'")

    def set_adapter_state(self, name: str, state: AdapterState) -> None:
        """Put a state into an adapter, with what its method chose from data (its plan).

        Where the adapter has chosen differently, it is attached anew by the state's plan; an optimizer is made afterwards.

        Raises:
            MismatchError: naming the first key that differs, or why the plan cannot be taken over; nothing is changed.
        """
        self._known(name)
        reshard(self)
        hand_over(self, name, state)

    def copy_adapter(self, name: str, to: str, *, activate: bool = False) -> Adapter:
        """A second adapter of the same settings, plan and numbers, under another name; by default not in use."""
        self._known(name)
        state = self.adapter_state(name)
        twin = self.add_adapter(self.adapters[name], to, activate=activate)  # type: ignore[arg-type]
        hand_over(self, to, state)
        return twin

    def fresh_values(self, name: str) -> dict[str, Tensor | None]:
        """What an adapter of these settings and plan holds when it has just been attached, None where that is drawn at random.

        Keys are those of its saved form. The adapter itself, and the generators of random numbers, stay as they are.

        Raises:
            ConfigError: the parameters are spread over processes.
        """
        self._known(name)
        refuse(
            self, ConfigError, "what an adapter starts with cannot be told", "Save it plain, and compress the folder."
        )
        drawn: list[dict[str, Tensor]] = []
        self.points.num_classes = self.num_classes
        for seed in (1, 2):
            twin = self.adapters[name].fresh()  # type: ignore[operator]
            twin.name, twin.initial = name, None
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                try:
                    self._attach(name, twin, activate=False)
                    drawn.append({key: whole(value.detach()).clone() for key, value in twin.saved()[1].items()})
                finally:
                    self._watch_memory()  # clears the sites that were made
        first, second = drawn
        return {key: value if torch.equal(value, second[key]) else None for key, value in first.items()}

    def combine(
        self, weights: Mapping[str, float], name: str | None = None, *, activate: bool = True, head: str | None = None
    ) -> Adapter:
        """A new adapter whose change of the network is the weighted sum of others': `model.combine({"a": 0.7, "b": 0.3})`.

        Exact (`zoo.model.combining`): for lora and adalora by ranks side by side, for ssf, ia3, bitfit, norm and full by sums of
        what was moved away from the start. The others stay as they are.

        Args:
            weights: a factor for each adapter; they need not sum to one.
            name: of the new adapter; by default "combined".
            activate: use it, alone.
            head: the adapter whose head it gets, where the others have heads of their own.

        Raises:
            CombinationError: what these methods do has no such sum, or heads of which none is named; nothing is changed.
            ConfigError, UnknownNameError: weights that are no numbers, or of adapters that are not there.
            MismatchError: adapters of one method that act at different points.
        """
        return combine(self, weights, name, activate, head)
