"""To say something of every pixel: its class, whether it is an edge, a number, a direction.

    model = zoo.load("swin-b", "lora", num_classes=11, head="dense")
    zoo.fit(model, "camvid/train.parquet", "camvid/val.parquet", task="segment")

| task | outputs | targets | losses, the default first | measured by (`vision.metrics.dense`) |
| --- | --- | --- | --- | --- |
| `segment` | one for each class | (B, H, W) classes | `cross-entropy`, `focal`, `dice` | miou, pixel_accuracy, mean_accuracy |
| `edges` | 1 | (B, H, W) of 0 and 1 | `balanced-bce`, `bce` | ods_f |
| `depth` | 1 | (B, H, W) numbers | `l1`, `mse`, `huber` | mae, rmse |
| `normals` | 3 | (B, 3, H, W) directions | `cosine`, `l1` | angle_error, within_30 |

The model's head is one of maps ("dense"). Its logits are brought to the targets' size (bilinear). A loss is the mean over the
pixels of an item that have a value, then over the items, so that neither parts nor processes change it; items without any such
pixel count 0, and data without any such item are refused. `balanced-bce` weighs edges by the share of the other pixels and
these by the share of edges (Xie & Tu 2015). `dice` is 1 - 2 sum p t / (sum p + sum t), the mean over the classes that occur in
an item. Data are opened by `vision.data.dense.open_dense`; several tasks at once are trained by `zoo.run(model, "multitask",
data={...})`.

Images are resized to the backbone's size, whatever their shape, and maps with them; measured is at that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vision.data.dense import IGNORE, DenseDataset, DenseRows, open_dense
from vision.data.dense_transform import DenseTransform
from vision.data.dense_valued import check_valued
from vision.metrics.dense import Angles, Contours, Distances, Overlap
from vision.tasks.dense_tasks import ManyDense
from zoo import register_task
from zoo.data.labels import bare
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.heads import Head
from zoo.host import Host
from zoo.tasks import Weighted, call
from zoo.tasks.base import check_names

__all__ = ["Dense", "Depth", "Edges", "Normals", "Segment", "at_size"]


def at_size(logits: Tensor, size: Any) -> Tensor:
    """(B, K, h, w) -> (B, K, H, W), bilinear."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def mean_over(values: Tensor, kept: Tensor) -> Tensor:
    """(B, H, W) -> (B,): the mean over the pixels of an item that are kept, 0 without any."""
    count = kept.flatten(1).sum(1)
    return torch.where(kept, values, torch.zeros_like(values)).flatten(1).sum(1) / count.clamp(min=1)


