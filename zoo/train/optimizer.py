"""The optimizer service: a torch optimizer whose parameters and state may change while it runs.

Methods that grow or prune (AdaLoRA, IncreLoRA, DSL, IST ...) get it in `fit_start` and may at any step

- add parameters with a learning-rate schedule of their own that begins then (`add`), drop them (`drop`), or put a larger or
  smaller one in the place of another with the matching part of its state (`replace`);
- read, edit or clear rows of the optimizer's state (`state`, `edit`, `clear`, `reset`);
- change learning rates of groups (`scale_lr`), freeze and unfreeze (`freeze`, `unfreeze`).

Each parameter has a name, the one of `model.parameters_to_train()`; checkpoints refer to it by that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from zoo.errors import ConfigError, MismatchError, UnknownNameError, nearest
from zoo.train.optimizers import MakeOptimizer, make_optimizer
from zoo.train.schedule import factor

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["OptimizerService"]

Chosen = str | Parameter | Iterable[str | Parameter]
# what a group of ours carries besides torch's own settings
OURS = ("lr_scale", "birth", "warmup", "schedule", "names")


class OptimizerService:
    """Optimizers, their parameters by name, and a learning-rate schedule for each group.

    Args:
        lr: base learning rate; a group's is lr * lr_scale * schedule.
        total_steps: where the schedules end.
        optimizer: a name of `OPTIMIZERS`, or a function from param groups to a torch optimizer.
        weight_decay: for groups that do not say otherwise.
        schedule, warmup: for groups that do not say otherwise; see `zoo.train.schedule`. None: leave `lr` alone.
        options: further arguments of the torch optimizer (betas, momentum ...).
    """

    def __init__(
        self,
        *,
        lr: float,
        total_steps: int,
        optimizer: str | MakeOptimizer = "adamw",
        weight_decay: float = 0.0,
        schedule: str | None = "cosine",
        warmup: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.lr, self.total_steps, self.weight_decay = lr, total_steps, weight_decay
        self.schedule, self.warmup = schedule, warmup
        self.options = dict(options or {})
        self._default = optimizer
        self._optimizers: dict[str, Optimizer] = {}
        self._names: dict[int, str] = {}
        self.step_count = 0
        self.batches: list[Any] = []
        """The (inputs, targets) of the step in progress on this process, for methods that probe (IST)."""
        self.reduce: Callable[[Tensor], Tensor] = lambda values: values
        """Sums a tensor over the processes that train together, in place; for scores measured on one's own batches."""
        self.parts = 1  # of a batch: accumulated ones, times the processes that train together
        # What the gradients of this step were multiplied by since backward, for what a method measured there itself
        self.factor = 1.0
        self.streams: Mapping[str, Any] = {}
        """Further data beside the training data, see `stream`."""
        self.task: Any = None
        """What the run trains for, for methods that probe; None: what the model is for."""

    @classmethod
    def wrap(cls, optimizer: Optimizer, model: Model, *, total_steps: int) -> OptimizerService:
        """The service around the optimizer of somebody's own loop, who keeps stepping and scheduling it."""
        service = cls(
            lr=optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"]),
            total_steps=total_steps,
            weight_decay=optimizer.defaults.get("weight_decay", 0.0),
            schedule=None,
        )
        names = {id(p): name for name, p in model.parameters_to_train().items()}
        service._optimizers["main"] = optimizer
        for index, group in enumerate(optimizer.param_groups):
            group["names"] = [names.get(id(p), f"group{index}/{i}") for i, p in enumerate(group["params"])]
            service._names.update({id(p): n for p, n in zip(group["params"], group["names"], strict=True)})
            group.update(
                {"lr_scale": group["lr"] / service.lr if service.lr else 1.0, "birth": 0, "warmup": 0, "schedule": None}
            )
        return service

    # -- looking ----------------------------------------------------------------------------------------------------

    def stream(self, name: str, number: int | None = None) -> tuple[Any, Any]:
        """(inputs, targets) of a further stream (`zoo.fit(..., streams=...)`): of this step, or batch `number`."""
        if name not in self.streams:
            known = nearest(name, self.streams)
            raise UnknownNameError(
                f"This run has no stream '{name}'. {known} Pass zoo.fit(..., streams={{'{name}': ...}})."
            )
        return self.streams[name].batch(self.step_count if number is None else number)  # type: ignore[no-any-return]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The torch param groups of all inner optimizers."""
        return [g for o in self._optimizers.values() for g in o.param_groups if g["params"]]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """All parameters by name, in the order in which they are stepped."""
        return {n: p for g in self.groups for n, p in zip(g["names"], g["params"], strict=True)}

    def current_lr(self, parameter: str | Parameter) -> float:
        """The learning rate of the last step."""
        return float(self._group_of(self._one(parameter))[1]["lr"])

    def state(self, parameter: str | Parameter) -> dict[str, Any]:
        """The live state of one parameter (exp_avg, exp_avg_sq, step for Adam); empty before its first step."""
        parameter = self._one(parameter)
        return self._group_of(parameter)[0].state[parameter]

    def settings(self, parameter: str | Parameter) -> dict[str, Any]:
        """Learning-rate multiplier and weight decay of a parameter, as `add` takes them."""
        group = self._group_of(self._one(parameter))[1]
        return {"lr_scale": group["lr_scale"], "weight_decay": group.get("weight_decay", self.weight_decay)}

    # -- which parameters -------------------------------------------------------------------------------------------

    def add(
        self,
        parameters: Mapping[str, Parameter],
        *,
        lr_scale: float = 1.0,
        weight_decay: float | None = None,
        schedule: str | None = None,
        warmup: int | None = None,
        birth: int | None = None,
        optimizer: str = "main",
    ) -> None:
        """Train `parameters` from now on. Their schedule begins at `birth` (default: the present step) and ends with training.

        Args:
            optimizer: "main", or a name of `OPTIMIZERS`: these parameters are stepped by an optimizer of their own.

        Raises:
            ConfigError: a name or parameter is there already, or the optimizer's name is unknown.
        """
        known = self.parameters
        for name, parameter in parameters.items():
            if name in known or id(parameter) in self._names:
                raise ConfigError(f"'{name}' is trained already; drop it first, or add it under its own name.")
        if not parameters:
            return
        settings = {
            "lr_scale": float(lr_scale),
            "weight_decay": self.weight_decay if weight_decay is None else float(weight_decay),
            "schedule": self.schedule if schedule is None else schedule,
            "warmup": self.warmup if warmup is None else int(warmup),
            "birth": self.step_count if birth is None else int(birth),
        }
        self._put(optimizer, settings, parameters)

    def drop(self, chosen: Chosen) -> None:
        """Train these no longer, and forget their state. They stay in the model."""
        for parameter in self.select(chosen):
            optimizer, group = self._group_of(parameter)
            self._take_out(group, parameter)
            optimizer.state.pop(parameter, None)
            parameter.grad = None
            del self._names[id(parameter)]

    def replace(self, old: str | Parameter, new: Parameter, *, keep: Any = None, place: Any = None) -> None:
        """Put `new` where `old` was: same name, group and schedule, and the state `old_state[keep]`, written to `[place]`.

        A slice is `replace(a, smaller, keep=rows)`; a growth is `replace(a, larger, place=slice(0, len(a)))`, zero elsewhere.
        """
        old = self._one(old)
        optimizer, group = self._group_of(old)
        position = next(i for i, p in enumerate(group["params"]) if p is old)
        group["params"][position] = new
        self._names[id(new)] = self._names.pop(id(old))
        state = optimizer.state.pop(old, {})
        moved = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                value = value if keep is None else value[keep]
                if place is not None:
                    value, part = value.new_zeros(new.shape), value
                    value[place] = part
                if value.shape != new.shape:
                    raise MismatchError(
                        f"state '{key}' has shape {tuple(value.shape)}, the new parameter {tuple(new.shape)}."
                    )
                value = value.to(new.device).clone()
            moved[key] = value
        if moved:
            optimizer.state[new] = moved

    def freeze(self, chosen: Chosen) -> None:
        """No gradient from now on. Gradients become None, so that neither momentum nor weight decay moves these."""
        for parameter in self.select(chosen):
            parameter.requires_grad_(False)
            parameter.grad = None

    def unfreeze(self, chosen: Chosen) -> None:
        for parameter in self.select(chosen):
            parameter.requires_grad_(True)

    def scale_lr(self, chosen: Chosen, scale: float) -> None:
        """From now on lr * `scale` * schedule for these (in the place of their former multiplier)."""
        for parameter in self.select(chosen):
            optimizer, group = self._group_of(parameter)
            name = self._names[id(parameter)]
            settings = {key: group[key] for key in (*OURS[:-1], "weight_decay") if key in group}
            kind = next(k for k, o in self._optimizers.items() if o is optimizer)
            self._take_out(group, parameter)
            self._put(kind, {**settings, "lr_scale": float(scale)}, {name: parameter})

    def select(self, chosen: Chosen) -> list[Parameter]:
        """Parameters by name, pattern ("lora/blocks.3.*") or identity.

        Raises:
            ConfigError: something that is not trained here.
        """
        parameters = self.parameters
        found: dict[int, Parameter] = {}
        for item in [chosen] if isinstance(chosen, (str, Parameter)) else chosen:
            if isinstance(item, str):
                fitting = [p for n, p in parameters.items() if n == item or fnmatchcase(n, item)]
                if not fitting:
                    raise ConfigError(f"No trained parameter is named '{item}'. {nearest(item, parameters)}")
            elif id(item) in self._names:
                fitting = [item]
            else:
                raise ConfigError("A parameter that is not trained by this optimizer; add it first.")
            found.update({id(p): p for p in fitting})
        return list(found.values())

    # -- state ------------------------------------------------------------------------------------------------------

    def edit(self, parameter: str | Parameter, change: Callable[[str, Tensor], Tensor]) -> None:
        """Replace each state tensor by `change(key, tensor)`, of the same shape."""
        state = self.state(parameter)
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = change(key, value)

    def clear(self, parameter: str | Parameter, index: Any = None) -> None:
        """Forget the momentum of the elements `parameter[index]`, or the whole state if index is None."""
        parameter = self._one(parameter)
        state = self.state(parameter)
        if index is None:
            state.clear()
            return
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[index] = 0

    def reset(self) -> None:
        """Forget all state (rewinding to the start weights)."""
        for optimizer in self._optimizers.values():
            optimizer.state.clear()

    # -- stepping ---------------------------------------------------------------------------------------------------

    def set_lr(self) -> None:
        """Give every group the learning rate of the present step."""
        for group in self.groups:
            if group["schedule"] is not None:
                age, life = self.step_count - group["birth"], self.total_steps - group["birth"]
                group["lr"] = self.lr * group["lr_scale"] * factor(group["schedule"], age, life, group["warmup"])

    def step(self) -> None:
        """Set learning rates and step; parameters without gradient stay as they are."""
        self.set_lr()
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.step_count += 1

    def zero_grad(self) -> None:
        """Gradients become None."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(JSON, tensors) from which `load` goes on exactly."""
        groups, tensors, plain = [], {}, {}
        for kind, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                if group["params"]:
                    groups.append({"optimizer": kind, **{k: _json(v) for k, v in group.items() if k != "params"}})
            for parameter, state in optimizer.state.items():
                name = self._names[id(parameter)]
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"{name}|{key}"] = value
                    else:
                        plain[f"{name}|{key}"] = _json(value)
        frozen = [n for n, p in self.parameters.items() if not p.requires_grad]
        state = {
            "step": self.step_count,
            "groups": groups,
            "plain": plain,
            "frozen": frozen,
            "tensors": sorted(tensors),
        }
        return state, tensors

    def load(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], known: Mapping[str, Parameter]) -> None:
        """Go on from `save`. `known` are the model's parameters by name.

        Raises:
            MismatchError: a parameter of the checkpoint is not in the model, or what was saved of the optimizer is not all there.
        """
        known = {**known, **self.parameters}
        if lacking := sorted(set(saved["tensors"]) ^ set(tensors)):
            raise MismatchError(
                f"The checkpoint's optimizer has {len(tensors)} tensors where {len(saved['tensors'])} were saved; the first that "
                f"differs is '{lacking[0]}'. The file was changed: pass resume=False to begin anew."
            )
        names = [n for g in saved["groups"] for n in g["names"]]
        if missing := [n for n in names if n not in known]:
            raise MismatchError(
                f"The checkpoint trains {len(missing)} parameters that this model lacks, first '{missing[0]}'. "
                f"{nearest(missing[0], known)} Resume with the model that the run began with, or pass resume=False."
            )
        self._names.clear()
        self._optimizers = {k: o for k, o in self._optimizers.items() if k == "main"}
        for optimizer in self._optimizers.values():
            optimizer.param_groups.clear()
            optimizer.state.clear()
        for group in saved["groups"]:
            parameters = {n: known[n] for n in group["names"]}
            settings = {k: v for k, v in group.items() if k not in ("optimizer", "names")}
            self._put(group["optimizer"], settings, parameters, exact=True)
        for key, value in [*tensors.items(), *saved["plain"].items()]:
            name, _, field = key.rpartition("|")
            parameter = known[name]
            # torch keeps Adam's step counter on the CPU
            placed = value.clone() if isinstance(value, Tensor) and value.ndim == 0 else value
            if isinstance(value, Tensor) and value.ndim:
                placed = value.to(parameter.device, copy=True)
            self._group_of(parameter)[0].state[parameter][field] = placed
        for name in names:
            known[name].requires_grad_(name not in saved["frozen"])
        self.step_count = saved["step"]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _one(self, parameter: str | Parameter) -> Parameter:
        found = self.select(parameter)
        if len(found) != 1:
            raise ConfigError(f"'{parameter}' names {len(found)} parameters; expected one.")
        return found[0]

    def _group_of(self, parameter: Parameter) -> tuple[Optimizer, dict[str, Any]]:
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                if any(p is parameter for p in group["params"]):
                    return optimizer, group
        raise ConfigError("A parameter that is not trained by this optimizer; add it first.")

    @staticmethod
    def _take_out(group: dict[str, Any], parameter: Parameter) -> None:
        position = next(i for i, p in enumerate(group["params"]) if p is parameter)
        del group["params"][position], group["names"][position]

    def _put(
        self, kind: str, settings: dict[str, Any], parameters: Mapping[str, Parameter], exact: bool = False
    ) -> None:
        """Into the group with these settings, or a new one (always a new one if `exact`)."""
        self._names.update({id(p): n for n, p in parameters.items()})
        optimizer = self._optimizers.get(kind)
        for group in () if optimizer is None or exact else optimizer.param_groups:
            if all(group.get(k) == v for k, v in settings.items()):
                group["params"].extend(parameters.values())
                group["names"].extend(parameters)
                return
        new = {"lr": self.lr * settings["lr_scale"], **settings}
        new.update({"params": list(parameters.values()), "names": list(parameters)})
        if optimizer is not None:
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
            optimizer.add_param_group(new)
        else:
            self._optimizers[kind] = self._make(kind, [new])

    def _make(self, kind: str, groups: list[dict[str, Any]]) -> Optimizer:
        main = kind == "main"
        return make_optimizer(self._default if main else kind, groups, self.lr, self.options if main else {})


def _json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
