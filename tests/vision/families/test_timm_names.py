"""Names of classes in what timm writes of a merged network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm

import zoo


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_names_of_classes_are_saved_by_timm(name: str, tmp_path: Path) -> None:
    from timm.models._hub import save_for_hf

    small = (
        {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24} if "swin" in name else {"depth": 1, "embed_dim": 48}
    )
    model = zoo.load(name, "lora", classes=["cat", "dog"], pretrained=False, **{"num_heads": 3, **small})
    save_for_hf(model.merge(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == ["cat", "dog"] and config["num_classes"] == 2
    assert timm.__version__
