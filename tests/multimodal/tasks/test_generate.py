"""Text generation: data of questions, features of images, the task, and its numbers."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from multimodal.data.questions import Question, open_questions
from multimodal.metrics.answers import exact_match, normalized, vqa_accuracy
from multimodal.metrics.cider import cider
from zoo.errors import ConfigError, ContextError, DataError, MismatchError

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

SMALL: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1}
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def png(color: tuple[int, int, int], size: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, format="PNG")
    return file.getvalue()


def front(**options: Any) -> Any:
    from multimodal.data.visual_features import GridFeatures

    torch.manual_seed(0)
    tiny = zoo.load("vit-micro", num_classes=0, pretrained=False, embed_dim=24, depth=1, num_heads=2, patch_size=16)
    return GridFeatures(tiny, **options)


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    return zoo.load("vl-t5-micro", pretrained=False, **{**SMALL, "feat_dim": 24, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two colours, four images, eight questions, in the form of easy-VQA; the test split has two of the images."""
    names = ["red", "blue", "red", "blue"]
    for split, count in (("train", 4), ("test", 2)):
        images = {"image_id": list(range(count)), "image": [png(COLORS[n]) for n in names[:count]]}
        pq.write_table(pa.table(images), tmp_path / f"{split}_images.parquet")
        rows = [
            (i, q, a) for i, n in enumerate(names[:count]) for q, a in (("what color?", n), ("is it red?", _yes(n)))
        ]
        table = dict(zip(("image_id", "question", "answer"), map(list, zip(*rows))))
        pq.write_table(pa.table(table), tmp_path / f"{split}_questions.parquet")
    return tmp_path


def _yes(name: str) -> str:
    return "yes" if name == "red" else "no"


# -- numbers, by hand ----------------------------------------------------------------------------------------------------


def test_exact_match() -> None:
    assert exact_match(" Two  Dogs", ["a dog", "two dogs"]) == 1
    assert exact_match("dog", ["a dog"]) == 0


