"""Networks that no family describes: what is found, what is refused, and that it is right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.errors import AttachError, ConfigError, MergeError, MismatchError, SelectionError
from zoo.families.generic.micro import Micro


def images(size: int = 32, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def shaken(model: zoo.Model, seed: int = 3) -> zoo.Model:
    """Adapters away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def micro() -> Micro:
    torch.manual_seed(0)
    return Micro()


# -- names -----------------------------------------------------------------------------------------------------------------


def test_a_name_goes_to_its_family_first() -> None:
    assert registry.find_backbone("timm:vit_tiny_patch16_224")[0].family == "vit"
    assert registry.find_backbone("timm:resnet18")[0].family == "generic"
    with pytest.raises(zoo.errors.UnknownNameError, match="resnet18"):
        zoo.load("timm:resnet181")
    assert [name for name in zoo.list_backbones() if registry.find_backbone(name)[0].family == "generic"] == []


@pytest.mark.parametrize("name", ["resnet18", "nf_resnet26", "tf_efficientnet_b0", "mixer_s32_224", "pvt_v2_b0"])
def test_lora_on_networks_of_timm(name: str) -> None:
    """Convolutions, weights that a class standardises, padding by TensorFlow's rule, MLPs, attention of another shape."""
    size = {"mixer_s32_224": {"img_size": 64}}.get(name, {})
    torch.manual_seed(0)
    model = zoo.load(f"timm:{name}", "lora", pretrained=False, num_classes=4, **size)
    inputs = (images(64),)
    assert model.family.family == "generic" and model.probe(*inputs) == []
    with torch.no_grad(), model.disable():
        bare = model(*inputs)
    with torch.no_grad():
        assert torch.equal(model(*inputs), bare)
        live = shaken(model)(*inputs)
        assert not torch.allclose(live, bare)
        if name == "nf_resnet26":
            with pytest.raises(MergeError, match="ScaledStdConv2d does not use its weight as it stands"):
                model.merge()
        else:
            torch.testing.assert_close(model.merge()(*inputs), live, rtol=1e-4, atol=1e-5)


