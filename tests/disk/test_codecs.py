"""Encodings of saved tensors: what comes back, what a reader refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import zoo
from zoo.disk import codecs, read
from zoo.disk.codecs import Codec, decode, encode, register_codec
from zoo.errors import ConfigError, UnknownNameError, WeightsError


def model_with_zeros() -> zoo.Model:
    model = zoo.load("vit-micro", zoo.adapter("lora", rank=8), num_classes=4)
    with torch.no_grad():
        for p in model.adapters["lora"].parameters():
            p.normal_().mul_(torch.rand_like(p) < 0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("codec", "error", "share"), [("fp16", 2**-11, 0.55), ("int8", 1 / 254, 0.4), ("sparse", 0, 0.75)]
)
def test_what_comes_back(tmp_path: Path, codec: str, error: float, share: float) -> None:
    model = model_with_zeros()
    plain = model.save_adapter(tmp_path / "plain") / "adapter_model.safetensors"
    folder = model.save_adapter(tmp_path / codec, codec=codec)
    assert (folder / "adapter_model.safetensors").stat().st_size < share * plain.stat().st_size
    saved, expected = read(folder), read(tmp_path / "plain")
    assert saved.codec == codec and saved.tensors.keys() == expected.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert tensor.dtype == torch.float32
        assert (
            float((tensor - expected.tensors[name]).abs().max())
            <= error * float(expected.tensors[name].abs().max()) * 1.01
        )
    again, images = zoo.load(adapter=folder), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), model(images), rtol=0.1, atol=0.1)
    again.save_adapter(tmp_path / "back")
    assert "encoding" not in json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_bytes(
        b""
    )  # a save that was cut off: the copy in the weights knows the codec
    assert read(folder).recovered and read(folder).codec == codec


def test_a_plain_folder_is_what_it_was(tmp_path: Path) -> None:
    model = model_with_zeros()
    model.save_adapter(tmp_path)
    assert "encoding" not in json.loads((tmp_path / "adapter_config.json").read_text())
    with safe_open(str(tmp_path / "adapter_model.safetensors"), framework="pt") as file:
        assert not any("#" in name for name in file.keys())  # noqa: SIM118


def test_a_codec_that_the_reader_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = Codec(lambda t: {"double": 2 * t}, lambda parts: parts["double"] / 2)
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "CODECS", dict(codecs.CODECS))
        register_codec("double", double)
        model = model_with_zeros()
        model.save_adapter(tmp_path, codec="double")
        assert torch.equal(read(tmp_path).tensors["head/weight"], model.head.weight)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="a codec 'int8' already"):
            register_codec("int8", double)
    with pytest.raises(
        ConfigError, match=r"encoded by 'double', a codec that this installation lacks \(it has plain, fp16"
    ):
        zoo.load(adapter=tmp_path)
    with pytest.raises(UnknownNameError, match=r"no codec 'int4'\. Did you mean 'int8'"):
        model_with_zeros().save_adapter(tmp_path / "new", codec="int4")
    assert not (tmp_path / "new").exists()


def test_damaged_parts_are_refused() -> None:
    tensors = {"a/x": torch.randn(4, 6) * (torch.rand(4, 6) < 0.3)}
    for codec, part, wrong in (
        ("int8", "scale", torch.ones(5)),
        ("sparse", "bits", torch.zeros(9, dtype=torch.uint8)),
        ("sparse", "shape", torch.tensor([1 << 40, 1 << 20])),
        ("sparse", "values", torch.ones(23)),
    ):
        stored, encoding = encode(codec, tensors)
        with pytest.raises(WeightsError, match=f"'a/x' is not what the codec '{codec}' writes"):
            decode(encoding, {**stored, f"a/x#{part}": wrong}, "file")
        del stored[f"a/x#{part}"]
        with pytest.raises(WeightsError, match="not what the codec"):
            decode(encoding, stored, "file")


def test_edges() -> None:
    for codec in ("fp16", "int8", "sparse"):
        tensors = {
            "a/zero": torch.zeros(3, 5),
            "a/large": torch.full((2, 2), 1e30),
            "a/scalar": torch.tensor(1.5),
            "a/empty": torch.zeros(0, 3),
            "a/count": torch.tensor([3, 4]),
            "a/half": torch.randn(2, 4, dtype=torch.bfloat16),
        }
        found = decode(encode(codec, tensors)[1], encode(codec, tensors)[0], "file")
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=2e-2)
