"""DSL: what an update moves and what follows it, its limits, resuming, bad input. See also tests/fidelity/test_dsl_authors.py."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import attach, bare, images, loss_of, targets
from torch import Tensor
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.errors import ConfigError, MismatchError

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 12, "checkpoint_every": 1}  # 4 steps an epoch


def dsl(**settings: Any) -> zoo.Adapter:
    return zoo.adapter("dsl", **{"interval": 3, **settings})


def matrices(model: zoo.Model) -> dict[str, Tensor]:
    """W' of every point, of the merged network."""
    plain = model.merge()
    found = {}
    for name in model.adapters["dsl"].parts():  # type: ignore[operator]
        point = model.points[name]
        found[name] = plain.get_submodule(point.path).weight[point.start : point.stop].detach().clone()
    return found


class Watch:
    """W' and masks behind every step; breaks off behind step `stop`."""

    def __init__(self, stop: int = 99) -> None:
        self.stop, self.seen, self.moments = stop, [], []

    def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
        self.service = optimizer

    def step_end(self, model: Any, step: int) -> None:
        adapter = model.adapters["dsl"]
        masks = {n: p.mask.clone() for n, p in adapter.parts().items()}
        self.seen.append((masks, matrices(model), adapter.explored()))
        state = {n: self.service.state(p.delta)["exp_avg"].clone() for n, p in adapter.parts().items()}
        self.moments.append((state, {n: s.clone() for n, s in adapter.rearranged.items()}))
        if step == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("start", ["magnitude", "global", "random"])
def test_a_fit_moves_the_masks_and_keeps_their_size(start: str) -> None:
    model = tiny_model(dsl(density=0.3, start=start))
    adapter: Any = model.adapters["dsl"]
    counts = {n: len(p.delta) for n, p in adapter.parts().items()}
    sizes = {n: p.mask.numel() for n, p in adapter.parts().items()}
    assert abs(sum(counts.values()) - 0.3 * sum(sizes.values())) <= len(sizes)
    assert (len({round(n / sizes[k], 2) for k, n in counts.items()}) > 1) == (start == "global")
    first = {n: p.mask.clone() for n, p in adapter.parts().items()}
    if start == "magnitude":
        for name, part in adapter.parts().items():
            weight = model.points[name].weight.abs()  # type: ignore[attr-defined]
            assert weight[part.mask].min() >= weight[~part.mask].max()
    fit(model, easy_data(48), callbacks=[watch := Watch()], **OPTIONS)
    before, explored = first, 0.0
    for step, (masks, merged, ever) in enumerate(watch.seen, 1):
        assert ever >= explored
        explored = ever
        for name, mask in masks.items():
            assert int(mask.sum()) == counts[name]
            assert not (merged[name].bool() & ~mask).any()
            gone = int((before[name] & ~mask).sum())
            if step % 3:
                assert gone == 0
                # what has grown into a unit that nothing reaches has no gradient, and stays 0
                assert (merged[name][mask] != 0).float().mean() > 0.9
            else:
                assert gone <= math.ceil(adapter.ratio(step, 12) * counts[name])
                assert not merged[name][mask & ~before[name]].any()  # what has grown is 0
        if step % 3 == 0:
            assert any((before[n] != mask).any() for n, mask in masks.items())
            state, source = watch.moments[step - 1]
            old = watch.moments[step - 2][0]
            for name in masks:  # momenta go with their entries, and are 0 where these are new
                new = source[f"{name}.delta"] < 0
                assert not state[name][new].any() and state[name][~new].any()
                assert old[name].shape == state[name].shape
        before = masks
    assert 0.3 < explored < 1 and adapter.explored() is None


def test_ratio_0_keeps_the_first_mask() -> None:
    model = tiny_model(dsl(update_ratio=0.0, interval=10_000))
    first = {n: p.mask.clone() for n, p in model.adapters["dsl"].parts().items()}  # type: ignore[operator]
    start = weights(model)
    fit(model, easy_data(48), **OPTIONS)
    assert all(torch.equal(p.mask, first[n]) for n, p in model.adapters["dsl"].parts().items())  # type: ignore[operator]
    assert difference(weights(model), start) > 1e-4


def test_density_1_is_full_training_of_the_matrices() -> None:
    model = bare("vit")
    plain = copy.deepcopy(model.backbone)
    attach(model, "dsl", density=1.0)
    adapter: Any = model.adapters["dsl"]
    loss_of(model.train()).backward()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    torch.nn.functional.cross_entropy(model.head(plain(images())), targets()).backward()
    for name, part in adapter.parts().items():
        point: Any = model.points[name]
        gradient = plain.get_submodule(point.path).weight.grad[point.start : point.stop]
        torch.testing.assert_close(part.delta.grad.view(gradient.shape), gradient, rtol=1e-4, atol=1e-7)
        assert part.update(0.5, point.weight, gradient) is None  # there is nowhere to go


