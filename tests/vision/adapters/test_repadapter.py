"""RepAdapter: its equation with groups, what merging takes in and in which order, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from vision.adapters.repadapter import LinearAdapter

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "img_size": 32}


def rep(**config: Any) -> Any:
    return zoo.adapter("repadapter", **{"rank": 4, "dropout": 0.0, **config})


def load(adapters: Any, name: str = "vit-micro", **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load(name, adapters, pretrained=False, num_classes=5, **(options or TINY)).eval()
    with torch.no_grad():
        for i, adapter in enumerate(model.adapters.values()):
            generator = torch.Generator().manual_seed(i)
            for p in adapter.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_merge(model: zoo.Model, size: int = 32) -> None:
    x = images(size)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(model.merge()(x), logits, rtol=1e-5, atol=1e-5)
        with model.disable():
            assert not torch.allclose(model(x), logits, atol=1e-3)


def test_against_the_equation() -> None:
    """Group j of the outputs reads group j of the hidden numbers alone."""
    module = LinearAdapter(6, 4, 2, 0.5, 0.0, True).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(p.numel())))
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    hidden = x @ module.down.weight.T + module.down.bias
    expected = x.clone()
    for channel in range(6):
        mine = hidden[:, :2] if channel < 3 else hidden[:, 2:]
        assert module.shift is not None
        expected[:, channel] += 0.5 * (mine @ module.up[channel] + module.shift[channel])
    torch.testing.assert_close(module(x), expected)


def test_start_and_training() -> None:
    model = zoo.load("vit-micro", "repadapter", pretrained=False, num_classes=5, **TINY)
    adapter = model.adapters["repadapter"]
    assert not adapter.get_parameter("blocks.0.mlp.up").any()
    assert adapter.get_parameter("blocks.0.mlp.down.weight").std() > 0.1
    with torch.no_grad():
        adapter.get_parameter("blocks.0.attn.up").add_(1.0)
    x = images()
    assert not torch.equal(model.train()(x), model(x))  # dropout 0.1
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    "others",
    [
        [rep(rank=2, targets="mlp")],
        [zoo.adapter("lora", targets="all-linear", rank=2)],
        [zoo.adapter("lora", targets="all-linear", rank=2, dora=True)],
        [zoo.adapter("ia3", inputs=("up", "down"))],
        ["bitfit"],
    ],
    ids=["twice", "lora", "dora", "ia3", "bitfit"],
)
@pytest.mark.parametrize("first", [True, False])
def test_merges_beside_others(others: list[Any], first: bool) -> None:
    """Whatever the order of activation: what changes an input is folded in behind what changes the projection."""
    fresh = [o if isinstance(o, str) else o.fresh() for o in others]
    model = load(None)
    named = {"rep": rep(groups=1), **{f"other{i}": o for i, o in enumerate(fresh)}}
    for name in named if first else reversed(named):
        model.add_adapter(named[name], name, activate=False)
    model.set_active(*(named if first else reversed(named)))
    with torch.no_grad():
        for i, adapter in enumerate(model.adapters.values()):
            for p in adapter.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    check_merge(model)


def test_scaled_norms_merge_in_one_order() -> None:
    check_merge(load(["ssf", rep()]))
    with pytest.raises(
        zoo.ZooError, match=r"'blocks.0.norm1' is rescaled behind .* Activate the adapter that rescales"
    ):
        load([rep(), "ssf"]).merge()


def test_windows_filled_up_with_zeros_take_no_shift() -> None:
    """32 px: maps of 8 x 8 in windows of 4; 40 px: of 10 x 10, so that zeros join in, which a merged bias would change."""
    tiny = "timm:swin_tiny_patch4_window7_224"
    check_merge(load(rep(), tiny, **SWIN))
    padded = {**SWIN, "img_size": 40}
    with pytest.raises(zoo.ZooError, match="windows are filled up with zeros"):
        load(rep(), tiny, **padded).merge()
    check_merge(load(rep(bias=False), tiny, **padded), 40)


def test_projections_without_bias() -> None:
    model = load(rep(), "vit-micro", qkv_bias=False, **TINY)
    with pytest.raises(zoo.ZooError, match=r"attn\.q' has no bias"):
        model.merge()
    check_merge(load(rep(bias=False), "vit-micro", qkv_bias=False, **TINY))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 3}, "2 groups cannot share a rank of 3"),
        ({"groups": 0}, "groups is 0"),
        ({"scale": 0.0}, "could never do anything"),
        ({"dropout": -0.1}, "0 <= dropout < 1"),
    ],
)
def test_settings_are_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        zoo.adapter("repadapter", **config)
    with pytest.raises(zoo.ZooError, match="5 groups cannot share the 48 channels"):
        load(rep(rank=5, groups=5))


def test_the_shortcut_of_hiera_sees_nothing_of_it() -> None:
    """Blocks that pool hand their norm's output to a shortcut as well as to the attention."""
    options = {"img_size": [64, 64], "embed_dim": 12, "stages": [1, 1, 2, 2]}
    check_merge(load(rep(groups=1), "hiera-t", **options), 64)
