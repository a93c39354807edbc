"""VQT: against a form written out by hand, and what it promises: an untouched main stream, little memory, no leaks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn

import zoo
from vision import queries as streams
from zoo.memory import saved_bytes

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "pretrained": False, "num_classes": 5}
SWIN: dict[str, Any] = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "pretrained": False,
    "num_classes": 5,
}
SWIN_NAME = "timm:swin_tiny_patch4_window7_224"
TARGETS = torch.tensor([1, 3, 0])


def make(name: str = "vit-micro", adapter: Any = None, seed: int = 0, **options: Any) -> zoo.Model:
    torch.manual_seed(seed)
    adapter = zoo.adapter("vqt", dropout=0.0) if adapter is None else adapter
    return zoo.load(name, adapter, **{**(SWIN if "swin" in name else VIT), **options})


def images(model: zoo.Model, count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(seed))


def named(model: zoo.Model) -> dict[str, Tensor]:
    return dict(model.parameters_to_train())


def gradients(model: zoo.Model, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(x)
    parameters = named(model)
    found = torch.autograd.grad(F.cross_entropy(logits, TARGETS[: len(x)]), list(parameters.values()))
    return logits, dict(zip(parameters, found))


# -- the form of the paper, written out: queries in front of the sequence, keys and values of the tokens behind them --------


def attend(attention: Any, x: Tensor, count: int, mask: Tensor | float = 0.0) -> Tensor:
    """x (B, T + N, d), queries in front -> (B, T + N, d); nobody sees the queries."""
    batch, length, _ = x.shape
    q, k, v = attention.qkv(x).view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k[:, :, count:].transpose(-1, -2) * attention.scale + mask
    out = (scores.softmax(-1) @ v[:, :, count:]).transpose(1, 2).reshape(batch, length, -1)
    if hasattr(attention, "gate") and attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj(attention.norm(out) if hasattr(attention, "norm") else out)


def vit_by_hand(vit: Any, queries: list[Any], x: Tensor) -> Tensor:
    hidden = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    answers = []
    for block, tokens in zip(vit.blocks, queries):
        count = len(tokens)
        both = torch.cat([tokens.expand(len(x), -1, -1), hidden], dim=1)
        both = both + block.ls1(attend(block.attn, block.norm1(both), count))
        both = both + block.ls2(block.mlp(block.norm2(both)))
        answers.append(both[:, :count])
        hidden = both[:, count:]
    return joined(vit.norm(hidden)[:, 0], answers)


def swin_by_hand(swin: Any, queries: list[Any], x: Tensor) -> Tensor:
    hidden, answers = swin.patch_embed(x), []
    blocks = iter(queries)
    for layer in swin.layers:
        hidden = layer.downsample(hidden)
        for block in layer.blocks:
            tokens = next(blocks)
            count, normed = len(tokens), block.norm1(hidden)
            shifted = torch.roll(normed, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
            windows = window_partition(shifted, block.window_size).flatten(1, 2)
            mine = block.norm1(tokens).expand(len(windows), -1, -1)
            read = attend(block.attn, torch.cat([mine, windows], dim=1), count)[:, :count]
            z = tokens + read.unflatten(0, (len(x), -1)).mean(1)
            answers.append(z + block.mlp(block.norm2(z)))
            hidden = block(hidden)
    return joined(swin.norm(hidden).mean((1, 2)), answers)


def joined(pooled: Tensor, answers: list[Tensor]) -> Tensor:
    unit = [t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True) for t in [pooled, *answers]]
    return torch.cat(unit, dim=1)


def by_hand(model: zoo.Model, x: Tensor) -> Tensor:
    """Logits of the plain modules, without any hook."""
    run = swin_by_hand if "swin" in model.backbone_name else vit_by_hand
    head, tokens = model.head, [q.tokens for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    with model._bare():
        for parameter in (*tokens, *head.parameters()):
            parameter.requires_grad_(True)
        return head(run(model.backbone, tokens, x))


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize(
    ("name", "tokens", "options"),
    [
        ("vit-micro", 1, {}),
        ("vit-micro", 3, {"init_values": 0.1, "qk_norm": True}),
        ("vit-micro", 2, {"scale_attn_norm": True, "reg_tokens": 2}),
        (SWIN_NAME, 1, {}),
        (SWIN_NAME, 3, {}),
    ],
)
def test_equals_the_form_with_queries_in_the_sequence(
    monkeypatch: pytest.MonkeyPatch, few: int, name: str, tokens: int, options: dict[str, Any]
) -> None:
    """Both ways to keep what backward needs: covariances, and keys and values."""
    monkeypatch.setattr(streams, "FEW", few)
    model = make(name, zoo.adapter("vqt", num_tokens=tokens, dropout=0.0), **options)
    x = images(model)
    logits, found = gradients(model, x)
    hand = by_hand(model, x)
    torch.testing.assert_close(logits, hand, rtol=1e-5, atol=1e-5)
    parameters = named(model)
    expected = torch.autograd.grad(F.cross_entropy(hand, TARGETS), list(parameters.values()))
    for key, gradient in zip(parameters, expected):
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    assert sum("tokens" in key for key in found) == len(model.points.select(kind="attention"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), logits, rtol=1e-5, atol=1e-5)


# -- the main stream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_the_backbones_own_tokens_are_untouched_and_have_no_graph(name: str) -> None:
    model = make(name, "vqt").train()
    x = images(model)
    seen: list[Tensor] = []
    handles = [
        p.module.register_forward_hook(lambda m, a, y: seen.append(y)) for p in model.points.select(kind="block")
    ]
    model(x).sum().backward()
    assert not any(y.requires_grad for y in seen)
    with_queries, seen[:] = list(seen), []
    with model.disable():
        model(x)
    assert len(seen) == len(with_queries) > 1 and all(torch.equal(a, b) for a, b in zip(with_queries, seen))
    for handle in handles:
        handle.remove()
    assert all(p.grad is None for p in model.backbone.parameters())
    pixels = x.clone().requires_grad_(True)  # who asks for the gradient of the input still gets it
    model(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_memory() -> None:
    """At the width, heads and length of ViT-B/16; two blocks show what twelve keep, but for the constant part."""
    model = zoo.load("vit-b16", "vqt", num_classes=100, pretrained=False, depth=2)
    plain = timm.create_model("vit_base_patch16_224", num_classes=100, depth=2)
    x = torch.randn(2, 3, 224, 224)
    full = saved_bytes(lambda: plain(x), [*plain.parameters(), *plain.buffers(), x])
    # covariances: 12 heads * 64 * 64 of 16 * 197 * 768 values; the rest grows with the one query, not with the 197 tokens
    assert model.saved_bytes(x) <= 0.04 * full
    streams_few, streams.FEW = streams.FEW, 0
    try:
        assert model.saved_bytes(x) <= 0.14 * full  # keys and values: 2 of 16
    finally:
        streams.FEW = streams_few


@pytest.mark.parametrize("memory", ["low", "min"])
@pytest.mark.parametrize("adapters", [["vqt"], ["vqt", "lora"]])
def test_memory_settings_change_no_gradient(memory: str, adapters: list[str]) -> None:
    quiet = [zoo.adapter("vqt", dropout=0.0) if a == "vqt" else zoo.adapter(a) for a in adapters]
    model = make(adapter=quiet)
    x = images(model)
    logits, expected = gradients(model, x)
    model.memory = memory
    again, found = gradients(model, x)
    torch.testing.assert_close(again, logits)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    assert all(q.caught is None and q.answers is None for q in model.adapters["vqt"].queries())  # type: ignore[operator]


# -- nothing stays behind ---------------------------------------------------------------------------------------------


def kept(model: zoo.Model) -> Iterator[Any]:
    for queries in model.adapters["vqt"].queries():  # type: ignore[operator]
        yield from (queries.caught, queries.answers)


@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_a_forward_pass_leaves_nothing_behind(name: str) -> None:
    model = make(name)
    x = images(model)
    last = model.points.select(kind="block")[-1].module
    refs: list[Any] = []
    handle = last.attn.qkv.register_forward_hook(lambda m, a, y: refs.append(weakref.ref(y)))
    logits = model(x)
    assert all(value is None for value in kept(model))
    del logits
    gc.collect()
    assert refs and all(ref() is None for ref in refs)
    handle.remove()

    def fail(*_: Any) -> None:
        raise RuntimeError("broken off")

    handle = last.mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        model(x)
    handle.remove()
    assert all(value is None for value in kept(model))
    before = model(x)
    assert torch.equal(before, model(x))


def test_removal_leaves_the_backbone_as_it_was() -> None:
    model = make()
    x = images(model)
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    with model.disable():
        bare = model(x)
    model.remove_adapter("vqt")
    assert torch.equal(model(x), bare)
    assert frozen.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.backbone.modules())


# -- with others ------------------------------------------------------------------------------------------------------


def copy_into(twin: zoo.Model, model: zoo.Model) -> zoo.Model:
    twin.adapters["vqt"].load_state_dict(model.adapters["vqt"].state_dict())
    twin.heads["vqt"].load_state_dict(model.heads["vqt"].state_dict())
    return twin


@pytest.mark.parametrize("order", [("vqt", "lora"), ("lora", "vqt")])
@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_queries_see_the_keys_and_values_of_a_lora(name: str, order: tuple[str, str]) -> None:
    made = {"vqt": zoo.adapter("vqt", dropout=0.0), "lora": zoo.adapter("lora", rank=2, targets="all-linear")}
    model = make(name, [made[n] for n in order])
    for key, parameter in model.adapters["lora"].named_parameters():
        if key.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    x = images(model)
    logits, found = gradients(model, x)
    assert model.probe(x) == []
    twin = copy_into(make(name), model)
    model.set_active("lora")
    plain = {k: v for k, v in model.merge().state_dict().items() if not k.startswith("head.")}
    twin.backbone.load_state_dict(plain)
    expected_logits, expected = gradients(twin, x)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


class Sequential(nn.Module):
    """A sublayer with a bottleneck behind it, as a module of the backbone."""

    def __init__(self, sublayer: nn.Module, bottleneck: nn.Module, parallel: bool) -> None:
        super().__init__()
        self.sublayer, self.bottleneck, self.parallel = sublayer, bottleneck, parallel

    def forward(self, x: Tensor) -> Tensor:
        y = self.sublayer(x)
        return y + self.bottleneck(x) if self.parallel else self.bottleneck(y)


@pytest.mark.parametrize("form", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("first", [True, False])
def test_bottlenecks_act_on_the_queries_too(form: str, first: bool) -> None:
    pair = [zoo.adapter("vqt", dropout=0.0), zoo.adapter("adapter", form=form, rank=4)]
    model = make(adapter=pair if first else pair[::-1])
    bottlenecks = model.adapters["adapter"]
    for parameter in bottlenecks.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = images(model)
    twin = make()
    for point in twin.points.select(kind="sublayer", role="mlp"):
        name = point.path.rpartition(".")[0]
        block = twin.backbone.get_submodule(name)
        block.mlp = Sequential(block.mlp, bottlenecks.get_submodule(point.name), form == "parallel")
    copy_into(twin, model)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [("vqt", "vpt"), ("vpt", "vqt")])
@pytest.mark.parametrize("deep", [True, False])
def test_queries_see_prompts(order: tuple[str, str], deep: bool) -> None:
    made = {"vqt": zoo.adapter("vqt", dropout=0.0), "vpt": zoo.adapter("vpt", num_tokens=2, deep=deep)}
    model = make(adapter=[made[n] for n in order])
    x = images(model)
    logits, found = gradients(model, x)
    assert model.probe(x) == []
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), logits, rtol=1e-5, atol=1e-5)

    prompts = [p for k, p in model.adapters["vpt"].named_parameters()]
    tokens = [q.tokens for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    head, parameters, vit = model.head, named(model), model.backbone
    with model._bare():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        hidden: Any = vit._pos_embed(vit.patch_embed(x))  # type: ignore[operator]
        answers = []
        for i, block in enumerate(vit.blocks):  # type: ignore[arg-type]
            if deep or i == 0:
                patches = hidden[:, 1:] if i == 0 else hidden[:, 3:]
                hidden = torch.cat([hidden[:, :1], prompts[i].expand(3, -1, -1), patches], dim=1)
            both = torch.cat([tokens[i].expand(3, -1, -1), hidden], dim=1)
            both = both + attend(block.attn, block.norm1(both), 1)
            both = both + block.mlp(block.norm2(both))
            answers.append(both[:, :1])
            hidden = both[:, 1:]
        expected = head(joined(vit.norm(hidden)[:, 0], answers))  # type: ignore[operator]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(F.cross_entropy(expected, TARGETS), list(parameters.values()))
    for key, gradient in zip(parameters, wanted):
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["vpt", "bitfit", "ssf", "norm", "ia3", "lora"])
@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_nothing_is_dead_beside_others(name: str, method: str) -> None:
    for pair in (["vqt", method], [method, "vqt"]):
        model = make(name, pair)
        assert model.probe(images(model)) == []


def test_two_at_once() -> None:
    model = make()
    second = model.add_adapter(zoo.adapter("vqt", dropout=0.0), name="second")
    x = images(model)
    assert model.active == ("vqt", "second") and model.head.in_features == 48 * 3 + 48 * 2
    together = model.features(x)
    model.set_active("vqt")
    first = model.features(x)
    torch.testing.assert_close(together[:, : 3 * 48] * 3**0.5, first)
    model.set_active("second")
    torch.testing.assert_close(together[:, 3 * 48 :], model.features(x)[:, 48:])
    assert second.feature_dim(48) == 3 * 48


@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_per_sample(name: str) -> None:
    model = make(name)
    model.add_adapter(zoo.adapter("vqt", num_tokens=2, dropout=0.0), name="two", activate=False)
    model.add_adapter("lora", name="lora", activate=False)
    for parameter in model.adapters["lora"].parameters():
        nn.init.normal_(parameter, std=0.1)
    names = ["two", "vqt", None, "vqt", "lora", "two"]
    x = images(model, len(names))
    routed = model(x, adapters=names)
    for i, adapter in enumerate(names):
        model.set_active(*([] if adapter is None else [adapter]))
        torch.testing.assert_close(routed[i], model(x[i : i + 1])[0], rtol=1e-5, atol=1e-5)
    assert all(value is None for value in kept(model))
    model.set_active("vqt")
    mixed = model(x[:3], adapters=["vqt", "two", "vqt"])
    mixed.sum().backward()
    parameters = [p for n in ("vqt", "two") for p in model.adapters[n].parameters()]
    assert [p.grad is not None for p in parameters] == [p.requires_grad for p in parameters]


# -- compiling, disk, settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [["vqt"], ["vqt", "lora"]])
def test_compiles_whole(adapters: list[str]) -> None:
    torch._dynamo.reset()
    model = make(adapter=[zoo.adapter(a, **({"dropout": 0.0} if a == "vqt" else {})) for a in adapters], depth=1)
    x = images(model)
    logits, expected = gradients(model, x)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), logits)
    found = torch.autograd.grad(F.cross_entropy(compiled(x), TARGETS), list(named(model).values()))
    for gradient, wanted in zip(found, expected.values()):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert all(value is None for value in kept(model))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_dropout_is_drawn_for_each_image_while_training() -> None:
    model = make(adapter=zoo.adapter("vqt", dropout=0.5)).train()
    x = images(model, 1).expand(2, -1, -1, -1)
    drawn = model.features(x)
    assert torch.allclose(drawn[0, :48], drawn[1, :48]) and not torch.allclose(drawn[0, 48:], drawn[1, 48:])
    model.eval()
    assert torch.allclose(*model.features(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = make()
    x = images(model)
    _, expected = gradients(model, x)
    with torch.autocast("cpu", dtype):
        logits, found = gradients(model, x)
    assert logits.dtype == dtype
    for key in expected:
        if "tokens" in key:
            assert F.cosine_similarity(found[key].flatten(), expected[key].flatten(), dim=0) > 0.98
    half = make(dtype=dtype)
    half(images(half).to(dtype)).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters_to_train().values())  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{}, {"num_tokens": 3, "combine": "weighted", "targets": "blocks.1.**"}])
def test_saves_and_reloads(tmp_path: Path, config: dict[str, Any]) -> None:
    model = make(adapter=zoo.adapter("vqt", **config))
    x = images(model)
    with torch.no_grad():
        for parameter in named(model).values():
            parameter.add_(torch.randn_like(parameter))
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert again.adapters["vqt"].config() == model.adapters["vqt"].config()
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_feature_selection(tmp_path: Path) -> None:
    model = make(adapter=zoo.adapter("vqt", lasso=0.5))
    vqt: Any = model.adapters["vqt"]
    x = images(model)
    penalty = vqt.extra_loss(model, model(x), TARGETS)
    assert penalty.item() == pytest.approx(0.5 * sum(c.norm().item() for c in model.head.weight.T), rel=1e-5)  # type: ignore
    model.set_active("vqt", train=())
    assert set(named(model)) == {"head/weight", "head/bias"}

    model.eval()
    every = model.features(x)
    with torch.no_grad():
        model.head.weight.mul_(torch.linspace(0.1, 1, 144).roll(50))  # type: ignore[union-attr,operator,arg-type]
    lengths = model.head.weight.norm(dim=0)  # type: ignore[union-attr,operator]
    chosen = vqt.select(model, 0.7)
    assert len(chosen) == 100 and lengths[chosen].min() >= lengths[[i for i in range(144) if i not in chosen]].max()
    assert tuple(model.head.weight.shape) == (5, 100)  # type: ignore[union-attr]
    assert torch.equal(model.features(x), every[:, chosen])
    narrower = vqt.select(model, 0.5)
    assert set(narrower) < set(chosen) and torch.equal(model.features(x), every[:, narrower])

    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert torch.equal(again.eval()(x), model(x))
    with pytest.raises(zoo.ZooError, match="fraction"):
        vqt.select(model, 0.0)


def test_learns() -> None:
    model = make(num_classes=2)
    x = images(model, 32, seed=3)
    y = torch.arange(32) % 2
    x[y == 1, 0] += 1.0
    before = [q.tokens.clone() for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    after = [q.tokens for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    assert all((a - b).abs().max() > 0.01 for a, b in zip(after, before))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_tokens": 0}, "1 or more"),
        ({"combine": "max"}, "concat, mean, weighted"),
        ({"combine": "weighted"}, "2 tokens or more"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"lasso": -1.0}, "0 or more"),
        ({"targets": "blocks.9.attn.product"}, "matches no"),
    ],
)
def test_bad_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        make(adapter=zoo.adapter("vqt", **config))


def test_merging_is_refused() -> None:
    with pytest.raises(zoo.ZooError, match="tokens beside the backbone's own"):
        make().merge()
