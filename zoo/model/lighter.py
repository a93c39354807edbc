"""Backbones of fewer bytes: weights kept in 8 or 4 bits, or with zeros that merging keeps. Changed as in `zoo.model.pruning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zoo.arguments import MODEL, typed
from zoo.errors import ConfigError, MismatchError, nearest
from zoo.model.fingerprint import Watched
from zoo.model.model import Model
from zoo.model.pruning import apply, changed
from zoo.model.quantised import FORMATS
from zoo.points import LinearPoint, Points

__all__ = ["quantise", "quantise_in_place", "sparsify"]


@typed(model=MODEL)
def quantise(model: Model, points: str | Sequence[str] | None = None, to: str = "int8") -> Model:
    """A model whose frozen projections keep their weights in 8 or 4 bits: a quarter or an eighth of the bytes of float32.

    Products are those of the rounded weights, exactly. Adapters are trained on them as on any; merging into them, and training
    them, is refused. `zoo.load(..., quantise="nf4")` does it while loading.

    Args:
        points: which linear points, all slices of a fused projection or none; by default "all-linear" as far as these are
            `nn.Linear`.
        to: "int8" (one scale for each output), "int4" (for each group of up to 128 inputs) or "nf4" (16 quantiles of a normal
            distribution, as in QLoRA); see `zoo.model.quantised`.

    Raises:
        ConfigError: a point of another kind, a part of a fused projection, nothing to quantise, or weights that are not finite.
    """
    return changed(model, {to: _to_round(model, points, to)})


def quantise_in_place(model: Model, to: str) -> Model:
    """The same model without adapters, whose projections are quantised where they stand: no second copy is in memory."""
    edit = {to: _to_round(model, None, to)}
    memory, model.memory = model.memory, "off"  # no hook of ours is left on what goes
    apply(model.backbone, type(model.family), model.points, edit)
    model.points = Points(model.family.points(), model.family.name, model.family.refused)
    model._weights = Watched(model.backbone)
    model.memory = memory
    model.quantised = to
    model.recipe = {"base": model.backbone_name, "kwargs": dict(model.backbone_kwargs), "edits": [edit]}  # type: ignore[assignment]
    return model


def _to_round(model: Model, points: str | Sequence[str] | None, to: str) -> list[str]:
    """Paths of the modules that are kept in few bits; raises what `quantise` does."""
    if to not in FORMATS:
        raise ConfigError(f"Weights cannot be kept in '{to}'. {nearest(to, FORMATS)}")
    if points is not None and not points:
        raise ConfigError("There is nothing to quantise: name linear points, or leave points= out for all projections.")
    chosen = model.points.linears("all-linear" if points is None else points)
    if points is None:
        chosen = [p for p in chosen if type(p.module) is nn.Linear] or chosen
    modules = {id(p.module): p for p in chosen}
    for point in chosen:
        if type(point.module) is not nn.Linear:
            raise ConfigError(f"'{point.name}' is a {type(point.module).__name__}; only nn.Linear is kept in {to}.")
        rest = [p.name for p in model.points if p.module is point.module and p not in chosen]
        if rest:
            raise ConfigError(
                f"'{point.name}' and '{rest[0]}' are slices of one weight: quantise all of them, or none."
            )
    return [p.path for p in modules.values()]


def check_whole(model: Model, method: str) -> None:
    """Raise ConfigError where projections are quantised: `method` will prune them, and says so before anything is trained."""
    for point in model.points.linears("all-linear"):
        if "weight" not in point.module._parameters:
            raise ConfigError(
                f"{method} prunes the backbone, and '{point.name}' has {getattr(point.module, 'kept_in', 'no')} weights. Load it "
                "without quantise=, and quantise what comes out (zoo.quantise)."
            )


@typed(model=MODEL)
def sparsify(
    model: Model,
    points: str | Sequence[str] = "all-linear",
    sparsity: float = 0.5,
    masks: Mapping[str, Tensor] | None = None,
) -> Model:
    """A model in whose weights some entries are zero, and stay so when an adapter is merged.

    Args:
        points: linear points. sparsity: the part of each weight that becomes zero, the smallest by magnitude.
        masks: instead of both: point -> (dim_out, dim_in), true where the weight stays.

    Raises:
        ConfigError: a sparsity outside of 0 ... 1, or quantised weights. MismatchError: a mask of another shape.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is {sparsity}; expected 0 <= sparsity < 1, the part that becomes zero.")
    chosen: list[LinearPoint] = model.points.linears(list(masks) if masks is not None else points)
    found: dict[str, Tensor] = {}
    with model._bare():
        for point in chosen:
            weight = point.weight
            if "weight" not in point.module._parameters:
                kept = getattr(point.module, "kept_in", "no")
                raise ConfigError(
                    f"'{point.name}' has {kept} weights. Make weights sparse first (sparsify), then quantise."
                )
            if masks is not None:
                kept = masks[point.name].bool().to(weight.device)
                if kept.shape != weight.shape:
                    raise MismatchError(
                        f"the mask of '{point.name}' is {tuple(kept.shape)}; its weight is {tuple(weight.shape)}."
                    )
            else:
                order = weight.abs().flatten().argsort(stable=True)
                kept = torch.ones_like(order, dtype=torch.bool)
                kept[order[: round(sparsity * len(order))]] = False
                kept = kept.view(weight.shape)
            whole = found.setdefault(point.path, torch.ones_like(point.module.weight, dtype=torch.bool))  # type: ignore[arg-type]
            whole[point.start : point.stop] = kept.view_as(whole[point.start : point.stop])
    return changed(model, {"masked": sorted(found)}, found)
