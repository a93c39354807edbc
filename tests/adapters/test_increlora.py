"""IncreLoRA: what it measures, its growth in fits of every length, its learning rates, and exact resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import Stop, StopAt, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.adapters.parts.growing import RESERVE, Growing
from zoo.adapters.parts.rounds import Rounds
from zoo.errors import ConfigError
from zoo.train import training_hooks

SMALL: dict[str, Any] = {"target_rank": 3, "added": 2}


def images() -> Tensor:
    return easy_data(6, seed=5).tensors[0]


def adapter_of(model: zoo.Model) -> Any:
    return model.adapters["increlora"]


def blocks(dim_in: int, dim_out: int, *ranks: int, reserve: int = 0, alpha: float = 3.0) -> Growing:
    """Blocks of these ranks with random numbers in them."""
    torch.manual_seed(0)
    part = Growing(dim_in, dim_out, ranks[0], alpha).double()
    for number, rank in enumerate([*ranks[1:], *([reserve] if reserve else [])], 1):
        part.register_parameter(f"lora_p{number}", torch.nn.Parameter(torch.randn(dim_out, rank).double()))
        part.register_parameter(f"lora_q{number}", torch.nn.Parameter(torch.randn(rank, dim_in).double()))
        if number < len(ranks):
            part.register_parameter(f"lora_e{number}", torch.nn.Parameter(torch.randn(rank).double()))
    with torch.no_grad():
        part.lora_e.normal_()
    return part


def by_hand(part: Growing) -> Tensor:
    """D (o, i), direction by direction; what waits counts with 1e-5, and not in the rank."""
    total, rank = torch.zeros(part.lora_p.shape[0], part.lora_q.shape[1], dtype=torch.float64), 0
    for p, e, q in part.blocks():
        values = [RESERVE] * len(q) if e is None else e
        rank += 0 if e is None else len(e)
        for a, value, b in zip(p.T, values, q):
            total = total + value * torch.outer(a, b)
    return part.fixed / (rank + 1e-5) * total


def test_forward_and_gradients_by_hand() -> None:
    """Two slices of one projection, one of them with a reserve; those of plain autograd through the changed weight."""
    parts = ((blocks(5, 3, 1, 2, reserve=2), 0, 3), (blocks(5, 4, 2), 4, 8))
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    named = [p for part, _, _ in parts for p in part.parameters()]
    mine = Growing.add_group(parts, x, torch.zeros(6, 9, dtype=torch.float64) + 0 * x.sum())
    plain = torch.zeros(6, 9, dtype=torch.float64)
    for part, start, stop in parts:
        assert part.rank == (3 if start == 0 else 2)
        torch.testing.assert_close(part.delta(), by_hand(part))
        plain = torch.cat([plain[:, :start], x @ by_hand(part).T, plain[:, stop:]], 1)
    plain = torch.cat([x @ by_hand(parts[0][0]).T, torch.zeros(6, 1), x @ by_hand(parts[1][0]).T, torch.zeros(6, 1)], 1)
    torch.testing.assert_close(mine, plain)
    for a, b in zip(*(torch.autograd.grad(y.pow(2).sum(), [x, *named]) for y in (mine, plain)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_measured(whole: bool) -> None:
    """sum |D * dL/dD| / sqrt(o i) with the gradient of D as of any tensor; measuring changes nothing else."""
    parts = ((blocks(5, 3, 1, 2, reserve=2), 0, 3), (blocks(5, 4, 2), 4, 8))
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    named = [x, *(p for part, _, _ in parts for p in part.parameters())]

    def run() -> tuple[Tensor, ...]:
        y = Growing.add_group(parts, x, torch.zeros(2, 3, 9, dtype=torch.float64) + 0 * x.sum())
        for p in named:
            p.grad = None
        y.pow(3).sum().backward()
        return (y, *(p.grad.clone() for p in named if p.grad is not None))

    expected = run()
    for part, _, _ in parts:
        part.measure(whole)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    for part, start, stop in parts:
        change = part.delta().detach().requires_grad_()
        slices = torch.zeros(2, 3, 9, dtype=torch.float64)
        slices[..., start:stop] = expected[0][..., start:stop].detach() - x.detach() @ change.detach().T
        ((slices[..., start:stop] + x.detach() @ change.T) ** 3).sum().backward()
        found = part.sink.grad
        assert found is not None
        if whole:
            torch.testing.assert_close(found, change.grad.float())
            found = part.sensitivity(found)
        torch.testing.assert_close(found, (change * change.grad).abs().sum().float() / math.sqrt(change.numel()))


@pytest.mark.parametrize("memory", ["default", "low", "min"])
def test_keeps_what_lora_keeps(memory: str) -> None:
    """While it measures, too."""
    lora = tiny_model(zoo.adapter("lora", rank=1, targets="all-linear"), memory=memory)
    model = tiny_model(zoo.adapter("increlora"), memory=memory)
    expected = lora.saved_bytes(images())
    assert model.saved_bytes(images()) == expected
    adapter_of(model).watch()
    assert model.saved_bytes(images()) == expected


@pytest.mark.parametrize("memory", ["low", "min"])
def test_measures_the_same_when_recomputed(memory: str) -> None:
    found = []
    for setting in ("default", memory):
        model = tiny_model(zoo.adapter("increlora"), memory=setting).train()
        with torch.no_grad():
            for part in adapter_of(model).growing().values():
                part.lora_e.fill_(1.0)
        adapter_of(model).watch()
        model(images()).square().sum().backward()
        found.append(adapter_of(model).sensitivities())
    assert found[0].min() > 0 and torch.equal(*found)


def test_measures_the_same_when_compiled() -> None:
    torch._dynamo.reset()
    model = tiny_model(zoo.adapter("increlora")).train()
    with torch.no_grad():
        for part in adapter_of(model).growing().values():
            part.lora_e.fill_(1.0)
    adapter_of(model).watch()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(images()).square().sum().backward()
        found.append(adapter_of(model).sensitivities())
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("target", [2, 3, 8])
def test_any_length_reaches_the_budget(target: int) -> None:
    """With the default fractions, and at least one step for the last part; or it is refused."""
    model = tiny_model(zoo.adapter("increlora", target_rank=target))
    adapter = adapter_of(model)
    for total in (*range(1, 25), 100, 301, 3000):
        if total < (3 if target == 2 else 4):  # one round is possible at t = 1 of 3 steps, and none before
            with pytest.raises(ConfigError, match=rf"of {total} there are {max(0, total - 2)}"):
                adapter.fit_start(model, None, total)
            continue
        adapter.fit_start(model, None, total)
        schedule = adapter.schedule
        steps = [t for t in range(total) if schedule.grows(t)]
        assert len([t for t in steps if t <= total - 2]) == schedule.steps(total) >= schedule.needed
        assert steps[schedule.needed - 1] <= total - 2
        assert total < 24 or steps[schedule.needed - 1] <= 0.4 * total + 1


@pytest.mark.parametrize("steps", [3, 4, 9])
def test_fits_of_every_length(steps: int) -> None:
    """The sum of ranks is the budget, also where a round's directions do not divide it."""
    model = tiny_model(zoo.adapter("increlora", **SMALL))
    report = fit(model, easy_data(40), steps=steps, lr=1e-2)
    adapter = adapter_of(model)
    ranks = adapter.ranks()
    assert adapter.to_come() == 0
    assert len(ranks) == 12 and sum(ranks.values()) == 36 and min(ranks.values()) >= 1
    assert report.parameters == model.num_parameters(trainable=True) == sum(p.numel() for p in weights(model).values())
    assert not list(adapter.named_buffers()) and all(p.sink is None for p in adapter.growing().values())
    history = adapter.history()
    assert {name: column[0] for name, column in history.items()} == dict.fromkeys(ranks, 1)
    assert {name: column[-1] for name, column in history.items()} == ranks
    for number, (_, gains) in enumerate(adapter.grown):
        assert {n: c[number + 1] - c[number] for n, c in history.items() if c[number + 1] != c[number]} == gains
    assert adapter.picture().startswith(b"\x89PNG")


