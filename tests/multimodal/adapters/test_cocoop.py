"""CoCoOp: what it is without its network, how many texts it reads, and texts of the user's own."""

from __future__ import annotations

import pytest
import torch

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT

from zoo.errors import ConfigError
from zoo.heads import image_text

NAMES = ["cat", "dog", "pick-up_truck"]
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def build(method: str, **settings: object) -> zoo.Model:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "vision_cfg": IMAGE, "text_cfg": {**TEXT, "context_length": 24}}
    adapter = zoo.adapter(method, **settings)
    return zoo.load("clip-micro", adapter, classes=NAMES, pretrained=False, **options).eval()  # type: ignore[arg-type]


def test_without_its_network_it_is_coop() -> None:
    model, coop = build("cocoop", init="", num_tokens=3), build("coop", num_tokens=3)
    coop.backbone.load_state_dict(model.backbone.state_dict())
    mine = model.adapters["cocoop"].module_at("text.blocks.0.tokens")
    with torch.no_grad():
        coop.adapters["coop"].module_at("text.blocks.0.tokens").context.copy_(mine.context)  # type: ignore[union-attr]
        assert not torch.allclose(model(IMAGES), coop(IMAGES))  # its start is not the template
        mine.up.weight.zero_()
        mine.up.bias.zero_()
        torch.testing.assert_close(model(IMAGES), coop(IMAGES))


def test_every_image_has_texts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """B K of them at once while training; without gradients a few images' at once, and the same answers."""
    model = build("cocoop", init="", num_tokens=3)
    runs: list[int] = []
    model.points["text.embed"].module.register_forward_hook(lambda m, a, y: runs.append(len(y)))
    expected = model.train()(IMAGES).detach()
    assert runs == [4 * 3]
    monkeypatch.setattr(image_text, "TEXTS", 7)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IMAGES), expected)
    assert runs[1:] == [6, 6]


def test_a_graph_takes_batches_of_any_size() -> None:
    """The number of images was read while the graph was made, and stood in it: no ONNX file could be written."""
    model = build("cocoop", init="", num_tokens=3)
    shapes = {"inputs": ({0: torch.export.Dim("batch")},)}
    with torch.no_grad():
        model(IMAGES)  # the texts' words are written
        graph = torch.export.export(model, (IMAGES,), dynamic_shapes=shapes, strict=False).module()
    for count in (1, 3, 4):
        torch.testing.assert_close(graph(IMAGES[:count]), model(IMAGES[:count]))


def test_texts_of_ones_own_are_left_alone() -> None:
    model = build("cocoop", init="", num_tokens=3)
    with torch.no_grad():
        found = model.features(texts=["a cat"])
        model.remove_adapter("cocoop")
        assert torch.equal(found, model.features(texts=["a cat"]))


def test_settings() -> None:
    assert build("cocoop", init="a cat").adapters["cocoop"].module_at("text.blocks.0.tokens").context.dim() == 2  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="has no word"):
        build("cocoop", init=" ")
