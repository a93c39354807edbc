"""CLIP-Adapter: a form written down straightforwardly, and what every method promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo

pytest.importorskip("open_clip")
from few_shot_clip import NAMES, Pictures, build, images, routed, small

from zoo.errors import AttachError, ConfigError, MergeError


def test_straightforward_form() -> None:
    from multimodal.tasks.zero_shot import put_zero_shot_classifier

    model = build("clip-adapter", ratio=0.3)
    x, mlp = images(model), model.adapters["clip-adapter"].module_at("mlp")  # type: ignore[operator, union-attr]
    adapted = model(x)
    with model.disable():
        put_zero_shot_classifier(model, NAMES)
        f, zero = model.features(x), model(x)
        moved = 0.3 * (f @ mlp.down.weight.T).relu() @ mlp.up.weight.T
    moved = 0.3 * ((f @ mlp.down.weight.T).relu() @ mlp.up.weight.T).relu() + 0.7 * f
    expected = F.normalize(moved, dim=-1) @ model.heads["default"].weight.T + model.heads["default"].bias  # type: ignore[operator, union-attr]
    torch.testing.assert_close(adapted, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(adapted, zero)
    with torch.no_grad():
        mlp.up.weight.zero_()  # f' is then a multiple of f, which has its direction
        torch.testing.assert_close(model(x), zero, rtol=1e-6, atol=1e-6)


def test_trains_and_is_removed() -> None:
    model = small("clip-adapter")
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    assert set(model.parameters_to_train()) == {"clip-adapter/mlp.down.weight", "clip-adapter/mlp.up.weight"}
    assert model.num_parameters(trainable=True) == 2 * 24 * 6
    assert model.train().probe(images(model).float()) == []
    report = zoo.fit(model, Pictures(), epochs=3, batch_size=4, lr=1e-2, progress=False, device="cpu")
    assert report.history[-1]["loss"] < report.history[0]["loss"] and model.classes == NAMES
    with pytest.raises(MergeError, match="'clip-adapter' cannot be merged"):
        model.merge()
    model.remove_adapter("clip-adapter")
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_nothing_is_kept_of_the_towers() -> None:
    """Backward ends at the embedding: what is kept is of the size of embeddings, not of tokens."""
    model = small("clip-adapter").train()
    few, many = (model.saved_bytes(torch.randn(n, 3, 16, 16)) for n in (8, 16))
    assert many - few < 8 * 8 * 24 * 4 * 2  # eight further embeddings, a few tensors of their size


def test_saves_and_reloads(tmp_path: Path) -> None:
    model = small("clip-adapter").eval()
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    x = images(model).float()
    assert again.classes == NAMES and torch.equal(again(x), model(x))
    torch.manual_seed(0)
    other = zoo.load(adapter=tmp_path / "out", pretrained=False, classes=["a", "dog"]).eval()
    torch.testing.assert_close(other(x)[:, 1], model(x)[:, 1])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_per_sample_adapters(train: bool) -> None:
    routed("clip-adapter", train)


@pytest.mark.parametrize("beside", ["lora", "vpt", "coop"])
def test_memory_settings_and_other_methods_beside_it(beside: str) -> None:
    model = build("clip-adapter", beside=beside).train()
    assert model.probe(images(model)) == []
    found: list[dict[str, Any]] = []
    for setting in ("default", "low", "min"):
        model.memory = setting
        model.zero_grad()
        model(images(model)).square().sum().backward()
        found.append({k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None})
    assert set(found[0]) == set(model.parameters_to_train())
    for other in found[1:]:
        for key, value in other.items():
            torch.testing.assert_close(value, found[0][key], rtol=1e-9, atol=1e-12)


def test_half_precision() -> None:
    model = small("clip-adapter").to(torch.bfloat16)
    assert {p.dtype for p in model.parameters_to_train().values()} == {torch.float32}
    assert model(images(model).bfloat16()).isfinite().all()


def test_what_is_refused() -> None:
    with pytest.raises(AttachError, match="vit-micro has no text tower"):
        zoo.load("vit-micro", "clip-adapter", pretrained=False, num_classes=3)
    with pytest.raises(AttachError, match="class names"):
        small("clip-adapter", names=None)
    for wrong in ({"reduction": 0}, {"ratio": 0.0}, {"ratio": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            zoo.adapter("clip-adapter", **wrong)
    with pytest.raises(ConfigError, match="reduction is 25"):
        small("clip-adapter", reduction=25)
