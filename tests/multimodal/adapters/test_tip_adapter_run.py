"""The regime `tip-adapter`: what it chooses is chosen on validation data, and a finished run is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT
from few_shot_clip import NAMES, Pictures, small

from zoo.errors import ConfigError, DataError


def bare() -> zoo.Model:
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 24, "vision_cfg": IMAGE, "text_cfg": {**TEXT, "context_length": 40}}
    return zoo.load("clip-micro", classes=NAMES, num_classes=3, pretrained=False, **options)


@pytest.mark.parametrize("train", [False, True], ids=["tip", "f"])
def test_regime(train: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": train, "passes": 2, "epochs": 2, "alpha_most": 30.0}
    fit = {"progress": False, "device": "cpu"}

    def run() -> tuple[zoo.Model, Any]:
        model = bare()
        return model, zoo.run(model, "tip-adapter", Pictures(15), Pictures(9), out=tmp_path, fit=fit, **settings)

    model, report = run()
    own: Any = model.adapters["tip-adapter-f" if train else "tip-adapter"]
    found = report.summary
    assert (own.alpha, own.beta) == (found["alpha"], found["beta"]) and found["accuracy"] >= found["before"]
    assert sum(own.plan["counts"]) == 12 and own.plan["classes"] == NAMES  # one image of each class is set aside
    assert [p["name"] for p in report.phases] == (["keys"] if train else []) and 0 <= found["test_accuracy"] <= 1
    again, second = run()
    assert second.summary == found
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="attaches its own"):
        zoo.run(small("tip-adapter"), "tip-adapter", Pictures())
    with pytest.raises(DataError, match="'train' and 'val'"):
        zoo.run(bare(), "tip-adapter", {"more": Pictures()})
    with pytest.raises(ConfigError, match="passes is 0"):
        zoo.run(bare(), "tip-adapter", Pictures(), passes=0)
