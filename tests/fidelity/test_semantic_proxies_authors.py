"""Semantic proxies (VPT-SP) against the authors' code (Noahsark/ParameterEfficient-DML, commit c7c9416) and their counts.

`semantic_proxies.json` holds numbers recorded by running their network and their proxy anchor loss, in float64 on a ViT of 2
blocks with the values of `waves`: two training batches one after the other, so that the second begins from the container that
the first left, and an evaluation. None of their code is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from waves import SMALL, fill, summary, wave

import zoo
from vision.tasks.semantic_proxies import ProxyNet, SemanticProxies

AUTHORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "semantic_proxies.json").read_text())
BATCHES = ((0, 0, 2, 2, 3, 3), (1, 1, 0, 0, 2, 2))
GRU = ("w_iz", "w_hz", "b_z", "w_ir", "w_hr", "b_r", "w_in", "w_hn", "b_n")


def put(tensor: Tensor, phase: int, scale: float, base: float = 0.0) -> None:
    with torch.no_grad():
        tensor.copy_(base + wave(tuple(tensor.shape), phase, scale))


def built() -> tuple[zoo.Model, SemanticProxies]:
    model = zoo.load("vit-micro", num_classes=0, pretrained=False, **SMALL).double()
    fill(dict(model.backbone.named_parameters()))
    branch = model.add_adapter(zoo.adapter("vpt-sp", num_tokens=3, step=1))
    model.reset_head(16, kind="embedding")
    with torch.no_grad():
        for i in range(2):  # theirs has three rows in the second block too, of which two are used
            branch.module_at(f"blocks.{i}.tokens").prompt.copy_(wave((3, 48), 11 + i, 0.3)[: 3 - i])
    task = SemanticProxies(tokens=2, depth=2)
    task.classes = 4
    task.own = task.proxies(model).double()
    own: Any = task.own
    for i in range(2):
        put(own.prompts[i], 13 + i, 0.5)
    for j, head in enumerate((model.head, own.head)):
        put(head.linear.weight, 2 + j, 0.3)
        put(head.linear.bias, 4 + j, 0.1)
        put(head.norm.weight, 5 + j, 0.2, 1.0)
        put(head.norm.bias, 6 + j, 0.1)
    for i, name in enumerate(GRU):
        put(getattr(own.gru, name), 20 + i, 0.4)
    put(own.proxies, 31, 0.2)
    own.container.copy_(F.normalize(wave((4, 16), 33, 1.0), dim=-1))
    return model, task


@pytest.mark.parametrize("shuffled", [False, True], ids=["by class", "any order"])
def test_equals_the_authors_code(shuffled: bool) -> None:
    model, task = built()
    own: Any = task.own
    model.train()
    for step, (labels, recorded) in enumerate(zip(BATCHES, AUTHORS, strict=False)):
        images, y = wave((6, 3, 32, 32), 5 + step, 1.5), torch.tensor(labels)
        order = mixed(y) if shuffled else torch.arange(6)
        model.zero_grad()
        own.zero_grad()
        loss, z = task.loss(model, images[order], y[order])
        loss.backward()
        back = order.argsort()
        torch.testing.assert_close(z[back].flatten()[:12], numbers(recorded["embeds"]), rtol=1e-6, atol=1e-7)
        assert loss.item() == pytest.approx(recorded["loss"], rel=1e-6)
        torch.testing.assert_close(own.container.flatten()[::4], numbers(recorded["container"]), rtol=1e-6, atol=1e-7)
        assert not own.container.requires_grad
        found = gradients(model, own)
        theirs = recorded["gradients"]
        assert set(found) == set(theirs)
        for key, expected in theirs.items():
            torch.testing.assert_close(
                torch.tensor(found[key]), torch.tensor(expected), rtol=2e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}"
            )
    model.eval()
    with torch.no_grad():
        z = model(wave((6, 3, 32, 32), 9, 1.5))
    torch.testing.assert_close(z.flatten()[:12], numbers(AUTHORS[2]["embeds"]), rtol=1e-6, atol=1e-7)


def mixed(labels: Tensor) -> Tensor:
    """An order in which classes alternate, and the images of each stay in theirs."""
    turn = torch.stack([(labels[:i] == labels[i]).sum() for i in range(len(labels))])
    return (turn * 10 + labels).argsort()


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradients(model: zoo.Model, own: ProxyNet) -> dict[str, list[float]]:
    branch = model.adapters["vpt-sp"]
    named = {f"prompt.{i}": branch.module_at(f"blocks.{i}.tokens").prompt for i in range(2)}
    named |= {f"class.{i}": p for i, p in enumerate(own.prompts)}
    named |= {f"{side}.{n}": p for side, h in (("head", model.head), ("p", own.head)) for n, p in h.named_parameters()}
    named |= {f"gru.{n}": getattr(own.gru, n) for n in GRU} | {"proxies": own.proxies}
    named |= {f"backbone.{path(n)}": p for n, p in branch.named_parameters() if not n.endswith("prompt")}
    return {k: summary(p.grad) for k, p in named.items()}


def path(name: str) -> str:
    """timm's own name of a bias."""
    for ours, theirs in (
        ("attn.o.", "attn.proj."),
        ("mlp.up.", "mlp.fc1."),
        ("mlp.down.", "mlp.fc2."),
        ("embed.", "embed.proj."),
    ):
        name = name.replace(ours, theirs)
    return name


def test_counts_on_cub() -> None:
    """682,496 are published. While training theirs count 4,239,872, of which 512 are a vector of the GRU that nothing reads."""
    model = zoo.load("vit-b16", "vpt-sp", num_classes=0, device="meta")
    model.reset_head(512, kind="embedding")
    assert model.num_parameters(trainable=True) == 102_912 + 184_320 + 395_264 == 682_496
    task = SemanticProxies()
    task.classes = 100
    own = task.proxies(model)
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in own.named_children()}
    assert parts == {"prompts": 1_536_000, "head": 395_264, "gru": 1_574_912 - 512}
    beside = sum(p.numel() for p in own.parameters())
    assert all(recorded["unused"] for recorded in AUTHORS[:2])
    assert model.num_parameters(trainable=True) + beside + 512 == 4_239_872
    # their configuration for CUB: five prompts, five fewer in each further block; theirs makes them for four blocks all the same
    used = SemanticProxies(step=5)
    used.classes = 100
    assert used.counts == [5] and sum(p.numel() for p in used.proxies(model).prompts) == 1_536_000 - 1_152_000
    products = zoo.load("vit-b16", zoo.adapter("vpt-sp", num_tokens=90, step=5), num_classes=0, device="meta")
    assert products.num_parameters(trainable=True) - 102_912 == 768 * sum(90 - 5 * i for i in range(12))
