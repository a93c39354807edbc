"""Folders of changed backbones (`zoo.model.pruning`): `backbone.json`, how it is built, and `backbone.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors

from zoo import registry
from zoo.arguments import MODEL, PATH, typed
from zoo.backbone import WRAPPED
from zoo.disk import write_file
from zoo.disk.trust import check_backbone, check_size
from zoo.errors import ConfigError, WeightsError
from zoo.library import only_tensors
from zoo.model.model import Model
from zoo.model.pruning import apply, wrap

__all__ = ["is_changed", "load_changed", "save_backbone"]

RECIPE, WEIGHTS, FORMAT = "backbone.json", "backbone.safetensors", 1


@typed(model=MODEL, folder=PATH)
def save_backbone(model: Model, folder: str | Path) -> Path:
    """Write a changed backbone (`zoo.prune`, `zoo.sparsify`, `zoo.quantise`), without adapters and head.

    `zoo.load(folder, ...)` reads it.

    Raises:
        ConfigError: the backbone is as its library has it, and needs no folder. SaveError: writing failed; old files stay whole.
    """
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise ConfigError(
            f"The backbone '{model.backbone_name}' was not changed: its name says all. Save the adapter (model.save_adapter), or "
            "what model.merge() gives."
        )
    if str(recipe["base"]).startswith(WRAPPED):
        raise ConfigError(
            f"'{model.backbone_name}' is a network that its user built, and nothing here builds it again. Save its weights "
            "yourself: safetensors.torch.save_file(model.backbone.state_dict(), ...)."
        )
    folder = Path(folder)
    with model._bare():
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.backbone.state_dict().items()}
    document = {"format": FORMAT, **recipe, "name": model.backbone_name, "fingerprint": model.fingerprint}
    write_file(folder / WEIGHTS, dump_safetensors(weights, metadata={"fingerprint": str(model.fingerprint)}))
    write_file(folder / RECIPE, json.dumps(document, indent=1).encode())
    return folder


def is_changed(name: str | Path | None) -> bool:
    """Whether a backbone's name is a folder of `save_backbone`."""
    return name is not None and (Path(name) / RECIPE).is_file()


def load_changed(
    folder: str | Path,
    *,
    num_classes: int | None = None,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory: str = "default",
) -> Model:
    """The model of a folder of `save_backbone`, with a new head or none.

    Raises:
        ConfigError: a recipe that is damaged, or names no registered backbone. WeightsError: damaged or other weights.
    """
    folder = Path(folder)
    try:
        recipe: dict[str, Any] = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        base, kwargs, edits = recipe["base"], dict(recipe["kwargs"]), [dict(edit) for edit in recipe["edits"]]
        if recipe["format"] != FORMAT or not isinstance(base, str):
            raise ValueError(f"format {recipe['format']}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"'{folder / RECIPE}' is no recipe of a backbone ({error!r}). Save it again.") from error
    check_backbone(base, kwargs, folder, kind="backbone")
    cls, own = registry.find_backbone(base)

    def build(options: dict[str, Any]) -> torch.nn.Module:
        with torch.device("meta"), only_tensors():
            return cls.build(own, pretrained=False, **options)

    check_size(base, build, kwargs, folder)
    with only_tensors():
        module = cls.build(own, pretrained=False, **kwargs)
    family = cls(module, base)
    family.configure(**kwargs)
    family.take_head()
    try:
        for edit in edits:
            apply(module, cls, family.points(), edit)
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"'{folder / RECIPE}' describes a change that '{base}' cannot have ({error!r}). Save it again."
        ) from error
    if pretrained and torch.device(device or "cpu").type != "meta":
        _fill(module, folder / WEIGHTS)
    model = wrap(Model, family, {"base": base, "kwargs": kwargs, "edits": edits}, memory=memory, kwargs=kwargs)
    if pretrained and model.fingerprint is not None and model.fingerprint != recipe.get("fingerprint"):
        raise WeightsError(f"The weights in '{folder}' are not those that its recipe names. Save it again.")
    if num_classes:
        model.reset_head(num_classes)
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    return model


def _fill(module: torch.nn.Module, file: Path) -> None:
    try:
        weights = parse_safetensors(file.read_bytes())
    except Exception as error:  # safetensors has no error of its own for every damage
        raise WeightsError(f"'{file}' could not be read ({type(error).__name__}: {error}). Save it again.") from error
    own = module.state_dict()
    if odd := sorted(k for k in own.keys() ^ weights.keys()) or sorted(
        k
        for k in own
        if own[k].shape != weights[k].shape or own[k].is_floating_point() != weights[k].is_floating_point()
    ):
        raise WeightsError(
            f"'{file}' does not fit its recipe: '{odd[0]}' is missing, unexpected, or of another shape. Save it again."
        )
    with torch.no_grad():
        module.load_state_dict(weights)
