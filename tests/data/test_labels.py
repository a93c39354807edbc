"""Labels of every form: what becomes of them, and which row is named where they are none."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_data import encoded, write_parquet
from torch.utils.data import Dataset, Subset, TensorDataset
from train_parts import CLASSES, easy_data, tiny_model

import zoo
from zoo.data import class_weights, few_shot, open_dataset, split_train_val
from zoo.data.labels import bare, natural, parsed, read_labels
from zoo.errors import ConfigError, DataError, MismatchError

QUIET = {"progress": False}


def where(row: int) -> str:
    return f"row {row}"


class Items(Dataset[Any]):
    """Small images with these labels, which it does not tell beforehand."""

    def __init__(self, labels: list[Any], **attributes: Any) -> None:
        self.held = labels
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, 8, 8) - 1, self.held[index]


def test_numbers_sort_as_numbers() -> None:
    assert natural(["10", "9", "0", "11"]) == ["0", "9", "10", "11"]
    assert natural(["b10", "b9"]) == ["b10", "b9"]
    assert bare(["0", "1", "2"]) and not bare(["0", "2", "1"]) and not bare(["1", "2"]) and bare(None)


@pytest.mark.parametrize(
    ("values", "kind", "labels", "classes"),
    [
        (["b", "a", "b"], "auto", [1, 0, 1], ["a", "b"]),
        (["10", "9"], "auto", [1, 0], ["9", "10"]),
        ([True, False], "auto", [1, 0], ["0", "1"]),
        ([0.0, 2.0], "classes", [0, 2], ["0", "1", "2"]),
        ([b"x", "y"], "auto", [0, 1], ["x", "y"]),
        ([np.int16(1), torch.tensor(0)], "auto", [1, 0], ["0", "1"]),
        ([[1], [0]], "classes", [1, 0], ["0", "1"]),
        (np.array([[2], [0]]), "classes", [2, 0], ["0", "1", "2"]),
        ([-1, 5], "any", [-1, 5], None),
    ],
)
def test_classes(values: Any, kind: str, labels: list[int], classes: Any) -> None:
    found = read_labels(values, where, None, kind)
    assert found.labels is not None and found.labels.tolist() == labels and found.classes == classes


@pytest.mark.parametrize(
    ("values", "kind", "targets", "classes"),
    [
        ([["b"], ["a", "b"], []], "auto", [[0, 1], [1, 1], [0, 0]], ["a", "b"]),
        ([[2], [0, 1]], "auto", [[0, 0, 1], [1, 1, 0]], ["0", "1", "2"]),
        (["b; a", "a"], "tags", [[1, 1], [1, 0]], ["a", "b"]),
        (["b|c", "a,c"], "tags", [[0, 1, 1], [1, 0, 1]], ["a", "b", "c"]),
        ([[1, 0, 1], [0, 0, 0]], "auto", [[1, 0, 1], [0, 0, 0]], ["0", "1", "2"]),
        ([[1.0, 1.0], [0.0, 1.0]], "auto", [[1, 1], [0, 1]], ["0", "1"]),
        (np.array([[1, 1], [0, 1]]), "auto", [[1, 1], [0, 1]], ["0", "1"]),
        ([0.5, -2], "auto", [0.5, -2], None),
        ([-3, 4], "numbers", [-3, 4], None),
        (["1.5", "-2"], "numbers", [1.5, -2], None),
        ([[0.5, 7], [1, -1]], "auto", [[0.5, 7], [1, -1]], None),
        (np.array([[3, 4], [5, -6]]), "numbers", [[3, 4], [5, -6]], None),
    ],
)
def test_tags_and_numbers(values: Any, kind: str, targets: Any, classes: Any) -> None:
    found = read_labels(values, where, None, kind)
    assert found.labels is None and found.targets is not None and found.targets.dtype == np.float32
    assert found.targets.tolist() == targets and found.classes == classes


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ([0, None], "auto", "row 1: no label"),
        ([0.5, float("nan")], "auto", "row 1: no label"),
        (["a", ""], "auto", "row 1: no label"),
        ([["a"], ["b", None]], "auto", r"row 1: no label \(None\) in the list"),
        ([["a"], None], "tags", "row 1: no label"),
        ([0, float("inf")], "auto", "row 1: the label is inf"),
        (np.array([0.0, np.inf]), "numbers", "row 1: the label is inf; expected finite"),
        ([0, "a"], "auto", "row 1: labels are a text in some rows and a number in others"),
        ([["a"], [3]], "auto", "row 1: labels are texts in some rows"),
        ([["a"], "b"], "auto", "row 1: labels are a list in some rows"),
        ([[["a"]]], "auto", "row 0: the label is a list of lists"),
        ([0, date(2020, 1, 1)], "auto", r"row 1: the label is datetime.*\(date\)"),
        ([Decimal(1)], "auto", r"row 0: the label is Decimal"),
        ([1, 10**30], "auto", "row 1: the label is 1000000"),
        ([0, 10**9], "auto", "row 1: a label 1000000000 would make 1000000001 classes"),
        ([[0], [5, 10**9]], "tags", "row 1: a label 1000000000 would make"),
        ([0, -1], "auto", "row 1: label -1 .*labels='numbers'"),
        ([0.5, 1.0], "classes", "row 0: the label is 0.5; expected a class. Numbers are regressed"),
        ([[0], [0, 1]], "classes", "row 1: the label is a list of 2; .*task='multilabel'"),
        (np.array([[0, 1], [1, 1]]), "classes", r"row 1: the label is \[1, 1\].*task='multilabel'"),
        ([[1.0, 2.0], [0.5]], "numbers", "row 1: 1 numbers; expected 2"),
        (["1", "x"], "numbers", "row 1: the label is 'x'; expected a number"),
        ([[0.5, 3.0]], "tags", "row 0: .*expected 0 or 1"),
    ],
)
def test_what_is_no_label_is_named(values: Any, kind: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_labels(values, where, None, kind)


def test_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"labels is .number.; .*Did you mean .numbers."):
        open_dataset(easy_data(4), labels="number")


def test_numbers_that_are_names() -> None:
    """A user's own names that are numbers in another order name the labels; the names of a file are places."""
    names = ["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"]
    assert read_labels([10, 2], where, names, given=True).labels.tolist() == [2, 3]  # type: ignore[union-attr]
    assert read_labels([10, 2], where, names).labels.tolist() == [10, 2]  # type: ignore[union-attr]
    assert read_labels([7, 3], where, ["3", "7"], given=True).labels.tolist() == [1, 0]  # type: ignore[union-attr]


