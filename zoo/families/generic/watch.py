"""One forward pass that is looked at: which modules ran, in which order, on which shapes, and what they handed to each other.

Hooks fire where a module is called. A library may read a module's weight instead (`F.linear(x, self.proj.weight)`, as
`nn.MultiheadAttention` does with its output projection): a hook there never runs, and a weight that is merged there changes what
the live adapter did not. Only a pass shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.engine.sites import site_at

LARGE = 50_000_000  # parameters beyond which a pass is made without numbers first


@dataclass
class Seen:
    """What one module did in the pass. Tensors are told apart by identity, within the pass."""

    order: int
    calls: int = 0
    entered: Tensor | None = None  # first tensor of the first call
    left: Tensor | None = None  # first tensor that the first call gave
    arguments: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of what went in and came out; () where that is no tensor."""
        return _shape(self.entered), _shape(self.left)


@dataclass
class Pass:
    """What a pass showed: modules by their path, and what came out of the network."""

    modules: dict[str, Seen] = field(default_factory=dict)
    output: Any = None
    read: set[str] = field(default_factory=set)  # modules whose parameters were used while they were not called
    picks: set[str] = field(default_factory=set)  # functions that choose rows by their values

    def forget(self) -> None:
        """Keep shapes, order, and who handed what to whom; let the numbers go."""
        self.output = None
        kept: dict[int, Tensor] = {}

        def shape(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.device.type == "meta":
                return tensor
            return kept.setdefault(id(tensor), torch.empty(tensor.shape, device="meta"))

        for seen in self.modules.values():
            seen.entered, seen.left = shape(seen.entered), shape(seen.left)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of an output or of arguments: itself, of a tuple, list, mapping, or a library's output class."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, (tuple, list)):
        return next((t for t in map(first_tensor, value) if t is not None), None)
    return None


@contextmanager
def watching(root: nn.Module) -> Iterator[Pass]:
    """A context in which every call of a module inside of `root` is noted."""
    seen = Pass()
    paths = {module: path for path, module in root.named_modules()}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        known = seen.modules.get(paths[module])
        if known is None:
            known = seen.modules[paths[module]] = Seen(len(seen.modules))
            known.entered, known.left = first_tensor(args or kwargs), first_tensor(output)
            known.arguments = len(args) + len(kwargs)
        known.calls += 1

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Reading(TorchFunctionMode):
    """Notes which modules' parameters are used besides their call, and what chooses rows by their values."""

    PICKS = frozenset(
        {"nonzero", "masked_select", "masked_scatter", "masked_scatter_", "argwhere", "argsort", "sort", "unique"}
    )

    def __init__(self, root: nn.Module, seen: Pass) -> None:
        super().__init__()
        self.seen = seen
        self.running: list[nn.Module] = []
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, module in root.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append((path, module))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the function does."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        values = [*args, *kwargs.values()]
        if name in self.PICKS or (name == "where" and len(values) == 1) or (name == "__getitem__" and _masks(args[1])):
            self.seen.picks.add("an index of truth values" if name == "__getitem__" else name)
        for value in values:
            for one in value if isinstance(value, (list, tuple)) else (value,):
                owners = self.owners.get(id(one), ()) if isinstance(one, nn.Parameter) else ()
                if owners and first_tensor(made) is not None and not any(m in self.running for _, m in owners):
                    self.seen.read.update(path for path, _ in owners)
        return made


def _masks(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) and part.ndim for part in parts)


@contextmanager
def reading(root: nn.Module, seen: Pass) -> Iterator[None]:
    """A context in which it is noted what is read besides calls (`Pass.read`), and what chooses rows (`Pass.picks`)."""
    mode = Reading(root, seen)

    def enter(module: nn.Module, args: Any) -> None:
        mode.running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        while mode.running and mode.running.pop() is not module:  # those that broke inside of it
            continue

    handles = [m.register_forward_pre_hook(enter, prepend=True) for m in root.modules()]
    handles += [m.register_forward_hook(leave) for m in root.modules()]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silent(root: nn.Module) -> Iterator[None]:
    """A context in which no adapter does anything."""
    sites = [site for module in root.modules() if (site := site_at(module)) is not None]
    running = [site.running() for site in sites]
    for site in sites:
        site.run_only(((), (), ()))
    try:
        yield
    finally:
        for site, ops in zip(sites, running):
            site.run_only(ops)


def run(
    root: nn.Module,
    call: Callable[..., Any],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    numbers: bool = False,
) -> Pass:
    """One small forward pass in evaluation mode; buffers, modes and random numbers are afterwards what they were.

    A large network runs without numbers (fake tensors) where it can, which costs no product, unless `numbers` are wanted.

    Raises:
        Whatever the network raises.
    """
    modes = {m: m.training for m in root.modules()}
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    count = sum(p.numel() for p in root.parameters())
    root.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if count > LARGE and not numbers and device.type != "meta":
                with suppress(Exception):  # what looks at numbers cannot run so; then it runs with them
                    return _fake(root, call, inputs, kwargs)
            buffers = [(b, b.clone()) for b in root.buffers() if b.device.type != "meta"]
            try:
                with watching(root) as seen, reading(root, seen):
                    seen.output = call(*inputs, **kwargs)
            finally:
                for buffer, value in buffers:
                    if buffer.shape == value.shape and not torch.equal(buffer, value):
                        buffer.copy_(value)
            return seen
    finally:
        for module, mode in modes.items():
            module.training = mode


def _fake(root: nn.Module, call: Callable[..., Any], inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        with watching(root) as seen, reading(root, seen):
            seen.output = call(*(fake(v) for v in inputs), **{k: fake(v) for k, v in kwargs.items()})
    return seen


def _shape(value: Tensor | None) -> tuple[int, ...]:
    return () if value is None else tuple(value.shape)
