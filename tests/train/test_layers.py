"""What each layer has at the end of an epoch: in the report, in its picture, and again after a kill."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_parts import Stop, StopAt, easy_data, fit, tiny_model

import zoo
from zoo.adapters.parts.stepped import Levels, first_step
from zoo.train import IST
from zoo.train.report import layers_picture

SIX = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
POINTS = [f"blocks.{i}.{name}" for i in range(2) for name in SIX]


def column(report: Any, owner: str, what: str, number: int = -1) -> dict[str, float]:
    return report.layers[number]["of"][owner][what]


def test_ranks_within_the_budget(tmp_path: Path) -> None:
    """AdaLoRA's: those that an evaluation sees, and in the end those that are cut out."""
    model = tiny_model(zoo.adapter("adalora", rank=3, target_rank=1))
    seen: list[dict[str, int]] = []

    class Look:
        def eval_end(self, model: Any) -> None:
            """In front of it e is 0 outside of the budget."""

        def eval_start(self, model: Any) -> None:  # behind the adapter's own
            parts = model.adapters["adalora"].parts()
            seen.append({name: int(part.lora_e.count_nonzero()) for name, part in parts.items()})

    report = fit(model, easy_data(64), easy_data(16, 1), epochs=6, lr=1e-2, callbacks=[Look()], out=tmp_path)
    ranks = model.adapters["adalora"].ranks()  # type: ignore[operator,union-attr]
    assert column(report, "adalora", "rank") == ranks and sum(ranks.values()) == 12 and list(ranks) == POINTS
    sums = [sum(entry["of"]["adalora"]["rank"].values()) for entry in report.layers]
    assert sums[0] > 12 and sums == sorted(sums, reverse=True)
    evaluated = seen[-6:]  # the first is of the rehearsal
    for entry in report.layers[1:]:
        assert entry["of"]["adalora"]["rank"] == evaluated[entry["epoch"] - 1]
        assert entry["step"] == 4 * entry["epoch"]
    epochs = [entry["epoch"] for entry in report.layers]
    assert epochs == sorted(set(epochs)) and len(epochs) < 6, "what did not change is not told again"
    assert json.loads((tmp_path / "report.json").read_text())["layers"] == report.layers
    with Image.open(tmp_path / "layers.png") as picture:
        assert picture.format == "PNG" and picture.height > 300
    fit(tiny_model(), easy_data(16), epochs=1, out=tmp_path)
    assert not (tmp_path / "layers.png").exists(), "LoRA's layers have nothing to show"


def test_ranks_that_grow() -> None:
    model = tiny_model(zoo.adapter("increlora", rank=1, target_rank=3))
    report = fit(model, easy_data(64), epochs=5)
    adapter: Any = model.adapters["increlora"]
    assert column(report, "increlora", "rank") == adapter.ranks()
    first = {name: adapter.ranks()[name] - sum(g.get(name, 0) for t, g in adapter.grown if t >= 4) for name in POINTS}
    assert column(report, "increlora", "rank", 0) == first


@pytest.mark.parametrize("method", ["adalora", "ist"])
def test_a_killed_run_goes_on_with_its_record(method: str, tmp_path: Path) -> None:
    def run(*callbacks: Any, **options: Any) -> Any:
        adapter = zoo.adapter("adalora", rank=3, target_rank=1) if method == "adalora" else "lora"
        more = [IST(every=2)] if method == "ist" else []
        return fit(tiny_model(adapter), easy_data(64), epochs=4, lr=1e-2, callbacks=[*more, *callbacks], **options)

    whole = run()
    assert [entry["epoch"] for entry in whole.layers][:2] == [1, 2]
    with pytest.raises(Stop):
        run(StopAt(6), checkpoint=tmp_path, checkpoint_every=1)  # in the middle of the second epoch
    assert run(checkpoint=tmp_path).layers == whole.layers


def test_how_often_blocks_learned() -> None:
    sampler = IST(every=2)
    report = fit(tiny_model(), easy_data(64), epochs=3, callbacks=[sampler])
    told = [entry["of"]["IST"]["steps in which it learned"] for entry in report.layers]
    assert [sum(t.values()) for t in told] == [4, 4, 4], "one block in each of the four steps of an epoch"
    assert [sum(t[block] for t in told) for block in sampler.blocks] == sampler.updates
    assert column(report, "IST", "score") == dict(zip(sampler.blocks, sampler.scores.tolist(), strict=True))


