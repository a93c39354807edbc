"""Light-PEFT: what is measured and when, the smaller network, going on after a kill, bad input. See also tests/fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import bare, images, loss_of, shake
from train_parts import easy_data, tiny_model

import zoo
from zoo.adapters.light_peft import LightPEFT
from zoo.errors import AttachError, ConfigError, DataError
from zoo.regimes.light_peft import smaller

FIT: dict[str, Any] = {"progress": False}
SMALL: dict[str, Any] = {"rank": 4, "steps": 5, "epochs": 2, "batch_size": 8, "lr": 1e-2, "dropout": 0.0}
QUANTILES: dict[str, Any] = {"heads": 0.5, "neurons": 1 / 3, "modules": 0.5, "ranks": 0.5}


def data(seed: int = 0) -> Any:
    return zoo.open_dataset(easy_data(24, seed, 1.0), classes=list("abcd"))


def go(model: Any = None, out: Path | None = None, **options: Any) -> tuple[Any, Any]:
    model = model or tiny_model(None)
    return model, zoo.run(model, "light-peft", data(), data(1), out=out, fit=FIT, **{**SMALL, **QUANTILES, **options})


@pytest.fixture(scope="module")
def whole() -> tuple[Any, Any]:
    return go()


def measured(model: zoo.Model, steps: int, total: int, accumulate: int = 1) -> None:
    """A loop by hand, with the hooks of a fit."""
    adapter: Any = model.adapters["light-peft"]
    adapter.fit_start(model, None, total)
    model.train()
    for step in range(steps):
        adapter.step_start(model, step)
        for _ in range(accumulate):
            loss_of(model).backward()
        adapter.after_backward(model, step)
        model.zero_grad()
    adapter.fit_end(model)
    model.eval()


def test_what_is_measured() -> None:
    """Against the outputs of the projections and of their changes, written out; the second half of the steps alone counts."""
    model = bare("vit")
    adapter: Any = model.add_adapter(LightPEFT(rank=3, dropout=0.0))
    shake(model, "light-peft")
    seen: dict[str, Any] = {}
    block: Any = model.backbone.blocks[1]  # type: ignore[union-attr,index]
    handle = block.attn.qkv.register_forward_pre_hook(lambda m, args: seen.__setitem__("x", args[0].detach()))
    measured(model, 5, 5)
    handle.remove()
    part = adapter.module_at("blocks.1.attn.v")
    plain = torch.nn.functional.linear(seen["x"], block.attn.qkv.weight, block.attn.qkv.bias)[..., 96:]
    expected = ((seen["x"] @ part.delta().T).norm(dim=-1) / plain.norm(dim=-1)).mean()
    torch.testing.assert_close(part.module_score, torch.stack([3 * expected, torch.tensor(3.0)]), rtol=1e-4, atol=1e-5)
    once = part.rank_score.clone()
    model.memory = "min"  # blocks run a second time in backward, and are not counted twice
    measured(model, 5, 5)
    torch.testing.assert_close(part.module_score, torch.stack([3 * expected, torch.tensor(3.0)]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.rank_score, once, rtol=1e-4, atol=1e-6)
    measured(model, 5, 5, accumulate=2)
    torch.testing.assert_close(part.rank_score, 2 * once, rtol=1e-4, atol=1e-6)  # of the accumulated gradients
    measured(model, 2, 5)
    assert not part.module_score.any() and not part.rank_score.any()


def test_the_smaller_network_computes_the_same() -> None:
    """With coefficients of 1: the plain LoRA on what is left is what the larger model gives without the parts and ranks."""
    model = bare("vit").eval()
    adapter: Any = model.add_adapter(LightPEFT(rank=3, dropout=0.0))
    shake(model, "light-peft")
    with torch.no_grad():
        for part in adapter.parts().values():
            if part.gate is not None:
                part.gate.fill_(1.0)
    heads, neurons = {"blocks.0": [1]}, {"blocks.0": [3, 5], "blocks.1": [0]}
    names = [n for n in adapter.parts() if n != "blocks.1.mlp.up"]
    ranks = {n: [0, 2] if n.endswith("q") else [0, 1, 2] for n in names}
    small = smaller(model, {"heads": heads, "neurons": neurons, "ranks": ranks}).eval()
    assert small.active == ("lora",) and list(small.adapters) == ["lora"] and small.backbone_name != model.backbone_name
    with torch.no_grad():
        for name, part in adapter.parts().items():
            gone = [i for i in range(3) if i not in ranks.get(name, [])]
            part.lora_b[:, gone] = 0
        adapter.module_at("blocks.0.attn.o").gate[1] = 0
        for block, gone in neurons.items():
            adapter.module_at(f"{block}.mlp.down").gate[gone] = 0
        torch.testing.assert_close(small(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert small.train().probe(images()) == []


def test_what_comes_out(whole: tuple[Any, Any], tmp_path: Path) -> None:
    model, report = whole
    small, summary = report.model, report.summary
    assert small is not model and small.active == ("lora",) and "light-peft" in model.adapters
    before, after = summary["before"], summary["after"]
    assert after["backbone"] == sum(p.numel() for p in small.backbone.parameters()) < before["backbone"]
    assert after["adapter"] == small.num_parameters(trainable=True, head=False) < before["adapter"] / 2
    parts = model.adapters["light-peft"].parts()
    assert sum(summary["ranks"].values()) == len(parts) // 2 * 4 // 2 and len(summary["ranks"]) <= len(parts) // 2
    assert set(summary["heads_gone"].values()) == {1}
    assert {"estimated_accuracy", "test_accuracy"} <= set(summary) and report.table().count("\n") == 3
    zoo.save_backbone(small, tmp_path / "backbone")
    small.save_adapter(tmp_path / "adapter")
    again = zoo.load(str(tmp_path / "backbone"), tmp_path / "adapter").eval()
    inputs = torch.stack([data(1)[i][0] for i in range(8)])
    assert torch.equal(again(inputs), small(inputs))


def test_goes_on_in_the_second_phase(whole: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.train.checkpoint import write_state

    def broken(path: Path, *args: Any) -> None:
        if path.parent.name.endswith("train"):  # trained, and not yet said to be done
            raise KeyboardInterrupt
        write_state(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr("zoo.regimes.ledger.write_state", broken)
        with pytest.raises(KeyboardInterrupt):
            go(out=tmp_path)
    _, report = go(out=tmp_path)
    assert report.summary == whole[1].summary
    for name, found in report.model.adapter_state_dict().items():
        torch.testing.assert_close(found, whole[1].model.adapter_state_dict()[name])


def test_refused() -> None:
    for options, match in (
        ({"heads": 1.0}, "heads is 1.0"),
        ({"heads": 0.0, "neurons": 0.0, "modules": 0.0, "ranks": 0.0}, "nothing would be pruned"),
        ({"steps": 1}, "steps is 1"),
        ({"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            go(**options)
    with pytest.raises(ConfigError, match="attaches its own adapters"):
        go(tiny_model("lora"))
    with pytest.raises(DataError, match="data= is one data set"):
        zoo.run(tiny_model(None), "light-peft", [data()], **SMALL)
    with pytest.raises(ConfigError, match=r"light-peft prunes the backbone, and 'blocks.0.attn.q' has int8 weights"):
        go(zoo.quantise(tiny_model(None)))
    model = bare("vit")
    adapter: Any = model.add_adapter("light-peft")
    for given, match in (
        ({}, r"all coefficients of heads are 1: nothing was learned"),
        ({"heads": 0.0, "neurons": 0.0}, "no step was measured"),
        ({"ranks": 1.0}, "ranks is 1.0"),
        ({"heads": "a"}, "heads is 'a'; expected a number"),
    ):
        with pytest.raises(ConfigError, match=match):
            adapter.decisions(model, **given)
    with pytest.raises(AttachError, match="coefficients on attention heads and neurons"):
        zoo.load("timm:resnet18", LightPEFT(targets="conv"), num_classes=3, pretrained=False, device="meta")


def test_one_head_and_one_neuron_stay() -> None:
    """Where all of a block would go, equal to or below the quantile of all, its strongest stays."""
    model = bare("vit")
    adapter: Any = model.add_adapter(LightPEFT(rank=2, dropout=0.0))
    shake(model, "light-peft")
    measured(model, 2, 2)
    with torch.no_grad():
        adapter.module_at("blocks.0.mlp.down").gate.fill_(0.1)
        adapter.module_at("blocks.0.mlp.down").gate[7] = 0.2
        adapter.module_at("blocks.0.attn.o").gate.fill_(0.5)
    found = adapter.decisions(model, neurons=0.5)
    assert len(found["neurons"]["blocks.0"]) == 191 and 7 not in found["neurons"]["blocks.0"]
    assert found["heads"]["blocks.0"] == [1, 2]


def test_command_line(tmp_path: Path, image_folder: Path) -> None:
    """The backbone is a folder of its own, beside the adapter."""
    from typer.testing import CliRunner

    from zoo.cli import app

    line = [
        "run",
        "light-peft",
        "vit-micro",
        "--data",
        str(image_folder),
        "--split",
        "train",
        "--test-split",
        "test",
        "-q",
    ]
    line += ["-s", "run.steps=2", "-s", "run.epochs=1", "-s", "run.batch_size=4", "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    again = zoo.load(str(tmp_path / "run" / "backbone"), tmp_path / "run")
    assert list(again.adapters) == ["lora"] and again.num_classes > 1
    assert (tmp_path / "run" / "report.png").stat().st_size > 1000
