"""CogVideoX: counts, its block written out by hand, images, frames and text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusion_models import make

import zoo
from zoo.registry import family as family_class

TINY: dict[str, Any] = dict(family_class("cogvideox").tiny[1])  # type: ignore[index]


def build(name: str, *adapters: Any, **options: Any) -> tuple[zoo.Model, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = zoo.load(name, list(adapters), pretrained=False, **{**TINY, **options})
    return model, model.family.tiny_batch()


@pytest.mark.parametrize(
    ("name", "count"),
    [("cogvideox-2b", 1_693_783_872), ("cogvideox-5b", 5_570_283_072), ("cogvideox-5b-i2v", 5_570_479_680)],
)
def test_counts(name: str, count: int) -> None:
    model = zoo.load(name, "lora", device="meta")
    assert model.num_parameters() - model.num_parameters(trainable=True) == count
    layers, dim = (30, 1920) if name.endswith("2b") else (42, 3072)
    assert model.num_parameters(trainable=True) == layers * 2 * 8 * 2 * dim  # q and v
    named = {p.path for p in model.points if p.kind in ("linear", "norm")}
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)
    assert named == {n for n, m in model.backbone.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("source", ["input", "residual", "after"])
def test_a_block_by_hand(source: str) -> None:
    """The equations of `multimodal.families.diffusion.cogvideox`, with an adapter in each sublayer that sees text and video."""
    if source == "after":
        adapter = zoo.adapter("adapter", form="houlsby", rank=3)
    else:
        adapter = zoo.adapter("adapter", form="parallel", rank=3, targets=("attn", "mlp"), source=source)
    model, _ = make("cogvideox", adapter)
    parts = model.adapters["adapter"]
    block: Any = model.backbone.transformer_blocks[1]  # type: ignore[index]
    video, text, condition = torch.randn(2, 6, 32), torch.randn(2, 5, 32), torch.randn(2, 8)
    turned = torch.randn(6, 16), torch.randn(6, 16)
    with torch.no_grad():
        ours = block(video, text, condition, image_rotary_emb=turned)
        with model.disable():
            stream = torch.cat([text, video], dim=1)
            for norm, name in ((block.norm1, "attn"), (block.norm2, "mlp")):
                modulation = norm.linear(torch.nn.functional.silu(condition))[:, None].chunk(6, dim=-1)
                a, b, g = (
                    torch.cat([modulation[i + 3].expand(-1, 5, -1), modulation[i].expand(-1, 6, -1)], dim=1)
                    for i in range(3)
                )
                z = norm.norm(stream) * (1 + b) + a
                if name == "attn":
                    both = block.attn1(z[:, 5:], encoder_hidden_states=z[:, :5], image_rotary_emb=turned)
                    output = torch.cat([both[1], both[0]], dim=1)
                else:
                    output = block.ff(z)
                part: Any = parts.get_submodule(f"blocks.1.{name}")
                added = part(z if source == "input" else stream)
                stream = stream + g * (part(output) if source == "after" else output + added)
    torch.testing.assert_close(torch.cat([ours[1], ours[0]], dim=1), stream, rtol=1e-5, atol=1e-5)


def test_image_to_video() -> None:
    model, (video, steps, text, image) = build("cogvideox-5b-i2v", in_channels=8)
    assert image.shape == (2, 1, 4, 8, 8)
    from multimodal.families.diffusion.attention import video_positions

    turned = video_positions(model.family.config, video)  # type: ignore[attr-defined]
    padded = torch.cat([image, torch.zeros(2, 3, 4, 8, 8)], dim=1)
    module: Any = model.backbone
    with torch.no_grad():
        joined = torch.cat([video, padded], dim=2)
        expected = module(joined, text, steps, image_rotary_emb=turned).sample
        assert torch.equal(model(video, steps, text, image), expected)
        assert torch.equal(model(video, steps, text, image_latents=padded), expected)
        assert not torch.equal(model(video, steps, text, image + 1), expected)
    with pytest.raises(zoo.errors.ConfigError, match="image-to-video model: give the image's latents"):
        model(video, steps, text)
    with pytest.raises(zoo.errors.DataError, match="image_latents are"):
        model(video, steps, text, image[..., :4])
    plain, (video, steps, text) = build("cogvideox-5b")
    with pytest.raises(zoo.errors.ConfigError, match="takes no image"):
        plain(video, steps, text, image)


def test_patches_in_time() -> None:
    """CogVideoX 1.5: two frames in a patch, an offset embedding, and positions cut out of a grid."""
    options = {"patch_size_t": 2, "ofs_embed_dim": 8, "in_channels": 8, "patch_bias": False}
    lora = zoo.adapter("lora", targets=("patch", "offset", "q"), rank=2)
    model, (video, steps, text, image) = build("cogvideox-5b", lora, **options)
    assert model.probe(video, steps, text, image) == []
    module: Any = model.backbone
    from diffusers import CogVideoXPipeline

    pipe: Any = CogVideoXPipeline(None, None, None, module, None)
    turned = pipe._prepare_rotary_positional_embeddings(64, 64, 4, torch.device("cpu"))
    padded = torch.cat([image, image, torch.zeros(2, 2, 4, 8, 8)], dim=1)
    with torch.no_grad(), model.disable():
        ofs = torch.full((2,), 2.0)
        expected = module(torch.cat([video, padded], dim=2), text, steps, ofs=ofs, image_rotary_emb=turned).sample
        assert torch.equal(model(video, steps, text, image), expected)
    with pytest.raises(zoo.errors.DataError, match=r"3 latent frames; .* in chunks of 2.* give 4"):
        model(video[:, :3], steps, text, image)
    with pytest.raises(zoo.errors.DataError, match="1 latent frames"):
        model(video[:, :1], steps, text, image)


def test_positions_of_the_small_model() -> None:
    """The 2B model adds positions to the patches: text of one length only."""
    model, (video, steps, text) = build("cogvideox-2b")
    module: Any = model.backbone
    with torch.no_grad():
        assert torch.equal(model(video, steps, text), module(video, text, steps).sample)
        assert model(video[:, :2], steps, text).shape == (2, 2, 4, 8, 8)
    with pytest.raises(zoo.errors.DataError, match=r"2 tokens; the positions .* are made for 5"):
        model(video, steps, text[:, :2])


def test_schedulers_are_the_checkpoints() -> None:
    """The noise of the 2B model is shifted; both predict the velocity."""
    small = zoo.load("cogvideox-2b", device="meta").family.scheduler()  # type: ignore[attr-defined]
    large = zoo.load("cogvideox-5b", device="meta").family.scheduler()  # type: ignore[attr-defined]
    assert small.config.prediction_type == large.config.prediction_type == "v_prediction"
    # sigma^2 / alpha^2 is three times as large, shifted
    odds = [(1 - s.alphas_cumprod[500]) / s.alphas_cumprod[500] for s in (small, large)]
    torch.testing.assert_close(odds[0] / odds[1], torch.tensor(3.0, dtype=odds[0].dtype), rtol=0.02, atol=0)
