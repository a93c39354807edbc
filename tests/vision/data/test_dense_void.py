"""Pixels without a value: what is left out is the same however data are named, and data without any value are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_data import dense_model, folder, pairs
from PIL import Image
from typer.testing import CliRunner

import zoo
from vision.data.dense import IGNORE, open_dense
from zoo.cli import app
from zoo.errors import ConfigError, DataError

FIT: dict[str, Any] = {"progress": False, "batch_size": 4, "epochs": 1}


def camera(place: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Folders of splits, whose maps hold 2 for no class; the names are above them."""
    for seed, split in enumerate(splits):
        there = folder(place / split, 4, seed)
        (there / "classes.json").unlink()
        for file in (there / "masks").iterdir():
            mask = np.array(Image.open(file))
            mask[mask == 255] = 2
            Image.fromarray(mask).save(file)
    (place / "classes.json").write_text(json.dumps(["dark", "bright", "Unlabelled"]))
    return place


@pytest.mark.parametrize("split", ["train", "north"])
def test_a_split_named_by_its_folder_has_the_same_classes(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = camera(tmp_path / "cam", (split,))
    named = open_dense(place, split=split)
    monkeypatch.chdir(place / split)
    for other in (open_dense(place / split), open_dense("."), open_dense(place)):
        assert other.classes == named.classes == ["dark", "bright"]
        assert other.rows.ignore == named.rows.ignore == (IGNORE, 2)
        assert torch.equal(other[0][1], named[0][1]) and IGNORE in other[0][1]


def test_fit_by_split_and_eval_by_folder(tmp_path: Path) -> None:
    place, out = camera(tmp_path / "cam"), tmp_path / "out"
    fit = ["fit", "swin-micro", "lora", "--data", str(place), "--split", "train", "--task", "segment", "--epochs", "1"]
    result = CliRunner().invoke(app, [*fit, "--no-pretrained", "--out", str(out)])
    assert result.exit_code == 0, result.output
    measured = ["eval", str(out), "--data", str(place / "val"), "--task", "segment", "--no-pretrained", "--per-class"]
    result = CliRunner().invoke(app, [*measured, "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout[result.stdout.index("{") :])["per_class"]) == {"dark", "bright"}


def empty(kind: str) -> np.ndarray:
    return {
        "segment": np.full((24, 32), IGNORE, dtype=np.uint8),
        "edges": np.zeros((24, 32), dtype=np.uint8),
        "depth": np.full((24, 32), np.nan, dtype=np.float32),
        "normals": np.zeros((24, 32, 3), dtype=np.float32),
    }[kind]


def full(kind: str) -> np.ndarray:
    flat = np.asarray(pairs(1)[0][1]) % 2
    return {
        "segment": flat,
        "edges": flat,
        "depth": flat.astype(np.float32),
        "normals": np.stack([flat, 0 * flat, 0 * flat + 1], -1).astype(np.float32),
    }[kind]


@pytest.mark.parametrize("kind", ["segment", "edges", "depth", "normals"])
def test_data_without_any_value_are_refused(kind: str) -> None:
    image = pairs(1)[0][0]
    options: dict[str, Any] = {"classes": ["dark", "bright"]} if kind == "segment" else {}
    none = open_dense([(image, empty(kind))] * 4, kind, **options)
    some = open_dense([(image, empty(kind)), (image, full(kind))] * 2, kind, **options)
    model = dense_model(outputs={"segment": 2, "normals": 3}.get(kind, 1))
    with pytest.raises(DataError, match=r"training data .* has no pixel with a value"):
        zoo.fit(model, none, task=kind, **FIT)
    with pytest.raises(DataError, match=r"validation data .* has no pixel with a value"):
        zoo.fit(model, some, none, task=kind, **FIT)
    with pytest.raises(DataError, match=r"data set .* has no pixel with a value"):
        zoo.evaluate(model, none, task=kind, progress=False)
    assert zoo.fit(model, some, some, task=kind, **FIT).metrics["val_loss"] > 0  # one item without is allowed


def test_values_that_are_lost_at_the_size_of_the_backbone_are_none() -> None:
    image, thin = pairs(1)[0][0].resize((256, 192)), np.full((192, 256), IGNORE, dtype=np.uint8)
    thin[0, 0] = 1
    with pytest.raises(DataError, match=r"no pixel with a value"):
        zoo.evaluate(dense_model(), open_dense([(image, thin)], classes=["a", "b"]), task="segment", progress=False)


def test_several_tasks_with_one_that_says_nothing() -> None:
    image = pairs(1)[0][0]
    data = {
        "parts": open_dense(pairs(4), classes=["dark", "bright"]),
        "far": open_dense([(image, empty("depth"))] * 4, "depth"),
    }
    with pytest.raises(DataError, match=r"of 'far', .* has no pixel with a value"):
        zoo.run(dense_model(outputs=0), "multitask", data, fit={"progress": False, "batch_size": 4}, epochs=1)


def test_several_tasks_leave_out_what_cannot_be_read() -> None:
    rows: list[Any] = [{"image": image, "mask": np.asarray(mask)} for image, mask in pairs(4)]
    rows[0]["mask"] = b"nonsense"

    def go(on_error: Any) -> Any:
        data = {
            "parts": open_dense(rows, classes=["dark", "bright"], on_error=on_error),
            "far": open_dense(pairs(4), "depth", derive="distance"),
        }
        fit = {"progress": False, "batch_size": 4}
        return zoo.run(dense_model(outputs=0), "multitask", data, data, fit=fit, epochs=2, tau=0.0)

    assert 0 <= go("skip").summary["values"]["parts"] <= 1
    with pytest.raises(DataError, match="item 0: the map is corrupt"):
        go("raise")


@pytest.mark.parametrize("task", ["classify", "multilabel", "regress"])
def test_a_head_of_maps_does_not_classify(task: str) -> None:
    labels: list[Any] = {"classify": [0, 1], "multilabel": [[1, 0], [0, 1]], "regress": [[0.5, 1.0], [0.25, 2.0]]}[task]
    data = [(image, labels[i % 2]) for i, (image, _) in enumerate(pairs(4))]
    for go in (
        lambda: zoo.fit(dense_model(), data, task=task, **FIT),
        lambda: zoo.evaluate(dense_model(), data, task=task),
    ):
        with pytest.raises(ConfigError, match=f"'{task}' is of whole images, .* every pixel.*task='segment'"):
            go()
