"""CLAP's tower of sounds: against the library's forward, windows and their turning, prompts by hand, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, DataError, WeightsError
from zoo.registry import family

transformers = pytest.importorskip("transformers")


def make(adapter: Any = None, name: str = "clap-htsat", **options: Any) -> zoo.Model:
    tiny = family("clap").tiny
    assert tiny is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.load(name, pretrained=False, **{**tiny[1], **options})
        for parameter in model.backbone.parameters():  # tables of places start as zero
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
        if adapter is not None:
            model.add_adapter(adapter)
    return model.double().eval()


def batch(model: zoo.Model) -> Tensor:
    return torch.randn(2, *model.example_batch(1)[0].shape[1:], generator=torch.Generator().manual_seed(1)).double()


def library(model: zoo.Model) -> Any:
    module = transformers.ClapAudioModelWithProjection(copy.deepcopy(model.backbone.config)).double()
    module.load_state_dict(model.backbone.state_dict())
    return module.requires_grad_(False).eval()


def settle(model: zoo.Model) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("name", ["clap-htsat", "clap-htsat-fused"])
def test_equals_the_library(name: str) -> None:
    """Windows of 4 x 4 in maps of 8 x 8 (turned in every second block) and of 4 x 4."""
    model = make(name=name)
    x, module = batch(model), library(model)
    longer = torch.zeros(2, 1, dtype=torch.bool)
    expected = module(x, is_longer=longer).audio_embeds
    assert torch.equal(model.features(x), expected)  # to the bit
    plain: Any = model.merge()
    assert not any(type(m).__module__.startswith("audio") for m in plain.modules())
    blocks = [b for stage in plain.audio_model.audio_encoder.layers for b in stage.blocks]
    assert [(b.window_size, b.shift_size) for b in blocks] == [(4, 0), (4, 2), (4, 0), (4, 2)]
    assert torch.equal(plain(x, is_longer=longer).audio_embeds, expected)
    assert [b.attention.shift for stage in model.family.body.layers for b in stage.blocks] == [0, 2, 0, 0]


@pytest.mark.parametrize("method", ["bitfit", "norm", "ssf", "ia3", "lora", "full"])
def test_nothing_is_dead_and_merges_are_exact(method: str) -> None:
    model = make(zoo.adapter(method, **({"targets": "all-linear", "rank": 2} if method == "lora" else {})))
    x = batch(model)
    assert model.probe(x) == []
    settle(model)
    torch.testing.assert_close(model.family.run(model.merge(), x), model.features(x), rtol=1e-9, atol=1e-9)
    norms = [m for m in model.backbone.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert {id(p.module) for p in model.points.select(kind="norm")} == {id(m) for m in norms}


@pytest.mark.parametrize("method", ["vpt", "prefix"])
def test_more_keys_equal_the_form_by_hand(method: str) -> None:
    """The library's own blocks with an attention of ours, written out for one window after the other."""
    model = make(method)
    settle(model)
    x, module, adapter = batch(model), library(model), model.adapters[method]
    for s, stage in enumerate(module.audio_model.audio_encoder.layers):
        for i, block in enumerate(stage.blocks):
            inner = block.attention.self
            c = inner.attention_head_size

            def heads(y: Tensor, c: int = c) -> Tensor:
                return y.unflatten(-1, (-1, c)).transpose(1, 2)

            if method == "vpt":
                tokens = block.layernorm_before(adapter.module_at(f"stages.{s}.blocks.{i}.tokens")(1))
                keys, values = heads(inner.key(tokens)), heads(inner.value(tokens))
            else:
                keys, values = adapter.module_at(f"stages.{s}.blocks.{i}.attn.product")(1)[:2]

            def forward(
                hidden: Tensor,
                mask: Any = None,
                weights: Any = False,
                *,
                a: Any = inner,
                k: Any = keys,
                v: Any = values,
            ) -> Any:
                q = a.query(hidden).unflatten(-1, (-1, a.attention_head_size)).transpose(1, 2)
                own, value = (
                    p(hidden).unflatten(-1, (-1, a.attention_head_size)).transpose(1, 2) for p in (a.key, a.value)
                )
                places = a.relative_position_bias_table[a.relative_position_index.view(-1)]
                bias = places.view(16, 16, -1).permute(2, 0, 1)[None].repeat(len(hidden), 1, 1, 1)
                if mask is not None:
                    bias = bias + mask.repeat(len(hidden) // len(mask), 1, 1)[:, None]
                rows = [
                    torch.softmax(
                        torch.cat([q[w] @ k[0].mT, q[w] @ own[w].mT], -1) * a.attention_head_size**-0.5
                        + torch.cat([bias.new_zeros(*bias.shape[1:3], k.shape[2]), bias[w]], -1),
                        -1,
                    )
                    @ torch.cat([v[0], value[w]], 1)
                    for w in range(len(hidden))
                ]
                return (torch.stack(rows).transpose(1, 2).flatten(2),)

            inner.forward = forward
    with torch.no_grad():
        expected = module(x, is_longer=torch.zeros(2, 1, dtype=torch.bool)).audio_embeds
        torch.testing.assert_close(model.features(x), expected, rtol=1e-8, atol=1e-9)


def test_an_adapter_for_each_sample_and_memory() -> None:
    model = make(zoo.adapter("lora", rank=2, targets="all-linear"))
    model.add_adapter("prefix")
    settle(model)
    x, expected = batch(model), []
    for i, name in enumerate(("prefix", "lora")):
        model.set_active(name)
        expected.append(model(x[i : i + 1]))
    torch.testing.assert_close(model(x, adapters=["prefix", "lora"]), torch.cat(expected), rtol=1e-9, atol=1e-9)
    model.set_active("lora")
    found = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.zero_grad()
        model.train()(x).square().sum().backward()
        found[memory] = [p.grad.clone() for p in model.adapters["lora"].parameters()]  # type: ignore[union-attr]
    for memory in ("low", "min"):
        for one, other in zip(found[memory], found["default"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_refusals() -> None:
    with pytest.raises(AttachError, match="hand on maps"):
        make(zoo.adapter("vpt", deep=False))
    with pytest.raises(DataError, match=r"expected \(B, 1, 64, 16\)"):
        make()(torch.randn(2, 1, 30, 16).double())
    with pytest.raises(zoo.ZooError, match="not a plain sequence"):
        make("meft")


def test_checkpoints_and_counts(tmp_path: Path) -> None:
    """A whole CLAP: its text tower is left out."""
    from safetensors.torch import load_file, save_file

    tiny = family("clap").tiny
    assert tiny is not None
    text = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    config = transformers.ClapConfig(
        audio_config=tiny[1], text_config={**text, "projection_dim": 20}, projection_dim=20
    )
    whole = transformers.ClapModel(config).eval()
    whole.save_pretrained(tmp_path)
    model = zoo.load(f"transformers:{tmp_path}", "lora", num_classes=3).eval()
    x = batch(model).float()
    body = whole.audio_model(x, is_longer=torch.zeros(2, 1, dtype=torch.bool)).pooler_output
    torch.testing.assert_close(model.features(x), whole.audio_projection(body), rtol=1e-5, atol=1e-5)
    model.save_adapter(tmp_path / "adapter")
    again = zoo.load(adapter=tmp_path / "adapter", trust_backbone=True).eval()
    assert torch.equal(again(x), model(x))
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "audio_model.more": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"has over 1: audio_model.more"):
        zoo.load(f"transformers:{tmp_path}", num_classes=0)
    counts = [zoo.load(n, num_classes=0, device="meta").num_parameters() for n in ("clap-htsat", "clap-htsat-fused")]
    assert counts == [28_190_872, 28_205_512]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("seconds", [3, 10])
def test_features_are_those_of_the_library(fused: bool, seconds: int) -> None:
    from audio.data.clap_features import ClapTransform
    from audio.data.sound import Sound

    count = 48_000 * seconds
    wave = torch.sin(torch.arange(count) * 0.03) * 0.3 + 0.05 * torch.randn(count)
    extractor = transformers.ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc")
    expected = extractor(wave.numpy(), sampling_rate=48_000, return_tensors="pt")["input_features"][0]
    prepare = ClapTransform({"num_mel_bins": 64, "frames": 1001, "fused": fused})
    torch.testing.assert_close(prepare(Sound(wave, 48_000)), expected.float(), rtol=1e-3, atol=2e-3)
