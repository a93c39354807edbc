"""PERP: what goes and stays, by data block by block, reconstruction, merging, files, bad input.

See also tests/fidelity/test_perp_authors.py.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import bare, both, gradients, images, loss_of, shake, state, targets
from safetensors.torch import load_file
from torch import Tensor
from train_parts import Stop, StopAt

import zoo
from zoo.errors import AttachError, CombinationError, ConfigError, DataError, MergeError, MismatchError
from zoo.table import tiny_model
from zoo.tasks.resolve import resolve

SEEING = pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(part, targets()[:2]) for part in images().split(2)]


def pruned(model: zoo.Model, **settings: Any) -> Any:
    """The adapter, attached and calibrated if it needs that."""
    torch.manual_seed(2)
    adapter = model.add_adapter(zoo.adapter("perp", **{"rank": 2, "samples": 4, **settings}))
    if adapter.needs_calibration:
        adapter.calibrate(model, batches())
    return adapter


# -- what goes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "magnitude", "sparsity": 0.7},
        {"criterion": "random", "sparsity": 0.7},
        {"criterion": "wanda", "sparsity": 0.7},
        {"criterion": "sparsegpt", "sparsity": 0.7},
        {"criterion": "magnitude", "pattern": "2:4"},
        {"criterion": "random", "pattern": "1:4", "sparsity": 0.75},
        {"criterion": "wanda", "pattern": "4:8"},
        {"criterion": "sparsegpt", "pattern": "4:8"},
    ],
)
@both
def test_exactly_as_many_zeros_and_merging_keeps_them(family: str, settings: dict[str, Any]) -> None:
    model = bare(family)
    adapter = pruned(model, **settings)
    shake(model, "perp")
    plain = model.eval().merge()
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), model(images()), rtol=1e-5, atol=1e-5)
    for point in model.points.linears("all-linear"):
        mask = adapter.masks()[point.name]
        wanted = round(adapter.sparsity * mask.numel())
        assert int((~mask).sum()) == wanted, point.name
        weight = plain.get_submodule(point.path).weight[point.start : point.stop]
        assert torch.equal(weight == 0, ~mask)
        if adapter.pattern:
            kept, group = map(int, adapter.pattern.split(":"))
            assert (mask.view(-1, group).sum(1) == kept).all()
        if adapter.criterion == "magnitude" and not adapter.pattern:
            assert point.weight[~mask].abs().max() <= point.weight[mask].abs().min()
    assert adapter.zeros() == pytest.approx(adapter.sparsity, abs=1e-4)


@pytest.mark.parametrize("update", ["mask", "scale", "none"])
def test_each_update_by_hand(update: str) -> None:
    """The live model, its gradients and its merged weights, against plain torch on the library's own module."""
    model = bare("vit")
    adapter = pruned(model, update=update, alpha=6.0)
    with torch.no_grad():
        started = model(images())
        plain = copy.deepcopy(model.backbone)
        for point in model.points.linears("all-linear"):
            plain.get_submodule(point.path).weight[point.start : point.stop] *= adapter.masks()[point.name]
        assert torch.equal(started, model.head(plain(images())))  # both begin as the pruned network, to the bit
    shake(model, "perp")
    named = dict(adapter.named_parameters())
    frozen, found = state(model), gradients(model.eval(), lambda: loss_of(model))
    tensors = {k: v.clone() for k, v in frozen.items()}
    for key, parameter in named.items():
        if key.endswith((".bias", ".weight")):
            point = next((p for p in model.points if f"{p.name}." == key[: key.rindex(".") + 1]), None)
            path = key if point is None else f"{point.path}.{key.rpartition('.')[2]}"
            tensors[path] = parameter
    for point in model.points.linears("all-linear"):
        mask, weight = adapter.masks()[point.name], point.weight
        if update == "none":
            new = weight * mask
        else:
            product = named[f"{point.name}.lora_b"] @ named[f"{point.name}.lora_a"]
            new = weight * mask + 3.0 * product * mask if update == "mask" else weight * product * mask
        whole = tensors[f"{point.path}.weight"]
        tensors[f"{point.path}.weight"] = torch.cat([whole[: point.start], new, whole[point.stop :]])
    logits = model.head(torch.func.functional_call(plain, tensors, images()))
    torch.testing.assert_close(model(images()), logits, rtol=1e-5, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, targets())
    expected = torch.autograd.grad(loss, list(named.values()))
    for key, gradient in zip(named, expected):
        torch.testing.assert_close(
            found[f"perp/{key}"], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    merged = model.merge().state_dict()
    for key in frozen:
        torch.testing.assert_close(merged[key], tensors[key].detach(), rtol=1e-6, atol=1e-6)


def test_a_weight_that_is_zero_and_stays() -> None:
    """The mask is not what is other than 0: an entry may stay, and be 0 for now."""
    model = bare("vit")
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight[:, :40] = 0  # type: ignore[union-attr,index]
    adapter = pruned(model)
    mask = adapter.masks()["blocks.0.mlp.up"]
    assert int(mask.sum()) == mask.numel() // 2 > int((model.points["blocks.0.mlp.up"].weight != 0).sum())
    shake(model, "perp")
    assert torch.equal(model.merge().blocks[0].mlp.fc1.weight != 0, mask)


def test_the_zeros_of_a_sparse_backbone() -> None:
    model = bare("vit")
    with pytest.raises(AttachError, match=r"'blocks.0.attn.q' is not sparse. Use zoo.sparsify"):
        model.add_adapter(zoo.adapter("perp", criterion="given"))
    assert not model.adapters
    sparse = zoo.sparsify(model, "all-linear", 0.8)
    adapter = pruned(sparse, criterion="given")
    assert adapter.zeros() == pytest.approx(0.8, abs=1e-3)
    shake(sparse, "perp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # merging has nothing to leave out
        plain = sparse.merge()
    for point in sparse.points.linears("all-linear"):
        rows = slice(point.start, point.stop)
        zeros = plain.get_submodule(point.path).weight[rows] == 0
        assert torch.equal(zeros, sparse.points[point.name].weight == 0)
    sparse.remove_adapter("perp")
    again = pruned(sparse, sparsity=0.5)  # what is zero stays zero
    assert again.zeros() == pytest.approx(0.8, abs=1e-3)
    own = zoo.sparsify(model, masks=again.masks())
    assert all(torch.equal(v, state(sparse)[k]) for k, v in state(own).items())


# -- by data --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_wanda_by_hand() -> None:
    """|W| times the lengths of the input channels, which come through the blocks that are pruned already."""
    model = bare("vit").eval()
    adapter = pruned(model, criterion="wanda", sparsity=0.6, bias=False, norm=False)
    plain, x = copy.deepcopy(model.backbone), images()
    for at, block in enumerate(plain.blocks):
        seen: dict[str, Tensor] = {}
        handles = [
            block.get_submodule(path).register_forward_pre_hook(
                lambda m, args, path=path, seen=seen: seen.update({path: args[0]})
            )
            for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]
        plain(x)
        for handle in handles:
            handle.remove()
        for point in model.points.linears(f"blocks.{at}.**"):
            path = point.path.removeprefix(f"blocks.{at}.")
            scores = point.weight.abs() * seen[path].reshape(-1, point.dim_in).norm(dim=0)
            gone = scores.flatten().argsort()[: round(0.6 * scores.numel())]
            mask = torch.ones(scores.numel(), dtype=torch.bool).index_fill(0, gone, False).view(scores.shape)
            assert torch.equal(adapter.masks()[point.name], mask), point.name
            block.get_submodule(path).weight[point.start : point.stop] *= mask


@SEEING
def test_it_is_dense_until_it_has_seen_data(criterion: str) -> None:
    model = bare("vit").eval()
    before = model(images())
    adapter = model.add_adapter(zoo.adapter("perp", criterion=criterion, rank=2))
    assert adapter.needs_calibration and adapter.plan is None and adapter.zeros() == 0  # type: ignore[attr-defined]
    assert torch.equal(model(images()), before)
    with pytest.raises(MergeError, match="nothing is decided yet"):
        model.merge()
    adapter.calibrate(model, batches())
    first = {k: v.clone() for k, v in adapter.state_dict().items()}
    assert adapter.zeros() == pytest.approx(0.5, abs=1e-4)  # type: ignore[attr-defined]
    adapter.calibrate(model, batches())  # anew, and not on top
    assert all(torch.equal(v, first[k]) for k, v in adapter.state_dict().items())
    twin = bare("vit").add_adapter(adapter)
    assert all(torch.equal(v, first[k]) for k, v in twin.state_dict().items() if k.endswith(("mask", "shift")))
    with pytest.raises(MismatchError, match=r"made for another backbone"):
        bare("vit", embed_dim=24).add_adapter(adapter)


def test_sparsegpt_answers_nearer_than_wanda_and_magnitude() -> None:
    """The error of the blocks on the samples, before any training: each criterion is there for that."""
    errors = {}
    for criterion in ("random", "magnitude", "wanda", "sparsegpt"):
        model = bare("vit").eval()
        adapter = pruned(model, criterion=criterion, reconstruct=20)
        found = list(adapter.plan["errors"].values())
        assert list(adapter.plan["errors"]) == ["blocks.0", "blocks.1"]
        assert all(after < before for before, after in found)
        errors[criterion] = found[0][0]
    assert errors["sparsegpt"] < errors["wanda"] < errors["random"]


@pytest.mark.parametrize("update", ["mask", "scale"])
def test_a_reconstructed_swin_is_nearer_to_the_dense_one(update: str) -> None:
    dense = bare("swin").eval()
    features = dense.features(images())
    away = []
    for steps in (0, 40):
        model = bare("swin").eval()
        pruned(model, update=update, reconstruct=steps, reconstruct_lr=2e-3)
        away.append(float((model.features(images()) - features).square().mean()))
        model.merge()
    assert away[1] < 0.8 * away[0]


def test_reconstruction_is_refused_where_blocks_cannot_be_run() -> None:
    model = bare("vit")
    model.add_adapter(zoo.adapter("vqt"))
    adapter = model.add_adapter(zoo.adapter("perp", rank=2, reconstruct=2))
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    with pytest.raises(CombinationError, match="blocks cannot be run by hand"):
        adapter.calibrate(model, batches())
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items()) and adapter.plan is None
    other, batch = tiny_model("vl-t5")
    other.add_adapter(zoo.adapter("perp", rank=2, reconstruct=2, targets="q"))
    with pytest.raises(AttachError, match="'perp with reconstruct' runs blocks by hand"):
        other.adapters["perp"].calibrate(other, [(batch, torch.arange(2))], resolve(other, loss=lambda y, t: y.mean()))


@SEEING
@pytest.mark.parametrize(
    ("data", "match"),
    [([], "no batch to prune by"), ([(images() * float("nan"), targets())], "NaN|not finite")],
    ids=["none", "nan"],
)
def test_a_failure_leaves_the_model_as_it_was(criterion: str, data: Any, match: str) -> None:
    model = bare("vit")
    adapter = pruned(model, criterion=criterion)
    before, frozen = {k: v.clone() for k, v in adapter.state_dict().items()}, state(model)
    plan, flags = adapter.plan, {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(DataError, match=match):
        adapter.calibrate(model, data)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items()) and adapter.plan == plan
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    model.set_active()
    with pytest.raises(ConfigError, match="in use"):
        adapter.calibrate(model, batches())


# -- training, files --------------------------------------------------------------------------------------------------------


def test_a_fit_that_was_stopped_goes_on(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.cat([images(), images() + 0.1]), torch.arange(8) % 5)
    options: dict[str, Any] = {"batch_size": 4, "epochs": 2, "progress": False, "lr": 0.01}

    def fresh() -> zoo.Model:
        model = bare("vit")
        torch.manual_seed(2)
        model.add_adapter(zoo.adapter("perp", rank=2, criterion="sparsegpt", samples=8))
        return model

    whole = fresh()
    zoo.fit(whole, data, **options)

    with pytest.raises(Stop):
        zoo.fit(fresh(), data, checkpoint=tmp_path, checkpoint_every=1, callbacks=[StopAt(2)], **options)
    again = fresh()
    zoo.fit(again, data, checkpoint=tmp_path, resume=True, **options)
    wanted = whole.adapters["perp"].state_dict()
    assert wanted and all(torch.equal(v, wanted[k]) for k, v in again.adapters["perp"].state_dict().items())
    assert torch.equal(again.eval()(images()), whole.eval()(images()))


@SEEING
def test_files(criterion: str, tmp_path: Path) -> None:
    """Masks are bits, and of SparseGPT's changes those of the entries that stay; a damaged mask is refused."""
    model = bare("vit")
    adapter = pruned(model, criterion=criterion, sparsity=0.7)
    shake(model, "perp")
    model.eval().save_adapter(tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    bits = sum(v.nbytes for k, v in tensors.items() if "mask_bits" in k)
    weights = sum(m.numel() for m in adapter.masks().values())
    assert bits == weights / 8
    kept = sum(v.numel() for k, v in tensors.items() if k.endswith(".shift"))
    assert kept == (sum(int(m.sum()) for m in adapter.masks().values()) if criterion == "sparsegpt" else 0)
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False)
    assert torch.equal(again(images()), model(images()))
    assert not zoo.training_hooks(again).needs_calibration  # it is not pruned anew
    bare_tensors = {k.removeprefix("perp/"): v for k, v in tensors.items() if k.startswith("perp/")}
    key = next(k for k in bare_tensors if k.endswith("mask_bits"))
    for damaged in (bare_tensors[key][:-1], bare_tensors[key].float()):
        with pytest.raises(MismatchError, match=r"mask of 'blocks.* is damaged"):
            type(adapter).load_saved({}, {**bare_tensors, key: damaged})
    if criterion == "sparsegpt":
        key = next(k for k in bare_tensors if k.endswith("shift"))
        with pytest.raises(MismatchError, match=r"changes for the .* entries of 'blocks"):
            type(adapter).load_saved({}, {**bare_tensors, key: bare_tensors[key][1:]})


def test_nothing_of_the_size_of_a_weight_is_kept() -> None:
    model = bare("vit")
    model.add_adapter(zoo.adapter("lora", rank=2, targets="all-linear"), "lora")
    lora = model.train().saved_bytes(images())
    model.remove_adapter("lora")
    for update in ("mask", "scale"):
        model.add_adapter(zoo.adapter("perp", rank=2, update=update, bias=False, norm=False), "perp")
        assert model.train().saved_bytes(images()) <= lora
        model.remove_adapter("perp")


def test_half_precision_keeps_zeros() -> None:
    model = bare("vit").to(torch.bfloat16).eval()
    adapter = pruned(model)
    shake(model, "perp")
    plain = model.merge()
    for point in model.points.linears("all-linear"):
        weight = plain.get_submodule(point.path).weight[point.start : point.stop]
        assert weight.dtype == torch.bfloat16 and torch.equal(weight == 0, ~adapter.masks()[point.name])


# -- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.0}, "more than 0"),
        ({"pattern": "2:4", "sparsity": 0.7}, "a sparsity of 0.5, and sparsity is 0.7"),
        ({"pattern": "4:2"}, "2 of every 4"),
        ({"pattern": "2/4"}, "pattern is '2/4'"),
        ({"pattern": "0:4"}, "pattern is '0:4'"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"reconstruct": -1}, "reconstruct is -1"),
        ({"reconstruct_lr": 0.0}, "reconstruct_lr is 0"),
        ({"update": "none", "bias": False, "norm": False}, "nothing would be trained"),
    ],
)
def test_settings_without_a_meaning(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        zoo.adapter("perp", **settings)


def test_what_cannot_be_pruned_is_refused() -> None:
    model = bare("vit")
    with pytest.raises(AttachError, match=r"'blocks.0.attn.q' reads 48 channels, which groups of 14 do not divide"):
        model.add_adapter(zoo.adapter("perp", pattern="7:14"))
    with pytest.raises(
        AttachError, match=r"a sparsity of 0.9999 leaves none of the 2,304 entries of 'blocks.0.attn.q'"
    ):
        model.add_adapter(zoo.adapter("perp", sparsity=0.9999))
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(DataError, match=r"'blocks.1.mlp.up' hold numbers that are not finite"):
        model.add_adapter(zoo.adapter("perp"))
    small = zoo.quantise(bare("vit"))
    with pytest.raises(AttachError, match="Prune first, quantise then"):
        small.add_adapter(zoo.adapter("perp"))
    assert not model.adapters and not small.adapters
