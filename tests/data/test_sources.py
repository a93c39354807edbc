"""Data sets that are objects, shards, rows by name, streams: everything that people hand over instead of a folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import encoded, write_parquet
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from train_parts import CLASSES, easy_data, fit, tiny_model

import zoo
from zoo.data import ImageDataset, Skipped, collate, open_dataset, unwrap
from zoo.errors import DataError

QUIET = {"progress": False}


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


def grey(image: Any) -> int:
    return int(np.asarray(image)[0, 0, 0])


# -- lists and rows -----------------------------------------------------------------------------------------------------


def test_lists_of_pairs(tmp_path: Path) -> None:
    """They were refused, although the message for streams said to make one."""
    (tmp_path / "7.png").write_bytes(encoded(7))
    data = open_dataset([(picture(5), "b"), (picture(6), "a"), (str(tmp_path / "7.png"), "b")])
    assert data.classes == ["a", "b"] and data.labels is not None and data.labels.tolist() == [1, 0, 1]
    assert [grey(data[i][0]) for i in range(3)] == [5, 6, 7]
    fit(tiny_model(num_classes=2), data, epochs=1)
    fit(tiny_model(num_classes=2), [(torch.randn(3, 8, 8), i % 2) for i in range(6)], epochs=1)


@pytest.mark.parametrize(
    "row",
    [
        {"image": picture(9), "label": 1},
        {"img": encoded(9), "cls": 1},
        {"image": {"bytes": encoded(9), "path": None}, "fine_label": 1, "id": 4},
        {"__key__": "x", "jpg": encoded(9), "cls": b"1"},
        {"photo": np.full((8, 8, 3), 9, np.uint8), "label": np.int64(1)},
        {"image": picture(9), "what": 1},
    ],
)
def test_rows_by_name(row: dict[str, Any]) -> None:
    data = open_dataset([row, {**row}])
    assert (grey(data[0][0]), data[0][1]) == (9, 1)


def test_rows_that_say_too_little() -> None:
    with pytest.raises(DataError, match=r"item 0: which entry is the image\? .*image_column=.*entries: x, y"):
        open_dataset([{"x": picture(1), "y": 1}])
    with pytest.raises(DataError, match=r"item 0: which entry is the label\? .*entries: image, x, z"):
        open_dataset([{"image": picture(1), "x": 1, "z": 2}])
    data = open_dataset([{"x": picture(1), "y": 1}], image_column="x", label_column="y")
    assert data[0][1] == 1
    with pytest.raises(DataError, match=r"item 0: no 'yy' \(label_column\).*'y'"):
        open_dataset([{"x": picture(1), "y": 1}], image_column="x", label_column="yy")
    for item, words in ((1, "int; expected a pair"), ((1, 2, 3), "tuple of 3; expected a pair")):
        with pytest.raises(DataError, match=rf"item 0: {words}"):
            open_dataset([item])
    for image, words in (("a.png", r"a\.png: cannot be read"), (None, r"no image \(None\)"), (b"no", "corrupt")):
        with pytest.raises(DataError, match=f"item 1: .*{words}"):
            open_dataset([(picture(0), 0), (image, 0)])[1]
        skipping = open_dataset([(picture(0), 0), (image, 0)], on_error="skip")
        assert isinstance(skipping[1], Skipped)
    with pytest.raises(DataError, match="mixes paths with tuple"):
        open_dataset(["a.parquet", (picture(0), 0)])


def test_what_a_transform_refuses_is_named_by_its_row() -> None:
    def fussy(image: Any) -> torch.Tensor:
        if grey(image) == 1:
            raise DataError("too dark.")
        return torch.zeros(3, 8, 8)

    pairs = [(picture(0), 0), (picture(1), 0)]
    with pytest.raises(DataError, match=r"list, item 1: too dark\."):
        open_dataset(pairs, transform=fussy)[1]
    lenient = open_dataset(pairs, transform=fussy, on_error="skip")
    assert collate([lenient[i] for i in range(2)])[0].shape == (1, 3, 8, 8)


# -- streams ------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def test_streams_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [(easy_data(16)[i][0], int(easy_data(16)[i][1])) for i in range(16)]
    data = open_dataset(Stream(items))
    assert len(data) == 16 and data.classes == [str(i) for i in range(CLASSES)]
    models = [tiny_model() for _ in range(3)]
    reports = [
        fit(m, source, epochs=1, keep="best")
        for m, source in zip(models, (items, Stream(items), (x for x in items)), strict=True)
    ]
    assert reports[0].history[0]["loss"] == reports[1].history[0]["loss"] == reports[2].history[0]["loss"]
    monkeypatch.setattr(unwrap, "STREAM_BYTES", 1 << 12)
    with pytest.raises(DataError, match=r"Stream has no length, and its first \d items take more than"):
        open_dataset(Stream(items))
    with pytest.raises(DataError, match="has no length, and yields nothing"):
        open_dataset(x for x in ())


# -- loaders ------------------------------------------------------------------------------------------------------------


def test_data_loaders() -> None:
    """Their data set is taken; what would be lost with them is refused."""
    data = easy_data(16)
    with pytest.warns(UserWarning, match=r"batches \(of 4 there\) and their order are made here"):
        report = fit(tiny_model(), DataLoader(data, batch_size=4, shuffle=True), epochs=1)
    assert report.history[0]["loss"] == fit(tiny_model(), data, epochs=1).history[0]["loss"]
    with pytest.raises(DataError, match=r"sampler of its own \(WeightedRandomSampler\).*sampler=loader.sampler"):
        fit(tiny_model(), DataLoader(data, sampler=WeightedRandomSampler([1.0] * 16, 16)))
    with pytest.raises(DataError, match="collate function of its own"):
        fit(tiny_model(), DataLoader(data, collate_fn=lambda items: items))


# -- tensors that are not normalised --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_images_that_are_not_normalised_are_noticed(scale: float, image_folder: Path) -> None:
    """A data set of `ToTensor` images was trained on without a word."""
    data = TensorDataset(scale * torch.rand(8, 3, 8, 8), torch.arange(8) % CLASSES)
    with pytest.warns(UserWarning, match=rf"not normalised: their values are 0\.\.{'1, as' if scale == 1 else '2'}"):
        zoo.evaluate(tiny_model(), data, **QUIET)
    from torchvision.transforms import ToTensor

    folder = open_dataset(image_folder, split="train", transform=ToTensor())
    with pytest.warns(UserWarning, match="end the transform with torchvision.transforms.Normalize"):
        zoo.evaluate(zoo.load("vit-micro", pretrained=False, num_classes=2, depth=1), folder, **QUIET)


def test_normalised_images_are_fine(image_folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_model(num_classes=2)
    zoo.evaluate(model, easy_data(8, classes=2), **QUIET)
    zoo.evaluate(model, open_dataset(image_folder, split="test", transform=model.preprocess()), **QUIET)
    zoo.evaluate(model, [(torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8), 1)], **QUIET)
    assert not [w for w in recwarn if "normalised" in str(w.message)]


# -- shards -------------------------------------------------------------------------------------------------------------


def shard(file: Path, samples: list[dict[str, bytes]], start: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for i, sample in enumerate(samples, start):
            for ending, data in sample.items():
                info = tarfile.TarInfo(f"part/{i:05d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file


def test_shards(tmp_path: Path) -> None:
    for n in range(2):
        samples = [{"png": encoded(10 * n + i), "cls": str(i % 2).encode()} for i in range(3)]
        shard(tmp_path / f"train-{n:06d}.tar", samples, start=3 * n)
    shard(tmp_path / "test-000000.tar", [{"png": encoded(77), "cls": b"0"}])
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        open_dataset(tmp_path)
    for source in (str(tmp_path / "train-{000000..000001}.tar"), str(tmp_path / "train-*.tar")):
        data = open_dataset(source)
        assert (len(data), data.classes, data.name) == (6, ["0", "1"], f"{tmp_path.name}/train")
        assert [grey(data[i][0]) for i in range(6)] == [0, 1, 2, 10, 11, 12]
        assert data.labels is not None and data.labels.tolist() == [0, 1, 0, 0, 1, 0]
        assert data.where(4).endswith("train-000001.tar, sample part/00004")
    assert len(open_dataset(tmp_path, split="train")) == 6
    loader = DataLoader(open_dataset(tmp_path, split="test", transform=lambda i: torch.zeros(1)), num_workers=1)
    assert len(list(loader)) == 1
    fit(tiny_model(num_classes=2), str(tmp_path / "train-*.tar"), epochs=1)


def test_kinds_of_labels_in_shards(tmp_path: Path) -> None:
    def opened(labels: list[dict[str, bytes]], **options: Any) -> Any:
        return open_dataset(shard(tmp_path / "x.tar", [{"jpg": encoded(0), **one} for one in labels]), **options)

    words = opened([{"txt": b"dog\n"}, {"txt": b"cat"}])
    assert words.classes == ["cat", "dog"] and words.labels.tolist() == [1, 0]
    numbers = opened([{"json": json.dumps({"label": v, "age": i}).encode()} for i, v in enumerate((0.5, -1.0))])
    assert numbers.targets.tolist() == [0.5, -1.0]
    named = opened([{"json": json.dumps({"x": v, "age": 3}).encode()} for v in (0, 1)], label_column="x")
    assert named.labels.tolist() == [0, 1]
    tags = opened([{"json": json.dumps({"label": v}).encode()} for v in (["a"], ["a", "b"])])
    assert tags.targets.tolist() == [[1, 0], [1, 1]]
    with pytest.raises(DataError, match="sample part/00001: no label among its parts jpg"):
        opened([{"cls": b"0"}, {}])
    with pytest.raises(DataError, match="sample part/00000: no label in its json"):
        opened([{"json": b'{"x": 1}'}])
    with pytest.raises(DataError, match="sample part/00000: its json cannot be read"):
        opened([{"json": b"{"}])
    with pytest.raises(DataError, match="sample part/00000: the image is corrupt"):
        open_dataset(shard(tmp_path / "y.tar", [{"jpg": b"xx", "cls": b"0"}]))[0]
    (tmp_path / "z.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"z\.tar: not a readable tar file"):
        open_dataset(tmp_path / "z.tar")
    with tarfile.open(tmp_path / "e.tar", "w"):
        pass
    with pytest.raises(DataError, match="hold no sample"):
        open_dataset(tmp_path / "e.tar")


def test_what_webdataset_writes_and_reads(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "w-000000.tar")) as sink:
        for i in range(6):
            sink.write({"__key__": f"s{i}", "png": picture(i), "cls": i % 2})
    files = open_dataset(tmp_path)
    assert [(grey(files[i][0]), files[i][1]) for i in range(6)] == [(i, i % 2) for i in range(6)]
    raw = wds.WebDataset(str(tmp_path / "w-000000.tar"), shardshuffle=False)
    for stream in (raw, raw.decode("pil"), raw.decode("pil").to_tuple("png", "cls")):
        data = open_dataset(stream)
        assert [(grey(data[i][0]), data[i][1]) for i in range(6)] == [(i, i % 2) for i in range(6)]


# -- the library datasets -------------------------------------------------------------------------------------------------


def test_data_sets_of_the_library_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    given = datasets.Dataset.from_dict({"image": [picture(i) for i in range(6)], "label": [0, 1] * 3}, features=kind)
    data = open_dataset(given.select([5, 1, 0]))
    assert data.classes == ["cat", "dog"] and [(grey(data[i][0]), data[i][1]) for i in range(3)] == [
        (5, 1),
        (1, 1),
        (0, 0),
    ]
    splits = datasets.DatasetDict(train=given, test=given.select([0]))
    with pytest.raises(DataError, match="DatasetDict has the splits train, test"):
        open_dataset(splits)
    with pytest.raises(DataError, match=r"no split 'tests'.*'test'"):
        open_dataset(splits, split="tests")
    assert len(open_dataset(splits, split="test")) == 1
    fit(tiny_model(num_classes=2), given, epochs=1)
    stream = given.to_iterable_dataset()
    assert [grey(open_dataset(stream)[i][0]) for i in range(6)] == list(range(6))
    ready = given.with_transform(
        lambda rows: {"pixel_values": [torch.ones(3, 8, 8)] * len(rows["label"]), "label": rows["label"]}
    )
    assert torch.equal(open_dataset(ready)[3][0], torch.ones(3, 8, 8)) and open_dataset(ready)[3][1] == 1


def test_kinds_of_labels_of_the_library_datasets() -> None:
    datasets = pytest.importorskip("datasets")

    def opened(column: Any, feature: Any = None, **options: Any) -> Any:
        held = datasets.Dataset.from_dict({"image": [picture(i) for i in range(len(column))], "label": column})
        held = held.cast_column("image", datasets.Image())
        return open_dataset(held if feature is None else held.cast_column("label", feature), **options)

    assert opened(["b", "a"]).classes == ["a", "b"]
    assert opened([0.5, -2.0]).targets.tolist() == [0.5, -2.0]
    assert opened([[0], [0, 1]]).targets.tolist() == [[1, 0], [1, 1]]
    names = datasets.Sequence(datasets.ClassLabel(names=["x", "y", "z"]))
    assert opened([[0], [0, 2]], names).classes == ["x", "y", "z"]
    with pytest.raises(DataError, match="row 1: no label"):
        opened([0, None])
    with pytest.raises(DataError, match=r"row 1: label -1 is outside"):
        opened([0, -1])
    assert opened([0, -1], labels="numbers").targets.tolist() == [0, -1]


def test_the_hubs_image_folders(tmp_path: Path) -> None:
    """What `datasets` calls an image folder reads the same here, from its metadata."""
    datasets = pytest.importorskip("datasets")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(10 * i))
    (tmp_path / "metadata.csv").write_text("file_name,label\n2.png,a\n0.png,b\n1.png,a\n")
    ours = open_dataset(tmp_path)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "c"))
    assert sorted((grey(ours[i][0]), ours.classes[ours[i][1]]) for i in range(3)) == sorted(  # type: ignore[index]
        (grey(row["image"]), row["label"]) for row in theirs
    )


class Map(Dataset[Any]):
    classes = ["no", "yes"]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return {"image": picture(index), "label": ["yes", "no"][index % 2]}


def test_torch_data_sets_of_rows() -> None:
    data = open_dataset(Map())
    assert data.classes == ["no", "yes"] and [data[i][1] for i in range(4)] == [1, 0, 1, 0]
    assert zoo.evaluate(tiny_model(num_classes=2), Map(), **QUIET)["images"] == 4


def test_workers_have_a_bound(tmp_path: Path) -> None:
    """999 made 800 processes before the machine gave in."""
    file = write_parquet(tmp_path / "x.parquet", [0, 1])
    for count in (999, 200, -1):
        with pytest.raises(zoo.ZooError, match=f"workers is {count}"):
            zoo.evaluate(tiny_model(num_classes=2), file, workers=count, **QUIET)


# -- what else people hand over ---------------------------------------------------------------------------------------------


def test_arrays_of_items_and_labels() -> None:
    pixels = np.stack([np.full((8, 8, 3), i, np.uint8) for i in range(4)])
    data = open_dataset((pixels, np.array(["b", "a", "b", "a"])))
    assert data.classes == ["a", "b"] and [(grey(data[i][0]), data[i][1]) for i in range(2)] == [(0, 1), (1, 0)]
    tensors = open_dataset((torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])))
    assert tensors.labels is not None and tensors.labels.tolist() == [0, 1, 1, 0]


def test_tables_in_memory_and_classes_are_refused_with_a_way() -> None:
    import pyarrow as pa

    with pytest.raises(DataError, match=r"A Table of pyarrow is a table in memory.*to_pylist"):
        open_dataset(pa.table({"image": [b""], "label": [0]}))
    with pytest.raises(DataError, match="Map is a class; give a data set of it"):
        open_dataset(Map)
    for nothing in (None, 5):
        with pytest.raises(DataError, match="expected a data set of pairs"):
            open_dataset(nothing)


def test_several_label_columns_of_rows_and_shards(tmp_path: Path) -> None:
    rows = [{"image": picture(i), "sea": i % 2, "sky": 1} for i in range(3)]
    data = open_dataset(rows, label_column=["sea", "sky"])
    assert data.classes == ["sea", "sky"] and data[1][1].tolist() == [1, 1]
    samples = [{"png": encoded(i), "json": json.dumps({"x": 0.5 * i, "y": -i}).encode()} for i in range(3)]
    packed = open_dataset(shard(tmp_path / "x.tar", samples), label_column=["x", "y"])
    assert packed.targets is not None and packed.targets.tolist() == [[0, 0], [0.5, -1], [1, -2]]


class Broken(Dataset[Any]):
    """As torchvision's: a file that cannot be read is an error of PIL."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return (picture(index) if index != 1 else Image.open(io.BytesIO(b"no image"))), 0


