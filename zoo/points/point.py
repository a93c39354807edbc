"""What points of every kind have in common (`zoo.points.kinds`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from zoo.errors import AttachError
from zoo.points.layout import Layout

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False, kw_only=True)
class Point:
    """A named place. `name` is the same on every backbone of a family and in saved files; `path` is the library's module."""

    kind: ClassVar[str] = ""
    verbs: ClassVar[tuple[str, ...]] = ()

    name: str
    role: str
    path: str
    block: int | None = None
    stage: int | None = None
    tower: str = ""
    dim_in: int = 0
    dim_out: int = 0
    layout: Layout | None = field(default=None, repr=False)  # of the tokens inside of a block; None: not described
    # Whether what passes here has a row, or as many rows, for each sample; not where images of all samples stand together
    by_sample: bool = field(default=True, repr=False)
    # Why nothing can be folded into the weight here, though hooks reach it; "": it can
    unmergeable: str = field(default="", repr=False)
    module: nn.Module = field(repr=False)
    session: Recorder | None = field(default=None, repr=False)

    def _record(self, verb: str, module: nn.Module | None, **options: Any) -> None:
        if self.session is None:
            raise AttachError(
                f"'{verb}' was called on point '{self.name}' outside of an adapter. Verbs work only inside "
                "Adapter.attach(points), on the points handed in; use model.add_adapter(...) to run it."
            )
        self.session.record(self, verb, module, **options)

    def holder(self, name: str) -> tuple[nn.Module, str] | None:
        """The module that holds this point's `weight` or `bias`, and the parameter's name there; None if there is none."""
        return (self.module, name) if self.module._parameters.get(name) is not None else None

    def keep(self, name: str, parameter: nn.Parameter) -> None:
        """Register a parameter of the adapter under this point's name, without any op."""
        if self.session is None:
            raise AttachError(f"'keep' was called on point '{self.name}' outside of Adapter.attach.")
        self.session.keep(self, name, parameter)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is a projection of the channels at each place: of size 1, and not in groups."""
    conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return conv and set(module.kernel_size) == {1} and module.groups == 1  # type: ignore[arg-type,return-value]


# What a block that is skipped hands on, of the tokens that take its output's place, and of the arguments of its call
HandsOn = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Any]


def tokens_alone(y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Of a block that hands on its tokens and nothing else."""
    return y
