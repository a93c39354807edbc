"""Convpass: its neighbourhood written out, class tokens alone, starts, saved settings, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from vision.adapters.convpass import Bypass, quick_gelu
from vision.adapters.parts.patches import Patches

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def vit(adapter: Any) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", adapter, pretrained=False, num_classes=5, **TINY)


def test_against_loops_over_places() -> None:
    """Each patch sees its eight neighbours, none beyond the border; each token in front sees itself alone."""
    module = Bypass(4, 2, Patches("convpass", "here", (2, 3), 2), 0.5, 0.0).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64))
    x = torch.randn(1, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    hidden = x @ module.down.weight.T + module.down.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    mixed = module.conv.bias.expand(8, 2).clone()
    for t in range(8):
        if t < 2:
            mixed[t] += module.conv.weight[:, :, 1, 1] @ hidden[0, t]
            continue
        row, column = divmod(t - 2, 3)
        for i in range(-1, 2):
            for j in range(-1, 2):
                if 0 <= row + i < 2 and 0 <= column + j < 3:
                    mixed[t] += module.conv.weight[:, :, 1 + i, 1 + j] @ hidden[0, 2 + (row + i) * 3 + column + j]
    mixed = mixed * torch.sigmoid(1.702 * mixed)
    torch.testing.assert_close(module(x)[0], 0.5 * (mixed @ module.up.weight.T + module.up.bias))


def test_starts() -> None:
    identity, xavier = (vit(zoo.adapter("convpass", conv=c)).adapters["convpass"] for c in ("identity", "xavier"))
    kernel = identity.get_parameter("blocks.0.attn.conv.weight")
    assert torch.equal(kernel[:, :, 1, 1], torch.eye(8)) and kernel.sum() == 8
    assert identity.get_parameter("blocks.0.attn.down.weight").std() > 0.1
    assert not identity.get_parameter("blocks.1.mlp.up.weight").any()
    bound = (6 / (2 * 8 * 9)) ** 0.5
    assert bound / 2 < xavier.get_parameter("blocks.0.attn.conv.weight").abs().max() <= bound
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x))


def test_dropout_is_of_training_alone(tmp_path: Path) -> None:
    model = vit(zoo.adapter("convpass", dropout=0.5, scale=2.0, conv="xavier", targets="mlp"))
    with torch.no_grad():
        for p in model.adapters["convpass"].parameters():
            p.add_(0.1)
    x = images()
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    expected = model.eval()(x)
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False)
    assert torch.equal(again(x), expected)
    assert again.adapters["convpass"].config()["conv"] == "xavier"


def test_on_spectrograms() -> None:
    """AST's grid is of frequency and time, behind two tokens."""
    model = zoo.load("ast", "convpass", pretrained=False, num_classes=0, device="meta")
    part = model.adapters["convpass"].module_at("blocks.0.attn")
    assert part.patches.grid == (12, 101) and part.patches.prefix == 2
    assert model.num_parameters(trainable=True) == 327_552


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"scale": 0.0}, "could never do anything"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
        ({"conv": "dirac"}, "conv"),
    ],
)
def test_settings_are_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        zoo.adapter("convpass", **config)


def test_tokens_without_a_grid_are_refused() -> None:
    for name, what in (
        ("convnext-t", "not described"),
        ("wav2vec2-b", "depends on the input"),
        ("clip-vit-b32", "text"),
    ):
        with pytest.raises(zoo.ZooError, match=f"row by row in a grid.*{what}"):
            zoo.load(name, "convpass", pretrained=False, device="meta")
    clip = zoo.load("clip-vit-b32", zoo.adapter("convpass", targets="image.**"), pretrained=False, device="meta")
    assert clip.num_parameters(trainable=True, head=False) == 327_552


def test_other_numbers_of_tokens_are_refused() -> None:
    """Prompts that flow through the blocks stand among the patches: no grid any more."""
    model = vit(["convpass", zoo.adapter("vpt", deep=False, num_tokens=3)])
    with pytest.raises(zoo.ZooError, match=r"got 68 tokens and expects 1 \+ 8 x 8"):
        model(images())
    deep = vit(["convpass", zoo.adapter("vpt", num_tokens=3)])  # these are keys and values alone
    assert deep.probe(images()) == []