def test_vqa_accuracy() -> None:
    people = ["red"] * 3 + ["dark red"] * 2 + ["brown"] + ["maroon"] * 4
    # said by 3 of 10: for each of the 3 two others agree, for each of the other 7 three do
    assert vqa_accuracy("red", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("dark red", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("brown", people) == pytest.approx((1 * 0 + 9 * 1 / 3) / 10)
    assert vqa_accuracy("maroon", people) == 1 and vqa_accuracy("green", people) == 0
    assert normalized("The 2,000 Dogs, and a cat.") == "2000 dogs and cat" and normalized("Two") == "2"
    assert vqa_accuracy("two", ["2"]) == 1 and vqa_accuracy("3", ["2"]) == 0


def test_cider_by_hand() -> None:
    references = [["a red cat", "the red cat"], ["a blue dog"]]
    two = math.log(2)
    # image 1: idf is log 2 for all but "a", which stands with both images (log 1 = 0)
    # "a red cat" against itself: every n with a n-gram has cosine 1: n = 1, 2, 3; there is no 4-gram
    # against "the red cat": words [red, cat] / [the, red, cat]: 2 / sqrt(2 * 3); pairs: 1 of 2; no three words together
    one = (3 / 4 + (2 / math.sqrt(6) + 1 / 2) / 4) / 2
    # image 2: "dog" against "a blue dog": 1 / sqrt(2) of one n, shorter by two words
    other = (two**2 / math.sqrt(two**2 * 2 * two**2)) / 4 * math.exp(-(2**2) / (2 * 36))
    assert cider(["a red cat", "dog"], references) == pytest.approx(10 * (one + other) / 2)
    assert cider(["A RED CAT!", "dog."], references) == pytest.approx(10 * (one + other) / 2)
    # clipped: saying a word twice gains nothing over the reference's count
    twice = (min(2, 1) * two**2 / math.sqrt((2 * two) ** 2 * 2 * two**2)) / 4 * math.exp(-1 / 72)
    assert cider(["a red cat", "dog dog"], references) == pytest.approx(10 * (one + twice) / 2)
    assert cider([], []) == 0 and cider(["nothing", ""], references) == 0


# -- features ------------------------------------------------------------------------------------------------------------


def test_grid_features_are_the_last_blocks_tokens() -> None:
    made = front()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    features, boxes = made([image, image])
    assert features.shape == (2, 4, 24) and made.dim == 24
    vit: Any = made.model.backbone
    pixels = made.model.preprocess(train=False)(image)[None]
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
    torch.testing.assert_close(features[:1], vit.blocks[0](tokens)[:, 1:])
    assert boxes[0].tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    pooled, whole = front(pool=(1, 1))([image])
    torch.testing.assert_close(pooled[0, 0], features[0].amax(0))
    assert whole.tolist() == [[[0, 0, 1, 1]]]
    torch.testing.assert_close(front(pool=(1, 1), reduce="mean")([image])[0][0, 0], features[0].mean(0))


def test_grid_features_say_what_is_wrong() -> None:
    from multimodal.data.visual_features import GridFeatures

    with pytest.raises(ConfigError, match="reduce"):
        front(reduce="sum")
    with pytest.raises(ConfigError, match=r"4 tokens.*grid="):
        front(grid=(3, 2))([Image.new("RGB", (32, 32))])
    with pytest.raises(DataError, match=r"nowhere\.png"):
        front()(["/nowhere.png"])
    with pytest.raises(DataError, match="image 1"):
        front()([png((0, 0, 0)), b"no image"])
    with pytest.raises(ConfigError, match="no blocks that take images"):
        GridFeatures(zoo.load("t5-base", pretrained=False, **SMALL, vocab_size=40))


def test_windows_and_towers_have_grids() -> None:
    from multimodal.data.visual_features import GridFeatures

    swin = zoo.load(
        "swin-t", num_classes=0, pretrained=False, img_size=64, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
    )
    features, boxes = GridFeatures(swin)([png((9, 9, 9), 64)])
    assert features.shape == (1, 64, 24) and boxes[0, 9].tolist() == [1 / 8, 1 / 8, 2 / 8, 2 / 8]


# -- data ----------------------------------------------------------------------------------------------------------------


def test_questions_are_read(folder: Path) -> None:
    data = open_questions(folder, split="train")
    question, index = data[3]
    assert (
        len(data) == 8 and index == 3 and (question.text, question.answers, question.key) == ("is it red?", ("no",), 1)
    )
    assert question.image == png(COLORS["blue"])
    assert len(open_questions(folder / "test_questions.parquet")) == 4
    with pytest.raises(DataError, match="holds the splits test, train"):
        open_questions(folder)
    with pytest.raises(DataError, match="no questions of the split 'val'"):
        open_questions(folder, split="val")


def test_damaged_questions_are_named(folder: Path) -> None:
    def write(**columns: list[Any]) -> Path:
        pq.write_table(pa.table(columns), folder / "bad_questions.parquet")
        pq.write_table(pq.read_table(folder / "test_images.parquet"), folder / "bad_images.parquet")
        return folder / "bad_questions.parquet"

    with pytest.raises(DataError, match=r"row 1: the question's image 7 is not among the 2"):
        open_questions(write(image_id=[0, 7], question=["what?", "what?"], answer=["a", "b"]))
    with pytest.raises(DataError, match=r"row 0: the question is ' '"):
        open_questions(write(image_id=[0], question=[" "], answer=["a"]))
    with pytest.raises(DataError, match=r"row 0: the answer is \[\]"):
        open_questions(write(image_id=[0], question=["what?"], answers=pa.array([[]], pa.list_(pa.string()))))
    with pytest.raises(DataError, match="no column 'answers'"):
        open_questions(write(image_id=[0], question=["what?"]))
    file = write(image_id=[0], question=["what?"], answer=["a"])
    (folder / "bad_images.parquet").unlink()
    with pytest.raises(DataError, match=r"no bad_images\.parquet beside it"):
        open_questions(file)


def test_a_question_without_features_is_refused(folder: Path) -> None:
    network = model()
    blind = zoo.load("vl-t5", pretrained=False, **SMALL, vocab_size=40)  # no image backbone belongs to it
    blind.family.tokenizer = network.family.tokenizer
    with pytest.raises(DataError, match=r"row 0: a question without features.*vision="):
        zoo.evaluate(blind, folder, split="test", progress=False)
    with pytest.raises(DataError, match="without image or features"):
        zoo.evaluate(network, [Question(None, "what?", ("red",))], task=_task(front()), progress=False)
    with pytest.raises(MismatchError, match=r"width 24.*feat_dim=24"):
        zoo.evaluate(model(feat_dim=9), folder, split="test", task=_task(front()), progress=False)
    broken = [Question((torch.full((3, 24), math.nan), None), "what?", ("red",))]
    with pytest.raises(DataError, match="NaN"):
        zoo.evaluate(network, broken, task="generate", progress=False)
    uneven = [Question((torch.ones(n, 24), None), "what?", ("red",), n) for n in (3, 4)]
    with pytest.raises(DataError, match=r"item 1: 4 visual tokens, and 3"):
        zoo.evaluate(network, uneven, task="generate", progress=False)
    boxes = [Question((torch.ones(3, 24), torch.ones(2, 4)), "what?", ("red",))]
    with pytest.raises(DataError, match="3 features and 2 boxes"):
        zoo.evaluate(network, boxes, task="generate", progress=False)
    with pytest.raises(MismatchError, match="family 'vit'"):
        zoo.evaluate(zoo.load("vit-micro", num_classes=0), folder, split="test", task="generate", progress=False)
    sparse = network.add_adapter(zoo.adapter("lt-sft", entries=50))
    with pytest.raises(DataError, match=r"Targets are \(2,\); expected \(B, 2, W\)"):
        sparse.calibrate(network, [(network.family.tiny_batch(), torch.tensor([0, 1]))])


def test_what_cannot_be_read_is_named_or_skipped(folder: Path) -> None:
    images = pq.read_table(folder / "test_images.parquet").to_pydict()
    pq.write_table(pa.table({**images, "image": [images["image"][0], b"torn"]}), folder / "test_images.parquet")
    network, task = model(), _task(front())
    with pytest.raises(DataError, match=r"row 2: the image is corrupt"):
        zoo.evaluate(network, folder, split="test", task=task, progress=False)
    found = zoo.evaluate(network, open_questions(folder, split="test", on_error="skip"), task=task, progress=False)
    assert found["images"] == 2 and found["skipped"] == 2


def test_questions_without_keys_have_images_of_their_own() -> None:
    items = [Question((torch.full((3, 24), float(i)), None), "what?", ("red",)) for i in range(2)]
    dataset = _task(None).open(model(), items, train=False)
    assert [dataset[i][0][3].unique().tolist() for i in range(2)] == [[0.0], [1.0]]


def _task(vision: Any, **options: Any) -> Any:
    from multimodal.tasks.generate import Generate

    return Generate(vision=vision, **options)


def test_features_in_the_data(tmp_path: Path) -> None:
    table = {
        "features": [np.ones((3, 24)).tolist(), np.zeros((3, 24)).tolist()],
        "boxes": [np.ones((3, 4)).tolist()] * 2,
        "question": ["what color?", "is it red?"],
        "answers": [["red", "red", "blue"], ["yes", "no", "yes"]],
    }
    pq.write_table(pa.table(table), tmp_path / "test.parquet")
    dataset = _task(None).open(model(), tmp_path, train=False, split="test")
    (ids, mask, answer, features, boxes), target = dataset[0]
    assert features.shape == (3, 24) and boxes.tolist() == [[1.0] * 4] * 3
    words = model().family.tokenizer
    assert words.decode(ids[: int(mask.sum())]) == "vqa : what color ? </s>"
    assert answer[:2].tolist() == [0, target[0, 0]] and target[0, :3].tolist() == [words("red").input_ids[0], 1, -100]


def test_what_is_written_sees_all_visual_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of objects and the numbers of images were trained with, and left out while answers were written."""
    network, task, seen = model().eval(), _task(None), []
    encode = type(network.backbone).encode
    monkeypatch.setattr(
        type(network.backbone), "encode", lambda self, *a, **visual: seen.append(visual) or encode(self, *a, **visual)
    )
    ids, features, boxes = torch.randint(3, 50, (2, 5)), torch.randn(2, 3, 24), torch.rand(2, 3, 4)
    images, objects, mask = torch.zeros(2, 3).long(), torch.arange(3).expand(2, 3), torch.tensor([[1, 0, 0], [1, 1, 1]])
    visual = (features, boxes, images, objects, mask)
    assert len(task.write(network, (ids, torch.ones_like(ids), None, *visual), 4)) == 2
    assert all(a is b for a, b in zip(seen[0].values(), visual, strict=True))
    with pytest.raises(zoo.ZooError, match="expected at most 5"):
        task.write(network, (ids, torch.ones_like(ids), None, *visual, mask), 4)


# -- the task ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_words_then_over_samples(folder: Path) -> None:
    network, task = model(), _task(front())
    dataset = task.open(network, folder, train=True, split="train")
    inputs, targets = zoo.data.collate([dataset[0], dataset[3]])
    loss, outputs = task.loss(network, inputs, targets)
    expected = []
    for row in range(2):
        labels = targets[row, 0][targets[row, 0] >= 0]
        chance = network(*inputs)[row, : len(labels)].log_softmax(-1)
        expected.append(-chance[torch.arange(len(labels)), labels].mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert outputs.texts == [] and outputs.references[0][0] == "red"


def test_several_answers_are_weighted_by_what_they_are_worth() -> None:
    people = ("red", "red", "red", "blue", "red")
    item = Question((torch.randn(3, 24), None), "what color?", people)
    network, task = model(), _task(None)
    dataset = task.open(network, [item], train=True)
    drawn, losses = [], {}
    for seed in range(40):
        torch.manual_seed(seed)
        inputs, targets = zoo.data.collate([dataset[0]])
        loss, outputs = task.loss(network, inputs, targets)
        drawn.append(outputs.references[0][0])
        labels = targets[0, 0][targets[0, 0] >= 0]
        plain = -network(*inputs)[0, : len(labels)].log_softmax(-1)[torch.arange(len(labels)), labels].mean()
        losses[drawn[-1]] = (loss / plain).item()
    # blue: for four of five people one other said it
    assert losses["red"] == pytest.approx(1.0) and losses["blue"] == pytest.approx((4 / 3) / 5)
    assert 2 <= drawn.count("blue") <= 18  # 0.27 to 1, out of 40


def test_fit_learns_and_evaluate_writes(folder: Path) -> None:
    network = model()
    network.add_adapter("full")
    task = _task(front())
    data = folder / "train_questions.parquet"
    zoo.fit(network, data, task=task, epochs=40, batch_size=8, lr=1e-2, progress=False)
    found = zoo.evaluate(network, folder, split="test", task=task, progress=False)
    assert found["exact_match"] == found["score"] == 1.0 and found["images"] == 4 and "vqa_accuracy" not in found
    images = [Image.new("RGB", (32, 32), COLORS[n]) for n in ("blue", "red")]
    assert task.answer(network, images, ["what color?", "is it red?"]) == ["blue", "yes"]
    assert _task(front(), beams=3).answer(network, images, ["is it red?", "what color?"]) == ["no", "red"]
    with pytest.raises(DataError, match="2 images for 1 questions"):
        task.answer(network, images, ["what color?"])
    with network.disable():
        assert zoo.evaluate(network, folder, split="test", task=task, progress=False)["exact_match"] < 1


def test_writes_with_weights_made_for_a_task(folder: Path) -> None:
    """Writing is many passes of the library's own: one forward pass here, with its values and one run of the generator."""
    network = model(num_layers=2)
    method = zoo.adapter("hyperformer", tasks=("a", "b"), form="++", rank=4, task_dim=4, hidden=8, projected=8)
    adapter = network.add_adapter(method)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    task, image = _task(front(), beams=2), Image.new("RGB", (32, 32), COLORS["red"])
    with pytest.raises(ContextError, match="needs 'task'"):
        task.answer(network, [image], ["what color?"])
    written = {}
    for name in ("a", "b"):
        with network.context(task=name):
            written[name] = task.answer(network, [image], ["what color?"])
    for name in ("a", "b"):
        network.set_active(*adapter.extract(network, name))
        assert task.answer(network, [image], ["what color?"]) == written[name]
    assert written["a"] != written["b"]


def test_captions_are_described(tmp_path: Path) -> None:
    table = {
        "image": [png(COLORS["red"]), png(COLORS["blue"])],
        "captions": [["a red shape", "the shape is red"], ["a blue shape"]],
    }
    pq.write_table(pa.table(table), tmp_path / "test.parquet")
    network, task = model(), _task(front())
    dataset = task.open(network, tmp_path, train=False, split="test")
    (ids, mask, *_), _ = dataset[0]
    assert network.family.tokenizer.decode(ids[: int(mask.sum())]) == "caption : </s>"
    found = zoo.evaluate(network, tmp_path, split="test", task=task, progress=False)
    assert "exact_match" not in found and 0 <= found["cider"] == found["score"] <= 10


def test_text_networks_answer_without_images(tmp_path: Path) -> None:
    words = ["what", "color", "?", "red", "vqa", ":"]
    torch.manual_seed(0)
    network = zoo.load("vl-t5-micro", pretrained=False, **SMALL, feat_dim=None, words=words)
    items = [Question(None, "what color?", ("red",))]
    found = zoo.evaluate(network, items, task="generate", progress=False)
    assert 0 <= found["exact_match"] <= 1
    assert network.family.tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 8]) == ["<pad>", "</s>", "<unk>", "what", ":"]


