"""wav2vec 2.0, HuBERT, data2vec-audio, WavLM: against transformers' forward, prompts written out, post-norm and pre-norm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sampled import lots
from torch import Tensor

import zoo
from zoo.errors import AttachError, ConfigError, DataError
from zoo.registry import family
from zoo.table import compatibility

transformers = pytest.importorskip("transformers")

KINDS = ("wav2vec2", "wav2vec2-stable", "hubert", "data2vec-audio", "wavlm", "wavlm-stable")
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}


def small() -> dict[str, Any]:
    tiny = family("wav2vec2").tiny
    assert tiny is not None
    return tiny[1]


def make(kind: str = "wav2vec2", adapter: Any = None, **options: Any) -> zoo.Model:
    name = f"{kind.removesuffix('-stable')}-b"
    extra = STABLE if kind.endswith("-stable") else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.load(name, pretrained=False, **{"num_classes": 3, **small(), **extra, **options})
        if adapter is not None:
            model.add_adapter(adapter)
    return model.double().eval()


def waves(count: int = 2) -> Tensor:
    return torch.randn(count, 1_600, generator=torch.Generator().manual_seed(1)).double()


def library(model: zoo.Model) -> Any:
    """transformers' own module with the same weights, and nothing of ours in it."""
    config: Any = copy.deepcopy(model.backbone.config)
    config.num_labels = 3
    module = type(model.backbone)(config).double()
    assert not module.load_state_dict({**model.backbone.state_dict(), **model.head.state_dict()}).missing_keys
    return module.requires_grad_(False).eval()


def settle(model: zoo.Model) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_library(kind: str) -> None:
    model, x = make(kind), waves()
    module = library(model)
    body = module.get_submodule(module.base_model_prefix)
    assert torch.equal(model.features(x), body(x).last_hidden_state.mean(1))  # to the bit
    torch.testing.assert_close(model(x), module(x).logits, rtol=1e-10, atol=1e-12)


REFUSED = {
    "vqt",
    "coop",
    "cones",
    "textual-inversion",
    "clip-adapter",
    "tip-adapter",
    "tip-adapter-f",
    "gram",
    "cocoop",
    "cpe-clip",
    "maple",
    "convpass",
    "dtl+",
    "petalface",
    "sct",
    "unipelt",
    "videopainter",
    "videopainter-id",
}


@pytest.mark.parametrize(
    ("kind", "methods"), lots(["wav2vec2", "wavlm"], zoo.list_adapters(), {*REFUSED, "meft", "das"})
)
def test_every_method_works_or_is_refused(kind: str, methods: list[str]) -> None:
    refused = REFUSED | ({"meft", "das"} if kind == "wavlm" else set())
    for cell in compatibility([kind], methods):
        answers = (cell.attach, cell.train, cell.save, cell.merge)
        assert not any(a.startswith("defect") for a in answers), cell
        assert (cell.attach != "yes") == (cell.method in refused), cell


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["norm", "bitfit", "ssf"])
def test_every_normalisation_is_a_point(kind: str, method: str) -> None:
    """Those of the convolutions, too, which were left out: counted against the library's own modules."""
    model, x = make(kind, method), waves()
    modules = {id(m): m for m in model.backbone.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm))}
    norms = {key: m for key, m in modules.items() if m.weight is not None}
    assert {id(p.module) for p in model.points.select(kind="norm")} == set(norms)
    assert len(norms) > 2 * 2 + 2
    if method == "norm":
        count = model.num_parameters(trainable=True, head=False)
        assert count == sum(p.numel() for m in norms.values() for p in m.parameters())
    assert model.probe(x) == []
    settle(model)
    torch.testing.assert_close(model.family.run(model.merge(), x), model(x), rtol=1e-8, atol=1e-8)


