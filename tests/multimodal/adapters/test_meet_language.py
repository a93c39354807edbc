"""MEET's controls in networks that write text: under beams, and beside eyes in which the images of all samples stand together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from zoo.errors import AttachError

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

from vlm_models import TINY, tiny

from zoo.table import tiny_model

MIXED = ["good", "bad"]
LORA: dict[str, Any] = {"qualities": ("good", "bad"), "form": "lora", "rank": 2}


def stirred(model: zoo.Model) -> zoo.Model:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters["meet"].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model.eval()


@pytest.mark.parametrize("name", sorted(TINY))
def test_controls_stand_in_the_language_of_a_network_with_eyes(name: str) -> None:
    """Each sample is given what it is given alone; nothing of the eyes is touched."""
    model = tiny(name)
    batch = model.family.tiny_batch()
    bare = model(*batch)
    model.add_adapter(zoo.adapter("meet", **LORA))
    assert torch.equal(model(*batch, context={"quality": MIXED}), bare)
    assert all(key.startswith("meet/text.") for key in model.parameters_to_train())
    assert model.probe(*batch) == []
    stirred(model)
    whole = model(*batch, context={"quality": MIXED})
    assert not torch.allclose(whole, model(*batch, context={"quality": MIXED[::-1]}))
    for i, quality in enumerate(MIXED):
        alone = model(*(part[i : i + 1] for part in batch), context={"quality": quality})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_place_where_images_of_all_samples_stand_together_is_refused() -> None:
    model = tiny("qwen2-vl-2b")
    for targets in ("q", "visual.**.attn.q", "projector.fc1"):
        with pytest.raises(AttachError, match="the images of all samples stand together"):
            model.add_adapter(zoo.adapter("meet", targets=targets, **LORA))
    assert not model.adapters
    model.add_adapter(zoo.adapter("meet", targets="text.**.mlp.up", **LORA))
    assert {key.rpartition(".")[0] for key in model.parameters_to_train()} == {
        f"meet/text.blocks.{i}.mlp.up" for i in range(2)
    }


def written(model: Any, batch: tuple[torch.Tensor, ...], rows: slice, quality: Any) -> list[list[int]]:
    """Five words by three beams for some rows of a batch."""
    ids, mask, _, *seen = (part[rows] for part in batch)
    options: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    if model.family.beams and seen:
        options |= {"visual_features": seen[0], "boxes": seen[1]}
    with model.context(quality=quality):
        made = model.passing(
            lambda: model.backbone.generate(
                input_ids=ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **options
            ),
            ids,
            mask,
        )
    return [row[-5:].tolist() for row in made]


@pytest.mark.parametrize("family", ["vl-t5", "decoder"])
def test_all_beams_of_a_sample_have_its_control(family: str) -> None:
    model, batch = tiny_model(family)
    model.add_adapter(zoo.adapter("meet", **LORA))
    stirred(model)
    whole = written(model, batch, slice(None), MIXED)
    assert whole == [written(model, batch, slice(i, i + 1), MIXED[i])[0] for i in range(2)]
    assert whole != written(model, batch, slice(None), MIXED[::-1])


def test_questions_are_answered_by_beams_with_controls() -> None:
    from PIL import Image

    from multimodal.tasks.generate import Generate

    model = zoo.load("vlm-micro", zoo.adapter("meet", **LORA))
    stirred(model)
    images, questions = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")], ["what color is it?"] * 2
    task = Generate(beams=2, answer_length=4)
    with model.context(quality=MIXED):
        whole = task.answer(model, images, questions)
    for i in range(2):
        with model.context(quality=MIXED[i]):
            assert task.answer(model, images[i : i + 1], questions[:1]) == whole[i : i + 1]
