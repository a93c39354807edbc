"""Per-sample adapters: each row of a batch is served by the adapter named for it, in training too.

Every named adapter gets the gradients of its own rows, those that are attached and not active too (an active one that
`set_active(..., train=...)` leaves out stays frozen). `model.parameters_to_train(*names)` lists their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.engine.context import batch_of
from zoo.errors import ConfigError
from zoo.model.answering import answer, called, expected
from zoo.model.routes import Parts, Route, row_by_row, run_only, train_also

if TYPE_CHECKING:
    from zoo.model import Model


def forward_routed(
    model: Model,
    inputs: tuple[Any, ...],
    names: Sequence[str | None] | Route,
    kwargs: dict[str, Any],
    context: Mapping[str, Any] | None = None,
    targets: Any = None,
) -> Tensor:
    """Logits (B, num_classes); row i is what the model gives with only `names[i]` active (None: no adapter).

    Where every op of the named adapters works row by row, the batch goes through the backbone once. Methods that change the
    sequence or the backbone's parameters, heads that need named outputs, and inputs of different sizes in one row (images of a
    language model) go through in one sub-batch for each adapter; the result is the same.

    Raises:
        UnknownNameError: an adapter that is not attached.
        ConfigError: not one name for each sample, or adapters whose heads have different widths.
        ContextError: a value that one of the adapters needs is missing, or is not one for each sample.
    """
    model.family.check_routed(*inputs)
    _check_alone(model, names.named if isinstance(names, Route) else names)
    batch = _size(model, inputs, kwargs)
    if torch.compiler.is_compiling():
        return _compiled(model, inputs, names, kwargs, context, targets)
    route = names if isinstance(names, Route) else Route.of(model, names, batch)
    if route.batch != batch:
        raise ConfigError(
            f"adapters= has {route.batch} names for a batch of {batch}; give one name (or None) for each sample."
        )
    route.check(model)
    state, rows = model._state, route.rows
    state.settle(model._enter())
    if torch.is_grad_enabled():
        train_also(model, route.named)
    even = model.family.even(*inputs, **kwargs)
    here = state.here()
    try:
        if targets is None and even and row_by_row(model, list(rows)):
            served = route.served
            model._serve((route.named, served, batch, None, False, None))
            arguments = (model, inputs, kwargs, rows)
            outputs = model._framed(
                _single_pass, arguments, {}, context, owners=route.named, rows=served, call=(inputs, kwargs)
            )
        else:
            outputs = []
            for name, index in rows.items():
                owners = () if name is None else (name,)
                model._serve((owners, None, 0, None, False, None))
                _modes(model, owners)
                outputs.append(_rows(model, inputs, kwargs, name, index, batch, context, targets))
    finally:
        for name in route.named:
            model.adapters[name].release()  # type: ignore[operator]
        model._serve(here)
        _modes(model, route.named)
    return route.joined(outputs)


def passing_routed(
    model: Model, run: Callable[..., Any], names: Sequence[str | None], inputs: tuple[Any, ...]
) -> list[tuple[Tensor, Any]]:
    """`run(*inputs)`, in which a library calls the backbone by itself, with the adapter of each sample (`Model.passing`).

    Returns:
        (rows, what `run` gave for them): one for the batch, or, where it does not go through in one pass, for each adapter.

    Raises:
        UnknownNameError, ConfigError, ContextError: as `forward_routed`.
    """
    model.family.check_routed(*inputs)
    batch = _size(model, inputs, {})
    route = Route.of(model, names, batch)
    state, order = model._state, list(route.rows)
    state.settle(model._enter())
    whole = model.family.even(*inputs) and row_by_row(model, order)
    here, parts = state.here(), []
    try:
        for name, index in [("", torch.arange(batch, device=model.device))] if whole else route.rows.items():
            owners = route.named if whole else (() if name is None else (name,))
            served = route.served if whole else dict.fromkeys(owners, index)
            model._serve((owners, served, batch, None, False, None) if whole else (owners, None, 0, None, False, None))
            _modes(model, owners)
            mine = tuple(_narrowed(t, index, None) for t in inputs)
            risen = model._enter()
            try:
                parts.append((index, model._framed(run, mine, {}, owners=owners, rows=served, call=(inputs, {}))))
            finally:
                state.settle(risen)
        return parts
    finally:
        for name in route.named:
            model.adapters[name].release()  # type: ignore[operator]
        model._serve(here)
        _modes(model, route.named)


def _size(model: Model, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many samples a call has.

    Raises:
        ConfigError: it has no tensor.
    """
    first = batch_of(inputs, kwargs)
    if first is None:
        raise ConfigError(expected(model, inputs, kwargs))
    return first.shape[0]


def _check_alone(model: Model, names: Sequence[str | None]) -> None:
    """Raise ConfigError if an adapter that looks at the whole batch while training would see only its rows."""
    if not model.training:
        return
    for name in dict.fromkeys(names):
        if name is None or name not in model.adapters or not model.adapters[name].batch_wise:
            continue
        # what is in use and frozen runs as in evaluation; what is not in use is trained by this pass (`train_also`)
        if name not in model.active or any(p.requires_grad for p in model.adapters[name].parameters()):
            raise ConfigError(
                f"'{name}' normalises over the batch while training, so a batch of per-sample adapters, of which it serves some "
                "rows, would train another function. Give it whole batches, switch its batch normalisation off, or call "
                "model.eval()."
            )


