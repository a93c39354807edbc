"""Points: the selection language, the tables of the families, verbs outside of attach."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import zoo
from zoo.adapters.base import Adapter
from zoo.errors import AttachError, CombinationError, SelectionError
from zoo.points import Points
from zoo.points.selectors import expand


@pytest.fixture(scope="module")
def model() -> zoo.Model:
    return zoo.load("vit-b16", pretrained=False, device="meta", num_classes=0)


def names(points: list) -> list[str]:
    return [p.name for p in points]


def test_expand() -> None:
    assert expand("blocks.{0..2}.attn.{q,v}") == [f"blocks.{i}.attn.{r}" for i in range(3) for r in "qv"]


def test_star_stays_within_a_component(model: zoo.Model) -> None:
    assert names(model.points.select("blocks.*")) == [f"blocks.{i}" for i in range(12)]
    assert names(model.points.select("blocks.1.**"))[:2] == ["blocks.1.tokens", "blocks.1.norm1"]


def test_roles_and_filters(model: zoo.Model) -> None:
    assert len(model.points.select(("q", "v"), kind="linear")) == 24
    assert len(model.points.select("blocks.*.attn.{q,v}")) == 24
    assert names(model.points.select(kind="sublayer", role="mlp", block=[3, 4])) == ["blocks.3.mlp", "blocks.4.mlp"]


def test_targets_of_a_method(model: zoo.Model) -> None:
    assert len(model.points.linears("all-linear")) == len(model.points.linears(("all-linear",))) == 6 * 12
    assert names(model.points.linears("blocks.0.mlp.up,q"))[-2:] == ["blocks.10.attn.q", "blocks.11.attn.q"]
    mixer = zoo.load("groupmamba-t", pretrained=False, device="meta", num_classes=0).points
    assert {p.role for p in mixer.linears(("q", "v"), ("q", "v"))} == {"in"}  # the default: by what the mixer reads
    with pytest.raises(SelectionError, match="'q'"):
        mixer.linears(("q", "v"), ("q", "k"))  # a choice
    with pytest.raises(SelectionError, match="no linear point"):
        model.points.linears("attn")


def test_dims_of_a_fused_projection(model: zoo.Model) -> None:
    q, k, v = (model.points[f"blocks.0.attn.{r}"] for r in "qkv")
    assert [(p.start, p.stop) for p in (q, k, v)] == [(0, 768), (768, 1536), (1536, 2304)]
    assert q.module is v.module
    assert (q.dim_in, q.dim_out) == (768, 768)


@pytest.mark.parametrize("selector", ["blocks.*.attn.{q,w}", "blocks.{11..12}.mlp.up", "quack", "blocks.*.cross.q"])
def test_a_selector_that_matches_nothing_or_only_in_part(model: zoo.Model, selector: str) -> None:
    with pytest.raises(SelectionError, match="matches no"):
        model.points.select(selector)


def test_an_unknown_role_lists_the_known(model: zoo.Model) -> None:
    with pytest.raises(SelectionError, match=r"it has .*down.*up"):
        model.points.select(kind="linear", role="mixer")


def test_verbs_need_attach(model: zoo.Model) -> None:
    with pytest.raises(AttachError, match="Verbs work only inside"):
        model.points["blocks.0.attn.q"].add(nn.Identity())


def test_prints_as_a_table(model: zoo.Model) -> None:
    lines = repr(model.points).splitlines()
    assert len(lines) == len(model.points) + 1
    assert any(line.split()[:5] == ["blocks.3.mlp.up", "linear", "up", "768", "3072"] for line in lines)


def test_swin_points_have_stages() -> None:
    swin = zoo.load("swin-t", pretrained=False, device="meta", num_classes=0)
    wide = swin.points.select(kind="linear", role="q", stage=3)
    assert [(p.name, p.dim_in) for p in wide] == [("stages.3.blocks.0.attn.q", 768), ("stages.3.blocks.1.attn.q", 768)]
    merge = swin.points["stages.1.merge"]
    assert (merge.dim_in, merge.dim_out) == (384, 192)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("dinov2-b14-reg", 5),
        ("deit3-b16", 1),
        ("mae-b16", 1),
        ("timm:vit_base_patch16_clip_224.openai", 1),
        ("timm:vit_base_patch16_siglip_224", 0),
        ("timm:deit_base_distilled_patch16_224", 2),
        ("timm:vit_giant_patch14_dinov2", 1),
    ],
)
def test_every_timm_vision_transformer(name: str, prefix: int) -> None:
    model = zoo.load(name, pretrained=False, device="meta", num_classes=7)
    assert model.points["blocks.0.tokens"].num_prefix == prefix
    model.add_adapter("lora")
    depth, dim = len(model.backbone.blocks), model.backbone.embed_dim
    assert model.num_parameters(trainable=True, head=False) == depth * 2 * 8 * 2 * dim


def test_two_points_of_one_name_are_refused(model: zoo.Model) -> None:
    with pytest.raises(AttachError, match="one name"):
        Points([model.points[0], model.points[0]], "x")


@dataclass(eq=False)
class _Twice(Adapter):
    method = "twice"

    def attach(self, points: Points) -> None:
        for _ in range(2):
            points["blocks.0.mlp"].after(nn.Linear(8, 8))


@dataclass(eq=False)
class _Nested(Adapter):
    method = "nested"

    def attach(self, points: Points) -> None:
        dim = points["blocks.0.mlp"].dim_in
        points["blocks.0.mlp.up"].add(nn.Linear(dim, points["blocks.0.mlp.up"].dim_out))
        points["blocks.0.mlp"].after(nn.Linear(dim, dim))


@dataclass(eq=False)
class _Late(Adapter):
    method = "late"

    def attach(self, points: Points) -> None:
        points["blocks.0.mlp"].after(nn.Linear(8, 8))
        points.select("blocks.0.nothing")


def test_one_module_for_each_point() -> None:
    model = zoo.load("vit-micro", pretrained=False, num_classes=3, depth=1, embed_dim=24)
    with pytest.raises(CombinationError, match="twice"):
        model.add_adapter(_Twice())


def test_points_inside_one_another_keep_their_names() -> None:
    model = zoo.load("vit-micro", pretrained=False, num_classes=3, depth=1, embed_dim=24)
    keys = set(model.add_adapter(_Nested()).state_dict())
    assert keys == {f"blocks.0.mlp{m}.{p}" for m in ("", ".up") for p in ("weight", "bias")}
    assert model.probe(torch.randn(2, 3, 32, 32)) == []


def test_a_failed_attach_leaves_nothing() -> None:
    model = zoo.load("vit-micro", pretrained=False, num_classes=3, depth=1, embed_dim=24)
    before = [n for n, _ in model.named_parameters()]
    with pytest.raises(SelectionError):
        model.add_adapter(_Late())
    assert [n for n, _ in model.named_parameters()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.backbone.modules())
    assert model.active == ()


def test_what_a_selector_costs_is_bounded() -> None:
    """A range of a hundred milliard numbers and sixty stars hung, or filled the memory."""
    points = zoo.load("vit-micro", pretrained=False).points
    for selector in (
        "blocks.{0..99999999999}",
        "blocks.{0..999}.{0..999}",
        "blocks.{5..2}",
        "a" * 2000,
        ["{0..10000}"],
    ):
        with pytest.raises(SelectionError):
            points.select(selector)
    assert points.select("*" * 60) == points.select("**")  # three of them or more are as wide as two
    with pytest.raises(SelectionError, match="matches no"):
        points.select("*a" * 60)
    with pytest.raises(SelectionError, match="matches no"):
        points.select("**.*" * 100 + "x")


def test_many_wildcards_match_as_few_do() -> None:
    """The walk that is used for many gives what the regular expression gives, on every name of a model."""
    from zoo.points import selectors

    names = [p.name for p in zoo.load("vit-micro", pretrained=False).points]
    for pattern in ("*.*.*.*", "**.q", "*.?.*.q", "**n**", "*l*o*k*.1.*", "b**t*.q", "**.*.**", "*"):
        parts = [part for part in re.split(r"(\*+|\?)", pattern) if part]
        plain = re.compile("".join(selectors._regex(part) for part in parts)).fullmatch
        assert [bool(plain(n)) for n in names] == [selectors._walk(parts, n) for n in names], pattern
        assert [bool(plain(n)) for n in names] == [bool(selectors.matcher(pattern)(n)) for n in names], pattern
