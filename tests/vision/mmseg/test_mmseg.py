"""Backbones with adapters under mmsegmentation's runner, and its heads and losses under `zoo.fit`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_data import SMALL, dense_model, folder, images, pairs
from mmseg_configs import config

import zoo
from zoo.errors import ConfigError, MismatchError, UnknownNameError
from zoo.regimes.multitask import single_task

pytest.importorskip("mmseg", reason="the extra seg is not installed")
pytest.importorskip("mmcv._ext", reason="mmcv is not built (zoo install-mmcv)")

from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import MODELS

import vision.mmseg
from vision.data.dense import open_dense
from vision.mmseg.backbone import zoo_adapters

FIT: dict[str, Any] = {"progress": False, "batch_size": 4, "lr": 1e-2}


def built(**options: Any) -> Any:
    given = {"name": "swin-t", "pretrained": False, **SMALL["swin"], **options}
    return MODELS.build({"type": "ZooBackbone", **given})


def test_maps_are_those_of_the_model_and_only_adapters_train() -> None:
    torch.manual_seed(0)
    backbone = built(adapter={"type": "lora", "rank": 2}).train()
    plain = sum(p.numel() for p in backbone.model.adapters.parameters())
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == plain
    assert not backbone.model.backbone.training and backbone.channels == (8, 16)
    batch = images()
    for mine, theirs in zip(backbone(batch), backbone.model.outputs(batch, want=("maps",))["maps"], strict=True):
        assert torch.equal(mine, theirs)
    sum(m.sum() for m in backbone(batch)).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is not None and "lora" not in n] == []
    assert [m.shape[1] for m in built(out_indices=(1,))(batch)] == [16]


BEFORE_AND_AFTER = """
import torch
from mmengine.logging import HistoryBuffer
from mmseg.registry import MODELS

own = HistoryBuffer.__getstate__

def ours():
    return HistoryBuffer.__getstate__ is not own, HistoryBuffer in torch.serialization.get_safe_globals()

import vision.mmseg
print("ZooBackbone" in MODELS.module_dict, ours())
vision.mmseg.ZooBackbone("swin-t", pretrained=False, img_size=(32, 32), embed_dim=8, depths=(1, 1), num_heads=(1, 2))
print(ours())
"""


@pytest.mark.slow
def test_reading_checkpoints_changes_when_a_backbone_is_made() -> None:
    done = subprocess.run([sys.executable, "-c", BEFORE_AND_AFTER], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["True (False, False)", "(True, True)"]


@pytest.mark.slow
def test_the_runner_trains_tests_and_goes_on(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    given = config(data, tmp_path / "work", iterations=8, adapter={"type": "lora", "rank": 2})
    (tmp_path / "config.json").write_text(json.dumps(given))
    runner = Runner.from_cfg(Config.fromfile(tmp_path / "config.json"))  # which imports what `custom_imports` names
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    after = runner.model.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed and all("adapters" in k or "decode_head" in k for k in changed)
    assert any("lora" in k for k in changed)
    measured = runner.test()
    assert measured["mIoU"] > 80

    again = Runner.from_cfg(Config({**given, "load_from": str(tmp_path / "work" / "iter_8.pth")}))
    assert again.test() == measured  # read with tensors only, as torch does by default
    longer = {**given, "resume": True, "train_cfg": {**given["train_cfg"], "max_iters": 10}}
    more = Runner.from_cfg(Config(longer))
    more.train()
    assert more.iter == 10

    out = zoo_adapters(runner.model, tmp_path / "out")
    model = zoo.load(adapter=out, pretrained=False, seed=0)
    batch = images()
    runner.model.eval()
    mine = model.outputs(batch, want=("maps",))["maps"]
    for one, other in zip(mine, runner.model.backbone(batch), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="swin-xx"):
        MODELS.build({"type": "ZooBackbone", "name": "swin-xx"})
    with pytest.raises(UnknownNameError, match="lorra"):
        built(adapter={"type": "lorra"})
    with pytest.raises(ConfigError, match="type=<method>"):
        built(adapter={"rank": 2})
    if find_spec("transformers") is not None:
        with pytest.raises(MismatchError, match="'maps'"):
            MODELS.build({"type": "ZooBackbone", "name": "ast-micro", "pretrained": False})
    with pytest.raises(ConfigError, match="gives 2"):
        built(out_indices=(3,))
    with pytest.raises(ConfigError, match=r"takes part in training \(.*after_step"):
        built(adapter="adalora")
    with pytest.raises(ConfigError, match="looks at data"):
        built(adapter="spt")
    with monkeypatch.context() as changed, pytest.raises(ConfigError, match=r"takes part in training \(fit_end\)"):
        changed.setattr(type(zoo.adapter("lora")), "fit_end", lambda self, model: None, raising=False)
        built(adapter="lora")


@pytest.mark.parametrize("kind", ["mmseg-fcn", "mmseg-segformer", "mmseg-upernet"])
def test_heads_of_mmseg_in_our_fit(kind: str, tmp_path: Path) -> None:
    model = dense_model(head=kind)
    report = zoo.fit(model, pairs(8), pairs(4, 1), task="segment", epochs=4, **FIT)
    assert report.metrics["val_miou"] > 0.8
    model.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0)
    assert torch.equal(again(images()), model(images()))
    assert dense_model(head=kind, outputs=1)(images()).shape[1] == 1


@pytest.mark.parametrize("kind", ["mmseg-fcn", "mmseg-segformer", "mmseg-upernet"])
def test_heads_of_mmseg_for_several_tasks(kind: str, tmp_path: Path) -> None:
    def data(count: int, seed: int = 0) -> dict[str, Any]:
        parts = open_dense(pairs(count, seed), classes=["dark", "bright"])
        return {"parts": parts, "edges": open_dense(pairs(count, seed), "edges", derive="edges")}

    model = dense_model(outputs=0)
    settings: dict[str, Any] = {"epochs": 4, "tau": 0.0, "head": kind, "weights": {"edges": 0.5}}
    fit = {"progress": False, "batch_size": 4, "lr": 1e-2}
    report = zoo.run(model, "multitask", data(8), data(4, 1), fit=fit, **settings)
    assert report.summary["values"]["parts"] > 0.6 and "edges | 8 | 1 | ods_f" in report.table()
    model.save_adapter(tmp_path / "out")
    batch = images()
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0)
    assert torch.equal(again(batch), model(batch))
    one = single_task(again, "edges")
    assert torch.equal(one(batch), model(batch)[:, 2:3])
    one.save_adapter(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["head"]["kind"] == kind


def test_losses_of_mmseg_in_our_fit() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 6, 6), torch.randint(0, 3, (2, 6, 6))
    targets[:, 0] = 255
    own = torch.nn.functional.cross_entropy(logits, targets, ignore_index=255)
    found = vision.mmseg.loss("CrossEntropyLoss", avg_non_ignore=True)(logits, targets)
    torch.testing.assert_close(found, own)
    assert repr(vision.mmseg.loss("DiceLoss", loss_weight=2.0)) == "MMSegLoss(DiceLoss [('loss_weight', 2.0)])"
    model = dense_model()
    report = zoo.fit(model, pairs(8), pairs(4, 1), task="segment", loss=vision.mmseg.loss("DiceLoss"), epochs=4, **FIT)
    assert report.metrics["val_miou"] > 0.6
    with pytest.raises(ConfigError, match="no loss 'DiceLos'"):
        vision.mmseg.loss("DiceLos")
    with pytest.raises(ConfigError, match="cannot be made"):
        vision.mmseg.loss("DiceLoss", wrong=1)
