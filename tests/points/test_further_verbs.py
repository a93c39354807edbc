"""Verbs of later methods, each against a straightforward form, on the families that have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_parts import easy_data, tiny_model

import zoo
from zoo import registry
from zoo.errors import AttachError, CombinationError, ConfigError, MissingPackageError
from zoo.points import Layout
from zoo.table import tiny_model as member

FAMILIES = [f for f in registry.families() if registry.family(f).tiny]


def attached(put: Callable[[Any], None], name: str = "trial") -> zoo.Adapter:
    """An adapter that does one thing."""

    @dataclass
    class Trial(zoo.Adapter):
        method = name

        def attach(self, points: Any) -> None:
            put(points)

    Trial.__eq__, Trial.__hash__ = object.__eq__, object.__hash__  # type: ignore[method-assign]
    return Trial()


def of(family: str) -> tuple[Any, Any]:
    try:
        model, batch = member(family)
    except MissingPackageError as error:
        pytest.skip(str(error))
    return model.eval(), batch


def caught(module: nn.Module) -> list[tuple[Any, Any]]:
    """(first input, output) of a module, as it runs."""
    found: list[tuple[Any, Any]] = []

    def hook(m: Any, a: Any, k: Any, y: Any) -> None:
        found.append((a[0] if a else next(iter(k.values())), y[0] if isinstance(y, tuple) else y))

    module.register_forward_hook(hook, with_kwargs=True)
    return found


class Turn(nn.Module):
    """y -> y + s sin(y)."""

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(scale))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.s * y.sin()


# -- linear: after ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_linear(family: str) -> None:
    """On a whole projection and on a slice; identity at 0, then what a hook would make of the output."""
    model, batch = of(family)
    linears = [p for p in model.points if p.kind == "linear" and isinstance(p.module, nn.Linear) and p.block == 0]
    points = [next(p for p in linears if p.role == role) for role in dict.fromkeys(p.role for p in linears)][:3]
    names = [p.name for p in points]
    with torch.no_grad():
        before = model(*batch)
        model.add_adapter(attached(lambda points: [points[n].after(Turn()) for n in names]))  # type: ignore[func-returns-value]
        assert torch.equal(model(*batch), before)
        for name in names:
            model.adapters["trial"].module_at(name).s.fill_(0.3)
        changed = model(*batch)
        model.set_active()
        hooks = []
        for p in points:

            def hook(m: Any, a: Any, y: Tensor, p: Any = p) -> Tensor:
                part = y[..., p.start : p.stop]
                return torch.cat([y[..., : p.start], part + 0.3 * part.sin(), y[..., p.stop :]], dim=-1)

            hooks.append(p.module.register_forward_hook(hook))
        torch.testing.assert_close(changed, model(*batch), rtol=1e-5, atol=1e-6)
        assert not torch.equal(changed, before)
    for hook in hooks:
        hook.remove()
    model.set_active("trial")
    assert model.train().probe(*batch) == []


# -- sublayer and condition: replace ----------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """y = F(x) + s F(2 x); s = 0 is F."""

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(scale))

    def forward(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run(x) + self.s * run(2 * x)


class Skip(nn.Module):
    """y = s x: the branch does not run."""

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(scale))

    def forward(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.s * x


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_a_sublayer(family: str) -> None:
    model, batch = of(family)
    points = [p for p in model.points if p.kind == "sublayer" and p.block == 0 and not p.stage]
    for p in points:
        own = any(m is p.entry for m in p.module.modules()) and p.entry_side == "output"
        if own or not model.family.bare_sublayers:
            reason = "no module of its own" if own else "more than one tensor"
            with pytest.raises(AttachError, match=reason):
                model.add_adapter(attached(lambda points, p=p: points[p.name].replace(Doubled())))
            continue
        with torch.no_grad():
            before = model(*batch)
            model.add_adapter(attached(lambda points, p=p: points[p.name].replace(Doubled())))
            torch.testing.assert_close(model(*batch), before)
            model.adapters["trial"].module_at(p.name).s.fill_(0.5)
            changed = model(*batch)
            seen = caught(p.module)
            model(*batch)
            x, y = seen[0]
            model.set_active()
            run = p.module.__class__.forward
            plain = run(p.module, x) if p.role == "mlp" else None
            if plain is not None:
                torch.testing.assert_close(y, plain + 0.5 * run(p.module, 2 * x))
            assert not torch.equal(changed, before)
        model.set_active("trial")
        for setting in ("default", "low", "min"):
            model.memory = setting
            assert model.train().probe(*batch) == []
        with pytest.raises(CombinationError, match="both replace what is at"):
            model.add_adapter(attached(lambda points, p=p: points[p.name].replace(Doubled()), "second"))
        model.remove_adapter("trial")
        assert "forward" not in vars(p.module)
        with torch.no_grad():
            assert torch.equal(model.eval()(*batch), before)


def test_a_sublayer_that_is_not_run_is_skipped() -> None:
    """The residual stream passes; beside LoRA inside the branch, and for each sample."""
    model = tiny_model()
    images = easy_data(4).tensors[0]
    model.add_adapter(attached(lambda points: points["blocks.0.mlp"].replace(Skip())))
    model.eval()
    with torch.no_grad():
        skipped = model(images)
        model.set_active("lora")
        plain = model(images)
        hook = model.backbone.blocks[0].mlp.register_forward_hook(lambda m, a, y: 0 * y)  # type: ignore[union-attr,index]
        torch.testing.assert_close(skipped, model(images))
        hook.remove()
        model.set_active("lora", "trial")
        routed = model(images, adapters=["lora", "trial", "trial", "lora"])
        torch.testing.assert_close(routed[0], plain[0])
        model.set_active("trial")
        torch.testing.assert_close(routed[1], model(images)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_a_condition(family: str) -> None:
    model, batch = of(family)
    points = [p for p in model.points if p.kind == "condition"]
    if not points:
        return
    for p in points:
        with torch.no_grad():
            before = model(*batch)

            class Moved(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.s = nn.Parameter(torch.zeros(()))

                def forward(self, embed: Callable[..., Any], *x: Any, **rest: Any) -> Any:
                    y = embed(*x, **rest)
                    return (y[0] + self.s, *y[1:]) if isinstance(y, tuple) else y + self.s

            model.add_adapter(attached(lambda points, p=p: points[p.name].replace(Moved())))
            torch.testing.assert_close(model(*batch), before)
            seen = caught(p.module)
            model(*batch)
            model.adapters["trial"].module_at(p.name).s.fill_(0.5)
            model(*batch)
            if seen:
                torch.testing.assert_close(seen[-1][1], seen[0][1] + 0.5)
        model.remove_adapter("trial")


# -- attention: a mask, a second softmax --------------------------------------------------------------------------------------


class Extra(nn.Module):
    """T keys and values; some of them masked, or gated."""

    def __init__(self, point: Any, mask: Tensor | None = None, gate: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shape = (1, point.num_heads, 3, point.head_dim)
        self.keys = nn.Parameter(torch.randn(shape, generator=generator))
        self.values = nn.Parameter(torch.randn(shape, generator=generator))
        self.mask = mask
        self.gate = nn.Parameter(torch.zeros(1, point.num_heads, 1, 1)) if gate else None

    def forward(self, batch: int) -> tuple[Tensor, ...]:
        if self.gate is not None:
            return self.keys, self.values, self.gate
        return (self.keys, self.values) if self.mask is None else (self.keys, self.values, self.mask)


SEEN = torch.tensor([True, False, True])[None, None, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_keys_are_as_if_they_were_not_there(family: str) -> None:
    """A mask that hides one of three keys gives what the other two give; one that hides all gives the bare backbone."""
    model, batch = of(family)
    points = [p for p in model.points if p.kind == "attention"]
    if not points:
        return
    name = points[0].name

    def put(mask: Tensor | None, keep: Any = None) -> Callable[[Any], None]:
        def attach(points: Any) -> None:
            extra = Extra(points[name], mask)
            if keep is not None:
                extra.keys = nn.Parameter(extra.keys.detach()[:, :, keep])
                extra.values = nn.Parameter(extra.values.detach()[:, :, keep])
            points[name].extend(extra)

        return attach

    with torch.no_grad():
        bare = model(*batch)
        found = []
        for mask, keep in ((SEEN, None), (None, [0, 2]), (SEEN.float().log(), None), (SEEN & False, None)):
            model.add_adapter(attached(put(mask, keep)))
            found.append(model(*batch))
            torch.testing.assert_close(model(*batch), found[-1])  # kept for evaluation
            model.remove_adapter("trial")
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2], found[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[3], bare, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[0], bare)


def test_a_mask_for_each_image_and_query() -> None:
    model = tiny_model(None)
    images = easy_data(4).tensors[0]
    mask = torch.rand(4, 1, 5, 3, generator=torch.Generator().manual_seed(2)) > 0.5
    model.add_adapter(
        attached(lambda points: points["blocks.1.attn.product"].extend(Extra(points["blocks.1.attn.product"], mask)))
    )
    with torch.no_grad():
        changed = model.eval()(images)
        extra: Any = model.adapters["trial"].module_at("blocks.1.attn.product")
        model.set_active()
        attention: Any = model.backbone.blocks[1].attn  # type: ignore[union-attr,index]

        def forward(x: Tensor, **_: Any) -> Tensor:
            q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            k, v = (torch.cat([e.expand(4, -1, -1, -1), t], 2) for e, t in ((extra.keys, k), (extra.values, v)))
            scores = q @ k.transpose(-2, -1) * attention.scale
            scores[..., :3] = scores[..., :3].masked_fill(~mask, float("-inf"))
            return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        attention.forward = forward
        torch.testing.assert_close(changed, model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gated_second_softmax(family: str) -> None:
    """Nothing at a gate of 0; the change is linear in the gate of one attention's product."""
    model, batch = of(family)
    points = [p for p in model.points if p.kind == "attention"]
    if not points:
        return
    name = points[-1].name
    with torch.no_grad():
        before = model(*batch)
        model.add_adapter(attached(lambda points: points[name].gate(Extra(points[name], gate=True))))
        torch.testing.assert_close(model(*batch), before, rtol=1e-5, atol=1e-6)
        model.adapters["trial"].module_at(name).gate.fill_(0.7)
        assert not torch.allclose(model(*batch), before)
    assert model.train().probe(*batch) == []