def test_dropped_and_grown_at_once_stays() -> None:
    from zoo.adapters.parts.sparse import Sparse

    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5, 0.25]])
    part = Sparse(torch.tensor([[True, True, True, True, False, False]]), 4)
    with torch.no_grad():
        part.delta.copy_(torch.tensor([0.0, 0.0, -0.5, 0.5]))  # W' = 4, 3, 1.5, 1.5
    source = part.update(0.5, weight, torch.tensor([[9.0, 9.0, 5.0, 0.0, -7.0, 0.0]]))
    assert source is not None and source.tolist() == [0, 1, 2, -1]
    assert part(weight).tolist() == [[4.0, 3.0, 1.5, 0.0, 0.0, 0.0]]
    assert part.mask.tolist() == [[True, True, True, False, True, False]]


def test_cut_off_between_updates(tmp_path: Path) -> None:
    fit(whole := tiny_model(dsl()), easy_data(48), ema=0.9, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(dsl()), easy_data(48), ema=0.9, checkpoint=tmp_path, callbacks=[Watch(6)], **OPTIONS)
    model = tiny_model(dsl())
    fit(model, easy_data(48), ema=0.9, checkpoint=tmp_path, callbacks=[watch := Watch()], **OPTIONS)
    assert watch.seen[0][2] > 0.5  # what has been there is known
    assert difference(weights(model), weights(whole)) == 0
    pairs = zip(model.adapters["dsl"].buffers(), whole.adapters["dsl"].buffers(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_averages_follow_the_entries() -> None:
    """An average that belonged to another entry would stand at a weight that has just been grown."""
    from zoo.train.ema import Ema

    class Check:
        def step_end(self, model: Any, step: int) -> None:
            for name, source in model.adapters["dsl"].rearranged.items():
                average, value = ema[0].values[f"dsl/{name}"], model.parameters_to_train()[f"dsl/{name}"]
                new = source < 0
                assert torch.equal(average[new], value[new]) and not torch.equal(average[~new], value[~new])

    ema: list[Ema] = []
    begin = Ema.__init__

    def remember(self: Ema, *args: Any) -> None:
        begin(self, *args)
        ema.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ema, "__init__", remember)
        fit(tiny_model(dsl()), easy_data(48), ema=0.9, callbacks=[Check()], **OPTIONS)


def test_compiled_steps_with_and_without_an_update() -> None:
    model = bare("vit", depth=1)
    attach(model, "dsl")
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for run in (model, compiled):
        hooks = zoo.training_hooks(model)
        hooks.fit_start(torch.optim.SGD(model.parameters_to_train().values(), lr=0.0), 8)
        hooks.step_start(1)
        torch.nn.functional.cross_entropy(run(images()), targets()).backward()
        parts = model.adapters["dsl"].parts()  # type: ignore[operator]
        dense = {n: p.probe.grad for n, p in parts.items()}
        if run is model:
            expected = dense
        for name, part in parts.items():
            torch.testing.assert_close(dense[name], expected[name], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(dense[name][part.mask], part.delta.grad, rtol=1e-4, atol=1e-7)
        hooks.fit_end()
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"update_ratio": 1.0}, "update_ratio"),
        ({"final_ratio": 0.6}, "final_ratio"),
        ({"interval": 0}, "interval"),
        ({"start": "best"}, "start"),
    ],
)
def test_settings_without_a_meaning(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dsl(**settings)


def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny_model(dsl(interval=13))
    with pytest.raises(ConfigError, match=r"every 13 steps \(interval=\), and the run has 12"):
        fit(model, easy_data(48), **OPTIONS)
    with pytest.raises(ConfigError, match="device have no values"):
        zoo.load("vit-b16", adapter=dsl(start="global"), pretrained=False, num_classes=0, device="meta")
    adapter = dsl(start="global")
    adapter.plan = tiny_model(dsl(start="global")).adapters["dsl"].plan  # type: ignore[assignment]
    with pytest.raises(MismatchError, match="not one of these matrices"):
        bare("vit", depth=1).add_adapter(adapter)
    state = model.adapter_state_dict()
    name = next(n for n in state if n.endswith("mask"))
    state[name] = ~state[name]
    state[name].view(-1)[0] ^= True
    with pytest.raises(MismatchError, match="Take the adapter as it was saved"):
        model.load_adapter_state_dict(state)
