"""IST: which blocks learn in a step, what their scores are made of, what it saves, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import CLASSES, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.errors import ConfigError
from zoo.train import IST, OptimizerService, training_hooks
from zoo.train.ist import drawn, moved


def deep(adapter: Any = "lora", depth: int = 4, **options: Any) -> zoo.Model:
    """As `tiny_model`, with more blocks."""
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": depth, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(100)
        model = zoo.load("vit-micro", adapter=adapter, pretrained=False, num_classes=CLASSES, **shape, **options)
    return model.train()


def blocks_of(names: Any) -> set[str]:
    return {".".join(name.partition("/")[2].split(".")[:2]) for name in names if not name.startswith("head/")}


class Watch:
    """What learned in each step, what moved, and whether anything rests behind it."""

    def __init__(self) -> None:
        self.learned: list[set[str]] = []
        self.moved: list[set[str]] = []
        self.before: dict[str, torch.Tensor] = {}

    def after_step(self, model: Any, step: int) -> None:
        trained = model.parameters_to_train()
        self.learned.append(blocks_of(n for n, p in trained.items() if p.grad is not None))
        now = {f"{o}/{n}": p.detach().clone() for o, a in model.adapters.items() for n, p in a.named_parameters()}
        if self.before:
            self.moved.append(blocks_of(n for n, p in now.items() if not torch.equal(p, self.before[n])))
        self.before = now

    def step_end(self, model: Any, step: int) -> None:
        assert all(p.requires_grad for p in model.adapters.parameters())


def test_only_the_drawn_blocks_move() -> None:
    """Neither Adam's momentum nor weight decay moves what rests; the head learns in every step."""
    model, sampler, watch = deep(depth=8), IST(every=3), Watch()
    head = model.head.weight.detach().clone()
    fit(model, easy_data(64), batch_size=8, weight_decay=0.1, lr=1e-2, callbacks=[sampler, watch])
    assert len(watch.learned) == 16 and all(len(s) == 2 for s in watch.learned)
    assert watch.moved == watch.learned[1:]
    assert len({frozenset(s) for s in watch.learned}) > 4, "drawn anew in each step"
    assert sum(sampler.updates) == 32 and [h["epoch"] for h in sampler.history] == [1, 2]
    assert sampler.scores.any() and not torch.equal(model.head.weight, head)
    assert all(p.requires_grad for p in model.parameters_to_train().values())


@pytest.mark.parametrize("memory", ["default", "min"])
def test_nothing_is_kept_below_the_lowest_block_that_learns(memory: str) -> None:
    """A step keeps what it would with a LoRA at the blocks that learn alone."""
    model, sampler = deep(memory=memory), IST(every=None)
    hooks = training_hooks(model, [sampler])
    images = easy_data(8).tensors[0]
    whole = model.saved_bytes(images)
    hooks.fit_start(torch.optim.Adam(model.parameters_to_train().values()), 8)
    found = {}
    for step in range(8):
        hooks.step_start(step)
        (place,) = blocks_of(n for n, p in model.parameters_to_train().items() if p.requires_grad)
        found[place] = model.saved_bytes(images)
    hooks.fit_end()
    assert model.saved_bytes(images) == whole and len(found) > 1
    for place, kept in found.items():
        alone = deep(zoo.adapter("lora", targets=[f"{place}.attn.q", f"{place}.attn.v"]), memory=memory)
        assert kept == alone.saved_bytes(images) <= whole, place
    assert sorted(found.values(), reverse=True) == [found[place] for place in sorted(found)]
    assert min(found.values()) < whole / 2


def test_scores_by_hand() -> None:
    """Damped twice with a reward above the mean: up, in proportion to p (1 - p); not damped: as it was."""
    scores = torch.tensor([0.0, 1.0, -2.0, 0.5])
    after = moved(scores, [(0, 1), (1, 2)], [0.3, 0.9], 10.0)
    up = 10 * (math.exp(-0.3) - math.exp(-0.9)) / 2
    p = scores.sigmoid()
    expected = scores + p * (1 - p) * torch.tensor([up, 0.0, -up, 0.0])
    torch.testing.assert_close(after, expected)
    assert scores.tolist() == [0.0, 1.0, -2.0, 0.5]


