"""The task "contrast": data sets of pairs, the losses, retrieval, and `zoo.fit` on both towers."""

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
import torch.nn.functional as F
from PIL import Image

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT, batch, make
from open_clip.loss import ClipLoss, SigLipLoss

from multimodal.data.pairs import Pair, caption_classes, open_pairs
from multimodal.tasks.contrast import Contrast, Embedded, Retrieval
from zoo.errors import ConfigError, DataError, MismatchError

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 200, 40),
    "blue": (40, 40, 200),
    "white": (230, 230, 230),
    "black": (20, 20, 20),
}


def picture(colour: str, seed: int) -> bytes:
    """A PNG of 16 x 16 noisy pixels of one colour."""
    noise = np.random.default_rng(seed).integers(-20, 20, (16, 16, 3))
    pixels = np.clip(np.asarray(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 pictures with two captions each: as files with a table, and as Parquet."""
    rows = [(colour, seed) for seed in range(4) for colour in COLOURS]
    texts = [[f"{colour} {seed}", f"it is {colour}"] for colour, seed in rows]
    images = [picture(*row) for row in rows]
    root = tmp_path / "colours"
    root.mkdir()
    with (root / "captions.csv").open("w") as file:
        file.write("image,caption\n")
        for number, (data, captions) in enumerate(zip(images, texts)):
            (root / f"{number}.png").write_bytes(data)
            file.writelines(f"{number}.png,{caption}\n" for caption in captions)
    packed = tmp_path / "packed"
    packed.mkdir()
    pq.write_table(
        pa.table({"image": images, "captions": texts, "name": [str(r) for r in rows]}), packed / "train.parquet"
    )
    pq.write_table(pa.table({"img": images[:5], "caption": [t[0] for t in texts[:5]]}), packed / "test.parquet")
    return tmp_path


# -- data -------------------------------------------------------------------------------------------------------------


def test_tables_and_parquet_give_the_same_pairs(folder: Path) -> None:
    listed, packed = open_pairs(folder / "colours"), open_pairs(folder / "packed", split="train")
    assert len(listed) == len(packed) == 20
    for (a, i), (b, j) in zip(listed, packed):
        assert isinstance(a, Pair) and a.captions == b.captions and i == j
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    single = open_pairs(folder / "packed" / "test.parquet")
    assert single[1][0].captions == ("green 0",)
    assert packed.name == "packed/train" and listed.where(3).endswith("colours/3.png")


def test_other_tables(folder: Path) -> None:
    root = folder / "colours"
    rows = [{"file_name": "0.png", "text": ["one", "two"]}, {"file_name": "1.png", "text": "three"}]
    (root / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    (root / "val.tsv").write_text("path\ttitle\n2.png\ta, b\n")
    assert [p.captions for p, _ in open_pairs(root, split="train")] == [("one", "two"), ("three",)]
    assert open_pairs(root / "val.tsv")[0][0].captions == ("a, b",)
    with pytest.raises(DataError, match="no table of the split 'tset'"):
        open_pairs(root, split="tset")
    (root / "captions.csv").unlink()
    with pytest.raises(DataError, match="several tables"):
        open_pairs(root)


def test_what_is_wrong_with_a_table_is_said(folder: Path) -> None:
    root = folder / "colours"
    (root / "7.png").unlink()
    (root / "9.png").unlink()
    with pytest.raises(DataError, match=r"2 of 20 images are missing: .*7\.png \(line 16\), .*9\.png"):
        open_pairs(root)
    for name, text, reason in (
        ("a.csv", "image,caption\n0.png,\n", "line 2: the caption"),
        ("b.csv", "picture,caption\n0.png,x\n", "image_column"),
        ("c.csv", "image,words\n0.png,x\n", "caption_column=.*words"),
        ("d.csv", "image,caption\n", "empty"),
        ("e.csv", "image,caption\n,x\n", "no path"),
        ("f.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("g.jsonl", "{\n", "cannot be read"),
    ):
        (root / name).write_text(text)
        with pytest.raises(DataError, match=reason):
            open_pairs(root / name)
    assert len(open_pairs(root / "c.csv", caption_column="words")) == 1
    (root / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png.*corrupt"):
        open_pairs(root / "c.csv", caption_column="words")[0]


def test_parquet_without_captions(folder: Path) -> None:
    images = [picture("red", 0)] * 2
    for table, reason in (
        ({"image": images, "label": [0, 1]}, "caption_column"),
        ({"image": images, "caption": ["a", None]}, "row 1: the caption is None"),
        ({"image": images, "captions": [["a"], []]}, "row 1: the caption"),
    ):
        pq.write_table(pa.table(table), folder / "bad.parquet")
        with pytest.raises(DataError, match=reason):
            open_pairs(folder / "bad.parquet")
    (folder / "broken.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        open_pairs(folder / "broken.parquet")
    with pytest.raises(DataError, match="holds no captions"):
        open_pairs(Path(__file__).parent)


def test_torch_data_sets_and_captions_of_classes(image_folder: Path) -> None:
    pairs = [(Image.new("RGB", (16, 16)), "black"), (Image.new("RGB", (16, 16)), ["a", "b"])]
    opened = open_pairs(pairs)
    assert [p.captions for p, _ in opened] == [("black",), ("a", "b")]
    labelled = zoo.open_dataset(image_folder / "train")
    made = caption_classes(labelled.select([0, 23]), ["a {} picture", "{}"])
    (first, a), (second, b) = made
    assert (first.captions, a) == (("a blue picture", "blue"), 0) and (second.captions[1], b) == ("red", 1)
    for wrong in ([], ["no place"]):
        with pytest.raises(ConfigError, match="place"):
            caption_classes(labelled, wrong)


# -- the losses -------------------------------------------------------------------------------------------------------


def test_loss_is_open_clips() -> None:
    for kind in ("plain", "no mask"):
        model = make(kind)
        images, ids = batch(model)
        loss, outputs = Contrast().loss(model, [images, ids], torch.arange(3))
        own: Any = model.merge()
        i, t = own.encode_image(images, normalize=True), own.encode_text(ids, normalize=True)
        if own.logit_bias is None:
            expected = ClipLoss()(i, t, own.logit_scale.exp())
        else:
            expected = SigLipLoss()(i, t, own.logit_scale.exp(), own.logit_bias)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs.images.double(), i, rtol=1e-5, atol=1e-5)


def test_several_captions_and_groups() -> None:
    model = make("plain")
    images, ids = batch(model)
    many = torch.stack([ids, ids.flip(0), torch.zeros_like(ids)], dim=1)  # two captions each, and padding
    loss, outputs = Contrast().loss(model, [images, many], torch.arange(3))
    single, _ = Contrast().loss(model, [images, ids], torch.arange(3))
    torch.testing.assert_close(loss, single)  # that of the first captions
    assert outputs.owner.tolist() == [0, 0, 1, 1, 2, 2] and outputs.texts.shape == (6, 24)

    scores = model(images, ids).float()
    grouped, _ = Contrast().loss(model, [images, ids], torch.tensor([4, 7, 4]))
    goal = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    expected = -sum((goal * s.log_softmax(1)).sum() for s in (scores, scores.T)) / 6
    torch.testing.assert_close(grouped, expected)
    smooth, _ = Contrast().loss(model, [images, ids], torch.arange(3), label_smoothing=0.1)
    both = [F.cross_entropy(s, torch.arange(3), label_smoothing=0.1) for s in (scores, scores.T)]
    torch.testing.assert_close(smooth, (both[0] + both[1]) / 2)
    sigmoid = make("no mask")
    with pytest.raises(ConfigError, match="logit bias"):
        Contrast().loss(sigmoid, batch(sigmoid), torch.arange(3), label_smoothing=0.1)


def test_recall_by_hand() -> None:
    metric = Retrieval()
    images = F.normalize(torch.randn(23, 4), dim=-1)
    texts = F.normalize(torch.randn(50, 4), dim=-1)
    owner = torch.arange(50) % 23
    for part in (slice(0, 10), slice(10, 23)):
        mine = ((owner >= part.start) & (owner < part.stop)).nonzero().flatten()
        metric.update(Embedded(images[part], texts[mine], owner[mine] - part.start), torch.zeros(0))
    found = metric.compute()
    similar = images @ texts.T
    for k in (1, 5, 10):
        hits = sum(bool((owner[row.topk(k).indices] == i).any()) for i, row in enumerate(similar))
        assert found[f"image_to_text_r{k}"] == pytest.approx(hits / 23)
        hits = sum(int(owner[j]) in column.topk(k).indices.tolist() for j, column in enumerate(similar.T))
        assert found[f"text_to_image_r{k}"] == pytest.approx(hits / 50)
    assert found["recall"] == pytest.approx(np.mean([v for k, v in found.items() if k != "recall"]))
    metric.reset()
    same = torch.ones(20, 4) / 2
    metric.update(Embedded(same, same, torch.arange(20)), torch.zeros(0))
    assert metric.compute()["recall"] == 0  # of equal scores the wrong ones count as better


# -- training ---------------------------------------------------------------------------------------------------------


def small(*adapters: Any, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    text = {**TEXT, "context_length": 16}
    return zoo.load(
        "clip-micro", list(adapters), pretrained=False, vision_cfg=IMAGE, text_cfg=text, embed_dim=24, **options
    )


def test_fit_on_pairs(folder: Path) -> None:
    model = small(zoo.adapter("lora", rank=4, targets="all-linear"))
    before = zoo.evaluate(model, folder / "colours", progress=False)
    assert {"recall", "image_to_text_r1", "text_to_image_r10", "loss"} <= set(before) and "accuracy" not in before
    report = zoo.fit(
        model,
        folder / "packed" / "train.parquet",
        folder / "colours",
        epochs=12,
        batch_size=10,
        lr=1e-2,
        progress=False,
    )
    after = zoo.evaluate(model, folder / "colours", progress=False)
    assert after["loss"] < 0.8 * before["loss"] and after["recall"] > before["recall"] + 0.1
    assert report.best["val_recall"] == pytest.approx(after["recall"])
    assert model.record["saved_bytes"]["default"] > 0
    again = zoo.fit(model, folder / "colours", epochs=1, keep="best", val_fraction=0.25, batch_size=8, progress=False)
    assert again.data["val_images"] == 5


def test_training_draws_a_caption_and_evaluation_takes_all(folder: Path) -> None:
    model = small("lora")
    train = Contrast().open(model, folder / "colours", train=True)
    test = Contrast(captions=3).open(model, folder / "colours", train=False)
    family: Any = model.family
    captions = family.tokenize(["red 0", "it is red"])
    drawn = [train[0][0][1] for _ in range(20)]
    assert {int(torch.equal(d, captions[0])) for d in drawn} == {0, 1}
    (pixels, ids), group = test[0]
    assert pixels.shape == (3, 16, 16) and group == 0
    assert torch.equal(ids[:2], captions) and not ids[2].any() and len(ids) == 3


def test_what_does_not_fit_is_refused(folder: Path, image_folder: Path) -> None:
    with pytest.raises(ConfigError, match="classification head"):
        zoo.fit(small("lora", num_classes=3), folder / "colours", task="contrast", progress=False)
    with pytest.raises(MismatchError, match="family 'vit'"):
        vit = zoo.load("vit-micro", "lora", pretrained=False, num_classes=0, depth=1)
        zoo.fit(vit, folder / "colours", task="contrast", progress=False)
    labelled = zoo.open_dataset(image_folder / "train")
    with pytest.raises(DataError, match="caption_classes"):
        zoo.fit(small("lora"), labelled, epochs=1, workers=0, progress=False)
    with pytest.raises(ConfigError, match="captions is 0"):
        Contrast(captions=0)
    (folder / "colours" / "long.csv").write_text("image,caption\n0.png," + "word " * 30 + "\n")
    with pytest.raises(DataError, match="tokens, the model takes 16"):
        zoo.evaluate(small("lora"), folder / "colours" / "long.csv", workers=0, progress=False)
    cut = zoo.evaluate(small("lora"), folder / "colours" / "long.csv", task=Contrast(truncate=True), progress=False)
    assert cut["images"] == 1


def test_classifier_on_the_image_tower(image_folder: Path) -> None:
    model = small("lora", num_classes=2)
    report = zoo.fit(model, image_folder / "train", epochs=4, batch_size=8, lr=1e-2, progress=False)
    assert report.history[-1]["accuracy"] > 0.9
    assert zoo.evaluate(model, image_folder / "test", progress=False)["accuracy"] > 0.9


def test_real_captions(data_dir: Path) -> None:
    pairs = open_pairs(data_dir / "flickr8k_1000", split="test")
    assert len(pairs) == 100 and all(len(p.captions) == 5 for p, _ in (pairs[0], pairs[99]))
    model = zoo.load("clip-micro", pretrained=False)
    family: Any = model.family
    everything = [c for texts in pairs.rows.captions for c in texts]  # type: ignore[attr-defined]
    assert family.tokenize(everything).shape == (500, 64)  # none is too long
    result = zoo.evaluate(model, pairs.select(range(12)), progress=False)
    assert 0 <= result["recall"] < 0.9 and result["images"] == 12
