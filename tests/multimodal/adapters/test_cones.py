"""ConES: the start is what the text encoder says, nothing else is trained, and the properties of cosines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo

pytest.importorskip("open_clip")
pytest.importorskip("diffusers")
from clip_models import IMAGE, TEXT, make

from multimodal.tasks.zero_shot import put_zero_shot_classifier
from zoo.errors import AttachError, ConfigError, MergeError
from zoo.table import tiny_model

NAMES = ["cat", "dog", "pick-up truck"]
PAIR = ("a photo of a {}.", "the {}")
CLIP: dict[str, Any] = {
    "pretrained": False,
    "embed_dim": 24,
    "vision_cfg": IMAGE,
    "text_cfg": {**TEXT, "context_length": 40},
}


def build(*others: Any, names: list[str] | None = NAMES, moved: bool = True, **settings: Any) -> zoo.Model:
    """A small CLIP in float64 that searches the concepts of three classes; `moved` away from their texts."""
    classes: dict[str, Any] = {"num_classes": 3} if names is None else {"classes": names}
    own = zoo.adapter("cones", **settings)
    model = make("plain", own, *others, text_cfg={**TEXT, "context_length": 40}, **classes)
    shift: Any = model.adapters["cones"].shift
    with torch.no_grad():
        shift.zero_()
        model(images())  # reads the texts
        if moved:
            shift.normal_(std=0.1, generator=torch.Generator().manual_seed(7))
    return model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.double)


# -- classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("templates", [PAIR[:1], PAIR])
def test_starts_as_the_zero_shot_classifier_to_the_bit(templates: tuple[str, ...]) -> None:
    model = zoo.load("clip-micro", zoo.adapter("cones", templates=templates), classes=NAMES, seed=0, **CLIP).eval()
    plain = zoo.load("clip-micro", num_classes=0, seed=0, **CLIP).eval()
    put_zero_shot_classifier(plain, NAMES, templates)
    x = images().float()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert set(model.parameters_to_train()) == {"cones/shift"} and model.head_name == "cones"
    assert model.num_parameters(trainable=True) == 3 * 24


def test_straightforward_form_and_gradients() -> None:
    model = build(templates=PAIR, each=True).train()
    x = images()
    logits = model(x)
    shift: Any = model.adapters["cones"].shift
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6), dtype=torch.double)
    (found,) = torch.autograd.grad((logits * weights).sum(), [shift])
    own: Any = model.backbone
    with torch.no_grad():
        texts = torch.stack([model.features(texts=[t.format(n) for n in NAMES]) for t in PAIR], dim=1)
        f = own.encode_image(x)
    concepts = F.normalize(texts, dim=-1) + shift
    scores = own.logit_scale.exp() * torch.einsum("bd,knd->bkn", F.normalize(f, dim=-1), F.normalize(concepts, dim=-1))
    expected = scores.exp().mean(dim=-1).log()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), [shift])
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-10)


def test_lengths_do_not_matter() -> None:
    """<grad_c, E_c> = 0: only the direction of a concept is searched."""
    model = build().train()
    shift: Any = model.adapters["cones"].shift
    logits = model(images())
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    text: Any = model.head.text
    concepts = text + shift.detach()
    assert shift.grad.norm() > 1e-3
    assert ((shift.grad * concepts).sum(-1).abs() < 1e-9).all()
    with torch.no_grad():
        shift.copy_(3.5 * concepts - text)
    torch.testing.assert_close(model(images()), logits.detach(), rtol=1e-9, atol=1e-9)


def test_equal_vectors_are_one() -> None:
    one, two = build(moved=False), build(moved=False, templates=(PAIR[0], PAIR[0]), each=True)
    with torch.no_grad():
        moved = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(3), dtype=torch.double)
        for model in (one, two):
            model.adapters["cones"].shift.add_(moved)  # type: ignore[operator,union-attr]
    assert two.num_parameters(trainable=True) == 2 * one.num_parameters(trainable=True)
    torch.testing.assert_close(one(images()), two(images()), rtol=1e-9, atol=1e-9)


def test_the_text_tower_takes_no_part() -> None:
    """No gradient reaches it, it runs once, and then it can be deleted."""
    model = build().train()
    runs: list[int] = []
    own: Any = model.backbone
    model.head.prepare(PAIR[:1])  # type: ignore[operator]
    with torch.no_grad():
        model.adapters["cones"].shift.zero_()  # type: ignore[operator,union-attr]
    own.token_embedding.register_forward_hook(lambda m, a, y: runs.append(len(y)))
    x = images()
    expected = model(x)
    expected.sum().backward()
    for _ in range(2):
        model.eval()
        model.train()
        assert torch.equal(model(x), expected)
    assert runs == [3] and all(p.grad is None for p in own.parameters())
    del own.transformer, own.token_embedding, own.ln_final
    assert torch.equal(model(x), expected)


def minimum(parameter: Tensor, loss: Callable[[], Tensor]) -> float:
    """The least loss that is found from where the parameter is."""
    optimizer = torch.optim.LBFGS([parameter], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return float(loss().detach())


def test_its_optimum_is_that_of_the_cosine_classifier_from_anywhere() -> None:
    """Texts, random directions and a plain cosine classifier end at the same loss; targets are soft, so it is at no infinity."""
    x, y = images(6), 0.7 * torch.eye(3, dtype=torch.double)[[0, 1, 2, 0, 1, 2]] + 0.1
    ends = []
    for init in ("text", "random"):
        model = build(moved=False, init=init).train()
        with torch.no_grad():
            model.backbone.logit_scale.zero_()  # type: ignore[union-attr,operator]
        shift: Any = model.adapters["cones"].shift
        ends.append(minimum(shift, functools.partial(lambda m: F.cross_entropy(m(x), y), model)))
    with torch.no_grad():
        features = F.normalize(model.features(x), dim=-1)
    free = nn.Parameter(torch.randn(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.double))
    ends.append(minimum(free, lambda: F.cross_entropy(features @ F.normalize(free, dim=-1).T, y)))
    assert max(ends) - min(ends) < 1e-5, ends


def test_names_that_come_with_the_data_and_a_fit_that_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 16, 16)
    data = zoo.open_dataset(TensorDataset(x, torch.arange(12) % 3), classes=NAMES)
    model = zoo.load("clip-micro", "cones", num_classes=3, seed=0, **CLIP)
    with pytest.raises(ConfigError, match="names of its 3 classes"):
        model(x)
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    before = zoo.evaluate(model, data, progress=False)["loss"]
    report = zoo.fit(model, data, epochs=4, batch_size=6, lr=0.05, augment="none", ema=0.5, progress=False)
    after = zoo.evaluate(model, data, progress=False)["loss"]
    assert after < before and model.classes == NAMES and report.history
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())


def test_then_with_lora() -> None:
    """The second stage keeps the concepts and trains something else."""
    model = build().train()
    x = images()
    model.add_adapter(zoo.adapter("lora", rank=2)).double()
    model.set_active("cones", "lora", train="lora")
    assert model.parameters_to_train() and all(k.startswith("lora/") for k in model.parameters_to_train())
    assert model.head_name == "cones" and model.probe(x) == []
    model.set_active("cones", "lora")
    assert "cones/shift" in model.parameters_to_train() and model.probe(x) == []
    for setting in ("low", "min"):
        model.memory = setting
        model(x).square().sum().backward()
    with pytest.raises(
        MergeError, match="'cones' cannot be merged here: the library's module has no place for classes"
    ):
        model.merge()


def test_is_saved_and_names_are_kept(tmp_path: Path) -> None:
    model = zoo.load("clip-micro", "cones", classes=NAMES, seed=0, **CLIP).eval()
    with torch.no_grad():
        model(images().float())
        model.adapters["cones"].shift.normal_()  # type: ignore[operator,union-attr]
    expected = model(images().float())
    model.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0).eval()
    own: Any = again.backbone
    del own.transformer, own.token_embedding  # what was read is saved
    assert again.classes == NAMES and torch.equal(again(images().float()), expected)
    with pytest.raises(ConfigError, match="keeps the texts of its own classes"):
        again.head.name_classes(["a", "b", "c"])  # type: ignore[operator]
    other = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0, classes=["a", "b", "c"])
    with pytest.raises(ConfigError, match="moved on from the texts of the classes"):
        other(images().float())
    with pytest.raises(ConfigError, match="those of 3 classes, and the head has 4"):
        zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0, classes=["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="cannot grow"):
        again.grow_head(["ship"])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_per_sample_adapters(train: bool) -> None:
    model = build()
    model.add_adapter(zoo.adapter("cones", init="random"), "other", activate=False)
    model.double().train(train)
    assert model.adapters["other"].plan == {"classes": 3}  # type: ignore[union-attr]
    x, rows, alone = images(), ["other", "cones", "other", "cones"], []
    for i, name in enumerate(rows):
        model.set_active(name)
        alone.append(model(x)[i : i + 1])
    torch.testing.assert_close(model(x, adapters=rows), torch.cat(alone))


def test_half_precision_and_compiled() -> None:
    model = zoo.load("clip-micro", "cones", classes=NAMES, seed=0, **CLIP).eval()
    x = images().float()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    half = zoo.load("clip-micro", "cones", classes=NAMES, seed=0, **CLIP).eval().to(torch.bfloat16)
    assert half.adapters["cones"].shift.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.05, atol=0.3)


def test_counts() -> None:
    model = zoo.load("clip-vit-b16", "cones", num_classes=100, device="meta")
    assert model.num_parameters(trainable=True) == 51_200
    one = zoo.load("dit-xl2", zoo.adapter("cones", labels=(207,)), device="meta")
    assert one.num_parameters(trainable=True) == 1_152


def test_what_is_refused() -> None:
    with pytest.raises(AttachError, match="no such condition, and the model no classes"):
        zoo.load("clip-micro", "cones", num_classes=0, **CLIP)
    with pytest.raises(AttachError, match="no such condition, and no text tower"):
        zoo.load("vit-micro", "cones", num_classes=3, pretrained=False)
    with pytest.raises(AttachError, match="swin-t has no such condition"):
        zoo.load("swin-t", "cones", device="meta")
    with pytest.raises(ConfigError, match="'a photo' has no place"):
        zoo.adapter("cones", templates="a photo")
    with pytest.raises(ConfigError, match="twice"):
        zoo.adapter("cones", labels=(1, 1))
    dit, _ = tiny_model("dit")
    with pytest.raises(ConfigError, match=r"label \[10\] is outside the 10 classes"):
        dit.add_adapter(zoo.adapter("cones", labels=(10,)))
    assert not dit.adapters and not any(m._forward_hooks for m in dit.backbone.modules())


# -- rows of a class embedding ------------------------------------------------------------------------------------------


# -- the text of a diffusion transformer --------------------------------------------------------------------------------
