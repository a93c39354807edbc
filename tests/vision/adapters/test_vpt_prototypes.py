"""VPT's start from prototypes: the class means themselves, once, where widths allow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import ConfigError, DataError


def labelled(count: int, classes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randn(count, 3, 32, 32, generator=generator) + labels[:, None, None, None]
    return [(images[:3], labels[:3]), (images[3:], labels[3:])]


@pytest.mark.parametrize(("classes", "deep"), [(4, True), (4, False), (2, True), (6, True)])
def test_prototypes_of_classes_are_where_prompts_start(classes: int, deep: bool) -> None:
    """As many as prompts: the class means themselves; fewer: the others stay random; more: centres of these."""
    adapter = zoo.adapter("vpt", num_tokens=4, deep=deep, start="prototypes")
    model = zoo.load(
        "vit-micro", adapter, num_classes=classes, pretrained=False, seed=0, embed_dim=24, depth=2, num_heads=2
    )
    vpt: Any = model.adapters["vpt"]
    prompts = [vpt.module_at(f"blocks.{i}.tokens").prompt for i in range(2 if deep else 1)]
    before = [p.detach().clone() for p in prompts]
    batches = labelled(12, classes)
    vpt.calibrate(model, batches)
    x, y = (torch.cat(both) for both in zip(*batches))
    with model.disable(), torch.no_grad():
        features = model.eval().features(x)
    means = torch.stack([features[y == k].mean(0) for k in range(classes)])
    assert vpt.plan == {"prototypes": min(classes, 4)} and model.active == ("vpt",)
    for prompt, old in zip(prompts, before):
        if classes <= 4:
            torch.testing.assert_close(prompt[:classes], means, rtol=1e-5, atol=1e-5)
            assert torch.equal(prompt[classes:], old[classes:])
            continue
        sets = [[k for k in range(classes) if torch.cdist(means[k][None], prompt).argmin() == i] for i in range(4)]
        assert sorted(k for one in sets for k in one) == list(range(classes))
        for own, row in zip(sets, prompt):  # a centre is the mean of the means that are next to it
            torch.testing.assert_close(row, means[own].mean(0), rtol=1e-5, atol=1e-5)


def test_prototypes_are_found_once(tmp_path: Path) -> None:
    """What was trained since is not overwritten where it is trained further, and a source keeps its values."""
    options: dict[str, Any] = {"pretrained": False, "seed": 0, "embed_dim": 24, "depth": 1, "num_heads": 2}
    data = torch.utils.data.TensorDataset(*(torch.cat(both) for both in zip(*labelled(12, 3))))
    fit: dict[str, Any] = {"epochs": 1, "batch_size": 6, "progress": False}
    model = zoo.load("vit-micro", zoo.adapter("vpt", num_tokens=3, start="prototypes"), num_classes=3, **options)
    zoo.fit(model, data, **fit)
    model.save_adapter(tmp_path / "out")
    again = zoo.load("vit-micro", tmp_path / "out", **options)
    assert torch.equal(again(data[:2][0]), model(data[:2][0]))
    held = again.adapters["vpt"].module_at("blocks.0.tokens").prompt.detach().clone()
    zoo.fit(again, data, **{**fit, "lr": 1e-12})
    torch.testing.assert_close(again.adapters["vpt"].module_at("blocks.0.tokens").prompt.detach(), held)
    zoo.load("vit-micro", zoo.adapter("vpt", init=tmp_path / "out"), num_classes=3, **options)
    zoo.load("vit-micro", zoo.adapter("vpt", num_tokens=3), num_classes=3, **options).save_adapter(tmp_path / "random")
    with pytest.raises(ConfigError, match="both say what the prompts start as"):
        zoo.load(
            *("vit-micro", zoo.adapter("vpt", init=tmp_path / "random", start="prototypes")), num_classes=3, **options
        )


def test_prototypes_need_one_width() -> None:
    swin = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    adapter = zoo.adapter("vpt", start="prototypes")
    model = zoo.load("swin-t", adapter, num_classes=3, pretrained=False, **swin)
    with pytest.raises(ConfigError, match=r"features \(width 16\) where prompts of width 8, 16 stand"):
        model.adapters["vpt"].calibrate(model, labelled(6, 3))
    with pytest.raises(ConfigError, match="takes no project"):
        zoo.adapter("vpt", start="prototypes", project=4)
    vit = zoo.load("vit-micro", adapter, num_classes=3, pretrained=False, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(DataError, match="not one label for each sample"):
        vit.adapters["vpt"].calibrate(vit, [(torch.randn(2, 3, 32, 32), torch.rand(2, 3))])
    with pytest.raises(DataError, match="got no batch"):
        vit.adapters["vpt"].calibrate(vit, [])
