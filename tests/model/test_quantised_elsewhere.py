"""Backbones whose weights torchao has quantised: methods that add to outputs work on them, what needs the weight says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, MergeError
from zoo.library import kernels
from zoo.points import foreign

ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.Linear(128, 3))
    if kind == "nf4":
        for i in (1, 3):
            linear: Any = made[i]
            linear.weight = nn.Parameter(ao.NF4Tensor.from_tensor(linear.weight.detach(), 64, 256), requires_grad=False)
        return made
    group = ao.granularity.PerGroup(64)
    config = {
        "int8": ao.Int8WeightOnlyConfig(),
        "int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
    }[kind]
    ao.quantize_(made, config, filter_fn=lambda m, name: name in ("1", "3"))
    return made


def example() -> Tensor:
    return torch.randn(3, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_torchao(kind: str, tmp_path: Path) -> None:
    model = zoo.load(network(kind), "lora", example=example(), seed=0)
    assert {"1", "3"} <= {p.name for p in model.points} and model.probe(example()) == []
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = zoo.load(network(kind), example=example())
    x, point = example(), model.points["1"]
    changed = model.eval()(x)
    with torch.no_grad(), model.disable():
        torch.testing.assert_close(model(x), plain.eval()(x))
    assert not torch.equal(changed, plain(x)) and model.saved_bytes(x) > 0
    for adapter, words in (
        (zoo.adapter("svfit"), "The weight of point '1' is kept as .* of torchao, and is not read here"),
        (zoo.adapter("lora", dora=True), "of torchao"),
        (zoo.adapter("l4q"), "of torchao"),
        (zoo.adapter("full"), "the weight of '1' is kept as .* of torchao, which is not trained"),
    ):
        with pytest.raises(AttachError, match=words):
            model.add_adapter(adapter, "other")
    assert list(model.adapters) == ["lora"] and torch.equal(model(x), changed)
    with pytest.raises(AttachError, match="of torchao, and is not read here"):
        _ = point.weight  # type: ignore[attr-defined]
    with pytest.raises(MergeError, match=r"its weight is kept as .* of torchao. Keep the adapter live"):
        model.merge()
    model.save_adapter(tmp_path / "out")
    again = zoo.load(network(kind), adapter=tmp_path / "out", example=example())
    assert torch.equal(again.eval()(x), changed)
    for name in ("bitfit", "ssf"):
        model.remove_adapter(model.active[-1])
        model.add_adapter(name)
        assert model.train().probe(x) == []


@pytest.mark.filterwarnings("ignore")
def test_merging_into_what_was_quantised_afterwards() -> None:
    """In a family that knows its points: torchao's function on `model.backbone`, after an adapter was attached."""
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    model = zoo.load("vit-micro", "lora", pretrained=False, num_classes=3, **sizes)
    ao.quantize_(model.backbone, ao.Int8WeightOnlyConfig())
    with pytest.raises(MergeError, match="keeps its weight as Int8Tensor of torchao"):
        model.merge()


class _AsTheirs(torch.autograd.Function):
    """As that of 8 bits in bitsandbytes: what it returns is a view made without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x.flatten(0, -2) @ weight.float().T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.saved_tensors[0].float(), None


class Theirs(nn.Linear):
    """A projection of whole numbers, as a library keeps it."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__(*reversed(numbers.shape), bias=False)
        self.weight = nn.Parameter(numbers, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return _AsTheirs.apply(input, self.weight)


@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_outputs_that_are_views(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is added to them in place, and gradients are those of the same numbers in floating point."""
    monkeypatch.setattr(foreign, "LIBRARIES", (*foreign.LIBRARIES, __name__.partition(".")[0]))
    numbers = torch.randint(-9, 9, (6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    plain = nn.Linear(8, 6, bias=False)
    plain.weight.data = numbers.float()
    found = []
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    for one in (Theirs(numbers), plain):
        torch.manual_seed(0)
        model = zoo.load(nn.Sequential(nn.LayerNorm(8), one, nn.LayerNorm(6)), method, example=x, seed=0).train()
        for n, p in enumerate(model.adapters.parameters()):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
        model(x).square().sum().backward()
        found.append({k: p.grad for k, p in model.parameters_to_train().items()})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][key])


class Packed(nn.Module):
    """As the projections of GPTQ: eight numbers of 4 bits in an int32 of `qweight` (i / 8, o), one scale for each output."""

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = numbers.shape
        parts = numbers.T.reshape(-1, 8, self.out_features).long() << torch.arange(0, 32, 4)[:, None]
        self.register_buffer("qweight", parts.sum(1).to(torch.int32))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        numbers = (self.qweight[:, None] >> torch.arange(0, 32, 4)[:, None] & 15).flatten(0, 1).float()  # type: ignore[operator,index]
        return x @ ((numbers - 8) * self.scales)  # type: ignore[operator]


def test_projections_of_gptq_and_awq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules without a weight: what adds to outputs works, and equals that on the same numbers in floating point."""
    monkeypatch.setattr(foreign, "PACKED", (__name__.partition(".")[0],))
    draw = torch.Generator().manual_seed(0)
    numbers, scales = torch.randint(0, 16, (6, 8), generator=draw), torch.rand(6, generator=draw)
    plain = nn.Linear(8, 6, bias=False)
    plain.weight.data = (numbers - 8) * scales[:, None]
    x, models = torch.randn(2, 5, 8, generator=draw), []
    for one in (Packed(numbers, scales), plain, Packed(15 - numbers, scales)):
        model = zoo.load(nn.Sequential(nn.LayerNorm(8), one, nn.LayerNorm(6)), "lora", example=x, seed=0).train()
        for n, p in enumerate(model.adapters.parameters()):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
        model(x).square().sum().backward()
        models.append(model)
    kept, whole, other = models
    torch.testing.assert_close(kept(x), whole(x))
    for key, value in whole.parameters_to_train().items():
        torch.testing.assert_close(kept.parameters_to_train()[key].grad, value.grad)
    assert kept.num_parameters(trainable=True) == whole.num_parameters(trainable=True)
    assert kept.fingerprint != other.fingerprint
    for adapter in (zoo.adapter("svfit"), zoo.adapter("lora", dora=True), zoo.adapter("full"), zoo.adapter("perp")):
        with pytest.raises(AttachError, match="kept as Packed of"):
            kept.add_adapter(adapter, "other")
    with pytest.raises(MergeError, match="Packed of"):
        kept.merge()


def test_kernels_that_have_gradients_are_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for method, name in (("gptq", "GPTQConfig"), ("awq", "AwqConfig"), ("bitsandbytes", None)):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
        found = kernels(str(tmp_path))
        assert (type(found["quantization_config"]).__name__ if found else None) == name
        assert not found or found["quantization_config"].backend == "auto_trainable"
    (tmp_path / "config.json").write_text("{}")
    assert kernels(str(tmp_path)) == {}
