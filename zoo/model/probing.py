"""Probing: looking at a model without leaving a trace.

    with zoo.probing(model, task) as probe:                     # the task's loss on batches; afterwards all is as before
        loss = probe.loss(inputs, targets)
        gradients = probe.gradients(loss)                       # by name; nothing is left in any .grad

    with zoo.capture(model, "mlp", reduce="covariance") as seen:   # what passes at points, reduced batch by batch
        for inputs, _ in batches:
            model(inputs)
    seen["blocks.3.mlp"]                                        # (d, d)

    with zoo.damped(model, "lora", {3: 0.0, 4: 0.5}):           # its effect at block 3 off, at block 4 halved
        model(inputs)

`probing` calls the task's loss and nothing else: no hook of an adapter (`step_start`, `extra_loss`, ...) runs, parameters keep
their gradients and flags, buffers their values, modules their modes, and Python, numpy and torch draw afterwards what they
would have drawn. A model wrapped for several processes is probed inside of its wrapper, by each process for itself.

A model that is not being looked at runs no line of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.data.seeds import kept_generators
from zoo.engine.memory import in_backward
from zoo.engine.sites import Site
from zoo.errors import ConfigError, DataError, SelectionError, nearest
from zoo.model.answering import kept_buffers
from zoo.points import LinearPoint, Point, SublayerPoint
from zoo.tasks import Task
from zoo.tasks.resolve import resolve

__all__ = ["REDUCTIONS", "Capture", "Probe", "capture", "probing"]


# -- the loss, and nothing else -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Probe:
    """What `zoo.probing` hands out."""

    model: Any
    task: Task
    train: bool

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        """The task's mean loss on a batch, a scalar with a graph; tensors are moved to the model's device and precision."""
        inputs, targets = self.moved(inputs, cast=True), self.moved(targets)
        wanted = getattr(self.model, "wanted", {})
        values = self.task.context(self.model, inputs, targets, training=self.train) if wanted else {}
        with self.model.context(**{k: v for k, v in values.items() if k in wanted}), torch.enable_grad():
            return self.task.loss(self.model, inputs, targets)[0]

    def gradients(self, loss: Tensor, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """d loss / d parameter by name; those that the loss does not reach are left out.

        Args:
            parameters: by default the trained ones. Those that were frozen when the loss was computed get none: let them learn
                first (`parameter.requires_grad_(True)`, which is put back afterwards).

        Raises:
            ConfigError: none of them needs a gradient.
        """
        chosen = dict(self.model.parameters_to_train() if parameters is None else parameters)
        live = {name: p for name, p in chosen.items() if p.requires_grad}
        if not live or not loss.requires_grad:
            raise ConfigError(
                "No gradient can be taken: all of the parameters are frozen. Let them learn inside of `probing`, before the loss "
                "is computed: parameter.requires_grad_(True)."
            )
        # not backward(): what waits at a parameter for its gradient (other processes, fused optimizers) hears nothing
        found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
        return {name: g for name, g in zip(live, found) if g is not None}

    def moved(self, value: Any, cast: bool = False) -> Any:
        """A batch's inputs or targets on the model's device; `cast`: floating-point numbers in its precision, too."""
        if isinstance(value, Tensor):
            return value.to(self.model.device, self.model.dtype if cast and value.is_floating_point() else None)
        if isinstance(value, Mapping):
            return {k: self.moved(v, cast) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self.moved(v, cast) for v in value)
        return value


@contextmanager
def probing(
    model: Any,
    task: str | Task | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    train: bool = False,
) -> Iterator[Probe]:
    """A context in which a task's loss is computed without side effects.

    Args:
        model: of zoo, or wrapped by DistributedDataParallel or torch.compile (what is inside is probed).
        task, loss: a task, its name, or a loss on (outputs, targets); by default what the model is for.
        train: in training mode (dropout on, drawn from the generators as they are); by default in evaluation mode.

    Raises:
        ConfigError: both a task and a loss, or no model of zoo. UnknownNameError: no such task.
    """
    model = unwrapped(model)
    probe = Probe(model, resolve(model, task, loss), train)
    parameters = list(model.parameters())
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    modes = [(m, m.training) for m in model.modules()]
    with kept_generators(), kept_buffers(model):
        try:
            for p in parameters:
                p.grad = None
            model.train(train)
            yield probe
        finally:
            for p, flag, grad in flags:
                p.requires_grad_(flag)
                p.grad = grad
            model.train(model.training)  # what was computed for this mode is forgotten
            for module, mode in modes:
                module.training = mode


def unwrapped(model: Any) -> Any:
    """The model of zoo inside of a wrapper (DistributedDataParallel, torch.compile)."""
    inner = getattr(model, "_orig_mod", model)
    inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
    inner = getattr(inner, "_orig_mod", inner)
    if not hasattr(inner, "parameters_to_train") or not hasattr(inner, "points"):
        raise ConfigError(f"A {type(model).__name__} cannot be probed; expected a model of zoo.load or zoo.wrap.")
    return inner


# -- what passes at points ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """`take` turns a batch (n, d) into numbers that are added up (or whose maximum is kept); `give` makes the result of them."""

    take: Callable[[Tensor], Tensor]
    give: Callable[[Tensor, int], Tensor]
    largest: bool = False


def _with_ones(x: Tensor) -> Tensor:
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return x.T @ x


def _covariance(sums: Tensor, n: int) -> Tensor:
    mean = sums[:-1, -1] / n
    return sums[:-1, :-1] / n - torch.outer(mean, mean)


# x (n, d): the tokens of all samples, in float64
REDUCTIONS = {
    "mean": Reduction(lambda x: x.sum(0), lambda s, n: s / n),  # (d,)
    "norm": Reduction(lambda x: x.norm(dim=1).sum(), lambda s, n: s / n),  # (): the mean length of a token
    "channel_norm": Reduction(lambda x: x.square().sum(0), lambda s, n: s.sqrt()),  # (d,): length over all tokens
    "absmax": Reduction(lambda x: x.abs().amax(0), lambda s, n: s, largest=True),  # (d,)
    "moment": Reduction(lambda x: x.T @ x, lambda s, n: s / n),  # (d, d): mean of x x^T
    "covariance": Reduction(_with_ones, _covariance),  # (d, d)
}


@dataclass(eq=False)
class Capture:
    """What `zoo.capture` collects: `seen[point]` is the reduced value so far; the memory is that of the results."""

    reduce: str | Callable[[Tensor], Tensor]
    names: tuple[str, ...]
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, point: str) -> Tensor:
        """The result at a point, in float32."""
        if point not in self.names:
            raise SelectionError(f"'{point}' is not captured. {nearest(point, self.names)}")
        return self._result(self._sum(point), self.counts[point])

    def results(self, all_processes: bool = False) -> dict[str, Tensor]:
        """By point, in forward order; `all_processes` joins what those of a distributed run have seen (all must call it)."""
        found = {}
        for name in self.names:
            total, count = self._sum(name), self.counts[name]
            if all_processes and dist.is_available() and dist.is_initialized():
                total, both = total.clone(), torch.tensor(count, device=total.device)
                largest = isinstance(self.reduce, str) and REDUCTIONS[self.reduce].largest
                dist.all_reduce(total, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
                dist.all_reduce(both)
                count = int(both)
            found[name] = self._result(total, count)
        return found

    def _sum(self, name: str) -> Tensor:
        if name not in self.sums:
            raise DataError(
                f"Nothing passed at '{name}'. Call the model inside of `capture`, without torch.compile (which leaves out hooks "
                "that came after it)."
            )
        return self.sums[name]

    def _result(self, total: Tensor, count: int) -> Tensor:
        give = REDUCTIONS[self.reduce].give if isinstance(self.reduce, str) else (lambda s, n: s / n)
        return give(total, count).float()

    @torch.no_grad()
    def add(self, name: str, value: Tensor) -> None:
        """Take up what passed at a point in one forward pass."""
        wide = torch.float32 if value.device.type == "mps" else torch.float64
        if isinstance(self.reduce, str):
            rule = REDUCTIONS[self.reduce]
            tokens = value.detach().reshape(-1, value.shape[-1]).to(wide)
            taken, count, largest = rule.take(tokens), len(tokens), rule.largest
        else:
            taken, count, largest = self.reduce(value.detach()).to(wide) * len(value), len(value), False
        before = self.sums.get(name)
        if before is None:
            self.sums[name] = taken
        else:
            self.sums[name] = torch.maximum(before, taken) if largest else before + taken
        self.counts[name] = self.counts.get(name, 0) + count


@contextmanager
def capture(
    model: Any,
    points: str | Iterable[str] | Iterable[Point],
    what: str = "output",
    reduce: str | Callable[[Tensor], Tensor] = "mean",
    *,
    kind: str | None = None,
) -> Iterator[Capture]:
    """A context that collects what passes at points, reduced over tokens, samples and batches in constant memory.

    Args:
        points: a selector (see `Points.select`), or points. kind: of points, where the selector leaves it open.
        what: "output" or "input", as the backbone goes on with it: behind the active adapters.
        reduce: a word of `REDUCTIONS`; or a function of what passes (B, ..., d), whose results are averaged over samples.

    Raises:
        ConfigError: unknown words, or a point that has no such side (attention). SelectionError: no such point.
    """
    model = unwrapped(model)
    if what not in ("input", "output"):
        raise ConfigError(f"what is '{what}'; expected 'input' or 'output'.")
    if isinstance(reduce, str) and reduce not in REDUCTIONS:
        raise ConfigError(f"There is no reduction '{reduce}'. {nearest(reduce, REDUCTIONS)}")
    given = points if isinstance(points, str) else list(points)
    named = isinstance(given, str) or all(isinstance(p, str) for p in given)
    chosen: list[Point] = model.points.select(given, kind=kind) if named else list(given)  # type: ignore[arg-type]
    taps = [(p, *_tap(p, what)) for p in chosen]
    seen = Capture(reduce, tuple(p.name for p in chosen))
    with ExitStack() as stack:
        for point, module, side in taps:
            tap = _Tap(model, seen, point, model.family.site_kind(module, Site)(module, model._state))
            if side == "output":
                handle = module.register_forward_hook(tap.output, with_kwargs=True)
            else:
                handle = module.register_forward_pre_hook(tap.input, with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


def _tap(point: Point, what: str) -> tuple[nn.Module, str]:
    """The module at which a point's input or output passes, and on which side of it."""
    if isinstance(point, SublayerPoint):
        return (point.entry, point.entry_side) if what == "input" else (point.exit, point.exit_side)
    if point.kind == "attention" or (point.kind == "tokens" and what == "output"):
        raise ConfigError(
            f"'{point.name}' ({point.kind}) has no single {what}. Capture its projections, or the block: "
            "zoo points lists them."
        )
    return point.module, what


@dataclass(eq=False)
class _Tap:
    """Hooks at one module, for one point."""

    model: Any
    seen: Capture
    point: Point
    site: Site  # knows which tensor of a call the family's points mean

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._live():
            self._add(self.site.read_input(args, kwargs))

    def output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._live():
            self._add(self.site.read_output(output), sliced=True)

    def _live(self) -> bool:
        """Not while prompts pass on their own, and not while backward computes something once more."""
        return not self.model._state.aside and not in_backward()

    def _add(self, x: Tensor, sliced: bool = False) -> None:
        point = self.point
        if isinstance(point, LinearPoint):
            if isinstance(point.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                x = x.movedim(1, -1)
            x = x[..., point.start : point.stop] if sliced and not point.whole else x
        self.seen.add(point.name, x)