def test_cells_of_text_tables() -> None:
    assert parsed(["1", " 2"]) == [1, 2] and parsed(["1", "2.5"]) == [1.0, 2.5]
    assert parsed(["1", "x"]) == ["1", "x"] and parsed(["", "3"]) == [None, 3]


# -- Parquet files ------------------------------------------------------------------------------------------------------


def test_lists_in_parquet_files(tmp_path: Path) -> None:
    """They were read for sounds only."""
    data = open_dataset(write_parquet(tmp_path / "x.parquet", [["sky", "sea"], ["sea"], []]))
    assert data.classes == ["sea", "sky"] and data.labels is None and data.targets is not None
    assert data.targets.tolist() == [[1, 1], [1, 0], [0, 0]] and data[0][1].tolist() == [1, 1]
    assert data.select([1]).targets.tolist() == [[1, 0]]  # type: ignore[union-attr]
    for labels in ([[["a"]]], [["a", None]], [["a"], None], [[0, 10**9]]):
        with pytest.raises(DataError, match=r"row \d"):
            open_dataset(write_parquet(tmp_path / "y.parquet", labels))


def test_float_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [0.5, -1.0, 2.0])
    data = open_dataset(file)
    assert data.classes is None and data[1][1].dtype == torch.float32 and float(data[1][1]) == -1.0
    with pytest.raises(DataError, match=r"row 0: the label is 0.5; expected a class"):
        zoo.fit(tiny_model(num_classes=1), file, epochs=1, **QUIET)
    whole = write_parquet(tmp_path / "y.parquet", [0.0, 3.0, 1.0, 2.0])
    assert open_dataset(whole, labels="classes").labels.tolist() == [0, 3, 1, 2]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="row 1: no label"):
        open_dataset(write_parquet(tmp_path / "z.parquet", [0.5, None]))
    with pytest.raises(DataError, match="row 1: the label is nan"):
        open_dataset(write_parquet(tmp_path / "z.parquet", [0.5, float("nan")]))


