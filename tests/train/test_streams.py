"""Further streams of data beside the training data, and samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.data import join
from zoo.errors import ConfigError, DataError, UnknownNameError
from zoo.train import Mixed, OnePart, PerClass, Stream


class Replays:
    """Adds the loss on a batch of the stream "replay"; notes its labels."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.seen = stop, []  # type: ignore[var-annotated]

    def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
        self.optimizer = optimizer

    def extra_loss(self, model: zoo.Model, outputs: Tensor, targets: Tensor) -> Tensor:
        images, labels = self.optimizer.stream("replay")
        self.seen.append(labels.tolist())
        return torch.nn.functional.cross_entropy(model(images), labels)

    def step_end(self, model: zoo.Model, step: int) -> None:
        if step == self.stop:
            raise KeyboardInterrupt


def go(replay: Any, callback: Replays, **options: Any) -> dict[str, Tensor]:
    model = tiny_model(zoo.adapter("lora", dropout=0.2))
    streams = {"replay": replay}
    fit(model, easy_data(40), streams=streams, callbacks=[callback], checkpoint_every=1, **options)
    return weights(model)


def test_a_stream_begins_again_in_another_order(tmp_path: Path) -> None:
    whole = Replays()
    stream = Stream(easy_data(20, seed=5), batch_size=8)
    expected = go(stream, whole)
    assert [len(s) for s in whole.seen] == [8, 8, 4, 8, 8, 4]
    first, second = (sorted(label for batch in epoch for label in batch) for epoch in (whole.seen[:3], whole.seen[3:]))
    assert first == second and whole.seen[:3] != whole.seen[3:]
    with pytest.raises(KeyboardInterrupt):
        go(stream, Replays(3), checkpoint=tmp_path)
    rest = Replays()
    assert difference(go(stream, rest, checkpoint=tmp_path), expected) == 0
    assert rest.seen == whole.seen[3:]  # the kill came before the checkpoint of step 3
    with pytest.raises(ConfigError, match="the data changed"):
        go(easy_data(24, seed=5), Replays(), checkpoint=tmp_path)


def test_streams_are_refused_beforehand() -> None:
    with pytest.raises(ConfigError, match=r"'replay' ends after 3 batches of 8 .* the run takes 6 steps"):
        go(Stream(easy_data(20), batch_size=8, ends="refuse"), Replays())
    with pytest.raises(ConfigError, match="ends is 'stop'"):
        Stream(easy_data(20), ends="stop")  # type: ignore[arg-type]
    with pytest.raises(zoo.ZooError, match="stream 'replay'"):
        go(easy_data(20, classes=7), Replays())
    model = tiny_model()
    with pytest.raises(UnknownNameError, match=r"no stream 'replay'\. Known: other"):
        fit(model, easy_data(20), streams={"other": easy_data(20)}, callbacks=[Replays()])


def opened(count: int, seed: int = 0, classes: int = 4) -> Any:
    return zoo.open_dataset(easy_data(count, seed, classes=classes))


def test_per_class() -> None:
    data = opened(42)
    size, order = PerClass(classes=2, each=4).over(data, 8, seed=1)
    assert size == 48
    for batch in data.labels[order(0)].reshape(-1, 8):  # type: ignore[index]
        assert sorted(np.unique(batch, return_counts=True)[1]) == [4, 4]
    assert len(set(order(0)[:4])) == 4 and not np.array_equal(order(0), order(1))
    model = tiny_model()
    report = fit(model, data, sampler=PerClass(4, 4), epochs=1)
    assert report.steps == 3 and "PerClass(classes=4, each=4)" in report.settings["sampler"]
    with pytest.raises(ConfigError, match="batches of 8, and batch_size is 16"):
        fit(tiny_model(), data, sampler=PerClass(2, 4))
    with pytest.raises(DataError, match="has 4 classes"):
        fit(tiny_model(), data, sampler=PerClass(8, 2))


def test_mixed_and_one_part() -> None:
    data = join({"large": opened(160), "small": opened(10, classes=2)})
    assert data.classes == ["large: 0", "large: 1", "large: 2", "large: 3", "small: 0", "small: 1"]
    assert data[165][1] == 4 + 1 and data.where(165)
    part = data.rows.part  # type: ignore[attr-defined]
    drawn = np.concatenate([part[Mixed(tau=0).over(data, 10, 0).order(e)] for e in range(20)])
    assert abs(drawn.mean() - 0.5) < 0.05
    drawn = np.concatenate([part[Mixed({"large": 3, "small": 1}).over(data, 10, 0).order(e)] for e in range(20)])
    assert abs(drawn.mean() - 0.25) < 0.05
    batches = np.concatenate([part[OnePart(tau=0.5).over(data, 10, 0).order(e)].reshape(-1, 10) for e in range(40)])
    assert (batches.min(1) == batches.max(1)).all()
    assert abs(batches[:, 0].mean() - 10**0.5 / (10**0.5 + 160**0.5)) < 0.05
    with pytest.raises(ConfigError, match="has no part 'big'"):
        Mixed({"big": 1}).over(data, 10, 0)
    with pytest.raises(ConfigError, match="is one data set"):
        OnePart().over(opened(20), 10, 0)
