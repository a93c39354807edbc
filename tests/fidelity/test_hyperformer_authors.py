"""Hyperformer against the authors' code (rabeehk/hyperformer): outputs and gradients, and counts at the sizes of T5-base.

`hyperformer.json` holds numbers recorded by running their hypernetwork controllers and their `MetaLayersAdapterController` over
two layers (self-attention, then MLP) of one stack, in float64 on the values of `fill` below. None of their code is here.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.adapters.parts.hypernetwork import HyperNetwork
from zoo.adapters.parts.of_tasks import MadeBottleneck

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "hyperformer.json").read_text())
SIZE = {"reduction": 4.0, "task_dim": 6, "hidden": 8, "projected": 5}
GLUE = ("rte", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "cola")
MAPS = {"down": "down_sampler_hyper_net", "up": "up_sampler_hyper_net", "scale": "post_layernorm_hypernet"}


def fill(name: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    """Values that belong to a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(std * random.standard_normal(shape))


def theirs_of(hyper: HyperNetwork, form: str) -> dict[str, tuple[nn.Parameter, Any]]:
    """Their names -> our parameter and the rows of it that they mean."""
    (stack,) = hyper.stacks
    whole = slice(None)
    named: dict[str, tuple[nn.Parameter, Any]] = {
        f"tasks.task_to_embeddings.{t}": (hyper.tasks, i) for i, t in enumerate("ab")
    }
    named["layer_id_embeddings.weight"] = (stack.layers, whole)
    if form == "++":
        named["adapters_block_type.weight"] = (stack.kinds, [1, 0])  # theirs: MLP, then attention
    for kind in ("weight", "bias"):
        network = "task_hypernet.task_embeding_generator"
        named[f"{network}.0.{kind}"] = (getattr(stack.projector.into, kind), whole)
        named[f"{network}.2.{kind}"] = (getattr(stack.projector.out, kind), whole)
        named[f"LayerNorm.{kind}"] = (getattr(stack.projector.norm, kind), whole)
        for i, prefix in enumerate(("self_attention_", "feed_forward_") if form == "hyperformer" else ("",)):
            maker = stack.makers[i]
            for ours, name in MAPS.items():
                first, second = {"scale": ("scale", "shift")}.get(ours, (ours, f"{ours}_bias"))
                middle = "" if ours == "scale" else ".0"
                named[f"{prefix}{name}.weight_generator{middle}.{kind}"] = (getattr(getattr(maker, first), kind), whole)
                named[f"{prefix}{name}.bias_generator{middle}.{kind}"] = (getattr(getattr(maker, second), kind), whole)
    return named


@pytest.mark.parametrize("form", ["hyperformer", "++"])
def test_outputs_and_gradients(form: str) -> None:
    theirs = AUTHORS[form]
    points: list[Any] = [
        SimpleNamespace(name=f"blocks.{i}.{kind}", role=kind, block=i, tower="", dim_out=16)
        for i in range(2)
        for kind in ("attn", "mlp")
    ]
    method: Any = zoo.adapter("hyperformer", form=form, tasks=["a", "b"], **SIZE)
    hyper = method.hypernetwork(points).double()
    named = theirs_of(hyper, form)
    assert set(named) == set(theirs["shapes"])
    with torch.no_grad():
        for name, (parameter, rows) in named.items():
            parameter[rows] = fill(name, tuple(theirs["shapes"][name]), 0.4)

    made = hyper("b")
    y = x = fill("x", (2, 3, 16)).requires_grad_(True)
    for point in points:
        y = MadeBottleneck(SimpleNamespace(get=lambda: made), hyper, point.name, "gelu_new")(y)
    (y * fill("loss", (2, 3, 16))).sum().backward()

    def close(ours: Tensor | None, recorded: Any) -> None:
        assert ours is not None
        torch.testing.assert_close(ours.detach(), torch.tensor(recorded, dtype=torch.float64), rtol=1e-7, atol=1e-7)

    close(made["blocks.1.mlp"].up, theirs["last mlp.up"])
    close(y, theirs["output"])
    close(x.grad, theirs["x"])
    for name, recorded in theirs["gradients"].items():
        parameter, rows = named[name]
        assert parameter.grad is not None
        close(parameter.grad[rows], recorded)
    assert hyper.tasks.grad is not None and not hyper.tasks.grad[0].any()  # the other task had no part in it


@pytest.mark.parametrize(("form", "count"), [("hyperformer", 10_289_376), ("++", 5_211_056)])
def test_counts_on_t5_base(form: str, count: int) -> None:
    """What their classes count, and 62 norms; VL-T5's visual embedding has two more norms, which T5 has not."""
    assert AUTHORS[form]["t5-base"] + 62 * 768 == count
    method = zoo.adapter("hyperformer", form=form, tasks=GLUE, train_norms=True)
    model = zoo.load("vl-t5", method, pretrained=False, device="meta")
    assert model.num_parameters(trainable=True, head=False) - 2 * 768 == count
    if form == "++":
        makers = sum(p.numel() for k, p in model.parameters_to_train().items() if ".makers." in k)
        assert makers == 2 * 65 * 39_192 == 5_094_960


@pytest.mark.parametrize(("form", "count"), [("hyperformer", 5_120_688), ("++", 2_581_528)])
def test_counts_on_vit_b(form: str, count: int) -> None:
    model = zoo.load("vit-b16", zoo.adapter("hyperformer", form=form), pretrained=False, num_classes=0, device="meta")
    assert model.num_parameters(trainable=True, head=False) == count
