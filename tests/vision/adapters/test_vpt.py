"""VPT: against the straightforward form, alone and with other methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from straightforward_vpt import StraightViT
from timm.layers import Attention
from torch import Tensor, nn
from vpt_models import BOTH, DEEP, EVERY, VIT, images, loss, make, same_gradients, straightforward

import zoo
from vision.adapters import vpt
from zoo.adapters.base import Adapter
from zoo.errors import AttachError, CombinationError, ConfigError, MergeError
from zoo.points import Points


@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@EVERY
def test_equals_the_straightforward_form(kind: str, deep: bool, pool: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, pool=pool)).train()
    same_gradients(model, straightforward(model), images(kind))


@pytest.mark.parametrize("memory", ["low", "min"])
@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@BOTH
def test_gradients_do_not_depend_on_the_memory_setting(kind: str, deep: bool, pool: str, memory: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, pool=pool, dropout=0.2)).train()
    found = []
    for setting in ("default", memory):
        model.memory = setting
        torch.manual_seed(3)
        found.append(torch.autograd.grad(loss(model.features(images(kind))), list(model.adapters["vpt"].parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


OTHERS: dict[str, Adapter] = {
    "lora": zoo.adapter("lora", rank=2, targets="all-linear"),
    "dora": zoo.adapter("lora", rank=2, targets="all-linear", dora=True),
    "ssf": zoo.adapter("ssf"),
    "ia3": zoo.adapter("ia3"),
    "norm": zoo.adapter("norm"),
    "bitfit": zoo.adapter("bitfit"),
    "houlsby": zoo.adapter("adapter", form="houlsby", rank=2),
    "adaptformer": zoo.adapter("adapter", form="adaptformer", rank=2, dropout=0.0),
}


@pytest.mark.parametrize("other", list(OTHERS))
@DEEP
@BOTH
def test_with_another_method(kind: str, deep: bool, other: str) -> None:
    """What other methods do to tokens they do to prompts too, as if these were ordinary tokens."""
    model = make(kind, OTHERS[other], zoo.adapter("vpt", num_tokens=4, deep=deep)).train()
    x = images(kind)
    same_gradients(model, straightforward(model), x)
    others = [p for n in model.active if n != "vpt" for p in model.adapters[n].parameters()]
    assert all(g is not None for g in torch.autograd.grad(loss(model.features(x)), others, allow_unused=True))
    assert model.probe(x) == []


@dataclass(eq=False)
class ParallelAttention(Adapter):
    """Watches the attention's input, which the prompts pass too."""

    method = "parallel-attention"

    def attach(self, points: Points) -> None:
        for point in points.select(kind="sublayer", role="attn"):
            point.parallel(nn.Linear(point.dim_in, point.dim_in))


@DEEP
@BOTH
def test_with_a_branch_beside_the_attention(kind: str, deep: bool) -> None:
    model = make(kind, ParallelAttention(), zoo.adapter("vpt", num_tokens=4, deep=deep)).train()
    same_gradients(model, straightforward(model), images(kind))


@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@BOTH
def test_two_at_once_are_one_with_all_prompts(kind: str, deep: bool, pool: str) -> None:
    model = make(
        kind,
        zoo.adapter("vpt", num_tokens=3, deep=deep, pool=pool),
        zoo.adapter("vpt", num_tokens=2, deep=deep, pool=pool),
    ).train()
    x = images(kind)
    expected = straightforward(model, ("vpt", "vpt-2"))(x)
    torch.testing.assert_close(model.features(x), expected, rtol=1e-10, atol=1e-10)
    assert model.probe(x) == []


@BOTH
def test_deep_and_flowing_prompts_together(kind: str) -> None:
    """Flowing prompts are tokens; the deep ones of another adapter are keys and values for them too."""
    model = make(kind, zoo.adapter("vpt", num_tokens=3, deep=False), zoo.adapter("vpt", num_tokens=2)).train()
    x = images(kind)
    assert model.probe(x) == []
    if kind == "vit":
        model.set_active("vpt")
        others = copy.deepcopy(model)
        others.set_active("vpt-2")
        flowing = StraightViT(others.backbone, list(model.adapters["vpt"].parameters()), deep=False)
        model.set_active("vpt", "vpt-2")
        torch.testing.assert_close(model.features(x), flowing(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@EVERY
def test_an_image_does_not_depend_on_the_others(kind: str, deep: bool, pool: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, pool=pool)).eval()
    x = images(kind, 4)
    together = model(x)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(together.flip(0), model(x.flip(0)), rtol=1e-11, atol=1e-11)


@DEEP
@BOTH
def test_dropout_draws_for_each_image(kind: str, deep: bool) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, dropout=0.5)).train()
    x = images(kind)[:1].expand(3, -1, -1, -1).clone()
    torch.manual_seed(5)
    features = model.features(x)
    assert (features[0] - features[1]).abs().max() > 1e-4
    torch.manual_seed(5)
    drawn = [m(3) for m in model.adapters["vpt"].modules() if isinstance(m, vpt.Prompt)]
    assert all(len(p) == 3 for p in drawn)
    reference = straightforward(model)
    reference.prompts = nn.ParameterList([nn.Parameter(p) for p in drawn])
    torch.testing.assert_close(features, reference(x), rtol=1e-10, atol=1e-10)
    model.eval()
    assert torch.equal(model.features(x), model.features(x))


