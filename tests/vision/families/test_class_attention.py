"""CaiT and XCiT: everything is a point, the class token's attention, talking heads, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "xcit": ("xcit_nano_12_p16_224", {}),
    "xcit, all tokens normed": ("xcit_small_12_p8_224", {}),
    "cait": ("cait_xxs24_224", {"init_values": 1.0}),
}
EACH = pytest.mark.parametrize("kind", list(NETS))


def load(kind: str, *adapters: Any, **options: Any) -> zoo.Model:
    name, more = NETS[kind]
    torch.manual_seed(0)
    options = {"num_classes": 3, **SMALL, **more, **options}
    model = zoo.load(f"timm:{name}", list(adapters), pretrained=False, **options).eval().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in [*model.backbone.named_parameters(), *model.adapters.named_parameters()]:
            p.add_((1.0 if key.endswith("prompt") else 0.1) * torch.randn(p.shape, generator=generator))
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 0.1  # type: ignore[operator]
                module.running_var *= 1.5  # type: ignore[operator]
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(2))


@EACH
def test_the_network_is_timms_and_what_has_a_weight_is_a_point(kind: str) -> None:
    name, more = NETS[kind]
    model = load(kind)
    plain = timm.create_model(name, num_classes=0, **SMALL, **more).eval().double().requires_grad_(False)
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.features(images()), plain(images()))
    found = {p.module for p in model.points}
    leaves = [n for n, m in model.backbone.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    assert [n for n in leaves if model.backbone.get_submodule(n) not in found] == (
        [] if kind == "cait" else ["pos_embed.token_projection"]  # of places, not of images
    )


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm", "ssf", "adapter", "ia3", "prefix"])
@EACH
def test_nothing_is_dead_and_merges_are_exact(kind: str, method: str) -> None:
    model = load(kind, zoo.adapter("lora", targets="all-linear") if method == "lora" else method)
    assert model.probe(images()) == []
    if method not in ("adapter", "prefix"):
        torch.testing.assert_close(model.merge()(images()), model(images()))


def test_counts_of_full_size() -> None:
    for name, options in (("xcit-s12-p16", {}), ("cait-xxs24", {})):
        model = zoo.load(name, num_classes=0, device="meta", **options)
        short = model.family.aliases[name].removeprefix("timm:")
        with torch.device("meta"):
            plain = timm.create_model(short, num_classes=0)
        assert model.num_parameters() == sum(p.numel() for p in plain.parameters())


@EACH
def test_a_prefix_of_the_class_token(kind: str) -> None:
    """Against the attention written out: one query, its own keys and the prefix's."""
    model = load(kind, zoo.adapter("prefix", targets="class_blocks.1.attn.product", num_tokens=4))
    attention: Any = model.points["class_blocks.1.attn.product"].module
    x = torch.randn(3, 17, 32, dtype=torch.double)
    keys, values = attention.forward.__self__.pairs(3, x.dtype)[0]

    def by_head(t: Tensor) -> Tensor:
        return t.unflatten(-1, (2, 16)).transpose(1, 2)

    k, v = by_head(attention.k(x)), by_head(attention.v(x))
    k, v = (torch.cat([e.expand(3, -1, -1, -1), own], dim=2) for e, own in ((keys, k), (values, v)))
    weights = (by_head(attention.q(x[:, :1])) @ k.transpose(-1, -2) * attention.scale).softmax(dim=-1)
    torch.testing.assert_close(attention(x), attention.proj((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_among_talking_heads(deep: bool) -> None:
    model = load("cait", zoo.adapter("vpt", num_tokens=3, deep=deep))
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    found = model.features(images())
    net: Any = model.backbone
    with model.disable():
        bare = model.features(images())
        x = net.patch_embed(images()) + net.pos_embed
        for i, block in enumerate(net.blocks):
            if deep or i == 0:
                x = torch.cat([prompts[i].expand(len(x), -1, -1), x[:, 3 * (i > 0) :]], dim=1)
            x = block(x)
        expected = net.forward_head(net.norm(net.forward_cls(x[:, 3:])), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - bare).abs().max() > 1e-4
    assert model.probe(images()) == []


def test_sublayers_and_halves() -> None:
    model = load("xcit")
    roles = [p.role for p in model.points.select(kind="sublayer")]
    assert roles == ["attn", "mixer", "mlp"] * 2 + ["mlp"] * 2
    model = load("xcit", zoo.adapter("adapter", form="parallel", targets="attn,mixer,mlp"))
    assert model.probe(images()) == []
    cait = load("cait")
    block, x = cait.backbone.blocks[1], torch.randn(2, 5, 32, dtype=torch.double)  # type: ignore[index,union-attr]
    assert torch.equal(cait.family.half(block, "mlp", cait.family.half(block, "attn", x)), block(x))
    maps = load("xcit").outputs(images(), want=("tokens", "maps"))
    assert maps["tokens"].shape == (3, 17, 32) and maps["maps"][0].shape == (3, 32, 4, 4)


def test_what_is_refused() -> None:
    for kind, method, reason in (
        ("xcit", "vpt", "needs tokens points"),
        ("xcit", "vqt", "class token as its one query"),
        ("xcit", "meft", "by hand"),
        ("cait", "vqt", "TalkingHeadAttn"),
        ("cait", "ladder", "another attention behind"),
    ):
        with pytest.raises(AttachError, match=reason):
            load(kind, method)
