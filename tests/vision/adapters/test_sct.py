"""SCT: what it adds and where, which channels it takes, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import ConfigError

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


BATCHES = [(images(), torch.tensor([0, 2, 2, 0])), (images(2) + 1, torch.tensor([2, 4]))]


def load(calibrated: bool = True, shaken: bool = True, **config: Any) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load(
        "vit-micro", zoo.adapter("sct", **{"channels": 5, **config}), pretrained=False, num_classes=5, **TINY
    )
    sct: Any = model.adapters["sct"]
    if calibrated:
        sct.calibrate(model, BATCHES)
    if shaken:
        with torch.no_grad():
            for p in sct.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def test_against_the_equation_at_the_residual_stream() -> None:
    model, x = load(), images()
    sct: Any = model.adapters["sct"]
    vit: Any = model.backbone
    with model.disable(), torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(x))
        for i, block in enumerate(vit.blocks):
            part = sct.module_at(f"blocks.{i}.mlp")
            u = tokens + block.attn(block.norm1(tokens))
            chosen = sct.plan["channels"][f"blocks.{i}.mlp"]
            u[..., chosen] = u[..., chosen] + u[..., chosen] @ part.weight.T + part.bias
            tokens = u + block.mlp(block.norm2(u))
        expected = model.head(vit.norm(tokens)[:, 0])  # type: ignore[operator]
    torch.testing.assert_close(model(x), expected)


def test_channels_are_those_of_the_largest_norms() -> None:
    """Of each class over its images and patches, without the class token, averaged over the classes that occur."""
    model = load(shaken=False)
    vit: Any = model.backbone
    seen: dict[int, list[Tensor]] = {0: [], 2: [], 4: []}
    with model.disable(), torch.no_grad():
        for x, labels in BATCHES:
            tokens = vit._pos_embed(vit.patch_embed(x))
            u = tokens + vit.blocks[0].attn(vit.blocks[0].norm1(tokens))
            for row, label in zip(u, labels.tolist()):
                seen[label].append(row[1:])
    score = torch.stack([torch.cat(rows).norm(dim=0) for rows in seen.values()]).mean(dim=0)
    expected = sorted(score.topk(5).indices.tolist())
    assert model.adapters["sct"].plan["channels"]["blocks.0.mlp"] == expected  # type: ignore[index]
    assert model.active == ("sct",)


def test_batches_of_several_inputs_and_by_name() -> None:
    model = load()
    sct: Any = model.adapters["sct"]
    expected = sct.plan
    for given in (lambda x: (x,), lambda x: [x.double()], lambda x: {"x": x.double()}):
        sct.calibrate(model, [(given(x), labels) for x, labels in BATCHES])
        assert sct.plan == expected


def test_a_start_at_the_pretrained_function() -> None:
    model, x = load(shaken=False, std=0.0), images()
    adapted = model(x)
    with model.disable():
        assert torch.equal(adapted, model(x))
    assert model.train().probe(x) == []


@pytest.mark.parametrize("at", ["mlp", "qkv"])
def test_merges_where_a_weight_holds_it(at: str) -> None:
    model, x = load(at=at), images()
    model.add_adapter(zoo.adapter("lora", targets="all-linear", rank=2))
    with torch.no_grad():
        for p in model.adapters["lora"].parameters():
            p.add_(0.1)
        for order in (("sct", "lora"), ("lora", "sct")):
            model.set_active(*order)
            torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(zoo.ZooError, match="residual stream, which no weight holds"):
        load().merge()


def test_the_choice_is_saved_and_checked(tmp_path: Path) -> None:
    model, x = load(), images()
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False)
    assert torch.equal(again(x), model(x))
    plan = model.adapters["sct"].plan
    assert plan is not None
    for damage in (
        {"channels": {"blocks.0.mlp": [0, 1, 2, 3, 4]}},
        {"channels": {**plan["channels"], "blocks.0.mlp": [0, 1, 2, 3, 48]}},
        {"channels": {**plan["channels"], "blocks.0.mlp": [0, 1, 2, 3, 3]}},
        {"channels": None},
    ):
        broken = zoo.adapter("sct", channels=5)
        broken.plan = damage  # type: ignore[assignment]
        with pytest.raises(zoo.ZooError, match="the plan of 'sct' is"):
            zoo.load("vit-micro", broken, pretrained=False, num_classes=5, **TINY)


def test_it_has_to_see_data() -> None:
    model = load(calibrated=False)
    with pytest.raises(zoo.ZooError, match="has to see training data first"):
        model(images())
    sct: Any = model.adapters["sct"]
    with pytest.raises(zoo.ZooError, match="no batch"):
        sct.calibrate(model, [])
    with pytest.raises(zoo.ZooError, match="not one label"):
        sct.calibrate(model, [(images(), torch.rand(4, 5))])
    assert sct.plan is None


@pytest.mark.parametrize(
    ("config", "message"),
    [({"channels": 0}, "channels is 0"), ({"channels": 49}, "'blocks.0.mlp' has 48"), ({"std": -1.0}, "std is -1")],
)
def test_settings_are_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        load(calibrated=False, **config)


def test_post_norm_blocks_have_no_stream_in_front() -> None:
    for name in ("timm:swinv2_tiny_window8_256", "convnext-t"):
        with pytest.raises(zoo.ZooError, match="has none directly in front"):
            zoo.load(name, "sct", pretrained=False, num_classes=0, device="meta")


def test_what_has_seen_no_data_is_not_saved(tmp_path: Path) -> None:
    """Its numbers would be of channels that nobody knows."""
    model = load(calibrated=False, shaken=False)
    with pytest.raises(ConfigError, match=r"has seen no data.*nothing to save.*zoo.calibrate"):
        model.save_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.adapters["sct"].calibrate(model, BATCHES)
    model.save_adapter(tmp_path / "out")
    again = zoo.load("vit-micro", tmp_path / "out", pretrained=False, seed=0, **TINY, device="meta")
    assert again.adapters["sct"].plan == model.adapters["sct"].plan
