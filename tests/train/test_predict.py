"""`zoo.predict` and `zoo predict`: the model's own numbers for files without labels, beside their paths."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_data import encoded
from PIL import Image
from typer.testing import CliRunner

import zoo
from zoo.cli import app
from zoo.errors import ConfigError, DataError, SaveError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures in two folders, and a text."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i in range(5):
        (folder / ("below" if i % 2 else ".") / f"{i}.png").write_bytes(encoded(40 * i, size=32))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def model() -> zoo.Model:
    made = zoo.load("vit-micro", "lora", num_classes=3, seed=0).eval()
    with torch.no_grad():
        made.head.get_parameter("weight").normal_(generator=torch.Generator().manual_seed(0))
    made.classes = ["ant", "bee", "cat"]
    return made


def by_hand(model: zoo.Model, paths: list[str]) -> torch.Tensor:
    prepare = model.preprocess()
    return torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])


def test_classes(model: zoo.Model, photos: Path) -> None:
    model.train()
    found = zoo.predict(model, photos, top=2, batch_size=2, progress=False)
    assert model.training and found.kind == "classes" and not found.skipped
    assert [Path(p).name for p in found.paths] == ["0.png", "2.png", "4.png", "1.png", "3.png"]
    with torch.no_grad():
        chances = model.eval()(by_hand(model, found.paths)).softmax(1)
    wanted = chances.topk(2, dim=1)
    torch.testing.assert_close(found.values, wanted.values)
    assert found.columns() == ["path", "class", "probability", "class2", "probability2"]
    names = [[model.classes[i] for i in row] for row in wanted.indices.tolist()]  # type: ignore[index]
    assert [[row[1], row[3]] for row in found.rows()] == names
    assert zoo.predict(model, photos, top=99, progress=False).values.shape == (5, 3)


def test_tags_numbers_and_features(model: zoo.Model, photos: Path) -> None:
    images = by_hand(model, zoo.predict(model, photos, progress=False).paths)
    with torch.no_grad():
        outputs, features = model(images), model.features(images)
    torch.testing.assert_close(zoo.predict(model, photos, task="multilabel", progress=False).values, outputs.sigmoid())
    torch.testing.assert_close(zoo.predict(model, photos, task="regress", progress=False).values, outputs)
    found = zoo.predict(model, photos, features=True, progress=False)
    torch.testing.assert_close(found.values, features)
    assert found.columns()[:2] == ["path", "feature0"] and len(found.columns()) == 1 + features.shape[1]


def test_outputs_are_what_was_trained(photos: Path, tmp_path: Path) -> None:
    """Numbers that were regressed came back as the softmax of one output, which is 1."""
    pairs = [(Image.new("RGB", (32, 32), (i, i, i)), float(i)) for i in range(4)]
    model = zoo.load("vit-micro", "linear", num_classes=1)
    zoo.fit(model, pairs, epochs=1, task="regress", progress=False)
    saved = zoo.load(adapter=model.save_adapter(tmp_path / "out"))
    assert zoo.predict(saved, photos, progress=False).kind == "numbers"
    with pytest.raises(ConfigError, match="one output"):
        zoo.predict(zoo.load("vit-micro", "linear", num_classes=1), photos, progress=False)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(model: zoo.Model, photos: Path, tmp_path: Path, ending: str) -> None:
    found = zoo.predict(model, photos, top=3, progress=False)
    file = found.save(tmp_path / "new" / f"t.{ending}")
    rows: list[dict[str, Any]]
    if ending == "parquet":
        rows = pq.read_table(file).to_pylist()
    elif ending == "jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t" if ending == "tsv" else ","))
    assert [r["path"] for r in rows] == found.paths
    assert [r["class"] for r in rows] == [row[1] for row in found.rows()]
    np.testing.assert_allclose([float(r["probability2"]) for r in rows], found.values[:, 1].numpy(), rtol=1e-5)


def test_unreadable_files(model: zoo.Model, photos: Path) -> None:
    (photos / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2\.png"):
        zoo.predict(model, photos, progress=False)
    found = zoo.predict(model, photos, on_error="skip", progress=False)
    assert [Path(p).name for p in found.paths] == ["0.png", "4.png", "1.png", "3.png"]
    assert [Path(p).name for p, _ in found.skipped] == ["2.png"]
    torch.testing.assert_close(found.values, zoo.predict(model, found.paths, progress=False).values)
    with pytest.raises(DataError, match="none of the images"):
        zoo.predict(model, [photos / "2.png", photos / "notes.txt"], on_error="skip", progress=False)


def test_refused(model: zoo.Model, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for data, words in (
        (tmp_path / "empty", "no image in it"),
        (photos / "notes.txt", "no image by its name"),
        (photos / "gone", "No such file or folder"),
        (f"{photos}/*.gif", "No file fits"),
        ([], "list of files is empty"),
    ):
        with pytest.raises(DataError, match=words):
            zoo.predict(model, data, progress=False)
    with pytest.raises(ConfigError, match="no head"):
        zoo.predict(zoo.load("vit-micro", num_classes=0), photos, progress=False)
    with pytest.raises(ConfigError, match="top is 0"):
        zoo.predict(model, photos, top=0, progress=False)
    for options in ({"features": True}, {"task": "multilabel"}):
        with pytest.raises(ConfigError, match="top=3 is for the likeliest of several classes"):
            zoo.predict(model, photos, top=3, progress=False, **options)
    with pytest.raises(ConfigError, match="expected one of classify"):
        zoo.predict(model, photos, task="contrast", progress=False)
    found = zoo.predict(model, photos, progress=False)
    with pytest.raises(ConfigError, match=r"expected \.csv"):
        found.save(tmp_path / "t.xlsx")
    with pytest.raises(SaveError, match="no place"):
        found.save(photos / "0.png" / "t.csv")


def test_sounds(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(8000) * (i + 1) / 20).astype(np.float32), 16000)
    (tmp_path / "cover.png").write_bytes(encoded(9, size=32))  # no sound
    model = zoo.load("ast-micro", "lora", num_classes=2).eval()
    found = zoo.predict(model, tmp_path, progress=False)
    prepare = model.preprocess()
    with torch.no_grad():
        wanted = model(torch.stack([prepare(soundfile.read(p)) for p in found.paths])).softmax(1).max(1)
    assert len(found) == 2
    torch.testing.assert_close(found.values[:, 0], wanted.values, rtol=1e-4, atol=1e-5)


def test_command(model: zoo.Model, photos: Path, tmp_path: Path) -> None:
    out = str(model.save_adapter(tmp_path / "out"))
    (photos / "2.png").write_bytes(b"no picture")
    line = ["predict", out, "--data", str(photos)]
    result = CliRunner().invoke(app, [*line, "--json"])
    assert result.exit_code == 1 and "2.png" in result.output
    result = CliRunner().invoke(app, [*line, "--skip-broken", "--top", "2", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (
        told["files"] == 4 and len(told["skipped"]) == 1 and set(told["rows"][0]) >= {"path", "class", "probability2"}
    )
    result = CliRunner().invoke(app, [*line, "--skip-broken", "--out", str(tmp_path / "t.csv"), "-q"])
    assert result.exit_code == 0 and "4 files, 1 skipped" in result.output and "2.png" in result.output
    assert (tmp_path / "t.csv").read_text().startswith("path,class,probability\n")
    assert CliRunner().invoke(app, [*line, "--out", str(tmp_path / "t.xyz")]).exit_code == 1
