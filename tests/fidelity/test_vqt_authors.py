"""VQT against the paper's counts and against numbers recorded from the authors' code.

The recorded numbers are those of andytu28/VQT (commit 9bca87e), `Head2ToeVisionTransformer` in float64 on a ViT of 2 blocks,
width 48, 3 heads, 32 px in patches of 8, with the weights and images of `wave` below.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from waves import fill, wave

import zoo

SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}

# settings: (logits (2, 4), gradients of the queries (2, T, 48) and, if any, of the weights (2, T)), each gradient as
# its first three values, its norm and its sum
RECORDED: dict[tuple[int, str], Any] = {
    (1, "concat"): (
        [
            [-1.1207473068406981, -0.49378449340634956, 0.4377523306111104, 1.0992766597918453],
            [-1.1254577448886858, -0.44567785193955184, 0.50900312155362, 1.149722996225201],
        ],
        [[-0.05045535, 0.05415235, -0.00395593, 0.6623196116334703, 0.013766205101641088]],
    ),
    (3, "concat"): (
        [
            [0.8571820606863567, 0.6068494215332876, -1.2302612396819157, 0.1494911746080849],
            [0.8471829246814484, 0.6806777478762442, -1.2656503176248015, 0.09741936260929518],
        ],
        [[0.00873585, -0.01317902, 0.00313424, 0.815131040182312, 0.007447636711612887]],
    ),
    (3, "mean"): (
        [
            [-0.032683209075767904, -0.016682110314055122, 0.009608775411777987, 0.02997281794378949],
            [-0.044256172701135355, 0.018551976496917706, 0.06991697597810909, 0.07815608943845809],
        ],
        [[0.00911875, -0.01259903, 0.00192767, 1.3327914140693333, -0.004264771136078371]],
    ),
    (3, "weighted"): (
        [
            [0.3477534768819215, 0.3827766298185613, 0.1816971613523008, -0.1314559624911898],
            [0.31135857120523264, 0.40057780080768535, 0.24271436788883294, -0.06485908922314816],
        ],
        [
            [0.01423508, -0.02011575, 0.00350428, 1.8849621610886607, -0.002532243036968529],
            [-0.01897503, 0.00409074, 0.01256105, 0.2340697683943184, -0.15559181272070932],
        ],
    ),
}


@pytest.mark.parametrize("tokens, combine", RECORDED)
def test_equals_the_authors_code(tokens: int, combine: str) -> None:
    logits, gradients = RECORDED[tokens, combine]
    adapter = zoo.adapter("vqt", num_tokens=tokens, combine=combine)
    model = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **SMALL).double()
    fill(dict(model.backbone.named_parameters()))
    queries = model.adapters["vqt"].queries()  # type: ignore[operator]
    with torch.no_grad():
        for q, values in zip(queries, wave((2, tokens, 48), 11, 0.3)):
            q.tokens.copy_(values)
        for q, values in zip(queries, 1 + wave((2, tokens), 3, 0.5)):
            if combine == "weighted":
                q.weights.copy_(values)
        model.head.weight.copy_(wave(tuple(model.head.weight.shape), 2, 0.5))  # type: ignore[union-attr,operator,arg-type]
        model.head.bias.zero_()  # type: ignore[union-attr,operator]
    output = model.eval()(wave((2, 3, 32, 32), 5, 1.5))
    torch.testing.assert_close(output, torch.tensor(logits, dtype=torch.float64), rtol=1e-9, atol=1e-9)

    F.cross_entropy(output, torch.tensor([1, 3])).backward()
    trained = [[q.tokens for q in queries], *([[q.weights for q in queries]] if combine == "weighted" else [])]
    for parameters, expected in zip(trained, gradients):
        found = torch.stack([p.grad for p in parameters]).double()
        summary = [*found.flatten()[:3].tolist(), found.norm().item(), found.sum().item()]
        torch.testing.assert_close(torch.tensor(summary), torch.tensor(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tokens, trained, features", [(1, 9_216, 9_984), (10, 92_160, 92_928), (20, 184_320, 185_088)])
def test_counts_on_vit_b16(tokens: int, trained: int, features: int) -> None:
    model = zoo.load("vit-b16", zoo.adapter("vqt", num_tokens=tokens), num_classes=100, pretrained=False, device="meta")
    assert model.num_parameters(trainable=True, head=False) == trained
    assert model.adapters["vqt"].feature_dim(768) == features  # type: ignore[operator]
    assert tuple(model.head.weight.shape) == (100, features)  # type: ignore[union-attr]


def test_counts_of_head_and_of_swin() -> None:
    model = zoo.load("vit-b16", "vqt", num_classes=100, pretrained=False, device="meta")
    assert model.num_parameters(trainable=True) == 9_216 + 998_500
    pooled = zoo.load("vit-b16", zoo.adapter("vqt", num_tokens=10, combine="mean"), num_classes=2, device="meta")
    assert pooled.head.in_features == 9_984
    swin = zoo.load("swin-t", "vqt", num_classes=2, device="meta")
    depths_and_widths = ((2, 96), (2, 192), (6, 384), (2, 768))
    assert swin.num_parameters(trainable=True, head=False) == sum(n * d for n, d in depths_and_widths) == 4_416
    assert swin.head.in_features == 768 + 4_416


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = zoo.load("vit-micro", zoo.adapter("vqt", num_tokens=20), num_classes=50, pretrained=False)
    bound = math.sqrt(6 / (3 * 4 * 4 + 192))
    tokens = torch.cat([q.tokens for q in model.adapters["vqt"].queries()])  # type: ignore[operator]
    assert tokens.abs().max() <= bound and tokens.abs().max() > 0.999 * bound
    assert abs(tokens.std().item() / (bound / math.sqrt(3)) - 1) < 0.02
    assert abs(model.head.weight.std().item() / math.sqrt(2 / 50) - 1) < 0.02  # type: ignore[union-attr,operator]
    assert torch.allclose(model.head.bias, torch.tensor(-4.595), atol=1e-3)  # type: ignore[union-attr,arg-type]
