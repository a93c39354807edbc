"""VeRA beside the equation, its frozen pair, and what peft computes with the same seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import ConfigError, MismatchError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def build(**config: Any) -> Any:
    torch.manual_seed(0)
    adapter = zoo.adapter("vera", **{"rank": 6, **config})
    return zoo.load("timm:vit_tiny_patch16_224", adapter, pretrained=False, **SMALL).eval()


def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.adapters["vera"].parameters():
            p.add_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(("name", "expected"), [("vit-b16", 24_576), ("vit-l16", 61_440)])
def test_counts(name: str, expected: int) -> None:
    model = zoo.load(name, "vera", num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected


def test_the_equation_on_points_of_all_widths() -> None:
    """Slices of one pair: i = 48 and 192, o = 48 and 192; against sums over the rank."""
    model = build(targets="q,v,up,down")
    shake(model)
    pair = model.adapters["vera"].get_submodule("projections")
    assert (pair.a.shape, pair.b.shape) == ((6, 192), (192, 6))
    deltas = {}
    for name in ("attn.q", "attn.v", "mlp.up", "mlp.down"):
        part = model.adapters["vera"].module_at(f"blocks.1.{name}")
        i, o = model.points[f"blocks.1.{name}"].dim_in, model.points[f"blocks.1.{name}"].dim_out
        deltas[name] = sum(part.vera_d[j] * torch.outer(part.vera_b * pair.b[:o, j], pair.a[j, :i]) for j in range(6))
    before = dict(model.backbone.named_parameters())
    after = dict(model.merge().named_parameters())
    change = {k: after[k] - before[k] for k in before}
    torch.testing.assert_close(change["blocks.1.mlp.fc1.weight"], deltas["mlp.up"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change["blocks.1.mlp.fc2.weight"], deltas["mlp.down"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change["blocks.1.attn.qkv.weight"][:48], deltas["attn.q"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change["blocks.1.attn.qkv.weight"][96:], deltas["attn.v"], rtol=1e-4, atol=1e-5)
    assert not change["blocks.1.attn.qkv.weight"][48:96].any()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model.merge()(images), model(images), rtol=1e-4, atol=1e-5)


def test_one_pair_for_the_network_which_the_seed_gives_again() -> None:
    first, second, other = build(), build(), build(seed=1)
    pairs = [m.adapters["vera"].get_submodule("projections") for m in (first, second, other)]
    assert torch.equal(pairs[0].a, pairs[1].a) and torch.equal(pairs[0].b, pairs[1].b)
    assert not torch.equal(pairs[0].a, pairs[2].a)
    assert [k for k in first.adapters["vera"].state_dict() if "vera_" not in k] == ["projections.a", "projections.b"]
    assert {k.rpartition(".")[2] for k in first.parameters_to_train() if "head" not in k} == {"vera_d", "vera_b"}
    double: Any = zoo.load(
        "vit-micro", zoo.adapter("vera", rank=6), pretrained=False, dtype=torch.float64, num_classes=2
    )
    wide = double.adapters["vera"].get_submodule("projections").a
    assert torch.equal(wide.float().double(), wide)


def test_rank_one_changes_by_rank_one() -> None:
    model = build(rank=1)
    shake(model)
    change = model.merge().blocks[0].attn.qkv.weight[:48] - model.backbone.blocks[0].attn.qkv.weight[:48]
    assert torch.linalg.svdvals(change)[1] < 1e-5 < torch.linalg.svdvals(change)[0]


def test_first_l_b_then_l_d() -> None:
    model = build().train()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        for key, parameter in model.parameters_to_train().items():
            if "vera_" in key:
                assert bool(parameter.grad.any()) == (step == 1 or "vera_b" in key), (step, key)
        optimizer.step()


def test_saved_without_the_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(save_projection=False, rank=64)
    shake(model)
    images = torch.randn(3, 3, 32, 32)
    model.save_adapter(tmp_path / "small")
    big = build(rank=64)
    big.save_adapter(tmp_path / "big")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("small", "big")]
    assert sizes[0] < sizes[1] / 2
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "small", pretrained=False).eval()
    assert torch.equal(again(images), model(images))
    torch.manual_seed(0)
    real = torch.Generator

    class Other:
        """A generator of another library: the same seed is another row of numbers."""

        def __init__(self, device: str) -> None:
            self.device = device

        def manual_seed(self, seed: int) -> torch.Generator:
            return real(self.device).manual_seed(seed + 1)

    monkeypatch.setattr("zoo.adapters.vera.torch.Generator", Other)
    with pytest.raises(MismatchError, match="save_projection=True"):
        zoo.load(adapter=tmp_path / "small", pretrained=False)


def test_refused_settings() -> None:
    for config, message in (
        ({"rank": 0}, "rank is 0"),
        ({"d_init": 0.0}, "ever get a gradient"),
        ({"seed": -1}, "seed is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("vera", **config)
    zoo.load("vit-micro", zoo.adapter("vera", rank=2, d_init=1), pretrained=False)  # a whole number is one, too
    with pytest.raises(zoo.ZooError):
        zoo.load("vit-micro", zoo.adapter("vera", targets=()), pretrained=False)


def test_what_is_kept_for_backward() -> None:
    """r numbers for each token and not the input: q and v read one A x."""
    sizes = {}
    for rank in (8, 16):
        model = build(rank=rank, targets="q,v").train()
        shake(model)
        sizes[rank] = model.saved_bytes(torch.randn(2, 3, 32, 32))
    assert sizes[16] - sizes[8] == 2 * 2 * 17 * 8 * 4  # blocks * images * tokens * 8 more numbers of 4 bytes


def test_equals_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    model = build(targets="o,up,down", rank=6)
    config = peft.VeraConfig(r=6, target_modules=["attn.proj", "fc1", "fc2"], projection_prng_key=0)
    theirs = peft.get_peft_model(copy.deepcopy(model).merge(), config).eval()  # l_b = 0: the pretrained weights
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == model.num_parameters(
        trainable=True, head=False
    )
    pair = model.adapters["vera"].get_submodule("projections")
    state = theirs.base_model
    assert torch.equal(state.vera_A["default"], pair.a) and torch.equal(state.vera_B["default"], pair.b)
    shake(model)
    roles = {"attn.proj": "attn.o", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    found = [(f"blocks.{i}.{ours}", f"blocks.{i}.{name}") for i in range(2) for name, ours in roles.items()]
    layers = {ours: theirs.base_model.model.get_submodule(name) for ours, name in found}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.vera_lambda_d["default"].copy_(model.adapters["vera"].module_at(name).vera_d)
            layer.vera_lambda_b["default"].copy_(model.adapters["vera"].module_at(name).vera_b)
    images = torch.randn(3, 3, 32, 32)
    mine, expected = model(images), theirs(images)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    mine.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in layers.items():
        part = model.adapters["vera"].module_at(name)
        torch.testing.assert_close(part.vera_d.grad, layer.vera_lambda_d["default"].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.vera_b.grad, layer.vera_lambda_b["default"].grad, rtol=1e-4, atol=1e-5)
