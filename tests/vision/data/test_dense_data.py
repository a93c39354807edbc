"""Images with maps: every source, one geometry for both, and what is wrong with them said by its place."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dense_data import dense_model, encoded, folder, pairs
from PIL import Image
from typer.testing import CliRunner

import zoo
from vision.data.dense import IGNORE, open_dense
from vision.data.dense_transform import DenseTransform
from vision.data.masks import boundary_distance, class_edges
from vision.tasks.dense_prediction import predict_maps
from zoo.cli import app
from zoo.data import Skipped
from zoo.errors import ConfigError, DataError

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def parquet(place: Path, count: int = 4, rows: list[Any] | None = None) -> Path:
    rows = pairs(count) if rows is None else rows
    table = {"image": [encoded(i) for i, _ in rows], "mask": [encoded(m) for _, m in rows]}
    pq.write_table(pa.table({**table, "name": [str(i) for i in range(len(rows))]}), place)
    return place


def test_sources_give_the_same(tmp_path: Path) -> None:
    plain = pairs(6)
    there = folder(tmp_path / "street")
    listed = open_dense(plain, classes=["dark", "bright"])
    rows = open_dense([{"image": encoded(i), "mask": np.asarray(m)} for i, m in plain], classes=["dark", "bright"])
    stored = open_dense(parquet(tmp_path / "all.parquet", 6), classes=["dark", "bright"])
    files = open_dense(there)
    assert files.classes == ["dark", "bright"] and files.name == "street" and len(files) == 6
    for i in (0, 5):
        image, mask = listed[i]
        assert mask.shape == (24, 32) and mask.unique().tolist() == [0, 1, IGNORE]
        for other in (rows, stored):
            assert torch.equal(other[i][1], mask) and other[i][0].tobytes() == image.tobytes()
        assert torch.equal(files[i][1], mask)
    assert open_dense(plain).classes == ["0", "1"]


def test_splits_and_names_of_folders(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        folder(tmp_path / "a" / split, count)
        for kind in ("images", "annotations"):
            (tmp_path / "b" / kind / split).mkdir(parents=True)
        for i, (image, mask) in enumerate(pairs(count)):
            image.save(tmp_path / "b" / "images" / split / f"{i}.png")
            mask.save(tmp_path / "b" / "annotations" / split / f"{i}.png")
    for place in ("a", "b"):
        assert len(open_dense(tmp_path / place, split="val")) == 2
        with pytest.raises(DataError, match="splits train, val"):
            open_dense(tmp_path / place)
        with pytest.raises(DataError, match="no split 'vall'"):
            open_dense(tmp_path / place, split="vall")


def test_what_is_wrong_is_told_with_its_place(tmp_path: Path) -> None:
    there = folder(tmp_path / "street")
    Image.fromarray(np.zeros((12, 16), dtype=np.uint8)).save(there / "masks" / "03.png")
    data = open_dense(there)
    with pytest.raises(DataError, match=r"03.jpg: the map is 12 x 16 pixels .* its image 24 x 32"):
        data[3]
    with pytest.raises(DataError, match=r"^There is no file or folder 'nope' here"):
        open_dense("nope")
    with pytest.raises(DataError, match=r"03\.jpg"):
        zoo.fit(dense_model(), data, task="segment", epochs=1, progress=False)
    going_on = open_dense(there, on_error="skip")
    model = dense_model()
    zoo.fit(model, going_on, task="segment", epochs=1, progress=False)
    assert zoo.evaluate(model, going_on, task="segment", progress=False)["skipped"] == 1
    (there / "masks" / "03.png").unlink()
    with pytest.raises(DataError, match=r"03.jpg: has no map of its name"):
        open_dense(there)

    wrong = [(image, np.asarray(mask) * 0 + 7) for image, mask in pairs(2)]
    with pytest.raises(DataError, match=r"768 pixels of the map hold 7, which is outside the 2 classes .*ignore=7"):
        open_dense(wrong, classes=["a", "b"])[0]
    assert open_dense(wrong, classes=["a", "b"], ignore=7)[0][1].unique().tolist() == [IGNORE]
    colours = [(image, image) for image, _ in pairs(2)]
    with pytest.raises(DataError, match="Colours that stand for classes"):
        open_dense(colours, classes=["a", "b"])[0]
    with pytest.raises(DataError, match="an edge map holds 0, 1, 255"):
        open_dense(pairs(1), "edges")[0]
    with pytest.raises(DataError, match="corrupt"):
        open_dense([{"image": encoded(pairs(1)[0][0]), "mask": b"nonsense"}], classes=["a", "b"])[0]
    with pytest.raises(DataError, match="mask_column"):
        open_dense([{"image": encoded(pairs(1)[0][0]), "wood": 1}], classes=["a", "b"])
    for source in ([], tmp_path / "nowhere"):
        with pytest.raises(DataError):
            open_dense(source)
    with pytest.raises(ConfigError, match="'segment'"):
        open_dense(pairs(2), "segmentation")
    with pytest.raises(DataError, match="The data are an empty list"):
        open_dense([])
    for options in ({"classes": ["a"]}, {}):
        with pytest.raises(DataError, match=r"there is one class, .* nothing to tell apart"):
            open_dense([(image, np.zeros((24, 32), dtype=np.uint8)) for image, _ in pairs(2)], **options)
    with pytest.raises(DataError, match="no class is left"):
        open_dense([(image, np.full((24, 32), IGNORE, dtype=np.uint8)) for image, _ in pairs(2)])
    with pytest.raises(ConfigError, match="makes maps of the kind 'edges'"):
        open_dense(pairs(2), "depth", derive="edges")
    with pytest.raises(DataError, match="between others"):
        open_dense(pairs(2), classes=["a", "b", "c"], ignore=1)


def test_maps_that_cannot_be_read_are_left_out_if_asked(tmp_path: Path) -> None:
    there = folder(tmp_path / "street")
    (there / "masks" / "00.png").unlink()
    (there / "masks" / "01.png").write_bytes(b"nonsense")
    (there / "images" / "02.jpg").write_bytes(b"nonsense")
    named = open_dense(there, on_error="skip")
    (there / "classes.json").unlink()
    with pytest.raises(DataError, match=r"00\.jpg: has no map of its name"):
        open_dense(there)
    counted = open_dense(there, on_error="skip")
    assert named.classes == ["dark", "bright"] and counted.classes == ["0", "1"] and len(counted) == 6
    assert [isinstance(item, Skipped) for item in counted] == [True] * 3 + [False] * 3
    assert "no map of its name" in counted[0].reason and "corrupt" in counted[1].reason
    model = dense_model()
    options: dict[str, Any] = {"task": "segment", "epochs": 1, "progress": False, "class_weights": "balanced"}
    zoo.fit(model, counted, named, **options)
    found = zoo.evaluate(model, counted, task="segment", progress=False)
    assert found["skipped"] == 3 and found["images"] == 3 and 0 <= found["miou"] <= 1
    with pytest.raises(ConfigError, match=r"confusion matrix is one of a classifier.*'segment'.*per_class"):
        zoo.evaluate(model, counted, task="segment", confusion=True, progress=False)
    rows = [{"image": encoded(i), "mask": encoded(m)} for i, m in pairs(3)]
    rows[1]["mask"] = b""
    assert open_dense(rows, on_error="skip").classes == ["0", "1"]
    with pytest.raises(DataError, match="item 1: the map is empty"):
        open_dense(rows)
    for file in (there / "masks").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="has no map of its name"):
        open_dense(there, on_error="skip")


def test_the_last_class_may_be_none(tmp_path: Path) -> None:
    there = folder(tmp_path / "street")
    for file in (there / "masks").iterdir():
        mask = np.array(Image.open(file))
        mask[mask == 255] = 2
        Image.fromarray(mask).save(file)
    (there / "classes.json").write_text(json.dumps(["dark", "bright", "Unlabelled"]))
    data = open_dense(there)
    assert data.classes == ["dark", "bright"] and data[0][1].unique().tolist() == [0, 1, IGNORE]
    assert torch.equal(open_dense(there, classes=["dark", "bright"])[0][1], data[0][1])
    kept = open_dense(there, ignore=())
    assert kept.classes == ["dark", "bright", "Unlabelled"] and kept[0][1].unique().tolist() == [0, 1, 2]


def test_numbers_and_directions() -> None:
    image = pairs(1)[0][0]
    deep = np.linspace(0, 60000, 24 * 32).reshape(24, 32).astype(np.uint16)
    stream = io.BytesIO()
    np.save(stream, deep.astype(np.float32) / 1000)
    found = open_dense([(image, deep), (image, stream.getvalue())], "depth", ignore=0)
    assert found[0][1].isnan().sum() == 1 and float(found[0][1].nan_to_num().max()) == 60000
    torch.testing.assert_close(found[1][1] * 1000, found[0][1], equal_nan=True)
    up = np.full((24, 32, 3), (127, 127, 255), dtype=np.uint8)
    up[0] = 127
    normals = open_dense([(image, up)], "normals")[0][1]
    assert normals[0].isnan().all() and torch.allclose(normals[1:].norm(dim=-1), torch.tensor(1.0), atol=0.01)


def test_one_geometry_for_both() -> None:
    """An image that says at each pixel which class it is stays in step with its map, whatever is cut and mirrored."""
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:30, 20:50] = 1
    image = Image.fromarray(np.stack([mask * 255] * 3, -1))
    value = torch.from_numpy(mask.astype(np.int64))
    transform = DenseTransform(CONFIG, "segment", True)
    torch.manual_seed(0)
    for _ in range(12):
        pixels, found = transform(image, value)
        assert pixels.shape == (3, 16, 16) and found.shape == (16, 16) and found.dtype == torch.int64
        assert ((pixels[0] > 0).long() == found).float().mean() > 0.93
    still, seen = DenseTransform(CONFIG, "segment", False)(image, value)
    assert ((still[0] > 0).long() == seen).float().mean() > 0.93
    normals = torch.zeros(40, 60, 3)
    normals[..., 0] = 1.0
    signs = {float(DenseTransform(CONFIG, "normals", True)(image, normals)[1][0, 0, 0]) for _ in range(16)}
    assert signs == {-1.0, 1.0}
    thin = torch.zeros(40, 60, dtype=torch.int64)
    thin[:, 31] = 1
    assert (DenseTransform(CONFIG, "edges", False)(image, thin)[1].sum(1) > 0).all()  # no edge is lost between pixels


def test_what_is_derived_of_classes() -> None:
    classes = torch.zeros(5, 7, dtype=torch.int64)
    classes[:, 3:] = 1
    classes[0] = IGNORE
    edges = class_edges(classes, IGNORE)
    assert edges[1:].tolist() == [[0, 0, 1, 1, 0, 0, 0]] * 4 and edges[0].sum() == 0
    far = boundary_distance(classes, IGNORE, most=4)
    assert far[2].tolist() == [0.5, 0.25, 0.0, 0.0, 0.25, 0.5, 0.75]


def test_maps_at_the_size_of_images(tmp_path: Path) -> None:
    there = folder(tmp_path / "street", 8)
    model = dense_model()
    zoo.fit(model, there, task="segment", epochs=6, progress=False, batch_size=4, lr=1e-2)
    image, mask = pairs(1, 3, size=(30, 50))[0]
    image.save(tmp_path / "new.png")
    (found,) = predict_maps(model, [tmp_path / "new.png"])
    truth = np.asarray(mask)
    assert found.shape == (30, 50) and (found == truth)[truth != 255].mean() > 0.85
    for kind in ("edges", "depth", "normals"):
        with pytest.raises(ConfigError, match=f"trained for 'segment', and maps of the kind '{kind}'"):
            predict_maps(model, [image], kind)
    with pytest.raises(ConfigError, match=r"'depth' has 1 values .* head 2 outputs"):
        predict_maps(dense_model(), [image], "depth")
    with pytest.raises(ConfigError, match="several classes"):
        predict_maps(dense_model(outputs=1), [image])
    assert predict_maps(dense_model(outputs=1), [image], "edges")[0].dtype == np.float32
    with pytest.raises(ConfigError, match="predict_maps"):
        zoo.predict(model, there / "images")
    with pytest.raises(ConfigError, match="head='dense'"):
        predict_maps(zoo.load("vit-micro", num_classes=2), [image])


def test_on_the_command_line(tmp_path: Path) -> None:
    there = folder(tmp_path / "street", 6)
    line = [
        "fit",
        "swin-micro",
        "lora",
        "--data",
        str(there),
        "--val",
        str(there),
        "--task",
        "segment",
        "--no-pretrained",
    ]
    result = CliRunner().invoke(app, [*line, "--epochs", "1", "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert "val_miou" in json.loads(result.stdout[result.stdout.index("{") :])["metrics"]
    measured = [
        "eval",
        str(tmp_path / "out"),
        "--data",
        str(there),
        "--task",
        "segment",
        "--no-pretrained",
        "--per-class",
    ]
    result = CliRunner().invoke(app, [*measured, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert set(found["per_class"]) == {"dark", "bright"} and 0 <= found["miou"] <= 1
    result = CliRunner().invoke(app, [*line, "--shots", "2", "--out", str(tmp_path / "other")])
    assert result.exit_code == 1 and "--shots is of items with labels" in " ".join(result.output.split())
