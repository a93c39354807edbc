"""Sites: where the ops of adapters meet the modules of a backbone.

A third-party module keeps its class, its parameters and its keys. All that is ever added to it is one forward pre-hook and
one forward hook (or, where a hook cannot reach, an instance attribute `forward`), owned by a `Site`, which runs the ops of
the adapters that are active. Taking the last op away takes the hooks away.

The hooks stay while an adapter is only switched off: `torch.compile` does not guard hooks, but it does guard the tuples
of ops that they read, so every set of active adapters is compiled once and switching back compiles nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.engine.memory import Saver
from zoo.engine.second_order import exact
from zoo.engine.state import Place, State
from zoo.engine.swaps import held
from zoo.points.foreign import kept_by
from zoo.points.rows import is_transposed


@dataclass(eq=False)
class Op:
    """One change at one module.

    `where` says how `fn` is called: "input": `x -> x`; "output": `(x, y) -> y`, with x the module's first input (the first
    keyword's value if there are only keywords) and y its output (the first of a tuple);
    "watch_input": `x -> None` and "watch_output": `y -> None`, which change nothing; "watch_call": `(x, again) -> None`
    with x in front of all "input" ops and `again` an `Again`, or None; "forward": not called by the site
    itself but read by the site's replacement of `forward` (attention, blocks), as are other words of a family's own;
    "around": `fn(run, ...)` in place of the module's forward, which it may call as `run`.
    """

    owner: str
    where: str
    fn: Callable[..., Any]
    point: str
    verb: str = ""
    # of a reparametrized weight; None: `fn(run, x, W, b)` sees the whole projection
    rows: tuple[int, int] | None = None
    modules: tuple[nn.Module, ...] = ()  # the adapter's modules that `fn` runs, shared ones too: see `parts`
    # May be applied to some rows of the batch only; false for what changes the sequence length, for example.
    per_row: bool = True
    # 1: runs behind the ops of all adapters at this module; 2: behind these too, to see what the backbone itself goes on with
    last: int = 0
    excludes: tuple[str, ...] = ()  # verbs of other adapters that cannot be active at the same module


def parts(*modules: nn.Module) -> tuple[nn.Module, ...]:
    """An adapter's modules, and those that they, or modules inside of them, have in common with others.

    Such a module is named by the attribute `shared`, a tuple, so that torch registers it only where it belongs.
    """
    found: dict[nn.Module, None] = dict.fromkeys(modules)
    for module in modules:
        for part in module.modules():
            others = getattr(part, "shared", ())
            if isinstance(others, tuple) and others:
                found |= dict.fromkeys(parts(*others))
    return tuple(found)


@dataclass(eq=False)
class Site:
    """Everything that adapters have put at one module of the backbone."""

    module: nn.Module
    state: State
    ops: list[Op] = field(default_factory=list)
    inputs: tuple[Op, ...] = ()
    outputs: tuple[Op, ...] = ()
    forwards: tuple[Op, ...] = ()
    arounds: tuple[Op, ...] = ()
    # Which outputs can be given back by recomputation: "" nothing; "cheap": elementwise; "product": a matrix product
    recompute: str = ""
    # The weight is kept by another library: its function may return a view, to which nothing can be added in place
    foreign: bool = False
    _handles: list[Any] = field(default_factory=list)

    def refresh(self) -> None:
        """Take up the set of active adapters; install hooks if there is anything to run, take them away if not."""
        active = self.state.active if self.state.route is None else tuple(self.state.route)
        live = sorted((op for op in self.ops if op.owner in active), key=lambda op: (op.last, active.index(op.owner)))
        self.inputs = tuple(op for op in live if op.where in ("input", "watch_input", "watch_call"))
        self.outputs = tuple(op for op in live if op.where in ("output", "watch_output"))
        self.forwards = tuple(op for op in live if op.where == "forward")
        self.arounds = tuple(op for op in live if op.where == "around")
        wanted = bool(self.ops) or bool(self.recompute)
        self.foreign = bool(kept_by(self.module))
        if wanted and not self._handles:
            self._handles = [self.module.register_forward_hook(self._after, with_kwargs=True)]
            self._handles.append(self.module.register_forward_pre_hook(self._before, with_kwargs=True))
        elif not wanted and self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        self.reset()
        # An instance attribute shadows the class's method: class, parameters and keys of the module stay as they are.
        if self.replaces():
            around = any(op.where == "around" for op in self.ops)
            self.module.__dict__["forward"] = self.surrounded if around else self.forward
        else:
            self.module.__dict__.pop("forward", None)

    def running(self) -> tuple[tuple[Op, ...], ...]:
        """The ops that run now."""
        return self.inputs, self.outputs, self.forwards

    def run_only(self, ops: tuple[tuple[Op, ...], ...]) -> None:
        """Run exactly these, as `running` gave them: a part of `refresh` that can be traced."""
        self.inputs, self.outputs, self.forwards = ops[:3]

    def reset(self) -> None:
        """The mode or the set of adapters changed: forget what was computed for evaluation."""

    def replaces(self) -> bool:
        """Whether the module's forward must be ours."""
        return any(op.where in ("forward", "around") for op in self.ops)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs instead of the module's own forward while there are "forward" ops; subclasses say how."""
        return self.original(*args, **kwargs)

    def surrounded(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, inside of what replaces the module as a whole: `fn(run, ...)`."""
        run: Callable[..., Any] = self.forward
        for op in self.arounds:
            self._seen(op)
            run = functools.partial(self.state.around, op.fn, run)
        return run(*args, **kwargs)

    # -- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """In a copy of the whole model a site of that model; where only a part of the backbone is copied, one without ops."""
        twin = memo[id(self)] = object.__new__(type(self))
        owner = getattr(self.state.switch, "__self__", None)
        if owner is None or id(owner) in memo:
            twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        else:  # the copied block is the library's own: what adapters do here belongs to the model, which stays where it is
            twin.__init__(copy.deepcopy(self.module, memo), State(Saver()))  # type: ignore[misc]
        return twin

    def settle(self) -> None:
        """A copied model: forget what was computed, and see to it that the hooks on the module are this site's."""
        self.reset()
        if self._handles and site_at(self.module) is not self:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self.refresh()

    # -- what torch calls -------------------------------------------------------------------------------------------

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.inputs:
            return None
        x = entered = self.read_input(args, kwargs)
        for op in self.inputs:
            self._seen(op)
            if op.where == "watch_call":
                self._watch(op, entered, self._again(op, args, kwargs))
            elif op.where == "watch_input":
                self._watch(op, x)
            else:
                x = self._apply(op, x)
        return self.write_input(args, kwargs, x)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        noting = self.recompute and self.state.saver.recording and len(args) == 1 and not kwargs
        if noting and self.recompute == "cheap":
            self.state.saver.note(output, _own_forward, (module, held(module), args[0]))
        if not self.outputs and not noting:
            return None
        x = self.read_input(args, kwargs)
        y = self.read_output(output)
        if self.foreign and self.outputs:
            y = y.clone()
        product = noting and self.recompute == "product" and not self.stochastic()
        if product and self.outputs:  # an op may keep the product itself (a scale's gradient needs it)
            self.state.saver.note(y, self._replay, ((held(module), self.forwards, (), self.state.place()), x))
        for op in self.outputs:
            self._seen(op)
            if op.where == "watch_output":
                self._watch(op, y)
            elif not (op.verb == "replay" and self.state.aside):  # it has seen this pass already
                y = self._apply(op, x, y)
        if product and not self.state.saver.knows(y):  # what an op noted comes back from the product, which is run once
            then = (held(module), self.forwards, self.outputs, self.state.place())
            self.state.saver.note(y, self._replay, (then, x))
        return self.write_output(output, y)

    # -- which tensor of a call the ops see; a family's own sites may show another one (`Backbone.site_kind`) ---------

    def read_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The first argument, or the first keyword's value."""
        return args[0] if args else kwargs[next(iter(kwargs))]

    def write_input(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with what the ops made of `read_input`."""
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

    def read_output(self, output: Any) -> Tensor:
        """The output, or the first of a tuple."""
        return output[0] if isinstance(output, tuple) else output

    def write_output(self, output: Any, y: Tensor) -> Any:
        """The output with what the ops made of `read_output`."""
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _replay(self, then: tuple[Any, ...], x: Tensor) -> Tensor:
        """The output once more, behind the input ops, with the parameters and adapters of the time of the forward pass."""
        parameters, forwards, outputs, place = then
        now = self.forwards, self.outputs, self.state.here()
        self.forwards, self.outputs = forwards, outputs
        self.state.put((*place[:5], None if place[5] is None else place[5].kept()))
        try:
            with _parameters(self.module, parameters):
                y = self.forward(x)
            for op in outputs:
                y = y if op.where == "watch_output" else self._apply(op, x, y)
            return y
        finally:
            self.forwards, self.outputs = now[:2]
            self.state.put(now[2])

    def _seen(self, op: Op) -> None:
        if self.state.watching is not None:
            self.state.watching.add(f"{op.owner}/{op.point}")

    def _watch(self, op: Op, tensor: Tensor, *more: Any) -> None:
        if self.state.aside:
            return
        if self.state.serving is not None:
            if op.owner == self.state.serving:
                self.state.run(op.fn, tensor, *more)
            return
        rows = None if self.state.route is None else self.state.rows(op.owner, tensor.shape[0])
        self.state.run(op.fn, tensor if rows is None else tensor.index_select(0, rows), *more)

    def _again(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Again | None:
        """The call once more, if it is the frozen module's alone."""
        state = self.state
        alone = state.route is None and state.serving is None and state.active == (op.owner,)
        if not alone or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        *here, frame = state.here()
        place = (*here, None if frame is None else frame.bare())
        return Again(self, self.write_input(args, kwargs, None), place)  # type: ignore[arg-type]

    def _apply(self, op: Op, *tensors: Tensor) -> Tensor:
        """Run an op on all rows, or on those that its adapter serves; the last tensor is the one that changes."""
        if self.state.serving is not None:
            return self.state.change(op.fn, *tensors) if op.owner == self.state.serving else tensors[-1]
        if self.state.route is None:
            return self.state.change(op.fn, *tensors)
        rows = self.state.rows(op.owner, tensors[-1].shape[0])
        if rows is None or len(rows) == 0:
            return tensors[-1]
        changed = self.state.change(op.fn, *(t.index_select(0, rows) for t in tensors))
        return tensors[-1].index_copy(0, rows, changed.to(tensors[-1].dtype))

    def stochastic(self) -> bool:
        """Whether running this module twice gives two results: a live dropout in it or in its adapters."""
        ops = (*self.outputs, *self.forwards)
        modules: Iterable[nn.Module] = [self.module, *(m for op in ops for m in op.modules)]
        return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for root in modules for m in root.modules())


@dataclass(eq=False)
class Again:
    """A module's call, to be made once more on another first input, and without a graph."""

    site: Site
    call: tuple[tuple[Any, ...], dict[str, Any]]
    place: Place

    def __call__(self, x: Tensor) -> Tensor:
        """What came out of the module for x, at the time of the forward pass."""
        if self.place[5] is not None:
            self.place[5].first = False
        state = self.site.state
        with torch.no_grad():
            if state.narrow is None:
                return state.run_at(self.place, self._run, x)
            with torch.autocast(state.narrow[0], enabled=False):
                return state.run_at(self.place, self._run, x.to(state.narrow[1]))

    def _run(self, x: Tensor) -> Tensor:
        state, site = self.site.state, self.site
        before, state.aside = state.aside, True  # nobody who watches the tokens must take this for another pass
        try:
            args, kwargs = site.write_input(*self.call, x)
            return site.read_output(site.module(*args, **kwargs))
        finally:
            state.aside = before


def _differentiable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a gradient flows into any of the tensors. A block without one keeps nothing, and is not run again."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))


@contextmanager
def _parameters(module: nn.Module, parameters: dict[str, Any]) -> Iterator[None]:
    """A module with the parameters that it had at some time."""
    before = module._parameters
    stood = {name: module.__dict__.pop(name) for name in parameters if name in module.__dict__}
    module.__dict__["_parameters"] = parameters
    try:
        yield
    finally:
        module.__dict__["_parameters"] = before
        module.__dict__.update(stood)


def _own_forward(module: nn.Module, parameters: dict[str, Any], x: Tensor) -> Tensor:
    """A module's own forward, without hooks, with the parameters that it had at the time of the forward pass."""
    with _parameters(module, parameters):
        return type(module).forward(module, x)  # type: ignore[arg-type]


def site_at(module: nn.Module) -> Site | None:
    """The site whose hooks are on a module."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Site)), None)


class LinearSite(Site):
    """A projection whose weight adapters may reparametrize, each on what those before it made of it.

    `fn(W_slice) -> W_slice` for rows [start, stop) of W; or, for op.rows None, `fn(run, x, W, b) -> y`, which calls
    `run(x, W', b')` for what comes behind it: the projection itself if it is the last.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim_in) -> (..., dim_out)."""
        if not self.forwards:
            return self.original(x)
        run: Callable[..., Tensor] = nn.functional.linear
        for op in reversed(self.forwards):
            run = functools.partial(self._reparametrized, op, run)
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return run(x, weight.T if is_transposed(self.module) else weight, self.module.bias)

    def _reparametrized(self, op: Op, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        self._seen(op)
        if op.rows is None:
            return self.state.run(op.fn, run, x, weight, bias)
        start, stop = op.rows
        new = self.state.change(op.fn, weight[start:stop])
        return run(x, new if stop - start == len(weight) else torch.cat([weight[:start], new, weight[stop:]]), bias)


class BlockSite(Site):
    """A residual block that can be replaced, or checkpointed (`model.memory = "min"`)."""

    checkpointed: bool = False
    learns: bool = True  # whether an active adapter has anything to train inside the block

    def replaces(self) -> bool:
        """Also while the block is checkpointed."""
        return self.checkpointed or super().replaces()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run by the block instead of its own forward."""
        run = self.original
        for op in self.forwards:
            if op.verb in ("replace", "run"):
                self._seen(op)
                # a run calls the blocks' inside, with what other adapters do there
                fn = op.fn if op.verb == "run" else functools.partial(self.state.around, op.fn)
                run = functools.partial(fn, run)
        if any(op.verb == "run" for op in self.forwards):  # which keeps what it needs by itself
            return run(*args, **kwargs)
        learns = self.learns or self.state.route is not None or _differentiable(args, kwargs)
        if self.checkpointed and learns and torch.is_grad_enabled() and not exact():
            if not torch.compiler.is_compiling():
                run = functools.partial(self.state.run_at, self.state.place(), run)
                run = functools.partial(self.state.steady, self.state.damping, run)
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)