def test_ties_grow_no_more_than_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores equal: h projections all the same, the first; the last round gives what is left."""
    monkeypatch.setattr(Growing, "sensitivity", lambda self, gradient: torch.ones(()))
    model = tiny_model(zoo.adapter("increlora", target_rank=2, added=5, top_h=2))
    fit(model, easy_data(40), steps=8, accumulate=2)
    assert [list(gains.values()) for _, gains in adapter_of(model).grown] == [[5, 5], [2]]
    assert list(adapter_of(model).ranks().values()) == [8, 6, *[1] * 10]


def test_growth_changes_outputs_by_the_scale_alone() -> None:
    """s falls from alpha / r to alpha / (r + a), as in the authors' code; what waited goes on with its e of 1e-5."""
    model = tiny_model(zoo.adapter("increlora", **SMALL))
    adapter = adapter_of(model)
    name = "blocks.1.mlp.down"
    part = adapter.module_at(name)
    with torch.no_grad():
        part.lora_e.fill_(2.0)
    start = part.delta()
    assert part.scale == pytest.approx(16.0, rel=1e-4) and adapter.module_at("blocks.0.attn.q").reserve is None
    adapter.reserve(name, part, 2)
    assert part.rank == 1 and part.reserve == "1" and part.lora_q1.shape == (2, 96)
    waiting = 16 / (1 + 1e-5) * 1e-5 * part.lora_p1 @ part.lora_q1
    torch.testing.assert_close(part.delta(), start + waiting)
    adapter.extend(name, part, 2, 2)
    assert part.rank == 3 and part.lora_e1.tolist() == pytest.approx([1e-5, 1e-5]) and part.reserve == "2"
    adapter.drop_reserve(name, part)
    torch.testing.assert_close(part.delta(), (start + waiting) * (1 + 1e-5) / (3 + 1e-5), rtol=1e-5, atol=1e-9)
    before = part.delta()
    adapter.fold(name, part)
    torch.testing.assert_close(part.delta(), before, rtol=1e-6, atol=1e-8)
    assert part.suffixes() == [""] and part.lora_p.shape == (24, 3)


