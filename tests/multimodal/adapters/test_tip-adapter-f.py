"""Tip-Adapter-F: it starts as Tip-Adapter, trains the keys, and goes on where it was. The rest: test_tip-adapter.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo

pytest.importorskip("open_clip")
from few_shot_clip import Pictures, images, small

from zoo.errors import MergeError


def test_step_0_of_f_is_tip() -> None:
    x = Pictures(5, seed=9).tensors[0]
    plain, trained = (small(method, passes=1) for method in ("tip-adapter", "tip-adapter-f"))
    zoo.calibrate(plain, Pictures())
    zoo.calibrate(trained, Pictures())
    with torch.no_grad():
        assert torch.equal(plain(x), trained(x))
    assert plain.parameters_to_train() == {} and trained.num_parameters(trainable=True) == 12 * 24


def test_f_trains_and_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 4, "progress": False, "device": "cpu", "lr": 1e-2}
    options["optimizer_options"] = {"eps": 1e-4}
    model = small("tip-adapter-f", passes=2)
    report = zoo.fit(model, Pictures(), **options)
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert model.train().probe(images(model).float()) == []
    half = small("tip-adapter-f", passes=2)
    zoo.fit(half, Pictures(), checkpoint=tmp_path, **options)
    again = small("tip-adapter-f", passes=2)
    zoo.fit(again, Pictures(), checkpoint=tmp_path, **options)  # finished: the state is put back
    for key, value in model.parameters_to_train().items():
        assert torch.equal(value, again.parameters_to_train()[key])
    with pytest.raises(MergeError, match="'tip-adapter-f' cannot be merged"):
        model.merge()
