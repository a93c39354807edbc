"""Heads that need more than pooled features: they say what, and may see the targets while training.

A plain head is any module that makes logits (B, K) of pooled features (B, d): `nn.Linear` and its like, called as they are. A
`Head` is called with a dict of outputs (`Backbone.outputs`) instead:

    logits = head(outputs, targets)        outputs: what `needs` names, by name; targets: in training, if `sees_targets`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from zoo.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["HEADS", "Head", "register_head"]

HEADS: dict[str, type[nn.Module]] = {}
H = TypeVar("H", bound=type[nn.Module])


def not_held(library: str = "the library") -> MismatchError:
    """The error where a merged module's classifier cannot be this head."""
    return MismatchError(
        f"the head does not sit on the backbone's own features, so {library}'s classifier cannot hold it. Merge the backbone "
        "alone (model.reset_head(0) takes the head off, save it before), or keep the model as it is."
    )


def register_head(name: str) -> Callable[[H], H]:
    """Class decorator: under which name heads of this class are made and saved."""

    def decorate(cls: H) -> H:
        if HEADS.get(name, cls).__qualname__ != cls.__qualname__:
            raise ConfigError(f"the head name '{name}' is taken by {HEADS[name].__qualname__}; choose another.")
        HEADS[name] = cls
        return cls

    return decorate


class Head(nn.Module):
    """Base of the heads that stand on named outputs.

    Args:
        in_features: d of the pooled features; out_features: K.
        place: device and dtype of the parameters.
    """

    needs: ClassVar[tuple[str, ...]] = ("pooled",)  # names of outputs, see `Backbone.outputs`
    sees_targets: ClassVar[bool] = False  # the task hands the targets to `forward` while training (margins)
    reads_names: ClassVar[bool] = False  # it makes its answers of the names of the classes
    of_maps: ClassVar[bool] = False  # it is made with `channels=`, those of each map (`Backbone.map_channels`)

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.classes: list[str] | None = None

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """The outputs that it needs, by name -> logits (B, K)."""
        raise TypeError(f"{type(self).__name__} does not implement forward.")

    def more(self, model: Host) -> dict[str, Any]:
        """Outputs that the head computes from inputs of its own (the texts of its classes) instead of those of the batch."""
        return {}

    def then(self, model: Host, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs that the head computes of those of the batch: texts that depend on each image."""
        return {}

    def usage(self, kind: str | None) -> tuple[list[str], list[str]] | None:
        """Python for cards: imports, and what to do with `model`. None: as the backbone's family says.

        Args:
            kind: name of the task that it was trained for, where that is known.
        """
        return None

    def name_classes(self, classes: Sequence[str]) -> None:
        """Take up the names of the classes, which heads that read them need.

        Raises:
            ConfigError: not one for each output.
        """
        if len(classes) != self.out_features:
            raise ConfigError(f"the head has {self.out_features} outputs, and there are {len(classes)} class names.")
        self.classes = [str(name) for name in classes]

    def extra_repr(self) -> str:
        """Width and number of classes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
