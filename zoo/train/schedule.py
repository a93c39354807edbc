"""Learning rates: how they change over training, and how they differ between parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

from torch.nn import Parameter

from zoo.adapters.base import Adapter
from zoo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["SCHEDULES", "add_parameters", "default_lr", "factor", "layer_scales", "warmup_steps"]

SCHEDULES = ("constant", "cosine", "linear")
_BLOCK = re.compile(r"^(?:.*\.)?blocks\.\d+(?=\.|$)")


def factor(schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of `total`: up over `warmup` steps, then down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress


def check_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ConfigError(f"Unknown schedule '{schedule}'. {nearest(schedule, SCHEDULES)}")


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` below 1 is a part of all steps, otherwise a number of steps."""
    if warmup < 0:
        raise ConfigError(f"warmup is {warmup}; expected steps, or a fraction below 1 of all steps.")
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def default_lr(model: Model) -> float:
    """The first active adapter's own default, or 1e-3."""
    for name in model.active:
        if (lr := getattr(model.adapters[name], "default_lr", None)) is not None:
            return float(lr)
    return 1e-3


def layer_scales(names: Iterable[str], decay: float, blocks: Iterable[str] | None = None) -> dict[str, float]:
    """Multiplier of each parameter: decay ** (blocks that follow its own). The head has 1, what precedes the blocks the least.

    Args:
        names: `<adapter>/<point>.<parameter>` or `head/<parameter>`.
        blocks: the names of all blocks from the first to the last; by default those that occur in `names`.
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"layer_decay is {decay}; expected a number above 0, at most 1.")
    names = list(names)
    found: dict[str, str] = {}
    for name in names:
        if (owner := name.partition("/"))[0] != "head" and (match := _BLOCK.match(owner[2])):
            found[name] = match[0]
    order = list(blocks) if blocks is not None else sorted(set(found.values()), key=_natural)
    depth = {block: i + 1 for i, block in enumerate(order)}
    last = len(order) + 1
    scales = {}
    for name in names:
        level = last if name.startswith("head/") or _is_last(name) else depth.get(found.get(name, ""), 0)
        scales[name] = decay ** (last - level)
    return scales


def _is_last(name: str) -> bool:
    """The norm behind the last block counts as one with the head."""
    return bool(re.match(r"(?:fc_norm|norm|pool|attn_pool)(?:\.|$)", name.partition("/")[2]))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class Trains(Protocol):
    """The optimizer service, as this file sees it (`zoo.train.optimizer.OptimizerService`)."""

    lr: float

    def add(self, parameters: Mapping[str, Parameter], *, lr_scale: float, weight_decay: float, birth: int) -> None:
        """Train `parameters` from now on."""


def add_parameters(
    service: Trains,
    model: Model,
    parameters: Mapping[str, Parameter],
    lr: Mapping[str, float] | None,
    layer_decay: float | None,
    weight_decay: float | None,
    default: Callable[[float], float] = float,
) -> None:
    """Put all of a model's trained parameters into the service, grouped by learning rate and weight decay.

    `default` makes an adapter's rate of its `default_lr`.
    Biases, norms and other vectors get no weight decay; nor does what an adapter lists in `no_weight_decay` (patterns).
    """
    rates = _rates(model, parameters, service.lr, lr, default)
    scales = layer_scales(parameters, layer_decay) if layer_decay is not None else {}
    groups: dict[tuple[float, float], dict[str, Parameter]] = {}
    for name, parameter in parameters.items():
        owner, _, inner = name.partition("/")
        adapter: Any = dict(model.adapters.items()).get(owner, Adapter)  # the head's defaults are those of all
        decay = adapter.default_weight_decay if weight_decay is None else weight_decay
        exempt = any(fnmatchcase(inner, pattern) for pattern in adapter.no_weight_decay)
        key = (rates[name] / service.lr * scales.get(name, 1.0), 0.0 if parameter.ndim < 2 or exempt else float(decay))
        groups.setdefault(key, {})[name] = parameter
    for (scale, decay), members in groups.items():
        service.add(members, lr_scale=scale, weight_decay=decay, birth=0)


def _rates(
    model: Model,
    parameters: Mapping[str, Parameter],
    base: float,
    lr: Mapping[str, float] | None,
    default: Callable[[float], float],
) -> dict[str, float]:
    """The learning rate of each parameter: the last entry of `lr` that fits, or the adapter's own default."""
    rates = {}
    unused = set(lr or {})
    for name in parameters:
        owner = name.partition("/")[0]
        rate = base
        if lr is not None:
            for pattern, value in lr.items():
                if pattern in (owner, "default") or fnmatchcase(name, pattern):
                    rate = float(value)
                    unused.discard(pattern)
        elif owner in model.adapters:
            own = getattr(model.adapters[owner], "default_lr", None)
            rate = default(float(own)) if own else base
        rates[name] = rate
    if unused - {"default"}:
        wrong, owners = sorted(unused - {"default"})[0], {n.partition("/")[0] for n in parameters}
        raise ConfigError(
            f"lr has an entry '{wrong}' that fits no trained parameter. {nearest(wrong, owners)} "
            "Keys are 'head', the names of adapters, or patterns such as 'lora/blocks.3.*'."
        )
    return rates
