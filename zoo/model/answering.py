"""What a model answers where a pooled vector and a plain head are not enough: named outputs, heads that need them, logits
behind the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.engine.context import batch_of
from zoo.errors import CallError, ConfigError, ZooError
from zoo.heads import Head

if TYPE_CHECKING:
    from zoo.model import Model


def named_outputs(model: Model, inputs: tuple[Any, ...], want: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`Backbone.outputs` with the active adapters, memory recorded as in `features`."""
    risen = model._enter()
    try:
        if torch.compiler.is_compiling():
            return _outputs(model, inputs, want, kwargs)
        return _recorded(model, inputs, want, kwargs)
    finally:
        model._state.settle(risen)


def _recorded(model: Model, inputs: tuple[Any, ...], want: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        with called(model, inputs, kwargs), model._state.saver.record(model.device):
            return _outputs(model, inputs, want, kwargs)
    finally:
        for adapter in model._active_adapters():
            adapter.release()


# What Python, the families' own `(images,) = inputs` and torch's convolutions say of what is no batch of theirs
UNCALLED = (
    *("positional argument", "unexpected keyword argument", "values to unpack", "multiple values for"),
    *("Input type (", "channels, but got", "Expected attn_mask dtype"),
)


@contextmanager
def called(model: Model, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A context in which the backbone runs, whose error over what is no batch says what a batch is.

    Raises:
        CallError: the library broke off, and the call has no tensor at all, or another number of arguments.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        short = any(words in str(error) for words in UNCALLED)
        if isinstance(error, ZooError) or not (short or batch_of(inputs, kwargs) is None):
            raise
        raise CallError(expected(model, inputs, kwargs)) from error


def expected(model: Model, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What a call should have been."""
    with torch.random.fork_rng(devices=[]):
        wanted = ", ".join(map(_kind, model.example_batch(2)))
    none = batch_of(inputs, kwargs) is None
    given = [_kind(x) for x in inputs] + [f"{name}={_kind(x)}" for name, x in kwargs.items()]
    make = (
        ""
        if not none or not inputs
        else " model.preprocess()(item) makes a tensor of one item; torch.stack makes a batch."
    )
    return (
        f"The model was called with ({', '.join(given)}), and '{model.backbone_name}' takes what model.example_batch() gives: "
        f"({wanted}).{make}"
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"'{name}': {_kind(x)}" for name, x in value.items()) + "}"
    return "None" if value is None else f"a {type(value).__name__}"


def apart(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs that get no gradient, where all that is trained stands beside the backbone (`Adapter.side_network`)."""
    freed = {k: x.detach() if isinstance(x, Tensor) else x for k, x in kwargs.items()}
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs), freed


def _outputs(model: Model, inputs: tuple[Any, ...], want: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    if model._beside:
        inputs, kwargs = apart(inputs, kwargs)
    found = model.family.outputs(*inputs, want=want, **kwargs)
    if "pooled" in found:
        for adapter in model._active_adapters():
            found["pooled"] = model._state.change(adapter.features, found["pooled"])
    return found


def answer(model: Model, head: nn.Module, inputs: tuple[Any, ...], targets: Any, kwargs: dict[str, Any]) -> Tensor:
    """Logits (B, K) of a head that needs named outputs, or behind which adapters stand."""
    behind = [a for a in model._active_adapters() if a.behind_head]
    rich = head if isinstance(head, Head) else None
    if targets is not None and (rich is None or not rich.sees_targets):
        raise ConfigError(f"targets= is for heads with margins; the head in use ({type(head).__name__}) sees none.")
    more = {} if rich is None else rich.more(model)
    needs = dict.fromkeys([*(("pooled",) if rich is None else rich.needs), *(("pooled",) if behind else ())])
    outputs = {**named_outputs(model, inputs, [n for n in needs if n not in more], kwargs), **more}
    if "pooled" in outputs:
        model.check_width(outputs["pooled"], head)
    if rich is not None:
        outputs |= rich.then(model, outputs)
    state = model._state
    if rich is None:
        logits: Tensor = state.run(head, outputs["pooled"])
    else:
        logits = state.run(rich, outputs, targets) if rich.sees_targets else state.run(rich, outputs)
    names = getattr(head, "classes", None) or model.classes
    for adapter in behind:
        logits = state.run(adapter.logits, logits, {**outputs, "classes": names})
    return logits


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """A context behind which buffers have the values that they had in front of it (running statistics of adapters)."""
    before = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
