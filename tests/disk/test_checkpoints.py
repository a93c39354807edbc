"""Weights of the user's own: files, folders and repositories of others, and the cards of adapters on them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.errors import ConfigError, MismatchError, WeightsError

NAME = "timm:vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def network(num_classes: int = 7, seed: int = 5, **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **{**SMALL, **options}).eval()


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("form", ["plain", "safetensors", "trainer"])
def test_a_checkpoint_with_its_classifier(form: str, tmp_path: Path) -> None:
    """Seen: checkpoint_path= with another number of classes ended in torch's error."""
    own = network()
    state = own.state_dict()
    if form == "trainer":
        state = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    file = saved(tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth"), state)
    for option in ("checkpoint", "checkpoint_path"):
        model = zoo.load(NAME, **{option: file if option == "checkpoint" else str(file)}, **SMALL)
        assert model.num_classes == 7 and torch.equal(model(images()), own(images()))
    model = zoo.load(NAME, "lora", num_classes=3, checkpoint=file, **SMALL)
    pooled = own.forward_head(own.forward_features(images()), pre_logits=True)
    assert model(images()).shape == (3, 3) and torch.equal(model.features(images()), pooled)


def test_a_checkpoint_without_a_classifier_gives_features(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.safetensors", {k: v for k, v in network().state_dict().items() if "head" not in k})
    model = zoo.load(NAME, checkpoint=file, **SMALL)
    assert model.num_classes == 0 and model(images()).shape == (3, 24)


def test_other_heads_are_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {**network().state_dict(), "decoder.weight": torch.zeros(3), "projector.0.weight": torch.zeros(3)}
    model = zoo.load(NAME, checkpoint=saved(tmp_path / "w.pt", state), **SMALL)
    assert model.num_classes == 7 and "decoder.weight, projector.0.weight" in caplog.text


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = network().state_dict()
    lacks = {k: v for k, v in state.items() if k != "blocks.1.attn.qkv.weight"}
    over = {**state, "blocks.2.norm1.weight": torch.zeros(24)}
    wide = {**state, "blocks.0.mlp.fc1.bias": torch.zeros(5)}
    for changed, words in (
        (lacks, r"1 missing \(blocks\.1\.attn\.qkv\.weight\)"),
        (over, r"1 unexpected \(blocks\.2\.norm1\.weight\)"),
        (wide, r"1 of another shape \(blocks\.0\.mlp\.fc1\.bias: \(5,\), here \(96,\)\)"),
        (timm.create_model("resnet18").state_dict(), "another architecture than this VisionTransformer"),
    ):
        with pytest.raises(MismatchError, match=words):
            zoo.load(NAME, checkpoint=saved(tmp_path / "w.pth", changed), **SMALL)


class Loud:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_pickles_and_other_files(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Loud(marker)))
    (tmp_path / "renamed.pth").write_bytes(pickle.dumps(Loud(marker)))
    torch.save({"model": Loud(marker)}, tmp_path / "w.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678{}")
    (tmp_path / "text.pth").write_text("root:x:0:0\n")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, words in (
        ("w.pkl", "is a pickle.*not opened"),
        ("renamed.pth", "holds more than tensors"),
        ("w.pth", "holds more than tensors"),
        ("broken.safetensors", "truncated"),
        ("list.pth", "holds a list"),
        ("text.pth", "could not be read|holds more than tensors"),
    ):
        with pytest.raises(WeightsError, match=words):
            zoo.load(NAME, checkpoint=tmp_path / name, **SMALL)
    for value, words in ((tmp_path, "is a folder"), (tmp_path / "none.pth", "no checkpoint"), (3, "expected a file")):
        with pytest.raises(ConfigError, match=words):
            zoo.load(NAME, checkpoint=value, **SMALL)
    assert not marker.exists()


def test_the_card_names_the_weights_of_the_user(tmp_path: Path) -> None:
    """Seen: timm's repository and licence, on weights that are the user's."""
    file = saved(tmp_path / "leaves.safetensors", network().state_dict())
    plain = zoo.load(NAME, "lora", num_classes=3, checkpoint=file, **SMALL).save_adapter(tmp_path / "a") / "README.md"
    assert "weights: `leaves.safetensors`, its user's own" in plain.read_text()
    assert (
        "base_model" not in plain.read_text()
        and "licence:" not in plain.read_text()
        and "timm/" not in plain.read_text()
    )
    said = {"source": "user/leaves", "licence": "mit"}
    told = (
        zoo.load(NAME, "lora", num_classes=3, checkpoint=file, **said, **SMALL).save_adapter(tmp_path / "b")
        / "README.md"
    )
    assert "base_model: user/leaves" in told.read_text() and "licence: mit" in told.read_text()
    with pytest.raises(ConfigError, match="is for weights of your own"):
        zoo.load(NAME, licence="mit", pretrained=False, **SMALL)


def test_an_adapter_on_a_checkpoint_wants_it_again(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pth", network().state_dict())
    model = zoo.load(NAME, "lora", num_classes=3, checkpoint=file, **SMALL).eval()
    folder = model.save_adapter(tmp_path / "out")
    assert "w.pth" not in (folder / "adapter_config.json").read_text()
    again = zoo.load(NAME, adapter=folder, checkpoint=file, **SMALL).eval()
    assert torch.equal(again(images()), model(images()))
    with pytest.raises(MismatchError, match="checkpoint="):
        zoo.load(NAME, adapter=folder, pretrained=False, **SMALL)


def test_weights_that_are_loaded_by_hand(tmp_path: Path) -> None:
    """Seen: the fingerprint of the package's weights was saved with an adapter that was trained on the user's."""
    model = zoo.load("vit-micro", "lora", num_classes=3)
    first = model.fingerprint
    model.backbone.load_state_dict({k: v.clone() for k, v in model.backbone.state_dict().items()})
    assert model.fingerprint == first and model.family.pretrained
    own = {k: v + 0.01 for k, v in model.backbone.state_dict().items()}
    model.backbone.load_state_dict(own)
    assert model.fingerprint != first
    folder = model.save_adapter(tmp_path / "out")
    with pytest.raises(MismatchError, match="other weights"):
        zoo.load(adapter=folder)
    again = zoo.load("vit-micro")
    again.backbone.load_state_dict(own)
    zoo.disk.attach(again, zoo.disk.read(folder))
    assert torch.equal(again.eval()(images()), model.eval()(images()))
    half = zoo.load("vit-micro", "bitfit", dtype=torch.bfloat16)
    half.load_state_dict(half.state_dict())
    assert half.fingerprint == first


@pytest.mark.parametrize("classes", [7, 0])
def test_a_folder_of_timm(classes: int, tmp_path: Path) -> None:
    """Seen: wrong hints and foreign errors for `timm:local-dir:`."""
    own, folder = network(classes), tmp_path / "model"
    timm.models.save_for_hf(own, str(folder), safe_serialization=True, model_args=SMALL)
    model = zoo.load(f"timm:local-dir:{folder}", "lora")
    assert model.family.family == "vit" and model.num_classes == classes
    assert torch.equal(model.eval()(images()), own(images()))
    card = (model.save_adapter(tmp_path / "out") / "README.md").read_text()
    assert "base_model" not in card and f'trust_backbone="timm:local-dir:{folder}"' in card
    again = zoo.load(adapter=tmp_path / "out", trust_backbone=True)
    assert torch.equal(again.eval()(images()), model(images()))


def test_a_folder_that_is_none_of_timm(tmp_path: Path) -> None:
    with pytest.raises(zoo.errors.UnknownNameError, match="could not be read"):
        zoo.load(f"timm:local-dir:{tmp_path / 'nowhere'}")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "no_such_network"}))
    with pytest.raises(zoo.errors.UnknownNameError, match="'no_such_network'"):
        zoo.load(f"timm:local-dir:{tmp_path}")
