"""Polyhistor and Polyhistor-Lite against the authors' code: outputs, gradients, counts; and two rows of the paper's table.

`polyhistor.json` holds numbers recorded by running their hypernetwork controllers (each block its own, one for each stage, one
for the whole network with kernels in front of or behind the templates) and what applies the weights, over three stages of one,
two and one layers, attention then MLP, in float64 on the values of `fill` below. None of their code is here.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.adapters.parts.of_tasks import MadeBottleneck

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "polyhistor.json").read_text())
SIZE = {"tasks": ["a", "b"], "reduction": 2.0, "task_dim": 6, "hidden": 8, "projected": 5, "targets": ["attn", "mlp"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("polyhistor", {"decomposed": False}),
    "block": ("polyhistor", {"inner_reduction": 2.0, "embedding_norm": True}),
    "stage": ("polyhistor", {"inner": 3, "per": "stage", "embedding_norm": True}),
    "kernel": ("polyhistor-lite", {"inner": 2, "embedding_norm": True}),
    "template": ("polyhistor-lite", {"inner": 2, "order": "template", "embedding_norm": True}),
}
STAGES = [(8, [0]), (16, [1, 2]), (32, [3])]  # width, layers
MAPS = {"down": "down_sampler", "up": "up_sampler", "scale": "post_layernorm"}
FOUR = ("semseg", "parts", "saliency", "normals")


def fill(name: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    """Values that belong to a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(std * random.standard_normal(shape))


Named = dict[str, tuple[nn.Parameter, Any]]


def network(prefix: str, projector: Any) -> Named:
    """Their name -> our parameter and the part of it that it means."""
    named: Named = {}
    for kind in ("weight", "bias"):
        named[f"{prefix}.task_hypernet.task_embeding_generator.0.{kind}"] = (getattr(projector.into, kind), ...)
        named[f"{prefix}.task_hypernet.task_embeding_generator.2.{kind}"] = (getattr(projector.out, kind), ...)
        if isinstance(projector.norm, nn.LayerNorm):
            named[f"{prefix}.LayerNorm.{kind}"] = (getattr(projector.norm, kind), ...)
    return named


def maps(prefix: str, maker: Any) -> Named:
    named: Named = {}
    for kind in ("weight", "bias"):
        for ours, name in MAPS.items():
            first, second = {"scale": ("scale", "shift")}.get(ours, (ours, f"{ours}_bias"))
            path = f"{prefix}{name}_hypernet" if ours == "scale" else f"{prefix}{name}_hyper_net"
            middle = "" if ours == "scale" else ".0"
            named[f"{path}.weight_generator{middle}.{kind}"] = (getattr(getattr(maker, first), kind), ...)
            named[f"{path}.bias_generator{middle}.{kind}"] = (getattr(getattr(maker, second), kind), ...)
    return named


def theirs_of(hyper: Any, case: str) -> Named:
    named: Named = {f"tasks.{t}": (hyper.tasks, i) for i, t in enumerate("ab")}
    if case in ("whole", "block"):
        for i, stack in enumerate(hyper.stacks):
            named |= network(f"block{i}", stack.projector)
            for kind, maker in zip(("self_attention_", "feed_forward_"), stack.makers, strict=True):
                named |= maps(f"block{i}.{kind}", maker)
    elif case == "stage":
        for s, stack in enumerate(hyper.stacks):
            named |= network(f"stage{s}", stack.projector) | maps(f"stage{s}.", stack.makers[0])
            for layer in range(len(stack.layers)):
                named[f"stage{s}.layer_id_embeddings.{layer}.weight"] = (stack.layers, layer)
            for theirs, ours in enumerate((1, 0)):  # theirs: MLP, then attention
                named[f"stage{s}.adapters_block_type.{theirs}.weight"] = (stack.kinds, ours)
    else:
        (stack,) = hyper.stacks
        named |= network("all", stack.projector) | maps("all.", stack.maker)
        for theirs, ours in enumerate((1, 0)):
            named[f"all.adapters_block_type.{theirs}.weight"] = (stack.kinds, ours)
        for (_, layers), stretch in zip(STAGES, stack.stretches, strict=True):
            for i, layer in enumerate(layers):
                named[f"all.layer_id_embeddings.{layer}.weight"] = (stretch.layers, i)
                for name, kernel in (
                    ("scaleup_kronkernel", "kernel"),
                    ("coef_bias", "bias_kernel"),
                    ("coef_lna", "norm_kernel"),
                ):
                    if stretch.s > 1:
                        named[f"all.{name}_att.{layer}.weight"] = (getattr(stretch, kernel), 2 * i)
                        named[f"all.{name}.{layer}.weight"] = (getattr(stretch, kernel), 2 * i + 1)
    return named


