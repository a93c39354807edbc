"""Probing: the task's loss leaves no trace; captures against computation by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from two_processes import joined, pair

import zoo
from zoo.errors import ConfigError, DataError, SelectionError

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def vit(adapter: Any = "lora", **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load("vit-micro", adapter, pretrained=False, num_classes=5, **TINY, **options)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def batch(seed: int = 1, size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), torch.arange(size) % 5


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(train: bool, fails: bool) -> None:
    model = vit(zoo.adapter("lora", dropout=0.5)).train()
    model.adapters["lora"].module_at("blocks.0.attn.q").eval()  # a mode of its own
    images, labels = batch()
    F.cross_entropy(model(images), labels).backward()
    frozen = model.adapters["lora"].get_parameter("blocks.1.attn.v.lora_a").requires_grad_(False)
    model.register_buffer("noted", torch.zeros(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])
    try:
        with zoo.probing(model, train=train) as probe:
            assert model.training == train
            loss = probe.loss(images, labels)
            found = probe.gradients(loss)
            probe.loss(images, labels).backward()
            model.requires_grad_(True)
            model.noted.fill_(3.0)  # type: ignore[operator,union-attr]
            drawn()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert drawn() == expected
    assert frozen.requires_grad is False
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k for k, p in model.named_parameters() if p.grad is not None} == set(grads)
    assert all(torch.equal(p.grad, grads[k]) for k, p in model.named_parameters() if p.grad is not None)
    if not train:
        model.eval()
        plain = F.cross_entropy(model(images), labels)
        torch.testing.assert_close(loss, plain)
        wanted = torch.autograd.grad(plain, list(model.parameters_to_train().values()))
        assert list(found) == list(model.parameters_to_train())
        torch.testing.assert_close(tuple(found.values()), wanted)


def test_no_hook_of_an_adapter_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    for hook in ("step_start", "extra_loss", "after_backward", "after_step", "eval_start", "eval_end"):
        monkeypatch.setattr(type(model.adapters["lora"]), hook, lambda *_: pytest.fail("a hook was called"))
    with zoo.probing(model) as probe:
        probe.gradients(probe.loss(*batch()))


def test_other_losses() -> None:
    model = vit()
    images, _ = batch()
    tags = (torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    with zoo.probing(model, "multilabel") as probe:
        torch.testing.assert_close(probe.loss(images, tags), F.binary_cross_entropy_with_logits(model(images), tags))
    with zoo.probing(model, loss=F.mse_loss) as probe:
        torch.testing.assert_close(probe.loss(images, tags), F.mse_loss(model(images), tags))
    with pytest.raises(ConfigError, match="not both"), zoo.probing(model, "classify", loss=F.mse_loss):
        pass
    with pytest.raises(ConfigError, match="cannot be probed"), zoo.probing(torch.nn.Linear(2, 2)):
        pass
    with zoo.probing(model) as probe:
        model.requires_grad_(False)
        with pytest.raises(ConfigError, match="frozen"):
            probe.gradients(probe.loss(*batch()))
        weight = model.backbone.blocks[0].mlp.fc1.weight.requires_grad_(True)  # type: ignore[union-attr,index]
        (gradient,) = probe.gradients(probe.loss(*batch()), {"fc1": weight}).values()
        assert gradient.abs().sum() > 0
    assert not weight.requires_grad and model.parameters_to_train()


def wrapped_in_ddp() -> None:
    rank = joined()
    model = vit()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    images, labels = batch(rank)
    with zoo.probing(wrapped) as probe:  # each for itself
        mine = probe.gradients(probe.loss(images, labels))
    wrapped.zero_grad()
    F.cross_entropy(wrapped(images), labels).backward()  # the wrapper still works
    joint = {k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None}
    for key, value in mine.items():
        both = value.clone()
        torch.distributed.all_reduce(both)
        torch.testing.assert_close(both / 2, joint[key], rtol=1e-4, atol=1e-6)
    with zoo.capture(wrapped, "blocks.1.mlp.up", "input", "covariance") as seen, torch.no_grad():
        model(images)
    alone = seen["blocks.1.mlp.up"]
    together = seen.results(all_processes=True)["blocks.1.mlp.up"]
    with zoo.capture(model, "blocks.1.mlp.up", "input", "covariance") as whole, torch.no_grad():
        model(batch(0)[0])
        model(batch(1)[0])
    torch.testing.assert_close(together, whole["blocks.1.mlp.up"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, together)


def test_two_processes(tmp_path: Path) -> None:
    pair(wrapped_in_ddp, tmp_path)


# -- captures -------------------------------------------------------------------------------------------------------------


def by_hand(model: zoo.Model, images: Tensor) -> dict[str, Tensor]:
    """What passes in block 0, written out, with LoRA on q and v."""
    net, adapter = model.backbone, model.adapters["lora"]
    block = net.blocks[0]  # type: ignore[union-attr,index]
    u = net._pos_embed(net.patch_embed(images))  # type: ignore[operator]
    n = block.norm1(u)
    qkv = block.attn.qkv(n)
    for at, role in ((0, "q"), (96, "v")):
        part = adapter.module_at(f"blocks.0.attn.{role}")
        qkv[..., at : at + 48] += n @ part.delta().T
    q, k, v = (t.view(len(images), -1, 3, 16).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(u.shape)
    a = block.attn.proj(mixed)
    h = u + a
    m = block.mlp(block.norm2(h))
    return {
        "blocks.0": h + m,
        "blocks.0 in": u,
        "blocks.0.norm1": n,
        "blocks.0.attn.q": qkv[..., :48],
        "blocks.0.attn.k": qkv[..., 48:96],
        "blocks.0.attn.o in": mixed,
        "blocks.0.attn": a,
        "blocks.0.attn in": n,
        "blocks.0.mlp": m,
        "blocks.0.mlp in": block.norm2(h),
        "blocks.0.mlp.down": m,
    }


def reduced(reduce: str, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return {
        "mean": lambda: x.mean(0),
        "norm": lambda: x.norm(dim=1).mean(),
        "channel_norm": lambda: x.norm(dim=0),
        "absmax": lambda: x.abs().amax(0),
        "moment": lambda: x.T @ x / len(x),
        "covariance": lambda: torch.cov(x.T, correction=0),
    }[reduce]().float()


@pytest.mark.parametrize("reduce", ["mean", "norm", "channel_norm", "absmax", "moment", "covariance"])
@torch.no_grad()
def test_captures(reduce: str) -> None:
    """Over two batches of other sizes: as over all of them at once."""
    model = vit()
    parts = batch(1)[0], batch(2, 2)[0]
    with model.disable():
        expected = by_hand(model, torch.cat(parts))
    for what in ("output", "input"):
        names = [k.removesuffix(" in") for k in expected if k.endswith(" in") == (what == "input")]
        with zoo.capture(model, names, what, reduce) as seen:
            for part in parts:
                model(part)
        assert list(seen.results()) == [p.name for p in model.points if p.name in names]
        for name in names:
            x = expected[f"{name} in" if what == "input" else name]
            torch.testing.assert_close(
                seen[name], reduced(reduce, x), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(type(getattr(h, "__self__", None)).__name__ == "_Tap" for h in hooks)


def test_a_reduction_of_ones_own() -> None:
    model, (images, _) = vit(), batch()
    with zoo.capture(model, "blocks.1", reduce=lambda x: x[:, 0].mean(0)) as seen, torch.no_grad():
        model(images[:3])
        model(images[3:])
    with (
        zoo.capture(model, model.points.select("blocks.1"), reduce=lambda x: x[:, 0].mean(0)) as whole,
        torch.no_grad(),
    ):
        model(images)
    torch.testing.assert_close(seen["blocks.1"], whole["blocks.1"])


@pytest.mark.parametrize("memory", ["default", "low", "min"])
def test_recomputation_does_not_count(memory: str) -> None:
    model, (images, labels) = vit(), batch()
    model.memory = memory
    found = []
    for backward in (False, True):
        with zoo.capture(model, "up,blocks.*.norm2", reduce="channel_norm") as seen:
            loss = F.cross_entropy(model.train()(images), labels)
            if backward:
                loss.backward()
        found.append(seen.results())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values()))


def test_prompts_on_their_way_do_not_count() -> None:
    """VPT's prompts pass through norm and projection on their own; what the sequence holds is what passes at the points."""
    model, (images, _) = vit(zoo.adapter("vpt", num_tokens=3)), batch()
    counted: list[int] = []
    with (
        zoo.capture(model, "blocks.1.norm1", reduce=lambda x: counted.append(x.shape[1]) or x.mean((0, 1))),
        torch.no_grad(),
    ):
        model(images)
    assert counted == [65]


