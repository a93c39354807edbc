"""TriAdaptLoRA: its blocks by hand, its growth in fits of every length, and exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import Stop, StopAt, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.adapters.parts.rounds import Paced
from zoo.adapters.parts.triangular import Triangular
from zoo.errors import ConfigError

SMALL: dict[str, Any] = {"target_rank": 3, "added": 2}


def images() -> Tensor:
    return easy_data(6, seed=5).tensors[0]


def adapter_of(model: zoo.Model) -> Any:
    return model.adapters["triadaptlora"]


def blocks(dim_in: int, dim_out: int, *sizes: int) -> Triangular:
    """Blocks of these sizes with random numbers in them."""
    torch.manual_seed(0)
    part, rank = Triangular(dim_in, dim_out, sizes[0], 3.0).double(), sizes[0]
    for number, size in enumerate(sizes[1:], 1):
        rank += size
        shapes = {"a": (size, dim_in), "b": (dim_out, size), "low": (size, rank), "up": (rank, size)}
        for name, shape in shapes.items():
            part.register_parameter(f"lora_{name}{number}", torch.nn.Parameter(torch.empty(shape).double()))
    with torch.no_grad():
        for p in part.parameters():
            p.normal_()
    return part


def by_hand(part: Triangular) -> Tensor:
    """s B (L + U) A with L and U filled entry by entry."""
    rank = sum(len(a) for a in part.all("lora_a"))
    square, at = torch.zeros(rank, rank, dtype=torch.float64), 0
    for low, up in zip(part.all("lora_low"), part.all("lora_up")):
        for i in range(len(low)):
            for j in range(low.shape[1]):
                square = square.index_put((torch.tensor(at + i), torch.tensor(j)), low[i, j], accumulate=True)
                square = square.index_put((torch.tensor(j), torch.tensor(at + i)), up[j, i], accumulate=True)
        at += len(low)
    a, b = torch.cat(part.all("lora_a")), torch.cat(part.all("lora_b"), 1)
    return 3.0 / (rank + 1e-5) * b @ square @ a


def test_forward_and_gradients_by_hand() -> None:
    """Two slices of one projection; those of plain autograd through the changed weight."""
    parts = ((blocks(5, 3, 1, 2, 2), 0, 3), (blocks(5, 4, 2), 4, 8))
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    named = [p for part, _, _ in parts for p in part.parameters()]
    mine = Triangular.add_group(parts, x, torch.zeros(6, 9, dtype=torch.float64) + 0 * x.sum())
    deltas = [by_hand(part) for part, _, _ in parts]
    for (part, _, _), delta in zip(parts, deltas):
        torch.testing.assert_close(part.delta(), delta)
        torch.testing.assert_close(part(x), x @ delta.T)
    plain = torch.cat([x @ deltas[0].T, torch.zeros(6, 1), x @ deltas[1].T, torch.zeros(6, 1)], 1)
    torch.testing.assert_close(mine, plain)
    for a, b in zip(*(torch.autograd.grad(y.pow(2).sum(), [x, *named]) for y in (mine, plain)), strict=True):
        torch.testing.assert_close(a, b)
    square = parts[0][0].square()
    assert parts[0][0].size() == pytest.approx(float(square.norm().detach()) / 3)


@pytest.mark.parametrize("memory", ["default", "low", "min"])
def test_keeps_little_more_than_lora(memory: str) -> None:
    """Nothing that grows with the batch: (L + U) A is made again, of every block."""
    lora = tiny_model(zoo.adapter("lora", rank=3, targets="all-linear"), memory=memory)
    model = tiny_model(zoo.adapter("triadaptlora", **SMALL), memory=memory)
    for name in adapter_of(model).parts():
        adapter_of(model).extend(name, 2)
    more = {
        count: model.saved_bytes(easy_data(count).tensors[0]) - lora.saved_bytes(easy_data(count).tensors[0])
        for count in (2, 8)
    }
    assert more[2] == more[8] and 0 <= more[2] <= 12 * 4 * 3 * 3


def test_a_new_block_changes_the_scale_alone() -> None:
    model = tiny_model(zoo.adapter("triadaptlora", **SMALL))
    adapter = adapter_of(model)
    part = adapter.module_at("blocks.1.mlp.down")
    with torch.no_grad():
        part.lora_low.fill_(2.0)
    before = part.delta()
    adapter.extend("blocks.1.mlp.down", 2)
    assert part.rank == 3 and part.scale == pytest.approx(16 / 3, rel=1e-4)
    torch.testing.assert_close(part.delta(), before * (1 + 1e-5) / (3 + 1e-5), rtol=1e-5, atol=1e-9)
    assert part.lora_a1.any() and part.lora_b1.any() and not part.lora_low1.any() and not part.lora_up1.any()
    model.train()(images()).square().sum().backward()
    assert part.lora_low1.grad.any() and part.lora_up1.grad.any()


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("target", [2, 3, 8])
def test_all_but_short_runs_reach_the_budget(exponential: bool, target: int) -> None:
    """With the default settings, and at least one step for the last part; what is too short is refused."""
    growth = "exponential" if exponential else "linear"
    adapter: Any = tiny_model(zoo.adapter("triadaptlora", target_rank=target, growth=growth)).adapters["triadaptlora"]
    refused = []
    for total in (*range(1, 40), 100, 301, 3000):
        try:
            adapter.fit_start(None, None, total)
        except ConfigError as error:
            assert f"last step but one of {total}" in str(error) and adapter.schedule is None
            refused.append(total)
            continue
        schedule = adapter.schedule
        left, steps = schedule.last - schedule.first, schedule.rounds()
        for t in steps:
            assert schedule.grows(t) and left > 0
            left -= schedule.count(t, left) * schedule.added
        assert left <= 0 and steps[-1] <= total - 2
    assert refused == list(range(1, len(refused) + 1)) and len(refused) < 15


@pytest.mark.parametrize("steps", [9, 20])
@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_fits_of_every_length(steps: int, growth: str) -> None:
    """The sum of ranks is the budget, also where a round's directions do not divide it; the rounds are those planned."""
    model = tiny_model(zoo.adapter("triadaptlora", target_rank=4, added=5, growth=growth))
    expected = adapter_of(model).to_come()
    report = fit(model, easy_data(40), steps=steps, lr=1e-2)
    adapter = adapter_of(model)
    ranks = adapter.ranks()
    assert len(ranks) == 12 and sum(ranks.values()) == 48 and min(ranks.values()) >= 1 and expected > 0
    assert report.parameters == model.num_parameters(trainable=True) == sum(p.numel() for p in weights(model).values())
    assert not list(adapter.named_buffers()) and adapter.to_come() == 0
    planned = Paced(12, 48, steps, 0, 1, 5, 12, growth == "exponential").rounds()
    assert [t for t, _ in adapter.grown] == planned
    assert [gain for _, gains in adapter.grown for gain in gains.values()] == [5] * 7 + [1]