def test_several_columns(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(i) for i in range(3)], "day": [1, 0, 1], "rain": [1, 1, 0], "x": [0.5, 1, -3]})
    pq.write_table(table, tmp_path / "x.parquet")
    data = open_dataset(tmp_path, label_column=["day", "rain"])
    assert data.classes == ["day", "rain"] and data.targets.tolist() == [[1, 1], [0, 1], [1, 0]]  # type: ignore[union-attr]
    data = open_dataset(tmp_path, label_column=["day", "x"])
    assert data.classes is None and data.targets.tolist() == [[1, 0.5], [0, 1], [1, -3]]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"no column 'y' \(label_column\)"):
        open_dataset(tmp_path, label_column=["day", "y"])


# -- data sets of the user's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [{}, {"classes": ["a", "b"]}, {"targets": ["b", "a", "b"]}])
def test_texts(attributes: dict[str, Any]) -> None:
    """torch's own error named no item."""
    data = open_dataset(Items(["b", "a", "b"], **attributes))
    assert data.classes == ["a", "b"] and [data[i][1] for i in range(3)] == [1, 0, 1]
    part = open_dataset(Subset(Items(["b", "a", "b"], **attributes), [1, 2]))
    assert [part[i][1] for i in range(2)] == [0, 1]
    swapped = open_dataset(Items(["b", "a"]), classes=["b", "a"])
    assert [swapped[i][1] for i in range(2)] == [0, 1]
    with pytest.raises(DataError, match="item 1: label 'c' is not among"):
        [open_dataset(Items(["a", "c"]), classes=["a", "b"])[i] for i in range(2)]


def test_labels_that_are_not_known_beforehand() -> None:
    """True and false, arrays of one number, floats, digits of a stream; none; several classes for each item."""
    values = [True, np.array([1]), torch.tensor([0]), np.int64(1), torch.tensor(1)]
    data = open_dataset(Items(values))
    assert [data[i][1] for i in range(5)] == [1, 1, 0, 1, 1]
    model = tiny_model(num_classes=2)
    assert zoo.evaluate(model, Items(values), **QUIET)["images"] == 5
    with pytest.raises(DataError, match=r"item 1: no label \(None\)"):
        zoo.fit(model, Items([0, None]), epochs=1, **QUIET)
    with pytest.raises(DataError, match=r"item \d: the label is 0.5; expected a class. Numbers are regressed"):
        zoo.fit(model, Items([0.5, 0.5]), epochs=1, **QUIET)
    with pytest.raises(DataError, match=r"\[1.0, 1.0\].*task='multilabel'"):
        zoo.fit(model, Items([torch.ones(2), torch.tensor([0.0, 1.0])]), epochs=1, **QUIET)
    with pytest.raises(DataError, match=r"\[1.0, 1.0\].*task='multilabel'"):
        zoo.evaluate(model, Items([torch.ones(2, dtype=torch.int64)]), **QUIET)


def test_multi_hot_targets_without_the_task_are_refused() -> None:
    """A softmax was trained on them, without a word."""
    images, tags = torch.randn(4, 3, 8, 8), torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    for targets in (tags, tags.float(), tags.bool()):
        with pytest.raises(DataError, match=r"item \d: .*task='multilabel'"):
            zoo.fit(tiny_model(), TensorDataset(images, targets), epochs=1, **QUIET)
    known = open_dataset(TensorDataset(images, tags))
    with pytest.raises(DataError, match=r"probabilities that sum to 1\. These data are for a task of multilabel"):
        zoo.fit(tiny_model(), known, epochs=1, **QUIET)
    zoo.fit(tiny_model(), TensorDataset(images, tags), task="multilabel", epochs=1, **QUIET)
    soft = torch.softmax(torch.randn(4, 4), 1)
    zoo.fit(
        tiny_model(), TensorDataset(images, soft), epochs=1, **QUIET
    )  # probabilities are targets of a classification
    with pytest.raises(DataError, match="expected 0 or 1 for each class"):
        zoo.fit(tiny_model(), Items([torch.tensor([2.0, 0, 0, 0])] * 2), task="multilabel", epochs=1, **QUIET)


