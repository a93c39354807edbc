"""Data sets: folders, Parquet files, torch data sets; few shots, splits, and what is wrong with bad ones."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_data import encoded, write_parquet
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from zoo.data import ImageDataset, Skipped, collate, few_shot, open_dataset, split_train_val
from zoo.data.parquet import ParquetRows
from zoo.errors import ConfigError, DataError, MissingPackageError
from zoo.train.batches import BatchPlan


def grey(image: Any) -> int:
    return int(np.asarray(image)[0, 0, 0])


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


# -- sources ----------------------------------------------------------------------------------------------------------


def test_folder(image_folder: Path) -> None:
    data = open_dataset(image_folder, split="train")
    assert data.classes == ["blue", "red"] and len(data) == 24
    assert data.labels is not None and np.bincount(data.labels).tolist() == [12, 12]
    image, label = data[0]
    assert image.mode == "RGB" and label == 0
    assert np.asarray(image).mean((0, 1)).argmax() == 2  # blue
    assert data.where(0).endswith("train/blue/0.png")


def test_folder_with_several_splits_needs_one_named(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"splits test, train; choose one with open_dataset"):
        open_dataset(image_folder)
    with pytest.raises(DataError, match=r"no split 'tran'.*Did you mean 'train'"):
        open_dataset(image_folder, split="tran")
    assert open_dataset(str(image_folder / "test")).name.endswith("/test")


def test_folder_classes_in_a_given_order(image_folder: Path) -> None:
    data = open_dataset(image_folder / "train", classes=["red", "green", "blue"])
    assert data.labels is not None and sorted(set(data.labels.tolist())) == [0, 2]
    with pytest.raises(DataError, match="'blue' is not among the 1 classes"):
        open_dataset(image_folder / "train", classes=["red"])


def test_parquet_folder_with_shards(tmp_path: Path) -> None:
    for shard in range(2):
        images = [encoded(10 * shard + i) for i in range(5)]
        write_parquet(tmp_path / f"train-{shard:05d}-of-00002.parquet", [0, 1, 2, 0, 1], images, row_group_size=2)
    write_parquet(tmp_path / "test.parquet", [0, 1, 2])
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        open_dataset(tmp_path)
    data = open_dataset(tmp_path, split="train")
    assert data.classes == ["a", "b", "c"]
    assert [grey(data[i][0]) for i in range(10)] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert [data[i][1] for i in range(10)] == [0, 1, 2, 0, 1] * 2
    assert data.where(7).endswith("train-00001-of-00002.parquet, row 2")
    assert data.name == f"{tmp_path.name}/train"
    assert len(open_dataset(str(tmp_path / "train-*.parquet"))) == 10
    assert len(open_dataset(sorted(tmp_path.glob("t*.parquet")))) == 13


def test_parquet_as_the_hub_writes_it(tmp_path: Path) -> None:
    """A struct column of bytes and path, class names in the schema's metadata."""
    images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(4)]
    table = pa.table({"img": images, "fine_label": [1, 0, 1, 0]})
    info = {"info": {"features": {"fine_label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "x.parquet")
    data = open_dataset(tmp_path / "x.parquet")
    assert data.classes == ["cat", "dog"] and grey(data[2][0]) == 2 and data[2][1] == 1


def test_parquet_text_labels(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", ["dog", "cat", "dog"])
    assert open_dataset(file).classes == ["cat", "dog"]
    assert [open_dataset(file, classes=["dog", "cat"])[i][1] for i in range(3)] == [0, 1, 0]
    with pytest.raises(DataError, match=r"row 1: label 'cat' is not among"):
        open_dataset(file, classes=["dog", "cow"])


def test_parquet_missing_and_ambiguous_columns(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"photo": [encoded(0)], "subject": [3], "index": [1]}), file)
    with pytest.raises(DataError, match=r"several columns could hold the labels; columns: photo \(binary\), subject"):
        open_dataset(file)
    data = open_dataset(file, label_column="subject")
    assert data.classes == ["0", "1", "2", "3"] and data[0][1] == 3
    with pytest.raises(DataError, match=r"no column 'fotos' \(image_column\); columns: photo.*'photo'"):
        open_dataset(file, image_column="fotos", label_column="subject")
    with pytest.raises(DataError, match="column 'index' is of type int64; expected encoded images"):
        open_dataset(file, image_column="index", label_column="subject")


def test_large_parquet_is_read_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit only a few row groups are held, and a shuffled epoch reads each about once."""
    file = write_parquet(tmp_path / "x.parquet", [i % 2 for i in range(64)], row_group_size=8)
    group = pq.ParquetFile(file).metadata.row_group(0).column(0).total_uncompressed_size
    rows = ParquetRows([file], hold_bytes=0, cache_bytes=9 * group // 2)
    assert rows.window == 2 and rows.blocks is not None and rows.blocks.tolist() == [i // 8 for i in range(64)]
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, index: int, **options: Any) -> Any:
        read.append(index)
        return original(self, index, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    plan = BatchPlan(64, 8, blocks=rows.blocks, window=rows.window)
    order = plan.order(0)
    assert sorted(order) == list(range(64)) and order.tolist() != plan.order(1).tolist()
    assert len({i // 8 for i in order[:16]}) == 2 and sorted(order[:16]) != order[:16].tolist()
    assert [grey(rows.read(int(i))[0]) for i in order] == order.tolist()
    assert sorted(read) == list(range(8))
    assert len(rows._cache) <= 4


def test_parquet_in_worker_processes(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [i % 2 for i in range(8)], row_group_size=2)
    data = open_dataset(file, transform=to_tensor)
    data[0]  # the parent has the file open already
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)
    assert [int(x) for images, _ in loader for x in images[:, 0, 0, 0]] == list(range(8))
    assert grey(pickle.loads(pickle.dumps(open_dataset(file)))[3][0]) == 3


def test_torch_datasets() -> None:
    images, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    data = open_dataset(TensorDataset(images, labels))
    assert data.classes == ["0", "1", "2"] and torch.equal(data[4][0], images[4])
    part = open_dataset(Subset(TensorDataset(images, labels), [5, 0]))
    assert part.labels is not None and part.labels.tolist() == [2, 0]

    class Photos(Dataset[Any]):
        classes = ["no", "yes"]

        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> tuple[Any, int]:
            return torch.full((3, 4, 4), 10 * i, dtype=torch.uint8), i % 2

    photos = open_dataset(Photos(), transform=to_tensor)
    assert photos.classes == ["no", "yes"] and photos.labels is None
    assert float(photos[2][0][0, 0, 0]) == 20  # a uint8 tensor came to the transform as a PIL image
    assert open_dataset(Subset(Photos(), [0, 1])).classes == ["no", "yes"]
    train, val = split_train_val(photos, 0.5)
    assert len(train) + len(val) == 3

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([])

    with pytest.raises(DataError, match="has no length"):
        open_dataset(Stream())


def test_hub_names_need_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'adapter-zoo\[data\]'"):
        open_dataset("someone/flowers")


def test_a_mistyped_path_is_not_looked_up_on_the_hub(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"No such file or folder.*'train'"):
        open_dataset(str(image_folder / "trian"))
    with pytest.raises(DataError, match="No file fits the pattern"):
        open_dataset(str(image_folder / "*.parquet"))


def test_a_mistyped_name_is_first_said_not_to_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load_dataset(name: str, **_: Any) -> Any:
        asked.append(name)
        raise ConnectionError("no such data set")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("nope", "some/nope"):
        with pytest.raises(
            DataError, match=rf"^There is no file or folder '{name}' here \(in .*The Hub data set '{name}'"
        ):
            open_dataset(name)
    with pytest.raises(DataError, match=r"^The Hub data set 'nope'"):  # not looked for here
        open_dataset("hf:nope")
    assert asked == ["nope", "some/nope", "nope"]
    with pytest.raises(DataError, match=r"^There is no file or folder 'my nope' here .*Nor can it be"):
        open_dataset("my nope")
    assert len(asked) == 3


# -- bad data -----------------------------------------------------------------------------------------------------------


def test_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class subfolders"):
        open_dataset(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="is empty; 1 class folders hold no image"):
        open_dataset(tmp_path)
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), file)
    with pytest.raises(DataError, match="is empty"):
        open_dataset(file)
    with pytest.raises(DataError, match="is empty"):
        open_dataset(TensorDataset(torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [(b"", "is empty"), (b"no image at all", "not an image that Pillow can read"), ("half", "corrupt")],
)
def test_corrupt_images_are_named_and_skipped_when_asked(tmp_path: Path, damage: Any, words: str) -> None:
    good = encoded(9, size=64, kind="JPEG")
    bad = good[: len(good) // 2] if damage == "half" else damage
    write_parquet(tmp_path / "p/x.parquet", [0, 1, 0], [good, bad, good])
    for i, data in enumerate([good, bad, good]):
        (tmp_path / "f/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"f/a/{i}.jpg").write_bytes(data)
    for source, place in ((tmp_path / "p", "x.parquet, row 1"), (tmp_path / "f", "f/a/1.jpg")):
        data = open_dataset(source)
        assert grey(data[0][0]) == 9
        with pytest.raises(DataError, match=f"{place}: .*{words}.*on_error"):
            data[1]
        lenient = open_dataset(source, on_error="skip", transform=to_tensor)
        item = lenient[1]
        assert isinstance(item, Skipped) and place in item.where and words in item.reason
        images, labels = collate([lenient[i] for i in range(3)])
        assert images.shape == (2, 3, 64, 64) and labels.tolist() == [0, 0]


def test_labels_outside_the_classes(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [0, 1, 7, 9])
    with pytest.raises(DataError, match=r"row 2: label 7 is outside the 3 classes \(0..2\); 2 such rows"):
        open_dataset(file, classes=["a", "b", "c"])
    with pytest.raises(DataError, match="row 1: label -1"):
        open_dataset(write_parquet(tmp_path / "y.parquet", [0, -1]))
    with pytest.raises(DataError, match="row 1: no label"):
        open_dataset(write_parquet(tmp_path / "z.parquet", [0, None]))
    with pytest.raises(DataError, match="item 2: label 5"):
        open_dataset(TensorDataset(torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 5])), classes=["a", "b"])


def test_broken_files(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [0, 1])
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"x.parquet: not a readable Parquet file"):
        open_dataset(file)
    write_parquet(tmp_path / "d/train-0.parquet", [0])
    pq.write_table(pa.table({"picture": [encoded(0)], "label": [0]}), tmp_path / "d/train-1.parquet")
    with pytest.raises(DataError, match=r"train-1.parquet: no column 'image', which train-0.parquet has"):
        open_dataset(tmp_path / "d")
    (tmp_path / "e").mkdir()
    write_parquet(tmp_path / "e/x.parquet", [0])
    (tmp_path / "e/classes.json").write_text("{")
    with pytest.raises(DataError, match=r"classes.json: not readable as JSON"):
        open_dataset(tmp_path / "e")


def test_what_cannot_be_batched_says_why(image_folder: Path) -> None:
    data = open_dataset(image_folder, split="train")
    with pytest.raises(DataError, match="yields PIL images; expected tensors"):
        collate([data[0], data[1]])
    with pytest.raises(DataError, match=r"different shapes: \(3, 4, 4\), \(3, 5, 4\)"):
        collate([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 5, 4), 1)])


# -- choosing -----------------------------------------------------------------------------------------------------------


def numbered(labels: list[int]) -> ImageDataset:
    """Item i is the tensor i."""
    return open_dataset(TensorDataset(torch.arange(len(labels)), torch.tensor(labels)))


def items(data: ImageDataset) -> list[int]:
    return [int(data[i][0]) for i in range(len(data))]


def test_few_shot_is_balanced_and_seeded() -> None:
    data = numbered([0] * 50 + [1] * 7 + [2] * 20)
    few = few_shot(data, 5, seed=3)
    assert few.labels is not None and np.bincount(few.labels).tolist() == [5, 5, 5]
    assert items(few) == items(few_shot(data, 5, seed=3)) == sorted(items(few))
    assert items(few) != items(few_shot(data, 5, seed=4))
    assert len(few_shot(data, 7)) == 21
    with pytest.raises(
        DataError, match=r"shots=16 .* than these classes have: 1 \(7\)\. The largest possible value is 7"
    ):
        few_shot(data, 16)
    with pytest.raises(ConfigError, match="shots is 0"):
        few_shot(data, 0)


def test_split_is_stratified_disjoint_and_seeded() -> None:
    data = numbered([0] * 100 + [1] * 30 + [2] * 2 + [3])
    train, val = split_train_val(data, 0.1, seed=1)
    assert sorted(items(train) + items(val)) == list(range(133))
    assert val.labels is not None and np.bincount(val.labels, minlength=4).tolist() == [10, 3, 1, 0]
    assert items(split_train_val(data, 0.1, seed=1)[1]) == items(val) != items(split_train_val(data, 0.1, seed=2)[1])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_train_val(data, 1.5)
    with pytest.raises(DataError, match="no class has two images"):
        split_train_val(numbered([0, 1, 2]), 0.1)


def test_real_pack(data_dir: Path) -> None:
    """The CIFAR-10 pack: counts and class names of its README, a picture that Pillow decodes."""
    if not (data_dir / "cifar10").is_dir():
        pytest.skip("the cifar10 pack is not there")
    train = open_dataset(data_dir / "cifar10", split="train")
    assert len(train) == 50_000 and train.classes is not None and train.classes[3] == "cat"
    assert train.labels is not None and set(np.bincount(train.labels)) == {5_000}
    assert train[49_999][0].size == (32, 32)
    assert len(open_dataset(data_dir / "cifar10", split="train", shots=16)) == 160


def test_class_names_of_several_labellings(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(i) for i in range(3)], "label": [0, 1, 2], "coarse_label": [0, 0, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "classes.json").write_text(json.dumps({"fine": ["ant", "bee", "cow"], "coarse": ["insect", "mammal"]}))
    assert open_dataset(str(tmp_path), transform=to_tensor).classes == ["ant", "bee", "cow"]
    coarse = open_dataset(str(tmp_path), transform=to_tensor, label_column="coarse_label")
    assert coarse.classes == ["insect", "mammal"]
    (tmp_path / "classes.json").write_text(json.dumps({"coarse": ["insect", "mammal"], "fine": ["ant", "bee", "cow"]}))
    pq.write_table(table.rename_columns(["image", "fine_label", "coarse_label"]), tmp_path / "a.parquet")
    assert open_dataset(str(tmp_path), transform=to_tensor).classes == [
        "ant",
        "bee",
        "cow",
    ]  # the guessed column counts too
