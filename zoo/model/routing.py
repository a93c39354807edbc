"""Per-sample adapters: each row of a batch is served by the adapter named for it, in training too.

Every named adapter gets the gradients of its own rows, those that are attached and not active too (an active one that
`set_active(..., train=...)` leaves out stays frozen). `model.parameters_to_train(*names)` lists their parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.engine.context import batch_of
from zoo.errors import CombinationError, ConfigError
from zoo.model.answering import answer, called, expected
from zoo.model.compiled import one_more_set

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.engine.sites import Op, Site
    from zoo.model import Model

Parts = dict["str | None", Tensor]  # an adapter (None: the bare backbone) and something about its rows


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
        if targets is None and even and _row_by_row(model, list(rows)):
            served = route.served
            model._serve((route.named, served, batch, None, False, None))
            arguments = (model, inputs, kwargs, rows)
            outputs = model._framed(
                _single_pass, arguments, {}, context, owners=route.named, rows=served, call=(inputs, kwargs)
            )
        else:
            outputs = [
                _sub_batch(model, inputs, kwargs, n, index, batch, context, targets) for n, index in rows.items()
            ]
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
    whole = model.family.even(*inputs) and _row_by_row(model, order)
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


@dataclass(eq=False)
class Route:
    """Which rows of a batch each adapter serves; made by `model.route(names)`, for one size of batch.

    Under `torch.compile` the work that is no tensor's is done here: which ops run at which modules. All routes of the same
    adapters then run the same graph, whichever rows these serve.
    """

    batch: int
    rows: Parts  # samples (n,) of each adapter, None: of the bare backbone
    back: Tensor  # (B,): where in the outputs, which stand together by adapter, each sample is
    attached: tuple[str, ...]
    sites: list[tuple[Site, tuple[tuple[Op, ...], ...]]] | None = None  # what runs; None: not in one pass

    @classmethod
    def of(cls, model: Model, names: Sequence[str | None], batch: int, plan: bool = False) -> Route:
        """Checked; `plan`: with what a compiled model needs."""
        if len(names) != batch:
            raise ConfigError(
                f"adapters= has {len(names)} names for a batch of {batch}; give one name (or None) for each sample."
            )
        order = list(dict.fromkeys(names))
        for name in order:
            if name is not None:
                model._known(name)
        device = model.device
        rows = {n: torch.tensor([i for i, m in enumerate(names) if m == n], device=device) for n in order}
        back = torch.empty(batch, dtype=torch.long, device=device)
        back[torch.cat(list(rows.values()))] = torch.arange(batch, device=device)
        route = cls(batch, rows, back, tuple(model.adapters.keys()))
        if plan:
            one_more_set(model, [f"route: {name}" for name in rows])
            train_also(model, route.named)
            if _row_by_row(model, order):
                here = model._state.here()
                try:
                    model._serve((route.named, route.served, batch, None, False, None))
                    route.sites = [(site, site.running()) for site in model._sites.values() if site.ops]
                finally:
                    model._serve(here)
        return route

    @property
    def named(self) -> tuple[str, ...]:
        """The adapters."""
        return tuple(name for name in self.rows if name is not None)

    @property
    def served(self) -> dict[str, Tensor]:
        """The rows of each of them, and as "" those of the bare backbone."""
        return {name or "": rows for name, rows in self.rows.items()}

    def check(self, model: Model) -> None:
        """Raise ConfigError if adapters have come or gone since the route was made."""
        if self.attached != tuple(model.adapters.keys()):
            raise ConfigError("adapters were added or removed since model.route(...): make the route anew.")

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """What each adapter's rows gave, as rows of the batch."""
        if len({tuple(o.shape[1:]) for o in outputs}) > 1:
            shapes = ", ".join(f"{n}: {tuple(o.shape[1:])}" for n, o in zip(self.rows, outputs))
            raise ConfigError(
                f"the heads of the named adapters have different widths ({shapes}); call the model once for each."
            )
        return torch.cat(list(outputs)).index_select(0, self.back)


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
    if route.sites is None or targets is not None:
        raise ConfigError(
            "One of these adapters needs a sub-batch of its own (it changes the sequence or the backbone's parameters, or its "
            "head needs more than features), which is not compiled. Call the model itself, or the compiled one for each adapter."
        )
    route.check(model)
    state = model._state
    here = state.here()
    before = [(site, site.running()) for site, _ in route.sites]
    served = route.served
    state.active, state.route, state.batch = route.named, served, route.batch
    for site, ops in route.sites:
        site.run_only(ops)
    try:
        call = (inputs, kwargs)
        outputs = model._framed(
            _single_pass, (model, inputs, kwargs, route.rows), {}, context, owners=route.named, rows=served, call=call
        )
    finally:
        state.active, state.route, state.batch = here[0], here[1], here[2]
        for site, ops in before:
            site.run_only(ops)
    return route.joined(outputs)


def _row_by_row(model: Model, order: Sequence[str | None]) -> bool:
    """Whether these adapters (None: the bare backbone) can serve their rows of one batch in one pass."""
    if any(model._rich(name) for name in order):
        return False
    named = [name for name in order if name is not None]
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
