"""Per-sample adapters: each row of a batch is served by the adapter named for it, in training too.

Every named adapter gets the gradients of its own rows, those that are attached and not active too (an active one that
`set_active(..., train=...)` leaves out stays frozen). `model.parameters_to_train(*names)` lists their parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.errors import CombinationError, ConfigError
from zoo.model.answering import answer

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.model import Model

Parts = dict["str | None", Tensor]  # an adapter (None: the bare backbone) and something about its rows


def forward_routed(
    model: Model,
    inputs: tuple[Any, ...],
    names: Sequence[str | None],
    kwargs: dict[str, Any],
    context: Mapping[str, Any] | None = None,
    targets: Any = None,
) -> Tensor:
    """Logits (B, num_classes); row i is what the model gives with only `names[i]` active (None: no adapter).

    Where every op of the named adapters works row by row, the batch goes through the backbone once. Methods that change the
    sequence or the backbone's parameters, and heads that need named outputs, go through in one sub-batch for each adapter; the
    result is the same.

    Raises:
        UnknownNameError: an adapter that is not attached.
        ConfigError: not one name for each sample, or adapters whose heads have different widths.
        ContextError: a value that one of the adapters needs is missing, or is not one for each sample.
    """
    model.family.check_routed(*inputs)
    batch = next(t for t in inputs if isinstance(t, Tensor)).shape[0]
    if len(names) != batch:
        raise ConfigError(
            f"adapters= has {len(names)} names for a batch of {batch}; give one name (or None) for each sample."
        )
    order = list(dict.fromkeys(names))
    named = [name for name in order if name is not None]
    for name in named:
        model._known(name)
    device, state = model.device, model._state
    rows = {n: torch.tensor([i for i, m in enumerate(names) if m == n], device=device) for n in order}
    if torch.is_grad_enabled():
        train_also(model, named)
    here = state.here()
    try:
        if targets is None and not any(model._rich(name) for name in order) and _row_by_row(model, named):
            served = {name: rows[name] for name in named}
            model._serve((tuple(named), served, batch, None, False, None))
            arguments = (model, inputs, kwargs, rows)
            outputs = model._framed(
                _single_pass, arguments, {}, context, owners=named, rows=served, call=(inputs, kwargs)
            )
        else:
            outputs = [
                _sub_batch(model, inputs, kwargs, n, index, batch, context, targets) for n, index in rows.items()
            ]
    finally:
        for name in named:
            model.adapters[name].release()  # type: ignore[operator]
        model._serve(here)
        _modes(model, named)
    widths = {tuple(o.shape[1:]) for o in outputs}
    if len(widths) > 1:
        shapes = ", ".join(f"{n}: {tuple(o.shape[1:])}" for n, o in zip(order, outputs))
        raise ConfigError(
            f"the heads of the named adapters have different widths ({shapes}); call the model once for each."
        )
    joined = torch.cat(outputs)
    back = torch.empty(batch, dtype=torch.long, device=device)
    back[torch.cat([rows[n] for n in order])] = torch.arange(batch, device=device)
    return joined.index_select(0, back)


def _row_by_row(model: Model, named: Sequence[str]) -> bool:
    """Whether these adapters can serve their rows of one batch in one pass."""
    for name in named:
        if (
            model._swaps[name]
            or model.adapters[name].trains_backbone
            or not all(op.per_row for _, op in model._ops[name])
        ):
            return False
    try:
        for name, other in itertools.combinations(named, 2):
            model._check_pair(other, model._ops[other], model._swaps[other], name)
    except CombinationError:
        return False
    return True


def _single_pass(model: Model, inputs: tuple[Any, ...], kwargs: dict[str, Any], rows: Parts) -> list[Tensor]:
    """The batch goes through once; each adapter's features and head get its own rows."""
    state = model._state
    with state.saver.record(model.device):
        pooled = model.family.features(*inputs, **kwargs)
    state.route = None
    outputs = []
    for name, index in rows.items():
        part = pooled.index_select(0, index)
        part = part if name is None else model.adapters[name].features(part)  # type: ignore[operator]
        outputs.append(model.heads[model._head_of(name)](part))
    return outputs


def _sub_batch(
    model: Model,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str | None,
    index: Tensor,
    batch: int,
    context: Mapping[str, Any] | None,
    targets: Any,
) -> Tensor:
    """The rows of one adapter alone."""
    owners = [] if name is None else [name]
    model._serve((tuple(owners), None, 0, None, False, None))
    _modes(model, owners)
    part = tuple(t.index_select(0, index) if isinstance(t, Tensor) else t for t in inputs)
    options = {
        k: t.index_select(0, index) if isinstance(t, Tensor) and t.dim() and len(t) == batch else t
        for k, t in kwargs.items()
    }
    served = dict.fromkeys(owners, index)
    framing: dict[str, Any] = {"owners": owners, "rows": served, "call": (inputs, kwargs)}
    head = model.heads[model._head_of(name)]
    if targets is not None or model._rich(name):
        mine = None if targets is None else targets.index_select(0, index)
        return model._framed(answer, (model, head, part, mine, options), {}, context, **framing)  # type: ignore[no-any-return]
    return head(model._framed(model._pooled, part, options, context, **framing))  # type: ignore[no-any-return]


def _modes(model: Model, named: Sequence[str]) -> None:
    """The backbone's mode, where one of these adapters trains the backbone itself."""
    if any(model.adapters[name].trains_backbone for name in named):
        model.train(model.training)


def train_also(model: Model, names: Sequence[str]) -> None:
    """Adapters that a routed batch names beside the active ones are trained by it, with the heads that serve them."""
    for name in names:
        adapter: Adapter = model.adapters[name]  # type: ignore[assignment]
        if name not in model.active:
            model._rest(name, adapter, resting=False)
        if adapter.stateless or any(p.requires_grad for p in adapter.parameters()):
            head = model._head_of(name)
            model._rest(f"head/{head}", model.heads[head], resting=False)


def routed_parameters(model: Model, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """What a batch served by these adapters trains, by name; heads are `head/<name>.<key>`."""
    for name in names:
        model._known(name)
    train_also(model, names)
    named = {f"{n}/{k}": p for n in names for k, p in model.adapters[n].named_parameters()}
    for head in dict.fromkeys(model._head_of(n) for n in names):
        named |= {f"head/{head}.{k}": p for k, p in model.heads[head].named_parameters()}
    return {k: p for k, p in named.items() if p.requires_grad}
