"""SPT: what is tuned, how it is computed, and with others. See also test_spt_choice.py and tests/fidelity/test_spt_authors.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spt_models import IMAGES, QUIET, SETTINGS, VIT, batches, both, build, calibrated, shake, snapshot
from torch import Tensor
from torch.nn.functional import cross_entropy

import zoo
import zoo.adapters.parts.sampled
from vision.adapters.parts.tuned import Tuned
from zoo.disk import attach, read
from zoo.errors import AttachError, CombinationError, ConfigError, MergeError, MismatchError
from zoo.train.checkpoint import restore, restore_plans
from zoo.train.checkpoint import snapshot as snapshot_of

# -- what is tuned ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_start_and_counts(family: str, form: str) -> None:
    model = build(family)
    logits = model(IMAGES)
    adapter = model.add_adapter(zoo.adapter("spt", form=form, **SETTINGS))
    assert not list(adapter.parameters()) and torch.equal(model(IMAGES), logits)
    adapter.calibrate(model, batches())
    plan = adapter.plan
    assert plan is not None and plan["structured"] and plan["vectors"] and plan["entries"]
    assert torch.equal(model(IMAGES), logits)
    assert torch.equal(model.train()(IMAGES), logits)  # what is dropped is a change, of which there is none yet
    report = plan["report"]
    parts = ("structured", "vectors", "entries", "tokens")
    assert model.num_parameters(trainable=True, head=False) == report["tuned"] == sum(report[p] for p in parts)
    assert report["total"] == report["tuned"] + report["norm_entries"]
    assert report["tokens"] == (48 if family == "vit" else 0)
    assert sum(n for key, n in plan["entries"].items()) == report["entries"]
    assert model.probe(IMAGES) == []
    indices = {k: v for k, v in adapter.named_buffers() if k.endswith("_index")}
    assert {k.removesuffix("_index"): len(v) for k, v in indices.items()} == plan["entries"]
    assert all(v.dtype == torch.int32 and bool((v[1:] > v[:-1]).all()) for v in indices.values())


def dense(model: zoo.Model, adapter: zoo.Adapter) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The merged module, and of each tuned projection's weight and bias what was added, dense."""
    return model.merge(), {
        f"{name}.{part}": torch.zeros(
            model.points[name].dim_out * (model.points[name].dim_in if part == "weight" else 1)
        ).index_add(0, getattr(module, f"{part}_index").long(), getattr(module, f"{part}_delta").detach())
        for name, module in adapter.named_modules()
        if isinstance(module, Tuned)
        for part in ("weight", "bias")
        if getattr(module, f"{part}_index") is not None
    }


@both
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_gradients_are_those_of_the_dense_weights(family: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.adapters.parts.sampled, "DENSE", share)
    model = build(family)
    adapter = calibrated(model)
    shake(adapter)
    targets = torch.arange(4)
    cross_entropy(model(IMAGES), targets).backward()
    plain, changes = dense(model, adapter)
    torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    cross_entropy(plain(IMAGES), targets).backward()
    assert len(changes) >= 4
    for key, change in changes.items():
        place, _, part = key.rpartition(".")
        point = model.points[place]
        full = plain.get_submodule(point.path).get_parameter(part)
        rows = slice(point.start, point.stop)
        module: Any = adapter.module_at(point)
        index = getattr(module, f"{part}_index").long()
        mine = getattr(module, f"{part}_delta").grad
        torch.testing.assert_close(mine, full.grad[rows].flatten()[index], rtol=1e-4, atol=1e-7)
        if module.structured is None:
            frozen = point.weight if part == "weight" else point.bias
            torch.testing.assert_close(full.data[rows].flatten(), frozen.flatten() + change)


@pytest.mark.parametrize("memory", ["low", "min"])
@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_memory_settings_give_the_same_gradients(form: str, memory: str) -> None:
    found = []
    for setting in ("default", memory):
        model = build(memory=setting)
        shake(calibrated(model, form=form))
        model.train()
        torch.manual_seed(4)  # of the dropped inputs
        cross_entropy(model(IMAGES), torch.arange(4)).backward()
        found.append({k: p.grad for k, p in model.parameters_to_train().items()})
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-5, atol=1e-8)


def test_no_weight_matrix_is_kept_for_backward() -> None:
    kept = []
    for budget in (0.0008, 0.0):  # single entries only, and the same without them
        model = build(embed_dim=192, depth=1)
        adapter = model.add_adapter(zoo.adapter("spt", budget=0.0008, **QUIET))
        adapter.calibrate(model, batches())
        assert adapter.plan is not None and not adapter.plan["structured"] and len(adapter.plan["entries"]) > 3
        if not budget:
            adapter.plan = {**adapter.plan, "entries": {}}
            model.reattach("spt")
        kept.append(model.saved_bytes(IMAGES[:1]))
    tokens = 65 * 4
    # inputs: of qkv and up a norm, which is recomputed; of o the attention's output, kept anyway; of down a GELU, recomputed
    assert kept[0] - kept[1] < 192 * tokens < 192 * 192 * 4


