"""Mixtures of adapters: the equations written out beside the attention, start, count, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import AttachError, ConfigError

pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "max_length": 40}
BODY = "audio_spectrogram_transformer"


def ast() -> zoo.Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return zoo.load("ast-micro", pretrained=False, num_classes=0, num_mel_bins=32, **SMALL).double().eval()


def spectrograms() -> Tensor:
    return torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(1)).double()


def mixture(part: Any, x: Tensor, form: str) -> Tensor:
    """Token by token and slot by slot; x (N, d)."""

    def expert(i: int, z: Tensor) -> Tensor:
        hidden = F.gelu(part.down[i] @ z + part.down_bias[i])
        return part.up[i] @ hidden + part.up_bias[i]

    rows = []
    if form == "dense":
        for token in x:
            gates = torch.softmax(part.router.weight @ token + part.router.bias, 0)
            rows.append(torch.stack([g * expert(i, token) for i, g in enumerate(gates)]).sum(0))
        return torch.stack(rows)
    count, slots = part.phi.shape[1:]
    places = [(i, s) for i in range(count) for s in range(slots)]
    scores = torch.stack([x @ part.phi[:, i, s] for i, s in places], 1)  # (N, n p)
    made = [expert(i, scores[:, k].softmax(0) @ x) for k, (i, _) in enumerate(places)]
    return torch.stack([sum(w * y for w, y in zip(row.softmax(0), made, strict=True)) for row in scores])


@pytest.mark.parametrize("form", ["soft", "dense"])
def test_against_the_equations(form: str) -> None:
    """Beside the attention it is added once, behind the attention."""
    model, x = ast(), spectrograms()
    before = model(x)
    settings: dict[str, Any] = {"slots": 2} if form == "soft" else {}
    model.add_adapter(zoo.adapter("moa", form=form, experts=3, rank=2, **settings))
    model.double()
    assert torch.equal(model(x), before)  # the pretrained function, to the bit
    d, n, r = 48, 3, 2
    routed = d * n * 2 if form == "soft" else n * (d + 1)
    assert model.num_parameters(trainable=True) == 2 * (n * (2 * d * r + r + d) + routed)
    adapter: Any = model.adapters["moa"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    found = model(x)
    parameters = dict(adapter.named_parameters())
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    ours = torch.autograd.grad((found * weights).sum(), list(parameters.values()))
    body: Any = model.backbone.get_submodule(BODY)
    with model.disable():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        u = body.embeddings(x)
        for i, layer in enumerate(body.layers):
            inner = layer.layernorm_before(u)
            beside = torch.stack([mixture(adapter.module_at(f"blocks.{i}.attn"), row, form) for row in inner])
            u = u + layer.attention(inner, None)[0] + beside
            u = u + layer.mlp(layer.layernorm_after(u))
        expected = body.layernorm(u)[:, :2].mean(1)
        theirs = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for name, a, b in zip(parameters, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_two_adapters_of_one_gate_are_their_mean() -> None:
    """With equal gates a dense mixture is the mean of its adapters, and with one adapter the adapter itself."""
    from audio.adapters.moa import Dense

    x = spectrograms()[..., :8]
    both, single = Dense(8, 3, 2).double(), Dense(8, 3, 1).double()
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.normal_()
        both.router.weight.zero_()
        both.router.bias.zero_()
        found = torch.zeros_like(x)
        for i in range(2):
            for name in ("down", "down_bias", "up", "up_bias"):
                getattr(single, name).copy_(getattr(both, name)[i : i + 1])
            found += single(x) / 2
    torch.testing.assert_close(both(x), found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 0}, "experts is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"form": "dense", "slots": 2}, "soft form"),
        ({"form": "sparse"}, "soft"),
        ({"rank": 0}, "1 or more"),
        ({"reduction": 0.0}, "above 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        zoo.adapter("moa", **settings)


def test_tokens_that_must_not_see_all_others() -> None:
    pytest.importorskip("open_clip")
    model = zoo.load("clip-micro", pretrained=False)
    with pytest.raises(AttachError, match=r"averages all tokens.*causal.*form='dense'"):
        model.add_adapter(zoo.adapter("moa", targets="text.**.attn"))
    assert not model.adapters
    model.add_adapter(zoo.adapter("moa", targets="text.**.attn", form="dense"))
