"""What a method is: a dataclass of settings that attaches modules to points, and may take part in training.

An `Adapter` is an `nn.Module`. Its parameters stand under the names of points (`blocks.3.attn.q.lora_a`), never under
module paths of a library, so freezing, saving, counting and sharding follow, and a rename in timm breaks no saved file.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from zoo.adapters.structure import Structured
from zoo.errors import ConfigError, MergeError, nearest
from zoo.fields import check_fields, fits, hints_of, other_type
from zoo.points import Point, Points

if TYPE_CHECKING:
    from zoo.host import Host
    from zoo.points import Merger
    from zoo.tasks.base import Task

__all__ = ["Adapter", "Initial"]

LARGEST = 1e6  # of a setting that is a float; none has a meaning beyond
# What a setting is called that makes a method larger, the first of them that it has (`Adapter.of_size`)
SIZES = ("rank", "num_tokens", "bottleneck", "hidden", "width", "channels")


class Initial(Protocol):
    """Values that a fresh adapter starts with (`zoo.disk.starts.Start`)."""

    def room(self, model: Host) -> AbstractContextManager[Any]:
        """A context in which attaching takes no more memory than these values justify."""

    def fill(self, model: Host, adapter: Adapter) -> None:
        """Put them into an adapter that has attached, or raise MismatchError."""

    def told(self) -> str:
        """What a card says of them."""


@dataclass(eq=False)
class Adapter(Structured):
    """Base of all methods. Subclasses are `@register_adapter("name") @dataclass` with plain JSON types as fields.

    `__post_init__` of a subclass checks the settings and must call `super().__post_init__()` first.
    """

    method: ClassVar[str] = ""
    needs_calibration: ClassVar[bool] = False
    trains_backbone: ClassVar[bool] = False  # the backbone is put in train mode too (full fine-tuning)
    # A network beside the backbone that only reads it: alone, it learns nothing through the backbone, whose inputs then get
    # no gradient
    side_network: ClassVar[bool] = False
    # What it does to a token of a causal tower never depends on later tokens: texts may run without what fills their context
    looks_back: ClassVar[bool] = False
    # Names of the blocks that shall run again in backward from their input whatever `model.memory` is, but "off": `attach` may
    # say so where they learn nothing themselves and only hand gradients on
    reruns: ClassVar[tuple[str, ...]] = ()
    plans_steps: ClassVar[bool] = False  # its own schedule spans the steps of a run, which cannot become others then
    stateless: ClassVar[bool] = False  # attaches nothing (linear probe)
    default_lr: ClassVar[float] = 1e-3
    default_weight_decay: ClassVar[float] = 0.01  # of matrices; vectors have none
    no_weight_decay: ClassVar[tuple[str, ...]] = ()  # patterns of parameters that have none: ("*.lora_e",)
    paper: ClassVar[str] = ""  # "Hu et al. 2021; Liu et al. 2024"
    # how surveys would file it: "additive", "selective", "reparametrised", "hybrid" or "system"; shown by `zoo list`
    taxonomy: ClassVar[str] = ""
    # Settings that came later: a saved adapter that lacks them has their defaults, which do what was done before
    later: ClassVar[tuple[str, ...]] = ()
    # Values of another adapter as a start (`zoo.disk.starts`): settings that are a length, with the patterns of the tensors
    # whose first dimension it is; and settings whose differences `started` translates
    lengths: ClassVar[dict[str, tuple[str, ...]]] = {}
    translated: ClassVar[tuple[str, ...]] = ()
    # What it promises, to the reader of the table of methods and to the tests of all methods (tests/adapters/test_methods.py)
    identity: ClassVar[bool] = True  # starts as the pretrained function, to the bit
    # Whether what it changes is linear in its parameters, from where they change nothing: weighted sums are exact then
    sums: ClassVar[bool] = False
    # Its gradient is handed straight through a step and is that of no function: second derivatives are refused (`straight`)
    straight_through: ClassVar[bool] = False
    merges: ClassVar[bool] = True  # folds into the weights; false: is refused
    # Why it never does, and what to do instead: what follows "cannot be merged: "
    unmerged: ClassVar[str] = (
        "what it adds is not a change of the weights. Keep the model as it is, or save the adapter with "
        "model.save_adapter(folder)."
    )
    trial: ClassVar[dict[str, Any]] = {}  # small settings without dropout, with which it is tried
    trial_families: ClassVar[tuple[str, ...]] = ("vit", "swin")  # of these, those that have its points
    large: ClassVar[bool] = (
        False  # millions of parameters on any backbone: the compatibility table tries it with `trial`, too
    )
    # Options of `zoo.load` that it needs, where the family has them among its `point_options`
    point_options: ClassVar[dict[str, Any]] = {}
    head_kind: ClassVar[str] = ""  # the head that it is made for, a name of `zoo.heads.HEADS`; "": any
    in_template: ClassVar[bool] = False  # its vectors stand in the slots of that head's template, and in no other text

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self._init_structure()
        # What `attach` needs to know besides the settings, such as the points that a calibration chose: JSON types, saved
        # with the adapter and put back before it attaches again. None: not decided yet.
        self.plan: dict[str, Any] | None = None
        self.initial: Initial | None = (
            None  # what it starts as, instead of its own initial values; until it is attached
        )
        self.of_values = False  # values that are there already are put into it: its sizes are theirs, and not to choose
        check_fields(self, f"'{self.method or type(self).__name__}' setting '{{}}'")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            finite = not isinstance(value, float) or abs(value) <= LARGEST  # false for NaN
            self.check(finite, f"{f.name} is {value}; expected a number between -{LARGEST:g} and {LARGEST:g}.")

    # -- what a method implements -----------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Choose points and use their verbs.

        Raises:
            AttachError: this backbone has no such points, or a dimension does not fit. Nothing is attached then.
        """
        raise TypeError(f"{type(self).__name__} does not implement attach(points).")

    def merge(self, merger: Merger) -> None:
        """Fold this method into the weights, by the calls of `merger`.

        Raises:
            MergeError: the mathematics does not allow it (the default).
        """
        raise MergeError(f"'{self.method}' cannot be merged: {self.unmerged}")

    def check_decided(self) -> None:
        """Raise MergeError where data decide what is attached, and none were seen: merged, it would be another network."""
        if self.needs_calibration and self.plan is None:
            raise MergeError(
                f"'{self.method}' decides by data where it acts, and has seen none: nothing is decided yet. Train it with "
                "zoo.fit, or call calibrate, then merge."
            )

    def low_rank(self, points: Points) -> dict[str, tuple[Tensor, Tensor]] | None:
        """A (r, i) and B (o, r) of each point's change `B A` of its weight, by name; None: it is none (the default)."""
        return None

    def started(self, source: Adapter, tensors: dict[str, Tensor], points: Points) -> dict[str, Tensor]:
        """The values with which this adapter starts, of the `tensors` of a `source` whose settings in `translated` may differ."""
        return tensors

    def cut(self, moved: Any, before: Points, after: Points) -> tuple[Adapter, dict[str, Tensor | None]] | None:
        """For a backbone of which parts were taken out (`zoo.prune`): an unattached twin, and those of its tensors that are not
        cut along their axes, by their new names (None: there is no such tensor any more). None: all are (the default).

        `moved` (`zoo.model.pruning.Moved`) says what stays, of the points `before` at those `after`.
        """
        return None

    def features(self, pooled: Tensor) -> Tensor:
        """What the head sees, from the pooled features (B, d); returns (B, feature_dim(d))."""
        return pooled

    def feature_dim(self, dim: int) -> int:
        """Width of what `features` returns for pooled features of width `dim`."""
        return dim

    def logits(self, logits: Tensor, outputs: Mapping[str, Any]) -> Tensor:
        """What becomes of the head's logits (B, K).

        `outputs` holds "pooled" (B, d), what the head needed besides, and "classes": the names of the classes, None if they have
        none.
        """
        return logits

    @property
    def own_features(self) -> bool:
        """Whether the head sees something else than the pooled features."""
        return type(self).features is not Adapter.features

    @property
    def behind_head(self) -> bool:
        """Whether it changes logits."""
        return type(self).logits is not Adapter.logits

    @property
    def batch_wise(self) -> bool:
        """Whether, while training, what one sample gives depends on the others of its batch (batch statistics)."""
        return False

    def init_head(self, head: Any) -> None:
        """Initial values of a head that was made for this adapter: of its `head_kind`, or of the width of `feature_dim`."""

    def release(self) -> None:
        """The forward pass is over, or broke off: drop what was kept for `features`."""

    # -- taking part in training; all optional ----------------------------------------------------------------------

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Before training, with (inputs, targets) batches of this task; called only if `needs_calibration`.

        `zoo.probing(model, task)` gives the task's loss on a batch without side effects. None: what the model is for.
        """

    def fit_start(self, model: Host, optimizer: Any, total_steps: int) -> None:
        """Training begins; `optimizer` is the optimizer service."""

    def epoch_start(self, model: Host, epoch: int) -> None:
        """An epoch (counted from 0) begins; not called again when training goes on in the middle of one."""

    def step_start(self, model: Host, step: int) -> None:
        """In front of the forward pass of an optimizer step."""

    def extra_loss(self, model: Host, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """A term that is added to the loss, or None."""
        return None

    def after_backward(self, model: Host, step: int) -> None:
        """Gradients are there, unscaled and not yet clipped."""

    def after_step(self, model: Host, step: int) -> None:
        """The optimizer has stepped; gradients are not yet zeroed."""

    def step_end(self, model: Host, step: int) -> None:
        """A step is over, gradients are zeroed."""

    def epoch_end(self, model: Host, epoch: int) -> None:
        """An epoch is over."""

    def eval_start(self, model: Host) -> None:
        """An evaluation begins."""

    def eval_end(self, model: Host) -> None:
        """An evaluation is over."""

    def fit_end(self, model: Host) -> None:
        """Training is over, the chosen weights are in the model."""

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """What every layer has now of that which training changes, such as its rank: {"rank": {"blocks.0.attn.q": 3}}.

        Asked at the end of every epoch, in every process; a fit's report holds it and draws it (`layers.png`).
        """
        return {}

    def ready(self) -> bool:
        """Whether this method has reached what it trains towards, such as a budget of parameters.

        An epoch that ends before that is not chosen as the best, and patience does not count it.
        """
        return True

    def extra_state(self) -> dict[str, Any] | None:
        """For checkpoints, what lives neither in parameters nor in buffers: numbers, text and tensors in dicts and lists."""
        return None

    def load_extra_state(self, model: Host, state: dict[str, Any]) -> None:
        """Go on from what `extra_state` gave; called before tensors return to their places."""

    # -- settings ---------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings and tensors as they are written to disk. A method that trains in another form folds here."""
        return self.config(), self.state_dict()

    @classmethod
    def load_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The inverse of `saved`: the settings with which the adapter is attached, and the tensors that then fill it.

        What is folded into a form that this method can also train in (`prefix` with its MLP) needs no inverse.
        """
        return config, tensors

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any] | None:
        """The settings that make it as large as `size` says (1 is the smallest), so that methods can be compared at one budget.

        By default its first setting of `SIZES` that takes a whole number. None: it has no size, or none so large.
        """
        hints = hints_of(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        return next(({name: size} for name in SIZES if name in known and fits(1, hints[name])), None)

    def to_come(self) -> int:
        """How many parameters training adds to those that are there now; comparisons at one budget count them."""
        return 0

    @classmethod
    def from_config(cls, config: dict[str, Any], strict: bool = False) -> Adapter:
        """A fresh, unattached adapter with these settings; `strict` wants every field to be given.

        Raises:
            ConfigError: an unknown setting, one of the wrong type, or (strict) one that is missing.
        """
        hints = hints_of(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        for name, value in config.items():
            if name not in known:
                raise ConfigError(f"'{cls.method}' has no setting '{name}'. {nearest(name, known)}")
            if not fits(value, hints[name]):
                raise ConfigError(other_type(f"'{cls.method}' setting '{name}'", value, hints[name]))
        if strict and (missing := known - set(config) - set(cls.later)):
            raise ConfigError(f"the settings of '{cls.method}' lack {', '.join(sorted(missing))}.")
        values = {k: tuple(v) if isinstance(v, list) and _wants_tuple(hints[k]) else v for k, v in config.items()}
        return cls(**values)

    def fresh(self) -> Adapter:
        """An unattached adapter with the same settings and plan."""
        twin = type(self)(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        twin.plan, twin.initial, twin.of_values = self.plan, self.initial, self.of_values
        return twin

    def check(self, condition: bool, message: str) -> None:
        """Raise ConfigError with the method's name in front unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{self.method or type(self).__name__}: {message}")

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's, by the tree alone: names of points may be words of an adapter (`features.0`)."""
        node: nn.Module = self
        for part in target.split(".") if target else []:
            found = node._modules.get(part)
            if found is None:
                raise AttributeError(f"{type(self).__name__} has no module '{target}'.")
            node = found
        return node

    def module_at(self, point: Point | str) -> Any:
        """What this adapter registered under a point's name."""
        return self.get_submodule(point if isinstance(point, str) else point.name)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.config().items())
        return f"{type(self).__name__}({settings})"


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _wants_tuple(hint: Any) -> bool:
    return any(h is tuple or typing.get_origin(h) is tuple for h in (hint, *typing.get_args(hint)))
