"""What peft trains beside A and B and saves with them: biases, and normalisations that were trained whole.

A bias is a bias, whoever trained it: `bias="all"` and `bias="lora_only"` become the method 'bitfit' at the points that have
them, and normalisations among `modules_to_save` become 'norm'. Both stand beside the LoRA as adapters of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.bitfit import BitFit
from zoo.adapters.norm import Norm
from zoo.errors import ConfigError, MismatchError, nearest
from zoo.exchange.peft_reader import PeftAdapter
from zoo.points import LinearPoint, NormPoint, Point

if TYPE_CHECKING:
    from zoo.model import Model

Extra = tuple[Adapter, dict[str, Tensor]]  # a method to attach, and its state


def extras(saved: PeftAdapter, model: Model) -> list[Extra]:
    """The methods that stand beside the LoRA, each with its state; none where only A and B were trained.

    Raises:
        MismatchError: a bias or normalisation that this backbone lacks, or of another shape.
        ConfigError: a module of another kind that was trained whole.
    """
    head = model.family.head_path()
    points: dict[str, list[Point]] = {}
    for point in model.points:
        if isinstance(point, (LinearPoint, NormPoint)):
            points.setdefault(point.path, []).append(point)
    return [*_norms(saved, points, head), *_biases(saved, points, head)]


def _norms(saved: PeftAdapter, points: dict[str, list[Point]], head: str | None) -> list[Extra]:
    whole = {
        p: state for p, state in saved.whole.items() if head is None or (p != head and not p.startswith(f"{head}."))
    }
    others = sorted(path for path in whole if not all(isinstance(p, NormPoint) for p in points.get(path, [None])))
    if others:
        raise ConfigError(
            f"'{saved.folder}' trains whole modules of the backbone ({', '.join(others)}); only its normalisations and the head"
            f"{f' ({head!r})' if head else ''} can be imported whole."
        )
    if not whole:
        return []
    found: dict[str, Tensor] = {}
    for path, state in whole.items():
        (point,) = points[path]
        own = {name for name, value in point.module._parameters.items() if value is not None}  # type: ignore[union-attr]
        if set(state) != own:
            raise MismatchError(
                f"'{saved.folder}' holds {', '.join(sorted(state))} of '{path}', which has {', '.join(sorted(own)) or 'none'}. "
                "Get another copy of the folder."
            )
        for name, value in state.items():
            _check(saved, path, name, value, point.module._parameters.get(name))  # type: ignore[union-attr]
            found[f"{point.name}.{name}"] = value
    return [(Norm(targets=tuple(_selector(points[path][0], points) for path in whole)), found)]


def _biases(saved: PeftAdapter, points: dict[str, list[Point]], head: str | None) -> list[Extra]:
    found: dict[str, Tensor] = {}
    chosen: list[str] = []
    for path, value in saved.biases.items():
        if path == head:
            continue
        if path not in points:
            raise MismatchError(
                f"'{saved.folder}' has a trained bias of '{path}', where this backbone has no point. {nearest(path, points)}"
            )
        members = points[path]
        _check(saved, path, "bias", value, members[0].module._parameters.get("bias"))  # type: ignore[union-attr]
        chosen += [_selector(point, points) for point in members]
        found[f"{getattr(members[0], 'fused', '') or members[0].name}.bias"] = value
    return [(BitFit(targets=tuple(chosen)), found)] if found else []


def _selector(point: Point, points: dict[str, list[Point]]) -> str:
    """What selects this point alone: its name, unless that is a role too (the final `norm`), which stands for all of it."""
    roles = {p.role for members in points.values() for p in members}
    return point.name if point.name not in roles else point.name[:-1] + "?"


def _check(saved: PeftAdapter, path: str, name: str, value: Tensor, own: Tensor | None) -> None:
    shape = None if own is None else tuple(own.shape)
    if shape != tuple(value.shape):
        raise MismatchError(
            f"'{path}.{name}' in '{saved.folder}' has shape {tuple(value.shape)}; the backbone's has {shape or 'none'}. It was "
            "trained on another width."
        )
