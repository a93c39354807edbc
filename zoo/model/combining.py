"""Weighted sums of adapters: `model.combine({"birds": 0.7, "cars": 0.3})` is one adapter whose change of the network is the sum.

    lora, adalora          dW = sum_i w_i s_i B_i A_i: ranks side by side, A = [A_1; A_2], B = [w_1 s_1 B_1, w_2 s_2 B_2]
    ssf, ia3               gamma = 1 + sum_i w_i (gamma_i - 1),  beta = sum_i w_i beta_i
    bitfit, norm, full     theta = theta_0 + sum_i w_i (theta_i - theta_0), theta_0 the pretrained values

These are exact: what the adapters change is linear in the factors. Where it is not (bottlenecks, prompts, prefixes, DoRA, single
entries beside low ranks), a sum of parameters is no sum of what they do, and it is refused; `zoo.model.algebra` averages such
parameters for who wants that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.engine.changes import BiasDelta
from zoo.errors import CombinationError, ConfigError
from zoo.registry import adapter_class

__all__ = ["combine"]


def combine(model: Any, weights: Mapping[str, float], name: str | None, activate: bool, head: str | None) -> Adapter:
    """See `Model.combine`."""
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f'combine takes weights by name, {{"birds": 0.7, "cars": 0.3}}; got {weights!r:.80}.')
    for other, weight in weights.items():
        model._known(other)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"the weight of '{other}' is {weight!r}; expected a finite number.")
    parts: dict[str, Adapter] = {n: model.adapters[n] for n in weights}
    own = [n for n in weights if n in model.heads]
    if head is not None and (head not in weights or head not in model.heads):
        raise ConfigError(f"head is {head!r}; expected one of the combined adapters that has a head of its own: {own}.")
    if own and head is None:
        have = "have heads of their own" if len(own) > 1 else "has a head of its own"
        raise CombinationError(
            f"{', '.join(own)} {have}, and a sum of heads is no head of both. Name the one to use: "
            f"model.combine(..., head={own[0]!r})."
        )
    name = model._free_name("combined") if name is None else name
    factors = {n: part.low_rank(model.points) for n, part in parts.items()}
    with model.all_or_nothing():
        if all(found is not None for found in factors.values()):
            added = _low_rank(model, weights, factors, name)
        else:
            added = _linear(model, weights, parts, name)
        if head is not None:
            model.heads[name] = copy.deepcopy(model.heads[head])
            if (classes := model.classes_of(head)) is not None:
                model._classes[name] = list(classes)
        if activate:
            model.set_active(name)
        else:
            model.set_active(*model.active)
    return added


def _low_rank(model: Any, weights: Mapping[str, float], factors: Mapping[str, Any], name: str) -> Adapter:
    """One LoRA with the ranks of all."""
    order = [p.name for p in model.points if any(p.name in found for found in factors.values())]
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for point in order:
        pairs = [(w, factors[n][point]) for n, w in weights.items() if point in factors[n]]
        down[point] = torch.cat([a for _, (a, _) in pairs])
        up[point] = torch.cat([w * b for w, (_, b) in pairs], dim=1)
    ranks = {point: len(a) for point, a in down.items()}
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {point: rank for point, rank in ranks.items() if rank != most}
    config: Any = adapter_class("lora")
    made: Adapter = config(rank=most, targets=tuple(order), ranks=others or None)
    made.of_values = True  # side by side, ranks may be more than the weight has
    added: Adapter = model.add_adapter(made, name, activate=False)
    with torch.no_grad():
        for point in order:
            part: Any = added.module_at(point)
            part.lora_a.copy_(down[point])
            part.lora_b.copy_(up[point])
    return added


def _linear(model: Any, weights: Mapping[str, float], parts: Mapping[str, Adapter], name: str) -> Adapter:
    """One of the same method: the start of each parameter and the sum of what was moved away from it."""
    methods = list(dict.fromkeys(part.method for part in parts.values()))
    if len(methods) > 1:
        raise CombinationError(
            f"{' and '.join(methods)} change the network in different ways, so their sum is none of the two. Use them side by "
            "side: model.set_active(...)."
        )
    first, *rest = parts
    if not parts[first].sums:
        raise CombinationError(
            f"'{methods[0]}' is not linear in its parameters, so a sum of them is not the sum of what they do. Average states "
            "(zoo.model.algebra), mix outputs at each point (`points.mix`), or combine what is linear: lora, adalora, ssf, ia3, "
            "bitfit, norm, full."
        )
    states = {n: model.adapter_state(n) for n in parts}
    for other in rest:
        states[first].check(states[other], f"'{other}'")
    added: Adapter = model.add_adapter(parts[first], name, activate=False)
    starts = _starts(model, added, name)
    with torch.no_grad():
        for key, parameter in added.named_parameters():
            start = starts[key].to(parameter)
            parameter.copy_(start + sum(w * (states[n][key].to(parameter) - start) for n, w in weights.items()))
    return added


def _starts(model: Any, adapter: Adapter, name: str) -> dict[str, Tensor]:
    """The value of each parameter at which the adapter changes nothing."""
    frozen = {id(swap.trained): swap.frozen for swap in model._swaps[name]}
    deltas = {id(m.bias): m.frozen for m in adapter.modules() if isinstance(m, BiasDelta)}
    found: dict[str, Tensor] = {}
    for key, parameter in adapter.named_parameters():
        known = frozen.get(id(parameter), deltas.get(id(parameter)))  # type: ignore[arg-type]
        if known is None:
            known = torch.ones_like(parameter) if key.rpartition(".")[2] == "scale" else torch.zeros_like(parameter)
        found[key] = known.detach()
    return found
