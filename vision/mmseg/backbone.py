"""`ZooBackbone`: any backbone here that gives maps, with its adapters, as a backbone of mmsegmentation.

    backbone=dict(type="ZooBackbone", name="swin-t", adapter=["lora", dict(type="norm")], img_size=512, out_indices=(0, 1, 2, 3))

The backbone stays frozen and in evaluation mode, as everywhere here; the runner trains the adapters and mmseg's heads. What the
runner saves is all of it; `zoo_adapters(model, folder)` writes the adapters alone, which `zoo.load` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ALL
from torch import Tensor

import zoo
from vision.mmseg.library import mmseg_models
from zoo import Adapter
from zoo.errors import ConfigError
from zoo.train.hooks import HOOKS

__all__ = ["ZooBackbone", "zoo_adapters"]


class ZooBackbone(BaseModule):
    """Images (B, 3, H, W) -> a tuple of maps (B, C_i, H_i, W_i), those of `out_indices`.

    Args:
        name: of a backbone, as for `zoo.load`.
        adapter: a method, dict(type="lora", rank=4), a saved folder, or a list of these; None trains heads alone.
        out_indices: which maps; all by default.
        pretrained: with the backbone's weights, or random ones.
        init_cfg: mmengine's; weights come by `pretrained` and by the adapter.
        options: further ones of `zoo.load` and of the backbone, such as `img_size=(512, 512)`, `memory="low"`.

    Raises:
        UnknownNameError: no such backbone or method. MismatchError: a backbone without maps. ConfigError: an index without a
        map, or a method that takes part in training in a way that mmengine's runner has no place for.
    """

    def __init__(
        self,
        name: str,
        adapter: Any = None,
        out_indices: Sequence[int] | None = None,
        pretrained: bool = True,
        init_cfg: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(init_cfg)
        _readable_checkpoints()
        given = adapter if isinstance(adapter, (list, tuple)) else [] if adapter is None else [adapter]
        methods = [_method(one) for one in given]
        self.model = zoo.load(name, methods, num_classes=0, pretrained=pretrained, **options)
        self.model.family.check_wanted(("maps",), "ZooBackbone")
        self.model.requires_grad_(False)
        for trained in self.model.active:
            self.model.adapters[trained].requires_grad_(True)
        for trained in self.model.active:
            _check(self.model.adapters[trained])
        self.channels = self.model.family.map_channels
        self.out_indices = tuple(range(len(self.channels)) if out_indices is None else out_indices)
        if wrong := [i for i in self.out_indices if not -len(self.channels) <= i < len(self.channels)]:
            raise ConfigError(
                f"out_indices names the map {wrong[0]}; '{name}' gives {len(self.channels)}, of {self.channels} channels."
            )

    def init_weights(self) -> None:
        """Nothing: weights are there since `zoo.load`."""
        self._is_init = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        maps = self.model.outputs(images, want=("maps",))["maps"]
        return tuple(maps[i].contiguous() for i in self.out_indices)


def _method(one: Any) -> Any:
    """What a config says of an adapter, for `zoo.load`."""
    if isinstance(one, dict):
        settings = dict(one)
        if "type" not in settings:
            raise ConfigError(f"adapter is {dict(one)!r:.80}; expected a name, or dict(type=<method>, <its settings>).")
        return zoo.adapter(settings.pop("type"), **settings)
    return one


def _check(adapter: Any) -> None:
    """Raise ConfigError for a method that would be less than it says under mmengine's runner."""
    if adapter.needs_calibration and adapter.plan is None:
        raise ConfigError(
            f"'{adapter.method}' looks at data before it is trained, which mmengine's runner does not show it. Train it once by "
            "zoo.fit, and give the saved folder as adapter=."
        )
    # only a loop which knows adapters calls these; mmengine's runner has no place for most of them
    needed = [hook for hook in HOOKS if getattr(type(adapter), hook, None) is not getattr(Adapter, hook, None)]
    if needed:
        raise ConfigError(
            f"'{adapter.method}' takes part in training ({', '.join(needed)}), which mmengine's runner does not call: it "
            "would be another method. Train it by zoo.fit(task='segment')."
        )
    if adapter.own_features:
        raise ConfigError(f"'{adapter.method}' changes pooled features, which no decode head of mmseg reads.")


def zoo_adapters(model: Any, folder: str | Path) -> Path:
    """Write the adapters of an mmseg model whose backbone is a `ZooBackbone`; `zoo.load(adapter=folder)` reads them.

    Raises:
        ConfigError: its backbone is none.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, ZooBackbone):
        raise ConfigError(f"The backbone is a {type(backbone).__name__}; expected a ZooBackbone.")
    return backbone.model.save_adapter(folder)


def _readable_checkpoints() -> None:
    """Let torch read mmengine's checkpoints as it does by default, as tensors and numbers, from now on in this process.

    Their histories of numbers hold functions besides, which each process has anyway; without these nothing has to be trusted.
    """
    HistoryBuffer.__getstate__ = lambda self: {k: v for k, v in vars(self).items() if k != "statistics_methods"}
    arrays = getattr(np, "_core", None) or np.core
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, arrays.multiarray._reconstruct, arrays.multiarray.scalar, *kinds]
    )


for _registry in (mmseg_models(), ALL):
    if "ZooBackbone" not in _registry.module_dict:
        _registry.register_module(module=ZooBackbone)