def test_a_gated_second_softmax_is_llama_adapters() -> None:
    """On a ViT written down straightforwardly, alone and beside a prefix, for each sample, recomputed."""
    model = tiny_model(None)
    images, name = easy_data(4).tensors[0], "blocks.0.attn.product"
    model.add_adapter(attached(lambda points: points[name].gate(Extra(points[name], gate=True)), "gated"))
    model.add_adapter(zoo.adapter("prefix", num_tokens=2, targets="blocks.0.attn.product"))
    gated: Any = model.adapters["gated"].module_at(name)
    prefix: Any = model.adapters["prefix"].module_at(name)
    attention: Any = model.backbone.blocks[0].attn  # type: ignore[union-attr,index]
    with torch.no_grad():
        gated.gate.copy_(torch.randn(gated.gate.shape, generator=torch.Generator().manual_seed(4)))
    model.train()
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
    named = dict(model.named_parameters())
    learned = [p for k, p in named.items() if p.requires_grad]
    found = []
    for setting in ("default", "low", "min"):
        model.memory = setting
        found.append((model(images), torch.autograd.grad((model(images) * weights).sum(), learned)))
    model.memory = "default"
    rows = ["gated", None, "prefix", "gated"]
    with torch.no_grad():
        routed = model(images, adapters=rows)
        for i, row in enumerate(rows):
            model.set_active(*([row] if row else []))
            torch.testing.assert_close(routed[i], model(images)[i], rtol=1e-5, atol=1e-6)
    model.set_active("gated", "prefix")
    model.set_active()
    for p in learned:
        p.requires_grad_(True)

    def forward(x: Tensor, **_: Any) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        extra = prefix(1)
        keys, values = (torch.cat([e.expand(4, -1, -1, -1), t], 2) for e, t in zip(extra, (k, v)))
        y = (q @ keys.transpose(-2, -1) * attention.scale).softmax(-1) @ values
        second = (q @ gated.keys.transpose(-2, -1) * attention.scale).softmax(-1) @ gated.values
        return attention.proj((y + gated.gate * second).transpose(1, 2).flatten(2))

    attention.forward = forward
    expected = model(images)
    gradients = torch.autograd.grad((expected * weights).sum(), learned)
    for logits, got in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(got, gradients):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- tokens: accumulated, replaced --------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """T prompts."""

    def __init__(self, dim: int, seed: int, count: int = 2) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))

    def forward(self, batch: int) -> Tensor:
        return self.prompt[None]


