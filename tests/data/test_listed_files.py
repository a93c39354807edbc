"""Tables of files and labels as people and programs write them: columns, kinds of labels, splits, empty cells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_data import encoded
from train_parts import fit, tiny_model

import zoo
from zoo.data import open_dataset
from zoo.errors import DataError


def put(folder: Path, *names: str, value: int = 0) -> None:
    """Images of one grey value."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(value))


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


def test_a_table_beside_class_folders(tmp_path: Path) -> None:
    """One of labels is meant; one of captions, or of anything else, leaves the folders the classes."""
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "results.csv").write_text("file,label\na/1.png,x\nb/2.png,y")
    assert open_dataset(tmp_path).classes == ["a", "b"]
    (tmp_path / "metadata.csv").write_text("file_name,text\na/1.png,x\nb/2.png,y")
    assert open_dataset(tmp_path).classes == ["a", "b"]
    (tmp_path / "metadata.csv").write_text("file_name,label\na/1.png,x\nb/2.png,y")
    assert open_dataset(tmp_path).classes == ["x", "y"]


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