def test_what_grows_is_what_moved() -> None:
    """Of two projections whose squares are equally large that one grows whose became so since the last look."""
    model = tiny_model(zoo.adapter("triadaptlora", target_rank=2, tinit=1, interval=2)).train()
    adapter = adapter_of(model)
    old, new = "blocks.0.attn.k", "blocks.1.mlp.up"
    with torch.no_grad():
        adapter.module_at(old).lora_low.fill_(3.0)
    adapter.fit_start(model, None, 200)
    with torch.no_grad():
        adapter.module_at(old).lora_low.fill_(2.0)  # less than before: a negative score
        adapter.module_at(new).lora_up.fill_(2.0)
    adapter.after_backward(model, 1)
    assert adapter.grown == []
    adapter.after_backward(model, 2)
    assert adapter.grown == [(2, {new: 1})]
    adapter.after_backward(model, 4)  # nothing moved; what grew has two blocks now, and lost by that
    assert adapter.grown[-1] == (4, {"blocks.0.attn.q": 1})


def test_what_is_left(tmp_path: Path) -> None:
    """On disk too; merged it is a plain network, a sum a LoRA; a second fit grows nothing."""
    model = tiny_model(zoo.adapter("triadaptlora", target_rank=4))
    adapter = adapter_of(model)
    fit(model, easy_data(64), epochs=4, lr=2e-2)
    ranks, logits = adapter.ranks(), model(images())
    assert sum(ranks.values()) == 48 and max(ranks.values()) > 4
    assert any(len(part.all("lora_a")) > 2 for part in adapter.parts().values())
    assert model.probe(images()) == []
    torch.testing.assert_close(model.merge()(images()), logits, rtol=1e-5, atol=1e-5)
    model.save_adapter(tmp_path)
    torch.manual_seed(100)
    again = zoo.load(adapter=tmp_path, pretrained=False)
    assert torch.equal(again(images()), logits) and adapter_of(again).ranks() == ranks
    assert adapter_of(again).config() == adapter.config() and adapter_of(again).grown == adapter.grown
    before = weights(again)
    fit(again, easy_data(64), epochs=1)
    assert adapter_of(again).ranks() == ranks and difference(weights(again), before) > 0


@pytest.mark.parametrize("stop", [0, 4, 9, 13])
def test_resume_is_exact(tmp_path: Path, stop: int) -> None:
    """Cut off before, in, and behind the growth, with dropout and a choice among epochs."""

    def go(**options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor], Any]:
        model = tiny_model(zoo.adapter("triadaptlora", **SMALL, dropout=0.1, interval=2))
        settings = {"epochs": 5, "checkpoint_every": 2, "keep": "best", "lr": 1e-2, **options}
        report = fit(model, easy_data(48, noise=2), easy_data(16, seed=1), **settings)
        history = [{k: v for k, v in h.items() if "second" not in k} for h in report.history]
        return history, weights(model), (adapter_of(model).ranks(), adapter_of(model).grown)

    history, expected, ranks = go()
    assert len(ranks[1]) > 2 and 4 < ranks[1][-1][0] <= 12
    with pytest.raises(Stop):
        go(checkpoint=tmp_path, callbacks=[StopAt(stop)])
    again, final, same = go(checkpoint=tmp_path)
    assert again == history and same == ranks and difference(final, expected) == 0


def test_what_cannot_be_is_refused() -> None:
    for settings, message in (
        ({"rank": 8}, "expected 1 <= rank < target_rank"),
        ({"rank": 0}, "expected 1 <= rank < target_rank"),
        ({"alpha": 0.0}, "could never act"),
        ({"added": 0}, "expected 1 or more"),
        ({"tinit": -1}, "expected 0 or more"),
        ({"interval": 0}, "expected steps, or a part of the run"),
        ({"orthogonality": -0.1}, "expected 0 or more"),
        ({"dropout": 1.0}, "expected 0 <= dropout < 1"),
        ({"growth": "cubic"}, "growth"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("triadaptlora", **settings)
    for settings in ({"interval": 4}, {"tinit": 1000}, {"target_rank": 8, "added": 1}):
        model = tiny_model(zoo.adapter("triadaptlora", **settings))
        before = weights(model)
        with pytest.raises(ConfigError, match=r"would be missing at the last step but one of 6"):
            fit(model, easy_data(48), epochs=2)
        assert difference(weights(model), before) == 0 and not list(adapter_of(model).named_buffers())
