"""SPT: scores, and the choice within a budget. See also test_spt.py and tests/fidelity/test_spt_authors.py."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spt_models import IMAGES, batches, both, build, calibrated, snapshot
from torch import Tensor
from torch.nn.functional import cross_entropy

import zoo
from vision.adapters.parts.sensitivity import Candidate, candidates, choose, grid, sensitivity, spend
from zoo.adapters.parts.highest import highest
from zoo.errors import DataError
from zoo.tasks import Custom
from zoo.tasks.multilabel import MultiLabel

# -- scores -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("memory", ["default", "min"])
def test_scores_are_squared_gradients_of_batch_means(family: str, memory: str) -> None:
    model = build(family, memory=memory)
    found = candidates(model.points, "lora", 4, 10, 5)
    for parameter in model.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.train()
    before = snapshot(model)
    scores, count, samples = sensitivity(model, found, iter(batches(4)), 3)
    assert (count, samples) == (3, 12)
    assert all(a[:2] == b[:2] and a[2] is b[2] and a[3] == b[3] for a, b in zip(before, snapshot(model)))

    plain = model.eval().merge()
    expected = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for inputs, targets in batches(3):
        loss = cross_entropy(plain(inputs), targets)
        for name, grad in zip(expected, torch.autograd.grad(loss, list(plain.parameters()))):
            expected[name] += grad**2
    for candidate, score in zip(found, scores):
        whole = expected[f"{candidate.point.path}.{candidate.part}"]
        if candidate.point.name.rpartition(".")[2] in "qkv":
            whole = whole.chunk(3)["qkv".index(candidate.point.role)]
        torch.testing.assert_close(score, whole.flatten(), rtol=1e-4, atol=1e-12)


@both
def test_candidates(family: str) -> None:
    model = build(family)
    found = candidates(model.points, "lora", 4, 10, 5)
    keys = {c.key for c in found}
    assert not [k for k in keys if "patch_embed" in k or "merge" in k]
    assert {"norm.weight", "norm.bias"} <= keys
    # everything but the embedding (with its tokens), merging, tables of positions and the head
    out = ("patch_embed", "downsample", "token", "pos_embed", "relative_position")
    rest = [p.numel() for n, p in model.backbone.named_parameters() if not any(o in n for o in out)]
    assert sum(c.size for c in found) == sum(rest)


def test_unit_costs() -> None:
    points = zoo.load("vit-b16", pretrained=False, num_classes=0, device="meta").points
    costs = {form: {c.key: c.cost for c in candidates(points, form, 8, 10, 5)} for form in ("lora", "adapter")}
    name = "blocks.3.attn.q.weight", "blocks.3.attn.o.weight", "blocks.3.mlp.up.weight", "blocks.3.mlp.down.weight"
    assert [costs["lora"][n] for n in name] == [12_288, 12_288, 30_720, 30_720]
    assert [costs["adapter"][n] for n in name] == [13_064, 13_064, 52_232, 13_064]
    assert sum(c.size for c in candidates(points, "lora", 8, 10, 5)) == 12 * 7_087_872 + 2 * 768


@pytest.mark.parametrize(
    ("inputs", "targets", "match"),
    [
        (IMAGES, torch.tensor([0, 1, 2, 5]), "run from 0 to 5; the head has 5"),
        (IMAGES * float("nan"), torch.arange(4), "loss of calibration batch 1 is nan"),
        (None, None, "no batch"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(inputs: Tensor | None, targets: Tensor, match: str) -> None:
    model = build()
    adapter = model.add_adapter(zoo.adapter("spt", budget=0.004))
    model.train()
    before, logits = snapshot(model), model(IMAGES)
    with pytest.raises(DataError, match=match):
        adapter.calibrate(model, [] if inputs is None else [(inputs, targets)])
    assert snapshot(model) == before and adapter.plan is None
    assert torch.equal(model(IMAGES), logits)


# -- the choice -------------------------------------------------------------------------------------------------------


def test_the_highest_scores_in_order() -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 50, n).astype(np.float32) for n in (700, 10, 300, 2000, 1, 500)]  # many equal scores
    flat = np.concatenate(arrays)
    owners = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
    places = np.concatenate([np.arange(len(a)) for a in arrays])
    order = np.lexsort((np.arange(len(flat)), -flat))
    for count in (1, 9, 350, 1000, len(flat), len(flat) + 5):
        owner, place = highest([torch.from_numpy(a) for a in arrays], count)
        assert np.array_equal(owner.numpy(), owners[order[:count]])
        assert np.array_equal(place.numpy(), places[order[:count]])


def brute_force(scores: list[np.ndarray], found: list[Candidate], budget: int, fixed: int, taus: list[int]) -> Any:
    """The rule of the paper's code, told again in numpy over one long sorted vector."""
    flat = np.concatenate(scores)
    edges = np.cumsum([0] + [len(s) for s in scores])
    best = None
    for tau in taus:
        mask = np.zeros(len(flat), dtype=bool)
        mask[np.argsort(-flat, kind="stable")[:tau]] = True
        total, kinds = fixed, []
        for c, a, b in zip(found, edges, edges[1:]):
            hits = int(mask[a:b].sum())
            matrix = "norm" not in c.key and c.part == "weight"
            price = 4 * (c.point.dim_in + c.point.dim_out) if matrix else len(mask[a:b])
            if hits >= price / (10 if matrix else 5):
                total, kinds = total + price, [*kinds, "whole"]
            else:
                total, kinds = total + hits, [*kinds, hits]
        if best is None or abs(total - budget) <= abs(best[1] - budget):
            best = (tau, total, kinds)
    return best