def test_later_directions_are_regularised_each_by_itself() -> None:
    part = blocks(5, 3, 2, 2, reserve=1)
    found = [torch.linalg.norm(m @ m.mT - torch.eye(m.shape[-2])) for m in (part.lora_p.T, part.lora_q)]
    singles = [*part.lora_p1.T, *part.lora_q1, *part.lora_p2.T, *part.lora_q2]
    found += [(v @ v - 1).abs() for v in singles]
    model = tiny_model(zoo.adapter("increlora", targets="blocks.0.attn.q"))
    adapter = adapter_of(model)
    adapter.parts = lambda: {"blocks.0.attn.q": part}
    assert len(found) == 8
    torch.testing.assert_close(adapter.distance(), torch.stack(found).mean())


def test_each_part_has_its_own_warm_up() -> None:
    """A part that comes at t rises from there over as many steps as the first ones, and all end at 0 together."""
    model = tiny_model(zoo.adapter("increlora", **SMALL, top_h=12, tinit=3, interval=4))
    seen: dict[str, list[float]] = {}

    class Look:
        def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
            self.service = optimizer

        def after_step(self, model: zoo.Model, step: int) -> None:
            for name in self.service.parameters:
                if "blocks.0.attn.q" in name:
                    seen.setdefault(name.rpartition(".")[2], [0.0] * step).append(self.service.current_lr(name))

    fit(model, easy_data(40), steps=12, lr=1.0, schedule="linear", warmup=2, callbacks=[Look()])
    assert [t for t, _ in adapter_of(model).grown] == [4]
    rising = [1 / 3, 2 / 3]
    assert seen["lora_p"] == pytest.approx(rising + [1 - t / 10 for t in range(10)])
    assert seen["lora_p1"] == seen["lora_p"]  # they waited from the first step on
    assert seen["lora_e1"] == pytest.approx([0.0] * 4 + rising + [1 - t / 6 for t in range(6)])


