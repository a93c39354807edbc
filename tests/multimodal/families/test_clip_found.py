"""Towers of open_clip that are no vision transformers: what is found in them, equal to the library, trained and merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo

pytest.importorskip("open_clip")
from clip_models import TEXT, batch

from zoo.errors import MismatchError, ZooError

TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("RN50", {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}),
    "convnext": (
        "convnext_base",
        {"timm_model_name": "test_convnext2", "timm_proj": "linear", "timm_pool": "", "image_size": 32},
    ),
    "convnext mlp": (
        "convnext_large_d",
        {"timm_model_name": "test_convnext", "timm_proj": "mlp", "timm_pool": "avg", "image_size": 32},
    ),
    "fastvit": (
        "MobileCLIP-S1",
        {"timm_model_name": "fastvit_t8", "timm_proj": None, "timm_pool": "avg", "image_size": 64},
    ),
    "text of transformers": (
        "roberta-ViT-B-32",
        {"width": 48, "layers": 2, "head_width": 16, "image_size": 16, "patch_size": 8},
    ),
}
ROBERTA = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2),
    "model_type": "roberta",
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 600,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def make(kind: str, folder: Path, *adapters: Any, **options: Any) -> zoo.Model:
    """A small model in float64, with numbers that are no initial ones."""
    name, vision = TOWERS[kind]
    text: dict[str, Any] = dict(TEXT)
    if kind.startswith("text"):
        (folder / "config.json").write_text(json.dumps(ROBERTA))
        text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False}
        text |= {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", "vocab_size": 600, "context_length": 12}
    torch.manual_seed(0)
    cfg = {"vision_cfg": vision, "text_cfg": text, "embed_dim": 24}
    model = zoo.load(f"open_clip:{name}", list(adapters), pretrained=False, **{**cfg, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model.double()


@pytest.mark.parametrize("kind", list(TOWERS))
def test_lora_in_both_towers_merges_into_the_librarys_own(kind: str, tmp_path: Path) -> None:
    model = make(kind, tmp_path, "lora").eval()
    images, ids = batch(model)
    other = "text" if kind.startswith("text") else "image"
    assert {p.kind for p in model.points.select(tower=other)} == {"linear", "norm"}
    named = {key.split(".")[0] for key, _ in model.adapters["lora"].named_parameters()}
    assert named == {"image", "text"}
    bare = copy.deepcopy(model)
    bare.remove_adapter("lora")
    library: Any = bare.merge()
    assert not [m for m in library.modules() if type(m).__module__.startswith(("zoo", "multimodal"))]
    with torch.no_grad(), model.disable():
        torch.testing.assert_close(model(images, ids), library.get_logits(images, ids)[0], rtol=1e-10, atol=1e-10)
        if other == "image":  # open_clip's own blocks have attentions of ours, equal to 1e-12
            assert torch.equal(model.features(images), library.encode_image(images))
        else:
            assert torch.equal(model.features(texts=ids), library.encode_text(ids))
    assert model.probe(images, ids) == []
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.05)
    start = model(images, ids).detach()
    for _ in range(2):
        scores = model(images, ids)
        F.cross_entropy(scores, torch.arange(3)).backward()
        optimizer.step()
    with torch.no_grad():
        scores = model(images, ids)
        assert (scores - start).abs().max() > 1e-4
        merged: Any = model.merge()
        torch.testing.assert_close(merged.get_logits(images, ids)[0], scores, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["lora", "norm", "bitfit", "ssf"])
def test_a_classifier_on_such_a_tower(method: str, tmp_path: Path) -> None:
    for kind in ("resnet", "convnext"):
        model = make(kind, tmp_path, method, num_classes=3)
        images, _ = batch(model)
        assert {p.tower for p in model.points} == {"image"} and model.probe(images) == []
        assert model.eval()(images).shape == (3, 3)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    model = make("resnet", tmp_path)
    with pytest.raises(ZooError, match=r"the image tower of .* has no (tokens|attention) points"):
        model.add_adapter("vpt")
    for method in ("partial", "ladder", "unipelt"):
        with pytest.raises(ZooError, match=r"the image tower of .* has no (attention|block) points"):
            model.add_adapter(method)
    with pytest.raises(ZooError, match=r"the image tower of .* has no point for 'mlp'"):
        model.add_adapter("adapter")
    with pytest.raises(ZooError, match=r"the image tower of .* has no projection for 'all-linear'"):
        model.add_adapter(zoo.adapter("lora", targets="all-linear"))
    with pytest.raises(ZooError, match=r"'image.attnpool.q_proj' cannot be chosen .* never called"):
        model.add_adapter(zoo.adapter("lora", targets="image.attnpool.q_proj"))
    with pytest.raises(ZooError, match=r"needs tokens points|needs attention points"):
        make("resnet", tmp_path, "vqt", num_classes=3)
    with pytest.raises(MismatchError, match="maps"):
        model.outputs(batch(model)[0], want=("maps",))
    assert not model.adapters
    model.add_adapter(zoo.adapter("lora", targets="text.**.{q,v}"))
    assert {key.split(".")[0] for key, _ in model.adapters["lora"].named_parameters()} == {"text"}


def test_saves_and_reloads(tmp_path: Path) -> None:
    name, vision = TOWERS["convnext"]
    options = {"vision_cfg": vision, "text_cfg": TEXT, "embed_dim": 24, "pretrained": False}
    torch.manual_seed(0)
    model = zoo.load(f"open_clip:{name}", "lora", **options).eval()
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1)
    folder = model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)
    again = zoo.load(f"open_clip:{name}", adapter=folder, **options).eval()
    images, ids = batch(model)
    assert torch.equal(again(images.float(), ids), model(images.float(), ids))