def straightforward(module: Any, x: Tensor, prompts: list[Tensor], deep: bool, pool: str) -> Tensor:
    """(B, d): prompts as tokens [prompts | steps] that run through whole blocks of the library's module."""
    body = module.get_submodule(module.base_model_prefix)
    tokens = body.feature_extractor(x).transpose(1, 2)
    tokens = body.feature_projection(tokens)
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    tokens = tokens + body.encoder.pos_conv_embed(tokens)
    stable, count, bias = getattr(body.config, "do_stable_layer_norm", False), 0, None
    tokens = tokens if stable else body.encoder.layer_norm(tokens)
    gated = "WavLM" in type(body).__name__
    if gated and deep:  # prompts of one block have no place: no bias in their rows and columns
        bias = body.encoder.layers[0].attention.compute_bias(tokens.shape[1], tokens.shape[1]).repeat(len(x), 1, 1)
        bias = torch.nn.functional.pad(bias, (prompts[0].shape[0], 0, prompts[0].shape[0], 0))
    for i, layer in enumerate(body.encoder.layers):
        if deep or i == 0:
            tokens = torch.cat([prompts[i].expand(len(x), -1, -1), tokens[:, count:]], dim=1)
            count = prompts[i].shape[0]
        if gated:
            tokens, bias = layer(tokens, position_bias=bias)
        else:
            tokens = layer(tokens)
    tokens = body.encoder.layer_norm(tokens) if stable else tokens
    return (tokens if pool == "all" else tokens[:, count:]).mean(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("deep", "pool"), [(True, "patches"), (True, "all"), (False, "patches"), (False, "all")])
