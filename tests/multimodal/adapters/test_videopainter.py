"""VideoPainter on every transformer of videos: its start, who gets what, saving, several adapters, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import zoo
from multimodal.families.diffusion.crossdit_video import VIDEOS
from multimodal.families.diffusion.mmdit_video import MEMBERS
from zoo.disk import attach, read
from zoo.errors import AttachError, ConfigError, ContextError, DataError, MergeError
from zoo.registry import family

COG: dict[str, Any] = {**family("cogvideox").tiny[1], "num_layers": 4}  # type: ignore[index]
TINY: dict[str, dict[str, Any]] = {
    "cogvideox-5b": COG,
    "cogvideox-5b-i2v": {**COG, "in_channels": 8},
    "cogvideox-2b": COG,
    **{f"diffusers:{name}": dict(member.tiny) for name, member in {**VIDEOS, **MEMBERS}.items()},
}


def build(name: str = "cogvideox-5b", *adapters: Any, **options: Any) -> tuple[zoo.Model, tuple[Tensor, ...]]:
    """A tiny random model, and a batch of two."""
    torch.manual_seed(0)
    model = zoo.load(name, list(adapters), pretrained=False, **{**TINY[name], **options})
    model.family.stir()
    return model.eval(), model.family.tiny_batch()


def stirred(model: zoo.Model) -> zoo.Model:
    """The encoder's projections away from zero."""
    with torch.no_grad():
        for linear in model.adapters["videopainter"].encoder.out:
            linear.weight.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", TINY)
def test_every_transformer_of_videos(name: str) -> None:
    """The start is the frozen function, and every trained parameter gets a gradient; masked tokens are told nothing."""
    model, batch = build(name)
    with torch.no_grad():
        before = model(*batch)
        model.add_adapter(zoo.adapter("videopainter", blocks=1))
        given = model.example_context(*batch)
        assert torch.equal(model(*batch, context=given), before)
        assert model.probe(*batch) == []
        moved = stirred(model)(*batch, context=given)
        assert not torch.equal(moved, before)
        whole = {**given, "mask": torch.ones_like(given["mask"])}
        assert torch.equal(model(*batch, context=whole), before)  # no token of the background
        model.remove_adapter("videopainter")
        assert torch.equal(model(*batch), before)


