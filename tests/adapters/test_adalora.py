"""AdaLoRA: its forward by hand, its budget in fits of every length, what is left of it, and exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import Stop, StopAt, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.adapters.parts.budget import Schedule, kept, steps_of
from zoo.adapters.parts.triplets import Triplets
from zoo.errors import ConfigError
from zoo.train import training_hooks

SMALL: dict[str, Any] = {"rank": 4, "target_rank": 2}


def images() -> Tensor:
    return easy_data(6, seed=5).tensors[0]


def adapter_of(model: zoo.Model) -> Any:
    return model.adapters["adalora"]


def test_forward_by_hand() -> None:
    torch.manual_seed(0)
    part = Triplets(5, 7, 3, 0.5)
    x = torch.randn(2, 4, 5)
    assert torch.equal(part(x), torch.zeros(2, 4, 7))
    with torch.no_grad():
        part.lora_e.copy_(torch.tensor([1.0, -2.0, 0.5]))
    delta = 0.5 * sum(e * torch.outer(p, q) for p, e, q in zip(part.lora_p.T, part.lora_e, part.lora_q))
    torch.testing.assert_close(part(x), x @ delta.T)
    torch.testing.assert_close(part.delta(), delta)
    model = tiny_model(zoo.adapter("adalora", **SMALL, alpha=8.0))
    live = adapter_of(model).module_at("blocks.1.mlp.down")
    assert live.scale == pytest.approx(2.0, rel=1e-5)
    with torch.no_grad():
        live.lora_e.normal_()
    module, x = model.backbone.blocks[1].mlp.fc2, torch.randn(3, 96)
    expected = torch.nn.functional.linear(x, module.weight + live.delta(), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_by_hand() -> None:
    """Those of plain autograd through the changed weight."""
    torch.manual_seed(0)
    part = Triplets(5, 4, 3, 0.7).double()
    with torch.no_grad():
        part.lora_e.normal_()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, part.lora_p, part.lora_e, part.lora_q)
    mine = Triplets.add_group(((part, 2, 6),), x, torch.zeros(6, 8, dtype=torch.float64) + 0 * x.sum())
    plain = torch.cat([torch.zeros(6, 2), x @ part.delta().T, torch.zeros(6, 2)], -1)
    torch.testing.assert_close(mine, plain)
    for a, b in zip(*(torch.autograd.grad(y.pow(2).sum(), inputs) for y in (mine, plain)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory", ["default", "low", "min"])
def test_keeps_what_lora_keeps(memory: str) -> None:
    lora = tiny_model(zoo.adapter("lora", rank=4, targets="all-linear"), memory=memory)
    model = tiny_model(zoo.adapter("adalora", **SMALL), memory=memory)
    assert model.saved_bytes(images()) == lora.saved_bytes(images())


@pytest.mark.parametrize("total", [*range(1, 25), 100, 301, 3000])
def test_any_length_reaches_the_budget(total: int) -> None:
    """With the default fractions; something was measured before the first pruning."""
    schedule = Schedule(48, 24, total, steps_of(1 / 6, total), steps_of(1 / 2, total), max(1, steps_of(1 / 300, total)))
    schedule.check("adalora")
    budgets = [schedule.budget(t) for t in range(total)]
    assert budgets == sorted(budgets, reverse=True) and schedule.measures(0)
    assert schedule.is_final(total - 1) and schedule.prunes(total - 1)
    for t in range(total):
        assert schedule.budget(t) >= 24 and (not schedule.is_final(t) or schedule.prunes(t))
        if schedule.is_final(t):
            assert t == total - 1 or schedule.budget(t) == 24


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_fits_of_every_length(steps: int) -> None:
    model = tiny_model(zoo.adapter("adalora", **SMALL))
    report = fit(model, easy_data(40), steps=steps, lr=1e-2)
    ranks = adapter_of(model).ranks()
    assert len(ranks) == 12 and 0 < sum(ranks.values()) <= 24
    assert report.parameters == model.num_parameters(trainable=True) == sum(p.numel() for p in weights(model).values())
    assert [b for b, _ in adapter_of(model).named_buffers()] == []


def test_what_is_left(tmp_path: Path) -> None:
    """Outputs stay, ranks are real, on disk too; merged it is a plain network; a second fit prunes nothing more."""
    model = tiny_model(zoo.adapter("adalora", rank=6, target_rank=1))
    adapter = adapter_of(model)
    seen = {}

    class Watch:
        def epoch_end(self, model: zoo.Model, epoch: int) -> None:
            seen["logits"], seen["rank"] = (
                model.eval()(images()),
                sum((p.lora_e != 0).sum() for p in adapter.parts().values()),
            )
            model.train()

    report = fit(model, easy_data(64), epochs=6, lr=2e-2, callbacks=[Watch()])
    ranks = adapter.ranks()
    assert sum(ranks.values()) == seen["rank"] == 12 and max(ranks.values()) > 1 and min(ranks.values()) == 0
    logits = model(images())
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-6, atol=1e-6)
    sizes = {p.name: p.dim_in + p.dim_out + 1 for p in model.points.select(kind="linear")}
    count = sum(r * sizes[name] for name, r in ranks.items())
    assert model.num_parameters(trainable=True, head=False) == count == report.parameters - 100
    assert model.probe(images()) == []
    torch.testing.assert_close(model.merge()(images()), logits, rtol=1e-5, atol=1e-5)
    model.save_adapter(tmp_path)
    torch.manual_seed(100)
    again = zoo.load(adapter=tmp_path, pretrained=False)
    assert torch.equal(again(images()), logits) and adapter_of(again).ranks() == ranks
    assert adapter_of(again).config() == adapter.config()
    before = weights(again)
    fit(again, easy_data(64), epochs=1)
    assert adapter_of(again).ranks() == ranks and difference(weights(again), before) > 0


def test_a_projection_without_triplets() -> None:
    """It is passed by: alone, beside others of one fused projection, routed, compiled."""
    model = tiny_model(zoo.adapter("adalora", **SMALL))
    other = model.add_adapter(zoo.adapter("adalora", **SMALL), "other", activate=False)
    for a in (adapter_of(model), other):
        with torch.no_grad():
            for p in a.parameters():
                p.add_(0.1 * torch.randn(p.shape))
    gone = [n for n, _ in adapter_of(model).named_parameters() if n.startswith(("blocks.0.attn.k", "blocks.1.mlp.up"))]
    with torch.no_grad():
        for name in ("blocks.0.attn.k", "blocks.1.mlp.up"):
            adapter_of(model).module_at(name).lora_e.zero_()
    expected = model(images())
    adapter_of(model).drop(*gone)
    assert len(gone) == 6 and adapter_of(model).ranks()["blocks.0.attn.k"] == 0
    torch.testing.assert_close(model(images()), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.merge()(images()), expected, rtol=1e-5, atol=1e-5)
    routed = model(images(), adapters=["adalora", "other", None, "adalora", "other", "adalora"])
    torch.testing.assert_close(routed[[0, 3, 5]], expected[[0, 3, 5]], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_an_evaluation_sees_the_budget_and_leaves_no_trace() -> None:
    def trained(evaluates: bool) -> tuple[list[Tensor], list[int]]:
        model = tiny_model(zoo.adapter("adalora", **SMALL, interval=5))
        adapter, seen = adapter_of(model), []

        class Look:
            def step_end(self, model: zoo.Model, step: int) -> None:
                hooks = training_hooks(model)
                if evaluates and step % 2:
                    with hooks.evaluation():
                        seen.append(sum(int((p.lora_e != 0).sum()) for p in adapter.parts().values()))
                    assert seen[-1] <= adapter.schedule.budget(step)

        fit(model, easy_data(64), epochs=6, lr=1e-2, callbacks=[Look()])
        return list(weights(model).values()), seen

    (a, _), (b, seen) = trained(False), trained(True)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert seen[0] == 48 and 24 < seen[4] < 48 and seen[-1] == 24


@pytest.mark.parametrize("stop", [0, 3, 8, 13])
def test_resume_is_exact(tmp_path: Path, stop: int) -> None:
    """Cut off in warm-up, middle and final phase, with dropout and a choice among epochs."""

    def go(**options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, int]]:
        model = tiny_model(zoo.adapter("adalora", **SMALL, dropout=0.1, interval=3))
        settings = {"epochs": 5, "checkpoint_every": 2, "keep": "best", "lr": 1e-2, **options}
        report = fit(model, easy_data(48, noise=2), easy_data(16, seed=1), **settings)
        history = [{k: v for k, v in h.items() if "second" not in k} for h in report.history]
        return history, weights(model), adapter_of(model).ranks()

    history, expected, ranks = go()
    with pytest.raises(Stop):
        go(checkpoint=tmp_path, callbacks=[StopAt(stop)])
    again, final, same = go(checkpoint=tmp_path)
    assert again == history and same == ranks and difference(final, expected) == 0
    loaded, final, same = go(checkpoint=tmp_path)  # a finished run is only loaded
    assert loaded == history and same == ranks and difference(final, expected) == 0


def test_nothing_to_prune() -> None:
    model = tiny_model(zoo.adapter("adalora", rank=2, target_rank=2, orthogonality=0))
    report = fit(model, easy_data(32), epochs=1)
    assert adapter_of(model).ranks() == dict.fromkeys(adapter_of(model).ranks(), 2)
    assert "extra_loss" not in report.history[0] and adapter_of(model).plan is None


def test_a_frozen_one_is_left_alone() -> None:
    """Another adapter is trained beside it."""
    model = tiny_model([zoo.adapter("adalora", **SMALL), "lora"])
    with torch.no_grad():
        for part in adapter_of(model).parts().values():
            part.lora_e.normal_()
    model.set_active("adalora", "lora", train="lora")
    before = {n: p.detach().clone() for n, p in adapter_of(model).named_parameters()}
    report = fit(model, easy_data(32), steps=5)
    assert "extra_loss" not in report.history[0]
    assert difference(dict(adapter_of(model).named_parameters()), before) == 0


def test_which_stay() -> None:
    scores = [torch.tensor([0.3, 0.1]), torch.tensor([0.2, 0.2, 0.9])]
    assert [m.tolist() for m in kept(scores, 2)] == [[True, False], [False, False, True]]
    assert [m.tolist() for m in kept(scores, 4)] == [[True, False], [True, True, True]]
    assert [m.tolist() for m in kept(scores, 3)] == [
        [True, False],
        [False, False, True],
    ]  # those with one score go together
    assert all(m.all() for m in kept(scores, 5)) and all(m.all() for m in kept(scores, 9))


def test_what_cannot_be_is_refused() -> None:
    for settings, message in (
        ({"rank": 2}, "expected 1 <= target_rank <= rank"),
        ({"target_rank": 0}, "expected 1 <= target_rank <= rank"),
        ({"tinit": 0.5}, "less than 1 leaves steps to prune in"),
        ({"tfinal": -1}, "expected 0 or more"),
        ({"interval": 0}, "expected steps, or a part of the run"),
        ({"beta1": 1.0}, "expected 0 < beta1 < 1"),
        ({"orthogonality": -0.1}, "expected 0 or more"),
        ({"dropout": 1.0}, "expected 0 <= dropout < 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("adalora", **settings)
    model = tiny_model(zoo.adapter("adalora", tinit=500, tfinal=1500))
    before = weights(model)
    with pytest.raises(ConfigError, match=r"tinit=500 and tfinal=1500 steps leave none of 6 to reach the budget in"):
        fit(model, easy_data(48), epochs=2)
    assert difference(weights(model), before) == 0 and not list(adapter_of(model).named_buffers())
