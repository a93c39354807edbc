"""A plain decoder of maps: what a backbone's stages give, each brought to one width, added up at the finest one's size.

    z = sum_i up(W_i norm_i(x_i) + b_i)        x_i (B, C_i, h_i, w_i): the map of stage i; up: bilinear, to (h_1, w_1)
    logits = W gelu(norm(z)) + b               (B, K, h_1, w_1)

norm: of the channels of a place (layer norm). Width 128. Of a backbone whose blocks are all of one size (ViT) there is one map.
The logits are as large as the finest map; tasks bring them to the size of their targets.

Several tasks (`dense-tasks`) have such a decoder each, by the names of their classes, "<task>: <class>", and their logits stand
one behind the other.

Source: Xie et al., "SegFormer", NeurIPS 2021: its decoder of MLPs. There every stage has a map to one width, and a further map
goes over all of them put together; nothing stands between the two, so one map for each stage and a sum are the same functions.
Deviations: layer norm in front and in the middle, for batch norm behind the second map and ReLU; no dropout. So a batch of one
image is like any other, and stages of different scale weigh alike at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import register_head
from zoo.errors import ConfigError, UnknownNameError, nearest
from zoo.heads import Head

__all__ = ["DenseHead", "DenseTasksHead"]

WIDTH = 128
SAID = {"segment": "classes", "edges": "probabilities", "depth": "numbers", "normals": "directions"}  # of every pixel
KIND_OF = {("edge",): "edges", ("depth",): "depth", ("x", "y", "z"): "normals"}  # by the names of the outputs
PREDICT = "from vision.tasks.dense_prediction import predict_maps"


def predicting(kind: str) -> str:
    """The line of Python that says something of every pixel of a photograph."""
    return f'(found,) = predict_maps(model, ["photo.jpg"], "{kind}")  # {SAID[kind]}, as large as the photograph'


def usage_of_maps(outputs: int, kind: str | None) -> tuple[list[str], list[str]]:
    """What a card shows of a decoder: maps of a photograph, or, where the kind is not known, its outputs."""
    if kind in SAID:
        return [PREDICT], [predicting(kind)]
    lines = ['image = model.preprocess()(Image.open("photo.jpg"))']
    return ["from PIL import Image"], [*lines, f"maps = model(image[None])  # (1, {outputs}, h, w)"]


class Decoder(nn.Module):
    """Maps [(B, C_i, h_i, w_i)] -> (B, outputs, h_1, w_1)."""

    def __init__(self, channels: Sequence[int], outputs: int, **place: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(c, **place) for c in channels)
        self.maps = nn.ModuleList(nn.Linear(c, WIDTH, **place) for c in channels)
        self.norm = nn.LayerNorm(WIDTH, **place)
        self.classify = nn.Linear(WIDTH, outputs, **place)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """See the class."""
        finest = max((tuple(m.shape[-2:]) for m in maps), key=lambda size: size[0] * size[1])
        total: Any = 0
        for norm, to_width, x in zip(self.norms, self.maps, maps, strict=True):
            channels_last = x.permute(0, 2, 3, 1).to(self.norm.weight.dtype)
            y = to_width(norm(channels_last)).permute(0, 3, 1, 2)
            if tuple(y.shape[-2:]) != finest:
                y = F.interpolate(y, finest, mode="bilinear", align_corners=False)
            total = total + y
        return self.classify(F.gelu(self.norm(total.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


@register_head("dense")
class DenseHead(Head):
    """One decoder. `channels`: C_i of the maps."""

    needs = ("maps",)
    of_maps = True

    def __init__(self, in_features: int, out_features: int, *, channels: Sequence[int], **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        self.decoder = Decoder(channels, out_features, **place)

    def usage(self, kind: str | None) -> tuple[list[str], list[str]]:
        """As `Head.usage`."""
        return usage_of_maps(self.out_features, kind)

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """ "maps" -> logits (B, K, h, w)."""
        return self.decoder(outputs["maps"])  # type: ignore[no-any-return]


@register_head("dense-tasks")
class DenseTasksHead(Head):
    """A decoder for each task; which there are is known once the classes are named."""

    needs = ("maps",)
    of_maps = True
    alone: ClassVar[type[Any]] = DenseHead  # the head of one such decoder

    def __init__(self, in_features: int, out_features: int, *, channels: Sequence[int], **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        self.channels, self._place = list(channels), place
        self.decoders = nn.ModuleDict()
        self.sizes: dict[str, int] = {}  # outputs of each task

    def made(self, outputs: int) -> nn.Module:
        """A fresh decoder."""
        decoder = Decoder(self.channels, outputs, **self._place)
        started(decoder)
        return decoder

    def name_classes(self, classes: Sequence[str]) -> None:
        """Make a decoder for each task.

        Raises:
            ConfigError: a name without a task, or tasks whose classes do not stand together.
        """
        super().name_classes(classes)
        names = [name.partition(": ") for name in classes]
        if wrong := [name for name, (task, colon, _) in zip(classes, names, strict=True) if not (task and colon)]:
            raise ConfigError(f"the head 'dense-tasks' reads '<task>: <class>', and a class is called '{wrong[0]}'.")
        tasks = [task for task, _, _ in names]
        sizes = {task: tasks.count(task) for task in dict.fromkeys(tasks)}
        if tasks != [task for task, size in sizes.items() for _ in range(size)]:
            raise ConfigError("the classes of one task stand behind each other; they are mixed with those of others.")
        self.sizes = sizes
        for task, size in sizes.items():
            self.decoders[task] = self.made(size)

    def usage(self, kind: str | None) -> tuple[list[str], list[str]]:
        """As `Head.usage`: the first task, taken out."""
        first, *others = self.sizes
        names = tuple(name.partition(": ")[2] for name in self.classes or () if name.startswith(f"{first}: "))
        more = f"  # or {', '.join(map(repr, others))}".replace("'", '"') if others else ""
        lines = [f'model = single_task(model, "{first}"){more}', predicting(KIND_OF.get(names, "segment"))]
        return [PREDICT, "from zoo.regimes.multitask import single_task"], lines

    def single(self, task: str) -> Any:
        """A head of one task alone, with a copy of its decoder.

        Raises:
            UnknownNameError: no such task.
        """
        if task not in self.decoders:
            raise UnknownNameError(f"The head has no task '{task}'. {nearest(task, list(self.decoders))}")
        decoder = self.decoders[task]
        weight = next(decoder.parameters())
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        found = self.alone(self.in_features, self.sizes[task], channels=self.channels, **place)
        found.decoder.load_state_dict(decoder.state_dict())
        return found

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """ "maps" -> logits (B, K, h, w) of all tasks."""
        return torch.cat([self.read(decoder, outputs["maps"]) for decoder in self.decoders.values()], dim=1)

    def read(self, decoder: nn.Module, maps: Sequence[Tensor]) -> Tensor:
        """What one decoder says."""
        return decoder(maps)  # type: ignore[no-any-return]


def started(decoder: nn.Module) -> None:
    """Initial values as those of every head here."""
    for part in decoder.modules():
        if isinstance(part, nn.Linear) and part.weight.device.type != "meta":
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
