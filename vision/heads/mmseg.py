"""Decode heads of mmsegmentation: `zoo.load("swin-t", "lora", num_classes=11, head="mmseg-segformer")`.

| head | on | source |
| --- | --- | --- |
| `mmseg-fcn` | the last map: two 3 x 3 convolutions | Long et al. 2015 |
| `mmseg-segformer` | all maps, at the finest one's size: a decoder of MLPs | Xie et al. 2021 |
| `mmseg-upernet` | all maps: pooling pyramid on the last, a feature pyramid over all | Xiao et al. 2018 |

They are mmseg's modules as they are, with 128 channels and batch norm; their logits come out, and the loss is the task's. Other
heads, auxiliary heads and hyperparameters are for mmseg's own configs (`vision.mmseg`). With "-tasks" behind its name each is a
head of several tasks, with a decoder for each: `zoo.run(model, "multitask", data={...}, head="mmseg-segformer")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vision.heads.dense import DenseTasksHead, usage_of_maps
from vision.mmseg.library import mmseg_models
from zoo import register_head
from zoo.heads import Head

__all__ = [
    "FCNDecodeHead",
    "FCNTasksHead",
    "SegformerDecodeHead",
    "SegformerTasksHead",
    "UPerDecodeHead",
    "UPerTasksHead",
]

CHANNELS = 128


class DecodeHead(Head):
    """Base of these heads.

    Raises:
        MissingPackageError: mmsegmentation is not installed.
    """

    needs = ("maps",)
    of_maps = True
    kind: ClassVar[str] = ""
    settings: ClassVar[dict[str, Any]] = {}
    several: ClassVar[bool] = True  # reads all maps, or the last one

    def __init__(self, in_features: int, out_features: int, *, channels: Sequence[int], **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        self.decoder = self.built(channels, out_features, **place)

    def usage(self, kind: str | None) -> tuple[list[str], list[str]]:
        """As `Head.usage`."""
        return usage_of_maps(self.out_features, kind)

    @classmethod
    def built(cls, channels: Sequence[int], outputs: int, **place: Any) -> nn.Module:
        """mmseg's module, fresh."""
        last = len(channels) - 1
        read = {"in_channels": list(channels), "in_index": list(range(len(channels)))}
        config = {
            "type": cls.kind,
            **(read if cls.several else {"in_channels": channels[-1], "in_index": last}),
            "channels": CHANNELS,
            "num_classes": outputs,
            "norm_cfg": {"type": "BN", "requires_grad": True},
            "align_corners": False,
            **cls.settings,
        }
        if outputs == 1:  # a number, or a yes: mmseg means two classes by it
            config |= {"num_classes": 2, "out_channels": 1, "threshold": 0.5}
        decoder = mmseg_models().build(config)
        # as its `init_weights`, which would write a page into the log
        nn.init.normal_(decoder.conv_seg.weight, std=0.01)
        nn.init.zeros_(decoder.conv_seg.bias)
        return decoder.to(**{k: v for k, v in place.items() if v is not None})  # type: ignore[no-any-return]

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """ "maps" -> logits (B, K, h, w)."""
        return read(self.decoder, outputs["maps"])


def read(decoder: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    """Logits (B, K, h, w) of mmseg's module."""
    weight = next(decoder.parameters())
    return decoder([m.contiguous().to(weight.dtype) for m in maps])  # type: ignore[no-any-return]


@register_head("mmseg-fcn")
class FCNDecodeHead(DecodeHead):
    """Fully convolutional, on the last map."""

    kind, several = "FCNHead", False
    settings: ClassVar[dict[str, Any]] = {"num_convs": 2, "concat_input": True, "dropout_ratio": 0.1}


@register_head("mmseg-segformer")
class SegformerDecodeHead(DecodeHead):
    """MLPs on all maps."""

    kind = "SegformerHead"


@register_head("mmseg-upernet")
class UPerDecodeHead(DecodeHead):
    """Pyramids over all maps."""

    kind = "UPerHead"
    settings: ClassVar[dict[str, Any]] = {"pool_scales": (1, 2, 3, 6)}


class DecodeTasksHead(DenseTasksHead):
    """Such a decoder for each of several tasks (`vision.heads.dense`), each with its own batch norm."""

    def made(self, outputs: int) -> nn.Module:
        """A fresh decoder."""
        return self.alone.built(self.channels, outputs, **self._place)  # type: ignore[no-any-return]

    def read(self, decoder: nn.Module, maps: Sequence[Tensor]) -> Tensor:
        """What one decoder says."""
        return read(decoder, maps)


@register_head("mmseg-fcn-tasks")
class FCNTasksHead(DecodeTasksHead):
    """`mmseg-fcn` for each task."""

    alone = FCNDecodeHead


@register_head("mmseg-segformer-tasks")
class SegformerTasksHead(DecodeTasksHead):
    """`mmseg-segformer` for each task."""

    alone = SegformerDecodeHead


@register_head("mmseg-upernet-tasks")
class UPerTasksHead(DecodeTasksHead):
    """`mmseg-upernet` for each task."""

    alone = UPerDecodeHead