def test_whole_numbers_below_0_with_a_loss_of_ones_own() -> None:
    """They were refused as labels outside the classes."""
    images, values = torch.randn(6, 3, 8, 8), torch.tensor([-2, 3, 0, -1, 1, 2])
    seen: list[torch.Tensor] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(targets)
        return (outputs[:, 0] - targets).square()

    zoo.fit(tiny_model(num_classes=1), TensorDataset(images, values), loss=loss, epochs=1, **QUIET)
    assert sorted(seen[0].tolist()) == [-2, -1, 0, 1, 2, 3]
    data = open_dataset(TensorDataset(images, values), labels="numbers")
    assert data[0][1].dtype == torch.float32 and float(data[0][1]) == -2.0


def test_a_label_of_a_thousand_million() -> None:
    """It filled the memory with class names."""
    with pytest.raises(DataError, match="item 1: a label 1000000000 would make 1000000001 classes of 2 rows"):
        open_dataset(TensorDataset(torch.zeros(2, 3, 8, 8), torch.tensor([0, 10**9])))
    with pytest.raises(DataError, match="a label 1000000000"):
        few_shot(open_dataset(Items([0, 10**9])), 1)
    with pytest.raises(DataError, match="a label 1000000000 is outside the model's 2 classes"):
        zoo.fit(tiny_model(num_classes=2), Items([0, 10**9]), epochs=1, **QUIET)


def test_labels_that_lack_the_last_class() -> None:
    """Of data to measure on; of training data that is still refused."""
    model = tiny_model()
    assert zoo.evaluate(model, easy_data(9, classes=3), **QUIET)["images"] == 9
    zoo.fit(model, easy_data(16), easy_data(9, classes=3), epochs=1, **QUIET)
    assert model.classes == [str(i) for i in range(CLASSES)]
    with pytest.raises(MismatchError, match="has 3 classes"):
        zoo.fit(model, easy_data(9, classes=3), epochs=1, **QUIET)


def test_digits_in_another_order_are_matched_by_name() -> None:
    """Classes 0, 1, 10, 11, 2 ... of folders were taken for 0 ... 11: accuracy 0.17 instead of 1."""
    names = sorted(map(str, range(12)))
    images = torch.randn(24, 3, 8, 8)
    model = tiny_model(num_classes=12)
    labels = model.eval()(images).argmax(1)  # what it answers, as places among its classes
    model.classes = names
    numbers = torch.tensor([int(names[i]) for i in labels])
    held = TensorDataset(torch.cat([images, torch.zeros(1, 3, 8, 8)]), torch.cat([numbers, torch.tensor([11])]))
    found = zoo.evaluate(model, open_dataset(held, classes=[str(i) for i in range(12)]).select(range(24)), **QUIET)
    assert found["accuracy"] == 1.0


def test_weights_of_classes() -> None:
    data = open_dataset(TensorDataset(torch.zeros(6, 3, 8, 8), torch.tensor([0, 0, 0, 1, 1, 2])))
    torch.testing.assert_close(class_weights(data), torch.tensor([6 / 9, 1.0, 2.0]))
    tags = open_dataset(TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([[1, 1], [1, 0], [1, 0], [0, 0]])))
    torch.testing.assert_close(class_weights(tags), torch.tensor([1 / 3, 3.0]))
    torch.testing.assert_close(class_weights(data.select([0, 1, 5])), torch.tensor([0.75, 1.0, 1.5]))


def test_splits_of_tags_and_numbers() -> None:
    for targets in (torch.rand(20) - 3, (torch.rand(20, 3) > 0.5).float()):
        train, val = split_train_val(open_dataset(TensorDataset(torch.zeros(20, 3, 8, 8), targets)), 0.2)
        assert (len(train), len(val)) == (16, 4)
    with pytest.raises(DataError, match="items have numbers instead of one class each"):
        few_shot(open_dataset(TensorDataset(torch.zeros(4, 3, 8, 8), torch.rand(4) * 9)), 1)
    two = [torch.randn(3, 8, 8), torch.randn(3, 8, 8)]
    split_train_val(open_dataset(Items([torch.zeros(4)] * 10 + [t[0, 0, :4] for t in two])), 0.2)


