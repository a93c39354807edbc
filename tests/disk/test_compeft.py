"""Adapters of signs: what is kept, what comes back, how large the file is, and what a reader refuses."""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import zoo
from zoo.cli import app
from zoo.disk import read
from zoo.disk.codecs import decode, encode
from zoo.disk.compeft import entropy_bits, golomb_bits, pack, ternary, unpack
from zoo.disk.sizes import sizes
from zoo.errors import ConfigError, MismatchError, WeightsError
from zoo.hub import publish_to_folder, pull

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


def trained(method: str = "lora", seed: int = 0, **settings: Any) -> zoo.Model:
    """An adapter moved away from its start by noise, on the shipped backbone."""
    model = zoo.load("vit-micro", zoo.adapter(method, **settings), num_classes=4).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.adapters[method].parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def by_hand(changes: dict[str, Tensor], k: float, alpha: float) -> dict[str, Tensor]:
    """The definition, by sorting: the largest changes of all tensors together."""
    flat = torch.cat([changes[name].double().reshape(-1) for name in sorted(changes)])
    order = flat.abs().sort(descending=True, stable=True).indices[: int(len(flat) * k / 100)]
    new = torch.zeros_like(flat)
    new[order] = alpha * flat.std() * flat[order].sign()
    pieces = new.split([changes[name].numel() for name in sorted(changes)])
    return {name: piece.view_as(changes[name]) for name, piece in zip(sorted(changes), pieces, strict=True)}


@pytest.mark.parametrize(("k", "alpha"), [(5, 1), (20, 2.5), (50, 0.5), (100, 1)])
def test_round_trip_is_the_definition(k: float, alpha: float) -> None:
    tensors = {
        "b": torch.randn(40, 30),
        "a": 1e-3 * torch.randn(7, 11, 3),
        "c": 1 + torch.randn(17),
        "d": torch.zeros(5),
    }
    starts = {"a": None, "b": torch.zeros(40, 30), "c": torch.ones(17), "d": None}
    found, moved = unpack(pack(tensors, starts, k, alpha))
    expected = by_hand({n: t - (1 if n == "c" else 0) for n, t in tensors.items()}, k, alpha)
    assert not moved and found.keys() == tensors.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value + (name == "c"), rtol=1e-5, atol=1e-6)


def test_exactly_k_is_kept_and_of_equal_changes_the_first() -> None:
    """The authors keep every entry that is as large as the first that should not be kept."""
    places, scale = ternary(np.array([1, -1, 1, -1, 1, 0, 0, 2, 1, 1], np.float32), 30, 2.0)
    assert places.tolist() == [0, 1, 7]
    assert scale == pytest.approx(2 * float(torch.tensor([1, -1, 1, -1, 1, 0, 0, 2, 1, 1.0]).std()))
    assert ternary(np.array([0, 0, 3, 0], np.float32), 100, 1.0)[0].tolist() == [2]  # a 0 has no sign


@pytest.mark.parametrize("k", [5, 10, 20, 30, 50])
def test_size_is_the_formulas(k: int) -> None:
    """47.6 to 10.7 times smaller than 16 bits by entropy, and the file within 2 % of the code's formula."""
    table = {
        5: (0.3364, 0.3393, 47.6),
        10: (0.5690, 0.5756, 28.1),
        20: (0.9219, 0.9388, 17.4),
        30: (1.1813, 1.1882, 13.5),
    }
    entropy, golomb, ratio = table.get(k, (1.5, 1.5, 10.7))
    count = 10**9  # so that the 16 bits of the magnitude do not show
    assert entropy_bits(count, k / 100) / count == pytest.approx(entropy, abs=1e-4)
    assert golomb_bits(count, k / 100) / count == pytest.approx(golomb, abs=1e-4)
    assert 16 / (entropy_bits(count, k / 100) / count) == pytest.approx(ratio, abs=0.06)
    tensors = {f"blocks.{i}.attn.q.lora_{f}": torch.randn(4, 9216) for i in range(12) for f in "ab"}
    parts = pack(tensors, dict.fromkeys(tensors), k, 1.0)
    taken, numbers = 8 * sum(t.numel() for t in parts.values()), 24 * 4 * 9216
    assert entropy_bits(numbers, k / 100) < taken < 1.02 * golomb_bits(numbers, k / 100)


def test_sizes_of_a_folder(tmp_path: Path) -> None:
    """Where tensors are kept to different shares, the formula taken tensor by tensor says what the places and signs take."""
    model = trained(rank=8)
    with torch.no_grad():
        for name, parameter in model.adapters["lora"].named_parameters():
            parameter.normal_(std=4.0 if name.endswith("lora_a") else 1.0)
    folder = model.save_adapter(tmp_path / "out", encoding="compeft", k=10)
    found = sizes(folder)["lora"]
    assert 0 < found["table"] < 0.15 * found["bytes"]
    assert found["bytes"] - found["table"] == pytest.approx(found["by_tensor"], rel=0.03)
    assert found["by_tensor"] < 0.95 * found["golomb"]


