"""The task "generate" of language models: chat templates, images of any size, loss on the answer, an adapter for each sample."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from vlm_models import CHAT, small_qwen, tiny, words

import zoo
from multimodal.data.chats import Chat, Writer
from multimodal.data.questions import Question
from multimodal.tasks.generate import Generate
from zoo.data.dataset import collate
from zoo.errors import ConfigError, DataError, MismatchError

pytest.importorskip("transformers")
pytest.importorskip("torchvision")

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def picture(colour: str, width: int = 32, height: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), COLOURS[colour]).save(file, format="PNG")
    return file.getvalue()


def questions() -> list[Question]:
    """Images of three sizes."""
    sizes = ((32, 32), (64, 32), (32, 48))
    return [Question(picture(c, *size), "what color?", (c,), f"{c}{size}") for c in COLOURS for size in sizes]


@pytest.fixture(scope="module")
def model() -> zoo.Model:
    return small_qwen()


def test_items_are_the_processors_inputs(model: zoo.Model) -> None:
    """Word for word what the processor makes of the chat; the answer and its end stand apart, padding in front."""
    family: Any = model.family
    data = Generate().open(model, questions(), train=True)
    batch, targets = collate([data[i] for i in (0, 1)])
    ids, mask, answer, pixels, grid = batch
    assert (
        grid.tolist() == [[[1, 4, 4]], [[1, 4, 8]]] and pixels.shape == (2, 32, 3 * 2 * 64) and not pixels[0, 16:].any()
    )
    image = Image.open(io.BytesIO(picture("red", 64, 32)))
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    text = family.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    made = family.processor(text=[text], images=[image], return_tensors="pt")
    assert torch.equal(ids[1][mask[1].bool()], made["input_ids"][0]) and torch.equal(pixels[1], made["pixel_values"])
    start = int((~mask[0].bool()).sum())
    assert start == 4 and not mask[0, :start].any() and mask[0, start:].all()  # four visual tokens fewer
    end = family.tokenizer.eos_token_id
    assert answer[0].tolist() == [
        *family.tokenizer("red")["input_ids"],
        end,
        *[-100] * (9 - len(family.tokenizer("red")["input_ids"])),
    ]
    assert torch.equal(targets[:, 0, :10], answer)


def test_questions_about_several_images(model: zoo.Model) -> None:
    """One beside another with none of the second: its places are empty, and each row is what it is alone."""
    both = [Question([picture("red"), picture("blue", 64, 32)], "the same?", ("no",)), *questions()[:1]]
    data = Generate().open(model, both, train=True)
    inputs, _ = collate([data[0], data[1]])
    assert inputs[4].tolist() == [[[1, 4, 4], [1, 4, 8]], [[1, 4, 4], [0, 0, 0]]] and inputs[3].shape[1] == 48
    with torch.no_grad():
        together = model(*inputs)
        for i in range(2):
            alone, _ = collate([data[i]])
            there = alone[2][0] != -100
            torch.testing.assert_close(model(*alone)[0, there], together[i, there], rtol=1e-4, atol=1e-4)


def test_loss_is_that_of_the_answer_and_its_end_alone(model: zoo.Model) -> None:
    """By hand on the library's network: -log p of each word of the answer, over samples of their means."""
    task = Generate()
    data = task.open(model, questions(), train=True)
    inputs, targets = collate([data[i] for i in (1, 4)])
    loss, written = task.loss(model.train(), inputs, targets)
    model.eval()
    module: nn.Module = model.backbone
    each = []
    for i in range(2):
        ids, mask, answer, pixels, grid = (x[i : i + 1] for x in inputs)
        words_ = answer[answer != -100]
        whole = torch.cat([ids[mask.bool()], words_])[None]
        kinds = whole.eq(model.family.image_token).int()  # type: ignore[attr-defined]
        given = {"pixel_values": pixels[0, : int(grid.prod())], "image_grid_thw": grid[0], "mm_token_type_ids": kinds}
        scores = module(input_ids=whole, **given).logits[0].log_softmax(-1)
        first = int(mask.sum())
        each.append(-scores[torch.arange(first - 1, whole.shape[1] - 1), words_].mean())
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-5, atol=1e-5)
    assert written.references == [("red", "red"), ("blue", "blue")]  # that which was drawn, then all


