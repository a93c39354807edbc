"""What takes a model elsewhere: torch.export, ONNX Runtime, torchao's int8, averaged models, pickles and copies."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from method_models import attach, bare, images, loss_of, shake
from torch import Tensor, nn

import zoo


def made(method: str) -> zoo.Model:
    model = bare("vit")
    attach(model, method)
    shake(model, method)
    return model.eval()


def sizes() -> list[Tensor]:
    return [torch.cat([images(), images().flip(0)])[:n] for n in (1, 2, 5)]


@pytest.mark.parametrize("live", [True, False], ids=["live", "merged"])
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_onnx_runtime(method: str, live: bool, tmp_path: Path) -> None:
    """The live model and what merge gives, on batches of other sizes than the example's."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = made(method)
    module: nn.Module = model if live else model.merge()
    file = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch},) if not live else (({0: batch},),)  # of `*inputs`
    torch.onnx.export(module, (images()[:2],), file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for x in sizes():
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_exported_and_saved(method: str) -> None:
    """A program of torch.export, written and read again."""
    model, file = made(method), io.BytesIO()
    shapes = {"inputs": ({0: torch.export.Dim("batch", min=1, max=64)},)}
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (images()[:2],), dynamic_shapes=shapes, strict=False), file)
        file.seek(0)
        program = torch.export.load(file).module()
        for x in sizes():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_torchao_int8_of_a_merged_model() -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = made("lora")
    plain = model.merge()
    ao.quantize_(plain, ao.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected, found = model(images()), plain(images())
    assert type(plain.blocks[0].mlp.fc1.weight) is not nn.Parameter  # type: ignore[index,union-attr]
    assert 0 < float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_torchao_int8_below_an_adapter() -> None:
    """The frozen backbone in int8, and LoRA on it: gradients beside those of the model that was not quantised."""
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, exact = made("lora"), made("lora")
    ao.quantize_(model.backbone, ao.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = exact(images())
        assert float((model(images()) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    for each in (model, exact):
        loss_of(each.train()).backward()
    for (name, p), q in zip(model.parameters_to_train().items(), exact.parameters_to_train().values(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        assert float((p.grad - q.grad).norm()) < 0.1 * float(q.grad.norm()) + 1e-6, name


@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "spt"])
def test_averaged_model(method: str) -> None:
    """torch's average of a model holds the mean of what was trained, and computes with it."""
    model = made(method)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    states = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model.train()).backward()
        optimizer.step()
        averaged.update_parameters(model)
        states.append(copy.deepcopy(model.adapter_state_dict()))
    twin = made(method)
    mean = {
        k: torch.stack([s[k] for s in states]).mean(0) if v.is_floating_point() else v for k, v in states[0].items()
    }
    twin.load_adapter_state_dict(mean)
    with torch.no_grad():
        torch.testing.assert_close(averaged.eval()(images()), twin.eval()(images()), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.eval()(images()), twin(images()))


@pytest.mark.parametrize("method", ["lora", "bitfit", "spt", "vqt"])
def test_a_whole_model_in_a_file(method: str, tmp_path: Path) -> None:
    """torch.save of the model itself, and a deep copy, while it has gradients and an optimizer."""
    model = made(method)
    loss_of(model).backward()
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (read, copy.deepcopy(model)):
        with torch.no_grad():
            assert torch.equal(twin(images()), model(images()))
        assert twin.parameters_to_train().keys() == model.parameters_to_train().keys()
        torch.optim.SGD(twin.parameters_to_train().values(), lr=0.1).step()