@pytest.mark.parametrize("way", ["accumulated", "replaced", "both"])
def test_prompts_that_come_in_later(way: str) -> None:
    """A ViT of three blocks, written down: prompts behind the class token, dropped behind the last block."""
    model = zoo.load(
        "vit-micro", pretrained=False, num_classes=3, img_size=8, patch_size=4, embed_dim=24, depth=3, num_heads=2
    )

    def put(points: Any) -> None:
        first, second, third = points.select(kind="tokens")
        first.prompt(Tokens(24, 0), keep=True)
        second.prompt(Tokens(24, 1), keep=True, replace=way == "replaced")
        third.prompt(Tokens(24, 2), keep=True, replace=way != "accumulated")

    model.add_adapter(attached(put))
    images = torch.randn(3, 3, 8, 8)
    adapter: Any = model.adapters["trial"]
    p = [adapter.module_at(f"blocks.{i}.tokens").prompt for i in range(3)]
    found = {}
    for setting in ("default", "low", "min"):
        model.memory = setting
        found[setting] = (model(images), torch.autograd.grad(model(images).square().sum(), p))
    vit: Any = model.backbone
    model.set_active()
    for parameter in p:
        parameter.requires_grad_(True)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    count = 0
    for i, block in enumerate(vit.blocks):
        if way == "replaced" and i:
            x = torch.cat([x[:, :1], p[i].expand(3, -1, -1), x[:, 3:]], dim=1)
        elif way == "both" and i == 2:  # the first block's stand behind the second's
            x = torch.cat([x[:, :3], p[i].expand(3, -1, -1), x[:, 5:]], dim=1)
        else:
            x = torch.cat([x[:, :1], p[i].expand(3, -1, -1), x[:, 1:]], dim=1)
            count += 2
        x = block(x)
    x = vit.norm(torch.cat([x[:, :1], x[:, 1 + count :]], dim=1))
    expected = model.head(vit.forward_head(x, pre_logits=True))
    gradients = torch.autograd.grad(expected.square().sum(), p)
    for logits, got in found.values():
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(got, gradients):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.set_active("trial")
        bare = model(images, adapters=[None, "trial", None])
        torch.testing.assert_close(bare[1], model(images)[1])
        with model.disable():
            torch.testing.assert_close(bare[0], model(images)[0])