def test_it_learns_and_answers_and_each_sample_has_its_adapter() -> None:
    """Fit on colours of images of several sizes: all right afterwards; another adapter in the same batch answers as by itself."""
    model = small_qwen(1)
    for name in ("good", "other"):
        model.add_adapter(zoo.adapter("lora", rank=8, targets="all-linear"), name)
    model.set_active("good")
    settings = {"batch_size": 6, "lr": 1e-2, "seed": 0, "schedule": "constant", "task": "generate"}
    zoo.fit(model, questions(), questions(), epochs=25, **settings)  # type: ignore[arg-type]
    assert zoo.evaluate(model, questions(), task="generate")["exact_match"] == 1.0
    for parameter in model.adapters["other"].parameters():
        nn.init.normal_(parameter, std=0.3)
    task = Generate(answer_length=5)
    images = [picture("red"), picture("blue", 64, 32), picture("blue"), picture("red")]
    asked = ["what color?"] * 4
    alone = {}
    for name in ("good", "other", None):
        model.set_active(*([name] if name else []))
        alone[name] = task.answer(model, images, asked)
    model.set_active("good", train=())
    names = ["good", "other", None, "good"]
    expected = [alone[n][i] for i, n in enumerate(names)]
    assert expected[0] == "red" and alone["other"] != alone["good"] != alone[None]
    assert (
        task.answer(model, images, asked, adapters=names) == expected
    )  # of different sizes: one part for each adapter
    same = [picture(c) for c in ("red", "blue", "blue", "red")]
    calls: list[int] = []
    hook = model.backbone.model.visual.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    together = task.answer(model, same, asked, adapters=names)
    assert len(calls) == 1 and together[0] == "red" and together[3] == "red"  # in one pass
    hook.remove()
    with_beams = Generate(answer_length=5, beams=3)
    model.set_active("other")
    other = with_beams.answer(model, same, asked)
    model.set_active("good", train=())
    assert with_beams.answer(model, same, asked, adapters=["other"] * 4) == other
    assert model.active == ("good",) and not any(p.requires_grad for p in model.adapters["good"].parameters())


def test_text_alone_and_what_does_not_fit(model: zoo.Model) -> None:
    plain = [Question(None, "two and two", ("four",)), Question(None, "one and one and one", ("three",))]
    inputs, _ = collate([Generate().open(model, plain, train=True)[i] for i in range(2)])
    assert len(inputs) == 3 and type(Generate().open(model, plain, train=True)[0][0]) is Chat
    assert len(Generate(answer_length=3).answer(model, [None, None], ["a", "b"])) == 2
    mixed = Generate().open(model, [*questions()[:1], *plain], train=True)
    with pytest.raises(DataError, match="the question has no image"):
        mixed[1]
    features = [Question((torch.zeros(4, 8), None), "what?", ("red",))]
    with pytest.raises(DataError, match="give pictures"):
        Generate().open(model, features, train=True)[0]
    long = [Question(None, "what?", ("an answer that goes on",))]
    count = len(model.family.tokenizer(long[0].answers[0])["input_ids"]) + 1  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=rf"has {count} tokens .*answer_length={count}"):
        Generate().open(model, long, train=True)[0]
    assert Generate().open(model, long, train=False)[0][1][0, :10].min() >= 0  # references are compared as texts
    with pytest.raises(ConfigError, match="reads these by itself"):
        Generate(vision="vit-micro").open(model, plain, train=True)
    with pytest.raises(ConfigError, match=r"has 1 names for a batch of 2"):
        Generate().answer(model, [None, None], ["a", "b"], adapters=[None])
    decoder = zoo.load("qwen2-0.5b", pretrained=False, **zoo.registry.family("decoder").tiny[1])  # type: ignore[attr-defined]
    decoder.family.tokenizer = words()  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match="reads text alone"):
        Generate().open(decoder, questions(), train=True)
    bare = zoo.wrap(copy.deepcopy(model.backbone), name="bare")
    with pytest.raises(ConfigError, match=r"model\.family\.processor"):
        Generate().answer(bare, [None], ["a"])


def test_a_model_without_a_template_goes_on_from_the_question() -> None:
    decoder = zoo.load("qwen2-0.5b", "lora", pretrained=False, **zoo.registry.family("decoder").tiny[1])  # type: ignore[attr-defined]
    decoder.family.tokenizer = tokenizer = words()  # type: ignore[attr-defined]
    ids, answer = Generate().open(decoder, [Question(None, "what?", ("red",))], train=True)[0][0]
    assert tokenizer.decode(ids) == "<s> w h a t ? \n" and answer.tolist()[:5] == [
        *tokenizer("red")["input_ids"][1:],
        1,
        -100,
    ]
    data = [Question(None, "what?", ("red",))] * 2
    zoo.fit(decoder, data, epochs=30, batch_size=2, lr=5e-2, task="generate", schedule="constant")
    assert Generate(answer_length=4).answer(decoder, [None], ["what?"]) == [
        tokenizer.decode(tokenizer("red")["input_ids"][1:])
    ]


