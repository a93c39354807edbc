"""Folders as people have them: splits, system folders, empty classes, circles of links, pipes, odd names; tables."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
from image_data import encoded, write_parquet
from train_parts import fit, tiny_model

import zoo
from zoo.data import Skipped, open_dataset
from zoo.errors import DataError


def put(folder: Path, *names: str, value: int = 0) -> None:
    """Images of one grey value."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(value))


# -- classes ------------------------------------------------------------------------------------------------------------


def test_classes_that_are_numbers(tmp_path: Path) -> None:
    """Folders 0 ... 11 came as 0 1 10 11 2 ..., and data that label them with numbers were measured wrongly."""
    for i in range(12):
        put(tmp_path / "f", f"{i}/a.png", f"{i}/b.png", value=20 * i)
    write_parquet(tmp_path / "p.parquet", list(range(12)), [encoded(20 * i) for i in range(12)])
    write_parquet(tmp_path / "words.parquet", [str(i) for i in range(12)], [encoded(20 * i) for i in range(12)])
    data = open_dataset(tmp_path / "f")
    assert data.classes == [str(i) for i in range(12)]
    assert open_dataset(tmp_path / "words.parquet").classes == data.classes
    model = tiny_model(num_classes=12)
    fit(model, data, epochs=1)
    accuracy = [
        zoo.evaluate(model, source, progress=False)["accuracy"]
        for source in (tmp_path / "f", tmp_path / "p.parquet", tmp_path / "words.parquet")
    ]
    assert accuracy[0] == accuracy[1] == accuracy[2]


def test_empty_and_hidden_folders(tmp_path: Path) -> None:
    """An empty folder became a class, and copies in hidden ones were read."""
    put(tmp_path, "a/1.png", "b/2.png", "a/.ipynb_checkpoints/1-checkpoint.png", "a/__MACOSX/._1.png", "b/@eaDir/2.png")
    put(tmp_path, ".git/x/3.png", "__MACOSX/a/1.png", "$RECYCLE.BIN/4.png", "__pycache__/5.png", "a/._1.png")
    data = open_dataset(tmp_path)
    assert data.classes == ["a", "b"] and [Path(data.where(i)).name for i in range(len(data))] == ["1.png", "2.png"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"no image in the class folder c .*classes=\[\.\.\.\]"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, classes=["a", "b", "c"]).classes == ["a", "b", "c"]


@pytest.mark.parametrize("beside", ["__MACOSX/train/a", ".cache/a", "notes", "extra/a", "System Volume Information"])
def test_a_root_with_splits(tmp_path: Path, beside: str) -> None:
    """With __MACOSX beside them the splits became classes, and the test split was trained on."""
    put(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "val", "test") for name in ("a", "b")))
    (tmp_path / beside).mkdir(parents=True)
    put(tmp_path, *([f"{beside}/1.png"] if "a" in beside.split("/") else []))
    with pytest.raises(DataError, match="has the splits test, train, val; choose one"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, split="train").classes == ["a", "b"]


def test_one_split_alone_and_what_could_be_either(tmp_path: Path) -> None:
    put(tmp_path / "x", "train/a/1.png", "train/b/1.png", "docs/read.me/2.txt")
    assert open_dataset(tmp_path / "x").classes == ["a", "b"]
    put(tmp_path / "vehicles", "train/1.png", "car/1.png")  # a train is a vehicle
    assert open_dataset(tmp_path / "vehicles").classes == ["car", "train"]
    put(tmp_path / "y", "train/a/1.png", "car/1.png")
    with pytest.raises(DataError, match="'train' looks like a split, and beside it car hold images"):
        open_dataset(tmp_path / "y")
    assert open_dataset(tmp_path / "y", classes=["car", "train"]).classes == ["car", "train"]
    put(tmp_path / "flat", "train/a/1.png", "train/b/1.png", "test/1.png")
    with pytest.raises(DataError, match="has the splits test, train"):
        open_dataset(tmp_path / "flat")
    put(tmp_path / "turned", "a/train/1.png", "a/test/1.png", "b/train/1.png")
    with pytest.raises(DataError, match="holds the splits test, train within one class"):
        open_dataset(tmp_path / "turned")


# -- files --------------------------------------------------------------------------------------------------------------