def test_speed() -> None:
    """At least 10 MB/s of float32 in one thread, both ways (some 60 are usual)."""
    tensors = {f"t{i}": torch.randn(256, 1024) for i in range(8)}
    best = []
    for _ in range(3):
        begun = time.process_time()
        parts = pack(tensors, dict.fromkeys(tensors), 20, 1.0)
        between = time.process_time()
        unpack(parts)
        best.append(max(between - begun, time.process_time() - between))
    assert 8 * 256 * 1024 * 4 / min(best) > 10e6


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "adapter", "norm"])
def test_a_folder_is_loaded_like_any_other(tmp_path: Path, method: str) -> None:
    model = trained(method)
    before = model(IMAGES)
    generator = torch.get_rng_state()
    folder = model.save_adapter(tmp_path / "small", encoding="compeft", k=20)
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(model(IMAGES), before)  # nothing else happened
    # What attaching gives, and 0 where that is random, is where changes are counted from.
    start = zoo.load("vit-micro", method, num_classes=4).adapter_state(method)
    other = zoo.load("vit-micro", method, num_classes=4).adapter_state(method)
    own = model.adapter_state(method)
    start = {n: t if torch.equal(t, other[n]) else torch.zeros_like(t) for n, t in start.items()}  # type: ignore[assignment]
    names = [n for n, t in own.items() if t.numel() > 1 and t.is_floating_point()]
    expected = by_hand({n: own[n] - start[n] for n in names}, 20, 1.0)
    again = zoo.load(adapter=folder).eval()
    state = again.adapter_state(method)
    for name, value in state.items():
        wanted = start[name] + expected[name].float() if name in expected else own[name]
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(again.head.weight, model.head.weight)  # type: ignore[arg-type]
    plain = again.save_adapter(tmp_path / "plain")  # ternary numbers, as any others
    torch.testing.assert_close(zoo.load(adapter=plain).eval()(IMAGES), again(IMAGES))


def test_pushed_and_pulled(tmp_path: Path) -> None:
    folder = trained().save_adapter(tmp_path / "small", encoding="compeft", k=10, alpha=2)
    publish_to_folder(folder, tmp_path / "hub", "me/small")
    pulled = pull("me/small", hub_folder=tmp_path / "hub")
    assert read(pulled).codec == "compeft"
    assert (pulled / "adapter_model.safetensors").stat().st_size == (
        folder / "adapter_model.safetensors"
    ).stat().st_size
    assert torch.equal(zoo.load(adapter=pulled).eval()(IMAGES), zoo.load(adapter=folder).eval()(IMAGES))
    (folder / "adapter_config.json").write_bytes(b"")  # a save that was cut off
    assert read(folder).recovered and read(folder).codec == "compeft"


def test_sums_and_averages_of_compressed_states(tmp_path: Path) -> None:
    folders = [trained(seed=i).save_adapter(tmp_path / str(i), encoding="compeft", k=20) for i in range(2)]
    model = zoo.load(adapter=folders[0]).eval()
    a, b = (zoo.load(adapter=folder).adapter_state("lora") for folder in folders)
    mean = zoo.average([a, b])
    for name in a:
        torch.testing.assert_close(mean[name], (a[name] + b[name]) / 2)
        assert len(mean[name].unique()) <= 9  # sums of two ternary numbers
    model.set_adapter_state("lora", mean)
    moved = model(IMAGES)
    model.save_adapter(tmp_path / "mean", encoding="sparse")
    assert torch.equal(zoo.load(adapter=tmp_path / "mean").eval()(IMAGES), moved)
    model.set_adapter_state("lora", a + b - b)
    torch.testing.assert_close(model(IMAGES), zoo.load(adapter=folders[0]).eval()(IMAGES))


def test_several_adapters_each_have_their_own_magnitude(tmp_path: Path) -> None:
    model = trained("ia3")
    model.add_adapter(zoo.adapter("lora", rank=2))
    with torch.no_grad():
        for p in model.adapters["lora"].parameters():
            p.copy_(5 * torch.randn_like(p))
    saved = read(model.save_adapter(tmp_path, encoding="compeft", k=20))
    lora = torch.cat([t.reshape(-1) for t in saved.adapter_tensors("lora").values()]).abs()
    ia3 = torch.cat([t.reshape(-1) - 1 for t in saved.adapter_tensors("ia3").values()]).abs()
    assert len(lora.unique()) == 2 and float(lora.max()) > 4 and float(ia3.max()) < 0.1
    assert sizes(tmp_path).keys() == {"ia3", "lora"}