def test_what_is_left_of_a_mask() -> None:
    """PST's falls by its schedule; DSL's stays and wanders; PERP's stays."""
    model = tiny_model(zoo.adapter("pst", sparsity=0.6, rank=2, mask_rank=2))
    report = fit(model, easy_data(64), epochs=4)
    adapter: Any = model.adapters["pst"]
    for entry in report.layers:
        left = entry["of"]["pst"]["part left"]
        v = adapter.schedule(entry["step"], 16)
        for name in POINTS:
            size = adapter.module_at(name).numel
            assert left[name] == pytest.approx(1 - int(v * size) / size)
    assert len(report.layers) >= 3

    model = tiny_model(zoo.adapter("dsl", density=0.25, interval=2))
    report = fit(model, easy_data(64), epochs=3)
    assert all(part == 0.25 for part in column(report, "dsl", "part left").values())
    ever = [column(report, "dsl", "part ever there", n) for n in range(len(report.layers))]
    assert all(0.25 < a[n] <= b[n] for a, b in pairwise(ever) for n in POINTS)

    report = fit(tiny_model(zoo.adapter("perp", rank=2, sparsity=0.75)), easy_data(16), epochs=2)
    assert len(report.layers) == 1 and column(report, "perp", "part left") == dict.fromkeys(POINTS, 0.25)


def test_what_a_choice_before_training_gave() -> None:
    """LT-SFT's entries, of weights and biases; DiffoRA's gates and what they keep."""
    model = tiny_model(zoo.adapter("lt-sft", entries=400, full_epochs=1))
    report = fit(model, easy_data(32), epochs=2)
    told = column(report, "lt-sft", "part tuned")
    sizes = {f"{n}.{part}": p.numel() for n in POINTS for part, p in holders(model, n).items()}
    assert sum(told[key] * size for key, size in sizes.items()) == pytest.approx(400) and told.keys() == sizes.keys()

    model = tiny_model(zoo.adapter("diffora", rank=2, warmup=2, steps=2))
    report = fit(model, easy_data(64), epochs=2)
    plan: Any = model.adapters["diffora"].plan
    assert column(report, "diffora", "gate") == plan["gates"] and len(report.layers) == 1
    kept = column(report, "diffora", "kept")
    assert list(kept) == POINTS and {name for name, one in kept.items() if one} == set(plan["kept"])


def holders(model: zoo.Model, name: str) -> dict[str, torch.Tensor]:
    point: Any = model.points[name]
    return {"weight": point.weight, "bias": point.bias}


def test_steps_of_rounding() -> None:
    model = tiny_model(zoo.adapter("l4q", rank=2, bits=3, group=8))
    report = fit(model, easy_data(32), epochs=2, lr=1e-2)
    told = column(report, "l4q", "step, by the first")
    for name in POINTS:
        part: Any = model.adapters["l4q"].module_at(name)  # type: ignore[operator,union-attr]
        first = first_step(model.points[name].weight, 8, Levels(3))  # type: ignore[union-attr]
        ratios = (part.log_step.detach().exp() / first).flatten().tolist()
        assert told[name] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-4) and told[name] != 1


def test_both_phases_of_a_regime(tmp_path: Path) -> None:
    """DSEE's masks are the backbone's, behind the pruning."""
    small: dict[str, Any] = {"rank": 2, "entries": 4, "rounds": 2, "epochs": 1, "retune_epochs": 1, "batch_size": 8}
    data = zoo.open_dataset(easy_data(24), classes=list("abcd"))
    report = zoo.run(tiny_model(None), "dsee", data, out=tmp_path, fit={"progress": False}, sparsity=0.3, **small)
    tune, retune = report.phases
    assert tune["layers"] == [] and (tmp_path / "layers.png").exists()
    told = retune["layers"][0]["of"]["dsee"]["part left"]
    for name in POINTS:
        weight = report.model.points[name].weight
        assert told[name] == pytest.approx(float((weight != 0).float().mean()), abs=1e-6)


def test_the_picture_of_what_comes_and_goes() -> None:
    """A layer that is not there in an epoch has no colour there; whole numbers are coloured from 0."""
    entries = [
        {"epoch": 1, "step": 2, "of": {"a": {"rank": {"x": 1, "y": 2}}}},
        {"epoch": 3, "step": 6, "of": {"a": {"rank": {"x": 1}}, "b": {"score": {"z": -0.5}}}},
    ]
    assert layers_picture(entries).startswith(b"\x89PNG")
