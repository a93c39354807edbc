"""PST: pruning along a fit, resuming, export with zeros, bad input. See also tests/fidelity/test_pst_authors.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import attach, bare, images, shake
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.adapters.parts import pruned
from zoo.adapters.parts.lowest import smallest
from zoo.errors import ConfigError

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 12, "checkpoint_every": 1}  # 4 steps an epoch


class Seen:
    """Sparsities behind every step; breaks off behind step `stop`."""

    def __init__(self, stop: int = 99) -> None:
        self.stop, self.values = stop, []

    def step_end(self, model: Any, step: int) -> None:
        self.values.append(round(model.adapters["pst"].zeros(), 3))
        if step == self.stop:
            raise KeyboardInterrupt


def pst(**settings: Any) -> zoo.Adapter:
    return zoo.adapter("pst", **{"rank": 2, "mask_rank": 2, "sparsity": 0.5, **settings})


def test_a_fit_prunes_and_an_export_keeps_the_zeros(tmp_path: Path) -> None:
    seen, model = Seen(), tiny_model(pst())
    report = fit(model, easy_data(48), val=easy_data(20, seed=1), callbacks=[seen], keep="best", **OPTIONS)
    adapter: Any = model.adapters["pst"]
    assert seen.values == pytest.approx([adapter.schedule(t, 12) for t in range(1, 13)], abs=2e-3)
    assert seen.values[0] == 0 and seen.values[-1] == 0.5 and len(set(seen.values)) > 5
    assert report.best["epoch"] == 3  # no epoch before the sparsity is reached is chosen
    plain = model.eval().merge()
    for name, part in adapter.parts().items():
        point = model.points[name]
        weight = plain.get_submodule(point.path).weight[point.start : point.stop]
        assert int((weight == 0).sum()) == part.numel // 2 == int(part.removed)
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(100)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert again.adapters["pst"].zeros() == adapter.zeros() == 0.5
    fit(model, easy_data(48), callbacks=[more := Seen()], **OPTIONS)  # what is pruned stays so
    assert set(more.values) == {0.5}


def test_micro_batches_share_the_masks_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the head learns, which the released optimizer leaves out."""
    found: list[int] = []
    monkeypatch.setattr(pruned, "smallest", lambda scores, count: found.append(count) or smallest(scores, count))
    models = [tiny_model(pst()) for _ in range(2)]
    head = models[0].head.weight.detach().clone()
    counts = []
    for model, accumulate in zip(models, (1, 3), strict=True):
        fit(model, easy_data(24), epochs=2, batch_size=12, accumulate=accumulate)
        counts.append(len(found))
        found.clear()
    assert counts[1] == 3 * 12 <= counts[0]  # 12 matrices, 4 steps, of which the first prunes nothing
    assert difference(weights(models[0]), weights(models[1])) < 1e-4
    assert not torch.equal(models[0].head.weight, head)


def test_cut_off_while_pruning(tmp_path: Path) -> None:
    fit(whole := tiny_model(pst()), easy_data(48), **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(pst()), easy_data(48), checkpoint=tmp_path, callbacks=[Seen(5)], **OPTIONS)
    fit(model := tiny_model(pst()), easy_data(48), checkpoint=tmp_path, callbacks=[seen := Seen()], **OPTIONS)
    assert 0 < seen.values[0] < 0.5
    assert difference(weights(model), weights(whole)) == 0
    assert model.adapters["pst"].zeros() == whole.adapters["pst"].zeros() == 0.5


def test_a_compiled_mask_follows_the_schedule() -> None:
    """The number of zeros is a tensor, so one graph serves every sparsity."""
    model = bare("vit", depth=1)
    attach(model, "pst")
    shake(model, "pst")
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        for sparsity in (0.0, 0.3, 0.8):
            model.adapters["pst"].prune(sparsity)  # type: ignore[operator]
            torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_equal_scores_go_in_their_order() -> None:
    layer = pruned.Pruned(4, 3, 1, 1, (1.0, 1.0, 1.0))
    layer.prune(0.5)
    assert layer(torch.ones(3, 4)).flatten().tolist() == [0.0] * 6 + [1.0] * 6


@pytest.mark.parametrize("settings", [{"sparsity": 1.0}, {"sparsity": 0.0}, {"rank": 0}, {"warmup": 0.7, "final": 0.3}])
def test_settings_without_a_meaning(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        pst(**settings)


def test_a_run_without_steps_to_prune_in() -> None:
    model = tiny_model(pst(warmup=0.5, final=0.49))
    with pytest.raises(ConfigError, match="of 2 steps none is left"):
        fit(model, easy_data(24), epochs=1, batch_size=12)
    assert model.adapters["pst"].zeros() == 0
    with pytest.raises(ConfigError, match="0 <= sparsity < 1"):
        model.adapters["pst"].prune(1.0)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"sparsity is '0\.5'; expected a number\."):
        model.adapters["pst"].prune("0.5")  # type: ignore[operator]


def test_a_mask_is_found_once_for_what_it_hangs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of a step share it; it is found anew for another sparsity, weight, or number, also one written to `.data`."""
    found: list[int] = []
    monkeypatch.setattr(pruned, "smallest", lambda scores, count: found.append(count) or smallest(scores, count))
    layer, weight = pruned.Pruned(4, 3, 1, 1, (1.0, 1.0, 1.0)), torch.randn(3, 4)
    layer.prune(0.5)
    for change in (
        lambda: None,
        lambda: layer.prune(0.25),
        lambda: weight.mul_(-1.0).add_(0.5),
        lambda: layer.mask_c.data.mul_(0).add_(torch.tensor([3.0, 0.0, 0.0, 3.0])),
    ):
        change()
        before = len(found)
        for _ in range(3):
            scores = pruned._scored(weight, [*layer.parameters()], layer.factors)[1]
            assert torch.equal(layer(weight) != 0, select_of(scores, int(layer.removed)))
        assert len(found) == before + 1
    twin = copy.deepcopy(layer)
    assert twin.kept is None and torch.equal(twin(weight), layer(weight))


def test_gradients_are_those_of_autograd() -> None:
    """The backward by hand against the same step in plain operations, the mask held and its gradient handed to the scores."""
    layer = pruned.Pruned(6, 5, 2, 3, (0.7, 1.3, 0.4)).double()
    weight = torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    layer.prune(0.4)
    pull = torch.randn(5, 6, dtype=torch.float64)
    tensors = [weight, *layer.parameters()]
    found = torch.autograd.grad((layer(weight) * pull).sum(), tensors)
    new, scores = pruned._scored(weight, [*layer.parameters()], layer.factors)
    mask = select_of(scores, 12)
    expected = torch.autograd.grad(((mask * new + (scores - scores.detach()) * new.detach()) * pull).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def select_of(scores: torch.Tensor, count: int) -> torch.Tensor:
    """By sorting alone."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.detach().flatten().argsort(stable=True)[:count]] = False
    return mask.view(scores.shape)


@pytest.mark.parametrize("count", [0, 1, 7, 19, 20])
def test_selecting_is_sorting(count: int) -> None:
    scores = torch.tensor([3, 1, 2, 2, 2, 1, 0, 2, 3, 3, 2, 2, 0, 1, 1, 2, 2, 2, 3, 0.0]).view(4, 5)
    expected = select_of(scores, count)
    assert torch.equal(~smallest(scores, count), expected)
    assert torch.equal(pruned._by_sorting(scores, torch.tensor(count)), expected)