@BOTH
def test_projected_prompts(kind: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, project=6)).train()
    adapter = model.adapters["vpt"]
    widths = sorted({p.dim_in for p in model.points if p.kind == "tokens"})
    names = [k for k, _ in adapter.named_parameters()]
    assert [n for n in names if "project" in n] == [f"project_{w}.{k}" for w in widths for k in ("weight", "bias")]
    reference = straightforward(model)
    blocks = [m for m in adapter.modules() if isinstance(m, vpt.Prompt)]
    reference.prompts = nn.ParameterList([nn.Parameter(m(1)[0]) for m in blocks])
    x = images(kind)
    torch.testing.assert_close(model.features(x), reference(x), rtol=1e-10, atol=1e-10)
    assert model.probe(x) == []


@DEEP
@BOTH
def test_removal_leaves_the_backbone_as_it_was(kind: str, deep: bool) -> None:
    model = make(kind)
    x = images(kind)
    before, state = model(x), copy.deepcopy(model.backbone.state_dict())
    model.add_adapter(zoo.adapter("vpt", deep=deep, pool="all"))
    assert not torch.equal(model(x), before)
    with model.disable():
        assert torch.equal(model(x), before)
    model.remove_adapter("vpt")
    assert torch.equal(model(x), before)
    assert list(state) == list(model.backbone.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())
    for module in model.backbone.modules():
        assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


# -- files and errors ------------------------------------------------------------------------------------------------


@DEEP
@BOTH
def test_saves_and_reloads(kind: str, deep: bool, tmp_path: Path) -> None:
    adapter = zoo.adapter("vpt", num_tokens=4, deep=deep, project=5, pool="all", dropout=0.1)
    model = make(kind, adapter).eval()
    model.save_adapter(tmp_path / "saved")
    twin = make(kind)
    twin.load_state_dict({**twin.state_dict(), **{f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}})
    from zoo.disk import attach, read

    twin.fingerprint = model.fingerprint
    attach(twin, read(tmp_path / "saved"))
    assert twin.adapters["vpt"].config() == adapter.config()  # type: ignore[operator]
    assert torch.equal(twin.eval()(images(kind)), model(images(kind)))


@dataclass(eq=False)
class Replace(Adapter):
    """Runs the blocks its own way."""

    method = "replace"

    def attach(self, points: Points) -> None:
        for point in points.select(kind="block"):
            point.replace(Runs())


class Runs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.scale * run(x)


def test_refuses_what_cannot_be_combined() -> None:
    """Flowing prompts go through the inside of a Swin block, which somebody else runs."""
    model = make("swin", Replace())
    x = images("swin")
    before = model(x)
    with pytest.raises(CombinationError, match="replace"):
        model.add_adapter(zoo.adapter("vpt", deep=False))
    assert list(model.adapters) == ["replace"] and torch.equal(model(x), before)
    model.add_adapter(zoo.adapter("vpt"))
    assert model.probe(x) == []
    both = make("swin", zoo.adapter("vpt", deep=False))
    with pytest.raises(CombinationError, match="vpt"):
        both.add_adapter(Replace())
    assert both.probe(x) == []


@pytest.mark.parametrize(
    "settings", [{"num_tokens": 0}, {"dropout": 1.0}, {"pool": "mean"}, {"project": 0}, {"num_tokens": 2.5}]
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        zoo.adapter("vpt", **settings)


def test_refuses_an_attention_that_is_not_described() -> None:
    class Odd(Attention):
        """Somebody's own, of which nobody knows what its forward does."""

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            return super().forward(x).flip(1)

    model = zoo.load("vit-micro", pretrained=False, num_classes=5, **VIT)
    for block in model.backbone.blocks:
        block.attn.__class__ = Odd
    with pytest.raises(AttachError, match="Odd"):
        model.add_adapter("vpt")
    assert not model.adapters


def test_cannot_be_merged() -> None:
    with pytest.raises(MergeError, match="vpt"):
        make("vit", "vpt").merge()


def test_one_at_a_time_can_be_attached_together() -> None:
    model = make("swin", zoo.adapter("vpt", deep=False))
    model.add_adapter(Replace(), activate=False)
    x = images("swin")
    before = model(x)
    with pytest.raises(CombinationError, match="at a time"):
        model.set_active("replace", "vpt")
    assert model.active == ("vpt",) and torch.equal(model(x), before)
    model.set_active("replace")
    assert model.probe(x) == []
