"""NOAH: slices that are networks of their own, a supernet that draws its steps, and what is refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from vision.adapters.parts.subnets import Space
from zoo.errors import ConfigError

SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 8, "patch_size": 4}
SIZES = {"prompts": (2, 1, 0, 0), "lora": (3, 1, 2, 3), "adapter": (1, 0, 0, 0)}


def build(**config: Any) -> Any:
    torch.manual_seed(0)
    whole = {"prompts": 3, "lora": 3, "adapter": 3, **config}
    return zoo.load("vit-micro", zoo.adapter("noah", **whole), num_classes=3, pretrained=False, **SMALL).eval()


@torch.no_grad()
def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.adapters["noah"].parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_a_slice_is_the_sub_network_alone() -> None:
    supernet, alone = build(widths=(1, 2, 3)), build(**SIZES)
    shake(supernet)
    alone.adapters["noah"].inherit(supernet.adapters["noah"])
    alone.head.load_state_dict(supernet.head.state_dict())
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        whole = supernet(images)
        supernet.adapters["noah"].choose(SIZES)
        torch.testing.assert_close(supernet(images), alone(images), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(whole, alone(images), atol=1e-3)
        supernet.adapters["noah"].choose(None)  # in evaluation nothing of the other one is kept
        assert torch.equal(supernet(images), whole)
    assert supernet.adapters["noah"].cost(SIZES) == alone.num_parameters(trainable=True, head=False)
    assert "blocks.2.tokens.prompt" not in alone.adapters["noah"].state_dict()


def test_a_choice_is_saved_and_copied(tmp_path: Path) -> None:
    supernet = build(widths=(1, 2, 3))
    shake(supernet)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        whole = supernet(images)
        supernet.adapters["noah"].choose(SIZES)
        expected = supernet(images)
        assert not torch.allclose(whole, expected, atol=1e-3)
        supernet.save_adapter(tmp_path / "out")
        torch.manual_seed(0)
        assert torch.equal(zoo.load(adapter=tmp_path / "out", pretrained=False).eval()(images), expected)
        assert torch.equal(copy.deepcopy(supernet)(images), expected)
        other = build(widths=(1, 2, 3))
        other.load_state_dict(supernet.state_dict())
        assert torch.equal(other.eval()(images), expected)
        with pytest.raises(zoo.ZooError, match="chosen differently"):  # numbers of another choice are not mixed
            supernet.adapter_state("noah") + build(widths=(1, 2, 3)).adapter_state("noah")
        supernet.copy_adapter("noah", "two", activate=False)
        supernet.set_active("two")
        assert torch.equal(supernet(images), expected)
        supernet.adapters["two"].choose(None)
        assert torch.equal(supernet(images), whole)


def test_each_step_trains_the_slices_that_it_drew() -> None:
    model = build(widths=(1, 2), depths=(0.5, 1.0), seed=3).train()
    adapter = model.adapters["noah"]
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4) % 3
    drawn = []
    for step in range(6):
        adapter.step_start(model, step)
        sizes = {part: [m.now for _, m in adapter.modules_of() if m.part == part] for part in ("prompts", "adapter")}
        drawn.append(str(sizes))
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        for block in range(4):
            module = adapter.module_at(f"blocks.{block}.tokens")
            grad = module.prompt.grad
            assert (module.now == 0) == (grad is None or not grad.any())
            assert grad is None or not grad[module.now :].any()
    assert len(set(drawn)) > 3
    again = build(widths=(1, 2), depths=(0.5, 1.0), seed=3).adapters["noah"]
    again.step_start(model, 5)  # a run that goes on draws what an unbroken one drew
    assert [m.now for _, m in again.modules_of()] == [m.now for _, m in adapter.modules_of()]
    adapter.eval_start(model)
    assert all(m.now == m.width for _, m in adapter.modules_of())


def test_drawing_mutating_and_crossing() -> None:
    space = Space(("prompts", "lora"), 8, (1, 5), (2, 4, 8))
    source = random.Random(0)
    drawn = [space.draw(source) for _ in range(200)]
    for sizes in drawn:
        for widths in sizes.values():
            depth = sum(1 for w in widths if w)
            assert depth in (2, 4, 8) and len(widths) == 8 and set(widths[:depth]) <= {1, 5} and not any(widths[depth:])
    changed = 0
    for sizes in drawn:
        mutant = space.mutate(sizes, source, 0.2, 0.4)
        for part in space.parts:
            shared = min(sum(map(bool, sizes[part])), sum(map(bool, mutant[part])))
            assert mutant[part][:shared] == sizes[part][:shared]  # widths that are there stay
            changed += mutant[part] != sizes[part]
    assert 5 < changed < 70  # 400 parts, of which 0.08 get a depth, a third of the time their own
    one, other = drawn[0], drawn[1]
    for _ in range(20):
        child = space.cross(one, other, source)
        assert all(child[part] in (one[part], other[part]) for part in space.parts)
    assert space.smallest == {"prompts": (1, 1, *[0] * 6), "lora": (1, 1, *[0] * 6)}


def test_refused() -> None:
    for config, message in (
        ({"prompts": -1}, "prompts is -1"),
        ({"prompts": 0, "lora": 0, "adapter": 0}, "nothing to train"),
        ({"widths": ()}, "widths is"),
        ({"widths": (1, 4)}, "widths go up to 4"),
        ({"widths": (1, 2), "lora": (3, 3, 3, 3)}, "as wide in all blocks"),
        ({"depths": (0.0,)}, "depths is"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"lora": (1, 2, 3)}, "lora has 3 sizes, and the backbone has 4 blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**config)
    adapter = build(widths=(1, 2, 3)).adapters["noah"]
    with pytest.raises(ConfigError, match="expected at most"):
        adapter.choose({"prompts": (4, 0, 0, 0)})
    with pytest.raises(ConfigError, match="prompts of the sub-network is 2; expected"):
        adapter.choose({"prompts": 2})
    with pytest.raises(ConfigError, match="expected sizes by part"):
        adapter.choose({"prompt": (1, 1, 1, 1)})
    with pytest.raises(ConfigError, match="it is no supernet"):
        build().adapters["noah"].space  # noqa: B018