def test_prompts_that_cannot_come_in_later_are_refused() -> None:
    model = tiny_model(None)
    later, first = "blocks.1.tokens", "blocks.0.tokens"
    for put, reason in (
        (lambda points: points[later].prompt(Tokens(24, 0), keep=True, replace=True), "nothing to replace"),
        (lambda points: points[first].prompt(Tokens(24, 0), keep=True, replace=True), "stand behind the first"),
        (lambda points: points[later].prompt(Tokens(24, 0), replace=True), "are kept"),
        (lambda points: points[first].words(Tokens(24, 0)), "no words of a text"),
    ):
        with pytest.raises(AttachError, match=reason):
            model.add_adapter(attached(put))
        assert not model.adapters

    def unequal(points: Any) -> None:
        points[first].prompt(Tokens(24, 0), keep=True)
        points[later].prompt(Tokens(24, 1, count=3), keep=True, replace=True)

    model.add_adapter(attached(unequal))
    with pytest.raises(ConfigError, match="3 prompts cannot take the place of 2"):
        model(easy_data(4).tensors[0])
    swin = of("swin")[0]
    name = [p.name for p in swin.points if p.kind == "tokens"][1]
    with pytest.raises(AttachError, match="only start at the first block"):
        swin.add_adapter(attached(lambda points: points[name].prompt(Tokens(24, 0), keep=True)))


