"""Other resolutions and input channels than the checkpoint's: weights, data, examples, adapters that move between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo.errors import MismatchError


@pytest.mark.parametrize("name", ["vit-micro", "swin-micro"])
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_input_channels(name: str, channels: int) -> None:
    """Seen: examples, preprocessing and folders stayed at three channels."""
    model = zoo.load(name, "lora", num_classes=3, in_chans=channels)
    assert model.example_batch(2)[0].shape == (2, channels, 32, 32) and model(*model.example_batch(2)).shape == (2, 3)
    assert len(model.mean) == len(model.std) == channels
    bands = (255 * torch.rand(channels, 40, 50)).to(torch.uint8)
    picture = model.preprocess()(Image.new("L", (50, 40)) if channels == 1 else bands)
    assert picture.shape == (channels, 32, 32) and model(picture[None]).shape == (1, 3)
    plain = zoo.load(name).backbone.patch_embed.proj.weight
    own = model.backbone.patch_embed.proj.weight
    if channels == 1:  # as timm does it: a grey picture gives what its three equal channels gave
        torch.testing.assert_close(own, plain.sum(1, keepdim=True))
    else:
        torch.testing.assert_close(own, plain.repeat(1, channels // 3 + 1, 1, 1)[:, :channels] * 3 / channels)


def test_input_channels_of_our_own_network() -> None:
    """Seen: the embedded weights were refused as those of another network."""
    model = zoo.load("groupmamba-micro", "lora", num_classes=3, in_chans=4)
    assert model.example_batch(2)[0].shape == (2, 4, 32, 32) and len(model.mean) == 4
    assert model(model.example_batch(2)[0]).shape == (2, 3)


def test_a_network_without_pooling_gives_its_map() -> None:
    model = zoo.load("timm:resnet18", "lora", pretrained=False, global_pool="")
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 512, 2, 2) and model.num_classes == 0 and not model.family.pools
    with pytest.raises(zoo.ZooError, match="no pooled features"):
        zoo.load("timm:resnet18", pretrained=False, global_pool="", num_classes=3)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vit_tiny_patch16_224", "timm:mixer_s32_224"])
def test_input_channels_of_names(name: str) -> None:
    model = zoo.load(name, "lora", num_classes=3, in_chans=5, device="meta")
    assert model.family.data_config()["input_size"][0] == 5 and len(model.mean) == 5


@pytest.mark.parametrize("name", ["vit-micro", "swin-micro"])
def test_an_adapter_at_another_resolution(name: str, tmp_path: Path) -> None:
    """Seen: refused as an adapter of other weights, though only the table of positions was resampled."""
    model = zoo.load(name, "lora", num_classes=3).eval()
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.02)
    folder = model.save_adapter(tmp_path / "out")
    large = zoo.load(name, adapter=folder, img_size=64).eval()
    assert large.example_batch(1)[0].shape[-1] == 64 and large(*large.example_batch(2)).shape == (2, 3)
    for key, value in model.adapters.state_dict().items():
        assert torch.equal(large.adapters.state_dict()[key], value)
    assert zoo.load(adapter=folder, img_size=64).image_size == (64, 64)
    again = large.save_adapter(tmp_path / "large")  # and back
    x = model.example_batch(2)[0]
    assert torch.equal(zoo.load(name, adapter=again).eval()(x), model(x))


def test_an_adapter_saved_before_resolutions_were_told_apart(tmp_path: Path) -> None:
    import json

    from zoo.disk.layout import pack, unpack

    folder = zoo.load("vit-micro", "lora", num_classes=3).save_adapter(tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, copy, _ = unpack((folder / "adapter_model.safetensors").read_bytes(), folder)
    for part in (config, copy["config"]):
        del part["backbone"]["rest"]
    weights, config["checksum"] = pack(copy["config"], copy["metrics"], copy["card"], tensors)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert zoo.load("vit-micro", adapter=folder, img_size=64).image_size == (64, 64)
    with pytest.raises(MismatchError, match="other weights"):
        zoo.load("vit-micro", adapter=folder, img_size=64, pretrained=False)


def test_other_weights_at_another_resolution_are_other_weights(tmp_path: Path) -> None:
    folder = zoo.load("vit-micro", "lora", num_classes=3).save_adapter(tmp_path / "out")
    for size in (32, 64):
        with pytest.raises(MismatchError, match="other weights"):
            zoo.load("vit-micro", adapter=folder, img_size=size, pretrained=False)
    other = zoo.load("vit-micro", num_classes=3)
    with torch.no_grad():
        other.backbone.pos_embed.add_(0.1)  # of the same resolution: they count
    with pytest.raises(MismatchError, match="other weights"):
        zoo.disk.attach(other, zoo.disk.read(folder))


@pytest.mark.parametrize("name", ["vit-micro", "swin-micro"])
def test_features_that_were_saved_come_back(name: str, tmp_path: Path) -> None:
    """Seen: an adapter saved with num_classes=0 came back with the checkpoint's own 100 logits."""
    model = zoo.load(name, "lora", num_classes=0).eval()
    folder = model.save_adapter(tmp_path / "out")
    x = model.example_batch(2)[0]
    for again in (zoo.load(adapter=folder), zoo.load(name, adapter=folder)):
        assert again.num_classes == 0 and torch.equal(again.eval()(x), model(x))
    assert zoo.load(adapter=folder, num_classes=4)(x).shape == (2, 4)


@pytest.mark.parametrize("name", ["vit-micro", "swin-micro"])
def test_images_of_another_size(name: str) -> None:
    """Seen: an assertion of timm's."""
    model = zoo.load(name, "lora", num_classes=3, pretrained=False)
    for call in (model, model.features, lambda x: model.outputs(x, want=["maps"])):
        with pytest.raises(MismatchError, match=r"64 x 48 pixels; '.*' is built for 32 x 32.*img_size=\(64, 48\)"):
            call(torch.randn(2, 3, 64, 48))
    free = zoo.load("timm:vit_tiny_patch16_224", pretrained=False, num_classes=2, dynamic_img_size=True, depth=1)
    assert free(torch.randn(1, 3, 64, 48)).shape == (1, 2)
