"""Networks in which cheaper sublayers stand in place of a backbone's own: another kind of changed backbone.

    small = zoo.substitute(model, {"blocks.3.attn": "none", "blocks.3.mlp": 192, "blocks.4.attn": "linear"})
    zoo.save_backbone(small, "small/");  zoo.load("small/", "lora", num_classes=10)

Points are named as ever; `zoo.families.children` says what the forms are. Their first weights are made of the parent's, so the
new model computes something else than the given one, until what stands in their place is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.arguments import MODEL, typed
from zoo.errors import ConfigError, MismatchError, SelectionError, nearest
from zoo.families.children import ROLES, Children, Form
from zoo.model.model import Model
from zoo.model.pruning import wrap
from zoo.points import Point

__all__ = ["baked", "child_of", "place_of", "places", "substitute"]


@typed(model=MODEL)
def substitute(
    model: Model,
    children: Mapping[str, Form],
    *,
    order: Mapping[str, Sequence[int]] | None = None,
    weights: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Model:
    """A model with cheaper sublayers, without adapters; the head comes along.

    Args:
        children: sublayer (the name of its point, or the block's name and ".attn" or ".mlp") -> a number of heads or neurons,
            "linear" or "none".
        order: sublayer -> its heads or neurons from the most important on; by default as they come.
        weights: sublayer -> tensors of the block that belong to the child, by their names there; by default made of the
            parent's.

    Raises:
        SelectionError: no such sublayer. MismatchError: weights of another child.
        ConfigError: a form that there is not, a family for which this is not described, or a model with adapters.
    """
    if len(model.adapters):
        raise ConfigError(
            f"The model has adapters ({', '.join(model.adapters)}), which belong to its own sublayers. Merge them first, or "
            "remove them, and attach them to the new model."
        )
    makes, known = _makes(model), places(model)
    for name in (*children, *(order or {}), *(weights or {})):
        place_of(known, name, model.backbone_name)
    if not children:
        raise ConfigError("There is nothing to put anywhere: name sublayers and forms, {'blocks.3.attn': 'linear'}.")
    with model._bare():
        plain = copy.deepcopy(model.backbone)
    for name, form in children.items():
        block, role = known[name]
        twin = plain.get_submodule(block.path)
        makes.put(block.name, twin, role, form, (order or {}).get(name))
        if weights is not None and name in weights:
            fill(twin, makes, role, weights[name], name)
    return _of(model, plain, {"children": dict(children)})


def places(model: Model) -> dict[str, tuple[Point, str]]:
    """Every sublayer for which there are children, by name: its block's point, and its role.

    Raises:
        ConfigError: the family has none.
    """
    makes = _makes(model)
    found: dict[str, tuple[Point, str]] = {}
    for point in model.points:
        if point.kind == "block" and type(point.module).__name__ in makes.blocks:
            found |= {f"{point.name}.{role}": (point, role) for role in ROLES}
    if not found:
        kinds = sorted({type(p.module).__name__ for p in model.points if p.kind == "block"})
        raise ConfigError(
            f"'{model.backbone_name}' is built of {', '.join(kinds) or 'no blocks'}; cheaper sublayers are described for "
            f"{', '.join(makes.blocks)}."
        )
    return found


def place_of(known: Mapping[str, tuple[Point, str]], name: str, backbone: str) -> tuple[Point, str]:
    """The block and role of a sublayer.

    Raises:
        SelectionError: there is none of this name.
    """
    if name not in known:
        raise SelectionError(
            f"{backbone} has no sublayer '{name}' for which there are children. {nearest(name, known)}"
        )
    return known[name]


def child_of(
    model: Model,
    name: str,
    form: Form,
    order: Sequence[int] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of a block with a child in place of its sublayer `name`: frozen, without hooks, in evaluation mode."""
    block, role = place_of(places(model), name, model.backbone_name)
    with model._bare():
        twin = copy.deepcopy(block.module)
    makes = _makes(model)
    makes.put(block.name, twin, role, form, order)
    if weights is not None:
        fill(twin, makes, role, weights, name)
    return twin.requires_grad_(False).eval()


def own_tensors(block: nn.Module, makes: Children, role: str) -> dict[str, Tensor]:
    """The tensors of a block that belong to a sublayer, by their names in it."""
    inside = tuple(f"{part}." for part in makes.parts(role))
    return {k: v for k, v in block.state_dict().items() if k.startswith(inside)}


@torch.no_grad()
def fill(block: nn.Module, makes: Children, role: str, weights: Mapping[str, Tensor], name: str) -> None:
    """Put tensors into a child.

    Raises:
        MismatchError: they are of another one.
    """
    own = own_tensors(block, makes, role)
    odd = sorted(own.keys() ^ weights.keys()) or sorted(k for k in own if own[k].shape != weights[k].shape)
    if odd:
        raise MismatchError(
            f"the weights of '{name}' are of another child: '{odd[0]}' is missing, too much, or of another shape."
        )
    for key, value in own.items():
        value.copy_(weights[key])


def baked(model: Model) -> Model:
    """A changed backbone whose weights are those that the active adapters trained; adapters are gone, the head comes along.

    Raises:
        MergeError: adapters that cannot be merged. ConfigError: a backbone that is as its library has it.
    """
    if getattr(model, "recipe", None) is None:
        raise ConfigError(f"'{model.backbone_name}' is not a changed backbone: model.merge() gives its module.")
    heads, classes = copy.deepcopy(model.heads), copy.deepcopy(model._classes)
    plain = model.merge()
    model.family.again(plain, model.family.name).take_head()
    return _of(model, plain, None, heads, classes)


def _of(model: Model, plain: nn.Module, edit: dict[str, Any] | None, heads: Any = None, classes: Any = None) -> Model:
    """A model on a changed copy of the backbone, with the former head."""
    former = getattr(model, "recipe", None)
    base = former["base"] if former else model.backbone_name
    edits = [*(former["edits"] if former else ()), *([] if edit is None else [edit])]
    family = model.family.again(plain, base)
    family.configure(**model.backbone_kwargs)
    recipe = {"base": base, "kwargs": dict(model.backbone_kwargs), "edits": edits}
    new = wrap(type(model), family, recipe, memory=model.memory, kwargs=model.backbone_kwargs)
    new.heads = copy.deepcopy(model.heads) if heads is None else heads
    new._classes = copy.deepcopy(model._classes) if classes is None else classes
    return new.to(device=model.device, dtype=model.dtype).train(model.training)


def _makes(model: Model) -> Children:
    return type(model.family).children()  # type: ignore[no-any-return]
