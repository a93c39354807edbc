"""LLaMA-Adapter V2's two streams on a small decoder: who trains what, and that an image decides the answer afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from multimodal.data.questions import Question, open_questions
from zoo.errors import ConfigError, DataError

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

from multimodal.families.seq2seq.words import tokenizer
from multimodal.regimes.llama_adapter_v2 import WithEye
from multimodal.tasks.generate import Generate

NAME = "llama-adapter-v2"
WORDS = ["say", "what", "is", "it", "?", "red", "blue", "yes", "no", "describe", "the", "image", "."]
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 128,
    "initializer_range": 0.2,
}
FIT: dict[str, Any] = {"batch_size": 2, "progress": False}


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    own = {"num_tokens": 2, "eye_dim": 4, "visual_width": 8, "visual_heads": 2, "visual_depth": 1, **settings}
    model = zoo.load("llama-7b", zoo.adapter(NAME, **own), pretrained=False, **SIZE)
    model.family.tokenizer = tokenizer(WORDS)
    return model


def captions() -> list[Question]:
    """The eye's tokens say which of two colours it is."""
    found = []
    for i in range(4):
        tokens = torch.zeros(3, 4)
        tokens[:, i % 2] = 1.0
        found.append(Question((tokens, None), None, (("red", "blue")[i % 2],), i))
    return found


def instructions() -> list[Question]:
    return [Question(None, f"say {word}", (word,), word) for word in ("yes", "no")]


def data() -> dict[str, Any]:
    return {"captions": open_questions(captions()), "instructions": open_questions(instructions())}


def run(model: Any, **settings: Any) -> Any:
    own = {"data": data(), "epochs": 1, "answer_length": 3, "fit": FIT, **settings}
    return zoo.run(model, NAME, own.pop("data"), own.pop("test", None), **own)


def test_each_stream_is_learned_and_the_image_counts() -> None:
    """The network is random and frozen, so what the image alone can make it write is little; it is less likely with another."""
    model = build()
    report = run(model, test=open_questions(instructions()), epochs=40, lr=3e-2, tau=0.0)
    assert [p["name"] for p in report.phases] == ["joint"] and report.summary["exact_match"] == 1.0
    task = WithEye(Generate(answer_length=3))
    swapped = [Question(captions()[1 - i].image, None, captions()[i].answers, i) for i in range(2)]
    right, wrong = (
        zoo.evaluate(model, data, task=task, record="", progress=False)["loss"] for data in (captions(), swapped)
    )
    assert right < wrong - 0.1


def test_one_after_the_other() -> None:
    model = build(form="7b")
    named = dict(model.adapters[NAME].named_parameters())
    groups = model.adapters[NAME].groups()
    sizes = {group: sum(named[n].numel() for n in names) for group, names in groups.items()}
    report = run(model, data={"captions": captions(), "instructions": instructions()}, stages="apart", caption_epochs=1)
    assert [p["name"] for p in report.phases] == ["captions", "instructions"]
    assert [p["parameters"] for p in report.phases] == [sizes["vision"] + sizes["prompts"], sizes["tuned"]]


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"data": {"captions": open_questions(captions())}}, {}, "none is empty"),
        (
            {"data": {"captions": open_questions(instructions()), "instructions": open_questions(captions())}},
            {},
            "image",
        ),
        ({"stages": "apart"}, {}, "is of fusion='late'"),
        ({}, {"fusion": "late"}, "is of fusion='early'"),
        ({}, {"disjoint": False}, "disjoint"),
        ({"stages": "thrice"}, {}, "expected 'joint' or 'apart'"),
        ({"test": captions() + instructions()}, {}, "give one kind of them"),
    ],
)
def test_what_does_not_fit_is_told_first(settings: dict[str, Any], given: dict[str, Any], message: str) -> None:
    model = build(**given)
    before = {n: p.detach().clone() for n, p in model.adapters[NAME].named_parameters()}
    with pytest.raises((ConfigError, DataError), match=message):
        run(model, **settings)
    assert all(torch.equal(p, before[n]) for n, p in model.adapters[NAME].named_parameters())


def test_pictures_without_an_eye_are_refused() -> None:
    from PIL import Image

    pictures = open_questions([Question(Image.new("RGB", (8, 8)), None, ("red",), 0)])
    with pytest.raises(DataError, match="no eye that sees them"):
        run(build(), data={"captions": pictures, "instructions": open_questions(instructions())})
