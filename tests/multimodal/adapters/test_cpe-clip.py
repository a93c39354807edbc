"""CPE-CLIP: prompts that become more from block to block, its start, and towers of unequal depth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT

from zoo.errors import ConfigError

NAMES = ["cat", "dog", "pick-up_truck"]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def build(layers: tuple[int, int] = (3, 3), **settings: Any) -> zoo.Model:
    torch.manual_seed(0)
    image, text = {**IMAGE, "layers": layers[0]}, {**TEXT, "layers": layers[1], "context_length": 24}
    options: dict[str, Any] = {"embed_dim": 32, "vision_cfg": image, "text_cfg": text}
    return zoo.load("clip-micro", zoo.adapter("cpe-clip", **settings), classes=NAMES, pretrained=False, **options)


@pytest.mark.parametrize(("vision", "lengths"), [("accumulate", [2, 4, 6]), ("replace", [2, 2, 2])])
def test_prompts_of_the_image_tower(vision: str, lengths: list[int]) -> None:
    model = build(vision=vision).eval()
    seen: list[Tensor] = []
    blocks: Any = model.backbone.visual.transformer.resblocks  # type: ignore[union-attr]
    for block in blocks:
        block.ln_1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(IMAGES)
        adapter: Any = model.adapters["cpe-clip"]
        made = [adapter.project(adapter.module_at(f"text.blocks.{i}.tokens").prompt) for i in (1, 2)]
    assert [x.shape[1] - 17 for x in seen] == lengths
    for x, prompts in zip(seen[1:], made, strict=True):  # the newest are as they were made
        torch.testing.assert_close(x[0, 1:3], prompts)


def test_start() -> None:
    model = build(num_tokens=4)
    vectors = torch.cat([p.detach() for k, p in model.parameters_to_train().items() if "tokens" in k])
    bound = math.sqrt(6 / (4 * 32 + 3 * 32))  # of a tensor (3 blocks, 4, 32), as torch counts its fans
    reference = torch.nn.init.xavier_uniform_(torch.empty(3, 4, 32))
    assert reference.abs().max() <= bound and 0.95 * bound < vectors.abs().max() <= bound
    assert vectors.shape == (12, 32)


@pytest.mark.parametrize("layers", [(3, 2), (2, 3)])
def test_towers_of_unequal_depth(layers: tuple[int, int]) -> None:
    model = build(layers)
    assert model.train().probe(IMAGES) == []
    assert model.num_parameters(trainable=True, head=False) == 3 * 2 * 32 + 32 * 48 + 48


def test_texts_of_ones_own_are_left_alone() -> None:
    model = build().eval()
    with torch.no_grad():
        found = model.features(texts=["a cat"])
        with model.disable():
            assert torch.equal(found, model.features(texts=["a cat"]))


def test_settings() -> None:
    assert build(depth=1).num_parameters(trainable=True, head=False) == 2 * 32 + 32 * 48 + 48
    with pytest.raises(ConfigError, match="depth"):
        zoo.adapter("cpe-clip", depth=0)
    with pytest.raises(ConfigError, match="vision"):
        zoo.adapter("cpe-clip", vision="accumalate")