def test_tokens_and_shares() -> None:
    """A token with one masked latent is no background; block i of four is told by block i // 2 of the encoder."""
    model, batch = build("cogvideox-5b", zoo.adapter("videopainter", blocks=2, scale=0.5))
    encoder = stirred(model).adapters["videopainter"].encoder
    mask = torch.zeros(2, 4, 1, 8, 8)
    mask[0, 1, 0, 3, 3] = 1
    tokens = encoder.front.tokens(mask)
    assert tokens.nonzero().tolist() == [[0, 16 + 1 * 4 + 1]]
    masked = torch.randn_like(batch[0])
    told, background = encoder(batch[0], masked, mask, *batch[1:], None, None)
    assert torch.equal(background, ~tokens)
    seen: list[Tensor] = []
    with torch.no_grad():
        for linear, scale in zip(encoder.out, (1.0, 2.0)):
            linear.weight.zero_()
            linear.bias.fill_(scale)
    hooks = [b.register_forward_hook(lambda m, a, o: seen.append(o[0])) for b in model.backbone.transformer_blocks]  # type: ignore[union-attr]
    module: Any = model.backbone
    by_hand: list[Tensor] = []
    with torch.no_grad():
        output = model(*batch, context={"masked": masked, "mask": mask})
        for hook in hooks:
            hook.remove()
        with model.disable():
            x, text = module.patch_embed(batch[2], batch[0])[:, 5:], module.patch_embed(batch[2], batch[0])[:, :5]
            emb = module.time_embedding(module.time_proj(batch[1]))
            from multimodal.families.diffusion.attention import video_positions

            turned = video_positions(model.family.config, batch[0])  # type: ignore[attr-defined]
            for i, block in enumerate(module.transformer_blocks):
                x, text = block(x, text, emb, image_rotary_emb=turned)
                x = x + 0.5 * (1.0, 2.0)[i // 2] * (~tokens)[..., None]
                by_hand.append(x)
    assert output.shape == batch[0].shape
    torch.testing.assert_close(torch.stack(seen), torch.stack(by_hand), rtol=1e-5, atol=1e-5)
    assert all(t.abs().max() > 0 for t in told)


def test_saves_reloads_and_combines(tmp_path: Path) -> None:
    model, batch = build("cogvideox-5b", zoo.adapter("videopainter", blocks=1), zoo.adapter("lora", rank=2))
    stirred(model)
    given = model.example_context(*batch)
    twin, _ = build("cogvideox-5b")
    attach(twin, read(model.save_adapter(tmp_path / "out", "videopainter")))
    model.remove_adapter("lora")
    with torch.no_grad():
        assert torch.equal(twin.eval()(*batch, context=given), model(*batch, context=given))
    saved = model.adapters["videopainter"].state_dict()
    assert not any("pos_embedding" in key or "norm_out" in key for key in saved)
    with pytest.raises(MergeError, match="'videopainter' cannot be merged"):
        model.merge()


def test_samples_with_adapters_of_their_own() -> None:
    model, batch = build("cogvideox-5b", zoo.adapter("videopainter", blocks=1))
    given = {k: torch.randn_like(v) if k == "masked" else v for k, v in model.example_context(*batch).items()}
    stirred(model)
    with torch.no_grad():
        both = model(*batch, context=given)
        with model.disable():
            bare = model(*batch)
        mixed = model(*batch, context=given, adapters=["videopainter", None])
    torch.testing.assert_close(mixed, torch.stack([both[0], bare[1]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["low", "min"])
def test_memory_settings_give_the_same_gradients(memory: str) -> None:
    model, batch = build("cogvideox-5b", zoo.adapter("videopainter", blocks=2))
    given = model.example_context(*batch)
    stirred(model).train()
    found = []
    for setting in ("default", memory):
        model.memory = setting
        model.zero_grad()
        model(*batch, context=given).square().mean().backward()
        found.append({k: p.grad.clone() for k, p in model.parameters_to_train().items()})  # type: ignore[union-attr]
    assert all(torch.allclose(found[0][k], found[1][k], rtol=1e-4, atol=1e-6) for k in found[0])


def test_half_precision() -> None:
    """The encoder stays in float32 and is cast at its products."""
    model, batch = build("cogvideox-5b", zoo.adapter("videopainter", blocks=1), dtype=torch.bfloat16)
    narrow = tuple(b.bfloat16() if b.is_floating_point() else b for b in batch)
    given = model.example_context(*narrow)
    output = stirred(model)(*narrow, context=given)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    assert all(p.dtype == torch.float32 for p in model.parameters_to_train().values())


def test_what_is_refused() -> None:
    with pytest.raises(AttachError, match="no transformer of videos"):
        zoo.load("vit-micro", "videopainter", num_classes=2, pretrained=False)
    model, batch = build()
    with pytest.raises(AttachError, match=r"encoder of 5 blocks cannot be cut out of 'cogvideox-5b', which has 4"):
        model.add_adapter(zoo.adapter("videopainter", blocks=5))
    with pytest.raises(ConfigError, match="blocks is 0"):
        zoo.adapter("videopainter", blocks=0)
    assert not model.adapters and not any(m._forward_hooks for m in model.backbone.modules())
    model.add_adapter("videopainter")
    with pytest.raises(ContextError, match="needs 'masked'"):
        model(*batch)
    given = model.example_context(*batch)
    with pytest.raises(DataError, match=r"'mask' is \(2, 4, 1, 4, 8\) for latents"):
        model(*batch, context={**given, "mask": given["mask"][..., :4, :]})
    with pytest.raises(DataError, match="'masked' is"):
        model(*batch, context={**given, "masked": given["masked"][:, :3]})


def test_it_adds_no_more_than_its_share_of_blocks() -> None:
    """Products of one pass: one block of eight, its projection, and the embeddings in front of it once more."""
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = build("cogvideox-5b", num_layers=8)
    counted = []
    for adapter in (None, zoo.adapter("videopainter", blocks=1)):
        if adapter is not None:
            model.add_adapter(adapter)
        given = {} if adapter is None else model.example_context(*batch)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*batch, context=given)
        counted.append(counter.get_total_flops())
    tokens, width = 4 * 4 * 4, 32
    projection = 2 * 2 * tokens * width * width
    mask = 2 * 2 * tokens * width * (2 * 4 + 1 - 4) * 4  # channels that its patches have more
    assert 0 < counted[1] - counted[0] - projection - mask <= counted[0] / 8 * 1.25


def test_under_torch_compile() -> None:
    """The encoder runs beside the graph, which breaks there: the same outputs and gradients, and no graph of the whole."""
    model, batch = build("cogvideox-5b", zoo.adapter("videopainter", blocks=1), num_layers=2)
    stirred(model).train()
    given = model.example_context(*batch)
    compiled = torch.compile(model, backend="eager")
    found = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        output = run(*batch, context=given)
        output.square().mean().backward()
        found.append((output.detach(), {k: p.grad for k, p in model.parameters_to_train().items()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.compiler.disable"):
        torch.compile(model, backend="eager", fullgraph=True)(*batch, context=given)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_goes_on_by_itself(how: str) -> None:
    """What it takes as an example of a mask was a function within a function, which no process can be handed."""
    model, batch = build("cogvideox-5b", "videopainter")
    twin = pickle.loads(pickle.dumps(stirred(model))) if how == "pickle" else copy.deepcopy(stirred(model))
    with torch.no_grad():
        expected, found = (m(*batch, context=m.example_context(*batch)) for m in (model, twin))
    assert torch.equal(found, expected)
    twin.set_active()
    with torch.no_grad():
        assert not torch.equal(twin(*batch), expected)
    assert torch.equal(model(*batch, context=model.example_context(*batch)), expected)