def _compiled(
    model: Model,
    inputs: tuple[Any, ...],
    route: Any,
    kwargs: dict[str, Any],
    context: Mapping[str, Any] | None,
    targets: Any,
) -> Tensor:
    """One pass, traced: the ops that run are put in place for its time, and nothing else of the model is touched."""
    if not isinstance(route, Route):
        raise ConfigError(
            "Under torch.compile, give the adapters of a batch as adapters=model.route([...]), made outside of the compiled call."
        )
    if (route.sites is None and route.apart is None) or targets is not None:
        raise ConfigError(
            "The head of one of these adapters needs more than features, which is not compiled for a batch of several. Call the "
            "model itself, or the compiled one for each adapter."
        )
    route.check(model)
    if model.training and any(model.adapters[name].trains_backbone for name in route.named):
        raise ConfigError(
            "One of these adapters trains the backbone's own parameters, and has a mode of its own for it while training, which "
            "is not compiled for a batch of several. Call the model itself, or the compiled one for each adapter."
        )
    if route.sites is None:
        return _compiled_apart(model, inputs, route, kwargs, context)
    state = model._state
    here = state.here()
    served = route.served
    state.active, state.route, state.batch = route.named, served, route.batch
    before = run_only(route.sites)
    try:
        call = (inputs, kwargs)
        outputs = model._framed(
            _single_pass, (model, inputs, kwargs, route.rows), {}, context, owners=route.named, rows=served, call=call
        )
    finally:
        state.active, state.route, state.batch = here[0], here[1], here[2]
        run_only(before)
    return route.joined(outputs)


def _compiled_apart(
    model: Model, inputs: tuple[Any, ...], route: Route, kwargs: dict[str, Any], context: Mapping[str, Any] | None
) -> Tensor:
    """A pass of each adapter on its rows, all in one graph: what runs and what stands in is put in place for its time."""
    state, outputs = model._state, []
    active, swaps = state.active, state.swaps
    assert route.apart is not None
    for name, (sites, mine) in route.apart.items():
        before = run_only(sites)
        state.active, state.swaps = () if name is None else (name,), mine
        try:
            outputs.append(_rows(model, inputs, kwargs, name, route.rows[name], route.batch, context, None))
        finally:
            state.active, state.swaps = active, swaps
            run_only(before)
    return route.joined(outputs)


def _single_pass(model: Model, inputs: tuple[Any, ...], kwargs: dict[str, Any], rows: Parts) -> list[Tensor]:
    """The batch goes through once; each adapter's features and head get its own rows."""
    state = model._state
    if torch.compiler.is_compiling():
        pooled = model.family.features(*inputs, **kwargs)
    else:
        with called(model, inputs, kwargs), state.saver.record(model.device):
            pooled = model.family.features(*inputs, **kwargs)
    state.route = None
    outputs = []
    for name, index in rows.items():
        part = pooled.index_select(0, index)
        part = part if name is None else state.change(model.adapters[name].features, part)  # type: ignore[arg-type]
        outputs.append(state.run(model.heads[model._head_of(name)], part))
    return outputs


def _rows(
    model: Model,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str | None,
    index: Tensor,
    batch: int,
    context: Mapping[str, Any] | None,
    targets: Any,
) -> Tensor:
    """What the rows of one adapter give, which is in use alone."""
    owners = () if name is None else (name,)
    part = tuple(_narrowed(t, index, None) for t in inputs)
    options = {k: _narrowed(t, index, batch) for k, t in kwargs.items()}
    served = dict.fromkeys(owners, index)
    framing: dict[str, Any] = {"owners": owners, "rows": served, "call": (inputs, kwargs)}
    head = model.heads[model._head_of(name)]
    if targets is not None or model._rich(name):
        mine = None if targets is None else targets.index_select(0, index)
        return model._framed(answer, (model, head, part, mine, options), {}, context, **framing)  # type: ignore[no-any-return]
    return model._state.run(head, model._framed(model._pooled, part, options, context, **framing))  # type: ignore[no-any-return]


def _narrowed(value: Any, index: Tensor, batch: int | None) -> Any:
    """The samples `index` of a call's argument; dicts of tensors included. `batch`: what is not of this length is no sample's."""
    if isinstance(value, Mapping):
        return {name: _narrowed(x, index, batch) for name, x in value.items()}
    if not isinstance(value, Tensor) or (batch is not None and (not value.dim() or len(value) != batch)):
        return value
    return value.index_select(0, index)


def _modes(model: Model, named: Sequence[str]) -> None:
    """The backbone's mode, where one of these adapters trains the backbone itself."""
    if any(model.adapters[name].trains_backbone for name in named):
        model.train(model.training)


def routed_parameters(model: Model, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """What a batch served by these adapters trains, by name; heads are `head/<name>.<key>`."""
    for name in names:
        model._known(name)
    train_also(model, names)
    named = {f"{n}/{k}": p for n in names for k, p in model.adapters[n].named_parameters()}
    for head in dict.fromkeys(model._head_of(n) for n in names):
        named |= {f"head/{head}.{k}": p for k, p in model.heads[head].named_parameters()}
    return {k: p for k, p in named.items() if p.requires_grad}