# -- geometry -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_and_norms_are_those_that_run(family: str) -> None:
    """What goes into the readers of a sublayer is what comes out of the norm in front of it."""
    model, batch = of(family)
    sublayers = [p for p in model.points if p.kind == "sublayer" and p.block == 0 and not p.stage]
    checked = 0
    for p in sublayers:
        readers, norm = model.points.readers(p), model.points.norm_before(p)
        assert p.role not in ("attn", "cross", "mlp") or readers, p.name
        if norm is None:
            continue
        source, sinks = caught(norm.module), [caught(r.module) for r in readers]
        with torch.no_grad():
            model(*batch)
        for sink, reader in zip(sinks, readers):
            given = source[0][1]
            if family in ("swin", "vit", "clip", "ast", "vl-t5", "wav2vec2"):
                assert torch.equal(sink[0][0].flatten().sort().values, given.flatten().sort().values), reader.name
                checked += 1
    if family in ("swin", "vit", "clip", "ast", "vl-t5"):
        assert checked >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_are_those_of_the_tokens(family: str) -> None:
    model, batch = of(family)
    blocks = [p for p in model.points if p.kind == "block"]
    for p in blocks:
        if p.layout is None or not p.layout.grid:
            continue
        seen = caught(p.module)
        with torch.no_grad():
            model(*batch)
        x = seen[0][0]
        places = torch.Size(p.layout.grid).numel()
        assert x[0, ..., 0].numel() == p.layout.prefix + places, p.name
        assert {q.layout for q in model.points if q.block == p.block and q.tower == p.tower and q.stage == p.stage} == {
            p.layout
        }
    if family in ("vit", "swin", "clip", "ast"):
        assert all(p.layout is not None and p.layout.grid for p in blocks)
    if family == "swin":
        assert blocks[0].layout == Layout(0, (8, 8), (4, 4)) and blocks[1].layout.shift == (2, 2)
    if family == "clip":
        assert {p.tower: p.layout.causal for p in blocks} == {"image": False, "text": True}


def test_they_compile() -> None:
    """All of them at once, in one graph, equal to eager."""
    model = tiny_model(None)
    images = easy_data(4).tensors[0]

    def put(points: Any) -> None:
        points["blocks.0.attn.o"].after(Turn(0.3))
        points["blocks.0.attn.product"].gate(Extra(points["blocks.0.attn.product"], gate=True))
        points["blocks.1.attn.product"].extend(Extra(points["blocks.1.attn.product"], SEEN))
        points["blocks.1.mlp"].replace(Doubled(0.5))
        points["blocks.0.tokens"].prompt(Tokens(24, 0), keep=True)
        points["blocks.1.tokens"].prompt(Tokens(24, 1), keep=True, replace=True)

    model.add_adapter(attached(put))
    model.train()
    learned = list(model.adapters.parameters())
    expected = model(images)
    gradients = torch.autograd.grad(expected.square().sum(), learned)
    torch._dynamo.reset()
    try:
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        found = torch.autograd.grad(logits.square().sum(), learned)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(images), model(images))
