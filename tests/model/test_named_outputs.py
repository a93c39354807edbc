"""Named outputs of every family, heads that need them, margins that see targets, logits behind the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_parts import easy_data, tiny_model

import zoo
from zoo import registry
from zoo.errors import ConfigError, MismatchError, MissingPackageError
from zoo.heads import HEADS
from zoo.table import tiny_model as member

FAMILIES = [f for f in registry.families() if registry.family(f).tiny]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_what_it_says(family: str) -> None:
    """Pooled features are those of `features`, maps hold the tokens' patches, and what is lacking is refused by name."""
    try:
        model, batch = member(family)
    except MissingPackageError as error:
        pytest.skip(str(error))
    model.eval()
    alone = model.family.pools and family != "vilt"  # which reads an image with its text
    images = batch[:1] if alone else batch
    with pytest.raises(ConfigError, match="no output 'pool'"):
        model.outputs(*images, want=("pool",))
    for name in ("pooled", "tokens", "maps", "text"):
        if name not in model.family.gives or not model.family.pools:
            with pytest.raises(MismatchError, match=f"needs the output '{name}'.*family '{family}'"):
                model.outputs(*images, want=(name,))
    if not model.family.pools:
        return
    want = [n for n in ("pooled", "tokens", "maps") if n in model.family.gives]
    with torch.no_grad():
        found = model.outputs(*images, want=want)
        torch.testing.assert_close(found["pooled"], model.features(*images))
        assert set(found) == set(want)
    if "tokens" in found and "maps" in found:
        patches = found["maps"][-1].flatten(2).transpose(1, 2)
        assert found["tokens"].shape[1] == patches.shape[1] + model.family.num_prefix
        assert torch.equal(found["tokens"][:, model.family.num_prefix :], patches)
    if "maps" in found:
        assert all(m.dim() == 4 and len(m) == 2 for m in found["maps"])


def test_tokens_of_a_vit_are_timms() -> None:
    model = tiny_model().eval()
    images = easy_data(4).tensors[0]
    plain = model.merge()
    assert torch.equal(model.outputs(images, want=["tokens"])["tokens"], plain.forward_features(images))  # type: ignore[operator]
    maps = plain.forward_intermediates(images, indices=1, intermediates_only=True, norm=True)  # type: ignore[operator]
    torch.testing.assert_close(model.outputs(images, want=["maps"])["maps"][0], maps[0])


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(HEADS)
    HEADS.update({"grid": Grid, "margin": Margin})
    yield
    HEADS.clear()
    HEADS.update(before)


class Grid(zoo.Head):
    """A linear map at every place, and the largest of each class."""

    needs = ("maps",)

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        self.mix = nn.Conv2d(in_features, out_features, 1, **place)

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        return self.mix(outputs["maps"][-1]).amax((2, 3))


class Margin(zoo.Head):
    """Scores of the right class are made smaller while training."""

    sees_targets = True

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        self.linear = nn.Linear(in_features, out_features, **place)
        self.seen: list[int] = []

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        logits = self.linear(outputs["pooled"])
        self.seen.append(0 if targets is None else len(targets))
        return logits if targets is None else logits - 0.5 * F.one_hot(targets, logits.shape[1])


