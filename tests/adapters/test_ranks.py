"""A rank is at most the smaller side of a weight: more are refused of a fresh adapter, kept of values that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import AttachError

TINY: dict[str, Any] = {"pretrained": False, "seed": 0, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 2}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {}),
        ("lora", {"dora": True}),
        ("lora", {"rank": 4, "ranks": {"v": 25}}),
        ("adalora", {"target_rank": 8}),
        ("dylora", {}),
        ("unipelt", {}),
        ("petalface", {}),
        ("dsee", {"places": "random"}),
        ("light-peft", {}),
        ("perp", {}),
        ("perp", {"update": "scale"}),
        ("pst", {}),
        ("l4q", {}),
    ],
)
def test_more_ranks_than_the_weight_has_are_refused(method: str, settings: dict[str, Any]) -> None:
    name = "blocks.0.attn.v" if "ranks" in settings else r"blocks\.0\.attn\.[qkv]"
    with pytest.raises(
        AttachError, match=rf"rank 25, and .* weight of '{name}', .* has rank 24 at most.*Expected 1 to 24"
    ):
        zoo.load("vit-micro", zoo.adapter(method, **{"rank": 25, **settings}), **TINY)
    if "ranks" not in settings:
        zoo.load("vit-micro", zoo.adapter(method, **{"rank": 24, **settings}), device="meta", **TINY)


def test_the_default_is_kept_by_networks_that_are_narrower_still() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    model = zoo.wrap(layers, example=torch.randn(2, 4))
    model.add_adapter(zoo.adapter("lora", targets=("0", "2")))
    assert model.num_parameters(trainable=True) == 2 * 8 * (4 + 4)
    with pytest.raises(AttachError, match=r"rank 9, and .* has rank 4 at most"):
        model.add_adapter(zoo.adapter("lora", rank=9, targets=("0", "2")), "more")


@pytest.mark.parametrize(
    ("method", "setting"), [("increlora", "target_rank"), ("triadaptlora", "target_rank"), ("pst", "mask_rank")]
)
def test_so_are_more_to_grow_to_and_more_for_scores(method: str, setting: str) -> None:
    with pytest.raises(AttachError, match=rf"'{method}' has {setting} 25, .* has rank 24 at most.*Expected 1 to 24"):
        zoo.load("vit-micro", zoo.adapter(method, **{setting: 25}), **TINY)
    zoo.load("vit-micro", zoo.adapter(method, **{setting: 24}), device="meta", **TINY)


def test_of_a_convolution_it_is_that_of_its_matrix() -> None:
    """A stem of 3 x 4 x 4 numbers to 96 channels."""
    wide = {**TINY, "embed_dim": 96}
    with pytest.raises(AttachError, match="has rank 48 at most"):
        zoo.load("vit-micro", zoo.adapter("lora", rank=49, targets="patch"), **wide)
    zoo.load("vit-micro", zoo.adapter("lora", rank=48, targets="patch"), **wide)


def test_narrow_targets_keep_a_rank_that_wide_ones_can_use() -> None:
    """A hierarchical network has stages of 8 and of 16 channels: one rank for both, as peft's."""
    swin = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    options: dict[str, Any] = {"pretrained": False, "num_classes": 2, "device": "meta", **swin}
    model = zoo.load("swin-t", zoo.adapter("lora", rank=16), **options)
    assert {tuple(p.shape) for n, p in model.parameters_to_train().items() if "lora_a" in n} == {(16, 8), (16, 16)}
    with pytest.raises(AttachError, match=r"rank 17, and .* 'stages.1.*has rank 16 at most"):
        zoo.load("swin-t", zoo.adapter("lora", rank=17), **options)
    with pytest.raises(AttachError, match=r"rank 9, and .* 'stages.0.*has rank 8 at most"):
        zoo.load("swin-t", zoo.adapter("lora", rank=16, ranks={"stages.0.**": 9}), **options)


def test_values_keep_the_ranks_that_they_have(tmp_path: Path) -> None:
    """A weighted sum puts ranks side by side; saved and loaded it stays what it is."""
    model = zoo.load("vit-micro", zoo.adapter("lora", rank=16), **TINY)
    model.add_adapter(zoo.adapter("lora", rank=16), "second")
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=0.1)
    model.combine({"lora": 0.5, "second": 2.0}, "both")
    x = torch.randn(2, 3, 32, 32)
    expected = model.eval()(x)
    model.save_adapter(tmp_path / "both")
    again = zoo.load("vit-micro", tmp_path / "both", **TINY)
    assert again.adapters["both"].rank == 32  # type: ignore[attr-defined]
    assert torch.equal(again(x), expected)
    again.copy_adapter("both", "twin")
