"""CLIP: which tower is adapted, names and weights, preprocessing, texts."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import zoo

pytest.importorskip("open_clip")
import open_clip
from clip_models import IMAGE, TEXT, batch, make

from zoo.errors import ConfigError, DataError, MismatchError, UnknownNameError

LINEARS = ("q", "k", "v", "o", "up", "down")


# -- the towers and the classifier ----------------------------------------------------------------------------------------


def test_with_a_classifier_the_image_tower_alone_is_adapted(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vision_cfg": IMAGE, "text_cfg": TEXT, "embed_dim": 24, "pretrained": False}
    torch.manual_seed(0)
    model = zoo.load("clip-micro", "lora", num_classes=5, **small)
    for p in model.adapters.parameters():
        nn.init.normal_(p, std=0.1)
    images = torch.randn(3, 3, 16, 16)
    assert {p.tower for p in model.points} == {"image"} and model(images).shape == (3, 5)
    assert model.backbone_kwargs["tower"] == "image"
    assert model.probe(images) == []
    folder = model.save_adapter(tmp_path / "saved")
    for name, options in ((None, {"pretrained": False}), ("clip-micro", small)):
        torch.manual_seed(0)
        again = zoo.load(name, adapter=folder, **options)
        assert {p.tower for p in again.points} == {"image"} and torch.equal(again(images), model(images))
    assert make("plain", zoo.adapter("full"), num_classes=5).probe(images.double()) == []
    model.reset_head(0)
    assert model(images, ["a", "b"]).shape == (3, 2)


def test_one_tower() -> None:
    for tower in ("image", "text"):
        model = make("plain", zoo.adapter("lora"), tower=tower)
        assert {p.tower for p in model.points} == {tower}
        assert model.probe(*batch(model)) == []
        full = make("plain", zoo.adapter("full"), tower=tower)
        assert full.probe(*batch(full)) == []
        keys = [k.removeprefix("full/backbone.") for k in full.parameters_to_train()]
        assert all(k.startswith("visual.") == (tower == "image") for k in keys)
    with pytest.raises(ConfigError, match="image, text, both"):
        make("plain", tower="both towers")
    with pytest.raises(ConfigError, match="image tower"):
        make("plain", tower="text", num_classes=3)


def test_what_is_not_described_is_refused() -> None:
    model = zoo.load("open_clip:RN50", "lora", device="meta", tower="text")
    assert {p.tower for p in model.points} == {"text"}
    with pytest.raises(MismatchError, match="CoCa"):
        zoo.load("open_clip:coca_ViT-B-32", device="meta")
    model = zoo.load("open_clip:swin_base_patch4_window7_224", "lora", device="meta", tower="image")
    assert model.num_parameters(trainable=True, head=False) > 0 and model.points.kinds == ("linear", "norm")


@pytest.mark.parametrize("trunk", ["vit_pe_core_tiny_patch16_384", "eva02_tiny_patch14_224"])
def test_towers_with_rotary_positions(trunk: str) -> None:
    """Their queries and keys are turned, and EVA's biases stand beside the projection: there are points of every kind, and what
    is asked of both towers is done in both (vpt left the image tower out, LoRA on q and v that of EVA01-g)."""
    options: dict[str, Any] = {
        "pretrained": False,
        "vision_cfg": {"timm_model_name": trunk},
        "text_cfg": TEXT,
        "embed_dim": 24,
        "image_size": 64 if "16" in trunk else 28,
    }
    model = zoo.load("open_clip:EVA02-B-16", **options).double()
    points = model.points.select(tower="image")
    assert {p.kind for p in points} == {"linear", "sublayer", "norm", "block", "attention", "tokens"}
    assert {"q", "k", "v", "o", "up", "down"} <= {p.role for p in points}
    for method in ("lora", "vpt", "prefix", "bitfit", "norm"):
        model.add_adapter(method)
        named = [key for key, _ in model.adapters[method].named_parameters()]
        assert {key.split(".")[0] for key in named} == {"image", "text"}
        assert model.probe(*batch(model)) == []
        model.remove_adapter(method)


@pytest.mark.parametrize(
    "name", ["EVA01-g-14", "EVA02-E-14", "EVA02-B-16", "PE-Core-B-16", "ViT-B-16-SigLIP2", "MobileCLIP-B"]
)
def test_every_kind_of_points_in_both_towers(name: str) -> None:
    """At full size; every normalisation and every linear layer of the library's module is a point."""
    model = zoo.load(f"open_clip:{name}", device="meta")
    for tower in ("image", "text"):
        kinds = {p.kind for p in model.points if p.tower == tower}
        assert kinds >= {"linear", "sublayer", "norm", "block", "attention", "tokens"}
    norms = {
        id(m) for m in model.backbone.modules() if "Norm" in type(m).__name__ and list(m.parameters(recurse=False))
    }
    assert {id(p.module) for p in model.points if p.kind == "norm"} == norms
    linears = {id(m) for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)}
    assert linears <= {id(p.module) for p in model.points if p.kind == "linear"}
    split = {p.role for p in model.points if p.tower == "image" and p.kind == "linear"}
    assert split >= set(LINEARS) and ("gate" in split) == (name == "EVA02-B-16")


