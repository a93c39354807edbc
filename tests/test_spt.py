"""SPT: scores, the choice within a budget, what is tuned, and how it is computed. See also tests/fidelity/test_spt_authors.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import vision.tuned
import zoo
from vision.sensitivity import Candidate, candidates, choose, grid, most_sensitive, sensitivity, spend
from vision.tuned import Tuned
from zoo.disk import attach, read
from zoo.errors import AttachError, CombinationError, ConfigError, DataError, MergeError, MismatchError
from zoo.train.checkpoint import restore, restore_plans
from zoo.train.checkpoint import snapshot as snapshot_of

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit-micro", VIT),
    "swin": ("timm:swin_tiny_patch4_window7_224", SWIN),
}
# chooses single entries of matrices and vectors, whole vectors and structured matrices in both families
SETTINGS: dict[str, Any] = {"budget": 0.0025, "rank": 4}
QUIET = {"dropout": 0.0, "drop_path": 0.0}

both = pytest.mark.parametrize("family", list(FAMILIES))


def build(family: str = "vit", seed: int = 0, **options: Any) -> zoo.Model:
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = zoo.load(name, pretrained=False, num_classes=5, **{**sizes, **options})
    torch.manual_seed(seed)
    model.reset_head(5)
    return model


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4) + i % 2) for i in range(count)]


IMAGES = batches(1)[0][0]


def calibrated(model: zoo.Model, **settings: Any) -> zoo.Adapter:
    adapter = model.add_adapter(zoo.adapter("spt", **{**SETTINGS, **settings}))
    adapter.calibrate(model, batches())
    return adapter


def shake(adapter: torch.nn.Module, std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator))


def snapshot(model: zoo.Model) -> list[Any]:
    return [
        (n, p.requires_grad, p.grad, m.training) for m in model.modules() for n, p in m.named_parameters(recurse=False)
    ]


# -- scores -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("memory", ["default", "min"])
def test_scores_are_squared_gradients_of_batch_means(family: str, memory: str) -> None:
    model = build(family, memory=memory)
    found = candidates(model.points, "lora", 4, 10, 5)
    for parameter in model.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.train()
    before = snapshot(model)
    scores, count, samples = sensitivity(model, found, iter(batches(4)), 3, model.head)
    assert (count, samples) == (3, 12)
    assert all(a[:2] == b[:2] and a[2] is b[2] and a[3] == b[3] for a, b in zip(before, snapshot(model)))

    plain = model.eval().merge()
    expected = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for inputs, targets in batches(3):
        loss = cross_entropy(plain(inputs), targets)
        for name, grad in zip(expected, torch.autograd.grad(loss, list(plain.parameters()))):
            expected[name] += grad**2
    for candidate, score in zip(found, scores):
        whole = expected[f"{candidate.point.path}.{candidate.part}"]
        if candidate.point.name.rpartition(".")[2] in "qkv":
            whole = whole.chunk(3)["qkv".index(candidate.point.role)]
        torch.testing.assert_close(score, whole.flatten(), rtol=1e-4, atol=1e-12)


@both
def test_candidates(family: str) -> None:
    model = build(family)
    found = candidates(model.points, "lora", 4, 10, 5)
    keys = {c.key for c in found}
    assert not [k for k in keys if "patch_embed" in k or "merge" in k]
    assert {"norm.weight", "norm.bias"} <= keys
    # everything but the embedding (with its tokens), merging, tables of positions and the head
    out = ("patch_embed", "downsample", "token", "pos_embed", "relative_position")
    rest = [p.numel() for n, p in model.backbone.named_parameters() if not any(o in n for o in out)]
    assert sum(c.size for c in found) == sum(rest)


def test_unit_costs() -> None:
    points = zoo.load("vit-b16", pretrained=False, num_classes=0, device="meta").points
    costs = {form: {c.key: c.cost for c in candidates(points, form, 8, 10, 5)} for form in ("lora", "adapter")}
    name = "blocks.3.attn.q.weight", "blocks.3.attn.o.weight", "blocks.3.mlp.up.weight", "blocks.3.mlp.down.weight"
    assert [costs["lora"][n] for n in name] == [12_288, 12_288, 30_720, 30_720]
    assert [costs["adapter"][n] for n in name] == [13_064, 13_064, 52_232, 13_064]
    assert sum(c.size for c in candidates(points, "lora", 8, 10, 5)) == 12 * 7_087_872 + 2 * 768


@pytest.mark.parametrize(
    ("inputs", "targets", "match"),
    [
        (IMAGES, torch.tensor([0, 1, 2, 5]), "run from 0 to 5; the head has 5"),
        (IMAGES * float("nan"), torch.arange(4), "loss of calibration batch 1 is nan"),
        (None, None, "no batch"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(inputs: Tensor | None, targets: Tensor, match: str) -> None:
    model = build()
    adapter = model.add_adapter("spt")
    model.train()
    before, logits = snapshot(model), model(IMAGES)
    with pytest.raises(DataError, match=match):
        adapter.calibrate(model, [] if inputs is None else [(inputs, targets)])
    assert snapshot(model) == before and adapter.plan is None
    assert torch.equal(model(IMAGES), logits)


# -- the choice -------------------------------------------------------------------------------------------------------


def test_the_highest_scores_in_order() -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 50, n).astype(np.float32) for n in (700, 10, 300, 2000, 1, 500)]  # many equal scores
    flat = np.concatenate(arrays)
    owners = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
    places = np.concatenate([np.arange(len(a)) for a in arrays])
    order = np.lexsort((np.arange(len(flat)), -flat))
    for count in (1, 9, 350, 1000, len(flat), len(flat) + 5):
        owner, place = most_sensitive([torch.from_numpy(a) for a in arrays], count)
        assert np.array_equal(owner.numpy(), owners[order[:count]])
        assert np.array_equal(place.numpy(), places[order[:count]])


def brute_force(scores: list[np.ndarray], found: list[Candidate], budget: int, fixed: int, taus: list[int]) -> Any:
    """The rule of the paper's code, told again in numpy over one long sorted vector."""
    flat = np.concatenate(scores)
    edges = np.cumsum([0] + [len(s) for s in scores])
    best = None
    for tau in taus:
        mask = np.zeros(len(flat), dtype=bool)
        mask[np.argsort(-flat, kind="stable")[:tau]] = True
        total, kinds = fixed, []
        for c, a, b in zip(found, edges, edges[1:]):
            hits = int(mask[a:b].sum())
            matrix = "norm" not in c.key and c.part == "weight"
            price = 4 * (c.point.dim_in + c.point.dim_out) if matrix else len(mask[a:b])
            if hits >= price / (10 if matrix else 5):
                total, kinds = total + price, [*kinds, "whole"]
            else:
                total, kinds = total + hits, [*kinds, hits]
        if best is None or abs(total - budget) <= abs(best[1] - budget):
            best = (tau, total, kinds)
    return best


