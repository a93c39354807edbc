"""DyLoRA: at every rank it is a LoRA of that rank; its draws; what is chosen is saved, merged and cut out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import Stop, StopAt, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.adapters.dylora import Nested
from zoo.adapters.parts.low_rank import LowRank
from zoo.errors import ConfigError, MismatchError


def images() -> Tensor:
    return easy_data(6, seed=5).tensors[0]


def made(**config: Any) -> Any:
    return tiny_model(zoo.adapter("dylora", **{"rank": 4, **config}))


def shake(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.adapters["dylora"].parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.adapters["dylora"]


@pytest.mark.parametrize(("targets", "expected"), [(("q", "v"), 294_912), ("all-linear", 8 * 165_888)])
def test_counts(targets: Any, expected: int) -> None:
    model = zoo.load("vit-b16", zoo.adapter("dylora", targets=targets), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_cut_it_is_lora(rank: int) -> None:
    """Output, gradients and merged weights of a fresh LoRA with alpha and this rank; nothing of the directions behind it."""
    model = made(targets="q,v,down")
    adapter = shake(model)
    adapter.choose(rank)
    other = tiny_model(zoo.adapter("lora", rank=rank, alpha=16.0, targets="q,v,down"))
    lora = other.adapters["lora"]
    names = [p.name for p in adapter.selected(model.points)]
    with torch.no_grad():
        for name in names:
            lora.module_at(name).lora_a.copy_(adapter.module_at(name).lora_a[:rank])
            lora.module_at(name).lora_b.copy_(adapter.module_at(name).lora_b[:, :rank])
    mine, theirs = model(images()), other(images())
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    for name in names:
        a, b = adapter.module_at(name).lora_a.grad, adapter.module_at(name).lora_b.grad
        torch.testing.assert_close(a[:rank], lora.module_at(name).lora_a.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b[:, :rank], lora.module_at(name).lora_b.grad, rtol=1e-5, atol=1e-6)
        assert not a[rank:].any() and not b[:, rank:].any()
    torch.testing.assert_close(model.merge()(images()), theirs, rtol=1e-5, atol=1e-5)
    cut: Any = model.combine({"dylora": 1.0}, name="cut")
    assert cut.method == "lora" and cut.config()["rank"] == rank
    assert sum(p.numel() for p in cut.parameters()) == sum(p.numel() for p in lora.parameters())
    torch.testing.assert_close(model(images()), theirs, rtol=1e-5, atol=1e-5)


def test_the_authors_two_square_roots() -> None:
    """alpha / r times sqrt(r / b) at each factor, of the rank b."""
    torch.manual_seed(0)
    part = Nested(5, 7, 8, 16.0, 0.0, False)
    with torch.no_grad():
        part.lora_b.normal_()
    x = torch.randn(3, 5)
    for b in range(1, 9):
        part.chosen = b
        part.eval()
        root = (8 / b) ** 0.5
        down = x @ (part.lora_a[:b] * root).T
        torch.testing.assert_close(part(x), (16 / 8) * down @ (part.lora_b[:, :b] * root).T)
        torch.testing.assert_close(part(x), x @ part.delta().T)


def test_frozen_trains_the_last_direction_alone() -> None:
    model = made(frozen=True)
    adapter = shake(model).train()
    model.train()
    step = next(s for s in range(99) if adapter.draw(s) == 3)
    adapter.step_start(model, step)
    free = made()
    shake(free).step_start(free, step)
    torch.testing.assert_close(model(images()), free(images()))
    model(images()).square().sum().backward()
    free(images()).square().sum().backward()
    for name, part in adapter.parts().items():
        theirs = free.adapters["dylora"].module_at(name)
        for mine, other in ((part.lora_a.grad, theirs.lora_a.grad), (part.lora_b.grad.T, theirs.lora_b.grad.T)):
            assert mine[2].any() and not mine[[0, 1, 3]].any() and other[:2].any()
            torch.testing.assert_close(mine[2], other[2])


def test_draws() -> None:
    """Every rank equally often, one for all projections, others by another seed, none below min_rank."""

    def draws(count: int, **config: Any) -> list[int]:
        adapter: Any = zoo.adapter("dylora", **config)
        return [adapter.draw(step) for step in range(count)]

    drawn = draws(4000, rank=8)
    counts = torch.bincount(torch.tensor(drawn), minlength=9)
    assert counts[0] == 0 and counts[1:].min() > 430 and counts[1:].max() < 570
    assert drawn != draws(4000, rank=8, seed=1)
    assert set(draws(99, rank=4, min_rank=3)) == {3, 4}
    model = made()
    seen: list[tuple[int, set[float]]] = []

    class Look:
        def after_step(self, model: Any, step: int) -> None:
            parts = model.adapters["dylora"].parts().values()
            seen.append((step, {round(16 / float(p.share[0])) for p in parts}))

    fit(model, easy_data(64), epochs=3, callbacks=[Look()])
    assert seen == [(step, {model.adapters["dylora"].draw(step)}) for step in range(12)]


def test_an_evaluation_sees_the_chosen_rank() -> None:
    """In training, behind it, and if no rank was ever set: all directions, not the first one or the last draw."""
    model = made()
    adapter = model.adapters["dylora"]
    assert adapter.chosen == 4
    seen = []

    class Look:
        def eval_start(self, model: Any) -> None:
            seen.append({int((p.share > 0).sum()) for p in adapter.parts().values()})

    adapter.choose(2)
    fit(model, easy_data(48), easy_data(16, seed=1), epochs=2, callbacks=[Look()])
    assert seen == [{2}, {2}] and {int((p.share > 0).sum()) for p in adapter.parts().values()} == {2}
    with pytest.raises(ConfigError, match="expected a rank of 1 to 4"):
        adapter.choose(5)
    assert adapter.chosen == 2
    with torch.no_grad():
        two = model(images())
        adapter.choose(4)
        assert not torch.equal(model(images()), two)


def test_a_frozen_adapter_keeps_its_rank() -> None:
    model: Any = tiny_model([zoo.adapter("dylora", rank=4), "lora"])
    shake(model).choose(3)
    model.set_active("dylora", "lora", train="lora")
    model.adapters["dylora"].step_start(model, 0)
    assert all(int((p.share > 0).sum()) == 3 for p in model.adapters["dylora"].parts().values())


def test_the_chosen_rank_is_saved(tmp_path: Path) -> None:
    model = made()
    shake(model).choose(2)
    expected = model(images())
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(100)
    again: Any = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    assert again.adapters["dylora"].chosen == 2
    torch.testing.assert_close(again(images()), expected, rtol=0, atol=0)
    again.adapters["dylora"].choose(4)  # all directions are in the file
    model.adapters["dylora"].choose(4)
    assert torch.equal(again(images()), model(images()))
    wrong = zoo.adapter("dylora", rank=4)
    wrong.plan = {"rank": 9}
    with pytest.raises(MismatchError, match="chooses rank 9"):
        tiny_model(wrong)


def test_resume_is_exact(tmp_path: Path) -> None:
    def go(**options: Any) -> dict[str, Tensor]:
        model = made(dropout=0.1)
        fit(model, easy_data(48), easy_data(16, seed=1), epochs=4, checkpoint_every=2, **options)
        return weights(model)

    expected = go()
    with pytest.raises(Stop):
        go(checkpoint=tmp_path, callbacks=[StopAt(5)])
    assert difference(go(checkpoint=tmp_path), expected) == 0


@pytest.mark.parametrize("memory", ["default", "low", "min"])
def test_keeps_what_lora_keeps(memory: str) -> None:
    lora = tiny_model(zoo.adapter("lora", rank=4), memory=memory)
    model = tiny_model(zoo.adapter("dylora", rank=4), memory=memory)
    assert model.saved_bytes(images()) == lora.saved_bytes(images())


def test_small_ranks_work_where_those_of_lora_do_not() -> None:
    """Cut to its first direction, DyLoRA keeps more of what it learned than LoRA does, with either scale of what is left."""
    inputs, targets = easy_data(96, noise=1.0, seed=3).tensors
    losses: dict[str, list[float]] = {}
    for method in ("dylora", "lora"):
        model: Any = tiny_model(zoo.adapter(method, rank=4, alpha=16.0, targets="all-linear"))
        fit(model, easy_data(96, noise=1.0), epochs=12, lr=1e-2)
        model.eval()
        losses[method] = []
        for factor in (1.0, 4.0):  # alpha / 4, as it was trained, and alpha / 1
            with torch.no_grad():
                if method == "dylora":
                    model.adapters["dylora"].choose(1)
                else:
                    for part in model.adapters["lora"].modules():
                        if isinstance(part, LowRank):
                            part.lora_b[:, 1:] = 0
                            part.lora_b *= factor
                losses[method].append(float(torch.nn.functional.cross_entropy(model(inputs), targets)))
    assert max(losses["dylora"]) < min(losses["lora"])


def test_a_broken_fit_leaves_the_chosen_rank() -> None:
    model = made()

    class Draws:
        def after_backward(self, model: Any, step: int) -> None:
            if model.adapters["dylora"].draw(step) != 4:
                raise Stop

    with pytest.raises(Stop):
        fit(model, easy_data(64), epochs=3, callbacks=[Draws()])
    model.eval()
    assert {int((p.share > 0).sum()) for p in model.adapters["dylora"].parts().values()} == {4}


def test_refused_settings() -> None:
    for config, message in (
        ({"rank": 0}, "expected 1 <= min_rank <= rank"),
        ({"min_rank": 9}, "expected 1 <= min_rank <= rank"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("dylora", **config)
