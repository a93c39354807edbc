"""Backbones with adapters in mmsegmentation, and its decode heads and losses here.

In a config of mmseg:

    custom_imports = dict(imports=["vision.mmseg"])
    model = dict(
        type="EncoderDecoder",
        backbone=dict(type="ZooBackbone", name="swin-t", adapter=dict(type="lora", rank=4)),
        decode_head=dict(type="SegformerHead", in_channels=[96, 192, 384, 768], in_index=[0, 1, 2, 3], ...),
        ...)

`vision.mmseg.loss("DiceLoss")` is a loss for `zoo.fit(loss=...)`; the heads are `zoo.load(..., head="mmseg-segformer")`.
"""

from __future__ import annotations

from importlib.util import find_spec

from vision.mmseg.library import mmseg_models
from vision.mmseg.losses import loss

__all__ = ["ZooBackbone", "loss", "mmseg_models"]


def __getattr__(name: str) -> object:
    if name == "ZooBackbone":
        from vision.mmseg.backbone import ZooBackbone

        return ZooBackbone
    raise AttributeError(f"module 'vision.mmseg' has no attribute '{name}'")


if find_spec("mmseg") is not None and find_spec("mmcv") is not None:  # `custom_imports` registers by importing this
    from vision.mmseg import backbone  # noqa: F401