@pytest.mark.parametrize("case", list(CASES))
def test_outputs_and_gradients(case: str) -> None:
    theirs, (name, settings) = AUTHORS[case], CASES[case]
    method: Any = zoo.adapter(name, **{**SIZE, **settings})
    points = [
        SimpleNamespace(name=f"blocks.{layer}.{kind}", role=kind, block=layer, tower="", dim_out=dim)
        for dim, layers in STAGES
        for layer in layers
        for kind in ("attn", "mlp")
    ]
    hyper = method.hypernetwork(points).double()
    named = theirs_of(hyper, case)
    assert set(named) - {"tasks.a"} == set(theirs["gradients"])
    covered = sum(parameter[part].numel() for parameter, part in named.values())
    assert covered == sum(p.numel() for p in hyper.parameters())
    with torch.no_grad():
        for key, (parameter, part) in named.items():
            shape = parameter[part].shape
            parameter[part] = fill(key, tuple(shape), 0.4)

    made = hyper("b")
    read: Any = SimpleNamespace(get=lambda: made)
    loss, inputs = torch.zeros((), dtype=torch.float64), []
    for stage, (dim, layers) in enumerate(STAGES):
        y = x = fill(f"x{stage}", (3, dim)).requires_grad_(True)
        inputs.append(x)
        for layer in layers:
            for kind in ("attn", "mlp"):
                y = MadeBottleneck(read, hyper, f"blocks.{layer}.{kind}", "silu")(y)
        loss = loss + (y * fill(f"loss{stage}", (3, dim))).sum()
        close(y.flatten(), theirs["outputs"][stage])
    loss.backward()
    for x, recorded in zip(inputs, theirs["x"], strict=True):
        close(x.grad.flatten(), recorded)
    for key, recorded in theirs["gradients"].items():
        parameter, part = named[key]
        gradient = parameter.grad[part]
        close((gradient * fill(f"{key}|", tuple(gradient.shape))).sum(), recorded)
    assert not hyper.tasks.grad[0].any()  # the other task had no part in it


def close(ours: Any, recorded: Any) -> None:
    torch.testing.assert_close(ours.detach(), torch.tensor(recorded, dtype=torch.float64), rtol=1e-7, atol=1e-7)


@cache
def backbone(name: str) -> zoo.Model:
    return zoo.load(name, pretrained=False, device="meta", num_classes=0)


def count_of(name: str, method: str, **settings: Any) -> int:
    model = backbone(name)
    model.add_adapter(zoo.adapter(method, **settings), name="counted")
    try:
        return model.num_parameters(trainable=True, head=False)
    finally:
        model.remove_adapter("counted")


@pytest.mark.parametrize(
    ("name", "settings", "recorded", "count"),
    [
        ("polyhistor", {"embedding_norm": True}, "polyhistor", 6_410_684),
        ("polyhistor-lite", {"embedding_norm": True}, "lite", 413_552),
        ("polyhistor-lite", {"inner": 8, "targets": ("attn", "mlp"), "embedding_norm": True}, "lite both", 407_120),
        ("polyhistor", {"per": "stage", "targets": ("attn", "mlp"), "embedding_norm": True}, "stage", 2_803_438),
        # the paper's row of Hyperformer
        (
            "polyhistor",
            {"decomposed": False, "reduction": 8, "targets": ("attn", "mlp")},
            "hyperformer",
            72_770_768,
        ),
    ],
)
def test_counts_on_swin_t(name: str, settings: dict[str, Any], recorded: str, count: int) -> None:
    """Ours and what their classes count, for four tasks."""
    assert count_of("swin-t", name, tasks=FOUR, **settings) == count == AUTHORS["counts"][recorded]


@pytest.mark.parametrize(
    ("name", "networks", "count"), [("polyhistor", 12, 6_409_148), ("polyhistor-lite", 1, 413_424)]
)
def test_the_norm_of_the_embedding(name: str, networks: int, count: int) -> None:
    """Off by default: 2 p fewer for each network than their class with it."""
    assert count_of("swin-t", name, tasks=FOUR) == count
    assert count_of("swin-t", name, tasks=FOUR, embedding_norm=True) == count + 2 * 64 * networks


def test_count_of_the_paper_s_adapter_row() -> None:
    """8.69 M: for each of four tasks one bottleneck of d / 2 behind each MLP, with a LayerNorm of its own."""
    assert 4 * count_of("swin-t", "adapter", targets="mlp", reduction=2, norm="out") == 8_688_000


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("polyhistor", {}, 17_997_632),
        ("polyhistor", {"per": "stage"}, 1_571_952),
        ("polyhistor-lite", {}, 2_117_952),
    ],
)
def test_counts_on_vit_b(name: str, settings: dict[str, Any], count: int) -> None:
    assert count_of("vit-b16", name, **settings) == count
