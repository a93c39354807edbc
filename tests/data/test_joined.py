"""Joining data sets, and cutting one into sessions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import zoo
from zoo.data import by_class, join, with_classes
from zoo.errors import ConfigError, DataError


def data(names: list[str], each: int = 3) -> zoo.data.ImageDataset:
    labels = torch.arange(len(names)).repeat(each)
    images = labels[:, None, None, None].float().expand(-1, 3, 2, 2).clone()
    return zoo.open_dataset(TensorDataset(images, labels), classes=names)


def test_sessions_hold_their_own_classes() -> None:
    sessions = by_class(data(["a", "b", "c", "d", "e"]), 2, order=["e", "a", "b", "d", "c"])
    assert [s.classes for s in sessions] == [["e", "a", "b"], ["d", "c"]]
    for session, originals in zip(sessions, ([4, 0, 1], [3, 2]), strict=True):
        assert len(session) == 3 * len(originals)
        for i in range(len(session)):
            image, label = session[i]
            assert originals[label] == image[0, 0, 0] and session.labels is not None and session.labels[i] == label
    with pytest.raises(ConfigError, match="6 sessions of 5 classes"):
        by_class(data(["a", "b", "c", "d", "e"]), 6)
    with pytest.raises(ConfigError, match=r"4 classes in all; .* has 5"):
        by_class(data(["a", "b", "c", "d", "e"]), [2, 2])
    with pytest.raises(ConfigError, match="name each of the 5 classes"):
        by_class(data(["a", "b", "c", "d", "e"]), 5, order=["a"])


def test_labels_follow_names() -> None:
    moved = with_classes(data(["a", "b"]), ["x", "b", "a"])
    assert moved.labels is not None and np.array_equal(moved.labels, [2, 1] * 3) and moved[0][1] == 2
    with pytest.raises(DataError, match="'b' is not among the classes"):
        with_classes(data(["a", "b"]), ["a"])


def test_joined_needs_names_and_classes() -> None:
    both = join({"one": data(["a", "b"]), "two": data(["c"])})
    assert both.classes == ["one: a", "one: b", "two: c"] and [both[i][1] for i in (0, 1, 6)] == [0, 1, 2]
    with pytest.raises(ConfigError, match="cannot name a task"):
        join({"one two": data(["a"])})
    with pytest.raises(ConfigError, match="at least one"):
        join({})


def test_shuffled_labels_tell_nothing_and_are_as_many() -> None:
    before = data(["a", "b", "c", "d"], each=20)
    after = zoo.data.shuffled_labels(before, seed=1)
    assert before.labels is not None and after.labels is not None
    assert sorted(after.labels) == sorted(before.labels) and (after.labels != before.labels).sum() > 30
    for i in (0, 17, 79):
        image, label = after[i]
        assert label == after.labels[i] and torch.equal(image, before[i][0])
    assert (zoo.data.shuffled_labels(before, seed=1).labels == after.labels).all()
    assert (zoo.data.shuffled_labels(before, seed=2).labels != after.labels).any()
