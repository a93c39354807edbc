"""Data on the command line: tables, tags, numbers, balanced classes, augmentations by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_data import encoded
from typer.testing import CliRunner

import zoo
from zoo.cli import app


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures and a table: a class, two tags, a number."""
    rows = ["file_name,species,sea,sky,age"]
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(30 * i, size=32))
        rows.append(f"{i}.png,{'cat' if i % 2 else 'dog'},{i % 2},1,{i - 3.5}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return tmp_path


def run(*line: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, line), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    ("column", "task", "classes", "outputs", "number"),
    [
        ("species", "classify", ["cat", "dog"], 2, "accuracy"),
        ("sea,sky", "multilabel", ["sea", "sky"], 2, "map"),
        ("age", "regress", None, 1, "rmse"),
        ("age,sea", "regress", None, 2, "rmse"),
    ],
)
def test_labels_of_a_table(
    photos: Path, tmp_path: Path, column: str, task: str, classes: Any, outputs: int, number: str
) -> None:
    out = tmp_path / "out"
    line = ["fit", "vit-micro", "linear", "--data", photos, "--label-column", column, "--task", task]
    more = ["--balanced", "--augment", "crop+erasing"] if task == "classify" else []
    run(*line, *more, "-e", 1, "--out", out)
    model = zoo.load(adapter=out)
    assert (model.num_classes, model.classes) == (outputs, classes)
    measured = run("eval", out, "--data", photos, "--label-column", column, "--task", task)
    assert measured["images"] == 8 and number in measured


def test_what_is_refused(photos: Path, tmp_path: Path) -> None:
    line = ["fit", "vit-micro", "linear", "--data", str(photos), "--out", str(tmp_path / "o"), "-q"]
    for more, words in (
        ([], "label_column="),
        (["--label-column", "agee"], "no column 'agee'"),
        (["--label-column", "age"], "expected a class"),
        (["--label-column", "species", "--labels", "numbers"], "expected a number"),
        (["--label-column", "species", "--labels", "number"], "Did you mean 'numbers'"),
        (["--label-column", "species", "--augment", "erase"], "augment 'erase' is unknown"),
        (["--label-column", "age", "--task", "regress", "--balanced"], "instead of one class each"),
    ):
        result = CliRunner().invoke(app, [*line, *more])
        assert result.exit_code == 1 and words in " ".join(result.output.replace("│", " ").split()), (
            more,
            result.output,
        )
