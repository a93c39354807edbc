"""Names that data have: classes=[...] chooses their order, and labels follow them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_data import encoded, write_parquet
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from zoo.data import open_dataset
from zoo.errors import DataError

OWN, WANTED = ["c", "b", "a"], ["a", "b", "c"]
LABELS = [0, 1, 2, 0]  # c, b, a, c


class Named(Dataset[Any]):
    """Items whose labels are indices of names that the data set says; `attributes` may say the labels too."""

    def __init__(self, labels: list[Any], **attributes: Any) -> None:
        self.held, self.classes = labels, OWN
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, 8, 8) - 1, self.held[index]


def hub_features(datasets: Any) -> Any:
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=OWN)})


def hub(tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    images = [Image.open(io.BytesIO(encoded(i))) for i in range(4)]
    return datasets.Dataset.from_dict({"image": images, "label": LABELS}, features=hub_features(datasets))


def hub_dict(tmp_path: Path) -> Any:
    return pytest.importorskip("datasets").DatasetDict({"train": hub(tmp_path)})


def hub_transformed(tmp_path: Path) -> Any:
    data = hub(tmp_path)
    data.set_transform(lambda rows: rows)
    return data


def hub_stream(tmp_path: Path) -> Any:
    return hub(tmp_path).to_iterable_dataset()


def parquet(tmp_path: Path) -> Any:
    info = {"info": {"features": {"label": {"names": OWN, "_type": "ClassLabel"}}}}
    table = pa.table({"image": [encoded(i) for i in range(4)], "label": LABELS})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def parquet_json(tmp_path: Path) -> Any:
    (tmp_path / "classes.json").write_text(json.dumps(OWN))
    return write_parquet(tmp_path / "x.parquet", LABELS)


def table_json(tmp_path: Path) -> Any:
    (tmp_path / "classes.json").write_text(json.dumps(OWN))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{n}\n" for i, n in enumerate(LABELS)))
    return tmp_path


def image_folder(tmp_path: Path) -> Any:
    from torchvision.datasets import ImageFolder

    for i, name in enumerate(["c", "b", "a", "c"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{i}.png").write_bytes(encoded(i))
    data = ImageFolder(str(tmp_path))
    assert data.classes == ["a", "b", "c"]
    return data


SOURCES: list[Callable[[Path], Any]] = [
    *(hub, hub_dict, hub_transformed, hub_stream, parquet, parquet_json, table_json),
    lambda path: Named(LABELS),
    lambda path: Named(LABELS, targets=torch.tensor(LABELS)),
    lambda path: Named([torch.tensor(label) for label in LABELS]),
    lambda path: Subset(Named(LABELS), [0, 1, 2, 3]),
    lambda path: ConcatDataset([Named(LABELS[:2]), Named(LABELS[2:])]),
    lambda path: open_dataset(Named(LABELS)),
]


@pytest.mark.parametrize("source", SOURCES)
def test_labels_follow_the_names_that_data_have(source: Callable[[Path], Any], tmp_path: Path) -> None:
    """The names were written over those of the data: what the data call c was taken for a."""
    split = None
    plain = open_dataset(source(tmp_path), split=split)
    assert plain.classes == OWN and [int(plain[i][1]) for i in range(4)] == LABELS
    data = open_dataset(source(tmp_path), classes=WANTED)
    assert data.classes == WANTED and [int(data[i][1]) for i in range(4)] == [2, 1, 0, 2]
    assert data.labels is None or data.labels.tolist() == [2, 1, 0, 2]
    more = open_dataset(source(tmp_path), classes=["x", *WANTED])
    assert [int(more[i][1]) for i in range(4)] == [3, 2, 1, 3]
    with pytest.raises(DataError, match=r"'c'.* is not among the"):
        other = open_dataset(source(tmp_path), classes=["a", "b", "ship"])
        [other[i] for i in range(4)]


def test_class_names_of_torchvision(tmp_path: Path) -> None:
    """`ImageFolder(...)` with classes=[...] was renamed; folders themselves were mapped rightly."""
    data = open_dataset(image_folder(tmp_path), classes=OWN)
    assert [data[i][1] for i in range(4)] == [2, 1, 0, 0]  # files a, b, c, c
    assert data.labels is not None and data.labels.tolist() == [2, 1, 0, 0]
    assert open_dataset(tmp_path, classes=OWN).labels.tolist() == [2, 1, 0, 0]  # type: ignore[union-attr]


def test_tags_follow_their_names(tmp_path: Path) -> None:
    """Rows of 0 and 1, lists of indices, several columns."""
    rows = [[1, 0, 0], [0, 1, 1]]
    for data in (Named([torch.tensor(r, dtype=torch.float32) for r in rows]), Named(rows, targets=torch.tensor(rows))):
        found = open_dataset(data, classes=WANTED, labels="tags")
        assert [found[i][1].tolist() for i in range(2)] == [[0, 0, 1], [1, 1, 0]]
    table = pa.table({"image": [encoded(i) for i in range(2)], "day": [1, 0], "rain": [1, 1]})
    pq.write_table(table, tmp_path / "x.parquet")
    data = open_dataset(tmp_path, label_column=["day", "rain"], classes=["rain", "day"])
    assert data.targets is not None and data.targets.tolist() == [[1, 1], [1, 0]]
    with pytest.raises(DataError, match=r"'day'.* is not among the 2 classes"):
        open_dataset(tmp_path, label_column=["day", "rain"], classes=["rain", "night"])


def test_numbers_are_given_names_and_names_can_be_replaced() -> None:
    """Where data have no names, classes=[...] names the labels; what a message advises to rename classes does."""
    plain = Named(LABELS, classes=["0", "1", "2"])
    assert [open_dataset(plain, classes=WANTED)[i][1] for i in range(4)] == LABELS
    assert open_dataset(open_dataset(plain), classes=WANTED).classes == WANTED
    data = open_dataset(Named(LABELS))
    data.classes = ["tree", "sea", "sky"]
    assert data.select([1]).classes == ["tree", "sea", "sky"] and data[1][1] == 1
    with pytest.raises(DataError, match="leave split='val' out"):
        open_dataset(data, split="val")


def test_parts_that_number_other_classes() -> None:
    """Label 0 of one part and label 0 of another were one class, whatever the parts call it."""
    with pytest.raises(DataError, match="do not number the same classes: c, b, a and a, b, c"):
        open_dataset(ConcatDataset([Named(LABELS), Named(LABELS, classes=WANTED)]))