class Dense(Weighted):
    """Base of these tasks."""

    on_head = True
    head = "dense"
    outputs: ClassVar[int | None] = None  # width of the head; None: one for each class
    width: int | None = None  # of several tasks on one head: how many outputs are this one's

    @classmethod
    def source(cls, data: Any, *, classes: list[str] | None = None, **options: Any) -> DenseDataset:
        """As `open_dense` opens it; classes are of maps of these alone."""
        return open_dense(data, cls.name, classes=classes if cls.outputs is None else None, **options)

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> DenseDataset:
        """A data set of (image, map); see `open_dense`."""
        counted = self.outputs is None and not isinstance(data, DenseDataset)
        names, least = (model.classes, 0 if train else model.num_classes) if counted else (None, 0)
        dataset = open_dense(data, self.name, split=split, least=least)
        own = dataset.classes or []
        if names is not None and own != names and (len(own) < len(names) or (len(own) == least and bare(own))):
            dataset = open_dense(data, self.name, split=split, classes=names)  # a split that lacks the last classes
        if dataset.transform is not None:
            if train and augment not in (None, "none"):
                raise ConfigError(f"augment is left to the transform that '{dataset.name}' brings; leave it out.")
            return dataset
        rows: Any = dataset.rows
        made: Any = DenseTransform(model.family.data_config(), self.name, train, augment, getattr(rows, "derive", None))
        return dataset.with_transform(made)  # type: ignore[return-value]

    def check(self, model: Host, dataset: Any, what: str = "data set") -> None:
        """Raise unless the head says as much of every pixel as the data do."""
        model.family.check_wanted(("maps",), f"the task '{self.name}'")
        for name in model.active:
            adapter: Any = model.adapters[name]
            if adapter.own_features:
                raise ConfigError(
                    f"'{adapter.method}' changes pooled features, which the task '{self.name}' does not read: it would learn "
                    "nothing. Take another method."
                )
        wanted = len(dataset.classes or ())
        head = model.head
        if not isinstance(head, Head) or "maps" not in head.needs:
            have = f"a head of {model.num_classes} classes for each image" if model.num_classes else "no head"
            raise ConfigError(
                f"The task '{self.name}' needs a head that reads maps, and the model has {have}. Load it with "
                f"num_classes={wanted}, head='{self.head}', or give it one: model.reset_head({wanted}, kind='{self.head}')."
            )
        if model.num_classes != wanted:
            raise MismatchError(
                f"The {what} '{dataset.name}' has {wanted} {'classes' if self.outputs is None else 'values for each pixel'}, the "
                f"model's head {model.num_classes}. Load the model with num_classes={wanted}, head='{self.head}'."
            )
        if self.outputs is None:  # opened with other names, maps would be called otherwise and hold the same values
            check_names(model, dataset, what, "Equal values have to mean equal classes.")
        if self.class_weights is not None and self.outputs is not None:
            raise ConfigError(f"class_weights are of classes; '{self.name}' has none.")
        check_valued(dataset, what)

    def check_batch(self, model: Host, dataset: Any, targets: Any) -> None:
        """Raise DataError for targets of another form."""
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        wanted = 4 if self.outputs == 3 else 3
        if not isinstance(targets, Tensor) or targets.ndim != wanted or (wanted == 4 and targets.shape[1] != 3):
            form = "(B, 3, H, W)" if wanted == 4 else "(B, H, W)"
            raise DataError(
                f"{dataset.name}: targets {shape}; expected {form}. The data are opened by open_dense(...)."
            )
        if targets.is_floating_point() or self.outputs is not None:
            return
        kept, classes = targets[targets != IGNORE], self.width or model.num_classes
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < classes:
            wrong = int(kept.min()) if int(kept.min()) < 0 else int(kept.max())
            raise DataError(f"{dataset.name}: a pixel of class {wrong}; the model has 0..{classes - 1}.")

    @classmethod
    def together(cls, data: Mapping[str, Any]) -> Any:
        """Several of these tasks at once (`vision.tasks.dense_tasks`)."""
        return ManyDense(data)

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The mean over items; the outputs are at the size of the targets."""
        return self.of(model, call(model, inputs), targets, label_smoothing)

    def of(self, model: Host, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(mean loss, outputs (B, K, H, W)) of a head's logits."""
        outputs = at_size(logits.float(), targets.shape[-2:])
        return self.objective(model, outputs, targets, label_smoothing), outputs

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """Nothing: a map is no label of an image."""
        return {}


def _plain(function: Any) -> Any:
    """A loss without classes."""

    def loss(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        if label_smoothing:
            raise ConfigError("label_smoothing is of classes; these maps have none.")
        return function(outputs, targets)  # type: ignore[no-any-return]

    return loss


def _cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B, K, H, W), (B, H, W) -> (B, H, W)."""
    return F.cross_entropy(outputs, targets, ignore_index=IGNORE, label_smoothing=label_smoothing, reduction="none")


def _focal(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(1 - p)^2 times the cross-entropy of a pixel."""
    plain = F.cross_entropy(outputs, targets, ignore_index=IGNORE, reduction="none")
    return (1 - (-plain).exp()) ** 2 * _cross_entropy(outputs, targets, label_smoothing)


