"""Who listens while an adapter attaches: what points and families may ask of the session that records it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Carried", "Made", "Recorder", "Value"]


class Value(Protocol):
    """A value of the forward context, as an adapter's module reads it (`zoo.engine.context`)."""

    @property
    def given(self) -> bool:
        """Whether there is a value in this forward pass."""

    def rows(self, like: Tensor) -> Tensor:
        """(len(like), ...): the value of the sample that each row belongs to."""

    def get(self) -> Any:
        """The value as it is."""


class Carried(Protocol):
    """A place for a tensor on its way along the blocks within one forward pass (`zoo.engine.context`)."""

    def put(self, tensor: Tensor) -> None:
        """Leave a tensor for later ops."""

    def get(self, like: Tensor | None = None) -> Tensor | None:
        """What was put last, None if nothing was."""

    def take(self) -> Tensor | None:
        """As `get`, and nothing is left there."""


class Made(Protocol):
    """Generated weights, as an adapter's module reads them (`zoo.engine.generated`)."""

    def get(self) -> Any:
        """What the generator made for this forward pass."""

    def rows(self, like: Tensor) -> Tensor:
        """(len(like), ...): of what was made for each sample, that of the sample that each row belongs to."""


class Recorder(Protocol):
    """The session of one adapter, as the floors below see it (`zoo.engine.session.Session`)."""

    owner: str
    """The adapter's name in the model."""

    @property
    def site(self) -> Callable[[nn.Module, type[Any]], Any]:
        """`site(module, kind)`: the model's site at a module of the backbone, made if need be."""

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of the outputs that the backbone gives."""

    @property
    def feature_dim(self) -> int:
        """Width of the backbone's pooled features."""

    def skippable(self, point: Any) -> bool:
        """Whether the blocks behind one can do without it."""

    def data_config(self) -> Mapping[str, Any]:
        """What the backbone's inputs are like (`Backbone.data_config`)."""

    def record(self, point: Any, verb: str, module: nn.Module | None, **options: Any) -> None:
        """A verb of a point was called."""

    def keep(self, point: Any, name: str, value: nn.Parameter | nn.Module) -> None:
        """Register a parameter or module of the adapter under the point's name, without any op."""

    def share(self, name: str, module: nn.Module) -> None:
        """Register a module that several points have in common, once, under this name."""

    def generate(self, name: str, generator: nn.Module, values: Any) -> Any:
        """Register a module that makes the weights of several points once for each forward pass (`Made`)."""

    def op(self, site_module: nn.Module, op: Any, kind: type[Any] = ...) -> None:
        """Record an op (`zoo.engine.sites.Op`) at a module of the backbone."""

    def want(
        self, name: str, per: str, *, required: bool = True, choices: Sequence[str] = (), example: Any = None
    ) -> Any:
        """A value of the forward context (`Value`), or with per="forward" a place for a carried tensor (`Carried`)."""

    def mix(self, names: Sequence[str], make: Callable[[Any], nn.Module]) -> None:
        """Run other adapters and mix what they make, wherever all of them act."""

    def first_blocks(self, blocks: int, **options: Any) -> nn.Module:
        """A copy of what stands in front of the blocks and of the first ones, as a network of its own."""

    def train_everything(self, within: Sequence[str] | None = None) -> None:
        """Trainable copies of all parameters of the backbone, or of those in modules at these paths."""
