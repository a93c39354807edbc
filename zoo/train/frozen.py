"""What a frozen backbone gives an item, as tensors that can be kept: its pooled features, and what queries read in its blocks.

    frozen = Frozen(model)
    tensors = frozen.take(images)           # pooled (B, d), and for each block that is asked its keys and values (B, W, h, N, c)
    with frozen.instead(read):              # read(*inputs) -> such tensors, or None: the backbone itself
        model(places)

Queries (`zoo.engine.queries`) change nothing in the backbone, so their keys and values stand still as pooled features do. With
them the queries run as ever, outside of their blocks: what they learn is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.engine.queries import Stream
from zoo.errors import ConfigError
from zoo.tasks import call

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Frozen", "only_asks"]

# What a method may bring that uses the inputs of a step, which are places in a table when features are kept
OF_INPUTS = ("calibrate", "fit_start", "step_start")


def only_asks(model: Model, name: str) -> bool:
    """Whether an adapter does nothing to the backbone but ask: its queries read keys and values, and the head reads answers."""
    ops = [op for site in model._sites.values() for op in site.ops if op.owner == name]
    adapter: Any = model.adapters[name]
    plain = all(getattr(type(adapter), hook) is getattr(Adapter, hook) for hook in OF_INPUTS)
    return bool(ops) and plain and all(op.verb == "query" for op in ops)


@contextmanager
def _put(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object in place of its class's, while entered."""
    thing.__dict__[name] = value
    try:
        yield
    finally:
        del thing.__dict__[name]


class Frozen:
    """The backbone of a model whose active adapters only ask, or do nothing to it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.order: list[Stream] = []  # as they run, from the first `take` on
        self.normed: list[bool] = []

    def _streams(self) -> list[Stream]:
        """The ways of the active queries through their blocks."""
        bound = [getattr(op.fn, "__self__", None) for site in self.model._sites.values() for op in site.outputs]
        return [s for s in dict.fromkeys(bound) if isinstance(s, Stream)]

    @torch.no_grad()
    def take(self, inputs: Any) -> list[Tensor]:
        """What the backbone gives a batch: pooled features, then keys and values of each block that is asked.

        Raises:
            ConfigError: it gives no pooled features.
        """
        family: Any = self.model.family
        own = family.features
        pooled: list[Any] = []
        caught: dict[Stream, tuple[Tensor, Tensor, bool]] = {}

        def features(*args: Any, **kwargs: Any) -> Any:
            pooled.append(own(*args, **kwargs))
            return pooled[-1]

        def noting(stream: Stream) -> Callable[[Tensor, Tensor, bool, int], Tensor]:
            def run(k: Tensor, v: Tensor, normed: bool, batch: int) -> Tensor:
                caught[stream] = (k.unflatten(0, (batch, -1)), v.unflatten(0, (batch, -1)), normed)
                return type(stream).run(stream, k, v, normed, batch)

            return run

        with ExitStack() as stack:
            stack.enter_context(_put(family, "features", features))
            for stream in self._streams():
                stack.enter_context(_put(stream, "run", noting(stream)))
            call(self.model.features, inputs)
        if not isinstance(pooled[-1], Tensor):
            raise ConfigError(
                f"cache_features keeps pooled features, and '{self.model.backbone_name}' gives a {type(pooled[-1]).__name__}. "
                "Train without it."
            )
        self.order, self.normed = list(caught), [normed for *_, normed in caught.values()]
        return [pooled[-1], *(t for k, v, _ in caught.values() for t in (k, v))]

    def give(self, tensors: Sequence[Tensor]) -> Tensor:
        """Run the queries on what was taken, and return the pooled features (B, d), as the backbone would."""
        pooled, *pairs = tensors
        for i, (stream, normed) in enumerate(zip(self.order, self.normed, strict=True)):
            k, v = (t.flatten(0, 1) for t in pairs[2 * i : 2 * i + 2])
            stream.module.caught = (k, v, normed)
            stream.leave(pooled)
        return pooled

    @contextmanager
    def instead(self, read: Callable[..., Sequence[Tensor] | None]) -> Iterator[None]:
        """While entered, inputs for which `read` has tensors do not go through the backbone."""
        family: Any = self.model.family
        own = family.features

        def features(*inputs: Any, **kwargs: Any) -> Any:
            found = read(*inputs, **kwargs)
            return own(*inputs, **kwargs) if found is None else self.give(found)

        with _put(family, "features", features):
            yield
