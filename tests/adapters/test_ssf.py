"""SSF: where it scales and shifts, its start, merging, memory to the byte. Outputs: tests/fidelity/test_outputs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.adapters.parts.rescale import Rescale
from zoo.errors import ConfigError, MergeError

BATCH, TOKENS, DIM, DEPTH = 2, 65, 48, 3
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def vit(config: Any = None, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", config, pretrained=False, num_classes=5, **{**TINY, **options})


def swin(config: Any = None) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("timm:swin_tiny_patch4_window7_224", config, pretrained=False, num_classes=5, **SWIN)


def images(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))


def shake(model: zoo.Model) -> None:
    with torch.no_grad():
        for p in model.adapters["ssf"].parameters():
            p.add_(0.2 * torch.randn(p.shape))


def test_group_of_slices() -> None:
    """Slices of a fused projection in one pass; what lies between them stays, to the bit."""
    y = torch.randn(4, 7, 10, requires_grad=True)
    a, b = Rescale(3, std=0.5), Rescale(2, shift=False, std=0.5)
    out = Rescale.rescale_group(((a, 1, 4), (b, 6, 8)), y)
    expected = torch.cat(
        [y[..., :1], y[..., 1:4] * a.scale + a.shift, y[..., 4:6], y[..., 6:8] * b.scale, y[..., 8:]], dim=-1
    )
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[..., [0, 4, 5, 8, 9]], y[..., [0, 4, 5, 8, 9]])
    found = torch.autograd.grad(out.square().sum(), [y, a.scale, a.shift, b.scale])  # type: ignore[list-item]
    wanted = torch.autograd.grad(expected.square().sum(), [y, a.scale, a.shift, b.scale])  # type: ignore[list-item]
    torch.testing.assert_close(found, wanted)


def test_narrow_outputs_wide_scales() -> None:
    """A scale of 1.003 is 1 in bfloat16; it must act all the same."""
    module = Rescale(1)
    with torch.no_grad():
        module.scale.fill_(1.003)
    y = torch.full((1, 1), 1000.0, dtype=torch.bfloat16)
    assert module(y).dtype == torch.bfloat16 and module(y).item() == torch.tensor(1003.0).bfloat16().item() != 1000


def test_after_every_operation() -> None:
    """The output of each projection and norm, as hooks behind ours see it, against the bare module's on the same input."""
    model, x = vit("ssf"), images()
    shake(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {n: m for n, m in model.backbone.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.Conv2d))}
    handles = [
        m.register_forward_hook(lambda m, a, y, n=n: seen.__setitem__(n, (type(m).forward(m, a[0]), y)))
        for n, m in modules.items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    points = {p.path: p.name for p in model.points if p.kind in ("linear", "norm") and "qkv" not in p.path}
    assert len(seen) == 2 + DEPTH * 6
    adapter = model.adapters["ssf"]
    for name, (before, after) in seen.items():
        if name.endswith("qkv"):
            parts = [adapter.module_at(f"{name[:-3]}{r}") for r in "qkv"]
        else:
            parts = [adapter.module_at(points[name])]
        scale, shift = (torch.cat([getattr(p, k) for p in parts]) for k in ("scale", "shift"))
        if name == "patch_embed.proj":  # a map of channels
            scale, shift = scale[:, None, None], shift[:, None, None]
        torch.testing.assert_close(after, before * scale + shift)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * DIM * (2 + 11 * DEPTH)


def test_start() -> None:
    model, x = vit(zoo.adapter("ssf", init_std=0.0)), images()
    with model.disable():
        bare = model(x)
    assert torch.equal(model(x), bare)
    drawn = vit("ssf", depth=6, embed_dim=96).adapters["ssf"].state_dict()
    for key, mean in (("scale", 1.0), ("shift", 0.0)):
        values = torch.cat([v for k, v in drawn.items() if k.endswith(key)])
        assert values.mean().item() == pytest.approx(mean, abs=1e-3)
        assert values.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("build", [vit, swin])
def test_merging(build: Any) -> None:
    model = build("ssf")
    shake(model)
    x = images(model.image_size[0])
    plain = model.merge()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    assert type(plain) is type(model.backbone)
    assert set(plain.state_dict()) >= set(model.backbone.state_dict())


def test_merging_by_hand() -> None:
    model = vit("ssf")
    shake(model)
    plain, state, adapter = model.merge(), model.backbone.state_dict(), model.adapters["ssf"].state_dict()
    scale = torch.cat([adapter[f"blocks.1.attn.{r}.scale"] for r in "qkv"])
    shift = torch.cat([adapter[f"blocks.1.attn.{r}.shift"] for r in "qkv"])
    found = plain.state_dict()
    torch.testing.assert_close(found["blocks.1.attn.qkv.weight"], scale[:, None] * state["blocks.1.attn.qkv.weight"])
    torch.testing.assert_close(found["blocks.1.attn.qkv.bias"], scale * state["blocks.1.attn.qkv.bias"] + shift)
    torch.testing.assert_close(found["norm.weight"], adapter["norm.scale"] * state["norm.weight"])


def test_no_bias_to_merge_into() -> None:
    model = swin(zoo.adapter("ssf", targets="merge"))
    assert model.num_parameters(trainable=True, head=False) == 2 * 48
    with pytest.raises(MergeError, match="has no bias"):
        model.merge()


def test_kept_bytes() -> None:
    """Beyond BitFit: the unscaled outputs of o and down, and of the patch embedding; never an output twice."""
    x, unit = images(), BATCH * TOKENS * DIM * 4
    vectors = 2 * 3 * DIM * 4  # scales and shifts of q, k and v, joined
    patches = BATCH * (TOKENS - 1) * DIM * 4
    more = vit("ssf").saved_bytes(x) - vit("bitfit").saved_bytes(x)
    assert more == DEPTH * (2 * unit + vectors) + patches


def test_settings() -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        zoo.adapter("ssf", init_std=-1.0)
    model = vit(zoo.adapter("ssf", targets=("up", "blocks.0.norm1")))
    assert sorted({k.rsplit(".", 1)[0] for k in model.adapters["ssf"].state_dict()}) == [
        "blocks.0.mlp.up",
        "blocks.0.norm1",
        "blocks.1.mlp.up",
        "blocks.2.mlp.up",
    ]