def test_prompts_equal_the_straightforward_form(kind: str, deep: bool, pool: str) -> None:
    model, x = make(kind, zoo.adapter("vpt", num_tokens=3, deep=deep, pool=pool)), waves()
    prompts = [p.detach().clone().requires_grad_() for p in model.adapters["vpt"].parameters()]
    expected = straightforward(library(model), x, prompts, deep, pool)
    found = model.features(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = torch.autograd.grad((expected * weights).sum(), prompts)
    (found * weights).sum().backward()
    for parameter, grad in zip(model.adapters["vpt"].parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_adapters_stand_where_the_unified_view_has_them(kind: str) -> None:
    """A block with a sequential adapter behind the attention and a parallel one beside the MLP, by hand."""
    model = make(kind, zoo.adapter("adapter", form="houlsby", rank=2))
    model.add_adapter(zoo.adapter("adapter", form="adaptformer", rank=2), "beside")
    settle(model)
    point, layer = model.points["blocks.1"], library(model)
    layer = layer.get_submodule(point.path)
    first, beside = model.adapters["adapter"], model.adapters["beside"]

    def added(x: Tensor, owner: Any, name: str) -> Tensor:
        return owner.module_at(name)(x)

    x = torch.randn(2, 5, 48, dtype=torch.double)
    stable = kind == "wav2vec2-stable"
    y = layer.attention(layer.layer_norm(x) if stable else x)[0]
    u = x + added(y, first, "blocks.1.attn")
    u = u if stable else layer.layer_norm(u)
    y = added(layer.feed_forward(layer.final_layer_norm(u) if stable else u), first, "blocks.1.mlp")
    y = y + added(u, beside, "blocks.1.mlp")
    expected = u + y if stable else layer.final_layer_norm(u + y)
    torch.testing.assert_close(point.module(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("method", ["lora", "prefix", "vpt"])
def test_trains_and_is_removed(kind: str, method: str) -> None:
    model, x = make(kind), waves()
    before = model(x)
    model.add_adapter(zoo.adapter(method, **({"targets": "all-linear", "rank": 2} if method == "lora" else {})))
    assert model.probe(x) == []
    settle(model)
    found: dict[str, dict[str, Tensor]] = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.zero_grad()
        model.train()(x).square().sum().backward()
        found[memory] = {k: p.grad.clone() for k, p in model.parameters_to_train().items()}  # type: ignore[union-attr]
    for memory in ("low", "min"):
        for name, grad in found["default"].items():
            torch.testing.assert_close(found[memory][name], grad, rtol=1e-8, atol=1e-11)
    model.eval().remove_adapter(method)
    for name, parameter in model.head.named_parameters():  # settled, too
        parameter.data.copy_(make(kind).head.get_parameter(name))
    assert torch.equal(model(x), before)


def test_an_adapter_for_each_sample() -> None:
    model, x = make("wav2vec2", zoo.adapter("lora", rank=2)), waves()
    model.add_adapter("prefix")
    settle(model)
    expected = []
    for i, name in enumerate(("prefix", "lora")):
        model.set_active(name)
        expected.append(model(x[i : i + 1]))
    torch.testing.assert_close(model(x, adapters=["prefix", "lora"]), torch.cat(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_to_a_module_that_the_library_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model, x = make(kind, zoo.adapter("lora", targets="all-linear", rank=2)), waves()
    settle(model)
    plain: Any = model.merge()
    assert not any(type(m).__module__.split(".")[0] in ("zoo", "audio") for m in plain.modules())
    torch.testing.assert_close(plain(x).logits, model(x), rtol=1e-6, atol=1e-6)
    plain.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.double)
    torch.testing.assert_close(again(x).logits, plain(x).logits)
    ours = zoo.load(f"transformers:{tmp_path / 'merged'}", seconds=2)
    torch.testing.assert_close(ours.double()(x), plain(x).logits, rtol=1e-6, atol=1e-6)
    assert (ours.num_classes, ours.family.family) == (3, model.family.family)
    # a bare network has no classifier to take along
    plain.get_submodule(plain.base_model_prefix).save_pretrained(tmp_path / "bare")
    bare = zoo.load(f"transformers:{tmp_path / 'bare'}", "lora")
    assert bare(x.float()).shape == (2, 48)
    assert zoo.load(f"transformers:{tmp_path / 'bare'}", num_classes=5)(x.float()).shape == (2, 5)


def test_preprocessing() -> None:
    model = zoo.load("wav2vec2-b", pretrained=False, num_classes=2, seconds=0.5, **small())
    prepare = model.preprocess()
    wave = torch.randn(6_000) * 0.1 + 3
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    expected = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    torch.testing.assert_close(prepare(wave), torch.cat([expected, torch.zeros(2_000)]), rtol=1e-5, atol=1e-5)
    assert prepare(torch.randn(20_000)).shape == (8_000,)
    torch.manual_seed(0)
    shifted = model.preprocess(train=True)(wave)
    start = int(shifted.nonzero()[0])
    assert 0 < start <= 2_000
    torch.testing.assert_close(shifted[start : start + 6_000], expected, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(DataError, match="at least 400 samples"):
        make()(torch.randn(2, 300).double())
    with pytest.raises(ConfigError, match=r"'hiden_size'.*'hidden_size'"):
        zoo.load("hubert-b", pretrained=False, hiden_size=8)
    with pytest.raises(ConfigError, match="seconds is 0"):
        zoo.load("hubert-b", pretrained=False, seconds=0, **small())
    with pytest.raises(AttachError, match="use_weighted_layer_sum"):
        make("wav2vec2", zoo.adapter("vpt", deep=False), use_weighted_layer_sum=True)
    assert make("wav2vec2", "vpt", use_weighted_layer_sum=True).probe(waves()) == []


def test_counts() -> None:
    for name in ("wav2vec2-b", "hubert-b"):
        model = zoo.load(name, device="meta", num_classes=0)
        assert len(model.points.select(kind="attention")) == 12
        model.add_adapter(zoo.adapter("lora", rank=8))
        assert model.num_parameters(trainable=True) == 294_912  # as on ViT-B: q and v of 12 blocks of width 768
    assert 315e6 < zoo.load("hubert-l", device="meta", num_classes=0).num_parameters() < 317e6
