"""The model: switching, removal, heads, copies, per-sample adapters, training mode, names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import CombinationError, ConfigError, UnknownNameError

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def build(**options: object) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", pretrained=False, **{"num_classes": 5, **TINY, **options})  # type: ignore[arg-type]


def shake(model: zoo.Model, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.adapters[name].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def two() -> zoo.Model:
    model = build()
    for seed, name in enumerate("ab"):
        model.add_adapter("lora", name, activate=False)
        shake(model, name, seed)
    return model


def test_switching(two: zoo.Model, images: Tensor) -> None:
    bare = two(images)
    two.set_active("a")
    a = two(images)
    two.set_active("a", "b")
    both = two(images)
    two.set_active("a")
    assert torch.equal(two(images), a)
    with two.disable():
        assert torch.equal(two(images), bare)
    assert two.active == ("a",)
    assert not torch.allclose(a, bare) and not torch.allclose(a, both)


def test_only_the_active_are_trained(two: zoo.Model) -> None:
    two.set_active("a", "b", train="b")
    assert {k.split("/")[0] for k in two.parameters_to_train()} == {"b", "head"}
    assert not any(p.requires_grad for p in two.adapters["a"].parameters())
    assert not any(p.requires_grad for p in two.backbone.parameters())


def test_disable_restores_after_an_error(two: zoo.Model) -> None:
    two.set_active("b")
    with pytest.raises(RuntimeError), two.disable():
        raise RuntimeError
    assert two.active == ("b",)


@pytest.mark.parametrize("train", [False, True])
def test_per_sample_adapters(two: zoo.Model, images: Tensor, train: bool) -> None:
    two.train(train)
    names = ["a", None, "b", "a", "b", None]
    single = {}
    for name in ("a", "b", None):
        two.set_active(*([name] if name else []))
        single[name] = two(images)
    two.set_active("a")
    mixed = two(images, adapters=names)
    for i, name in enumerate(names):
        assert torch.allclose(mixed[i], single[name][i], atol=1e-6), name
    assert two.active == ("a",)


def test_per_sample_gradients(two: zoo.Model, images: Tensor) -> None:
    names = ["a", "b", "a", "b", "b", "a"]
    two.set_active("a", "b")
    two.train()
    two(images, adapters=names).square().sum().backward()
    mixed = {n: [p.grad.clone() for p in two.adapters[n].parameters()] for n in "ab"}
    for name in "ab":
        two.zero_grad(set_to_none=True)
        two.set_active(name)
        rows = [i for i, n in enumerate(names) if n == name]
        two(images[rows]).square().sum().backward()
        for got, parameter in zip(mixed[name], two.adapters[name].parameters()):
            assert torch.allclose(got, parameter.grad, atol=1e-5)


def test_per_sample_with_parameters_of_the_backbone(images: Tensor) -> None:
    """Methods that swap parameters go through in sub-batches."""
    model = build()
    for seed, method in enumerate(("lora", "bitfit")):
        model.add_adapter(method, activate=False)
        shake(model, method, seed)
    names = ["lora", "bitfit", None, "bitfit", "lora", None]
    mixed = model(images, adapters=names)
    for name in ("lora", "bitfit", None):
        model.set_active(*([name] if name else []))
        for i in (i for i, n in enumerate(names) if n == name):
            assert torch.allclose(mixed[i], model(images)[i], atol=1e-6)


def test_per_sample_heads(images: Tensor) -> None:
    model = build()
    for name in "ab":
        model.add_adapter("lora", name, num_classes=3, activate=False)
        shake(model, name)
    mixed = model(images, adapters=list("ababab"))
    model.set_active("b")
    assert mixed.shape == (6, 3)
    assert torch.allclose(mixed[1::2], model(images)[1::2], atol=1e-6)


def test_per_sample_mistakes(two: zoo.Model, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="2 names for a batch of 6"):
        two(images, adapters=["a", "b"])
    with pytest.raises(UnknownNameError, match="no adapter 'c'"):
        two(images, adapters=["a", "c"] * 3)


def test_a_copy_is_independent(two: zoo.Model, images: Tensor) -> None:
    two.set_active("a")
    twin = copy.deepcopy(two)
    before = two(images)
    assert torch.equal(twin(images), before)
    shake(twin, "a", 9)
    assert torch.equal(two(images), before)
    assert not torch.allclose(twin(images), before)
    twin.set_active("b")
    assert torch.equal(two(images), before)


def test_backbone_stays_in_eval_mode(images: Tensor) -> None:
    model = build(proj_drop_rate=0.5)
    model.add_adapter("lora")
    model.train()
    assert torch.equal(model(images), model(images))
    model.remove_adapter("lora")
    model.add_adapter("full")
    model.train()
    assert not torch.equal(model(images), model(images))


def test_two_methods_that_train_the_same_parameter() -> None:
    model = build()
    model.add_adapter("bitfit")
    with pytest.raises(CombinationError, match="both train the same 'bias'"):
        model.add_adapter("norm")
    assert model.active == ("bitfit",) and list(model.adapters) == ["bitfit"]
    model.set_active()
    model.add_adapter("norm")


def test_trained_parameters_come_and_go(images: Tensor) -> None:
    model = build()
    state, logits = {k: v.clone() for k, v in model.backbone.state_dict().items()}, model(images)
    model.add_adapter("bitfit")
    shake(model, "bitfit")
    assert not torch.equal(model(images), logits)
    assert not torch.equal(model.state_dict()["adapters.bitfit.norm.bias"], state["norm.bias"])
    assert torch.equal(model.state_dict()["backbone.norm.bias"], state["norm.bias"])  # each in one place
    model.set_active()
    assert torch.equal(model(images), logits)
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())
    model.set_active("bitfit")
    model.remove_adapter("bitfit")
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())


def test_part_of_a_fused_bias(images: Tensor) -> None:
    model = build()
    bare = model(images)
    adapter = model.add_adapter(zoo.adapter("bitfit", targets=("q", "up")))
    assert torch.equal(model(images), bare)
    assert set(adapter.state_dict()) == {f"blocks.{i}.{n}.bias" for i in range(2) for n in ("attn.q", "mlp.up")}
    shake(model, "bitfit")
    plain = copy.deepcopy(model.backbone)
    with model._bare():
        plain = copy.deepcopy(model.backbone)
    with torch.no_grad():
        for i, block in enumerate(plain.blocks):
            block.attn.qkv.bias[:48] = adapter.get_parameter(f"blocks.{i}.attn.q.bias")
            block.mlp.fc1.bias.copy_(adapter.get_parameter(f"blocks.{i}.mlp.up.bias"))
    expected = model.head(plain.forward_head(plain.forward_features(images), pre_logits=True))
    assert torch.allclose(model(images), expected, atol=1e-6)
    assert torch.allclose(model.merge()(images), expected, atol=1e-6)


def test_heads() -> None:
    model = build(num_classes=None)
    assert model.num_classes == 100 and isinstance(model.head, nn.Linear)
    assert isinstance(model.backbone.get_classifier(), nn.Identity)
    assert build(num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 48)
    with pytest.raises(ConfigError, match="num_classes is -1"):
        build(num_classes=-1)


def test_logits_are_those_of_timm(images: Tensor) -> None:
    import timm

    model = zoo.load("timm:vit_tiny_patch16_224", pretrained=False, img_size=32)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    plain.load_state_dict(model.merge().state_dict())
    assert torch.equal(model(images), plain(images))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: zoo.load("vit-b17"), UnknownNameError, "vit-b1"),
        (lambda: zoo.load("vit-micro", adapter="lorra", pretrained=False), UnknownNameError, "'lora'"),
        (lambda: zoo.adapter("vptt"), UnknownNameError, "Did you mean 'vpt'"),
        (lambda: zoo.adapter("lora", rnk=4), ConfigError, "Did you mean 'rank'"),
        (lambda: zoo.adapter("lora", rank="8"), ConfigError, "expected int"),
        (lambda: zoo.adapter("lora", rank=0), ConfigError, "expected 1 or more"),
        (lambda: zoo.load("vit-micro", pretrained=False, colour="red"), ConfigError, "colour"),
        (lambda: zoo.load(), ConfigError, "Name a backbone"),
        (lambda: zoo.load("vit-micro", classes="cat"), ConfigError, r"expected a list of names, \['cat'\]"),
        (lambda: build().set_active(["lora"]), UnknownNameError, "no adapter '.'lora'.'"),  # type: ignore[arg-type]
        (lambda: build().set_active(None), UnknownNameError, "no adapter 'None'"),  # type: ignore[arg-type]
    ],
)
def test_mistakes(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]


def test_names_of_adapters() -> None:
    model = build()
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        model.add_adapter("lora", "a/b")
    model.add_adapter("lora")
    with pytest.raises(ConfigError, match="already"):
        model.add_adapter("lora", "lora")
    model.add_adapter("lora")
    assert list(model.adapters) == ["lora", "lora-2"]


def test_a_config_serves_two_models(images: Tensor) -> None:
    config = zoo.adapter("lora", rank=2)
    first, second = build(), build()
    first.add_adapter(config)
    second.add_adapter(config)
    shake(first, "lora")
    assert not any(p.abs().sum() for n, p in second.adapters["lora"].named_parameters() if n.endswith("lora_b"))
    assert not list(config.parameters())


def test_seed_repeats_the_start() -> None:
    a, b = (zoo.load("vit-micro", pretrained=False, adapter="lora", num_classes=5, seed=4, **TINY) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.adapters.parameters(), b.adapters.parameters()))
    assert torch.equal(a.head.weight, b.head.weight)


def test_a_dead_module_is_found(images: Tensor) -> None:
    model = build()
    model.add_adapter("lora")
    model.backbone.blocks[1].__dict__["forward"] = lambda x, **_: x  # a pipeline that passes a block by
    dead = model.probe(images)
    assert {d.split("/")[1].split(".lora")[0] for d in dead} == {"blocks.1.attn.q", "blocks.1.attn.v"}


def test_probe_of_a_model_that_is_frozen_whole(images: Tensor) -> None:
    """What a user froze gets no gradient, and nothing is left that could be dead: it ended in torch's own words."""
    model = build()
    model.add_adapter("lora")
    model.adapters["lora"].requires_grad_(False)
    model.heads.requires_grad_(False)
    assert model.probe(images) == [] and not model.parameters_to_train()