def test_items_that_cannot_be_read_are_named_or_skipped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Broken, item 1: UnidentifiedImageError"):
        open_dataset(Broken())[1]
    assert isinstance(open_dataset(Broken(), on_error="skip")[1], Skipped)
    file = tmp_path / "half.png"
    file.write_bytes(encoded(3, size=64)[:120])
    with pytest.raises(DataError, match="item 0: the image is corrupt"):
        open_dataset([(Image.open(file), 0)])[0]


def test_image_folders_of_torchvision(image_folder: Path) -> None:
    """Their classes are in alphabetical order: 0, 1, 10, 11, 2 ...; ours in that of numbers. They are matched."""
    datasets = pytest.importorskip("torchvision.datasets")
    data = open_dataset(datasets.ImageFolder(str(image_folder / "train")))
    assert data.classes == ["blue", "red"] and data.labels is not None and data.labels.tolist() == [0] * 12 + [1] * 12
    model = tiny_model(num_classes=2)
    fit(model, datasets.ImageFolder(str(image_folder / "train")), epochs=1)
    assert model.classes == ["blue", "red"] and zoo.evaluate(model, image_folder / "test", **QUIET)["images"] == 12


def test_slices_are_data_sets() -> None:
    data = open_dataset([(picture(i), i % 2) for i in range(6)])
    part = data[1:4]
    assert isinstance(part, ImageDataset) and [label for _, label in part] == [1, 0, 1] and part.classes == data.classes
    assert [label for _, label in data[::-2]] == [1, 1, 1] and len(data[9:]) == 0
    with pytest.raises(IndexError):
        data[6]
