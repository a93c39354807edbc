"""To classify: one of the head's classes for each item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from zoo.data.joined import matched, with_classes
from zoo.data.labels import bare, probabilities
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.heads import Head
from zoo.registry import register_task
from zoo.tasks.base import call, check_names, check_whole, seen_targets
from zoo.tasks.losses import Weighted, cross_entropy, focal, one_versus_all

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["Classify", "class_range"]


@register_task("classify")
class Classify(Weighted):
    """One of the head's classes for each item: cross-entropy, or another of `zoo.tasks.losses`; accuracy and top-5 accuracy."""

    monitor, on_head, labels = "accuracy", True, "classes"
    losses = {"cross-entropy": cross_entropy, "focal": focal, "bce": one_versus_all}

    grows: ClassVar[bool] = False  # whether more classes will join the head, so that one is a beginning

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """As `Task.open`. Data whose classes are numbers are brought into the order of the model's; data to measure on may
        lack the last ones.
        """
        dataset = super().open(model, data, train=train, split=split, augment=augment)
        known, own = model.classes, dataset.classes
        if not own or not model.num_classes:
            return dataset
        if known and list(known) != own and sorted(known) == sorted(own) and all(n.isdecimal() for n in own):
            return with_classes(dataset, list(known))
        if not train and bare(own) and len(own) < model.num_classes:
            return dataset._like(classes=[str(i) for i in range(model.num_classes)])
        return dataset if train or known is None or len(known) != model.num_classes else matched(dataset, known)

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the head and the data set have the same classes."""
        check_whole(model, self.name, len(dataset.classes or ()))
        if not model.num_classes:
            count = len(dataset.classes) if dataset.classes else "<number of classes>"
            raise ConfigError(
                f"The model has no classification head (num_classes=0). Load it with num_classes={count}, or pass a loss of your "
                f"own.{_measured(model)}"
            )
        labels = dataset.labels
        if dataset.classes is not None and len(dataset.classes) != model.num_classes:
            raise MismatchError(
                f"The {what} '{dataset.name}' has {len(dataset.classes)} classes, the model's head {model.num_classes}. "
                f"Load the model with num_classes={len(dataset.classes)}, or open the data with classes=[...] (all "
                f"{model.num_classes} names, in the order of the head's outputs; labels follow the names that data have)."
            )
        if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < model.num_classes:
            wrong = int(((labels < 0) | (labels >= model.num_classes)).argmax())
            raise DataError(
                f"{dataset.where(wrong)}: label {labels[wrong]} is outside the model's {model.num_classes} classes "
                f"(0..{model.num_classes - 1})."
            )
        if dataset.targets is not None and (dataset.classes is None or not probabilities(dataset.targets)):
            kind = "multilabel" if dataset.classes is not None else "regression"
            raise DataError(
                f"{dataset.where(0)}: the target is {dataset.targets[0].tolist()!r:.60}; to classify, an item has one class "
                f"(a whole number or a text), or probabilities that sum to 1. These data are for a task of {kind}: pass task=..."
            )
        if model.num_classes == 1 and not self.grows:
            raise ConfigError(
                "The model's head has one output, and of one class there is nothing to learn: the loss is 0 whatever it says. "
                "For numbers pass task='regress', for one yes or no task='multilabel', or load the model with num_classes=2 or "
                "more."
            )
        check_names(model, dataset, what)
        if isinstance(head := getattr(model, "head", None), Head) and head.reads_names and head.classes is None:
            numbers = all(str(name).isdigit() for name in dataset.classes or ())
            known = model.classes or (None if numbers else dataset.classes)
            if known is None:
                raise ConfigError(
                    f"The head reads the names of its {model.num_classes} classes, and neither the model nor the {what} "
                    f"'{dataset.name}' has any (numbers are no names). Load the model with classes=[...], or open the data with "
                    "classes=[...]."
                )
            head.name_classes(known)

    def check_batch(self, model: Host, dataset: ImageDataset, targets: Tensor) -> None:
        """Raise DataError for labels that the head has no output for, and for targets that are none of a classification."""
        classes = model.num_classes
        if classes and (found := class_range(targets)) is not None and not 0 <= found[0] <= found[1] < classes:
            wrong = found[0] if found[0] < 0 else found[1]
            raise DataError(
                f"{dataset.name}: a label {wrong} is outside the model's {classes} classes (0..{classes - 1}). Mend the "
                f"labels, or load the model with num_classes={max(found[1] + 1, classes)}."
            )
        if not isinstance(targets, Tensor) or targets.ndim == 1:
            if not isinstance(targets, Tensor) or targets.is_floating_point():
                example = targets[0].item() if isinstance(targets, Tensor) else type(targets).__name__
                raise DataError(
                    f"{dataset.name}: a label is {example}; expected whole numbers, the indices of classes. Numbers are "
                    "regressed, by a task or loss for them (task=..., loss=...)."
                )
        elif targets.ndim == 2 and classes:
            sums = targets.float().sum(1)
            wrong_row = ((sums - 1).abs() > 1e-3) | (targets.float() < 0).any(1)
            if targets.shape[1] != classes or bool(wrong_row.any()) or not targets.is_floating_point():
                row = targets[int(wrong_row.float().argmax())].tolist()
                raise DataError(
                    f"{dataset.name}: a target is {row!r:.60}; expected a class index, or {classes} probabilities (floats) "
                    "that sum to 1. Several classes for each item are trained by task='multilabel'."
                )

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The loss of a batch; targets (B,) class indices or (B, num_classes) probabilities.

        Heads with margins see the targets while training.
        """
        outputs = call(model, inputs, **seen_targets(model, targets)).float()
        return self.objective(model, outputs, targets, label_smoothing), outputs


def _measured(model: Host) -> str:
    """A sentence: by which task the features of a model without a head are measured."""
    known = model.record.get("trained_for")
    if isinstance(known, str) and known not in ("classify", "custom", "multilabel", "regress"):
        return f" It was trained for '{known}', and is measured by task='{known}' (--task {known})."
    return " Its features themselves are measured by task='identify' (--task identify)."


def class_range(targets: Tensor) -> tuple[int, int] | None:
    """Smallest and largest label, or None if the targets are no class indices."""
    if targets.ndim != 1 or targets.is_floating_point() or not len(targets):
        return None
    return int(targets.min()), int(targets.max())
