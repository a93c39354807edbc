"""Changed backbones: taking parts out against zeroed weights, adapters cut to fit, folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import METHODS, attach, bare, both, gradients, images, loss_of, shake, state
from safetensors.torch import load_file, save_file

import zoo
from zoo.errors import (
    ConfigError,
    MismatchError,
    SelectionError,
    UnknownNameError,
    WeightsError,
)

# (heads, neurons, blocks) by family: of two blocks, or of two stages with two each
PARTS: dict[str, dict[str, Any]] = {
    "vit": {"heads": {"blocks.0": [1], 1: [0, 2]}, "neurons": {0: range(0, 192, 5)}, "blocks": [2]},
    "swin": {
        "heads": {"stages.0.blocks.1": [0], "stages.1.blocks.0": [1, 3]},
        "neurons": {"stages.1.blocks.0": range(50)},
        "blocks": ["stages.0.blocks.0"],
    },
}


def model_of(family: str, *methods: str) -> zoo.Model:
    model = bare(family, **({"depth": 3} if family == "vit" else {}))
    for method in methods:
        attach(model, method)
        shake(model, method)
    return model


@torch.no_grad()
def zeroed(model: zoo.Model, family: str) -> zoo.Model:
    """The same network with the columns that read the parts at zero, and blocks whose branches give nothing."""
    at = {p.name: p for p in model.points}
    names = {p.block: p.name for p in model.points if p.kind == "block"} if family == "vit" else {}
    for key, heads in PARTS[family]["heads"].items():
        block = at[names.get(key, key)].module
        dim = block.attn.proj.in_features // block.attn.num_heads
        for h in heads:
            block.attn.proj.weight[:, h * dim : (h + 1) * dim] = 0
    for key, neurons in PARTS[family]["neurons"].items():
        at[names.get(key, key)].module.mlp.fc2.weight[:, list(neurons)] = 0
    for key in PARTS[family]["blocks"]:
        block = at[names.get(key, key)].module
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
    return model


@both
def test_parts_taken_out(family: str) -> None:
    model = model_of(family)
    before, frozen = model(images()), state(model)
    small = zoo.prune(model, **PARTS[family])
    assert torch.equal(model(images()), before) and all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    torch.testing.assert_close(small(images()), zeroed(model, family)(images()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(small(images()), before, atol=1e-3)
    assert small.num_parameters() < model.num_parameters()
    name = model.backbone_name
    assert small.backbone_name.startswith(f"{name}~") and small.fingerprint != model.fingerprint
    assert small.probe(images()) == []


def test_sizes_and_points() -> None:
    small = zoo.prune(model_of("vit"), **PARTS["vit"])
    block = small.backbone.blocks[1]  # type: ignore[union-attr,index]
    assert (block.attn.num_heads, block.attn.qkv.out_features, block.attn.proj.in_features) == (1, 48, 16)
    assert small.backbone.blocks[0].mlp.fc1.out_features == 192 - 39  # type: ignore[union-attr,index]
    points = {p.name: p for p in small.points}
    assert len(small.family.blocks()) == 2 and "blocks.2" not in points
    assert [(p.start, p.stop) for p in (points[f"blocks.1.attn.{r}"] for r in "qkv")] == [(0, 16), (16, 32), (32, 48)]
    swin = zoo.prune(model_of("swin"), **PARTS["swin"])
    assert [len(s.blocks) for s in swin.backbone.layers] == [1, 2]  # type: ignore[union-attr]
    smallest = swin.backbone.layers[1].blocks[0].attn  # type: ignore[union-attr,index]
    assert smallest.relative_position_bias_table.shape[1] == smallest.num_heads == 2


CANNOT = {"spt", "vqt", "fact"}  # a plan of single weights; a head on every block; factors for other widths


@both
@pytest.mark.parametrize("method", list(METHODS))
def test_adapters_are_cut_to_fit(method: str, family: str) -> None:
    """What the smaller model computes with its adapter is what the larger one computes with zeroed weights; or it is refused."""
    model = model_of(family, method)
    on = model(images())
    try:
        small = zoo.prune(model, **PARTS[family])
    except ConfigError as error:
        assert f"'{method}'" in str(error) and "cut to fit" in str(error)
        assert torch.equal(model(images()), on) and model.active == (method,)
        return
    assert method not in CANNOT
    assert small.active == (method,)
    assert small.train().probe(images()) == []
    small.eval()
    if method in (
        "linear",
        "norm",
        "ia3",
        "prefix",
        "vpt",
    ):  # those that add nothing of their own behind the zeroed columns
        torch.testing.assert_close(small(images()), zeroed(model, family)(images()), rtol=1e-4, atol=1e-4)
    if METHODS[method].merges:
        torch.testing.assert_close(small.merge()(images()), small(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "ssf", "norm", "adapter", "prefix", "vpt"])
def test_cut_tensors_are_those_of_what_stays(method: str) -> None:
    """Each tensor entry by entry, for the roles that are cut."""
    model = model_of("vit", method)
    small = zoo.prune(model, heads={0: [1]}, neurons={1: [0, 5]}, blocks=[2])
    old, new = model.adapters[method].state_dict(), small.adapters[method].state_dict()
    assert set(new) == {k for k in old if not k.startswith("blocks.2.")}
    heads = torch.tensor([i for i in range(48) if not 16 <= i < 32])
    neurons = torch.tensor([i for i in range(192) if i not in (0, 5)])
    cut = 0
    for key, value in new.items():
        expected = old[key]
        if expected.shape != value.shape:
            cut += 1
            axis = next(i for i, (a, b) in enumerate(zip(expected.shape, value.shape)) if a != b)
            index = heads if value.shape[axis] == 32 else neurons
            if value.shape[axis] == 96:  # a fused bias
                index = torch.cat([heads, heads + 48, heads + 96])
            elif expected.shape[axis] == 3:  # heads
                index = torch.tensor([0, 2])
            expected = expected.index_select(axis, index)
        assert torch.equal(value, expected), key
    assert cut > 0 or method in ("norm", "adapter", "vpt")


def test_several_adapters_and_training() -> None:
    model = model_of("vit", "lora", "bitfit")
    attach(model, "ssf", "other", activate=False)
    small = zoo.prune(model, heads={0: [0]}, neurons={1: [3]})
    assert small.active == ("lora", "bitfit") and set(small.adapters) == {"lora", "bitfit", "other"}
    small.memory = "min"
    found = gradients(small.train(), lambda: loss_of(small))
    assert set(found) == set(small.parameters_to_train())
    rows = small.eval()(images(), adapters=["lora", "other", None, "bitfit"])
    assert rows.isfinite().all()
    again = zoo.prune(small, blocks=[0])
    assert again.backbone_name != small.backbone_name and len(again.recipe["edits"]) == 2  # type: ignore[index,arg-type]


def test_what_holds_the_whole_weight_is_refused() -> None:
    """DoRA's row lengths are those of the rows as they were: where columns go, it would compute something else."""
    model = bare("vit", depth=3)
    model.add_adapter(zoo.adapter("lora", dora=True, targets=("q", "up"), rank=2), "rows")
    shake(model, "rows")
    zoo.prune(model, heads={0: [1]}, neurons={0: [1]})
    model.add_adapter(zoo.adapter("lora", dora=True, targets=("o", "down"), rank=2), "columns", activate=False)
    with pytest.raises(ConfigError, match=r"'columns' cannot be cut to fit.*depends on the parts"):
        zoo.prune(model, heads={0: [1]})
    assert model.active == ("rows",)


