"""What a backbone family is: mostly a table that says which module path plays which role.

A family is a subclass of `Backbone` with a table of `Row`s for one block; `points_of_block` turns it into points. What is
not a table is how the family's attention takes more keys or queries (`record`), since that depends on its forward.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import AttachError, ConfigError, MergeError, MismatchError, nearest
from zoo.points import Point
from zoo.points.point import HandsOn, tokens_alone
from zoo.points.rows import Row, block_points, find

if TYPE_CHECKING:
    from zoo.data import ImageDataset
    from zoo.data.medium import Medium
    from zoo.points.recorder import Recorder


WRAPPED = "wrapped:"  # in front of the names of networks that a user brings (`zoo.wrap`)
OUTPUTS = {
    "pooled": "pooled features (B, d), on which a classifier stands",
    "tokens": "the last block's tokens behind the final norm, (B, N, d), prefix tokens in front (`model.family.num_prefix`)",
    "maps": "a list of maps (B, C, H, W), one for each stage, or that of the last block",
    "text": "features of the texts, (n, d), in the space of the pooled features",
    "scale": "by what similarities of images and texts are multiplied, and what is added to them, (2,)",
}


@dataclass(frozen=True)
class OwnWeights:
    """Weights that a user brought himself: the name of the file; if he says it, where they are from, and their licence."""

    file: str
    source: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Cut:
    """What is taken out along an axis of length `before`: the entries `kept` stay."""

    before: int
    kept: tuple[int, ...]


class Backbone:
    """Base of all families. An instance belongs to one built network, `module`."""

    family: ClassVar[str] = ""
    fallback: ClassVar[bool] = False  # asked for a name only where no other family takes it
    modality: ClassVar[str] = "image"
    noun: ClassVar[str] = "images"  # what the items of its data are called in messages and reports
    aliases: ClassVar[dict[str, str]] = {}
    block_table: ClassVar[Sequence[Row]] = ()
    # Modules inside a block whose output is an elementwise function of their input (norms are known by their points)
    elementwise: ClassVar[Sequence[str]] = ()
    # Linear points whose output is recomputed at memory="low"
    cheap_products: ClassVar[Sequence[str]] = ("up", "gate")
    weights_folder: ClassVar[Path | None] = None  # embedded weights and adapters
    # Whether `features` are pooled (B, d), which a classifier can stand on; false where the network's own output comes out
    # (an image of noise, scores of words), and `num_classes` is refused
    pools: ClassVar[bool] = True
    loads_in_dtype: ClassVar[bool] = False  # whether `build` takes `dtype=` and reads the checkpoint in it
    bare_sublayers: ClassVar[bool] = True  # a sublayer is a function of one tensor to one: it can be replaced
    # What `outputs` can be asked for, besides what a head computes itself
    gives: ClassVar[tuple[str, ...]] = ("pooled",)
    task: ClassVar[str] = "classify"  # what `zoo.fit` trains by default, a name of `zoo.tasks`
    beams: ClassVar[bool] = False  # it writes text, and where it does so by beams each sample has as many rows
    # Why no graph of it can be written (`zoo.to_onnx`); "": it can be tried
    no_graph: str = ""
    # Options of `zoo.load` that say which points there are: a saved adapter brings those that it was attached with
    point_options: ClassVar[tuple[str, ...]] = ()
    # Whether the blocks of one tower and stage are called one after another, each with what the one before gave and with the same
    # further arguments, and return the tokens alone: they can then be run by hand (`zoo.engine.blocks`)
    plain_blocks: ClassVar[bool] = False
    passed_by: HandsOn | None = (
        None  # where they are none: what a block hands on that is skipped, not the first of its stack
    )
    # Name and options of a member that builds and runs in milliseconds, for the compatibility table and the tests
    tiny: ClassVar[tuple[str, dict[str, Any]] | None] = None
    tiny_classes: ClassVar[int | None] = 3  # width of its head; None: no head
    # The options of `build` that a saved adapter may bring: sizes and the like, never what is read and how. Each with what
    # it may be: a range (whole numbers, or lists of them), float (numbers, or lists of them), bool, str (a list of words), a
    # tuple of texts to choose from, a pattern that a text matches, or a mapping of the same kind. See `zoo.disk.trust`.
    saved_options: ClassVar[Mapping[str, Any]] = {}
    # Patterns of the names of parameters that no forward pass here reads (a mask token of pretraining): nothing trains them
    unread: ClassVar[Sequence[str]] = ()

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.pretrained = False  # set by zoo.load: whether the weights are those of `hub_id`
        self.own_weights: OwnWeights | None = None  # set by zoo.load where they are the user's
        self.asked: int | None = None  # width of a new head, set by the model before it asks for the network's own
        self.own_output = False  # set by take_head: nothing was taken off, the network's own output comes out

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """Whether the family builds a backbone of this (library's) name; a string says why it almost does."""
        return False

    @classmethod
    def known(cls, name: str) -> bool:
        """Whether a (library's) name is of a source that is registered here or in the library; without a network.

        A saved adapter may name such a backbone; any other one needs the user's word (`zoo.load(trust_backbone=...)`).
        """
        return name in cls.aliases.values()

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's own module, with its own classifier if it has one."""
        raise TypeError(f"{cls.__name__} does not implement build.")

    @classmethod
    def options(cls, num_classes: int | None, given: dict[str, Any]) -> dict[str, Any]:
        """The options of `zoo.load` with those that follow from the width of the head; they are recorded as if given."""
        return given

    @classmethod
    def describes(cls, module: nn.Module) -> bool:
        """Whether this family describes a network that its user has built (`zoo.wrap`); otherwise the generic one takes it."""
        return False

    def again(self, module: nn.Module, name: str) -> Backbone:
        """This description, of a changed copy of the network."""
        return type(self)(module, name)

    def configure(self, **options: Any) -> None:
        """Take up options that concern this description rather than the library's module."""

    # -- what the model asks ----------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """All points, in forward order."""
        raise TypeError(f"{type(self).__name__} does not implement points.")

    @property
    def refused(self) -> Mapping[str, str]:
        """Projections that are no points, by their path, and why: known when `points` was called."""
        return {}

    def features(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Pooled features (B, d) of a batch."""
        raise TypeError(f"{type(self).__name__} does not implement features.")

    def outputs(self, *inputs: Any, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """What `want` names (`OUTPUTS` describes each), of a batch, in one pass.

        Raises:
            ConfigError: a name that there is not. MismatchError: one that this family does not give.
        """
        self.check_wanted(want)
        return {"pooled": self.features(*inputs, **kwargs)}

    def check_wanted(self, want: Sequence[str], what: str = "this") -> None:
        """Raise unless `outputs` can give all of these; `what` needs them."""
        for name in want:
            if name not in OUTPUTS:
                raise ConfigError(f"there is no output '{name}'. {nearest(name, OUTPUTS)}")
            if name not in self.gives or (name == "pooled" and not self.pools):
                have = ", ".join(n for n in self.gives if n != "pooled" or self.pools) or "none"
                raise MismatchError(
                    f"{what} needs the output '{name}' ({OUTPUTS[name]}), which '{self.name}' of the family '{self.family}' does "
                    f"not give (it gives: {have})."
                )

    def packs(self, module: nn.Module) -> bool:
        """Whether a sublayer's module gives (y, None) rather than y."""
        return False

    def hands_on(self, point: Point) -> HandsOn | None:
        """What a block hands on that is skipped (`BlockPoint.skip`); None: those behind it read something that it makes."""
        if self.plain_blocks:
            return tokens_alone
        return self.passed_by if point.block else None

    @property
    def num_prefix(self) -> int:
        """Class, register and other tokens in front of the patches in the output "tokens"."""
        return 0

    @property
    def feature_dim(self) -> int:
        """d of `features`."""
        raise TypeError(f"{type(self).__name__} does not implement feature_dim.")

    @property
    def map_channels(self) -> tuple[int, ...]:
        """C of each of the output "maps": by default the width of each stage's blocks, or of all blocks where there are none."""
        blocks = [point for point in self.points() if point.kind == "block"]
        widths = {
            p.stage: p.dim_out for p in blocks if p.tower == blocks[0].tower
        }  # of two towers that of images is first
        return tuple(widths.values())

    def take_head(self) -> nn.Module | None:
        """Remove the classifier from the module and return it (None if it has none)."""
        return None

    def new_head(self, num_classes: int, **factory: Any) -> nn.Module:
        """A classifier on `features`, with `in_features` and `out_features`; `factory` is its device and dtype."""
        return nn.Linear(self.feature_dim, num_classes, **factory)

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Put a classifier into a (merged) module of this family."""
        raise MergeError(
            f"The library's module of the family '{self.family}' has no place for a classifier. Merge without it (zoo.load(..., "
            "num_classes=0), or model.reset_head(0)) and keep `model.head` beside the merged module."
        )

    def name_classes(self, module: nn.Module, classes: Sequence[str]) -> None:
        """Write the names of the classes into a merged module, where its library keeps them; by default it keeps none."""

    def head_path(self) -> str | None:
        """Module path at which `put_head` puts a classifier; None if that is not one module."""
        return None

    def modules_to_train(self) -> Iterable[tuple[str, nn.Module]]:
        """(path, module) of everything whose own parameters full fine-tuning trains."""
        return self.module.named_modules()

    def reads(self, path: str, name: str) -> bool:
        """Whether the forward pass reads a parameter of the module at `path` (`unread`)."""
        place = ".".join(filter(None, (path, name)))
        return not any(fnmatch.fnmatch(place, pattern) for pattern in self.unread)

    def check_routed(self, *inputs: Any) -> None:
        """Raise ConfigError if the rows of what comes out do not belong to one sample each (per-sample adapters)."""

    def even(self, *inputs: Any, **kwargs: Any) -> bool:
        """Whether rows inside of the network belong to the samples in equal parts (windows, patches of images of one size).

        Where they do not, a batch of per-sample adapters goes through in one sub-batch for each adapter.
        """
        return True

    def check_pooled(self, method: str, *inputs: Any, **kwargs: Any) -> None:
        """Raise ConfigError if these inputs do not give the pooled features beside which a method puts its own."""

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in forward order."""
        return [p.module for p in self.points() if p.kind == "block"]

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One of the two halves of a block with its residual sum: "attn", then "mlp" of what that gave, is the block.

        `args` and `kwargs` are the further arguments of the block's call.

        Raises:
            AttachError: this family's blocks do not come in halves.
        """
        raise AttachError(
            f"the blocks of the family '{cls.family}' ({type(block).__name__}) are not described as an attention half and an "
            "MLP half."
        )

    def elementwise_modules(self) -> list[nn.Module]:
        """Modules whose outputs are recomputed rather than kept, besides the norms."""
        found = [find(block, path) for block in self.blocks() for path in self.elementwise]
        # Backward of these keeps the output itself; recomputing it from the input would keep both.
        return [m for m in found if m is not None and not isinstance(m, (nn.ReLU, nn.Sigmoid, nn.Tanh))]

    def data_config(self) -> dict[str, Any]:
        """`input_size` (3, H, W), `mean`, `std`, `interpolation`, `crop_pct` of the backbone's own preprocessing.

        Backbones of other inputs than images have words of their own (`sampling_rate`), or none.
        """
        return {}

    def licence(self) -> str | None:
        """Licence of the pretrained weights, as its source states it."""
        return None

    def hub_id(self) -> str | None:
        """The Hub repository of the pretrained weights, if they have one."""
        return None

    def hub_task(self, num_classes: int) -> str | None:
        """The Hub's name of what a model with so many classes (0: no head) is for."""
        return "image-classification" if num_classes else "image-feature-extraction"

    @property
    def brought(self) -> str:
        """What a reader of a card hands to `zoo.load` besides the adapter: a network that only its user can build."""
        return "network" if self.name.startswith(WRAPPED) else ""

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """Python for cards: imports, and what to do with `model`, whose head has so many classes (0: none)."""
        lines = ['image = model.preprocess()(Image.open("photo.jpg"))', told("image", self, num_classes)]
        return ["from PIL import Image"], lines

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random inputs for the tiny member, a batch of two."""
        return (torch.randn(2, *self.data_config()["input_size"]),)

    def stir(self) -> None:
        """Give a tiny random member numbers with which all of its parts act, where the library starts some of them at zero."""

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """Inputs of the shapes that the network is made for, `size` of each; `classify`: what a classifier stands on.

        By default the rows of `tiny_batch` again and again; a family whose tiny batch is smaller than the real ones says so.
        """
        return tuple(torch.cat([x] * -(-size // len(x)))[:size] for x in self.tiny_batch())

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """What a plain (merged) module of this family answers to the inputs of `features`."""
        return module(*inputs)  # type: ignore[no-any-return]

    def fold_shift(self, module: nn.Module, point: Point, shift: Tensor) -> bool:
        """Add `shift` (dim_out,) to a projection's output in a merged copy where it has no bias; false if that cannot be."""
        return False

    def restore(self, module: nn.Module) -> nn.Module:
        """A merged copy of the module with the library's own parts back in place of ours; by default there are none."""
        return module

    def site_kind(self, module: nn.Module, kind: type[Any]) -> type[Any]:
        """The class of the site at a module, where ops must see another tensor of its call than the first one."""
        return kind

    @classmethod
    def open_dataset(cls, data: Any, split: str | None = None, **options: Any) -> ImageDataset:
        """Data of this family's kind; by default images with labels (`zoo.open_dataset`, whose `options` these are)."""
        from zoo.data import open_dataset

        return open_dataset(data, split=split, **options)

    @classmethod
    def medium(cls) -> Medium:
        """What its items are as files (`zoo.data.medium`); by default images."""
        from zoo.data.medium import IMAGES

        return IMAGES

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Any]:
        """What makes an input of the backbone out of an item of a data set; by default out of a PIL image."""
        from zoo.data.preprocess import image_transform

        return image_transform(self.data_config(), train, **options)

    @classmethod
    def surgery(cls) -> Any:
        """What takes heads, neurons and blocks out of its modules (`zoo.model.pruning`), as `vision.families.parts.cutting`."""
        raise ConfigError(
            f"Taking heads, neurons or blocks out is not described for the family '{cls.family}': it depends on how its "
            "attention reads the projections. It is for vit and swin; zoo.sparsify and zoo.quantise work on every family."
        )

    @classmethod
    def children(cls) -> Any:
        """What can stand in place of its blocks' attentions and MLPs (`zoo.families.children.Children`)."""
        raise ConfigError(
            f"Cheaper sublayers in place of its own are not described for the family '{cls.family}': it depends on how its "
            "blocks call their attention. They are for vit, swin, decoder and vlm."
        )

    # -- verbs that depend on the family's attention ----------------------------------------------------------------

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Translate a verb of an `attention` or `tokens` point into ops (`session.op`)."""
        raise AttachError(f"'{verb}' is not available at {point.kind} points of the family '{self.family}'.")

    def first_blocks(self, blocks: int, **options: Any) -> Any:
        """A copy of what stands in front of the blocks and of the first `blocks` of these, as a network of its own."""
        raise AttachError(
            f"'{self.name}' is no transformer of videos: an encoder of its first blocks is described for those alone."
        )

    # -- the table --------------------------------------------------------------------------------------------------

    def points_of_block(
        self, module: nn.Module, prefix: str, path: str, dim: int, num_heads: int, **place: Any
    ) -> list[Point]:
        """Points of one block by the family's table (or another one, `table=`, where blocks are of several kinds).

        `prefix` is the block's point name, `path` its module path, `place` the block index, stage and tower, and options
        for the attention and tokens points as a dict `attention=` and `tokens=`.
        """
        table = place.pop("table", self.block_table)
        return block_points(table, module, prefix, path, dim, num_heads, **place)


def told(name: str, family: Backbone, num_classes: int) -> str:
    """The line of Python that calls `model` on one item."""
    result = f"logits = model({name}[None])  # (1, {num_classes})"
    return result if num_classes else f"features = model({name}[None])  # (1, {family.feature_dim})"
