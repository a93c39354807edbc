"""Folders and repositories that are named as backbones: what stands there now counts, not what stood there before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo import library
from zoo.errors import UnknownNameError
from zoo.library import pretrained_config


def test_a_folder_that_is_written_after_a_look_up(tmp_path: Path) -> None:
    """Seen: a folder was asked for, then written, and stayed "not found" until the process ended."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "later"
    with pytest.raises(UnknownNameError, match="could not be read"):
        zoo.load(f"transformers:{folder}")
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    for widths in ([8, 16], [8, 32]):  # and one that is written anew, with other sizes
        config = transformers.ResNetConfig(**{**sizes, "hidden_sizes": widths})
        transformers.ResNetModel(config).save_pretrained(folder)
        assert zoo.load(f"transformers:{folder}", num_classes=0).family.feature_dim == widths[-1]


def test_an_answer_of_the_hub_counts_for_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every family asks when a name is looked up: the network is asked once, and again a little later."""
    asked: list[str] = []

    def download(source: str, file: str) -> str:
        asked.append(source)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": f"type-{len(asked)}"}))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(library, "_held", {})
    first = pretrained_config("user/network")
    assert isinstance(first, dict) and first["model_type"] == "type-1"
    first["model_type"] = "changed by a caller"
    assert pretrained_config("user/network") == {"model_type": "type-1"} and len(asked) == 1
    monkeypatch.setattr(library, "HELD", 0.0)
    assert pretrained_config("user/network") == {"model_type": "type-2"}