def test_lora_at_a_convolution_is_a_change_of_its_weight() -> None:
    """Strides, padding of every mode, dilation: outputs and gradients of the convolution with W + s B A."""
    modes: list[dict[str, Any]] = [
        {"stride": 2, "padding": 1},
        {"padding": 2, "padding_mode": "reflect"},
        {"dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "circular", "bias": False},
    ]
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, **mode) for mode in modes), nn.Conv2d(3, 4, 1), nn.Flatten())
    x = images(12)
    model = shaken(zoo.load(net, zoo.adapter("lora", rank=2, alpha=3.0, targets="conv"), example=x))
    plain = model.merge()
    output = model(x)
    torch.testing.assert_close(plain(x), output, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    plain(x).square().sum().backward()
    for i in range(5):
        part = model.adapters["lora"].module_at(str(i))
        weight = plain[i].weight.grad.flatten(1)  # type: ignore[index,union-attr,operator]
        torch.testing.assert_close(part.lora_b.grad, 1.5 * weight @ part.lora_a.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.lora_a.grad, 1.5 * part.lora_b.T @ weight, rtol=1e-4, atol=1e-4)


def test_a_grouped_convolution_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    model = zoo.wrap(net, example=torch.randn(1, 4, 8, 8))
    with pytest.raises(AttachError, match="'0' is a convolution of 4 groups"):
        model.add_adapter(zoo.adapter("lora", targets="grouped"))
    assert not model.adapters and not net[0]._forward_hooks


# -- wrapping ----------------------------------------------------------------------------------------------------------------


def test_wrapped_equals_the_network_and_finds_its_parts() -> None:
    net, x = micro(), images()
    expected = copy.deepcopy(net)(x)
    model = zoo.wrap(net, example=x[:1], name="mine")
    assert torch.equal(model(x), expected)
    assert model.num_classes == 5 and model.family.head_path() == "head" and model.family.feature_dim == 24
    roles = {p.name: p.role for p in model.points if p.block == 1}
    assert roles == {
        **{f"layers.1.attn.to_{r}": r for r in "qkv"},
        "layers.1.attn.to_out": "o",
        "layers.1.mlp.fc1": "up",
        "layers.1.mlp.fc2": "down",
        "layers.1.norm1": "norm",
        "layers.1.norm2": "norm",
        "layers.1.attn": "attn",
        "layers.1.mlp": "mlp",
        "layers.1": "block",
    }
    assert {p.name: p.role for p in model.points if p.block is None} == {"stem": "conv", "norm": "norm"}


def test_features_and_head_as_the_user_says() -> None:
    x = images()
    model = zoo.wrap(micro(), example=x, head="head", num_classes=7)
    assert model(x).shape == (3, 7) and model.merge().head.out_features == 7  # type: ignore[union-attr]
    model = zoo.wrap(micro(), example=x, features=lambda net, x: net.stem(x).mean((2, 3)), num_classes=2)
    assert model.features(x).shape == (3, 24) and model(x).shape == (3, 2)
    with pytest.raises(MergeError, match="no place for a classifier"):
        model.merge()
    for wrong in ("nowhere", "norm"):
        with pytest.raises(ConfigError, match=f"head='{wrong}'"):
            zoo.wrap(micro(), example=x, head=wrong)


def test_saved_and_loaded_with_the_network_of_the_user(tmp_path: Path) -> None:
    """The file says what the network was, and nothing is built or imported by it."""
    x = images()
    model = shaken(zoo.load(micro(), "lora", example=x, name="mine", num_classes=3))
    expected = model(x)
    folder = model.save_adapter(tmp_path / "out")
    assert torch.equal(zoo.load(micro(), adapter=folder, example=x).eval()(x), expected)
    assert "zoo.load(network, adapter=" in (folder / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"micro\.Micro\(\).*zoo\.load\(network, adapter=\.\.\.\)"):
        zoo.load(adapter=folder)
    other = Micro()
    with pytest.raises(MismatchError, match="fingerprint"):
        zoo.load(other, adapter=folder, example=x)
    with pytest.raises(MismatchError, match="belongs to the backbone 'wrapped:mine'"):
        zoo.load("vit-micro", adapter=folder, pretrained=False)


@pytest.mark.parametrize("method", ["lora", "ia3", "ssf", "bitfit", "norm", "full", "adalora", "adapter", "fact"])
def test_methods(method: str) -> None:
    x = images()
    settings = {"init_std": 0.0} if method == "ssf" else {}
    torch.manual_seed(0)
    model = zoo.load(micro(), zoo.adapter(method, **settings), example=x)
    with torch.no_grad():
        assert torch.equal(model(x), micro()(x))
    assert model.probe(x) == []
    live = shaken(model)(x)
    if method != "adapter":
        torch.testing.assert_close(model.merge()(x), live, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    model.remove_adapter(method)
    assert torch.equal(twin(x), live) and all(not m._forward_hooks for m in model.backbone.modules())


@pytest.mark.parametrize(("method", "reason"), [("vpt", "tokens points"), ("prefix", "attention points")])
def test_what_a_network_that_nobody_described_cannot_have(method: str, reason: str) -> None:
    with pytest.raises(AttachError, match=reason):
        zoo.load(micro(), method, example=images())


# -- what is found dead ------------------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """One projection whose weight is read, one that is called, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.k_proj = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.v_proj(x), self.q_proj.weight)


def test_a_projection_whose_weight_is_read() -> None:
    """A hook there never runs, and a merge would change what the live adapter did not."""
    x = torch.randn(2, 6)
    model = zoo.load(Reads(), "lora", example=x)
    assert [p.name for p in model.points] == ["v_proj"] and model.probe(x) == []
    assert "never called" in model.family.refused["q_proj"] and "never called" in model.family.refused["k_proj"]
    with pytest.raises(SelectionError, match=r"'q_proj' cannot be chosen.*never called"):
        model.add_adapter(zoo.adapter("lora", targets="q_proj"), "second")
    late = zoo.load(Reads(), "lora")  # without an example the first batch shows it
    with pytest.raises(AttachError, match=r"'q_proj' .* never called in this pass"):
        late(x)


def test_children_of_torchs_attention() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    model = zoo.load(net, "lora", example=x)
    assert {p.role for p in model.points if p.kind == "linear"} == {"up", "down"} and model.probe(x) == []
    live = shaken(model)(x)
    torch.testing.assert_close(model.merge()(x), live, rtol=1e-4, atol=1e-5)
    with pytest.raises(SelectionError, match=r"'layers\.0\.self_attn\.out_proj' cannot be chosen.*MultiheadAttention"):
        model.add_adapter(zoo.adapter("lora", targets="**.out_proj"), "second")


# -- networks of a class that is described -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_built_network_of_a_family_has_all_of_its_points(kind: str, tmp_path: Path) -> None:
    """The card names no repository of the library's: whose weights these are, only the user knows."""
    import timm

    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "num_classes": 3}
    sizes |= {"depth": 2, "num_heads": 2, "patch_size": 8} if kind == "vit" else {"depths": (1, 1), "num_heads": (1, 2)}
    name = "vit_tiny_patch16_224" if kind == "vit" else "swin_tiny_patch4_window7_224"

    def network() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, **sizes).eval()

    x = images()
    model = zoo.load(network(), "vpt", name="mine").eval()
    assert model.family.family == kind and model.num_classes == 3 and "attention" in model.points.kinds
    with torch.no_grad(), model.disable():
        assert torch.equal(model(x), network()(x))
    folder = model.save_adapter(tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "zoo.load(network, adapter=" in card and "timm/" not in card and "weights: `mine`, its user's own" in card
    assert torch.equal(zoo.load(network(), adapter=folder).eval()(x), model(x))
    told = zoo.load(network(), "lora", source="user/mine", licence="mit").save_adapter(tmp_path / "told") / "README.md"
    assert "base_model: user/mine" in told.read_text() and "licence: mit" in told.read_text()
    again = zoo.load(network(), "lora", features=lambda net, x: net.forward_features(x).flatten(1), example=x)
    assert again.family.family == "generic"  # the user's own words count