def test_text_towers_of_transformers_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their configuration comes from the Hub, also for random weights: torch's and huggingface's errors came out."""

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ConfigError, match=r"text tower of 'open_clip:roberta-ViT-B-32'.*Hub.*no network"):
        zoo.load("open_clip:roberta-ViT-B-32", pretrained=False, device="meta")


# -- names, weights, preprocessing ----------------------------------------------------------------------------------------


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from multimodal.families.clip import micro as clip_micro

    monkeypatch.setattr(clip_micro, "WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="pretrained=False"):
        zoo.load("clip-micro")
    with pytest.raises(ConfigError, match="laion2b_s34b_b79k"):
        zoo.load("open_clip:ViT-B-32")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(ConfigError, match=r"no network.*pretrained=False"):
        zoo.load("clip-vit-b32")
    with pytest.raises(ConfigError, match="does not take"):
        zoo.load("clip-micro", pretrained=False, embedding=3)
    with pytest.raises(UnknownNameError, match="ViT-B-32"):
        zoo.load("open_clip:ViT-B-33")


def test_weights_of_open_clip_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`pretrained` goes through the library: a file in the library's layout."""
    torch.manual_seed(3)
    small = {
        "vision_cfg": {"layers": 1, "width": 64, "image_size": 32},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2},
    }
    config = open_clip.get_model_config("ViT-B-32")
    theirs = open_clip.CLIP(
        16,
        {**config["vision_cfg"], **small["vision_cfg"]},
        {**config["text_cfg"], **small["text_cfg"]},
        quick_gelu=True,
    )
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "clip.pt"))
    model = zoo.load("clip-vit-b32", embed_dim=16, **small)
    images, ids = torch.randn(2, 3, 32, 32), model.family.tokenize(["a cat", "two dogs in the snow"])  # type: ignore[attr-defined]
    torch.testing.assert_close(model(images, ids), theirs.eval().get_logits(images, ids)[0], rtol=0, atol=1e-5)
    assert model.family.hub_id() == "timm/vit_base_patch32_clip_224.openai" and model.family.licence() == "mit"


@pytest.mark.parametrize(("name", "size"), [("clip-vit-b32", 224), ("siglip-b16", 224), ("clip-micro", 32)])
def test_preprocessing_is_open_clips(name: str, size: int) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = zoo.load(name, device="meta")
    pixels = np.random.default_rng(0).integers(0, 255, (75, 100, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 260))
    theirs = image_transform_v2(PreprocessCfg(**model.backbone.visual.preprocess_cfg), is_train=False)(image)  # type: ignore[union-attr,arg-type]
    ours = model.preprocess()(image)
    assert ours.shape == (3, size, size) and torch.equal(ours, theirs)
    assert model.preprocess(train=True)(image).shape == (3, size, size)


def test_a_vit_fits_into_the_image_tower_of_micro() -> None:
    from timm.models.vision_transformer import VisionTransformer

    from multimodal.families.clip.micro import load_vit

    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=100).eval()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    model = zoo.load("clip-micro", pretrained=False)
    tower: Any = model.backbone.visual
    load_vit(tower, vit.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = vit.forward_head(vit.forward_features(images), pre_logits=True) @ tower.proj
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.backbone.parameters()) * 2 < 8_000_000


