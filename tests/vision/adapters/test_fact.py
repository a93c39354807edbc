"""FacT: one set of factors for the network, the equations written out, merging, saving, other families, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo

DIM, DEPTH = 48, 2
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 3}
forms = pytest.mark.parametrize("form", ["tk", "tt"])


def fact(form: str = "tk", **config: Any) -> Any:
    return zoo.adapter("fact", **{"form": form, "rank": 3, "scale": 0.5, "dropout": 0.0, **config})


def vit(adapter: Any) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", adapter, pretrained=False, num_classes=5, **TINY)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def shake(model: zoo.Model) -> None:
    """Away from the start."""
    with torch.no_grad():
        for p in model.adapters["fact"].parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


@forms
def test_start_and_names(form: str) -> None:
    model, x = vit(fact(form)), images()
    adapted = model(x)
    with model.disable():
        assert torch.equal(adapted, model(x))
    names = set(model.adapters["fact"].state_dict())
    cores = {
        f"blocks.{i}.{p}.core"
        for i in range(DEPTH)
        for p in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    }
    assert names == {f"factors_48.{k}" for k in ("u", "v")} | (
        cores if form == "tt" else {"factors_48.c", "factors_48.p"}
    )
    assert not model.adapters["fact"].get_parameter("factors_48.v").any()


@forms
def test_against_the_equations(form: str) -> None:
    """Slice by slice, by loops, from the frozen weights."""
    model, x = vit(fact(form)), images()
    shake(model)
    logits = model(x)
    state = model.adapters["fact"].state_dict()
    u, v = state["factors_48.u"], state["factors_48.v"]
    column = 0

    def slices(name: str, count: int) -> list[Tensor]:
        """The cores (r, r) of a projection: from U x to what goes through V."""
        nonlocal column
        if form == "tt":
            wide = state[f"{name}.core"]
        else:
            columns = [
                sum(state["factors_48.c"][:, :, k] * state["factors_48.p"][k, j] for k in range(3))
                for j in range(column, column + count)
            ]
            wide = torch.stack(columns, dim=-1).reshape(3, 3 * count)  # as the authors' code reads them
            column += count
        return [wide[:, 3 * j : 3 * j + 3] for j in range(count)]

    with model.disable(), torch.no_grad():
        for i, block in enumerate(model.backbone.blocks):
            for start, role in ((0, "q"), (DIM, "k"), (2 * DIM, "v")):
                (core,) = slices(f"blocks.{i}.attn.{role}", 1)
                block.attn.qkv.weight[start : start + DIM] += 0.5 * v @ core.T @ u
            (core,) = slices(f"blocks.{i}.attn.o", 1)
            block.attn.proj.weight += 0.5 * v @ core.T @ u
            for j, core in enumerate(slices(f"blocks.{i}.mlp.up", 4)):
                block.mlp.fc1.weight[j * DIM : (j + 1) * DIM] += 0.5 * v @ core.T @ u
            for j, core in enumerate(slices(f"blocks.{i}.mlp.down", 4)):
                block.mlp.fc2.weight[:, j * DIM : (j + 1) * DIM] += 0.5 * v @ core @ u
        expected = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@forms
@pytest.mark.parametrize("targets", ["all-linear", "k", "q,v,down", ("up",)])
def test_merges_and_saves(form: str, targets: Any, tmp_path: Path) -> None:
    model, x = vit(fact(form, targets=targets)), images()
    shake(model)
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-5, atol=1e-5)
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert torch.equal(again(x), model(x))
    assert again.num_parameters(trainable=True) == model.num_parameters(trainable=True)


def test_dropout_is_between_core_and_factors() -> None:
    """Everything dropped leaves the frozen network; q, k and v have masks of their own."""
    model, x = vit(fact(dropout=0.5)), images()
    shake(model)
    model.train()
    torch.manual_seed(3)
    one, two = model(x), model(x)
    assert not torch.equal(one, two)
    for module in model.adapters["fact"].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1.0
    dropped = model(x)
    with model.disable():
        assert torch.equal(dropped, model(x))


@forms
def test_every_width_has_factors_of_its_own(form: str) -> None:
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    torch.manual_seed(0)
    model = zoo.load("timm:swin_tiny_patch4_window7_224", fact(form), num_classes=3, pretrained=False, **sizes)
    adapter = model.adapters["fact"]
    assert {k.split(".")[0] for k in adapter.state_dict() if k.startswith("factors")} == {"factors_24", "factors_48"}
    own = 24 * 9 if form == "tt" else 24 * 3 + 27  # J = 2 blocks of 12 slices
    assert model.num_parameters(trainable=True, head=False) == sum(2 * d * 3 + own for d in (24, 48))
    shake(model)
    assert model.probe(images()) == []
    torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


@forms
def test_towers_and_other_shapes(form: str) -> None:
    """Each tower has its own; widths that do not divide each other are one slice (here words of 32 with keys of 24)."""
    model = zoo.load(
        "vl-t5", fact(form), pretrained=False, num_classes=0, device="meta", d_model=32, d_kv=12, num_heads=2, d_ff=64
    )
    names = {k.split(".")[0] for k in model.adapters["fact"].state_dict() if k.startswith("factors")}
    assert names == {f"factors_{t}_{w}" for t in ("encoder", "decoder") for w in ("32", "32x24", "24x32")}


def test_refusals() -> None:
    with pytest.raises(zoo.ZooError, match="expected more than 0"):
        zoo.adapter("fact", scale=0.0)
    with pytest.raises(zoo.ZooError, match="expected 1 or more"):
        zoo.adapter("fact", rank=0)
    with pytest.raises(zoo.ZooError, match="form"):
        zoo.adapter("fact", form="cp")
    with pytest.raises(zoo.ZooError, match="dropout is 1"):
        zoo.adapter("fact", dropout=1.0)
    with pytest.raises(zoo.ZooError, match="not a sequence of tokens"):
        vit(fact(targets="patch_embed"))