def test_a_high_score_rests() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([3.0, 0.0, 0.0, 0.0])
    counts = torch.zeros(4)
    for _ in range(400):
        counts[list(drawn((-scores).sigmoid(), 1, generator))] += 1
    assert counts[0] < 30 < 90 < counts[1:].min()


@pytest.mark.parametrize(("depth", "learn", "damped"), [(2, 1, 1), (12, 3, 6), (24, 6, 12), (32, 8, 16)])
def test_how_many_learn_and_are_damped(depth: int, learn: int, damped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def count(p: Any, number: int, generator: Any) -> Any:
        counts.append(number)
        return drawn(p, number, generator)

    monkeypatch.setattr("zoo.train.ist.drawn", count)
    sampler = IST(every=1)
    fit(deep(depth=depth), easy_data(8), batch_size=4, epochs=1, callbacks=[sampler])
    assert set(counts) == {learn, damped} and len(sampler.blocks) == depth
    if depth == 2:  # of one block of two there are two sets, and no third is looked for
        assert counts.count(1) >= 4


def test_looking_leaves_no_trace() -> None:
    """Modes, flags, gradients and random numbers as before; without a graph; the loss is that of the damped model."""
    model, sampler = deep(zoo.adapter("lora", dropout=0.5)), IST(every=1)
    images, targets = easy_data(8).tensors
    with torch.no_grad():
        for name, p in model.adapters["lora"].named_parameters():
            p.normal_(std=0.5 if name.endswith("lora_b") else 0.1)
    service = OptimizerService.wrap(torch.optim.Adam(model.parameters_to_train().values()), model, total_steps=4)
    service.batches = [(images, targets)]
    sampler.fit_start(model, service, 4)
    sampler._begun = True
    state = torch.get_rng_state()
    sampler.step_start(model, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.adapters.modules())
    assert sum(p.requires_grad for p in model.adapters.parameters()) == 4, "two projections of one block of four"
    generator = torch.Generator().manual_seed(3)
    sets: list[tuple[int, ...]] = []
    while len(sets) < 3:
        if (one := drawn(sampler.scores.sigmoid(), 2, generator)) not in sets:
            sets.append(one)
    losses = []
    model.eval()
    for chosen in sets:
        with zoo.damped(model, "lora", {f"blocks.{i}": 0.25 for i in chosen}):
            losses.append(torch.nn.functional.cross_entropy(model(images), targets).item())
    model.train()
    expected = moved(sampler.scores, sets, losses, 10.0)
    sampler._look(model, torch.Generator().manual_seed(3))
    torch.testing.assert_close(sampler.scores, expected)


def test_a_killed_run_goes_on_with_its_scores(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "lr": 1e-2, "checkpoint_every": 1, "batch_size": 8}
    whole = IST(every=2)
    fit(expected := deep(), easy_data(32), callbacks=[whole], **options)

    class Stop:
        def step_start(self, model: Any, step: int) -> None:
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model := deep(), easy_data(32), callbacks=[IST(every=2), Stop()], checkpoint=tmp_path, **options)
    assert all(p.requires_grad for p in model.parameters_to_train().values())
    with pytest.raises(ConfigError, match=r"another IST: factor was 0\.25, is 0\.5"):
        fit(deep(), easy_data(32), callbacks=[IST(every=2, factor=0.5)], checkpoint=tmp_path, **options)
    again = IST(every=2)
    fit(model, easy_data(32), callbacks=[again], checkpoint=tmp_path, **options)
    assert difference(weights(model), weights(expected)) == 0
    assert torch.equal(again.scores, whole.scores) and again.scores.any()
    assert again.updates == whole.updates and again.history == whole.history
    fit(deep(), easy_data(32), checkpoint=(plain := tmp_path / "plain"), **{**options, "epochs": 1})
    with pytest.raises(ConfigError, match="began without it"):
        fit(deep(), easy_data(32), callbacks=[IST()], checkpoint=plain, **options)


