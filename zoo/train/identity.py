"""What makes a run this one and no other, as JSON, and how two of them differ, in words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.dataset import ImageDataset
from zoo.data.digest import content
from zoo.data.functions import about_function, about_object
from zoo.engine.sharded import known_types
from zoo.heads.base import Head
from zoo.heads.classifiers import settings_of
from zoo.tasks import Task
from zoo.train.settings import Settings
from zoo.train.streams import Stream

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["differences", "identity"]


def identity(
    model: Model,
    settings: Settings,
    task: Task,
    train: ImageDataset,
    val: ImageDataset | None,
    streams: Mapping[str, Stream],
) -> dict[str, Any]:
    """Settings, data, backbone with its numbers, adapters with their settings, head, what is frozen, memory, task and loss."""
    adapters: Any = model.adapters
    data: dict[str, Any] = {"train": content(train)}
    if val is not None:
        data["val"] = content(val)
    for name, stream in streams.items():
        data[f"stream {name}"] = {**content(stream.dataset), "batch_size": stream.batch_size, "ends": stream.ends}
    return {
        "settings": settings.to_json(),
        "data": data,
        "backbone": [model.backbone_name, model.fingerprint],
        "options of the backbone": {k: repr(v) for k, v in model.backbone_kwargs.items()},
        "adapters": {name: {"method": adapters[name].method, **adapters[name].config()} for name in model.active},
        "head": [type(model.head).__name__, model.num_classes, *_head(model.head)],
        "weights": _weights(model.backbone),
        "frozen": _frozen(model),
        "memory": model.memory,
        "task": {"name": task.name or type(task).__name__, **_settings(task)},
    }


def _weights(backbone: torch.nn.Module) -> dict[str, str]:
    """The precision of a backbone, and a digest of its numbers as they are in memory.

    Its fingerprint is that of weights which were cast, or changed where torch counts no change (`parameter.data`). This sees a
    change of a single bit: a sum over all numbers, taken as integers, which is the same on every device and in any order.
    """
    digest, kinds, counts = hashlib.blake2b(digest_size=8), set(), []
    for name, tensor in sorted(backbone.state_dict().items()):
        if type(tensor) not in known_types() or tensor.is_meta or not tensor.numel():
            continue  # quantised by a library, or without numbers
        if tensor.is_floating_point():
            kinds.add(str(tensor.dtype).removeprefix("torch."))
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        counts.append(_whole_numbers(tensor))
    for count in counts:  # one after the other only here: a GPU is not waited for at each tensor
        digest.update(str(count.tolist()).encode())
    return {"precision": ", ".join(sorted(kinds)), "numbers": digest.hexdigest()}


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 64


def _whole_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits as integers, and some of these by themselves, for numbers that changed places."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bool or tensor.is_complex():
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.to(torch.uint8)
    flat = tensor.view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # where it lies in a file must not matter
    flat = flat.view(_INTEGERS[flat.element_size() if flat.nbytes % 8 else 8])  # eight bytes at once are faster
    samples = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.int64)
    return torch.cat([flat.sum(dtype=torch.int64)[None], samples])


def _head(head: nn.Module) -> list[dict[str, Any]]:
    """The settings of a head that has some (a margin), and the words that it reads."""
    if not isinstance(head, Head):
        return []
    values = {name: getattr(head, name, None) for name in settings_of(type(head))}
    if head.reads_names:
        values |= {name: getattr(head, name, None) for name in ("classes", "template", "templates")}
    found = {
        k: v.tolist() if isinstance(v, Tensor) else list(v) if isinstance(v, tuple) else v for k, v in values.items()
    }
    plain = {k: v for k, v in found.items() if isinstance(v, (bool, int, float, str, list))}
    return [plain] if plain else []


def _frozen(model: Model) -> list[str]:
    """Names of what is not trained in the active adapters and the head: what the user froze, or `set_active(train=...)`."""
    owners = [(name, model.adapters[name]) for name in model.active]
    return [
        f"{owner}/{name}"
        for owner, module in [*owners, ("head", model.head)]
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    ]


def _settings(task: Task) -> dict[str, Any]:
    """What a task object was given: plain values, and functions by what they do."""
    found = {}
    for name, value in vars(task).items():
        if name == "own" or name.startswith("_"):
            continue
        name = "loss" if name == "chosen" else name
        if callable(value):
            found[name] = about_function(value)
        elif isinstance(value, (Tensor, np.ndarray)):
            found[name] = about_object(value)
        elif value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)):
            found[name] = repr(value)
    return found


def differences(former: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Of two identities: what differs, by the name of the setting (or of the part), in words."""
    found: dict[str, str] = {}
    for part, value in now.items():
        then: Any = former.get(part)
        if part == "settings" and isinstance(then, Mapping):
            for name, new in value.items():
                if then.get(name) != new:
                    found[name] = _changed(name, then.get(name), new)
        elif then == value or (part not in former and part in ("weights", "frozen")):
            continue  # the second: a checkpoint from before they were noted
        elif part == "head" and then == value[:2]:
            continue  # from before a head's settings were
        elif part == "weights":
            same = then["precision"] == value["precision"]
            found[part] = (
                "the numbers of the backbone are others (its weights were changed since)"
                if same
                else _changed("the precision of the backbone", then["precision"], value["precision"])
            )
        elif part == "frozen":
            found[part] = _other_frozen(then, value)
        elif part == "data":
            found[part] = f"the data changed ({_data(then, value)})"
        elif part == "adapters" and isinstance(then, Mapping):
            if list(then) == list(value):  # other adapters are named by what puts the checkpoint's plans back
                found[part] = "; ".join(
                    _settings_of(name, then[name], own) for name, own in value.items() if then[name] != own
                )
        elif isinstance(then, Mapping) and isinstance(value, Mapping):
            found[part] = _settings_of(f"the {part}", then, value)
        else:
            found[part] = _changed(part if part == "memory" else f"the {part}", then, value)
    return found


def _changed(name: str, then: Any, now: Any) -> str:
    return f"{name} was {then!r}, is {now!r}"


def _other_frozen(then: list[str], now: list[str]) -> str:
    parts = []
    for words, names in (
        ("frozen now, and trained then", [n for n in now if n not in then]),
        ("trained now, and frozen then", [n for n in then if n not in now]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{words}: '{names[0]}'{more}")
    return "; ".join(parts)


def _settings_of(owner: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [k for k in dict.fromkeys([*then, *now]) if then.get(k) != now.get(k)]
    return f"{owner}: " + ", ".join(_changed(k, _bare(then.get(k)), _bare(now.get(k))) for k in keys)


def _bare(value: Any) -> Any:
    """A value that was written down as its repr, without a second pair of quotes."""
    return re.sub(r"^'(.*)'$", r"\1", value) if isinstance(value, str) else value


def _data(then: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(then, Mapping) or set(then) != set(now):
        was = ", ".join(then) if isinstance(then, Mapping) else "others"
        return f"{', '.join(now)} instead of {was}"
    parts = []
    for name, new in now.items():
        keys = [k for k in new if then[name].get(k) != new[k]]
        if "items" in keys:
            parts.append(f"{name}: {then[name].get('items')} items, now {new['items']}")
        elif keys:
            parts.append(f"{name}: {', '.join(keys)}")
    return "; ".join(parts)
