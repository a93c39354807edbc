"""LT-SFT against the authors' code (cambridgeltl/composable-sft), and the count on ViT-B/16.

`lt_sft.json` holds what their `LotteryTicketSparseFineTuner` gives around a loop of AdamW (no weight decay, linear schedule,
gradients clipped to 1) on a small ViT whose parameters and images are set by `value` below, in float64: which entries its mask
has, by how much each has moved at the end, the losses of its second phase. None of their code is here.

Their L1 term does nothing: the start values that it measures from are copies that still hang on the trained parameters, so the
two gradients cancel, and a run with lambda = 0.1 gives the same numbers to the bit (recorded, too). Ours is held to a full
fine-tuning written out here.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import zoo
from zoo.adapters.lt_sft import LTSFT
from zoo.adapters.parts.moved import linear_slots, moved
from zoo.tasks.resolve import resolve

FILE = Path(__file__).parent / "lt_sft.json"
SIZE = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
K, EPOCHS, LR = 120, 3, 2e-3


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values that belong to a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    std = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return torch.from_numpy(("norm" in name and name.endswith("weight")) + std * random.standard_normal(shape))


def build() -> zoo.Model:
    model = zoo.load("vit-micro", pretrained=False, num_classes=5, dtype=torch.float64, **SIZE)
    named = [*model.backbone.named_parameters(), *((f"head.{n}", p) for n, p in model.head.named_parameters())]
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(value(name, tuple(parameter.shape)))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    random = np.random.RandomState(7)
    shape = (4, 3, 16, 16)
    return [
        (torch.from_numpy(random.standard_normal(shape)), torch.from_numpy(random.randint(0, 5, 4))) for _ in range(2)
    ]


def candidates(model: zoo.Model) -> list[str]:
    """Their `maskable_params`: the library's names of what ours chooses from."""
    return list(dict.fromkeys(f"{slot.point.path}.{slot.part}" for slot in linear_slots(model.points)))


def phase_two(model: zoo.Model) -> list[float]:
    """The loop with which theirs was recorded."""
    parameters = model.parameters_to_train()
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    losses, total = [], EPOCHS * len(batches())
    model.train()
    for step in range(total):
        inputs, targets = batches()[step % len(batches())]
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.param_groups[0]["lr"] = LR * (1 - step / total)
        optimizer.step()
    return losses


def test_the_same_entries_move_by_the_same() -> None:
    theirs = json.loads(FILE.read_text())
    assert (
        theirs["count"] == K and theirs["same_with_l1_of_0.1"]
    )  # no two entries tie with the K-th here: theirs would take them all
    model = build()
    start = {n: p.clone() for n, p in model.backbone.state_dict().items()}
    head = {n: p.clone() for n, p in model.head.state_dict().items()}
    adapter = model.add_adapter(LTSFT(entries=K, full_epochs=EPOCHS, full_lr=LR))
    adapter.calibrate(model, batches())
    assert all(torch.equal(p, start[n]) for n, p in model.backbone.state_dict().items())  # rewound to the bit
    assert all(torch.equal(p, head[n]) for n, p in model.head.state_dict().items())
    assert adapter.plan is not None and adapter.plan["report"]["numbers"] == theirs["parameters"]
    assert model.num_parameters(trainable=True, head=False) == K

    losses = phase_two(model)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs["losses"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.head.weight.flatten()[:6], torch.tensor(theirs["head"], dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    merged = model.eval().merge().state_dict()
    for name in candidates(model):
        change = (merged[name] - start[name]).flatten()
        own = theirs["entries"].get(name, {"index": [], "value": []})
        expected = torch.zeros_like(change)
        expected[own["index"]] = torch.tensor(own["value"], dtype=torch.float64)
        assert change.nonzero()[:, 0].tolist() == own["index"]
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


def test_l1_in_both_phases() -> None:
    """Phase 1 against plain full fine-tuning of the library's module; phase 2 against the closed form of the gradient."""
    l1, model = 2000.0, build()
    plain, head = copy.deepcopy(model.backbone), copy.deepcopy(model.head)
    names = candidates(model)
    start = {n: plain.get_parameter(n).detach().clone() for n in names}
    trained = [*(plain.get_parameter(n) for n in names), *head.parameters()]
    numbers = sum(p.numel() for p in [*plain.parameters(), *head.parameters()])
    plain.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    total = EPOCHS * len(batches())
    for step in range(total):
        inputs, targets = batches()[step % len(batches())]
        distance = sum((plain.get_parameter(n) - start[n]).abs().sum() for n in names)
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(head(plain(inputs)), targets) + l1 * distance / numbers).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = LR * (1 - step / total)
        optimizer.step()

    slots = linear_slots(model.points)
    changes, report = moved(model, slots, batches(), resolve(model, None), epochs=EPOCHS, lr=LR, l1=l1 / numbers)
    assert report["steps"] == total
    free, _ = moved(model, slots, batches(), resolve(model, None), epochs=EPOCHS, lr=LR)
    assert sum(c.sum() for c in changes) < 0.9 * sum(c.sum() for c in free)
    for slot, change in zip(slots, changes, strict=True):
        name = f"{slot.point.path}.{slot.part}"
        expected = slot.slice((plain.get_parameter(name).detach() - start[name]).abs())
        if slot.key.endswith("k.bias"):  # has no gradient but rounding, on whose sign L1 depends
            continue
        torch.testing.assert_close(change.double(), expected, rtol=1e-5, atol=1e-6)

    adapter = model.add_adapter(LTSFT(entries=K, full_epochs=1, full_lr=LR, l1=l1))
    adapter.calibrate(model, batches())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(value("delta", tuple(parameter.shape)))
    extra = adapter.extra_loss(model, torch.zeros(1), torch.zeros(1))
    assert extra is not None
    found = torch.autograd.grad(extra, list(adapter.parameters()))
    for parameter, gradient in zip(adapter.parameters(), found):
        torch.testing.assert_close(gradient, l1 / numbers * parameter.detach().sign())


def test_count_on_vit_b16() -> None:
    model = zoo.load("vit-b16", pretrained=False, num_classes=0, device="meta")
    assert LTSFT().budget(model) == 857_986
    assert sum(slot.size for slot in linear_slots(model.points)) == 84_934_656 + 82_944
    adapter = LTSFT()
    adapter.plan = {
        "entries": {"blocks.0.mlp.up.weight": 857_000, "blocks.3.attn.q.bias": 768, "blocks.3.attn.v.weight": 218}
    }
    model.add_adapter(adapter)
    assert model.num_parameters(trainable=True) == 857_986
