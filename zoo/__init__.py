"""A model zoo with adapter heads: parameter-efficient methods for vision, audio and multimodal backbones.

import zoo
model = zoo.load("vit-b16", adapter="spt", num_classes=100)
report = zoo.fit(model, train, val)
model.save_adapter("out/")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

__version__ = "0.1.0"

# Imported on first use, so that `import zoo` costs little more than torch, and loads neither timm nor open_clip.
_LAZY = {
    "Adapter": "zoo.adapter_base",
    "Backbone": "zoo.backbone",
    "Model": "zoo.model",
    "Points": "zoo.points",
    "adapter": "zoo.registry",
    "compatibility": "zoo.table",
    "evaluate": "zoo.train",
    "fit": "zoo.train",
    "from_peft": "zoo.peft_format",
    "list_adapters": "zoo.registry",
    "list_backbones": "zoo.registry",
    "load": "zoo.loading",
    "open_dataset": "zoo.data",
    "register_adapter": "zoo.registry",
    "register_backbone": "zoo.registry",
    "saved_bytes": "zoo.memory",
    "to_peft": "zoo.peft_format",
    "training_hooks": "zoo.train",
}

if TYPE_CHECKING:
    from zoo.adapter_base import Adapter
    from zoo.backbone import Backbone
    from zoo.data import open_dataset
    from zoo.loading import load
    from zoo.memory import saved_bytes
    from zoo.model import Model
    from zoo.peft_format import from_peft, to_peft
    from zoo.points import Points
    from zoo.registry import adapter, list_adapters, list_backbones, register_adapter, register_backbone
    from zoo.table import compatibility
    from zoo.train import evaluate, fit, training_hooks


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'zoo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*_LAZY, "ZooError", "__version__"])


__all__ = ["ZooError", "__version__", *_LAZY]
