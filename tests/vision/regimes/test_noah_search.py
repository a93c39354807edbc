"""NOAH's search: under the cap, each sub-network once, gone on with after a kill, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import easy_data, tiny_model

import zoo
from zoo.errors import ConfigError, DataError

FIT: dict[str, Any] = {"progress": False}
SETTINGS: dict[str, Any] = {
    "width": 4,
    "widths": (1, 2, 4),
    "limit": 0.0008,
    "supernet_epochs": 2,
    "supernet_lr": 5e-3,
    "generations": 3,
    "population": 6,
    "keep": 3,
    "mutants": 2,
    "crossovers": 2,
    "val_fraction": 0.4,
    "epochs": 4,
    "lr": 1e-2,
    "batch_size": 8,
}


def data(seed: int = 0, noise: float = 2.0) -> Any:
    return zoo.open_dataset(easy_data(60, seed, noise), classes=list("abcd"))


def go(model: Any = None, out: Path | None = None, **options: Any) -> tuple[Any, Any]:
    model = model or tiny_model(None)
    return model, zoo.run(model, "noah", data(), data(1), out=out, fit=FIT, **{**SETTINGS, **options})


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any]:
    return go()


def test_what_is_found(found: tuple[Any, Any]) -> None:
    model, report = found
    generations = [report.values[f"generation-{n}"] for n in range(3)]
    tried = [one for generation in generations for one in generation]
    assert len({str(one["sizes"]) for one in tried}) == len(tried) == report.summary["tried"] == 18
    assert all(0 < one["parameters"] <= 800 for one in tried)
    best = max(one["accuracy"] for one in tried)
    summary = report.summary
    assert summary["val_accuracy"] == best and summary["best_of_generation"][0] <= best
    assert [p["name"] for p in report.phases] == ["supernet", "retrain"]
    adapter = model.adapters["noah"]
    assert {part: list(sizes) for part, sizes in adapter.whole().items()} == summary["sizes"]
    assert model.num_parameters(trainable=True, head=False) == summary["parameters"]
    assert summary["test_accuracy"] > 0.25 and model.classes == list("abcd") and model.active == ("noah",)
    assert report.table().count("\n") >= 4


def test_sub_networks_are_measured_in_the_supernet(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the accuracy of their slices on the data set aside, by hand."""
    seen: list[tuple[dict[str, Any], float, float]] = []

    def watched(model: Any, val: Any, **options: Any) -> dict[str, Any]:
        from zoo.train.evaluation import evaluate

        metrics = evaluate(model, val, **options)
        supernet = model.adapters["noah"]
        if supernet.widths is not None:
            images = torch.stack([val[i][0] for i in range(len(val))])
            labels = torch.tensor([val[i][1] for i in range(len(val))])
            with torch.no_grad():
                right = (model.eval()(images).argmax(1) == labels).double().mean().item()
            assert len(val) == 24
            seen.append((supernet.evaluated, metrics["accuracy"], right))
        return metrics

    monkeypatch.setattr("vision.regimes.noah.evaluate", watched)
    go(generations=1, epochs=1)
    assert len(seen) == 6 and all(abs(a - b) < 1e-6 for _, a, b in seen)
    assert len({str(sizes) for sizes, _, _ in seen}) == 6


def test_goes_on_in_the_middle_of_the_search(
    found: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.train.evaluation import evaluate

    count = 0

    def broken(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr("vision.regimes.noah.evaluate", broken)
    with pytest.raises(KeyboardInterrupt):
        go(out=tmp_path)
    count = 100
    model, report = go(out=tmp_path)
    assert count == 112  # the first generation is not measured again
    assert report.summary == found[1].summary
    for name, parameter in model.parameters_to_train().items():
        torch.testing.assert_close(parameter, found[0].parameters_to_train()[name])


def test_refused() -> None:
    for options, message in (
        ({"limit": 1e-6}, r"smallest sub-network has 193"),
        ({"limit": 1.0}, "nothing would be left out"),
        ({"least": 0.9, "limit": 0.8}, "0 <= least < limit"),
        ({"mutants": 5}, "of a population of 6"),
        ({"widths": (1, 8)}, "widths go up to 8"),
        ({"val_fraction": 1.0}, "val_fraction is 1"),
        ({"lr": 0.0}, "lr is 0"),
        ({"generations": 0}, "generations is 0"),
        ({"least": 0.000799, "limit": 0.0008, "supernet_epochs": 10**6, "population": 4}, "drawn at random"),
    ):
        with pytest.raises(ConfigError, match=message):
            go(**options)
    with pytest.raises(ConfigError, match="attaches its own adapter"):
        go(tiny_model("lora"))
    with pytest.raises(ConfigError, match="needs a head"):
        go(tiny_model(None, num_classes=0))
    with pytest.raises(DataError, match="one data set with known classes"):
        zoo.run(tiny_model(None), "noah", [data()], fit=FIT, **SETTINGS)
