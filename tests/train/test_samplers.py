"""Samplers: balanced classes, and those of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, TensorDataset, WeightedRandomSampler
from train_parts import difference, easy_data, fit, tiny_model, weights

from zoo.data import open_dataset
from zoo.errors import ConfigError, DataError
from zoo.train.samplers import Balanced, as_sampler


def uneven() -> TensorDataset:
    """80 items of class 0, 15 of 1, 5 of 2."""
    labels = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    return TensorDataset(torch.randn(100, 3, 8, 8), labels)


def test_balanced_draws_all_classes_equally_often() -> None:
    data = open_dataset(uneven())
    size, order = Balanced().over(data, 10, 0)
    drawn = np.concatenate([order(epoch) for epoch in range(30)])
    assert size == 100 and data.labels is not None
    np.testing.assert_allclose(np.bincount(data.labels[drawn]) / 3000, 1 / 3, atol=0.03)
    first = order(0)
    assert np.array_equal(first, order(0)) and not np.array_equal(first, order(1))
    rare = first[data.labels[first] == 2]
    assert np.bincount(rare, minlength=100)[95:].max() - np.bincount(rare, minlength=100)[95:].min() <= 1
    tau = Balanced(tau=1.0).over(data, 10, 0).order
    share = np.bincount(data.labels[np.concatenate([tau(e) for e in range(30)])]) / 3000
    np.testing.assert_allclose(share, [0.8, 0.15, 0.05], atol=0.03)
    with pytest.raises(DataError, match="instead of one class each"):
        Balanced().over(open_dataset(TensorDataset(torch.zeros(4, 3, 8, 8), torch.rand(4))), 2, 0)


def test_balanced_by_name() -> None:
    models, data = [tiny_model(num_classes=3) for _ in range(3)], uneven()
    for model, sampler in zip(models, ("balanced", Balanced(), None), strict=True):
        fit(model, data, epochs=1, sampler=sampler)
    found = [weights(m) for m in models]
    assert difference(found[0], found[1]) == 0 and difference(found[0], found[2]) > 0
    assert fit(models[0], uneven(), epochs=1, sampler="balanced").settings["sampler"] == "Balanced(tau=0.0)"


@pytest.mark.parametrize("own", [False, True])
def test_samplers_of_torch(own: bool) -> None:
    generator = torch.Generator().manual_seed(5) if own else None
    given = WeightedRandomSampler([0.0] * 80 + [1.0] * 20, 50, generator=generator)
    data = open_dataset(uneven())
    state = torch.get_rng_state()
    size, order = as_sampler(given).over(data, 10, 0)  # type: ignore[union-attr]
    assert size == 50 and order(0).min() >= 80
    assert np.array_equal(order(0), order(0)) and not np.array_equal(order(0), order(1))
    assert torch.equal(state, torch.get_rng_state())
    if generator is not None:
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    report = fit(tiny_model(num_classes=3), uneven(), epochs=1, batch_size=10, sampler=given)
    assert report.steps == 5
    other = as_sampler(WeightedRandomSampler([1.0] * 100, 50))
    assert repr(as_sampler(given)) != repr(other) and " at 0x" not in repr(other)


def test_in_the_order_of_the_data_set() -> None:
    data = easy_data(16)
    order = as_sampler(SequentialSampler(data)).over(open_dataset(data), 4, 0).order  # type: ignore[union-attr]
    assert order(3).tolist() == list(range(16))


def test_what_is_no_sampler_of_the_data() -> None:
    data = easy_data(8)
    for wrong, words in (
        (BatchSampler(SequentialSampler(data), 2, False), "gives batches; expected indices"),
        (SequentialSampler(easy_data(9)), "gives the index 8, and the data set has 8 items"),
        (RandomSampler(data, num_samples=1, replacement=True).__class__(easy_data(30)), "gives the index"),
        ("even", "sampler is 'even'; expected one of"),
        (4, "sampler is 4; expected one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            fit(tiny_model(), data, epochs=1, sampler=wrong)