def test_regression_from_every_format(tmp_path: Path) -> None:
    """Whole numbers below 0 were refused as labels, and floats were torch's error."""
    values = [-2, 3, 0, 1]
    images = [encoded(60 * i) for i in range(4)]
    (tmp_path / "t").mkdir()
    for i, data in enumerate(images):
        (tmp_path / "t" / f"{i}.png").write_bytes(data)
    rows = "".join(f"{i}.png,{value}\n" for i, value in enumerate(values))
    (tmp_path / "t" / "labels.csv").write_text(f"file,age\n{rows}")
    sources: list[Any] = [
        write_parquet(tmp_path / "p.parquet", values, images),
        write_parquet(tmp_path / "f.parquet", [float(v) for v in values], images),
        tmp_path / "t",
        list(zip(images, values, strict=True)),
        [{"image": data, "label": float(v)} for data, v in zip(images, values, strict=True)],
    ]
    losses = []
    for source in sources:
        report = zoo.fit(tiny_model(num_classes=1), source, task="regress", augment="none", epochs=1, **QUIET)
        losses.append(report.history[0]["loss"])
    assert losses == [losses[0]] * 5 and losses[0] > 0.5


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (float("nan"), "the label is nan; expected a class"),
        (float("inf"), "the label is inf"),
        (10**30, "which no class can have"),
        ({"a": 1}, r"the label is \{'a': 1\} \(dict\); expected a class"),
        ((1, 2), r"\(tuple\)"),
        (["a"], r"\(list\)"),
        (Decimal(1), r"\(Decimal\)"),
        (1j, r"\(complex\)"),
        (0.5, "Numbers are regressed"),
    ],
)
def test_an_item_without_a_class_is_named(label: Any, words: str) -> None:
    """torch's errors of its collating named no item."""
    for labels in ([label] * 3, [0, 1, label]):
        with pytest.raises(DataError, match=rf"item \d: .*{words}"):
            zoo.evaluate(tiny_model(num_classes=2), Items(labels), **QUIET)
    with pytest.raises(DataError, match=r"item 2: the label is nan; expected a number"):
        zoo.evaluate(tiny_model(num_classes=1), Items([0.5, 1, float("nan")]), task="regress", **QUIET)
    with pytest.raises(DataError, match=r"item 1: the label is 'x'|item 1: label 'x' is not among"):
        zoo.evaluate(tiny_model(num_classes=1), Items([0.5, "x"]), task="regress", **QUIET)


def test_what_cannot_be_put_into_a_batch() -> None:
    model = tiny_model(num_classes=2)
    for items, words in (
        ([(torch.zeros(3, 8, 8), [0.5] * (1 + i % 2)) for i in range(4)], r"item 1: 2 numbers; expected 1"),
        ([(np.array([None]), 0), (np.array([None]), 1)], "cannot be put into a batch"),
        ([(torch.zeros(3, 8, 8), 0), ({"x": 1}, 1)], "of different types: Tensor, dict"),
    ):
        with pytest.raises(DataError, match=words):
            zoo.evaluate(model, items, **QUIET)
    with pytest.raises(DataError, match=r"Targets of one batch have different shapes: \(1,\), \(2,\)"):
        zoo.evaluate(model, Items([[1.0], [0.5, 0.5]]), loss=lambda o, t: o.mean(), **QUIET)


def test_whole_floats_and_rows_of_one_1_are_classes() -> None:
    labels = torch.arange(8) % 2
    losses = []
    for targets in (labels, labels.double(), labels[:, None], labels.bool()):
        data = TensorDataset(easy_data(8, classes=2).tensors[0], targets)
        losses.append(zoo.evaluate(tiny_model(num_classes=2), data, **QUIET)["loss"])
    one_hot = TensorDataset(easy_data(8, classes=2).tensors[0], torch.eye(2, dtype=torch.int64)[labels])
    losses.append(zoo.evaluate(tiny_model(num_classes=2), one_hot, **QUIET)["loss"])
    assert losses == pytest.approx([losses[0]] * 5)


def test_an_augmentation_that_is_left_out_is_said() -> None:
    with pytest.warns(UserWarning, match="augment is left out: 'TensorDataset' brings"):
        zoo.fit(tiny_model(), easy_data(8), epochs=1, augment="randaugment", **QUIET)
