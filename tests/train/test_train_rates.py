"""Learning rates that nobody gave: the defaults for few steps, and the search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.errors import ConfigError
from zoo.train.rates import default_batch_size, few_steps


def test_batches_of_few_items() -> None:
    assert [default_batch_size(n) for n in (1, 100, 300, 600, 1000, 1024, 50000)] == [8, 8, 16, 32, 32, 64, 64]


def test_rates_over_few_steps() -> None:
    """At 1e-3 over 113 steps LoRA was no better than a probe on 300 photographs."""
    assert few_steps(1e-3, 1000) == few_steps(1e-3, 10**6) == 1e-3
    assert few_steps(1e-3, 250) == pytest.approx(2e-3) and few_steps(1e-3, 10) == pytest.approx(4e-3)
    assert few_steps(1e-2, 10) == 1e-2 and few_steps(5e-3, 10) == 1e-2 and few_steps(0.5, 10) == 0.5


def test_defaults_of_a_fit() -> None:
    report = zoo.fit(tiny_model(), easy_data(160), epochs=2, progress=False)
    assert report.settings["batch_size"] == 8 and report.steps == 40
    assert report.settings["lr"] == pytest.approx(4e-3)
    report = zoo.fit(tiny_model(), easy_data(160), epochs=2, batch_size=160, lr=1e-5, progress=False)
    assert report.settings["batch_size"] == 160 and report.settings["lr"] == 1e-5
    seen: dict[str, float] = {}

    class Look:
        def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
            seen.update({n: optimizer.settings(n)["lr_scale"] * optimizer.lr for n in optimizer.parameters})

    zoo.fit(tiny_model(["lora", "vpt"]), easy_data(160), epochs=2, callbacks=[Look()], progress=False)
    for method, own in (("lora", 1e-3), ("vpt", zoo.adapter("vpt").default_lr)):
        assert all(lr == pytest.approx(few_steps(own, 40)) for n, lr in seen.items() if n.startswith(f"{method}/"))


def test_a_search_takes_the_best_of_equal_trials(tmp_path: Path) -> None:
    model, expected = tiny_model(), tiny_model()
    train, val = easy_data(64, noise=2), easy_data(32, seed=1, noise=2)
    state = torch.get_rng_state()
    report = fit(model, train, val, epochs=4, lr="auto", checkpoint=tmp_path)
    tried = report.settings["lr_search"]
    assert [t["lr"] for t in tried] == pytest.approx([1e-3 / 3, 1e-3, 3e-3, 1e-2])
    assert report.settings["lr"] == min(tried, key=lambda t: t["loss"])["lr"]
    # the search leaves no trace: the same as a fit at that rate
    fit(expected, train, val, epochs=4, lr=report.settings["lr"])
    assert difference(weights(model), weights(expected)) == 0 and torch.equal(state, torch.get_rng_state())
    # a run that goes on does not search again
    again = fit(tiny_model(), train, val, epochs=4, lr="auto", checkpoint=tmp_path)
    assert again.settings["lr"] == report.settings["lr"] and again.settings["lr_search"] == tried
    # each trial is an ordinary run of that many steps
    alone = fit(tiny_model(), train, val, steps=16 // 2 + 12, lr=3e-3, keep="last")
    assert alone.steps == 20 and len(tried) == 4


def test_a_search_sets_a_part_aside(tmp_path: Path) -> None:
    for method in (["lora", "vpt"], zoo.adapter("spt", budget=0.002, num_batches=1), "adalora"):
        model = tiny_model(method)
        report = fit(model, easy_data(64), epochs=10, lr="auto")
        rates = report.settings["lr"]
        assert all(math.isfinite(t["loss"]) for t in report.settings["lr_search"]) and "val" not in report.data
        assert isinstance(rates, dict) == (method == ["lora", "vpt"]) and report.data["train_images"] == 64


def test_a_search_in_vain() -> None:
    images, labels = easy_data(32).tensors
    model = tiny_model()
    before = weights(model)
    with pytest.raises(ConfigError, match=r"lr='auto' tried .*the loss is not finite with any of them"):
        fit(model, TensorDataset(images * math.nan, labels), epochs=1, lr="auto")
    with pytest.raises(ConfigError, match=r"lr is 'atuo'; expected numbers above 0: .*'auto'"):
        fit(model, easy_data(32), lr="atuo")
    assert difference(weights(model), before) == 0