@pytest.mark.parametrize("budget", [500, 1_700, 2_900, 4_000, 10**6])
def test_the_rule(budget: int) -> None:
    model = build()
    found = candidates(model.points, "lora", 4, 10, 5)
    random = np.random.default_rng(budget)
    scores = [(random.gamma(0.3, size=c.size) * random.gamma(0.5)).astype(np.float32) for c in found]
    taus = grid(budget, sum(c.size for c in found))
    owner, _ = highest([torch.from_numpy(s) for s in scores], taus[-1])
    tau, hits = choose(owner, found, budget, 48, taus)
    whole, total = spend(hits, found, 48)
    expected = brute_force(scores, found, budget, 48, taus)
    assert (tau, total) == expected[:2]
    assert ["whole" if w else n for w, n in zip(whole, hits)] == expected[2]


def test_the_grid_is_the_authors_from_04_million_on() -> None:
    theirs = [20_000 * k for k in range(1, 80)]
    assert grid(400_000, 10**8) == grid(600_000, 10**8) == grid(1_000_000, 10**8) == theirs
    assert grid(400_000, 50_000) == [20_000, 40_000, 50_000]
    assert grid(100_000, 10**8)[:3] == [5_000, 10_000, 15_000]
    assert grid(3_000_000, 10**8)[-1] == 4_740_000


def test_the_choice_depends_on_the_head_and_on_nothing_else() -> None:
    plans = [calibrated(build(seed=seed)).plan for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("kind", ["multilabel", "regression", "focal"])
def test_sensitivity_is_that_of_the_task(kind: str) -> None:
    """By `zoo.fit` and by hand: the scores are squared gradients of the task's own loss."""
    torch.manual_seed(0)
    model = zoo.load("vit-micro", "spt", num_classes=3, pretrained=False, embed_dim=48, depth=2, num_heads=3)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = torch.rand(8, 3, generator=torch.Generator().manual_seed(2))
    losses: dict[str, Any] = {
        "multilabel": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
        "focal": lambda z, t: (
            (t - z.sigmoid()).square() * F.binary_cross_entropy_with_logits(z, t, reduction="none")
        ).mean(),
    }
    task = MultiLabel() if kind == "multilabel" else Custom(losses[kind])
    found = candidates(model.points, "lora", 8, 10, 5)
    scores, _, _ = sensitivity(model, found, [(images, wanted)], 1, task)
    model.requires_grad_(True)
    losses[kind](model(images), wanted).backward()
    for candidate, score in zip(found, scores):
        module, part = candidate.slot
        gradient = candidate.slice(module._parameters[part].grad)  # type: ignore[union-attr,arg-type]
        torch.testing.assert_close(score, gradient.square(), rtol=1e-4, atol=1e-12)
    model.requires_grad_(False)

    rows = torch.utils.data.TensorDataset(images, wanted)
    options: dict[str, Any] = {"task": "multilabel"} if kind == "multilabel" else {"loss": losses[kind]}
    by_fit = zoo.load(
        "vit-micro",
        zoo.adapter("spt", budget=0.02, num_batches=1),
        num_classes=3,
        pretrained=False,
        embed_dim=48,
        depth=2,
        num_heads=3,
    )
    by_hand = copy.deepcopy(by_fit)
    zoo.fit(by_fit, rows, epochs=1, batch_size=8, seed=0, **options)
    by_hand.adapters["spt"].calibrate(by_hand, [(images, wanted)], task=task)  # type: ignore[operator]
    assert by_fit.adapters["spt"].plan == by_hand.adapters["spt"].plan
