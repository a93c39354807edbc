"""Translating what peft saved into a LoRA of ours, for a given model. See `zoo.exchange.peft`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zoo.adapters.lora import LoRA
from zoo.errors import MismatchError, ZooError, nearest
from zoo.exchange.peft_head import SavedHead, head_of
from zoo.exchange.peft_reader import PeftAdapter, PeftModule
from zoo.exchange.peft_starts import plain
from zoo.points import LinearPoint, Points
from zoo.points.rows import is_conv

if TYPE_CHECKING:
    from zoo.model import Model


def translate(saved: PeftAdapter, model: Model) -> tuple[LoRA, dict[str, dict[str, Tensor]], SavedHead | None]:
    """What to attach to this model: the settings, the tensors of each point, and the head (or None).

    Raises:
        MismatchError: a module that this backbone lacks, or of another shape; settings that do not go together.
    """
    by_path: dict[str, list[LinearPoint]] = {}
    for point in model.points:
        if isinstance(point, LinearPoint) and (isinstance(point.module, nn.Linear) or is_conv(point.module)):
            by_path.setdefault(point.path, []).append(point)
    head = head_of(saved, model)
    parts: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    ours = _own_settings(saved, model.points)
    for path, module in list(saved.modules.items()):
        if path == model.family.head_path():
            continue
        points = sorted(by_path.get(path, []), key=lambda p: p.start)
        if not points:
            raise MismatchError(
                f"'{saved.folder}' has a LoRA on '{path}', where '{model.backbone_name}' has no linear point. "
                f"{nearest(path, by_path)}"
            )
        assert module.a is not None and module.b is not None
        shape = (len(module.b), module.a.shape[1])
        weight: Tensor = points[0].module.weight  # type: ignore[union-attr,assignment]
        own = tuple(weight.flatten(1).shape)
        if shape != own or points[-1].stop != shape[0]:
            raise MismatchError(
                f"The LoRA on '{path}' in '{saved.folder}' is for a weight of shape {shape}; that of '{model.backbone_name}' has "
                f"{own}. It was trained on another width."
            )
        module = saved.modules[path] = plain(saved, path, module, weight.flatten(1))
        split = _split(module, points, ours)
        parts |= split
        alphas |= dict.fromkeys(split, module.alpha)
    if not parts:
        raise MismatchError(f"'{saved.folder}' adapts nothing of the backbone itself, only its head.")
    if ours is not None:
        return ours.lora, parts, head
    ranks = {name: len(part["lora_a"]) for name, part in parts.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    lora = LoRA(
        rank=rank,
        alpha=alpha,
        targets=tuple(_selectors(model.points, parts)),
        dropout=saved.settings["lora_dropout"],
        rslora=bool(saved.settings.get("use_rslora")),
        dora=bool(saved.settings.get("use_dora")),
        ranks=_differing(model.points, ranks, rank),
        alphas=_differing(model.points, alphas, alpha),
    )
    return lora, parts, head


@dataclass
class _Own:
    """Settings that `to_peft` recorded: which slices had an adapter, of which rank and scale."""

    lora: LoRA
    ranks: dict[str, int]
    ratios: dict[str, float]  # by which B was multiplied, since peft has one scale for all slices of a module


def _own_settings(saved: PeftAdapter, points: Points) -> _Own | None:
    """None if peft wrote the folder, or if it was changed since `to_peft` wrote it."""
    try:
        lora = LoRA.from_config(saved.note["config"])
        assert isinstance(lora, LoRA)
        shapes = lora.shapes(points)
    except (KeyError, TypeError, ZooError):
        return None
    settings = saved.settings
    if (lora.dropout, lora.dora) != (settings["lora_dropout"], bool(settings.get("use_dora"))):
        return None
    own = _Own(lora, {}, {})
    members: dict[str, list[tuple[LinearPoint, int, float]]] = {}
    for point, rank, scale in shapes:
        members.setdefault(point.path, []).append((point, rank, scale))
    if members.keys() != saved.modules.keys():
        return None
    for path, parts in members.items():
        module, total = saved.modules[path], max((s for _, _, s in parts), key=abs)
        assert module.b is not None
        if module.rank != sum(r for _, r, _ in parts) or not total or abs(saved.scale(module) / total - 1) > 1e-9:
            return None
        rest, column = module.b.clone(), 0
        for point, rank, scale in sorted(parts, key=lambda p: p[0].start):
            rest[point.start : point.stop, column : column + rank] = 0
            column += rank
            own.ranks[point.name], own.ratios[point.name] = rank, scale / total
        if not scale or bool(rest.any()):  # B is no longer diagonal in blocks
            return None
    return own


def _split(module: PeftModule, points: list[LinearPoint], ours: _Own | None) -> dict[str, dict[str, Tensor]]:
    """Tensors of each slice of one module, keyed as in our state."""
    assert module.a is not None and module.b is not None
    found: dict[str, dict[str, Tensor]] = {}
    column = 0
    for point in points:
        a, b = module.a, module.b[point.start : point.stop]
        if ours is not None:
            rank = ours.ranks.get(point.name)
            if rank is None:
                continue
            a, b = a[column : column + rank], b[:, column : column + rank] / ours.ratios[point.name]
            column += rank
        found[point.name] = {"lora_a": a, "lora_b": b}
        if module.magnitude is not None:
            found[point.name]["magnitude"] = module.magnitude.reshape(-1)[point.start : point.stop]
    return found


def _selectors(points: Points, names: Iterable[str]) -> list[str]:
    """Roles where all points of a role are among the names, names for the rest."""
    wanted = set(names)
    found: list[str] = []
    for point in points.select(kind="linear"):
        if point.name not in wanted:
            continue
        everywhere = {p.name for p in points.select(kind="linear", role=point.role)}
        selector = point.role if everywhere <= wanted else point.name
        if selector not in found:
            found.append(selector)
    return found


def _differing(points: Points, values: Mapping[str, Any], default: Any) -> dict[str, Any] | None:
    """`ranks` or `alphas`: values that are not the default, by role where a whole role shares one."""
    found: dict[str, Any] = {}
    for value in dict.fromkeys(v for v in values.values() if v != default):
        found |= dict.fromkeys(_selectors(points, [n for n, v in values.items() if v == value]), value)
    return found or None