@pytest.mark.parametrize("budget", [500, 1_700, 2_900, 4_000, 10**6])
def test_the_rule(budget: int) -> None:
    model = build()
    found = candidates(model.points, "lora", 4, 10, 5)
    random = np.random.default_rng(budget)
    scores = [(random.gamma(0.3, size=c.size) * random.gamma(0.5)).astype(np.float32) for c in found]
    taus = grid(budget, sum(c.size for c in found))
    owner, _ = most_sensitive([torch.from_numpy(s) for s in scores], taus[-1])
    tau, hits = choose(owner, found, budget, 48, taus)
    whole, total = spend(hits, found, 48)
    expected = brute_force(scores, found, budget, 48, taus)
    assert (tau, total) == expected[:2]
    assert ["whole" if w else n for w, n in zip(whole, hits)] == expected[2]


def test_the_grid_is_the_authors_from_04_million_on() -> None:
    theirs = [20_000 * k for k in range(1, 80)]
    assert grid(400_000, 10**8) == grid(600_000, 10**8) == grid(1_000_000, 10**8) == theirs
    assert grid(400_000, 50_000) == [20_000, 40_000, 50_000]
    assert grid(100_000, 10**8)[:3] == [5_000, 10_000, 15_000]
    assert grid(3_000_000, 10**8)[-1] == 4_740_000


def test_the_choice_depends_on_the_head_and_on_nothing_else() -> None:
    plans = [calibrated(build(seed=seed)).plan for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


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
@pytest.mark.parametrize("chunk", [1 << 22, 64])
def test_gradients_are_those_of_the_dense_weights(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.tuned, "CHUNK", chunk)
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
