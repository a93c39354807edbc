"""Checkpoints that lack a tensor of the network, or have one over, are refused: nothing is made up for what is missing.

Seen before: a folder of diffusers or of T5 with one tensor taken out, and a T5 encoder's folder, loaded with random numbers in
the place of what was missing, another fingerprint each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import transformers
from diffusion_models import make

import zoo
from zoo.table import tiny_model

DIFFUSION = ("dit", "pixart", "sd3", "flux", "cogvideox")
WRITTEN = ("vl-t5", "vl-bart")


def saved(name: str, folder: Path) -> tuple[str, Path, Any]:
    """A tiny network saved by its library: the name to load it by, its file of weights, and the network."""
    if name in DIFFUSION:
        module: Any = make(name)[0].backbone
        source = f"diffusers:{folder}"
    elif name in WRITTEN:
        module = tiny_model(name)[0].merge()
        source = f"transformers:{folder}"
    else:
        config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
        module = transformers.T5ForConditionalGeneration(config)
        source = f"transformers:{folder}"
    module.save_pretrained(folder)
    return source, next(folder.glob("*.safetensors")), module


@pytest.mark.parametrize("name", [*DIFFUSION, *WRITTEN, "t5"])
def test_one_tensor_less_or_more_is_named(name: str, tmp_path: Path) -> None:
    source, file, _ = saved(name, tmp_path)
    first = zoo.load(source, device=None)
    assert first.fingerprint == zoo.load(source).fingerprint
    whole = load_file(file)
    key = [k for k in whole if k.endswith("weight") and whole[k].ndim == 2][1]
    save_file({k: v for k, v in whole.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(zoo.errors.WeightsError, match=f"lacks 1: {key}".replace(".", r"\.")):
        zoo.load(source)
    save_file({**whole, "blocks.99.extra": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(zoo.errors.WeightsError, match=r"has over 1: blocks\.99\.extra"):
        zoo.load(source)
    save_file(whole, file, {"format": "pt"})
    assert zoo.load(source).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["dit", "flux", "cogvideox"])
def test_another_number_of_blocks_is_another_network(name: str, tmp_path: Path) -> None:
    """Fewer blocks than the file has would drop some in silence, more would be half random."""
    source, _, module = saved(name, tmp_path)
    count = module.config.num_layers
    with pytest.raises(zoo.errors.WeightsError, match="lacks"):
        zoo.load(source, num_layers=count + 1)
    if count > 1:
        with pytest.raises(zoo.errors.WeightsError, match="has over"):
            zoo.load(source, num_layers=count - 1)
    assert zoo.load(source, num_layers=count + 1, pretrained=False).num_parameters() > module.num_parameters()


def test_shapes_that_are_to_be_ignored_are_not(tmp_path: Path) -> None:
    source, _, _ = saved("dit", tmp_path)
    with pytest.raises(zoo.errors.ZooError, match=r"num_embeds_ada_norm|embedding_table|lacks"):
        zoo.load(source, num_embeds_ada_norm=5, ignore_mismatched_sizes=True)


def test_an_encoder_alone_is_no_t5(tmp_path: Path) -> None:
    """A T5EncoderModel folder has no decoder: it is refused, and said what it is."""
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(zoo.errors.WeightsError, match=r"it says that it is a T5EncoderModel.*lacks \d+: decoder"):
        zoo.load(f"transformers:{tmp_path}")


def test_a_new_visual_embedding_is_no_gap(tmp_path: Path) -> None:
    """Plain T5 weights with `feat_dim=`: the visual embedding starts at random; where it was saved, it must be whole."""
    source, file, module = saved("t5", tmp_path / "text")
    model = zoo.load(source, feat_dim=6)
    assert any("visual_embedding" in key for key in model.backbone.state_dict())
    for key, value in module.state_dict().items():
        own = model.backbone.state_dict()[key]
        assert torch.equal(own[: len(value)], value), key
    # saved with its visual embedding, and then without a part of it
    source, file, _ = saved("vl-t5", tmp_path / "visual")
    whole = load_file(file)
    key = next(k for k in whole if "visual_embedding.feat_embedding" in k)
    save_file({k: v for k, v in whole.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(zoo.errors.WeightsError, match=r"lacks 1: .*visual_embedding"):
        zoo.load(source)


def test_fewer_layers_of_a_sound_encoder(tmp_path: Path) -> None:
    model, _ = tiny_model("wav2vec2")
    model.merge().save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(zoo.errors.WeightsError, match=r"has over \d+: wav2vec2\.encoder\.layers\.1"):
        zoo.load(f"transformers:{tmp_path}", num_hidden_layers=1)
