"""PETALface against numbers recorded from the authors' code, and its counts on their Swin.

`petalface.json` holds embeddings and gradients of Kartik-3004/PETALface (`backbones/swin_models_iqa.py`) for images of 40 px in
patches of 2, widths 12, 24, 48, depths 2, 2, 1, windows of 5, r = 3, s = 0.5, in evaluation and float64, with the
weights of `value`. A row of z is its first four values, its norm and its sum; a gradient is its norm and its product with
a probe. `alpha` is what their `generate_alpha` makes of scores 0.2, 0.45, 0.7 and the threshold 0.45.

Their layers start with B = 0, and the network then draws all linear layers anew (B's standard deviation was 0.0204): ours
starts as the pretrained function, which `tests/adapters/test_methods.py` holds it to.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "petalface.json").read_text())
SMALL: dict[str, Any] = {
    "img_size": 40,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (2, 2, 1),
    "num_heads": (2, 3, 4),
    "window_size": 5,
}


def fill(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(mean + std * random.standard_normal(shape))


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """What their parameter or buffer of this name was set to."""
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        return fill(name, shape, 0.1).abs() + 0.5
    if leaf == "running_mean":
        return fill(name, shape, 0.1)
    if len(shape) == 1:
        return fill(name, shape, 0.1, 1.0 if leaf == "weight" else 0.0)
    if "trainable_lora" in name:
        return fill(name, shape, 0.3)
    if "relative" in name or "pos_embed" in name:
        return fill(name, shape, 0.5)
    return fill(name, shape, 1 / math.sqrt(math.prod(shape[1:])))


def released(model: zoo.Model) -> dict[str, Tensor]:
    """A checkpoint of theirs for this network, under their names and with the buffers that they save."""
    own = {k: v for k, v in model.backbone.state_dict().items() if v.is_floating_point()}
    names = {
        k: re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k).replace(
            "patch_embed.absolute", "absolute"
        )
        for k in own
    }
    found = {names[k]: value(names[k], tuple(v.shape)) for k, v in own.items()}
    return {
        **found,
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }


def theirs(key: str) -> str:
    """Of our tensor: their name. They number branches "" and "2"; all our B of one block are one B of theirs."""
    place, _, leaf = key.rpartition(".")
    if place == "project":
        return f"feature_layer.2.trainable_lora_{'down' if leaf == 'a' else 'up'}.weight"
    branch = "2" if leaf.startswith("high") else ""
    stage, block = re.findall(r"\d+", place)[:2]
    return (
        f"layers.{stage}.blocks.{block}.attn.qkv.trainable_lora_{'down' if leaf.endswith('a') else 'up'}{branch}.weight"
    )


def test_equals_the_authors_code() -> None:
    adapter = zoo.adapter("petalface", rank=3, scale=0.5, quality="given", threshold=0.5)
    model = zoo.load("swin-face", adapter, num_classes=0, pretrained=False, dtype=torch.float64, **SMALL).eval()
    module: Any = model.backbone
    module.load_state_dict(module.renamed(released(model)), strict=False)
    named = dict(model.adapters["petalface"].named_parameters())
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for key, parameter in named.items():  # q, k and v stand in forward order
        groups.setdefault(theirs(key), []).append(parameter)
    assert groups.keys() == AUTHORS["gradients"].keys()
    with torch.no_grad():
        for name, parts in groups.items():
            shape = (sum(len(p) for p in parts), parts[0].shape[1])
            for part, rows in zip(parts, value(name, shape).split([len(p) for p in parts])):
                part.copy_(rows)
    images = fill("images", (3, 3, 40, 40), 1.0)
    z = model(images, context={"quality": torch.tensor([0.1, 0.5, 0.85], dtype=torch.float64)})
    found = [[*row[:4].tolist(), row.norm().item(), row.sum().item()] for row in z.detach()]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(AUTHORS["z"]), rtol=1e-5, atol=1e-5)
    (z * fill("probe", (3, 512), 1.0)).sum().backward()
    for name, parts in groups.items():
        grad = torch.cat([p.grad for p in parts])  # type: ignore[misc]
        along = (grad * fill(f"probe/{name}", tuple(grad.shape), 1.0)).sum()
        assert [grad.norm().item(), along.item()] == pytest.approx(AUTHORS["gradients"][name], rel=1e-5, abs=1e-6), name


def test_the_share_of_a_score() -> None:
    model = zoo.load("vit-micro", zoo.adapter("petalface", threshold=0.45), num_classes=0, pretrained=False, depth=1)
    mixing: Any = model.adapters["petalface"].get_submodule("mixing")
    assert mixing(torch.tensor([0.2, 0.45, 0.7])).tolist() == pytest.approx(AUTHORS["alpha"])


@pytest.mark.parametrize(("rank", "count"), [(8, 1_441_792), (4, 720_896)])
def test_counts_on_their_swin(rank: int, count: int) -> None:
    model = zoo.load("swin-face", zoo.adapter("petalface", rank=rank), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == count
    assert sum(p.numel() for p in model.backbone.parameters()) == 215_108_560 - 1_441_792
    assert model.family.feature_dim == 512 and model.image_size == (120, 120)


def test_a_released_checkpoint_is_read(tmp_path: Path) -> None:
    """By the option for weights of one's own, under their names."""
    model = zoo.load("swin-face", num_classes=0, pretrained=False, **SMALL)
    state = {k: v.float() for k, v in released(model).items()}
    torch.save(state, tmp_path / "model.pt")
    again = zoo.load("swin-face", num_classes=0, checkpoint=tmp_path / "model.pt", **SMALL)
    merging = again.backbone.state_dict()["layers.1.downsample.reduction.weight"]
    assert torch.equal(merging, state["layers.0.downsample.reduction.weight"])
    assert torch.equal(again.backbone.state_dict()["patch_embed.absolute_pos_embed"], state["absolute_pos_embed"])
    with pytest.raises(zoo.ZooError, match=r"swin-face\.safetensors.*checkpoint="):
        zoo.load("swin-face", num_classes=0)