# -- texts ----------------------------------------------------------------------------------------------------------------


def test_texts_are_tokens_of_open_clip() -> None:
    model = zoo.load("clip-vit-b32", device="meta")
    family: Any = model.family
    texts = ["a photo of a cat", "Two dogs!"]
    assert torch.equal(family.tokenize(texts), open_clip.get_tokenizer("ViT-B-32")(texts))
    assert family.tokenize("word " * 75).shape == (1, 77)
    with pytest.raises(DataError, match=r"text 1 has 78 tokens.*77.*'word word"):
        family.tokenize(["short", "word " * 76])
    cut = family.tokenize("word " * 76, truncate=True)
    assert torch.equal(cut, open_clip.get_tokenizer("ViT-B-32")("word " * 76)) and cut[0, -1] == 49407
    for wrong, reason in ((["a", "  "], "text 1 is empty"), ([3], "int"), ([], "no texts")):
        with pytest.raises(DataError, match=reason):
            family.tokenize(wrong)


def test_the_short_vocabulary_of_micro() -> None:
    model = zoo.load("clip-micro", pretrained=False)
    family: Any = model.family
    ids = family.tokenize(["a photo of a zebra, running", "éàü \U0001f600"])
    assert ids.shape == (2, 64) and ids.max() == 3071 and ids[0, 0] == 3070
    assert torch.equal(ids.argmax(1), (ids == 3071).int().argmax(1))  # the end is where the embedding is read
    from multimodal.families.clip.text import tokenizer

    words = tokenizer("zoo:clip-micro", 64, 3072)
    end = int(ids[0].argmax())
    assert words.decode(ids[0, 1:end].tolist()).strip() == "a photo of a zebra , running"
    full = open_clip.get_tokenizer("ViT-B-32")
    assert words.encode("a photo of the dog") == full.encode("a photo of the dog") or len(words.encode("a dog")) == 2
    assert model(torch.randn(1, 3, 32, 32), ["a dog", "a cat"]).shape == (1, 2)
    with pytest.raises(DataError, match="64"):
        model.features(texts=["zebra " * 40])
    with pytest.raises(DataError, match=r"\(1, 65\)"):
        model.features(texts=torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(DataError, match="neither"):
        model.features()


def test_tokenizers_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's: the length is that of its own tokenizer, without the cut."""
    from multimodal.families.clip import text as clip_text

    class Words:
        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=[7] * (len(text.split()) + 1))

    class Hub:
        tokenizer, tokenizer_mode = Words(), ""

        def clean_fn(self, text: str) -> str:
            return text.replace(".", "")

        def __call__(self, texts: list[str], context_length: int) -> torch.Tensor:
            return torch.ones(len(texts), context_length, dtype=torch.long)

    assert clip_text.tokenize(Hub(), "one two three .", 4).shape == (1, 4)
    with pytest.raises(DataError, match="has 5 tokens"):
        clip_text.tokenize(Hub(), "one two three four", 4)
    assert clip_text.tokenize(Hub(), "one two three four", 4, truncate=True).shape == (1, 4)

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    clip_text.tokenizer.cache_clear()
    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(ConfigError, match=r"no network.*token ids"):
        zoo.load("siglip-b16", device="meta").family.tokenize("a cat")  # type: ignore[attr-defined]


def test_random_weights_that_were_asked_for_are_no_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one message of open_clip is kept back, and only around the call."""
    real = open_clip.create_model

    def create(*arguments: Any, **options: Any) -> Any:
        logging.warning("another one")
        return real(*arguments, **options)

    monkeypatch.setattr(open_clip, "create_model", create)
    filters = list(logging.getLogger().filters)
    small: dict[str, Any] = {"vision_cfg": IMAGE, "text_cfg": TEXT, "embed_dim": 24}
    for options in ({"device": "meta"}, {"pretrained": False}):
        zoo.load("open_clip:ViT-B-32", **options, **small)
    assert caplog.messages == ["another one"] * 2 and logging.getLogger().filters == filters
    real("ViT-B-32", load_weights=False, device="meta")
    assert caplog.messages[2].startswith("No pretrained weights loaded")
