"""Zero-shot classifiers of class names and templates, against open_clip's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo

pytest.importorskip("open_clip")
import open_clip
from clip_models import MICRO, TEXT, batch, make

from zoo.errors import ConfigError, DataError

CLASSES = ("cat", "dog", "pick-up truck")
TEMPLATES = ("a photo of a {}.", lambda name: f"the {name}", "{}")


@pytest.mark.parametrize("kind", ["plain", "no mask"])
def test_zero_shot_classifier_is_open_clips(kind: str, tmp_path: Path) -> None:
    from multimodal.tasks.zero_shot import encode_image, put_zero_shot_classifier
    from zoo.disk import attach, read

    text_cfg = {**TEXT, **MICRO[kind].get("text_cfg", {}), "context_length": 24}
    model = make(kind, zoo.adapter("lora", rank=2), text_cfg=text_cfg)
    own, (images, _) = model.merge(), batch(model)
    head = put_zero_shot_classifier(model, CLASSES, TEMPLATES)
    assert model.num_classes == 3 and model.classes == list(CLASSES) and head.weight.requires_grad
    family: Any = model.family
    functions = [lambda name, t=t: t.format(name) if isinstance(t, str) else t(name) for t in TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(own, family.tokenize, CLASSES, functions)
    scores = own.logit_scale.exp() * own.encode_image(images, normalize=True) @ theirs  # type: ignore[operator]
    if own.logit_bias is not None:
        scores = scores + own.logit_bias
    torch.testing.assert_close(model(images), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode_image(model, images), own.encode_image(images, normalize=True))  # type: ignore[operator]

    head = put_zero_shot_classifier(model, CLASSES, TEMPLATES[:1])
    texts = family.tokenize([f"a photo of a {name}." for name in CLASSES])
    torch.testing.assert_close(model(images), model.features(images, texts), rtol=1e-5, atol=1e-5)

    folder = model.save_adapter(tmp_path / "zero-shot")
    again = make(kind, text_cfg=text_cfg)
    attach(again, read(folder))
    assert again.classes == list(CLASSES) and type(again.head) is type(head)
    assert torch.equal(again(images), model(images))


def test_zero_shot_asks_for_names_and_places() -> None:
    from multimodal.tasks.zero_shot import encode_text, zero_shot_classifier

    model = make("plain")
    for classes, templates, reason in (
        ((), ("{}",), "names"),
        (("a",), (), "template"),
        (("a",), ("a photo",), "place"),
    ):
        with pytest.raises(ConfigError, match=reason):
            zero_shot_classifier(model, classes, templates)
    with pytest.raises(ConfigError, match="of the class name ' ' no token is left"):
        zero_shot_classifier(model, ["a", " "])
    with pytest.raises(DataError, match="tokens"):
        zero_shot_classifier(model, ["a very long name of a class indeed, with many words"])
    torch.testing.assert_close(encode_text(model, ["a", "b"]).norm(dim=-1), torch.ones(2, dtype=torch.double))
    with pytest.raises(ConfigError, match="width"):
        model.set_head(nn.Linear(7, 3))
    vit = zoo.load("vit-micro", pretrained=False, num_classes=0, depth=1)
    with pytest.raises(DataError, match="text tower"):
        zero_shot_classifier(vit, ["a"])


def test_a_template_is_a_text_with_one_place_and_no_format() -> None:
    """Braces of another kind broke off with Python's own errors of `str.format`."""
    from multimodal.tasks.zero_shot import put_zero_shot_classifier

    model, spelt = (make("plain", text_cfg={**TEXT, "context_length": 24}) for _ in range(2))
    found = put_zero_shot_classifier(model, ("cat", "dog"), ("{} {} {x}",))
    wanted = put_zero_shot_classifier(spelt, ("cat", "dog"), (lambda name: f"{name} {name} {{x}}",))
    torch.testing.assert_close(found.weight, wanted.weight)
