"""Images with captions, and questions, out of rows, shards, the library datasets, streams; captions beyond the context."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from image_data import encoded
from PIL import Image
from typer.testing import CliRunner

import zoo
from multimodal.data.pairs import open_pairs
from multimodal.data.questions import open_questions
from zoo.cli import app
from zoo.errors import ConfigError, DataError

pytest.importorskip("open_clip")


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, 0, 0))


def shard(file: Path, captions: list[str], ending: str = "txt") -> Path:
    with tarfile.open(file, "w") as tar:
        for i, text in enumerate(captions):
            for name, data in ((f"{i}.png", encoded(i)), (f"{i}.{ending}", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file


def captions(source: Any, **options: Any) -> list[tuple[str, ...]]:
    data = open_pairs(source, **options)
    return [data[i][0].captions for i in range(2)]


def test_every_form_gives_the_same_pairs(tmp_path: Path) -> None:
    expected = [("a cat",), ("a dog",)]
    rows = [{"image": picture(i), "caption": text} for i, (text,) in enumerate(expected)]
    assert captions(rows) == captions(iter(rows)) == captions([(r["image"], r["caption"]) for r in rows]) == expected
    assert (
        captions([{"x": r["image"], "y": r["caption"]} for r in rows], image_column="x", caption_column="y") == expected
    )
    assert captions(shard(tmp_path / "x.tar", ["a cat", "a dog"])) == expected
    json = shard(tmp_path / "y.tar", ['{"caption": "a cat", "n": 1}', '{"caption": "a dog", "n": 2}'], "json")
    assert captions(str(json)) == expected
    assert captions({"train": rows}) == expected
    with pytest.raises(DataError, match="item 1: the caption is ''"):
        captions([rows[0], {"image": picture(0), "caption": ""}])


def test_the_library_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "text": ["a cat", "a dog"], "label": [0, 1]})
    assert captions(held.cast_column("image", datasets.Image())) == [("a cat",), ("a dog",)]
    many = datasets.Dataset.from_dict({"image": [picture(0)] * 2, "captions": [["a", "b"], ["c"]]})
    splits = datasets.DatasetDict(train=many.cast_column("image", datasets.Image()))
    assert captions(splits) == captions(splits, split="train") == [("a", "b"), ("c",)]
    asked = datasets.Dataset.from_dict(
        {"image": [picture(0)] * 2, "question": ["what?"] * 2, "answers": [["x"], ["y", "z"]]}
    )
    found = open_questions(asked)[1][0]
    assert (found.text, found.answers) == ("what?", ("y", "z"))


def test_questions_by_name() -> None:
    rows = [{"image": picture(0), "question": "what?", "answer": "red", "image_id": 7}]
    found = open_questions(rows)[0][0]
    assert (found.text, found.answers, found.key) == ("what?", ("red",), 7)
    with pytest.raises(DataError, match="item 0: the answer is ''"):
        open_questions([{**rows[0], "answer": ""}])[0]
    with pytest.raises(DataError, match="item 0: the question is 3"):
        open_questions([{**rows[0], "question": 3}])[0]
    assert open_questions([(picture(0), "a caption")])[0][0].answers == ("a caption",)


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """10 came before 9, and hidden copies between them."""
    from multimodal.data.clips import ClipRows, embed_texts

    folder = tmp_path / "clips"
    (folder / "a").mkdir(parents=True)
    for i in range(12):
        (folder / "a" / f"{i}.png").write_bytes(encoded(20 * i))
    (folder / "a" / "._0.png").write_bytes(encoded(255))
    (folder / "__MACOSX").mkdir()
    (folder / "a.txt").write_text("grey")
    embed_texts(folder, lambda text: torch.zeros(2, 4))
    rows = ClipRows(folder)
    assert len(rows) == 1
    assert [frame.getpixel((0, 0))[0] for frame in rows.read(0)[0]] == [20 * i for i in range(12)]


# -- captions beyond the context --------------------------------------------------------------------------------------------


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Eight pictures, the sixth with a caption of 200 words."""
    lines = ["image,caption"]
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(30 * i, size=32))
        lines.append(f"{i}.png,{'very ' * 200 if i == 5 else ''}grey")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return tmp_path


def small() -> zoo.Model:
    return zoo.load("clip-micro", "lora", pretrained=False)


def test_a_caption_beyond_the_context_is_named_by_its_row(captioned: Path) -> None:
    """It was named by no row, and could not be left out."""
    with pytest.raises(DataError, match=r"5\.png: text 0 has \d+ tokens, the model takes"):
        zoo.fit(small(), captioned, epochs=1, progress=False)
    report = zoo.fit(small(), open_pairs(captioned, on_error="skip"), epochs=1, progress=False)
    assert len(report.skipped) == 1 and report.skipped[0].endswith("5.png")
    from multimodal.tasks.contrast import Contrast

    assert zoo.evaluate(small(), captioned, task=Contrast(truncate=True), progress=False)["images"] == 8


def test_on_the_command_line(captioned: Path, tmp_path: Path) -> None:
    fit = [
        "fit",
        "clip-micro",
        "lora",
        "--no-pretrained",
        "--data",
        str(captioned),
        "-e",
        "1",
        "--quiet",
        "--task",
        "contrast",
    ]
    refused = CliRunner().invoke(app, [*fit, "--out", str(tmp_path / "a")])
    assert refused.exit_code == 1 and "tokens" in refused.output
    for name, option in (("b", "--skip-broken"), ("c", "--truncate")):
        done = CliRunner().invoke(app, [*fit, "--out", str(tmp_path / name), option])
        assert done.exit_code == 0, done.output
    wrong = ["fit", "vit-micro", "lora", "--data", str(captioned), "--out", str(tmp_path / "d"), "--truncate"]
    refused = CliRunner().invoke(app, wrong)
    assert refused.exit_code == 1 and "reads none" in refused.output


def test_truncate_is_of_tasks_that_read() -> None:
    from zoo.cli.evaluate import set_truncate
    from zoo.tasks import Classify

    with pytest.raises(ConfigError, match="reads none"):
        set_truncate(Classify(), True)
