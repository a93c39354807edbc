"""What adapters, tasks, the disk and the Hub may touch of a model.

A `Host` is `zoo.Model` as the floors below it see it: they name this protocol and never the class, so that the model can stand
on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.points import Points

__all__ = ["Host"]


class Host(Protocol):
    """A model: backbone, adapters and head."""

    backbone: nn.Module
    backbone_name: str
    backbone_kwargs: dict[str, Any]
    quantised: str
    family: Backbone
    points: Points
    adapters: nn.ModuleDict
    heads: nn.ModuleDict
    training: bool

    @property
    def fingerprint(self) -> str | None:
        """Of the backbone's weights as they are now."""

    @property
    def fingerprint_at_any_resolution(self) -> str | None:
        """The same without tables of positions."""

    @property
    def fingerprints(self) -> tuple[str | None, str | None]:
        """Both, of one look at the weights."""

    def fingerprint_as(self, options: dict[str, Any]) -> str | None:
        """The fingerprint of this backbone as it is built with other options."""

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in use, in order of application."""

    @property
    def head(self) -> nn.Module:
        """The head in use."""

    @property
    def head_name(self) -> str:
        """Which of `heads` is in use."""

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes of the head in use."""

    @classes.setter
    def classes(self, names: Sequence[str] | None) -> None:
        """Name them."""

    def take_names(self, names: Sequence[str] | None) -> None:
        """Name them as data or a file does, where two may share a name."""

    @property
    def record(self) -> dict[str, Any]:
        """What is known of the adapters in use together."""

    @record.setter
    def record(self, record: dict[str, Any]) -> None:
        """Replace it."""

    def record_of(self, names: str | Sequence[str]) -> dict[str, Any]:
        """What is known of these adapters together."""

    def set_record(self, names: str | Sequence[str], record: Mapping[str, Any]) -> None:
        """Keep a record of these adapters together."""

    def classes_of(self, head: str) -> list[str] | None:
        """Names of the classes of a head."""

    def head_for(self, names: Sequence[str]) -> str:
        """The head that is used when exactly these adapters are."""

    @property
    def num_classes(self) -> int:
        """Width of the head in use; 0 without one."""

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone."""

    @property
    def memory(self) -> str:
        """What is kept for backward."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model on a batch."""

    def features(self, *inputs: Any, **options: Any) -> Tensor:
        """What stands in front of the head."""

    def outputs(self, *inputs: Any, want: Sequence[str] = ("pooled",), **options: Any) -> dict[str, Any]:
        """Named outputs of the backbone."""

    def train(self, mode: bool = True) -> Any:
        """Training mode for adapters and head."""

    def eval(self) -> Any:
        """Evaluation mode."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All parameters."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with their names."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or unfreeze everything."""

    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""

    def num_parameters(self, trainable: bool = False, head: bool = True) -> int:
        """How many parameters there are."""

    def add_adapter(
        self, adapter: Any, name: str | None = None, *, num_classes: int | None = None, activate: bool = True
    ) -> Any:
        """Attach a fresh copy of an adapter and return it."""

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away."""

    def reattach(self, name: str, check: Any = None) -> Any:
        """Attach an adapter anew after its plan was decided."""

    def fresh_values(self, name: str) -> dict[str, Tensor | None]:
        """What an adapter holds when it is attached, None where that is drawn at random."""

    def set_active(self, *names: str, train: Any = None) -> None:
        """Use exactly these adapters."""

    def disable(self) -> AbstractContextManager[None]:
        """A context without any adapter."""

    def set_head(self, head: Any, classes: Any = None) -> None:
        """Another head."""

    def grow_head(self, classes: Any, std: float = 0.02) -> None:
        """Further classes for the head in use."""

    def reset_head(self, num_classes: int, classes: Any = None, kind: str = "linear") -> None:
        """A new, untrained head."""

    def context(self, **values: Any) -> AbstractContextManager[None]:
        """Values that adapters read in every forward pass inside."""

    def passing(self, run: Callable[[], Any], *inputs: Any, **kwargs: Any) -> Any:
        """`run()`, in which a library calls the backbone by itself, as one forward pass over these inputs."""

    def passing_routed(
        self, run: Callable[..., Any], names: Sequence[str | None], *inputs: Any
    ) -> list[tuple[Tensor, Any]]:
        """The same of `run(*inputs)` with the adapter of each sample: (rows, result), for the batch or for each adapter."""

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """Names of the context values that attached adapters read, each with these adapters."""

    def saved_bytes(self, *batch: Any, **options: Any) -> int:
        """Bytes kept for the backward of one training forward pass."""

    def to(self, *place: Any, **options: Any) -> Any:
        """Move or cast."""

    def in_use(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """The parameter that a module of the backbone reads under this name."""

    def all_or_nothing(self) -> AbstractContextManager[None]:
        """A context whose failure leaves adapters, heads and classes as they were."""

    def preprocess(self, train: bool = False, augment: str | None = None) -> Callable[[Any], Any]:
        """The backbone's own preprocessing."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that the backbone takes."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that the preprocessing subtracts."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that the preprocessing divides by."""

    def merge(self) -> nn.Module:
        """The plain module with the active adapters folded in."""