def smol() -> tuple[zoo.Model, Any]:
    import transformers

    tokenizer = words("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
    images = transformers.Idefics3ImageProcessor(
        do_image_splitting=False, size={"longest_edge": 16}, max_image_size={"longest_edge": 16}
    )
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT)
    return tiny("smolvlm-256m"), processor


def llava() -> tuple[zoo.Model, Any]:
    import transformers

    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    more = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return tiny("llava-1.5-7b"), transformers.LlavaProcessor(
        images, words("<pad2>", "<image>"), chat_template=CHAT, **more
    )


@pytest.mark.parametrize("made", [smol, llava])
def test_processors_of_other_types(made: Any) -> None:
    """A row for each image; the scores are the library's for what the processor makes of the same text."""
    model, processor = made()
    model.family.processor = processor
    data = Generate().open(model, questions(), train=True)
    inputs, _ = collate([data[i] for i in (0, 3)])
    assert inputs[3].shape == (2, 1, 3, 16, 16) and int((inputs[0] == 4).sum()) == 2 * (4 if made is smol else 16)
    image = Image.open(io.BytesIO(picture("red")))
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    text = processor.apply_chat_template(message, tokenize=False)
    assert text.startswith("user: <image>what color?") and text.endswith("assistant:")
    given = processor(text=[text], images=[image], return_tensors="pt")
    assert torch.equal(given["input_ids"], inputs[0][:1])
    with torch.no_grad():
        found = model(*inputs[:2], None, *inputs[3:])[:1]
        torch.testing.assert_close(found, model.backbone(**given).logits, rtol=1e-4, atol=1e-4)
    assert len(Generate(answer_length=2).answer(model, [image], ["what color?"])) == 1


def test_a_processor_of_another_model_is_named() -> None:
    model, _ = llava()
    _, other = smol()
    other.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        Writer(other, other.tokenizer, ("pixel_values",), False, "some")
    model.family.processor = type("Odd", (), {"chat_template": None, "tokenizer": words()})()
    with pytest.raises(ConfigError, match="no chat template"):
        Generate().answer(model, [Image.new("RGB", (8, 8))], ["what?"])


def test_one_answer_that_is_no_tuple(model: zoo.Model) -> None:
    """`("red")` is a text: it was learnt letter by letter."""
    alone = Question(picture("red"), "what color?", "red")  # type: ignore[arg-type]
    assert alone.answers == ("red",)
    _, targets = collate([Generate().open(model, [alone], train=True)[0]])
    expected = model.family.writer().answer("red")  # type: ignore[attr-defined]
    assert targets[0, 0][: len(expected)].tolist() == expected


@pytest.mark.parametrize(
    ("images", "asked", "said"),
    [
        ([torch.zeros(3, 8, 8).numpy()], ["what?"], "item 0: the image is of the type ndarray.*fromarray"),
        ([picture("red")], [5], "item 0: the question is 5; expected a text"),
        (picture("red"), ["what?"], "images is one bytes; expected a list"),
        ([picture("red")], "what?", "questions is one str; expected a list"),
        (Image.new("RGB", (8, 8)), ["what?"], "images is one Image; expected a list"),
        ([], [], "The list of questions is empty"),
    ],
    ids=["pixels", "number", "one image's bytes", "one question", "one image", "nothing"],
)
def test_what_is_no_question_is_refused(model: zoo.Model, images: Any, asked: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Generate().answer(model, images, asked)


def test_a_text_beyond_the_context_is_refused(model: zoo.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read at places that the network has never learned, and something was answered."""
    family: Any = model.family
    long = [Question(picture("red", 64, 64), "what color? " * 9, ("red",))]
    ids = Generate().open(model, long, train=True)[0][0][0]
    flat = int((ids == family.image_token).sum())
    assert flat > 0
    monkeypatch.setattr(family.text_config, "max_position_embeddings", len(ids) - flat + 10)
    Generate().open(model, long, train=False)[0]  # an image takes the places of its rows and columns alone
    monkeypatch.setattr(family.text_config, "max_position_embeddings", len(ids) - flat + 9)
    with pytest.raises(DataError, match=f"item 0: the question has {len(ids) - flat} tokens and its answer up to 10"):
        Generate().answer(model, [picture("red", 64, 64)], ["what color? " * 9])
    trained = Generate().open(model, long, train=True)  # its answer is shorter
    assert len(trained[0][0][0]) == len(ids)
    Generate(question_length=4).open(model, long, train=False)[0]
    monkeypatch.setattr(family.text_config, "rope_parameters", {**family.text_config.rope_parameters, "factor": 2.0})
    Generate().open(model, long, train=False)[0]