def test_parts_of_a_batch_are_measured_together() -> None:
    """Accumulated in three parts a step measures what it does in one; the scores of parts do not add up."""
    found = []
    for accumulate in (1, 3):
        model = tiny_model(zoo.adapter("increlora", **SMALL, top_h=1, interval=1))
        seen = []

        class Look:
            def after_backward(self, model: zoo.Model, step: int) -> None:
                if adapter_of(model).schedule is not None:
                    seen.append(adapter_of(model).scores_mean.clone())  # noqa: B023

        fit(model, easy_data(48), steps=20, batch_size=12, accumulate=accumulate, callbacks=[Look()])
        found.append((torch.stack(seen), adapter_of(model).ranks(), weights(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-9)
    assert found[0][1] == found[1][1] and difference(found[0][2], found[1][2]) < 1e-4


def test_scaled_gradients_are_measured_unscaled() -> None:
    model = tiny_model(zoo.adapter("increlora")).train()
    adapter, found = adapter_of(model), []
    with torch.no_grad():
        for part in adapter.growing().values():
            part.lora_e.fill_(1.0)
    hooks = training_hooks(model)
    hooks.fit_start(torch.optim.SGD(model.parameters_to_train().values(), lr=0.1), 20)
    for scale in (1.0, 2.0**12):
        hooks.step_start(0)
        (scale * model(images()).square().sum()).backward()
        adapter.training_service.factor = 1 / scale
        found.append(adapter.sensitivities())
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_what_is_left(tmp_path: Path) -> None:
    """Outputs stay when the parts become one, on disk too; merged it is a plain network; a second fit grows nothing."""
    model = tiny_model(zoo.adapter("increlora", target_rank=4))
    adapter = adapter_of(model)
    seen = {}

    class Watch:
        def epoch_end(self, model: zoo.Model, epoch: int) -> None:
            seen["logits"], seen["blocks"] = model.eval()(images()), [p.suffixes() for p in adapter.growing().values()]
            model.train()

    report = fit(model, easy_data(64), epochs=4, lr=2e-2, callbacks=[Watch()])
    ranks = adapter.ranks()
    assert sum(ranks.values()) == 48 and max(ranks.values()) > 4 and any(len(s) > 2 for s in seen["blocks"])
    logits = model(images())
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-5, atol=1e-5)
    sizes = {p.name: p.dim_in + p.dim_out + 1 for p in model.points.select(kind="linear")}
    count = sum(r * sizes[name] for name, r in ranks.items())
    assert model.num_parameters(trainable=True, head=False) == count == report.parameters - 100
    assert model.probe(images()) == []
    torch.testing.assert_close(model.merge()(images()), logits, rtol=1e-5, atol=1e-5)
    model.save_adapter(tmp_path)
    torch.manual_seed(100)
    again = zoo.load(adapter=tmp_path, pretrained=False)
    assert torch.equal(again(images()), logits) and adapter_of(again).ranks() == ranks
    assert adapter_of(again).config() == adapter.config() and adapter_of(again).grown == adapter.grown
    mixed = model.combine({"increlora": 0.5})
    assert mixed
    before = weights(again)
    fit(again, easy_data(64), epochs=1)
    assert adapter_of(again).ranks() == ranks and difference(weights(again), before) > 0


@pytest.mark.parametrize("stop", [0, 4, 9, 13])
@pytest.mark.parametrize("advance", [True, False])
def test_resume_is_exact(tmp_path: Path, stop: int, advance: bool) -> None:
    """Cut off before, in, and behind the growth, with dropout, parts of batches and a choice among epochs."""

    def go(**options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor], Any]:
        model = tiny_model(zoo.adapter("increlora", **SMALL, dropout=0.1, interval=2, advance=advance))
        settings = {"epochs": 5, "checkpoint_every": 2, "keep": "best", "lr": 1e-2, "accumulate": 2, **options}
        report = fit(model, easy_data(48, noise=2), easy_data(16, seed=1), **settings)
        history = [{k: v for k, v in h.items() if "second" not in k} for h in report.history]
        return history, weights(model), (adapter_of(model).ranks(), adapter_of(model).grown)

    history, expected, ranks = go()
    assert [t for t, _ in ranks[1]] == [2, 4, 6]
    with pytest.raises(Stop):
        go(checkpoint=tmp_path, callbacks=[StopAt(stop)])
    again, final, same = go(checkpoint=tmp_path)
    assert again == history and same == ranks and difference(final, expected) == 0
    loaded, final, same = go(checkpoint=tmp_path)  # a finished run is only loaded
    assert loaded == history and same == ranks and difference(final, expected) == 0