def test_words_name_visual_tokens_from_the_end() -> None:
    network = model()
    words = network.family.tokenizer
    assert len(words) == network.backbone.config.vocab_size
    for n in (0, 7, 99):
        assert words.convert_tokens_to_ids(f"<vis_extra_id_{n}>") == len(words) - 1 - n
    assert words("What color, is it?").input_ids[-1] == words.eos_token_id


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_in_half_precision(dtype: torch.dtype) -> None:
    """Features of images came in float32: "mat1 and mat2 must have the same dtype"."""
    half = model(dtype=dtype)
    assert len(_task(front()).answer(half, [png((255, 0, 0))] * 2, ["what color is it?"] * 2)) == 2


@pytest.mark.slow
def test_easy_vqa_is_readable(data_dir: Path) -> None:
    from multimodal.families.seq2seq.words import EASY_VQA, words_of

    data = open_questions(data_dir / "easy_vqa", split="test")
    assert len(data) == 9673
    question, _ = data[0]
    assert question.answers == ("triangle",) and question.text == "what is the red shape?"
    texts = [t for row in range(0, 9673, 7) for t in (data[row][0].text or "", *data[row][0].answers)]
    assert set(words_of(texts)) <= set(EASY_VQA)
    assert isinstance(data.labels, (type(None), Tensor))
