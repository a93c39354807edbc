"""Folders as people have them: splits, system folders, empty classes, circles of links, pipes, odd names; tables."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
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


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    put(tmp_path, "1.png", value=10)
    put(tmp_path, "2.png", value=20)
    put(tmp_path, "more/3.png", value=30)
    return tmp_path


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv", "list.tsv", "metadata.jsonl"])
@pytest.mark.parametrize("columns", [("file_name", "label"), ("image", "category"), ("Path", "species")])
def test_tables(photos: Path, name: str, columns: tuple[str, str]) -> None:
    rows = [("2.png", "dog"), ("more/3.png", "cat"), ("1.png", "dog")]
    lines = ["\t".join(columns), *("\t".join(r) for r in rows)]
    if name.endswith("jsonl"):
        lines = [json.dumps(dict(zip(columns, r, strict=True))) for r in rows]
    text = "\n".join(lines)
    (photos / name).write_text(text.replace("\t", ",") if name.endswith("csv") else text)
    for source in (photos, photos / name):
        data = open_dataset(source)
        assert data.classes == ["cat", "dog"] and data.labels is not None and data.labels.tolist() == [1, 0, 1]
        assert [int(np.asarray(data[i][0])[0, 0, 0]) for i in range(3)] == [20, 30, 10]
    fit(tiny_model(num_classes=2), photos, epochs=1)


def test_kinds_of_labels_in_tables(photos: Path) -> None:
    def table(text: str, **options: object) -> zoo.data.ImageDataset:
        (photos / "labels.csv").write_text(text)
        return open_dataset(photos, **options)  # type: ignore[arg-type]

    assert table("file,label\n1.png,2\n2.png,0").classes == ["0", "1", "2"]
    data = table("id,age\n1,-3.5\n2,4\n3,1")  # names without ending, one of them in a folder
    assert data.targets.tolist() == [-3.5, 4, 1] and data.classes is None  # type: ignore[union-attr]
    data = table("file,tags\n1.png,sky;sea\n2.png,sea", labels="tags")
    assert data.classes == ["sea", "sky"] and data.targets.tolist() == [[1, 1], [1, 0]]  # type: ignore[union-attr]
    data = table("file,tags\n1.png,\"['sky', 'sea']\"\n2.png,\"['sea']\"")
    assert data.classes == ["sea", "sky"] and data.targets.tolist() == [[1, 1], [1, 0]]  # type: ignore[union-attr]
    assert table("file,label\n1.png,1_0\n2.png,2").classes == ["1_0", "2"]
    data = table("file,sea,sky\n1.png,1,1\n2.png,1,0", label_column=["sea", "sky"])
    assert data.classes == ["sea", "sky"] and data[1][1].tolist() == [1, 0]
    data = table("file,label\n1.png,-1\n2.png,4", labels="numbers")
    assert data.targets.tolist() == [-1, 4]  # type: ignore[union-attr]
    assert table("file,label\n1.png,07\n2.png,1", classes=["1", "07"]).labels.tolist() == [1, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\n1.png,\n2.png,b", r"labels.csv, line 2: no label"),
        ("file,label\n,a", r"line 2: no file in column 'file'"),
        ("file,label\n9.png,a\n1.png,b", r"1 of 2 files are missing: 9.png \(line 2\)"),
        ("file,u,v\n1.png,1,2", r"name one of its columns with label_column=...; columns: file, u, v"),
        ("a,b\n1.png,1", r"name one of its columns with image_column="),
        ("file,label\n1.png,a,b", r"line 2: more cells than the 2 columns"),
        ("file,label", "the table is empty"),
        ("file,caption\n1.png,a cat\n2.png,a dog", r"name one of its columns with label_column="),
    ],
)
def test_bad_tables(photos: Path, text: str, words: str) -> None:
    (photos / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        open_dataset(photos)


def test_tables_and_splits(photos: Path) -> None:
    for split, label in (("train", "a"), ("test", "b")):
        put(photos / "hub", f"{split}/1.png")
        (photos / "hub" / split / "metadata.csv").write_text(f"file_name,label\n1.png,{label}\n")
    with pytest.raises(DataError, match="has the splits test, train"):
        open_dataset(photos / "hub")
    assert open_dataset(photos / "hub", split="test").classes == ["b"]
    (photos / "train.csv").write_text("file,label\n1.png,a")
    (photos / "test.csv").write_text("file,label\n2.png,b")
    with pytest.raises(DataError, match=r"several tables \(test, train\)"):
        open_dataset(_flat(photos))
    assert open_dataset(_flat(photos), split="test").classes == ["b"]
    one = photos / "one"
    put(one, "train/1.png", "test/2.png")
    (one / "labels.csv").write_text("file,label\ntrain/1.png,a\ntest/2.png,b\n")
    assert open_dataset(one, split="train", classes=["a", "b"]).labels.tolist() == [0]  # type: ignore[union-attr]
    assert len(open_dataset(one, split="test")) == 1


def _flat(photos: Path) -> Path:
    folder = photos / "flat"
    put(folder, "1.png", "2.png")
    for name in ("train.csv", "test.csv"):
        shutil.copy(photos / name, folder / name)
    return folder


def test_images_beside_class_folders_are_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "preview.png")
    with pytest.warns(UserWarning, match=r"1 images beside the class folders are left out, preview\.png first"):
        assert len(open_dataset(tmp_path)) == 2


def test_a_table_beside_class_folders(tmp_path: Path) -> None:
    """One of labels is meant; one of captions, or of anything else, leaves the folders the classes."""
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "results.csv").write_text("file,label\na/1.png,x\nb/2.png,y")
    assert open_dataset(tmp_path).classes == ["a", "b"]
    (tmp_path / "metadata.csv").write_text("file_name,text\na/1.png,x\nb/2.png,y")
    assert open_dataset(tmp_path).classes == ["a", "b"]
    (tmp_path / "metadata.csv").write_text("file_name,label\na/1.png,x\nb/2.png,y")
    assert open_dataset(tmp_path).classes == ["x", "y"]


# -- what tables are like elsewhere -----------------------------------------------------------------------------------------


def test_tables_of_other_programs(photos: Path) -> None:
    """Semicolons of Excel, paths of Windows, marks of byte order."""
    text = "\ufefffile;label\n1.png;a\nmore\\3.png;b\n"
    (photos / "labels.csv").write_text(text, encoding="utf-8")
    data = open_dataset(photos)
    assert data.classes == ["a", "b"] and data.where(1).endswith("more/3.png")


def test_a_column_of_splits(photos: Path) -> None:
    """All rows would be taken, those of the test too."""
    (photos / "labels.csv").write_text("file,split,label\n1.png,train,a\n2.png,train,b\n3.png,test,a\n")
    for source in (photos, photos / "labels.csv"):
        with pytest.raises(DataError, match=r"has the splits test, train \(column 'split'\); choose one"):
            open_dataset(source)
        assert [len(open_dataset(source, split=split)) for split in ("train", "test")] == [2, 1]
        with pytest.raises(DataError, match=r"no split 'tran'.*'train'"):
            open_dataset(source, split="tran")
    (photos / "labels.csv").write_text("file,label\n1.png,a\n2.png,b\n")
    with pytest.raises(DataError, match=r"no split 'test'\. It has no column 'split'"):
        open_dataset(photos / "labels.csv", split="test")


def test_one_file_in_several_rows(photos: Path) -> None:
    """Its tags; as classes the rows contradict each other."""
    (photos / "labels.csv").write_text("file,label\n1.png,sea\n2.png,sea\n1.png,sky\n")
    data = open_dataset(photos, labels="tags")
    assert len(data) == 2 and data.targets.tolist() == [[1, 1], [1, 0]]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"line 4: 1\.png has the label 'sky', and 'sea' in line 2.*task='multilabel'"):
        open_dataset(photos)


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


@pytest.mark.parametrize("text", ["nan", "NaN", "NA", "None", "N/A", "null"])
def test_cells_that_say_that_nothing_is_known(photos: Path, text: str) -> None:
    """They became classes."""
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))[:2]
    (photos / "labels.csv").write_text(f"file,label\n{files[0]},cat\n{files[1]},{text}\n")
    with pytest.raises(DataError, match=rf"line 3: no label \('{text}'\)"):
        open_dataset(photos)
    assert open_dataset(photos, classes=["cat", text]).labels.tolist() == [0, 1]  # type: ignore[union-attr]


def test_numbers_and_truths_of_text_tables(photos: Path) -> None:
    """Labels 1, 2 made three classes unsaid, 01 and 1 one; True and False were texts of CSV, and numbers of JSONL."""
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))[:2]

    def labelled(first: str, second: str) -> Path:
        (photos / "labels.csv").write_text(f"file,label\n{files[0]},{first}\n{files[1]},{second}\n")
        return photos

    with pytest.warns(UserWarning, match="make 3 classes, and no item has 0"):
        assert open_dataset(labelled("1", "2")).classes == ["0", "1", "2"]
    assert open_dataset(labelled("1", "2"), classes=["1", "2"]).labels.tolist() == [0, 1]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="'01' and '1' are one number"):
        open_dataset(labelled("01", "1"))
    assert open_dataset(labelled("01", "02")).classes == ["01", "02"]
    data = open_dataset(labelled("True", "False"))
    assert data.classes == ["0", "1"] and data.labels.tolist() == [1, 0]  # type: ignore[union-attr]
    (photos / "labels.csv").unlink()
    rows = [{"file": files[0], "label": True}, {"file": files[1], "label": False}]
    (photos / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = open_dataset(photos)
    assert other.classes == data.classes and other.labels.tolist() == [1, 0]  # type: ignore[union-attr]


def test_class_folders_have_no_columns(tmp_path: Path) -> None:
    """A column that is not there was ignored without a word."""
    put(tmp_path, "a/1.png", value=1)
    with pytest.raises(DataError, match=r"label_column='zz' names a column, and .* has class folders"):
        open_dataset(tmp_path, label_column="zz")
