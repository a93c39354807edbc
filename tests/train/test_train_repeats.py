"""k folds and several seeds in one call."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from train_parts import easy_data, tiny_model

import zoo
from zoo.data.dataset import ImageDataset
from zoo.data.sources import TorchRows
from zoo.errors import ConfigError
from zoo.train.repeats import deal

FIT = {"epochs": 1, "batch_size": 8, "progress": False}


def test_folds_are_dealt_by_class() -> None:
    data = ImageDataset(TorchRows(easy_data(22)), list("abcd"))
    parts = deal(data, 3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(22))
    counts = np.stack([np.bincount(np.arange(22)[p] % 4, minlength=4) for p in parts])
    assert (counts.max(0) - counts.min(0)).max() <= 1 and max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ConfigError, match="folds is 30, and"):
        deal(data, 30)


def test_each_part_is_measured_by_a_model_that_did_not_see_it(tmp_path: Path) -> None:
    built: list[int] = []

    def build(seed: int) -> zoo.Model:
        built.append(seed)
        return tiny_model(seed=seed)

    found = zoo.repeat(build, easy_data(24, noise=2), folds=3, seeds=[0, 5], out=tmp_path, **FIT)
    assert built == [0, 0, 0, 5, 5, 5] and [(r["fold"], r["seed"]) for r in found.rows] == [
        (f, s) for s in (0, 5) for f in (1, 2, 3)
    ]
    values = [r["accuracy"] for r in found.rows]
    assert found.mean["accuracy"] == pytest.approx(statistics.mean(values))
    assert found.std["accuracy"] == pytest.approx(statistics.stdev(values))
    saved = json.loads((tmp_path / "repeats.json").read_text())
    assert len(saved["runs"]) == 6 and (tmp_path / "fold-1-seed-5" / "report.json").is_file()
    assert (tmp_path / "repeats.md").read_text().count("\n") == 2 + 6 + 2
    # the first run by hand
    data = ImageDataset(TorchRows(easy_data(24, noise=2)), list("0123"))
    held = deal(data, 3)[0]
    model = tiny_model(seed=0)
    zoo.fit(model, data.select(np.setdiff1d(np.arange(24), held)), seed=0, **FIT)
    assert zoo.evaluate(model, data.select(held), progress=False)["loss"] == pytest.approx(
        found.rows[0]["loss"], rel=1e-5
    )


def test_seeds_alone_and_what_is_refused() -> None:
    found = zoo.repeat(lambda seed: tiny_model(seed=seed), easy_data(16), test=easy_data(8, seed=1), seeds=[3], **FIT)
    assert (
        next(iter(found.rows[0])) == "seed"
        and np.isnan(found.std["loss"])
        and json.loads(found.to_json())["std"]["loss"] is None
    )
    for options, words in (
        ({}, "one of both"),
        ({"folds": 1}, "folds is 1; expected a whole number >= 2"),
        ({"folds": 2, "seeds": [1, 1]}, r"seeds is \[1, 1\]; expected a list of different"),
        ({"folds": 2, "seed": 3}, "'seed' is of a single fit"),
    ):
        with pytest.raises(ConfigError, match=words):
            zoo.repeat(lambda seed: tiny_model(seed=seed), easy_data(16), **options)


def test_shots_are_drawn_by_each_seed_and_make_a_table(tmp_path: Path) -> None:
    seen: list[int] = []

    def build(seed: int) -> zoo.Model:
        return tiny_model(seed=seed)

    class Count:
        def fit_start(self, model: zoo.Model, optimizer: object, total_steps: int) -> None:
            seen.append(total_steps)

    data, test = easy_data(24), easy_data(8, seed=1)
    found = zoo.repeat(build, data, test=test, shots=[1, 3], seeds=[0, 4], out=tmp_path, callbacks=[Count()], **FIT)
    assert [(r["shots"], r["seed"]) for r in found.rows] == [(1, 0), (1, 4), (3, 0), (3, 4)]
    assert seen == [1, 1, 2, 2]  # of 4 and 12 images, 8 in a step
    assert found.mean == {} and found.shots == [1, 3]
    values = [r["accuracy"] for r in found.rows[2:]]
    assert found.of(3).mean["accuracy"] == pytest.approx(statistics.mean(values))
    lines = found.table().splitlines()
    assert lines[0].startswith("| shots | runs |") and [line[:8] for line in lines[2:]] == ["| 1 | 2 ", "| 3 | 2 "]
    assert f"{found.of(3).mean['accuracy']:.4f} +- {found.of(3).std['accuracy']:.4f}" in lines[3]
    assert json.loads((tmp_path / "repeats.json").read_text())["shots"]["1"]["mean"]["accuracy"] == pytest.approx(
        found.of(1).mean["accuracy"]
    )
    assert (tmp_path / "shots-3-seed-4" / "report.json").is_file()
    # one run by hand: the seed draws the items, too
    model = tiny_model(seed=4)
    zoo.fit(model, zoo.data.few_shot(zoo.open_dataset(data), 3, 4), seed=4, **FIT)
    again = zoo.evaluate(model, test, progress=False)["loss"]
    assert again == pytest.approx(found.rows[3]["loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="give one"):
        zoo.repeat(build, data, folds=2, shots=[1], **FIT)
    with pytest.raises(ConfigError, match="There are no runs with shots=2"):
        found.of(2)
    with pytest.raises(zoo.ZooError, match="The largest possible value is 6"):
        zoo.repeat(build, data, test=test, shots=[7], seeds=[0], **FIT)