def test_swin_windows_and_routing() -> None:
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    model = zoo.load("timm:swin_tiny_patch4_window7_224", "lora", num_classes=3, pretrained=False, **sizes)
    images = batch()[0]
    with zoo.capture(model, kind="block", points="**") as seen, torch.no_grad():
        model(images, adapters=["lora", None, "lora", None])
    assert [v.shape[0] for v in seen.results().values()] == [24, 24, 48, 48]


def test_refusals() -> None:
    model = vit()
    for options, error, match in (
        ({"what": "middle"}, ConfigError, "'input' or 'output'"),
        ({"reduce": "median"}, ConfigError, "no reduction 'median'"),
        ({"kind": "condition"}, SelectionError, "condition"),
        ({"points": "quack"}, SelectionError, "quack"),
    ):
        with pytest.raises(error, match=match), zoo.capture(model, **{"points": "mlp", **options}):  # type: ignore[arg-type]
            pass
    attention = model.points.select(kind="attention")[0]
    with pytest.raises(ConfigError, match="no single output"), zoo.capture(model, [attention]):
        pass
    with zoo.capture(model, "mlp") as seen:
        with pytest.raises(DataError, match="Nothing passed"):
            seen["blocks.0.mlp"]
        with pytest.raises(SelectionError, match="not captured"):
            seen["blocks.0.attn"]