@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        ("adapter", IST(every=2)),
        ("dylora", IST(every=2)),
        ("compacter", IST(every=2)),
        ("ssf", IST(every=2)),
        (["lora", "ia3"], IST(every=2)),
        ("vpt", IST(every=2, factor=0.0)),
        ("bitfit", IST(every=2, factor=0.0)),
        ("prefix", IST(every=None)),
    ],
)
def test_around_other_methods(method: Any, sampler: IST) -> None:
    settings: dict[str, Any] = {"vpt": {"deep": True, "num_tokens": 2}, "compacter": {"n": 4}}
    single = isinstance(method, str)
    model = deep(zoo.adapter(method, **settings.get(method, {})) if single else method)
    watch = Watch()
    report = fit(model, easy_data(32), batch_size=8, callbacks=[sampler, watch])
    assert math.isfinite(report.history[-1]["loss"])
    assert all(len({s for s in found if s.startswith("blocks.")}) == 1 for found in watch.learned)
    assert sampler.scores.any() == (sampler.every is not None)


def test_averages_follow_what_rests() -> None:
    """A block that rests keeps its average, as one that does not change."""

    class Follow:
        def __init__(self) -> None:
            self.value: dict[str, torch.Tensor] = {}
            self.count = 0

        def after_step(self, model: Any, step: int) -> None:
            rate = min(0.9, (1 + self.count) / (10 + self.count))
            self.count += 1
            owners = [*model.adapters.items(), ("head", model.head)]
            for name, p in ((f"{o}/{n}", p.detach().clone()) for o, a in owners for n, p in a.named_parameters()):
                self.value[name] = rate * self.value.get(name, p) + (1 - rate) * p

    follow, model = Follow(), deep()
    fit(model, easy_data(64), batch_size=8, lr=1e-2, ema=0.9, callbacks=[IST(every=3), follow])
    assert difference(weights(model), follow.value) < 1e-6


def test_losses_of_ones_own_are_looked_at() -> None:
    """The loss of the run, and not what the model would be trained for by default."""
    seen = []

    def loss(outputs: Any, targets: Any) -> Any:
        seen.append(torch.is_grad_enabled() and outputs.requires_grad)
        return torch.nn.functional.cross_entropy(outputs, targets)

    fit(deep(), easy_data(16), batch_size=8, epochs=1, loss=loss, callbacks=[IST(every=1)])
    assert seen.count(False) >= 3, "three looks at the loss, without a graph"


def test_what_is_refused() -> None:
    def refused(match: str, model: zoo.Model, sampler: IST) -> None:
        before = weights(model)
        with pytest.raises(ConfigError, match=match):
            fit(model, easy_data(16), callbacks=[sampler])
        assert difference(weights(model), before) == 0

    refused("'adalora' works with the gradients of all", tiny_model("adalora"), IST())
    refused("0 of the 2 that vit-micro", tiny_model("linear"), IST())
    refused("1 of the 4", deep(zoo.adapter("lora", targets=["blocks.2.attn.q"])), IST())
    refused(r"cannot be scaled by 0\.25.*factor=0", deep(zoo.adapter("vpt", deep=True)), IST())
    refused("head reads what it computes", deep("vqt"), IST())
    for wrong in (
        *({"updated": 0.0}, {"updated": 1.0}, {"damped": 1.5}, {"factor": 1.0}, {"every": 0}, {"every": 2.5}),
        *({"sets": 1}, {"rate": 0.0}, {"rate": math.nan}, {"seed": -1}, {"updated": True}),
    ):
        with pytest.raises(ConfigError, match=f"IST: {next(iter(wrong))} is"):
            IST(**wrong)  # type: ignore[arg-type]
    model, sampler = deep(), IST(every=1)
    hooks = training_hooks(model, [sampler])
    hooks.fit_start(torch.optim.Adam(model.parameters_to_train().values()), 4)
    hooks.step_start(0)
    with pytest.raises(ConfigError, match=r"no batch to look at.*service\.batches"):
        hooks.step_start(1)
    with pytest.raises(ConfigError, match="compiled anew"):
        sampler.fit_start(torch.compile(model), hooks, 4)
