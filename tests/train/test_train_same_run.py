"""A run that goes on computes what it began with: losses that hold tensors, functions, settings of heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo.errors import ConfigError


def with_head(kind: str, **settings: Any) -> Callable[[], zoo.Model]:
    def make() -> zoo.Model:
        model = tiny_model()
        model.reset_head(4, kind=kind, **settings)
        return model

    return make


def with_template(template: str) -> Callable[[], zoo.Model]:
    def make() -> zoo.Model:
        sizes = {
            "embed_dim": 8,
            "vision_cfg": {"width": 16, "layers": 1, "head_width": 8, "image_size": 8, "patch_size": 4},
        }
        text = {"width": 16, "layers": 1, "heads": 2, "context_length": 16}
        model = zoo.load("clip-micro", num_classes=0, pretrained=False, tower="both", text_cfg=text, **sizes)
        model.reset_head(4, ["cat", "dog", "owl", "tit"], kind="text")
        model.head.template = template  # type: ignore[assignment]
        model.add_adapter("lora")
        return model

    return make


def optimizer(momentum: float) -> Any:
    return lambda groups, **options: torch.optim.SGD(groups, lr=1e-3, momentum=momentum)


ONE, OTHER = torch.ones(4), torch.arange(1.0, 5)
CASES: dict[str, tuple[Any, ...]] = {
    "weights of classes": ({"loss": nn.CrossEntropyLoss(ONE)}, {"loss": nn.CrossEntropyLoss(OTHER)}, "task: loss"),
    "closure": (
        {"loss": lambda y, t: F.cross_entropy(y, t, ONE)},
        {"loss": lambda y, t: F.cross_entropy(y, t, OTHER)},
        "task: loss",
    ),
    "optimizer": ({"optimizer": optimizer(0.1)}, {"optimizer": optimizer(0.9)}, "optimizer was"),
    "margin": (with_head("cosface", margin=0.1), with_head("cosface", margin=0.3), "the head was"),
    "words": (with_template("a photo of a {}."), with_template("a drawing of a {}."), "the head was"),
}


@pytest.mark.parametrize("case", CASES)
def test_another_computation_is_another_run(case: str, tmp_path: Path) -> None:
    """All of these went on as if nothing had changed; of a margin, with the one of the checkpoint."""
    one, other, words = CASES[case]
    calls = [(tiny_model, x) if isinstance(x, dict) else (x, {}) for x in (one, one, other)]
    for i, (make, options) in enumerate(calls):
        torch.manual_seed(0)
        if i < 2:
            report = fit(make(), easy_data(8), epochs=1, checkpoint=tmp_path, **options)
            assert report.steps == 1
        else:
            with pytest.raises(ConfigError, match=words):
                fit(make(), easy_data(8), epochs=1, checkpoint=tmp_path, **options)