def test_a_fit_that_broke_off_is_gone_on_with() -> None:
    """Without a checkpoint: a new fit takes the directions that there are, and those that wait, and reaches the budget."""
    model = tiny_model(zoo.adapter("increlora", **SMALL, top_h=1, interval=1))
    with pytest.raises(Stop):
        fit(model, easy_data(40), steps=20, callbacks=[StopAt(5)])
    assert sum(adapter_of(model).ranks().values()) == 12 + 5 * 2
    fit(model, easy_data(40), steps=20)
    assert sum(adapter_of(model).ranks().values()) == 36 and model.probe(images()) == []


def test_nothing_measured_is_told() -> None:
    """A loop whose passes nobody can measure would grow what comes first."""
    model = tiny_model(zoo.adapter("increlora")).train()
    hooks = training_hooks(model)
    hooks.fit_start(torch.optim.SGD(model.parameters_to_train().values(), lr=0.1), 20)
    with zoo.second_order(model):
        model(images()).sum().backward()
    with pytest.raises(ConfigError, match=r"nothing was measured.*zoo\.second_order"):
        hooks.after_backward(0)


def test_rounds() -> None:
    schedule = Rounds(first=6, last=24, total=20, warmup=3, interval=3, added=2, top=3)
    assert [t for t in range(20) if schedule.grows(t)] == [6, 9, 12, 15, 18]
    assert schedule.needed == 3 and schedule.steps(20) == 5 and schedule.steps(17) == 4 and schedule.steps(4) == 0
    assert Rounds(6, 25, 20, 3, 3, 2, 3).needed == 4
    assert Rounds(6, 24, 20, 2, 3, 2, 3).steps(20) == 6


def test_what_cannot_be_is_refused() -> None:
    for settings, message in (
        ({"rank": 2}, "expected 1 <= rank < target_rank"),
        ({"rank": 0}, "expected 1 <= rank < target_rank"),
        ({"target_rank": 1}, "there is nothing to grow"),
        ({"alpha": 0.0}, "could never act"),
        ({"added": 0}, "expected 1 or more"),
        ({"top_h": 0}, "expected 1 or more"),
        ({"tinit": -1}, "expected 0 or more"),
        ({"interval": 0}, "expected steps, or a part of the run"),
        ({"tgrown": 0}, "expected steps, or a part of the run"),
        ({"beta1": 1.0}, "expected 0 < beta1 < 1"),
        ({"orthogonality": -0.1}, "expected 0 or more"),
        ({"dropout": 1.0}, "expected 0 <= dropout < 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("increlora", **settings)
    model = tiny_model(zoo.adapter("increlora", tinit=1000, interval=1000))
    before = weights(model)
    with pytest.raises(ConfigError, match=r"takes 1 round, .*tinit=1000.*the last step but one of 6 there are 0"):
        fit(model, easy_data(48), epochs=2)
    assert difference(weights(model), before) == 0 and not list(adapter_of(model).named_buffers())
    assert all(part.sink is None for part in adapter_of(model).growing().values())