def test_drops_images_and_inputs() -> None:
    model = build()
    adapter = calibrated(model, dropout=0.0, drop_path=0.5)
    shake(adapter)
    name = next(n for n in adapter.plan["structured"] if n.endswith("mlp.up"))
    module: Any = adapter.module_at(name)
    point = model.points[name]
    x, weight, bias = torch.randn(64, 7, 48), point.weight, point.bias
    parts = ((module, 0, point.dim_out),)
    run = torch.nn.functional.linear
    frozen = module.eval().linear_group(parts, lambda *a: run(*a), torch.zeros_like(x), weight, bias)
    whole = module.linear_group(parts, run, x, weight, bias) - run(x, weight) - frozen
    torch.manual_seed(0)
    thin = module.train().linear_group(parts, run, x, weight, bias) - run(x, weight) - frozen
    ratio = ((thin * whole).flatten(1).sum(1) / (whole * whole).flatten(1).sum(1)).detach()
    assert torch.all((ratio.abs() < 1e-4) | ((ratio - 2).abs() < 1e-4))
    assert 16 < int((ratio > 1).sum()) < 48
    module.path.p, module.drop.p = 0.0, 0.25
    dropped = module.thinned(torch.ones(1000, 48))
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


@both
def test_half_precision(family: str) -> None:
    model = build(family)
    adapter = calibrated(model, **QUIET)
    shake(adapter)
    expected = model(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(model(IMAGES).float(), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
    torch.testing.assert_close(loss, cross_entropy(expected, torch.arange(4)), rtol=0.02, atol=0.02)
    model.to(torch.bfloat16)
    assert all(b.dtype == torch.int32 for n, b in adapter.named_buffers() if n.endswith("_index"))
    torch.testing.assert_close(model(IMAGES.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


# -- merging, saving, calibrating again, other adapters ---------------------------------------------------------------


def test_merging() -> None:
    model = build()
    adapter = calibrated(model, form="adapter")
    with pytest.raises(MergeError, match=r"'spt' .*cannot be merged: .*nonlinearity"):
        model.merge()
    adapter.plan = {**adapter.plan, "structured": []}
    model.reattach("spt")
    shake(adapter)
    torch.testing.assert_close(model.merge()(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_merging_behind_a_rescaled_output() -> None:
    """The order of attachment is that of the outputs; a changed bias of the projection itself comes before both."""
    model = build()
    shake(model.add_adapter("ssf"))
    shake(calibrated(model))
    torch.testing.assert_close(model.merge()(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_saving(form: str, tmp_path: Path) -> None:
    model = build()
    adapter = calibrated(model, form=form)
    shake(adapter)
    model.save_adapter(tmp_path)
    again = build(seed=9)
    attach(again, read(tmp_path))
    loaded = again.adapters["spt"]
    assert loaded.plan == adapter.plan
    assert torch.equal(again(IMAGES), model(IMAGES))
    hooks = zoo.training_hooks(again)
    assert not hooks.needs_calibration
    hooks.calibrate(batches())
    assert torch.equal(again(IMAGES), model(IMAGES))
    third = build()
    third.add_adapter(loaded)  # a copy starts at nothing, at the same places
    assert all(torch.equal(b, loaded.get_buffer(n)) for n, b in third.adapters["spt"].named_buffers())
    assert third.probe(IMAGES) == []


def test_resuming_attaches_what_was_chosen() -> None:
    model = build()
    shake(calibrated(model))
    saved = snapshot_of(model)
    for calibrate in (False, True):
        again = build(seed=9)
        again.add_adapter(zoo.adapter("spt", **SETTINGS))
        if calibrate:  # on something else
            again.adapters["spt"].calibrate(again, batches(1))
        restore_plans(again, saved.adapters)
        restore(again, saved)
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_a_saved_index_outside_of_the_matrix() -> None:
    adapter = calibrated(build())
    state = adapter.state_dict()
    key = next(k for k in state if k.endswith("weight_index"))
    for bad in (-1, 10**6):
        state[key] = torch.full_like(state[key], bad)
        with pytest.raises(MismatchError, match="outside of the"):
            adapter.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"structured": ["blocks.7.attn.q"]}, r"names 1 points .* 'blocks.7.attn.q'"),
        ({"entries": None}, "plan of 'spt' is damaged"),
    ],
)
def test_a_plan_that_does_not_fit(change: dict[str, Any], match: str) -> None:
    model = build()
    adapter = zoo.adapter("spt")
    adapter.plan = {"structured": [], "vectors": ["norm.bias"], "entries": {}, "tokens": [], **change}
    with pytest.raises(ConfigError, match=match):
        model.add_adapter(adapter)
    assert not model.adapters


def test_calibrating_again_starts_from_the_pretrained_weights() -> None:
    model = build()
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    logits = model(IMAGES)
    adapter = calibrated(model)
    first = adapter.plan
    shake(adapter, 0.5)
    assert not torch.equal(model(IMAGES), logits)
    adapter.calibrate(model, batches())
    assert adapter.plan == first
    assert torch.equal(model(IMAGES), logits)
    model.remove_adapter("spt")
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())


def test_with_prompts() -> None:
    model = build()
    model.add_adapter(zoo.adapter("vpt", num_tokens=3))
    prompted = model(IMAGES)
    adapter = calibrated(model)
    assert torch.equal(model(IMAGES), prompted)
    shake(adapter)
    assert model.train().probe(IMAGES) == []
    model.eval()
    # the same on a backbone whose weights hold SPT's changes
    with torch.no_grad():
        both_live = model(IMAGES)
        model.set_active("spt")
        merged = build()
        merged.backbone.load_state_dict(
            {k: v for k, v in model.merge().state_dict().items() if not k.startswith("head.")}
        )
        merged.head.load_state_dict(model.head.state_dict())
        merged.add_adapter(zoo.adapter("vpt", num_tokens=3))
        merged.adapters["vpt"].load_state_dict(model.adapters["vpt"].state_dict())
        torch.testing.assert_close(both_live, merged(IMAGES), rtol=1e-4, atol=1e-5)


def test_two_of_them_and_dora_add_up() -> None:
    model = build()
    shake(calibrated(model, **QUIET))
    with model.disable():
        second = model.add_adapter(zoo.adapter("spt", **{**SETTINGS, **QUIET, "budget": 0.0008}), "other")
        second.plan = {
            "structured": [],
            "vectors": [],
            "entries": {"blocks.0.attn.q.weight": 9, "blocks.1.mlp.up.bias": 4},
        }
        second.plan["tokens"] = []
        second._indices = {k + "_index": torch.arange(n, dtype=torch.int32) for k, n in second.plan["entries"].items()}
        model.reattach("other")
    shake(second)
    model.add_adapter(zoo.adapter("lora", dora=True, rank=2), activate=False)
    shake(model.adapters["lora"])
    for names in (("spt", "other"), ("spt", "lora"), ("lora", "spt", "other")):
        model.set_active(*names)
        assert model.probe(IMAGES) == []
        torch.testing.assert_close(model.merge()(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_bitfit_beside_it_is_refused() -> None:
    model = build()
    model.add_adapter("bitfit")
    shake(model.adapters["bitfit"])
    adapter = model.add_adapter(zoo.adapter("spt", **SETTINGS))
    logits, before = model(IMAGES), snapshot(model)
    with pytest.raises(CombinationError, match="both train the same"):
        adapter.calibrate(model, batches())
    assert adapter.plan is None and snapshot(model) == before
    assert torch.equal(model(IMAGES), logits)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="budget is 0"):
        zoo.adapter("spt", budget=0.0)
    with pytest.raises(ConfigError, match=r"dropout is 1\.0"):
        zoo.adapter("spt", dropout=1.0)
    with pytest.raises(ConfigError, match="form"):
        zoo.adapter("spt", form="lara")
    adapter = zoo.adapter("spt")
    with pytest.raises(ConfigError, match="attached to no model"):
        adapter.calibrate(build(), batches())
    headless = zoo.load("vit-micro", pretrained=False, num_classes=0, **VIT)
    with pytest.raises(ConfigError, match="needs a head"):
        headless.add_adapter("spt").calibrate(headless, batches())
    with pytest.raises(AttachError, match="no token of its own"):
        swin = build("swin")
        stray = zoo.adapter("spt")
        stray.plan = {"structured": [], "vectors": [], "entries": {}, "tokens": ["stages.0.blocks.0.tokens"]}
        swin.add_adapter(stray)


def test_budgets_that_cannot_be() -> None:
    """Below the class token and one entry, or above all weights that are candidates; the model stays as it was."""
    model = build()
    whole = sum(p.numel() for n, p in model.backbone.named_parameters() if n.startswith(("blocks.", "norm.", "cls")))
    for budget in (48 / 1e6, (whole + 1) / 1e6):
        adapter = model.add_adapter(zoo.adapter("spt", budget=budget))
        with pytest.raises(ConfigError, match=rf"{whole:,} can be tuned.* Expected 0\.000049 to {whole / 1e6:.6f}"):
            adapter.calibrate(model, batches())  # type: ignore[operator]
        assert adapter.plan is None
        model.remove_adapter("spt")


def test_fit_calibrates_and_learns(image_folder: Path) -> None:
    model = build()
    model.add_adapter(zoo.adapter("spt", num_batches=2, **SETTINGS))
    model.reset_head(2)
    train, test = image_folder / "train", image_folder / "test"
    report = zoo.fit(model, train, test, epochs=4, batch_size=8, lr=3e-3, augment="none", progress=False)
    adapter = model.adapters["spt"]
    assert adapter.plan is not None and adapter.plan["report"]["batches"] == 2
    assert report.parameters == adapter.plan["report"]["tuned"] + 2 * 48 + 2
    assert zoo.evaluate(model, test, progress=False)["accuracy"] > 0.8