@pytest.mark.parametrize("setting", ["default", "low", "min"])
@pytest.mark.usefixtures("registered")
def test_a_head_on_maps_trains_saves_and_routes(setting: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.reset_head(4, kind="grid")
    images, labels = easy_data(8).tensors
    model.train()
    F.cross_entropy(model(images), labels).backward()
    expected = {k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None}
    assert set(expected) == set(model.parameters_to_train())
    model.zero_grad()
    model.memory = setting
    F.cross_entropy(model(images), labels).backward()
    for key, p in model.parameters_to_train().items():
        torch.testing.assert_close(p.grad, expected[key])
    model.eval()
    tokens = model.outputs(images, want=["tokens"])["tokens"][:, 1:]
    head: Any = model.head
    by_hand = (tokens @ head.mix.weight.flatten(1).T + head.mix.bias).amax(1)
    torch.testing.assert_close(model(images), by_hand, rtol=1e-4, atol=1e-5)
    rows: list[str | None] = ["lora", None, "lora", None]
    with torch.no_grad():
        routed = model(images[:4], adapters=rows)
        adapted = model(images[:4])
        with model.disable():
            bare = model(images[:4])
    torch.testing.assert_close(routed, torch.stack([bare[i] if r is None else adapted[i] for i, r in enumerate(rows)]))
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(100)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    again.backbone.load_state_dict(model.backbone.state_dict())
    assert isinstance(again.head, Grid)
    torch.testing.assert_close(again(images), model(images))
    HEADS.pop("grid")
    with pytest.raises(ConfigError, match=r"head.kind"):
        zoo.load(adapter=tmp_path / "out", pretrained=False)


@pytest.mark.usefixtures("registered")
def test_a_head_on_maps_compiles() -> None:
    model = tiny_model()
    model.reset_head(4, kind="grid")
    images = easy_data(4).tensors[0]
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), model(images))
    finally:
        torch._dynamo.reset()


@pytest.mark.usefixtures("registered")
def test_margins_see_targets_while_training_only() -> None:
    model = tiny_model()
    model.reset_head(4, kind="margin")
    head: Any = model.head
    zoo.fit(model, easy_data(8), easy_data(8), epochs=1, batch_size=4, progress=False, device="cpu")
    assert head.seen.count(4) == 2 and 0 in head.seen
    images, labels = easy_data(4).tensors
    model.eval()
    torch.testing.assert_close(model(images, targets=labels), model(images) - 0.5 * F.one_hot(labels, 4))
    rows = ["lora", "lora", None, "lora"]
    routed = model(images, adapters=rows, targets=labels)
    with model.disable():
        bare = model(images)[2] - 0.5 * F.one_hot(labels, 4)[2] if isinstance(model.head, Margin) else routed[2]
    torch.testing.assert_close(routed[:2], model(images, targets=labels)[:2])
    torch.testing.assert_close(routed[2], bare)
    model.reset_head(4)
    with pytest.raises(ConfigError, match="sees none"):
        model(images, targets=labels)


def test_a_head_without_a_name_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    model.heads["default"] = Grid(24, 4)
    with pytest.raises(ConfigError, match="Grid has no name to be saved by"):
        model.save_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {"cosine", "linear", "text", "two"} <= set(registry.list_heads()) and "Grid" not in registry.list_heads()
    with pytest.raises(ConfigError, match="no head of the kind 'texts'"):
        model.reset_head(4, kind="texts")


def test_a_head_that_the_family_cannot_serve_is_refused() -> None:
    model = tiny_model()
    before = model.head
    with pytest.raises(MismatchError, match="head of the kind 'text' needs the output 'text'"):
        model.reset_head(4, kind="text")
    assert model.head is before


@dataclass
class Behind(zoo.Adapter):
    """Adds a learned bias of the classes, weighted by the first feature."""

    method = "behind"

    def attach(self, points: Any) -> None:
        points.select(kind="norm")[-1].keep("shift", nn.Parameter(torch.ones(4)))
        self.shift_at = "norm.shift"

    stateless = True

    def logits(self, logits: Tensor, outputs: Mapping[str, Any]) -> Tensor:
        return logits + self.get_parameter(self.shift_at) * outputs["pooled"][:, :1]


Behind.__eq__ = object.__eq__  # type: ignore[method-assign]
Behind.__hash__ = object.__hash__  # type: ignore[method-assign]


def test_logits_behind_the_head() -> None:
    model = tiny_model()
    images = easy_data(4).tensors[0]
    model.add_adapter(Behind())
    with torch.no_grad():
        pooled = model.features(images)
        expected = model.head(pooled) + pooled[:, :1]
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(model(images, adapters=["behind", "lora", None, "behind"])[0], expected[0])
        model.set_active("lora")
        torch.testing.assert_close(model(images), model.head(pooled))
        assert not model._answers
    model.set_active("lora", "behind")
    assert model.train().probe(images) == []