def test_what_cannot_be_merged_is_not_told_to_be() -> None:
    model = bare("vit", depth=2)
    model.add_adapter(zoo.adapter("petalface", targets=("o",), rank=2, quality="given"), "faces")
    with pytest.raises(ConfigError, match=r"its point's input nor its output\. Remove it\.$"):
        zoo.prune(model, heads={0: [1]})


def test_refusals() -> None:
    model = model_of("vit")
    for parts, error, match in (
        ({}, ConfigError, "nothing to take out"),
        ({"heads": {0: [3]}}, SelectionError, "no head 3: it has 3"),
        ({"heads": {0: [0, 1, 2]}}, ConfigError, "no head left"),
        ({"neurons": {0: [-1]}}, SelectionError, "no neuron -1"),
        ({"neurons": {0: [1.5]}}, ConfigError, r"neurons\[0\] is \[1.5\]; expected a list of whole numbers"),
        ({"heads": {0: 1}}, ConfigError, "expected a list of whole numbers"),
        ({"blocks": 7}, SelectionError, "no block 7"),
        ({"blocks": [0, 1, 2]}, ConfigError, "no block left"),
        ({"blocks": [7]}, SelectionError, "no block 7"),
        ({"heads": {"quack": [0]}}, SelectionError, "no block 'quack'"),
    ):
        with pytest.raises(error, match=match):
            zoo.prune(model, **parts)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="2 blocks have the index 0"):
        zoo.prune(model_of("swin"), blocks=[0])
    with pytest.raises(ConfigError, match="family 'groupmamba'"):
        zoo.prune(zoo.load("groupmamba-t", num_classes=0, device="meta"), blocks=["stages.0.blocks.0"])
    with pytest.raises(ConfigError, match=r"MLP of 'blocks\.0' is a"):
        zoo.prune(zoo.load("timm:vit_giant_patch14_dinov2", num_classes=0, device="meta"), neurons={0: [1]})
    meta = zoo.prune(zoo.load("vit-b16", "lora", num_classes=0, device="meta"), heads={3: range(6)}, blocks=[11])
    assert meta.num_parameters(trainable=True) == 294_912 - 2 * 8 * 1536 - 2 * 8 * 384


