"""MEFT: reversible runs against an ordinary graph and against the coupling written out, what is kept, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.engine.second_order import exact
from zoo.errors import AttachError, CombinationError, DerivativeError, MergeError
from zoo.table import tiny_model

TINY = {"embed_dim": 24, "depth": 5, "num_heads": 2}
KEEPS = ("input", "segments", "output")
forms = pytest.mark.parametrize("form", [1, 2, 3])


def build(
    form: int = 1, dtype: torch.dtype = torch.float64, sizes: dict[str, int] = TINY, **settings: Any
) -> zoo.Model:
    torch.manual_seed(0)
    config = zoo.adapter("meft", form=form, rank=4, **settings)
    model = zoo.load("vit-micro", config, num_classes=3, pretrained=False, **sizes).to(dtype)
    with torch.no_grad():  # away from the start, where the adapters are nearly nothing
        for p in model.adapters["meft"].parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.train()


def images(dtype: torch.dtype = torch.float64, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model: zoo.Model, seed: int = 3) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = F.cross_entropy(model(images(model.dtype)), torch.tensor([0, 2]))
    loss.backward()
    return {
        "loss": loss.detach(),
        **{k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None},
    }


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert float((one[name] - other[name]).norm()) <= tolerance * max(1e-3, float(other[name].norm())), name


@forms
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("checkpoint", [1, 2, 4])
def test_gradients_of_an_ordinary_graph(form: int, keep: str, checkpoint: int) -> None:
    """In float64 to 1e-8, with dropout: every F and G draws the same once more."""
    if form == 3 and (keep == "output" or checkpoint == 4):
        checkpoint, keep = 2, "segments"  # two digits a block: float64 inverts no five blocks of this form to 1e-8
    vanilla = gradients(build(form, reversible=False, dropout=0.3))
    model = build(form, keep=keep, checkpoint=checkpoint, dropout=0.3)
    assert_near(gradients(model), vanilla, 1e-8)
    assert 0 < model.adapters["meft"].error < 1e-6  # type: ignore[operator]
    state = torch.get_rng_state()
    gradients(model, seed=3)
    assert torch.equal(
        state, torch.get_rng_state()
    )  # the run draws one seed, and leaves the generator as an ordinary one


@forms
def test_against_the_coupling_written_out(form: int) -> None:
    model = build(form).eval()
    net, adapter, x = model.backbone, model.adapters["meft"], images()

    def bottleneck(name: str, h: Tensor) -> Tensor:
        part: Any = adapter.module_at(name)  # type: ignore[operator]
        h = F.gelu(F.linear(h, part.adapter_down.weight, part.adapter_down.bias))
        return F.linear(h, part.adapter_up.weight, part.adapter_up.bias)

    with model.disable():
        x1 = x2 = net._pos_embed(net.patch_embed(x))  # type: ignore[operator]
        for i, block in enumerate(net.blocks):  # type: ignore[arg-type]
            name = f"blocks.{i}"

            def attention(u: Tensor, block: Any = block, name: str = name) -> Tensor:
                h = block.attn(block.norm1(u))
                return u + (h + bottleneck(f"{name}.attn", h) if form == 3 else h)

            def mlp(u: Tensor, block: Any = block, name: str = name) -> Tensor:
                return u + block.mlp(block.norm2(u)) + bottleneck(f"{name}.mlp", block.norm2(u))

            if form == 1:
                y1 = 0.1 * x1 + mlp(attention(x2))
                x1, x2 = x2 + bottleneck(name, y1), y1
            elif form == 2:
                y1 = x1 + bottleneck(name, x2)
                x1, x2 = 0.1 * x2 + mlp(attention(y1)), y1
            else:
                y1 = 0.1 * x1 + attention(x2)
                x1, x2 = y1, 0.1 * x2 + mlp(y1)
        expected = model.heads["default"](net.norm((x1 + x2) / 2)[:, 0])  # type: ignore[operator]
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-10, atol=1e-10)


def test_starts_close_to_the_pretrained_network() -> None:
    model = zoo.load("vit-micro", zoo.adapter("meft", form=2, lam=1.0, bet=1e-3), num_classes=0).eval()
    x = images(torch.float32)
    started = model(x)
    with model.disable():
        assert float((started - model(x)).norm() / model(x).norm()) < 1.0


def test_count() -> None:
    for form in (1, 2, 3):
        model = zoo.load("vit-b16", zoo.adapter("meft", form=form), num_classes=0, device="meta")
        assert model.num_parameters(trainable=True) == 313_536
    for name, p in zoo.load("vit-micro", "meft", num_classes=3).adapters["meft"].named_parameters():
        assert float(p.std()) == pytest.approx(0.02, rel=0.1) if p.ndim == 2 else not p.any(), name


def test_bytes_do_not_grow_with_depth() -> None:
    found: dict[str, list[float]] = {}
    unit = 2 * 65 * 24 * 4  # bytes of the tokens
    for keep in KEEPS:
        models = [build(dtype=torch.float32, sizes={**TINY, "depth": d}, keep=keep) for d in (12, 24, 48)]
        found[keep] = [m.saved_bytes(images(torch.float32)) / unit for m in models]
    assert len(set(found["input"])) == len(set(found["output"])) == 1
    assert found["input"][0] < 6.2  # the tokens, two streams in float64, and what stands behind the blocks
    # two streams in float64 for every second block but the first
    assert [b - found["input"][0] for b in found["segments"]] == [4 * 5, 4 * 11, 4 * 23]
    narrow = build(dtype=torch.float32, streams="float32", sizes={**TINY, "depth": 48})
    assert narrow.saved_bytes(images(torch.float32)) / unit < 4.2
    plain = zoo.load("vit-micro", "lora", num_classes=3, pretrained=False, **{**TINY, "depth": 12}, memory="min")
    assert plain.saved_bytes(images(torch.float32)) / unit > 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_in_low_precision(dtype: torch.dtype) -> None:
    """Measured on trained weights: gradients near those of an ordinary graph, in the same precision."""
    found = {}
    for reversible in (True, False):
        torch.manual_seed(0)
        model = zoo.load("vit-micro", zoo.adapter("meft", reversible=reversible), num_classes=3, dtype=dtype)
        found[reversible] = gradients(model.train())
        if reversible:
            rows = model.adapters["meft"].report(model, images(dtype))  # type: ignore[operator]
            assert [r.block for r in rows] == [f"blocks.{i}" for i in range(6)]
            assert max(r.relative for r in rows) == pytest.approx(model.adapters["meft"].error, rel=0.5)  # type: ignore[arg-type]
            assert 0 < max(r.relative for r in rows) < 1e-4
    assert_near(found[True], found[False], 1e-4 if dtype == torch.float32 else 1e-2)


def test_an_error_over_the_limit_is_refused() -> None:
    model = build(3, dtype=torch.float32, keep="output", sizes={**TINY, "depth": 8})
    rows = model.adapters["meft"].report(model, images(torch.float32))  # type: ignore[operator]
    assert rows[0].relative > 0.01 > rows[-1].relative > 0 and "blocks.0" in str(rows[0])
    with pytest.raises(DerivativeError, match=r"relative error of .*checkpoint=1 or 2"):
        gradients(model)
    assert all(p.grad is None for p in model.adapters["meft"].parameters())
    calm = build(3, dtype=torch.float32, keep="output", lam=1.0, bet=1.0, sizes={**TINY, "depth": 8})
    assert max(r.relative for r in calm.adapters["meft"].report(calm, images(torch.float32))) < 1e-4  # type: ignore[operator]


def test_the_token_tensor_needs_no_gradient_and_gets_one() -> None:
    for targets in ("blocks.{2..4}", "block"):
        model, vanilla = build(targets=targets), build(targets=targets, reversible=False)
        x, y = images().requires_grad_(), images().requires_grad_()
        model(x).square().sum().backward()
        vanilla(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)
    assert model.probe(images()) == []


def test_accumulation_and_frozen_parts() -> None:
    model, vanilla = build(), build(reversible=False)
    for each in (model, vanilla):
        each.adapters["meft"].module_at("blocks.1").requires_grad_(False)  # type: ignore[operator]
        for i in range(2):
            each(images()[i : i + 1]).square().sum().backward()
    pairs = zip(model.named_parameters(), vanilla.parameters())
    for (name, one), other in pairs:
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("memory", ["low", "min", "off"])
def test_memory_settings(memory: str) -> None:
    model = build()
    expected = gradients(model)
    model.memory = memory
    assert_near(gradients(model), expected, 1e-12)
    assert model.saved_bytes(images()) < 8 * 2 * 65 * 24 * 8


def test_with_other_adapters_inside_the_blocks() -> None:
    found = []
    for reversible in (True, False):
        model = build(reversible=reversible)
        for method in (zoo.adapter("lora", targets="all-linear"), "bitfit", "prefix", "compacter"):
            name = model.add_adapter(method).method
            with torch.no_grad():
                for p in model.adapters[name].parameters():
                    p.add_(0.01)
        found.append(gradients(model.double()))
    assert_near(*found, 1e-8)


def test_who_cannot_work_together() -> None:
    model = build()
    with pytest.raises(CombinationError, match="need the same module"):
        model.add_adapter(zoo.adapter("vpt", deep=False))
    with pytest.raises(CombinationError, match="need the same module"):
        model.add_adapter("meft", "second")
    with pytest.raises(CombinationError, match="need the same module"):
        model.add_adapter("vqt")
    model.add_adapter("hyperformer")
    with pytest.raises(CombinationError, match="'hyperformer' takes tensors from outside of the block"):
        model(images())
    model.remove_adapter("hyperformer")
    assert gradients(model)


def test_switched_and_copied_before_backward() -> None:
    model = build()
    expected = gradients(model)
    x, y = images().requires_grad_(), images().requires_grad_()
    output = model(x)
    model.set_active()
    output.square().sum().backward()  # the blocks run with the adapters of their forward pass
    model.set_active("meft")
    model(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    assert_near(gradients(twin), expected, 1e-12)
    part = copy.deepcopy(model.adapters["meft"])
    assert not any(isinstance(m, zoo.Model) for m in part.modules())


def test_a_changed_parameter_is_noticed() -> None:
    model = build()
    loss = model(images()).sum()
    with torch.no_grad():
        next(model.adapters["meft"].parameters()).add_(1.0)
    with pytest.raises(DerivativeError, match="changed between forward and backward"):
        loss.backward()


def test_tokens_between_the_blocks_are_not_to_be_had() -> None:
    """While a run makes its own graph they are NaN, so that nobody takes anything for them; in evaluation they are the mean."""
    model, seen = build(), []
    handle = model.backbone.blocks[1].register_forward_hook(lambda m, a, y: seen.append(y))  # type: ignore[index,union-attr]
    model(images())
    assert bool(seen[0].isnan().all())
    with torch.no_grad():
        model.eval()(images())
    assert bool(seen[1].isfinite().all())
    handle.remove()


def test_blocks_that_are_called_by_themselves() -> None:
    model = build()
    with pytest.raises(AttachError, match="not called with what the block before it gave"):
        model.backbone.blocks[2](torch.randn(2, 65, 24, dtype=torch.float64))  # type: ignore[index,operator]
    assert gradients(model)


def test_samples_with_adapters_of_their_own() -> None:
    model = build(dropout=0.0)
    model.eval()
    both = model(images(), adapters=["meft", None])
    torch.testing.assert_close(both[:1], model(images()[:1]))
    both.square().sum().backward()
    routed = {k: p.grad.clone() for k, p in model.adapters["meft"].named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    model(images()[:1]).square().sum().backward()
    for k, p in model.adapters["meft"].named_parameters():
        torch.testing.assert_close(p.grad, routed[k], rtol=1e-8, atol=1e-10)


def test_second_derivatives() -> None:
    model = build(form=2)
    weights = list(model.parameters_to_train().values())
    with pytest.raises(DerivativeError, match=r"'Run'.*second_order"):
        torch.autograd.grad(model(images()).square().sum(), weights, create_graph=True)
    with zoo.second_order(model):
        found = torch.autograd.grad(model(images()).square().sum(), weights, create_graph=True)
    assert all(g.requires_grad for g in found) and not exact()
    assert_near(
        dict(enumerate(found)), dict(enumerate(torch.autograd.grad(model(images()).square().sum(), weights))), 1e-8
    )  # type: ignore[arg-type]


def test_compiled() -> None:
    model = build(dtype=torch.float32)
    expected = gradients(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    F.cross_entropy(compiled(images(torch.float32)), torch.tensor([0, 2])).backward()
    found = {k: p.grad for k, p in model.parameters_to_train().items()}
    assert all(torch.allclose(g, expected[k], rtol=1e-3, atol=1e-5) for k, g in found.items() if g is not None)


@pytest.mark.parametrize("family", ["swin", "clip", "ast", "wav2vec2"])
@forms
def test_families(family: str, form: int) -> None:
    found = []
    for reversible in (True, False):
        model, batch = tiny_model(family)
        torch.manual_seed(1)
        model.add_adapter(zoo.adapter("meft", form=form, rank=2, reversible=reversible))
        model.double().train()
        batch = tuple(x.double() if x.is_floating_point() else x for x in batch)
        model(*batch).square().mean().backward()
        found.append({k: p.grad for k, p in model.parameters_to_train().items() if p.grad is not None})
        assert len(found[-1]) == len(model.parameters_to_train())
        assert len(model.adapters["meft"]._runs) == {"swin": 2, "clip": 2}.get(family, 1)
    assert_near(*found, 1e-8)


@pytest.mark.parametrize("family", ["groupmamba", "vl-t5", "dit"])
def test_families_that_are_refused(family: str) -> None:
    model, _ = tiny_model(family)
    with pytest.raises(AttachError, match=f"'meft' runs blocks by hand, and those of the family '{family}'"):
        model.add_adapter("meft")
    assert not model.adapters


@pytest.mark.parametrize(
    "settings",
    [
        {"form": 4},
        {"lam": 0.0},
        {"bet": 1e9},
        {"rank": 0},
        {"checkpoint": 0},
        {"keep": "all"},
        {"limit": 0.0},
        {"dropout": 1.0},
    ],
)
def test_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(zoo.ZooError, match=f"meft.*{next(iter(settings))}|{next(iter(settings))}"):
        zoo.adapter("meft", **settings)


def test_merge_is_refused() -> None:
    with pytest.raises(MergeError, match="two streams"):
        build().merge()


def test_an_empty_module_saves_nothing(tmp_path: Any) -> None:
    model = build(3, dtype=torch.float32).eval()
    model.save_adapter(tmp_path / "out")
    keys = set(model.adapters["meft"].state_dict())
    assert len(keys) == 5 * 8 and all(".attn." in k or ".mlp." in k for k in keys)
    again = zoo.load("vit-micro", num_classes=3, pretrained=False, **TINY)
    again.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapters")}, strict=False)
    assert isinstance(again.head, nn.Linear)
