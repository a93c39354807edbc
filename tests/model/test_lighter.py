"""A backbone with int8 weights, and with sparse ones: exact products, adapters on them, merging, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from method_models import attach, bare, both, gradients, images, loss_of, shake

import zoo
from zoo.errors import (
    AttachError,
    ConfigError,
    MergeError,
    MismatchError,
)
from zoo.model.quantised import Int8Linear


def model_of(family: str, *methods: str) -> zoo.Model:
    model = bare(family, **({"depth": 3} if family == "vit" else {}))
    for method in methods:
        attach(model, method)
        shake(model, method)
    return model


# -- int8 -----------------------------------------------------------------------------------------------------------------


def test_int8_products_are_exact() -> None:
    """F.linear with the rounded weight; the error of an entry is at most half a step; backward keeps no weight."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24)
    linear.weight.data[3] = 0
    small, x = Int8Linear.of(linear), torch.randn(5, 40, requires_grad=True)
    step = linear.weight.abs().amax(1) / 127
    assert small.int8.dtype == torch.int8 and small.int8.abs().max() == 127
    assert ((small.weight - linear.weight).abs() <= step[:, None] / 2 + 1e-7).all()
    rounded = torch.stack([small.int8[o].float() * small.scale[o] for o in range(24)])
    expected = F.linear(x, rounded, linear.bias)
    assert torch.equal(small(x), expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (small(x), expected))
    assert torch.equal(found, wanted)


@both
def test_adapters_on_int8(family: str) -> None:
    model = model_of(family, "lora", "ssf")
    small = zoo.quantise(model)
    names = {type(p.module) for p in small.points.linears("all-linear")}
    assert names == {Int8Linear} and small.active == model.active
    bytes_of = {
        k: sum(t.nbytes for t in m.backbone.state_dict().values()) for k, m in (("whole", model), ("small", small))
    }
    assert bytes_of["small"] < 0.5 * bytes_of["whole"]
    with torch.no_grad():  # the same as on the rounded weights
        for point in model.points.linears("all-linear"):
            whole = Int8Linear.of(point.module).weight
            point.module.weight.copy_(whole)
    torch.testing.assert_close(small(images()), model(images()), rtol=1e-5, atol=1e-5)
    assert small.train().probe(images()) == []
    for memory in ("default", "low", "min"):
        small.memory = model.memory = memory
        ours, theirs = (gradients(m.train(), lambda m=m: loss_of(m)) for m in (small, model))
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6)
        assert small.saved_bytes(images()) == model.saved_bytes(images())  # no float copy of a weight is kept
    with pytest.raises(MergeError, match="is kept in int8, into which nothing can be merged"):
        small.eval().merge()


def test_int8_refusals() -> None:
    model = model_of("vit")
    with pytest.raises(ConfigError, match="slices of one weight"):
        zoo.quantise(model, "q,v")
    with pytest.raises(ConfigError, match=r"only nn\.Linear"):
        zoo.quantise(model, "patch_embed")
    small = zoo.quantise(model)
    with pytest.raises(ConfigError, match="Int8Linear"):
        zoo.quantise(small)
    with pytest.raises(ConfigError, match="Prune before quantising"):
        zoo.prune(small, heads={0: [0]})
    with pytest.raises(AttachError, match="no parameter 'weight'"):
        small.add_adapter(_Weights())
    with pytest.raises(AttachError, match="'full' trains every parameter"):
        small.add_adapter("full")
    with pytest.raises(ConfigError, match="Make weights sparse first"):
        zoo.sparsify(small, "up")
    assert list(small.adapters) == []
    data = torch.utils.data.TensorDataset(images()[[0, 1, 2, 3, 0]], torch.arange(5))
    with pytest.raises(AttachError, match="kept in int8"):
        small.add_adapter(zoo.adapter("spt", budget=0.004, num_batches=1))
    small.add_adapter(zoo.adapter("ladder", init="fisher", reduction=4))
    with pytest.raises(ConfigError, match="kept in int8"):
        zoo.fit(small, data, steps=1, batch_size=2, progress=False)
    small.remove_adapter("ladder")
    part = zoo.quantise(zoo.quantise(model, "up"))  # by default whatever can be
    assert all(
        torch.equal(a, b) for a, b in zip(part.backbone.state_dict().values(), small.backbone.state_dict().values())
    )
    names = {
        type(p.module).__name__ for p in zoo.quantise(zoo.load("clip-micro", pretrained=False)).points if p.role == "up"
    }
    assert names == {"Int8Linear"}  # others, such as fused projections of open_clip, stay as they are
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), small(images()), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


class _Weights(zoo.Adapter):
    """Trains weights."""

    method = "weights"

    def attach(self, points: zoo.Points) -> None:
        for point in points.select("up", kind="linear"):
            point.train("weight")


# -- sparse ---------------------------------------------------------------------------------------------------------------


def test_sparse_weights() -> None:
    model = model_of("vit", "lora")
    sparse = zoo.sparsify(model, "up,q", 0.75)
    up = sparse.points["blocks.0.mlp.up"].weight
    assert (up == 0).float().mean() == 0.75
    kept = up != 0
    original = model.points["blocks.0.mlp.up"].weight
    assert torch.equal(up[kept], original[kept]) and original[~kept].abs().max() <= original[kept].abs().min()
    fused = sparse.backbone.blocks[0].attn.qkv.weight  # type: ignore[union-attr,index]
    assert (fused[:48] == 0).float().mean() == 0.75 and (fused[48:] != 0).all()
    with pytest.warns(UserWarning, match="kept the zeros of the sparse weight"):
        plain = sparse.merge()
    assert torch.equal(plain.blocks[0].mlp.fc1.weight == 0, ~kept)
    change = sparse.adapters["lora"].module_at("blocks.0.mlp.up").delta()
    torch.testing.assert_close(plain.blocks[0].mlp.fc1.weight, (up + change) * kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.sparsify(model_of("vit", "norm"), "up").merge()  # nothing is lost
    again = zoo.sparsify(sparse, masks={"blocks.0.mlp.up": torch.ones(192, 48).triu().bool()})
    zeros = again.points["blocks.0.mlp.up"].weight == 0
    assert torch.equal(zeros, ~(kept & torch.ones(192, 48).triu().bool()))
    for options, error, match in (
        ({"sparsity": 1.0}, ConfigError, "sparsity is 1"),
        ({"masks": {"blocks.0.mlp.up": torch.ones(2, 2)}}, MismatchError, r"\(2, 2\); its weight is \(192, 48\)"),
    ):
        with pytest.raises(error, match=match):
            zoo.sparsify(model, **options)  # type: ignore[arg-type]
