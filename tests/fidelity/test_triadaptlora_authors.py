"""TriAdaptLoRA against numbers recorded from its tuner for peft, and the counts of its mixer.

`triadaptlora.json` was recorded from the tuner of an early peft that names this paper (arXiv 2501.08008): its layer, its product
of blocks, its scores and its `RankAllocator`, 20 steps of Adam on the network, weights and images of `adalora_models`, with its
regulariser (which it leaves out for models whose output has no `.loss`). It starts A alone at random and all else, of new blocks
everything, at 0, from where no gradient leaves: see `test_where_the_tuner_starts_nothing_is_learned`. So A and B are written
down here, for new blocks too (`later`), and the square alone starts at 0. The allocator is called between backward and the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adalora_models import PLACES, RATE, SHAPE, TOTAL, backbone, batch, loss, numbers, start
from torch import Tensor

import zoo
from zoo.adapters.parts.triangular import NAMES
from zoo.train import training_hooks

RECORDED = json.loads((Path(__file__).parent / "triadaptlora.json").read_text())
SETTINGS: dict[str, Any] = {"rank": 2, "target_rank": 5, "added": 3, "tinit": 2, "interval": 3}


def later(place: str, number: int, dim_out: int, dim_in: int) -> tuple[Tensor, Tensor]:
    """B (o, 3) and A (3, i) of the block `number`."""
    seed = 9000 + 200 * sorted(PLACES.values()).index(place) + 2 * number
    return 0.1 * numbers(seed, dim_out, 3), 0.1 * numbers(seed + 1, 3, dim_in)


def ours(**settings: Any) -> zoo.Model:
    """The same network with our adapter, its first blocks as written down."""
    model = zoo.load("vit-micro", pretrained=False, num_classes=4, **SHAPE)
    theirs = backbone().state_dict()
    model.head.load_state_dict({"weight": theirs.pop("head.weight"), "bias": theirs.pop("head.bias")})
    model.backbone.load_state_dict(theirs)
    adapter = model.add_adapter(zoo.adapter("triadaptlora", targets=("o", "up", "down"), **SETTINGS, **settings))
    model.head.requires_grad_(False)
    with torch.no_grad():
        for point, place in PLACES.items():
            part: Any = adapter.module_at(point)
            b, a = start(place, *model.points[point].weight.shape)
            part.lora_b.copy_(b[:, :2])
            part.lora_a.copy_(a[:2])
    return model.train()


@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_the_tuner_s_run(growth: str) -> None:
    """Loss, scores, every growth, gradients of every block, and the network in the end."""
    recorded, model = RECORDED[growth], ours(growth=growth)
    adapter: Any = model.adapters["triadaptlora"]
    parts = [adapter.module_at(point) for point in PLACES]
    hooks = training_hooks(model)
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=RATE)
    hooks.fit_start(optimizer, TOTAL)
    known = dict.fromkeys(PLACES, 1)
    for t in range(TOTAL):
        images, targets = batch(t)
        outputs = model(images)
        total = loss(outputs, targets) + hooks.extra_loss(outputs, targets)
        total.backward()
        assert total.item() == pytest.approx(recorded["loss"][t], rel=1e-5), t
        if t == 10:
            for part, place in zip(parts, PLACES.values()):
                for name, expected in zip(NAMES, recorded["gradients"][place]):
                    found = [float(p.grad.norm()) for p in part.all(name)]
                    assert found == pytest.approx(expected, rel=1e-4), (place, name)
        before = adapter.get_buffer("sizes").clone() if adapter.schedule else None
        scores = [part.size() for part in parts]
        hooks.after_backward(t)
        assert (str(t) in recorded["ranks"]) == (t in [step for step, _ in adapter.grown])
        if str(t) in recorded["ranks"]:
            found = (torch.stack(scores) - before).tolist()
            assert found == pytest.approx(recorded["scores"][str(t)], rel=1e-4, abs=1e-7)
            assert [part.rank for part in parts] == recorded["ranks"][str(t)]
        for point, part in zip(PLACES, parts):
            for number in range(known[point], len(part.all("lora_a"))):
                b, a = later(PLACES[point], number, len(part.lora_b), part.lora_a.shape[1])
                with torch.no_grad():
                    part.all("lora_b")[number].copy_(b)
                    part.all("lora_a")[number].copy_(a)
                known[point] = number + 1
        optimizer.step()
        hooks.after_step(t)
        optimizer.zero_grad(set_to_none=True)
    hooks.fit_end()
    with torch.no_grad():
        logits = model.eval()(batch(99)[0])
        torch.testing.assert_close(logits, torch.tensor(recorded["logits"]), rtol=1e-4, atol=1e-5)
        for part, place in zip(parts, PLACES.values()):
            assert float(part.delta().norm()) == pytest.approx(recorded["squares"][place], rel=1e-4)


def test_where_the_tuner_starts_nothing_is_learned() -> None:
    """B = C = 0: a saddle. With a second block of zeros, as it adds them, that block never learns either."""
    model = ours()
    adapter: Any = model.adapters["triadaptlora"]
    images, targets = batch(0)
    with torch.no_grad():
        for part in adapter.parts().values():
            part.lora_b.zero_()
    loss(model(images), targets).backward()
    assert all(not p.grad.any() for part in adapter.parts().values() for p in part.parameters())
    model = ours()
    adapter = model.adapters["triadaptlora"]
    with torch.no_grad():
        for name, part in adapter.parts().items():
            part.lora_low.normal_()
            adapter.extend(name, 3)
            part.lora_a1.zero_()
            part.lora_b1.zero_()
    loss(model(images), targets).backward()
    for part in adapter.parts().values():
        assert part.lora_a.grad.any() and not part.lora_a1.grad.any() and not part.lora_b1.grad.any()
        assert not part.lora_low1.grad.any() and not part.lora_up1.grad.any()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [((1, 4), 42), ((1, 4, 4), 114), ((4, 4), 8**2 + 4 * 8), ((2, 2, 2), 6**2 + 2 * 6), ((1, 1, 1), 3**2 + 3)],
)
def test_counts_of_the_mixer(blocks: tuple[int, ...], expected: int) -> None:
    """L and U: 2 + 2 a m + a^2 m (m + 1) for r0 = 1 and m blocks of a; r^2 + a r for equal blocks."""
    model = zoo.load("vit-b16", num_classes=0, device="meta")
    adapter: Any = model.add_adapter(
        zoo.adapter("triadaptlora", rank=blocks[0], target_rank=16, targets="blocks.0.attn.q")
    )
    for count in blocks[1:]:
        adapter.extend("blocks.0.attn.q", count)
    assert adapter.ranks() == {"blocks.0.attn.q": sum(blocks)}
    assert model.num_parameters(trainable=True, head=False) == sum(blocks) * 1536 + expected
    if blocks[0] == 1 and len(set(blocks[1:])) == 1:
        a, m = blocks[1], len(blocks) - 1
        assert expected == 2 + 2 * a * m + a**2 * m * (m + 1)


@pytest.mark.parametrize(
    ("name", "expected", "points"),
    [("vit-b16", 165_888, 72), ("swin-t", 79_488, 72), ("swin-b", 216_576, 144), ("clip-vit-b16", 276_480, 144)],
)
def test_counts(name: str, expected: int, points: int) -> None:
    """At the start: i + o, and one number in L and one in U, of every projection."""
    if name.startswith("clip"):
        pytest.importorskip("open_clip")
    model = zoo.load(name, "triadaptlora", pretrained=False, device="meta", num_classes=0)
    assert model.num_parameters(trainable=True, head=False) == expected + 2 * points
