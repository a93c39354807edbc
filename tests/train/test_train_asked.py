"""Keys and values kept for queries: the numbers of a fit that runs the backbone in every step; bytes; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.errors import ConfigError
from zoo.train.frozen import Frozen

TOKENS = 5  # 2 x 2 patches and the class token


def numbers(report: zoo.train.Report) -> list[float]:
    return [record[name] for record in report.history for name in ("loss", "val_loss") if name in record]


def passes(model: zoo.Model, at: str = "blocks.0") -> list[int]:
    """Counts the items that go through the backbone from now on."""
    seen: list[int] = []
    model.backbone.get_submodule(at).register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"optimizer": "sgd", "lr": 0.1}),  # with dropout: it draws as without
        ({"num_tokens": 6, "combine": "weighted", "lasso": 0.01}, {"accumulate": 2, "label_smoothing": 0.1, "lr": 0.1}),
        ({"targets": "blocks.1.**"}, {"ema": 0.9, "sampler": "balanced", "lr": 0.1}),
        ({"num_tokens": 2, "dropout": 0.0}, {"precision": "bf16"}),
    ],
    ids=["plain", "many", "one-block", "bf16"],
)
def test_the_numbers_are_those_of_a_fit_without(settings: dict[str, Any], options: dict[str, Any]) -> None:
    train, val = easy_data(38, noise=2), easy_data(13, seed=1, noise=2)
    options = {"optimizer": "sgd", **options}
    plain, kept = (tiny_model(zoo.adapter("vqt", **settings)) for _ in range(2))
    start = weights(plain)
    expected = fit(plain, train, val, **options)
    seen = passes(kept)
    report = fit(kept, train, val, cache_features=True, **options)
    # each item once; one to learn the sizes; the example for what is kept for backward
    assert sum(seen) <= 38 + 13 + 1 + 16
    near = 2e-3 if "precision" in options else 1e-6
    assert numbers(report) == pytest.approx(numbers(expected), abs=near)
    assert difference(weights(kept), weights(plain)) < near
    moved = {name: float((p - start[name]).abs().max()) for name, p in weights(kept).items()}
    assert min(moved.values()) > 1e-5  # queries are trained, not the head alone
    width, blocks = (2, 2 - ("targets" in settings)) if "precision" in options else (4, 2 - ("targets" in settings))
    assert report.data["features"]["bytes"] == 51 * (24 * 4 + blocks * 2 * TOKENS * 24 * width)
    assert "features" not in vars(kept.family)
    x = easy_data(4, seed=5).tensors[0]
    assert torch.allclose(kept(x), plain(x), atol=1e-3)


@pytest.mark.parametrize(
    "name", ["vit-micro", "swin-micro", "timm:eva02_tiny_patch14_224", "timm:swinv2_tiny_window8_256", "ast-micro"]
)
def test_each_kind_of_stream_gives_the_same_gradients(name: str) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "timm:eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
        "timm:swinv2_tiny_window8_256": {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)},
    }
    torch.manual_seed(0)
    model = zoo.load(name, zoo.adapter("vqt", dropout=0.0), num_classes=3, pretrained=False, **shapes.get(name, {}))
    inputs = model.family.example_batch(3)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    found = []
    frozen = Frozen(model)
    tensors = frozen.take(inputs[0] if len(inputs) == 1 else inputs)
    rows = torch.arange(3)
    for places in (False, True):
        for p in model.parameters_to_train().values():
            p.grad = None
        if places:
            with frozen.instead(lambda at: [t[at] for t in tensors]):
                loss = model(rows).square().sum()
        else:
            loss = model(*inputs).square().sum()
        loss.backward()
        found.append({n: p.grad for n, p in model.parameters_to_train().items()})
    assert len(frozen.order) == len(model.points.select(kind="attention"))
    for key, gradient in found[0].items():
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_queries_that_stay_are_kept_too() -> None:
    plain, kept = (tiny_model(zoo.adapter("vqt", lasso=0.01)) for _ in range(2))
    for model in (plain, kept):
        model.set_active("vqt", train=())
    reports = [fit(m, easy_data(24), cache_features=c, optimizer="sgd") for m, c in ((plain, False), (kept, True))]
    assert set(weights(kept)) == {"head/weight", "head/bias"}
    assert numbers(reports[1]) == pytest.approx(numbers(reports[0]), abs=1e-6)
    assert difference(weights(kept), weights(plain)) < 1e-6


@pytest.mark.parametrize(
    ("adapter", "options", "words"),
    [
        (["vqt", "lora"], {}, "'lora/.*' is trained in front of the head"),
        ("vqt", {"mixup": 0.2}, "mixup and cutmix"),
        ("vqt", {"augment": "crop"}, "augment='crop' makes an item another one"),
        (
            "vqt",
            {"cache_features": 1000},
            "16 images with 2016 bytes of features each take 32256 bytes; the bound is 1000",
        ),
    ],
)
def test_what_moves_is_refused_with_the_reason(adapter: Any, options: dict[str, Any], words: str) -> None:
    model = tiny_model(adapter)
    before, seen = weights(model), passes(model)
    with pytest.raises(ConfigError, match=words):
        fit(model, easy_data(16), **{"cache_features": True, **options})
    assert difference(weights(model), before) == 0 and sum(seen) <= 1  # said before anything is computed


def test_an_adapter_under_the_queries_that_is_not_trained_is_refused() -> None:
    model = tiny_model(["lora", "vqt"])
    model.set_active("lora", "vqt", train=("vqt",))
    with pytest.raises(ConfigError, match="'lora' stands in front of the head"):
        fit(model, easy_data(16), cache_features=True)