def _dice(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,)."""
    kept = (targets != IGNORE)[:, None]
    p = outputs.softmax(1) * kept
    t = F.one_hot(targets.masked_fill(targets == IGNORE, 0), outputs.shape[1]).permute(0, 3, 1, 2) * kept
    both, all_ = (p * t).flatten(2).sum(2), (p + t).flatten(2).sum(2)
    there = t.flatten(2).any(2)
    share = torch.where(there, 2 * both / all_.clamp(min=1e-6), torch.zeros_like(both))
    return torch.where(there.any(1), 1 - share.sum(1) / there.sum(1).clamp(min=1), torch.zeros_like(share[:, 0]))


@register_task("segment")
class Segment(Dense):
    """A class for each pixel."""

    hub = "image-segmentation"
    monitor = "miou"
    losses: ClassVar[Mapping[str, Any]] = {"cross-entropy": _cross_entropy, "focal": _focal, "dice": _plain(_dice)}

    def objective(self, model: Host, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Pixels may weigh by their class while training."""
        weighs = self.weights is not None and model.training
        if callable(self.chosen) or self.chosen == "dice":
            if weighs:
                raise ConfigError(
                    "class_weights weigh pixels; this loss is of whole maps. Take cross-entropy or focal."
                )
            return super().objective(model, outputs, targets, label_smoothing)
        values = self.losses[self.chosen or "cross-entropy"](outputs, targets, label_smoothing)
        kept = targets != IGNORE
        if weighs:
            assert self.weights is not None
            values = values * self.weights.to(values)[targets.masked_fill(~kept, 0)]
        return mean_over(values, kept).mean()

    def balanced(self, dataset: Any, count: int) -> list[float]:
        """n / (K n_c) of pixels; reads every map once."""
        rows: DenseRows = dataset.rows
        found = torch.zeros(count, dtype=torch.float64)
        for index in dataset.indices.tolist():
            try:
                value = rows.map(index)
            except DataError:
                if dataset.on_error == "skip":
                    continue
                raise
            found += torch.bincount(value[value != IGNORE], minlength=count)[:count]
        there = found > 0
        return torch.where(there, found.sum() / (there.sum() * found.clamp(min=1)), torch.ones_like(found)).tolist()  # type: ignore[no-any-return]

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """miou and accuracies."""
        return {"overlap": Overlap(self.width or model.num_classes, IGNORE)}


def _bce(outputs: Tensor, targets: Tensor) -> Tensor:
    kept = targets != IGNORE
    values = F.binary_cross_entropy_with_logits(outputs[:, 0], (targets == 1).float(), reduction="none")
    return mean_over(values, kept)


def _balanced_bce(outputs: Tensor, targets: Tensor) -> Tensor:
    kept, edge = targets != IGNORE, targets == 1
    share = (edge.flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1))[:, None, None]
    values = F.binary_cross_entropy_with_logits(outputs[:, 0], edge.float(), reduction="none")
    return mean_over(values * torch.where(edge, 1 - share, share), kept)


@register_task("edges")
class Edges(Dense):
    """Whether a pixel is an edge."""

    outputs, monitor = 1, "ods_f"
    losses: ClassVar[Mapping[str, Any]] = {"balanced-bce": _plain(_balanced_bce), "bce": _plain(_bce)}

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """ods_f."""
        return {"contours": Contours(IGNORE)}


def _numbers(function: Any) -> Any:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        kept = targets.isfinite()
        return mean_over(function(outputs[:, 0], targets.nan_to_num(0.0), reduction="none"), kept)

    return _plain(loss)


@register_task("depth")
class Depth(Dense):
    """A number for each pixel."""

    hub = "depth-estimation"
    outputs, monitor = 1, "rmse"
    losses: ClassVar[Mapping[str, Any]] = {
        "l1": _numbers(F.l1_loss),
        "mse": _numbers(F.mse_loss),
        "huber": _numbers(F.huber_loss),
    }

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """mae, rmse."""
        return {"distances": Distances()}


def _directions(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(directions, true ones, which are known)."""
    kept = targets.isfinite().all(1)
    true = torch.where(kept[:, None], targets, torch.ones_like(targets))
    return F.normalize(outputs, dim=1), F.normalize(true, dim=1), kept


def _cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    said, true, kept = _directions(outputs, targets)
    return mean_over(1 - (said * true).sum(1), kept)


def _l1(outputs: Tensor, targets: Tensor) -> Tensor:
    said, true, kept = _directions(outputs, targets)
    return mean_over((said - true).abs().sum(1), kept)


@register_task("normals")
class Normals(Dense):
    """A direction for each pixel."""

    outputs, monitor = 3, "angle_error"
    losses: ClassVar[Mapping[str, Any]] = {"cosine": _plain(_cosine), "l1": _plain(_l1)}

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """angle_error, within_30."""
        return {"angles": Angles()}