# -- folders --------------------------------------------------------------------------------------------------------------


def everything(family: str) -> zoo.Model:
    small = zoo.prune(model_of(family, "lora"), **PARTS[family])
    return zoo.quantise(zoo.sparsify(small, "down", 0.5), "up,o")


@both
def test_folders(family: str, tmp_path: Path) -> None:
    """Backbone and adapter, each in its own folder, come back equal; with another head too."""
    model = everything(family)
    zoo.save_backbone(model, tmp_path / "backbone")
    model.save_adapter(tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "backbone").iterdir()) == ["backbone.json", "backbone.safetensors"]
    again = zoo.load(str(tmp_path / "backbone"), tmp_path / "adapter")
    assert torch.equal(again(images()), model(images()))
    assert (again.backbone_name, again.fingerprint) == (model.backbone_name, model.fingerprint)
    fresh = zoo.load(str(tmp_path / "backbone"), "bitfit", num_classes=7)
    assert fresh(images()).shape == (4, 7)
    assert zoo.load(str(tmp_path / "backbone")).num_classes == 0
    with pytest.raises(UnknownNameError, match="lives in a folder of its own"):
        zoo.load(adapter=tmp_path / "adapter")
    other = zoo.prune(model_of(family), **PARTS[family])
    zoo.save_backbone(other, tmp_path / "other")
    with pytest.raises(MismatchError):
        zoo.load(str(tmp_path / "other"), tmp_path / "adapter")


def test_folder_in_another_process_and_training_goes_on(tmp_path: Path) -> None:
    """A fit that was stopped goes on, on the loaded backbone, to the unbroken one's numbers."""
    zoo.save_backbone(everything("vit"), tmp_path / "backbone")
    code = """
import sys, torch, zoo
torch.set_num_threads(1)
rows = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)
def fit(epochs, folder):
    model = zoo.load("backbone", "lora", num_classes=3, seed=0)
    class Stop(Exception): pass
    def stop(record):
        if record["epoch"] == epochs: raise Stop
    try:
        zoo.fit(model, rows, epochs=2, batch_size=4, checkpoint=folder, callbacks=[stop])
    except Stop:
        pass
    return model
whole = fit(9, "one")
fit(1, "two")
again = fit(9, "two")
assert all(torch.equal(a, b) for a, b in zip(whole.parameters_to_train().values(), again.parameters_to_train().values()))
print("equal")
"""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_damaged_folders(tmp_path: Path) -> None:
    folder = zoo.save_backbone(everything("vit"), tmp_path / "backbone")
    recipe, weights = (folder / "backbone.json").read_text(), load_file(folder / "backbone.safetensors")

    def refused(error: type[Exception], match: str | None = None) -> None:
        with pytest.raises(error, match=match):
            zoo.load(str(folder))

    for change in ({"edits": [{"heads": {"blocks.9": [0]}}]}, {"format": 9}, {"edits": 3}, {"kwargs": 3}):
        (folder / "backbone.json").write_text(json.dumps({**json.loads(recipe), **change}))
        refused(zoo.ZooError)
    (folder / "backbone.json").write_text(json.dumps({**json.loads(recipe), "base": "open_clip:hf-hub:some/one"}))
    refused(zoo.ZooError, "open_clip:hf-hub:some/one")
    (folder / "backbone.json").write_text("{")
    refused(ConfigError, "no recipe")
    (folder / "backbone.json").write_text(recipe)
    for changed in ({"norm.weight": torch.zeros(3)}, {"quack": torch.zeros(1)}):
        save_file({**weights, **changed}, folder / "backbone.safetensors")
        refused(WeightsError, "does not fit its recipe")
    save_file({**weights, "norm.weight": torch.zeros(48)}, folder / "backbone.safetensors")
    refused(WeightsError, "not those that its recipe names")
    (folder / "backbone.safetensors").write_bytes(b"quack")
    refused(WeightsError, "could not be read")
    with pytest.raises(ConfigError, match="was not changed"):
        zoo.save_backbone(model_of("vit"), tmp_path / "plain")
    (folder / "backbone.json").write_text(recipe)
    save_file(weights, folder / "backbone.safetensors")
    with pytest.raises(ConfigError, match="takes no options"):
        zoo.load(str(folder), img_size=64)
