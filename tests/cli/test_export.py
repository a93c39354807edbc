"""`zoo export --onnx`: what ONNX Runtime computes from the file is what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import zoo
from zoo.adapters.l4q import packed
from zoo.cli import app
from zoo.errors import ConfigError, ContextError, MergeError, MissingPackageError, SaveError
from zoo.table import tiny_model

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def tiny(family: str, method: str) -> tuple[zoo.Model, tuple[torch.Tensor, ...]]:
    """A model of milliseconds with adapters that do something."""
    model, batch = tiny_model(family)
    model.add_adapter(method)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    return model.eval(), batch


@pytest.mark.parametrize(
    ("family", "method", "folded"), [("vit", "lora", True), ("vit", "vpt", False), ("ast", "lora", True)]
)
def test_same_outputs(tmp_path: Path, family: str, method: str, folded: bool) -> None:
    model, batch = tiny(family, method)
    facts = zoo.to_onnx(model, tmp_path / "new" / "m.onnx")
    assert facts["merged"] is folded and facts["largest_difference"] < 1e-4
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.onnx"]
    session = runtime.InferenceSession(str(tmp_path / "new" / "m.onnx"), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for count in (1, 5):
        given = tuple(torch.cat([x, x.flip(0), x, x, x])[:count] for x in batch)
        found = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", ["int8", "int4", "nf4", "packed"])
def test_weights_of_few_bits(kept: str, tmp_path: Path) -> None:
    model, _ = tiny("vit", "l4q" if kept == "packed" else "vpt")
    if kept == "packed":
        model = packed(model)
    else:
        model.remove_adapter("vpt")
        model = zoo.quantise(model, to=kept)
    facts = zoo.to_onnx(model, tmp_path / "m.onnx")
    assert facts["largest_difference"] < 1e-4


def test_live_and_of_one_size(tmp_path: Path) -> None:
    model, _ = tiny("vit", "lora")
    model.train()
    facts = zoo.to_onnx(model, tmp_path / "m.onnx", merged=False, batch_size=3)
    assert not facts["merged"] and facts["inputs"]["input"][0] == 3 and model.training


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("vit", "vpt")
    with pytest.raises(MergeError, match="cannot be merged"):
        zoo.to_onnx(model, tmp_path / "m.onnx", merged=True)
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        zoo.to_onnx(model, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="batch_size"):
        zoo.to_onnx(model, tmp_path / "m.onnx", batch_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="no place for a file"):
        zoo.to_onnx(model, tmp_path / "file" / "m.onnx")
    monkeypatch.setattr("zoo.exchange.onnx.TOLERANCE", 0.0)
    with pytest.raises(SaveError, match="computes something else"):
        zoo.to_onnx(model, tmp_path / "m.onnx", batch_size=1)

    def absent(name: str, extra: str) -> Any:
        raise MissingPackageError(f"{name} of {extra}")

    monkeypatch.setattr("zoo.exchange.onnx.library", absent)
    with pytest.raises(MissingPackageError, match="onnx of export"):
        zoo.to_onnx(model, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_value_that_a_pass_needs_is_part_of_the_graph(tmp_path: Path) -> None:
    method = zoo.adapter("polyhistor-lite", tasks=("x", "y"), rank=4, inner=2, task_dim=4, hidden=8, projected=8)
    model = zoo.load("vit-micro", method, num_classes=3, pretrained=False, embed_dim=48, depth=1, num_heads=3)
    with pytest.raises(
        ContextError, match=r"needs 'task'.*\. A graph has one value for all its inputs: `with model\.context"
    ):
        zoo.to_onnx(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    with model.context(task="y"):
        assert zoo.to_onnx(model, tmp_path / "m.onnx")["largest_difference"] < 1e-5


SWIN: dict[str, Any] = {"pretrained": False, "embed_dim": 8, "depths": (1,), "num_heads": (1,)}


@pytest.mark.parametrize("quality", [None, 0.3])
def test_what_mixes_by_each_image_takes_batches_of_any_size(tmp_path: Path, quality: float | None) -> None:
    """`len` of a tensor fixed the graph to two images, and ONNX Runtime's own error was all that one read."""
    torch.manual_seed(0)
    model = zoo.load("swin-micro", zoo.adapter("petalface", rank=2), num_classes=3, **SWIN)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    with model.context(**({} if quality is None else {"quality": quality})):
        assert zoo.to_onnx(model, tmp_path / "m.onnx")["largest_difference"] < 1e-5


def test_values_of_single_samples_go_with_their_number_of_samples_only(tmp_path: Path) -> None:
    model = zoo.load("swin-micro", zoo.adapter("petalface", rank=2), num_classes=3, **SWIN)
    with (
        model.context(quality=torch.tensor([0.3, 0.6])),
        pytest.raises(ContextError, match=r"2 values for a batch of 1.*one for each sample goes with batches of their"),
    ):
        zoo.to_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_torch_fixed_to_one_size_is_not_given_out_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("vit", "vpt")
    wide = torch.export.Dim
    monkeypatch.setattr(torch.export, "Dim", lambda name, **options: wide.STATIC)
    with pytest.raises(ConfigError, match=r"batches of 2 only: .*batch_size=1"):
        zoo.to_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_command(tmp_path: Path) -> None:
    model = zoo.load("vit-micro", "lora", num_classes=2)
    model.classes = ["ant", "bee"]
    model.save_adapter(tmp_path / "out")
    line = ["export", str(tmp_path / "out"), "--onnx", str(tmp_path / "out.onnx")]
    result = CliRunner().invoke(app, [*line, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["largest_difference"] < 1e-4
    found = runtime.InferenceSession(str(tmp_path / "out.onnx")).get_modelmeta().custom_metadata_map
    assert json.loads(found["classes"]) == ["ant", "bee"] and found["backbone"] == model.backbone_name
    assert CliRunner().invoke(app, [*line[:-1], str(tmp_path / "out.pt")]).exit_code == 1


def test_a_network_whose_images_have_any_size_is_refused_in_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, _ = tiny_model("vlm")
    with pytest.raises(ConfigError, match="how much of its images is padding is read while it runs; serve it"):
        zoo.to_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir()) and capfd.readouterr().out == ""


def test_a_failing_exporter_says_why_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch prints of a network that it cannot trace is the whole of it, line by line."""
    model, _ = tiny_model("vlm")
    monkeypatch.setattr(type(model.family), "no_graph", "")
    with pytest.raises(ConfigError, match=r"GuardOnDataDependentSymNode: Could not"):
        zoo.to_onnx(model, tmp_path / "m.onnx")
    assert "def forward" not in "".join(capfd.readouterr())
