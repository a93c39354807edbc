"""The head in peft's format: a module that was trained whole, or a change of the classifier that the model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.errors import MismatchError, ZooError
from zoo.exchange.peft_reader import PeftAdapter

if TYPE_CHECKING:
    from zoo.model import Model


@dataclass(frozen=True)
class SavedHead:
    """A head that the model is to have."""

    num_classes: int
    state: dict[str, Tensor]


def fits(model: Model, head: nn.Module) -> bool:
    """Whether a head is of the kind that the library's module holds: an nn.Linear, or AST's with its norm."""
    return type(head) is type(_fresh(model, 1)) and getattr(head, "in_features", None) == model.family.feature_dim


def _fresh(model: Model, num_classes: int) -> nn.Module:
    return model.family.new_head(num_classes, device=torch.device("meta"))


def head_of(saved: PeftAdapter, model: Model) -> SavedHead | None:
    """The head that was saved whole, or the model's own with its LoRA or bias folded in.

    Raises:
        MismatchError: of another width or kind, or a change of a classifier that the model does not have.
    """
    path = model.family.head_path()
    if path is None:
        return None
    state = {
        f"{place[len(path) + 1 :]}.{name}".lstrip("."): value
        for place, parts in saved.whole.items()
        if place == path or place.startswith(f"{path}.")
        for name, value in parts.items()
    }
    return _whole(saved, model, state) if state else _changed(saved, model, path)


def _whole(saved: PeftAdapter, model: Model, state: dict[str, Tensor]) -> SavedHead:
    rows = [len(value) for value in state.values() if value.dim() == 2]
    try:
        own = _fresh(model, rows[-1]).state_dict() if rows else {}
    except ZooError:
        own = {}
    if {k: tuple(v.shape) for k, v in own.items()} != {k: tuple(v.shape) for k, v in state.items()}:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in state.items())
        wanted = ", ".join(f"{k} {tuple(v.shape)}" for k, v in own.items()) or "a weight (classes, width) and a bias"
        raise MismatchError(
            f"The head in '{saved.folder}' ({shapes}) does not fit the features of '{model.backbone_name}', which have width "
            f"{model.family.feature_dim}; expected {wanted}."
        )
    return SavedHead(rows[-1], state)


def _changed(saved: PeftAdapter, model: Model, path: str) -> SavedHead | None:
    """peft's "all-linear" and bias="all" change the classifier too, and do not save the classifier that they change."""
    delta, bias, own = saved.modules.get(path), saved.biases.get(path), model.head
    if delta is None and bias is None:
        return None
    what = "a LoRA on" if delta is not None else "a bias of"
    shape = tuple(own.weight.shape) if isinstance(own, nn.Linear) else None
    fitting = isinstance(own, nn.Linear) and own.bias is not None
    if delta is not None:
        assert delta.a is not None and delta.b is not None
        fitting = fitting and shape == (len(delta.b), delta.a.shape[1]) and delta.magnitude is None
    if bias is not None:
        fitting = fitting and own.bias.shape == bias.shape  # type: ignore[union-attr]
    if not fitting or not isinstance(own, nn.Linear):
        raise MismatchError(
            f"'{saved.folder}' has {what} the classifier '{path}', and does not hold the classifier itself. Give a model that "
            f"has it (a checkpoint's own: num_classes=None), or train in peft with modules_to_save=['{path}']."
        )
    state = own.state_dict()
    if delta is not None:
        assert delta.a is not None and delta.b is not None
        weight = own.weight.detach()
        state["weight"] = weight + saved.scale(delta) * (delta.b.to(weight) @ delta.a.to(weight))
    if bias is not None:
        state["bias"] = bias
    return SavedHead(own.out_features, state)
