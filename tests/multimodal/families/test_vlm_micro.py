"""`vlm-micro`, the small Qwen2-VL that comes with the package."""

import os
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import zoo
from multimodal.data.exercises import Exercise
from multimodal.families.vlm.micro import FIRST, MICRO, SPECIAL, TAGS, micro_merges, micro_processor, micro_tokenizer
from multimodal.regimes.parts.tuning import write
from zoo.errors import ConfigError

DATA = Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")) / "easy_vqa"


def test_every_text_can_be_written_and_tags_stay():
    tokenizer = micro_tokenizer()
    for text in ("what color is the shape?", "Ünïcode 日本\n\t", "<think>red circle</think><answer>B</answer>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer(" circle")["input_ids"]) == len(tokenizer("<answer>")["input_ids"]) == 1
    assert tokenizer.convert_tokens_to_ids([*SPECIAL, *TAGS]) == list(range(FIRST, FIRST + 11)) == list(range(397, 408))
    assert len(micro_merges()) == FIRST - 256 and len(tokenizer) <= MICRO["text_config"]["vocab_size"]


def test_it_is_the_library_s_class_and_small(tmp_path):
    model = zoo.load("vlm-micro")
    assert type(model.backbone).__name__ == "Qwen2VLForConditionalGeneration"
    assert (
        model.num_parameters() == 708_992 and model.family.licence() == "apache-2.0" and model.family.hub_id() is None
    )
    weights = files("multimodal") / "weights"
    assert sum((weights / f"vlm-micro.{kind}").stat().st_size for kind in ("safetensors", "merges.txt")) < 8e6
    assert model.family.processor is model.family.processor
    assert model.backbone.generation_config.eos_token_id == model.family.tokenizer.eos_token_id
    model.family.processor.save_pretrained(tmp_path)  # and the library reads what it saves
    again = __import__("transformers").AutoProcessor.from_pretrained(tmp_path)
    assert (
        again.tokenizer("is there not a red shape?").input_ids
        == micro_tokenizer()("is there not a red shape?").input_ids
    )
    with pytest.raises(ConfigError, match="do not fit these options"):
        zoo.load("vlm-micro", text_config={"num_hidden_layers": 2})
    assert (
        len(
            zoo.load(
                "vlm-micro", pretrained=False, text_config={"num_hidden_layers": 2}
            ).backbone.model.language_model.layers
        )
        == 2
    )


def test_examples_hold_no_places_for_images_but_those_of_their_image():
    model = zoo.load("vlm-micro", pretrained=False)
    ids, mask, answer, *_ = model.example_batch(64)
    image, video = model.backbone.config.image_token_id, model.backbone.config.video_token_id
    assert ids.eq(image).sum(1).tolist() == [64] * 64 and not ids.eq(video).any() and mask.unique().tolist() == [0, 1]
    assert not (answer.eq(image) | answer.eq(video)).any() and len(answer.unique()) > 100


def test_an_adapter_is_saved_and_loaded_by_its_name(tmp_path):
    batch = zoo.load("vlm-micro").example_batch(2)
    model = zoo.load("vlm-micro", zoo.adapter("lora", targets="all-linear"))
    assert model.probe(*batch) == []
    for p in model.parameters_to_train().values():
        torch.nn.init.normal_(p, std=0.1)
    model.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out")
    assert again.backbone_name == "vlm-micro"
    torch.testing.assert_close(again(*batch), model(*batch), rtol=0, atol=0)


@pytest.mark.skipif(not DATA.exists(), reason="without easy_vqa")
def test_it_answers_questions_about_drawings():
    images = dict(zip(*pq.read_table(DATA / "test_images.parquet").to_pydict().values(), strict=True))
    rows = [
        r
        for r in pq.read_table(DATA / "test_questions.parquet").to_pylist()
        if r["question"].startswith("what color is")
    ]
    asked = [Exercise(images[r["image_id"]], r["question"], r["answer"]) for r in rows[:24]]
    model = zoo.load("vlm-micro")
    plain = write(model, asked, "", length=4)
    assert sum(text == e.answer for text, e in zip(plain, asked, strict=True)) >= 20
    thought = write(model, asked[:6], "think, then answer.", length=12)
    assert all(text.startswith("<think>") and text.endswith("</answer>") for text in thought)
    assert micro_processor().image_processor.patch_size == 8


def test_an_adapter_fits_it_in_half_precision(tmp_path: Path) -> None:
    model = zoo.load("vlm-micro", zoo.adapter("lora", targets="text.**.{q,v}"))
    model.save_adapter(tmp_path)
    half = zoo.load(adapter=tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.fingerprint == model.fingerprint