def test_links_in_circles(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"a/again: leads back to a folder above itself"):
        open_dataset(tmp_path)
    (tmp_path / "a" / "again").unlink()
    (tmp_path / "a" / "others").symlink_to(tmp_path / "b")
    assert len(open_dataset(tmp_path)) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_among_the_images(tmp_path: Path) -> None:
    """Reading a pipe waits for ever."""
    put(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    (tmp_path / "b" / "2.png").symlink_to("/dev/zero")
    data = open_dataset(tmp_path)
    for index in (1, 3):
        with pytest.raises(DataError, match=r"2\.png: is a pipe, socket or device, no file"):
            data[index]
    skipping = open_dataset(tmp_path, on_error="skip")
    assert [isinstance(skipping[i], Skipped) for i in range(4)] == [False, True, False, True]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/1.png")
    try:
        shutil.copy(tmp_path / "a/1.png", os.fsencode(tmp_path / "a") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    data = open_dataset(tmp_path)
    assert data[1][1] == 0 and data.where(1).endswith("a/\\xff.png")
    assert data.where(1).encode()
    (tmp_path / "a" / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    report = fit(tiny_model(num_classes=2), open_dataset(tmp_path, on_error="skip"), epochs=1, out=tmp_path / "out")
    assert report.skipped[0].endswith("a/\\xfe.png") and (tmp_path / "out" / "report.json").read_bytes()
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(DataError, match=r"\\xff: the folder's name is no UTF-8"):
        open_dataset(tmp_path)


# -- tables -------------------------------------------------------------------------------------------------------------


def test_images_beside_class_folders_are_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "preview.png")
    with pytest.warns(UserWarning, match=r"1 images beside the class folders are left out, preview\.png first"):
        assert len(open_dataset(tmp_path)) == 2


# -- what tables are like elsewhere -----------------------------------------------------------------------------------------


def test_a_split_that_cannot_be_chosen(tmp_path: Path) -> None:
    """It was ignored."""
    file = write_parquet(tmp_path / "x.parquet", [0, 1])
    with pytest.raises(DataError, match="no Parquet file of the split 'test'"):
        open_dataset(file, split="test")
    assert len(open_dataset(write_parquet(tmp_path / "test-0.parquet", [0]), split="test")) == 1
    with pytest.raises(DataError, match="a list is one data set"):
        open_dataset([(encoded(0), 0)], split="test")


def test_what_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"x\.zip: no Parquet file, no shard .* Unpack an archive"):
        open_dataset(tmp_path / "x.zip")
    with pytest.raises(DataError, match="home directory"):
        open_dataset("~nobody-of-this-name/data")
    with pytest.raises(DataError, match="File name too long"):
        open_dataset("/" + "a" * 5000)
    for name in ("", "  "):
        with pytest.raises(DataError, match="name of the data set is empty"):
            open_dataset(name)


def test_validation_data_that_lack_a_class(tmp_path: Path) -> None:
    """Labels follow their names."""
    put(tmp_path, *(f"train/{name}/{i}.png" for name in "abc" for i in range(2)))
    put(tmp_path, "val/a/1.png", "val/c/1.png", value=200)
    model = tiny_model(num_classes=3)
    fit(model, tmp_path / "train", tmp_path / "val", epochs=1)
    found = zoo.evaluate(model, tmp_path / "val", per_class=True, progress=False)
    assert found["images"] == 2 and list(found["per_class"]) == ["a", "b", "c"] and found["per_class"]["b"] is None
    put(tmp_path, "val/d/1.png")
    with pytest.raises(zoo.ZooError, match="Class 1 is 'b' for the model, 'c' in the data set"):
        zoo.evaluate(model, tmp_path / "val", progress=False)


@pytest.mark.parametrize(
    "names",
    [
        *(("seg_train", "seg_test"), ("training_set", "test_set"), ("train_set", "val_set"), ("train2017", "val2017")),
        *(("train_images", "test_images"), ("x_train", "x_test"), ("train-clean", "test-clean"), ("fold0", "fold1")),
        *(("trainset", "testset"), ("imagesTrain", "imagesTest"), ("fold_1", "fold_2", "fold_3"), ("my_train", "val2")),
    ],
)
def test_splits_by_words_in_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    """They were trained on as classes: "seg_train" against "seg_test"."""
    for name in names:
        for i, cls in enumerate(("cat", "dog")):
            (tmp_path / name / cls).mkdir(parents=True)
            (tmp_path / name / cls / "0.png").write_bytes(encoded(i))
    with pytest.raises(DataError, match=rf"{names[0]}.*look like splits.*split='.*classes=\[\.\.\.\]"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, split=names[-1]).classes == ["cat", "dog"]
    assert open_dataset(tmp_path, classes=sorted(names)).classes == sorted(names)


def test_names_with_words_of_splits_that_are_classes(tmp_path: Path) -> None:
    """Trains beside test tubes are things; a split that holds a folder of its own name is one split."""
    for name in ("train_station", "test_tube", "seg"):
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "0.png").write_bytes(encoded(0))
    assert len(open_dataset(tmp_path / "a").classes or ()) == 3
    shutil.rmtree(tmp_path / "a" / "seg")
    assert open_dataset(tmp_path / "a").classes == ["test_tube", "train_station"]
    for name in ("seg_train", "seg_test"):
        for cls in ("sea", "sky"):
            (tmp_path / "b" / name / name / cls).mkdir(parents=True)
            (tmp_path / "b" / name / name / cls / "0.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match="look like splits"):
        open_dataset(tmp_path / "b")
    assert open_dataset(tmp_path / "b", split="seg_test").classes == ["sea", "sky"]
    assert open_dataset(tmp_path / "b/seg_train").classes == ["sea", "sky"]


def test_a_class_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    """With on_error="skip" it was left with nothing, without a word."""
    for name, data in (("a", encoded(0)), ("b", b"broken"), ("c", encoded(1))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(data)
    with pytest.warns(UserWarning, match="no images are left of the class b: none there can be read"):
        open_dataset(tmp_path, on_error="skip")
    (tmp_path / "b" / "1.png").write_bytes(encoded(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(tmp_path, on_error="skip")


def test_class_folders_have_no_columns(tmp_path: Path) -> None:
    """A column that is not there was ignored without a word."""
    put(tmp_path, "a/1.png", value=1)
    with pytest.raises(DataError, match=r"label_column='zz' names a column, and .* has class folders"):
        open_dataset(tmp_path, label_column="zz")
    with pytest.raises(DataError, match=r"image_column='zz' names a column, and .* has class folders"):
        open_dataset(tmp_path, image_column="zz")
    for labels in ("tags", "numbers"):
        with pytest.raises(DataError, match=rf"labels='{labels}', and .* has class folders, which say one class"):
            open_dataset(tmp_path, labels=labels)
    data = open_dataset(tmp_path, labels="classes")
    with pytest.raises(DataError, match=r"is open already; label_column='zz' says how to open it"):
        open_dataset(data, label_column="zz")