def test_the_command(tmp_path: Path) -> None:
    plain = trained(rank=8).save_adapter(tmp_path / "plain")
    words = ["compress", str(plain), "--out", str(tmp_path / "small"), "-k", "20"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    one = json.loads(result.stdout)["adapters"]["lora"]
    assert one["numbers"] == 6 * 2 * 2 * 192 * 8 and one["kept"] == int(one["numbers"] * 0.2)
    assert one["entropy"] < one["bytes"] < 1.05 * one["golomb"]  # few numbers: the table shows
    assert "times smaller" in CliRunner().invoke(app, words).output
    for wrong, said in (
        ([*words[:3], str(plain)], "the adapter itself"),
        ([words[0], "vit-micro", *words[2:]], "without an adapter"),
        ([*words[:-1], "0"], "at least 0.1 and at most 100"),
        ([*words, "--alpha", "-1"], "above 0"),
    ):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code == 1 and said in " ".join(result.output.replace("│", " ").split()), result.output


def test_wrong_settings(tmp_path: Path) -> None:
    model = trained()
    for settings, said in (
        ({"encoding": "compeft", "k": 0}, "k is 0"),
        ({"encoding": "compeft", "k": 101}, "k is 101"),
        ({"encoding": "compeft", "alpha": float("nan")}, "alpha is nan"),
        ({"encoding": "compeft", "rank": 3}, r"no setting 'rank'; it has k, alpha"),
        ({"encoding": "int8", "k": 20}, r"no setting 'k'; it has none"),
        ({"encoding": "fp16", "codec": "int8"}, "both"),
    ):
        with pytest.raises(ConfigError, match=said):
            model.save_adapter(tmp_path / "out", **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.adapters["lora"].parameters():
            p.zero_()
    with pytest.raises(ConfigError, match="0 differ from their start"):
        model.save_adapter(tmp_path / "out", encoding="compeft")
    next(model.adapters["lora"].parameters()).data.fill_(float("nan"))
    with pytest.raises(WeightsError, match="NaN or Inf"):
        model.save_adapter(tmp_path / "out", encoding="compeft")
    assert not (tmp_path / "out").exists()


def test_of_another_adapter_or_backbone(tmp_path: Path) -> None:
    folder = trained().save_adapter(tmp_path / "a", encoding="compeft")
    other = trained(rank=4, seed=3).save_adapter(tmp_path / "b", encoding="compeft")
    with pytest.raises(MismatchError, match="belongs to the backbone"):
        zoo.load("swin-micro", adapter=folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    mixed = json.loads((other / "adapter_config.json").read_text()) | {"adapters": config["adapters"]}
    (other / "adapter_config.json").write_text(json.dumps(mixed))
    with pytest.raises(ConfigError, match="changed after the adapter was saved"):
        read(other)
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        read(folder)
    bitfit = trained("bitfit").save_adapter(tmp_path / "c", encoding="compeft")
    with pytest.raises(ConfigError, match="no values to start from"):
        zoo.adapter("bitfit", init=bitfit)


def test_parts_that_do_not_fit_are_refused() -> None:
    tensors = {"a/x": torch.randn(40, 6), "a/y": torch.randn(50)}
    stored, encoding = encode("compeft", tensors, {"a": {"x": None, "y": None}}, k=20)
    assert encoding is not None and decode(encoding, stored, "file").keys() == tensors.keys()
    head = json.loads(zlib.decompress(stored["a/#table"].numpy().tobytes()))

    def table(**changes: Any) -> Tensor:
        text = json.dumps({**head, **changes}).encode()
        return torch.frombuffer(bytearray(zlib.compress(text)), dtype=torch.uint8)

    row = head["tensors"][0]
    wrong = {
        "#table": [
            stored["a/#table"][:-3],
            torch.zeros(9, dtype=torch.uint8),
            table(scale=-1.0),
            table(scale=True),
            table(tensors=[["x", "float32", [1 << 30, 6], 0.0, row[4], row[5]], head["tensors"][1]]),
            table(tensors=[["x", "float32", [2, 2], 0.0, row[4], row[5]], head["tensors"][1]]),
            table(tensors=[["x", "float8", *row[2:]], head["tensors"][1]]),
            table(tensors=[[*row[:4], row[4] + 1, row[5]], head["tensors"][1]]),
            table(tensors=[row, ["x", *head["tensors"][1][1:]]]),
            table(tensors=head["tensors"][:1]),
            table(tensors=[{}]),
        ],
        "#signs": [stored["a/#signs"][:-1], stored["a/#signs"].float()],
        "#rests": [torch.cat([stored["a/#rests"], stored["a/#rests"]])],
        "#unary": [stored["a/#unary"][:-1], stored["a/#unary"] | 1, torch.zeros_like(stored["a/#unary"])],
    }
    for part, values in wrong.items():
        for value in values:
            with pytest.raises(WeightsError, match="the adapter 'a' is not what the codec 'compeft' writes"):
                decode(encoding, {**stored, f"a/{part}": value}, "file")
        with pytest.raises(WeightsError, match="not what the codec"):
            decode(encoding, {k: v for k, v in stored.items() if k != f"a/{part}"}, "file")
    with pytest.raises(WeightsError, match="'a/x' twice"):
        decode(encoding, {**stored, "a/x": torch.zeros(3)}, "file")
