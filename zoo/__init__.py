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
    "Adapter": "zoo.adapters.base",
    "AdapterState": "zoo.model.algebra",
    "AttentionPoint": "zoo.points",
    "Backbone": "zoo.backbone",
    "BlockPoint": "zoo.points",
    "ConditionPoint": "zoo.points",
    "Head": "zoo.heads",
    "LinearPoint": "zoo.points",
    "Merger": "zoo.points",
    "Model": "zoo.model",
    "NormPoint": "zoo.points",
    "Phase": "zoo.regimes",
    "Point": "zoo.points",
    "Points": "zoo.points",
    "Regime": "zoo.regimes",
    "Row": "zoo.points",
    "SublayerPoint": "zoo.points",
    "Task": "zoo.tasks",
    "TokensPoint": "zoo.points",
    "adapter": "zoo.starting",
    "blocks": "zoo.engine.blocks",
    "average": "zoo.model.algebra",
    "calibrate": "zoo.train",
    "capture": "zoo.model.probing",
    "compatibility": "zoo.table",
    "damped": "zoo.model.damping",
    "evaluate": "zoo.train",
    "fit": "zoo.train",
    "from_peft": "zoo.exchange.peft",
    "list_adapters": "zoo.registry",
    "list_backbones": "zoo.registry",
    "list_heads": "zoo.registry",
    "list_regimes": "zoo.registry",
    "list_tasks": "zoo.registry",
    "load": "zoo.loading",
    "open_dataset": "zoo.data",
    "predict": "zoo.train.prediction",
    "probing": "zoo.model.probing",
    "prune": "zoo.model.pruning",
    "quantise": "zoo.model.lighter",
    "recomputable": "zoo.engine.memory",
    "register_adapter": "zoo.registry",
    "register_backbone": "zoo.registry",
    "register_head": "zoo.heads",
    "register_regime": "zoo.registry",
    "register_task": "zoo.registry",
    "repeat": "zoo.train.repeats",
    "run": "zoo.regimes",
    "save_backbone": "zoo.model.stored",
    "saved_bytes": "zoo.engine.memory",
    "second_order": "zoo.engine.second_order",
    "sparsify": "zoo.model.lighter",
    "substitute": "zoo.model.children",
    "to_onnx": "zoo.exchange.onnx",
    "to_peft": "zoo.exchange.peft",
    "training_hooks": "zoo.train",
    "wrap": "zoo.wrapping",
}

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.backbone import Backbone
    from zoo.data import open_dataset
    from zoo.engine.blocks import blocks
    from zoo.engine.memory import recomputable, saved_bytes
    from zoo.engine.second_order import second_order
    from zoo.exchange.onnx import to_onnx
    from zoo.exchange.peft import from_peft, to_peft
    from zoo.heads import Head, register_head
    from zoo.loading import load
    from zoo.model import Model
    from zoo.model.algebra import AdapterState, average
    from zoo.model.children import substitute
    from zoo.model.damping import damped
    from zoo.model.lighter import quantise, sparsify
    from zoo.model.probing import capture, probing
    from zoo.model.pruning import prune
    from zoo.model.stored import save_backbone
    from zoo.points import (
        AttentionPoint,
        BlockPoint,
        ConditionPoint,
        LinearPoint,
        Merger,
        NormPoint,
        Point,
        Points,
        Row,
        SublayerPoint,
        TokensPoint,
    )
    from zoo.regimes import Phase, Regime, run
    from zoo.registry import (
        list_adapters,
        list_backbones,
        list_heads,
        list_regimes,
        list_tasks,
        register_adapter,
        register_backbone,
        register_regime,
        register_task,
    )
    from zoo.starting import adapter
    from zoo.table import compatibility
    from zoo.tasks import Task
    from zoo.train import calibrate, evaluate, fit, training_hooks
    from zoo.train.prediction import predict
    from zoo.train.repeats import repeat
    from zoo.wrapping import wrap


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
