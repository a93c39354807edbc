"""Vision transformers of transformers from files and back: checkpoints of pretraining, other sizes, preprocessing, peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from hf_vision import KINDS, answer, batch, library, make, settle
from torch import Tensor

import zoo
from zoo.errors import ConfigError, DataError, MergeError, WeightsError

transformers = pytest.importorskip("transformers")


PRETRAINED = {
    "vit": "ViTModel",
    "vit_mae": "ViTMAEForPreTraining",
    "beit": "BeitForMaskedImageModeling",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "videomae": "VideoMAEForPreTraining",
}


def saved(kind: str, folder: Path) -> Any:
    """A folder as the library saves the network of pretraining."""
    cls = getattr(transformers, PRETRAINED[kind])
    small = dict(KINDS[kind][1])
    if kind in ("clip", "siglip", "siglip2"):
        text = {k: small[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
        width = small.get("projection_dim")
        small = {"vision_config": small, "text_config": {**text, "vocab_size": 50}}
        small |= {} if width is None else {"projection_dim": width}
    if kind in ("vit_mae", "videomae"):
        small |= {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    small |= {"use_mean_pooling": False} if kind == "videomae" else {}
    module = cls(cls.config_class(**small)).eval()
    module.save_pretrained(folder)
    return module


@pytest.mark.parametrize("kind", PRETRAINED)
def test_checkpoints_of_pretraining(kind: str, tmp_path: Path) -> None:
    """Decoders, poolers and text towers are left out; every other tensor is that of the file."""
    module = saved(kind, tmp_path)
    model = zoo.load(f"transformers:{tmp_path}", num_classes=3).eval()
    assert model.num_classes == 3 and model.fingerprint is not None
    x = torch.randn(2, *model.example_batch(1)[0].shape[1:])
    if kind in ("clip", "siglip"):
        expected = module.get_image_features(x)
        expected = expected if isinstance(expected, Tensor) else expected.pooler_output
        torch.testing.assert_close(model.features(x), expected, rtol=1e-5, atol=1e-5)
    own = {v.double().sum().item() for v in module.state_dict().values()}
    mine = [k for k, v in model.backbone.state_dict().items() if v.double().sum().item() not in own]
    assert [k for k in mine if "fc_norm" not in k] == []


@pytest.mark.parametrize("lost", ["classifier.dense.weight", "classifier.layernorm.bias", "classifier"])
def test_a_classifier_of_which_a_part_is_missing(lost: str, tmp_path: Path) -> None:
    """It was taken off, without a word; only a file that has nothing of one is a network without a classifier."""
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ASTConfig(**small, max_length=40, num_mel_bins=32, num_labels=3)
    module = transformers.ASTForAudioClassification(config)
    kept = {k: v for k, v in module.state_dict().items() if not k.startswith(lost)}
    module.save_pretrained(tmp_path, state_dict=kept)
    if lost == "classifier":
        assert zoo.load(f"transformers:{tmp_path}").num_classes == 0
    else:
        with pytest.raises(ConfigError, match=rf"holds no weights for {lost} \(1 tensors"):
            zoo.load(f"transformers:{tmp_path}")


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "siglip"])
def test_missing_and_strange_tensors_are_named(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(kind, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    norm = next(k for k in state if k.endswith("norm.weight") and "text" not in k)
    save_file({k: v for k, v in state.items() if k != norm}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for .*norm.weight"):
        zoo.load(f"transformers:{tmp_path}", num_classes=0)
    save_file({**state, "further.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"has over 1: further.weight"):
        zoo.load(f"transformers:{tmp_path}", num_classes=0)


@pytest.mark.parametrize(
    "kind", ["vit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "siglip", "siglip2"]
)
def test_images_of_another_size(kind: str, tmp_path: Path) -> None:
    """Weights stay those of the checkpoint: an adapter of one size is loaded at another one."""
    saved(kind, tmp_path)
    name = f"transformers:{tmp_path}"
    model = zoo.load(name, "lora", num_classes=3, image_size=48).eval()
    assert model.image_size == (48, 48) and model(torch.randn(1, 3, 48, 48)).shape == (1, 3)
    model.save_adapter(tmp_path / "adapter")
    again = zoo.load(name, adapter=tmp_path / "adapter", image_size=32).eval()
    assert again.image_size == (32, 32) and again(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ConfigError, match="multiple of the patches' size"):
        zoo.load(name, num_classes=0, image_size=50)
    with pytest.raises(DataError, match="height and width multiples of 8"):
        model(torch.randn(1, 3, 50, 50))


def test_a_merged_model_is_saved_as_the_librarys(tmp_path: Path) -> None:
    """Names of classes stand in the configuration, where `LABEL_0` stood."""
    model = make("vit", "lora", num_classes=2)
    model.classes = ["cat", "dog"]
    settle(model)
    x = batch(model)
    model.merge().save_pretrained(tmp_path)
    plain = transformers.ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert plain.config.id2label == {0: "cat", 1: "dog"} and plain.config.label2id == {"cat": 0, "dog": 1}
    torch.testing.assert_close(plain(x).logits, model(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(MergeError, match="no place for a classifier"):
        make("dinov3_vit", num_classes=2).merge()


def test_preprocessing_is_read_from_the_folder(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    config = {
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 40},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    data = zoo.load(f"transformers:{tmp_path}", num_classes=0).family.data_config()
    assert data["input_size"] == (3, 32, 32) and data["mean"] == (0.1, 0.2, 0.3) and data["std"] == (0.4, 0.5, 0.6)
    assert (data["crop_pct"], data["crop_mode"], data["interpolation"]) == (0.8, "center", "bilinear")


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "siglip"])
def test_lora_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    """Written for peft and read by it onto the library's network: the same outputs."""
    peft = pytest.importorskip("peft")
    model = make(kind, zoo.adapter("lora", rank=2))
    settle(model)
    zoo.to_peft(model.float(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(library(make(kind)).float(), tmp_path).eval()
    x = batch(model).float()
    with torch.no_grad():
        torch.testing.assert_close(answer(theirs.base_model.model, x), model.features(x), rtol=2e-6, atol=2e-6)
