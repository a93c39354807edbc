"""Putting what a folder holds into a model: the backbone is compared first, then all of it comes in, or nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor, nn

from zoo import registry
from zoo.backbone import WRAPPED
from zoo.disk.budget import budget
from zoo.disk.layout import CONFIG, check_kind
from zoo.disk.saved import SavedAdapter
from zoo.errors import CombinationError, ConfigError, MismatchError

if TYPE_CHECKING:
    from zoo.host import Host

_LOG = logging.getLogger("zoo")
# options at which tables of positions are resampled
RESOLUTIONS = ("img_size", "image_size", "input_size", "max_length")

CLASSES = 10_000_000  # more than a head can have


def attach(model: Host, saved: SavedAdapter, *, head: bool = True) -> list[str]:
    """Put saved adapters, and their head if wanted, into a model; all or nothing. Returns the adapters' names there.

    The head replaces the model's own; if other adapters are there already, it belongs to the new ones alone. With a head of their
    own they need not work beside those in use: where they cannot, they are in use alone, the others stay attached, and a warning
    says so.

    Raises:
        MismatchError: the adapters belong to another backbone, width, depth or set of weights.
        CombinationError: they bring no head, and cannot work together with those in use.
        ConfigError, UnknownNameError: a method or setting that this version does not have.
    """
    check_backbone(model, saved)
    own_head, others = head and saved.has_head and bool(model.adapters), model.active
    try:
        return _attach(model, saved, head, own_head)
    except (
        CombinationError,
        MismatchError,
    ):  # two that train the same values, or features of both, too wide for its head
        if not (own_head and others):
            raise
    with model.all_or_nothing():
        model.set_active()
        added = _attach(model, saved, head, own_head)
    _LOG.warning(
        "The adapter in '%s' has a head of its own, and cannot be used together with %s: it is in use alone now. Switch with "
        "model.set_active(...).",
        *(saved.folder, " and ".join(f"'{name}'" for name in others)),
    )
    return added


def _attach(model: Host, saved: SavedAdapter, head: bool, own_head: bool) -> list[str]:
    """`attach`, of what was compared with the backbone."""
    added: list[str] = []
    if (saved.num_classes or 0) > CLASSES:
        raise MismatchError(
            f"The adapter in '{saved.folder}' says that its head has {saved.num_classes:,} classes, which is far more than its "
            "file holds. Copy or download it again."
        )
    with model.all_or_nothing(), budget(saved.folder, saved.tensors, model.backbone):
        for i, entry in enumerate(saved.adapters):
            last = i == len(saved.adapters) - 1
            name = entry.name if entry.name not in model.adapters else None
            try:
                cls = registry.adapter_class(entry.method)
                config, tensors = cls.load_saved(dict(entry.config), saved.adapter_tensors(entry.name))
                fresh = cls.from_config(config, strict=True)
            except ConfigError as error:
                raise ConfigError(f"'{saved.folder / CONFIG}', adapters[{i}].config: {error}") from error
            fresh.plan, fresh.of_values = entry.plan, True
            fresh.check_structure(tensors)
            before = set(model.adapters)
            wanted = (own_head and last) or (head and fresh.head_kind)
            model.add_adapter(fresh, name, num_classes=saved.num_classes if wanted else None)
            added += [one for one in model.adapters if one not in before]
            own = model.adapters[added[-1]].state_dict()
            for key in tensors.keys() & own.keys():
                if f"{entry.name}/{key}" in saved.moved and tensors[key].shape == own[key].shape:
                    tensors[key] = own[key].detach().cpu() + tensors[key]
            _fill(model.adapters[added[-1]], tensors, f"adapter '{entry.name}'", model, saved)
        if head and saved.num_classes is not None:
            if not own_head or saved.head_kind != "linear":
                model.reset_head(saved.num_classes, saved.classes, kind=saved.head_kind)
            _fill(model.head, saved.head_tensors(), "head", model, saved)
            model.take_names(saved.classes)
        model.set_record(added, saved.record)
    return added


def check_backbone(model: Host, saved: SavedAdapter) -> None:
    """Raise MismatchError unless the adapters belong to this model's backbone, to its weights."""
    printed = model.fingerprint if saved.fingerprint is not None else None  # each look reads a part of every tensor
    if printed is not None:
        if saved.fingerprint == printed or _resampled(model, saved):
            return
        if saved.quantised != model.quantised:
            ours, theirs = (f"quantised to {q}" if q else "not quantised" for q in (model.quantised, saved.quantised))
            raise MismatchError(
                f"The adapter in '{saved.folder}' was trained on a backbone that is {theirs}, and this model's is {ours}: it "
                f"corrects other weights. Load it on its own: zoo.load(adapter={str(saved.folder)!r})."
            )
        wrapped = all(n.startswith(WRAPPED) for n in (saved.backbone_name, model.backbone_name))
        if wrapped or saved.backbone_name == model.backbone_name:
            seen = getattr(model.family, "known_example", True)
            example = (
                ""
                if seen
                else " No example was given, so a classifier that was taken off when it was saved may be still in: "
                "zoo.load(network, adapter=..., example=batch)."
            )
            raise MismatchError(
                f"The adapter in '{saved.folder}' was trained on other weights of '{saved.backbone_name}': their "
                f"fingerprint is {saved.fingerprint}, this model's is {printed}. Load the same weights (with "
                "pretrained=True unless you saved it on random ones; checkpoint= for a file of your own), or train it again on "
                f"these.{example}"
            )
    elif registry.library_name(saved.backbone_name) == registry.library_name(model.backbone_name):
        return  # compared by name alone: what a file names is not looked up
    brought = "network, " if saved.backbone_name.startswith(WRAPPED) else ""
    raise MismatchError(
        f"The adapter in '{saved.folder}' belongs to the backbone '{saved.backbone_name}', this model's is "
        f"'{model.backbone_name}'. Use zoo.load({brought}adapter={str(saved.folder)!r}), which builds the right one."
    )


def _resampled(model: Host, saved: SavedAdapter) -> bool:
    """Whether the weights are the same ones, with tables of positions for another resolution."""
    if registry.library_name(saved.backbone_name) != registry.library_name(model.backbone_name):
        return False
    if saved.rest is not None:
        (theirs, shapes), (ours, mine) = (
            text.split(".") for text in (saved.rest, model.fingerprint_at_any_resolution or ".")
        )
        return theirs == ours and shapes != mine
    sizes = {k: v for k, v in saved.backbone_kwargs.items() if k in RESOLUTIONS}
    if sizes == {k: v for k, v in model.backbone_kwargs.items() if k in RESOLUTIONS}:
        return False
    return model.fingerprint_as(saved.backbone_kwargs) == saved.fingerprint  # saved before the other hash was noted


def _fill(module: nn.Module, tensors: dict[str, Tensor], what: str, model: Host, saved: SavedAdapter) -> None:
    """Copy saved tensors into a module that has exactly these, or raise MismatchError naming the first that differs."""
    own = module.state_dict()
    for name in [*own, *tensors]:
        mine = tuple(own[name].shape) if name in own else "none"
        theirs = tuple(tensors[name].shape) if name in tensors else "none"
        if mine != theirs:
            raise MismatchError(
                f"The {what} in '{saved.folder}' does not fit '{model.backbone_name}': tensor '{name}' has shape {theirs} in "
                f"the file and {mine} in the model. It was saved on another width or depth, or its settings were changed."
            )
        check_kind(name, own[name], tensors[name], f"The {what} in '{saved.folder}'")
    module.load_state_dict(tensors)
