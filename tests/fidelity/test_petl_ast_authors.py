"""The methods of the AST study against numbers recorded from the authors' code, and the counts that their code trains.

`petl_ast.json` holds logits and gradients of umbertocappellazzo/PETL_AST (`src/AST_adapters.py`, `AST_LoRA.py`,
`AST_prompt_tuning.py`, `AST.py`, `MoA.py`, with transformers 4.28) on an AST of 2 blocks, width 48, 40 frames of 32 bands, in
float64, bottlenecks of 48 / 16, kernels of 5 tokens, a linear head on the mean of all tokens. A gradient is its first three
values, its norm and its sum. Names are ours.

Faults of theirs that are not repeated:
- the conformer computes a layer norm and drops what it gives (`conformer-*` is that function, our `norm=False`);
  `conformer-normed` is their module run on what its own layer norm gives, which is our default;
- both matrices of the bottleneck start at zero, from where they never move (`test_their_start_is_dead`);
- prompts take the place of the second class token. Here the recorded numbers are of their code on tokens with an empty one in
  that place, so that DIST stays: attention does not ask in which order tokens stand;
- "sequential before" puts F(A(x)) + A(x): see `tests/adapters/test_adapter.py` for ours, written out;
- the mixture beside the attention alone is added twice (`moa-*` stand beside the MLP, or beside both, where it is not;
  `tests/audio/adapters/test_moa.py` has ours beside the attention, written out);
- biases of linear layers and norms leave out that of the patch embedding (768 parameters);
- the "best" weights are the live ones, and on one data set the test part chooses them: the study keeps the last epoch.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waves import agree, fill, learn, shift, summary, wave

import zoo

pytest.importorskip("transformers")

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "petl_ast.json").read_text())
SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "max_length": 40}
SMALL |= {"num_mel_bins": 32, "num_attention_heads": 3}


@cache
def backbone() -> zoo.Model:
    model = zoo.load("ast-micro", pretrained=False, num_classes=0, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    return model


def adapted(*adapters: Any) -> zoo.Model:
    """The small AST with adapters and a head on the mean of all tokens, filled as the recorded one."""
    model = backbone()
    for name in list(model.adapters):
        model.remove_adapter(name)
    for adapter in adapters:
        model.add_adapter(adapter)
    model.set_active(*model.adapters)
    model.reset_head(4, kind="mean")
    model.double().eval()
    with torch.no_grad():
        model.head.linear.weight.copy_(wave((4, 48), 2, 0.5))  # type: ignore[union-attr,operator,arg-type]
        model.head.linear.bias.zero_()  # type: ignore[union-attr,operator]
    return model


def spectrograms() -> Tensor:
    return wave((2, 40, 32), 5, 1.5)


def compare(case: str, model: zoo.Model, method: str) -> None:
    """Logits, gradients of the method, and of the norms that are trained besides."""
    recorded = AUTHORS[case]
    logits = model(spectrograms())
    expected = torch.tensor(recorded["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    learn(logits)
    agree(dict(model.adapters[method].named_parameters()), recorded["gradients"])
    if "norm" in model.adapters:
        own = dict(model.adapters["norm"].named_parameters())
        agree({k: p for k, p in own.items() if k.startswith("blocks.")}, recorded["norms"])


def with_norms(adapter: Any, houlsby: bool) -> zoo.Model:
    """As they train it: with the norm in front of each adapted sublayer, and the last one."""
    targets = ("blocks.*.norm1", "blocks.*.norm2", "norm*") if houlsby else ("blocks.*.norm2", "norm*")
    return adapted(adapter, zoo.adapter("norm", targets=targets))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("form", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
def test_bottlenecks(kind: str, form: str, residual: bool) -> None:
    settings: dict[str, Any] = {"form": kind if form == "sequential" else "parallel", "reduction": 16.0}
    settings |= {"activation": "gelu", "scale": 1.0, "residual": residual}
    settings |= {"targets": ("attn", "mlp") if kind == "houlsby" else "mlp"}
    model = with_norms(zoo.adapter("adapter", **settings), kind == "houlsby")
    shift(dict(model.adapters["adapter"].named_parameters()))
    compare(f"bottleneck-{kind}-{form}-{str(residual).lower()}", model, "adapter")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("kind", "form"), [("pfeiffer", "parallel"), ("houlsby", "sequential")])
def test_conformers_as_they_compute_them(kind: str, form: str, train: bool) -> None:
    """Without the layer norm, whose result they drop. Running statistics too, in front of and behind a step."""
    targets = ("attn", "mlp") if kind == "houlsby" else "mlp"
    settings: dict[str, Any] = {"reduction": 16.0, "kernel": 5, "form": form, "targets": targets, "norm": False}
    model = with_norms(zoo.adapter("conformer", **settings), kind == "houlsby")
    adapter: Any = model.adapters["conformer"]
    shift(dict(adapter.named_parameters()))
    roles = ("mlp", "attn") if kind == "houlsby" else ("mlp",)
    moments = [adapter.module_at(f"blocks.{i}.{role}").moments for i in range(2) for role in roles]
    for j, part in enumerate(moments):
        part.mean.copy_(wave((3,), j, 0.3))
        part.variance.copy_(1 + wave((3,), j + 1, 0.3))
    case = f"conformer-{kind}-{form}-{'train' if train else 'eval'}"
    compare(case, model.train(train), "conformer")
    if train:
        for part, expected in zip(moments, AUTHORS[case]["running"].values(), strict=True):
            found = torch.cat([part.mean, part.variance])
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_the_conformer_on_its_own_layer_norm() -> None:
    model = with_norms(zoo.adapter("conformer", reduction=16.0, kernel=5), False)
    adapter: Any = model.adapters["conformer"]
    shift(dict(adapter.named_parameters()))
    for j in range(2):
        part = adapter.module_at(f"blocks.{j}.mlp").moments
        part.mean.copy_(wave((3,), j, 0.3))
        part.variance.copy_(1 + wave((3,), j + 1, 0.3))
    compare("conformer-normed", model, "conformer")


def test_lora() -> None:
    """Their reduction rate 16 is a rank of 48 / 16, and their scale alpha / 16."""
    model = adapted(zoo.adapter("lora", rank=3, alpha=3 * 8 / 16))
    shift(dict(model.adapters["lora"].named_parameters()))
    compare("lora", model, "lora")


def test_prefix() -> None:
    """Their 4 tokens are 2 keys and 2 values."""
    model = adapted(zoo.adapter("prefix", num_tokens=2))
    shift(dict(model.adapters["prefix"].named_parameters()))
    compare("prefix", model, "prefix")


@pytest.mark.parametrize("targets", ["mlp", ("attn", "mlp")], ids=["pfeiffer", "houlsby"])
@pytest.mark.parametrize("form", ["soft", "dense"])
def test_mixtures(form: str, targets: Any) -> None:
    settings: dict[str, Any] = {"slots": 3} if form == "soft" else {}
    model = adapted(zoo.adapter("moa", form=form, experts=2, reduction=16.0, targets=targets, **settings))
    shift(dict(model.adapters["moa"].named_parameters()))
    compare(f"moa-{form}-{'pfeiffer' if targets == 'mlp' else 'houlsby'}", model, "moa")


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_prompts(deep: bool) -> None:
    recorded = AUTHORS["prompts-deep" if deep else "prompts-shallow"]
    model = adapted(zoo.adapter("vpt", num_tokens=3, deep=deep))
    prompts = [p for _, p in sorted(model.adapters["vpt"].named_parameters())]
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            prompt.copy_(wave((3, 48), i + 1, 0.4))
    tokens = model.outputs(spectrograms(), want=("tokens",))["tokens"]
    tokens = torch.cat([tokens[:, :2], tokens[:, -6:]], dim=1)  # shallow prompts stay between class tokens and patches
    expected = torch.tensor(recorded["tokens"], dtype=torch.float64)
    torch.testing.assert_close(tokens[:, ::3, ::11], expected, rtol=1e-8, atol=1e-8)
    (tokens * wave(tuple(tokens.shape), 3, 1.0)).sum().backward()
    for prompt, numbers in zip(prompts, recorded["gradients"], strict=True):
        torch.testing.assert_close(torch.tensor(summary(prompt.grad)), torch.tensor(numbers), rtol=1e-5, atol=1e-7)


def test_bitfit() -> None:
    """All that they train, and besides the bias of the patch embedding, a convolution that they pass over."""
    model = adapted(zoo.adapter("bitfit"))
    recorded = AUTHORS["bitfit"]
    logits = model(spectrograms())
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-8, atol=1e-8)
    learn(logits)
    ours = {}
    for name, parameter in model.adapters["bitfit"].named_parameters():
        for new, old in NAMES.items():
            name = name.replace(new, old)
        ours[name] = parameter
    patch = ours.pop("patch_embed.bias")
    assert patch.grad is not None and patch.grad.any()
    agree(ours, recorded["gradients"])


NAMES = {  # ours -> the library's of that time
    "blocks.": "encoder.layer.",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "norm.": "layernorm.",
}


def test_their_start_is_dead() -> None:
    """Both matrices at zero: after ten steps they are at zero still; ours have moved after two."""
    from zoo.adapters.parts.bottleneck import Bottleneck

    x = wave((2, 7, 48), 1, 1.0)
    for ours in (False, True):
        module = Bottleneck(48, 3, sequential=False, activation="gelu").double()
        if not ours:
            torch.nn.init.zeros_(module.adapter_down.weight)
        start = [w.detach().clone() for w in (module.adapter_down.weight, module.adapter_up.weight)]
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(2 if ours else 10):
            optimizer.zero_grad()
            (module(x) - wave((2, 7, 48), 2, 1.0)).square().sum().backward()
            optimizer.step()
        moved = [not torch.equal(w, s) for w, s in zip((module.adapter_down.weight, module.adapter_up.weight), start)]
        assert moved == [ours, ours]


@pytest.mark.parametrize(
    ("case", "method", "settings", "norms"),
    [
        ("conformer-96", "conformer", {}, ("blocks.*.norm2", "norm*")),
        ("bottleneck-64", "adapter", {"form": "parallel", "reduction": 64.0}, ("blocks.*.norm2", "norm*")),
        ("bottleneck-64-houlsby", "adapter", {"form": "houlsby", "reduction": 64.0}, ("**.norm?", "norm*")),
        ("lora-64", "lora", {"rank": 12}, ("norm*",)),
        ("prefix-24", "prefix", {"num_tokens": 12}, ("norm*",)),
        ("prompts-25", "vpt", {"num_tokens": 25}, ("norm*",)),
        ("bitfit", "bitfit", {}, ()),
        ("moa-soft", "moa", {}, ("blocks.*.norm1", "norm*")),
        ("moa-dense", "moa", {"form": "dense"}, ("blocks.*.norm1", "norm*")),
    ],
)
def test_counts_of_their_code(case: str, method: str, settings: dict[str, Any], norms: tuple[str, ...]) -> None:
    """What requires a gradient in their models at full size, without the classifier."""
    model = zoo.load("ast", zoo.adapter(method, **settings), device="meta", num_classes=0)
    if norms:
        model.add_adapter(zoo.adapter("norm", targets=norms), "norms")
        model.set_active(method, "norms")
    patch = 768 if case == "bitfit" else 0
    assert model.num_parameters(trainable=True) == AUTHORS["counts"][case] + patch
