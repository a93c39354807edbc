"""DSEE's procedure: what is pruned, the model that comes out, going on after a kill, the command, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import easy_data, tiny_model

import zoo
from zoo.errors import ConfigError, DataError

FIT: dict[str, Any] = {"progress": False}
SMALL: dict[str, Any] = {"rank": 2, "entries": 4, "rounds": 2, "epochs": 1, "retune_epochs": 2, "batch_size": 8}
PARTS: dict[str, Any] = {"sparsity": 0.3, "others": 0.5, "heads": 0.5, "neurons": 0.25}


def data(seed: int = 0) -> Any:
    return zoo.open_dataset(easy_data(24, seed, 1.0), classes=list("abcd"))


def go(model: Any = None, out: Path | None = None, **options: Any) -> tuple[Any, Any]:
    model = model or tiny_model(None)
    return model, zoo.run(model, "dsee", data(), data(1), out=out, fit=FIT, **{**SMALL, **options})


@pytest.fixture(scope="module")
def whole() -> tuple[Any, Any]:
    return go(**PARTS)


def test_what_comes_out(whole: tuple[Any, Any], tmp_path: Path) -> None:
    model, report = whole
    pruned = report.model
    assert pruned is not model and pruned.backbone_name.startswith(f"{model.backbone_name}~")
    assert pruned.active == ("dsee",) and not pruned.training
    summary = report.summary
    blocks = len(model.family.blocks())
    assert set(summary["heads"].values()) == {1} and len(summary["heads"]) == len(summary["neurons"]) == blocks
    assert summary["after"] == sum(p.numel() for p in pruned.backbone.parameters()) < summary["before"]
    masked = [m for m in pruned.backbone.modules() if "weight_mask" in m._buffers]
    zeros = sum(int((~m.weight_mask).sum()) for m in masked)
    assert summary["nonzero"] == summary["after"] - zeros and summary["left"] == summary["nonzero"] / summary["before"]
    assert all(not bool((m.weight * ~m.weight_mask).any()) for m in masked)
    assert {"tuned_accuracy", "pruned_accuracy", "test_accuracy"} <= set(summary)
    assert [p["name"] for p in report.phases] == ["tune", "retune"] and report.table().count("\n") == 4
    images = torch.stack([data(1)[i][0] for i in range(8)])
    zoo.save_backbone(pruned, tmp_path / "backbone")
    pruned.save_adapter(tmp_path / "adapter")
    again = zoo.load(str(tmp_path / "backbone"), tmp_path / "adapter").eval()
    assert torch.equal(again(images), pruned(images))


def test_goes_on_in_the_second_phase(whole: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pruned model is made again from the state at the end of the first."""
    from zoo.train.checkpoint import write_state

    def broken(path: Path, *args: Any) -> None:
        if path.parent.name.endswith("retune"):  # trained, and not yet said to be done
            raise KeyboardInterrupt
        write_state(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr("zoo.regimes.ledger.write_state", broken)
        with pytest.raises(KeyboardInterrupt):
            go(out=tmp_path, **PARTS)
    _, report = go(out=tmp_path, **PARTS)
    assert report.summary == whole[1].summary
    for name, value in report.model.adapter_state_dict().items():
        torch.testing.assert_close(value, whole[1].model.adapter_state_dict()[name])
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_refused() -> None:
    for options, match in (
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": 0.0, "others": 0.0}, "nothing would be pruned"),
        ({"by": "size"}, "'by' is 'size'"),
        ({"rank": 0}, "rank is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"heads": 0.01}, "heads=0.01 takes none: a block has"),
        ({"neurons": 1e-4}, "neurons=0.0001 takes none"),
    ):
        with pytest.raises(ConfigError, match=match):
            go(**options)
    with pytest.raises(ConfigError, match="attaches its own adapter"):
        go(tiny_model("lora"))
    with pytest.raises(DataError, match="data= is one data set"):
        zoo.run(tiny_model(None), "dsee", [data()], **SMALL)
    with pytest.raises(ConfigError, match=r"dsee prunes the backbone, and 'blocks.0.attn.q' has int8 weights"):
        go(zoo.quantise(tiny_model(None)))
    other = zoo.load("groupmamba-t", num_classes=4, device="meta", pretrained=False)
    with pytest.raises(ConfigError, match="not described for the family 'groupmamba'"):
        zoo.run(other, "dsee", data(), heads=0.5, **SMALL)
