"""Data sets of sounds: files, Parquet packs, the Hub, what is refused, and a whole `zoo.fit`."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_parts import SMALL, encoded, table, tone

import zoo
from audio.data.sounds import open_audio
from zoo.data import Skipped, collate
from zoo.errors import ConfigError, DataError

# -- data sets --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`train/` and `test/` with the classes `high` and `low`, 10 and 4 tones each, at two rates."""
    for split, count in (("train", 10), ("test", 4)):
        for name, frequency in (("high", 3000), ("low", 300)):
            place = tmp_path / "tones" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                rate = 8_000 if i % 2 else 16_000
                wave = tone(frequency + 20 * i, 0.3 + 0.02 * i, rate, seed=i)
                (place / f"{i}.wav").write_bytes(encoded(wave, rate))
    return tmp_path / "tones"


def test_folder(folder: Path) -> None:
    data = open_audio(folder, split="train")
    assert (data.name, data.classes, len(data)) == ("tones/train", ["high", "low"], 20)
    assert data.labels is not None and data.labels.tolist() == [0] * 10 + [1] * 10
    sound, label = data[11]
    assert sound.rate == 8_000 and label == 1 and sound.where.endswith("train/low/1.wav")
    np.testing.assert_allclose(sound.wave, tone(320, 0.32, 8_000, seed=1), atol=1e-6)
    with pytest.raises(DataError, match="splits test, train"):
        open_audio(folder)
    assert open_audio(folder, split="train", classes=["low", "middle", "high"])[0][1] == 2
    with pytest.raises(DataError, match="'high' is not among the 2 classes"):
        open_audio(folder, split="train", classes=["low", "hi"])
    assert len(open_audio(folder, split="train", shots=3)) == 6
    with pytest.raises(DataError, match="only= chooses by columns"):
        open_audio(folder, split="train", only={"fold": 1})
    with pytest.raises(DataError, match="No such file or folder"):
        open_audio("./nobody-knows-this")
    (folder / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="1 class folders hold no sound"):
        open_audio(folder / "empty")


def test_bad_files_are_named_or_skipped(folder: Path) -> None:
    place = folder / "test" / "low"
    (place / "bad0.wav").write_bytes(b"")
    (place / "bad1.wav").write_bytes(encoded(tone(300, 0.02)))
    (place / "bad2.wav").write_bytes(b"RIFF and so on")
    (place / "bad3.wav").write_bytes(encoded(np.full(800, np.nan, np.float32)))
    data = open_audio(folder, split="test")
    for index, reason in ((8, "0 bytes"), (9, "25 ms"), (10, "not a sound"), (11, "sample 0 is nan")):
        with pytest.raises(DataError, match=rf"test/low/bad{index - 8}\.wav: .*{reason}.*on_error"):
            data[index]
    skipping = open_audio(folder, split="test", on_error="skip")
    assert [isinstance(skipping[i], Skipped) for i in (7, 8, 9, 10, 11)] == [False, True, True, True, True]
    model = zoo.load("ast-micro", pretrained=False, num_classes=2, **SMALL)
    result = zoo.evaluate(model, skipping, progress=False)
    assert (result["images"], result["skipped"]) == (8, 4)


def test_parquet(tmp_path: Path) -> None:
    waves = [encoded(tone(300 + 100 * i)) for i in range(6)]
    struct = [{"bytes": w, "path": f"{i}.wav"} for i, w in enumerate(waves)]
    table(tmp_path / "pack", "train-00000-of-00002.parquet", audio=waves[:4], digit=[0, 1, 2, 1], fold=[1, 2, 3, 1])
    table(tmp_path / "pack", "train-00001-of-00002.parquet", audio=waves[4:], digit=[0, 2], fold=[2, 4])
    data = open_audio(tmp_path / "pack")
    assert (data.name, len(data), data.classes) == ("pack/train", 6, ["0", "1", "2"])
    assert data[5][1] == 2 and data[5][0].where.endswith("train-00001-of-00002.parquet, row 1")
    some = open_audio(tmp_path / "pack", only={"fold": [1, 4]})
    assert some.labels is not None and some.labels.tolist() == [0, 1, 2]
    assert np.array_equal(open_audio(tmp_path / "pack", only={"fold": range(1, 3), "digit": 1}).indices, [1, 3])
    with pytest.raises(DataError, match="no row has fold=9"):
        open_audio(tmp_path / "pack", only={"fold": 9})
    with pytest.raises(DataError, match=r"no column 'folds'.*'fold'"):
        open_audio(tmp_path / "pack", only={"folds": 1})
    with pytest.raises(DataError, match="does not fit its type int64"):
        open_audio(tmp_path / "pack", only={"fold": "one"})
    table(tmp_path / "hub", "test.parquet", audio=struct, label=["a", "b", "a", "c", "b", "a"])
    hub = open_audio(tmp_path / "hub")
    assert hub.classes == ["a", "b", "c"] and torch.equal(hub[3][0].wave, data[3][0].wave)
    two = table(tmp_path / "two", "test.parquet", x=waves, y=waves, label=[0] * 6)
    with pytest.raises(DataError, match=r"several columns could hold the sounds.*audio_column"):
        open_audio(two)
    assert len(open_audio(two, audio_column="y")) == 6
    with pytest.raises(DataError, match="expected encoded sounds"):
        open_audio(two, audio_column="label")
    none = table(tmp_path / "none", "test.parquet", text=["x"], label=[0])
    with pytest.raises(DataError, match=r"no column holds encoded sounds; columns: text \(string\), label"):
        open_audio(none)


def test_packs_of_real_recordings(data_dir: Path) -> None:
    digits = open_audio(data_dir / "fsdd", split="train")
    assert len(digits) == 2_700 and digits.classes == [str(i) for i in range(10)]
    assert len(open_audio(data_dir / "fsdd", split="test", only={"speaker": "george"})) == 50
    train, test = (open_audio(data_dir / "esc10", only={"fold": folds}) for folds in ([1, 2, 3], 4))
    assert (len(train), len(test), len(train.classes or ())) == (240, 80, 10)
    assert test.labels is not None and np.bincount(test.labels).tolist() == [8] * 10
    assert test[0][0].seconds() == pytest.approx(5.0, abs=0.01)


class Waves(torch.utils.data.Dataset[Any]):
    """Waveforms of several lengths, or what is ready for the model."""

    def __init__(self, ready: bool = False) -> None:
        self.ready, self.targets = ready, [i % 2 for i in range(6)]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = torch.randn(40, 32) if self.ready else tone(3000 if index % 2 else 300, 0.1 + 0.05 * index)
        return item, self.targets[index]


@pytest.mark.parametrize("ready", [False, True])
def test_torch_data_sets(ready: bool) -> None:
    model = zoo.load("ast-micro", pretrained=False, num_classes=2, **SMALL)
    assert zoo.evaluate(model, Waves(ready), progress=False)["images"] == 6


# -- training -----------------------------------------------------------------------------------------------------------------


def test_fit_learns_tones(folder: Path) -> None:
    """High tones from low ones, through files, features, masks and `zoo.fit`."""
    model = zoo.load("ast-micro", zoo.adapter("lora"), pretrained=False, num_classes=2, seed=0, **SMALL)
    train, test = (open_audio(folder, split=split) for split in ("train", "test"))
    report = zoo.fit(model, train, epochs=4, batch_size=10, lr=1e-2, progress=False)
    assert model.classes == ["high", "low"]
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert zoo.evaluate(model, test, progress=False)["accuracy"] == 1.0


def test_spectrograms_are_mixed(folder: Path) -> None:
    """A batch (B, T, mel) has no channel axis; mixing goes through one. An odd label shows that targets are mixed too."""
    model = zoo.load("ast-micro", "linear", num_classes=2, pretrained=False, seed=0, **SMALL)
    for options in ({"mixup": 0.8}, {"cutmix": 1.0}):
        report = zoo.fit(model, open_audio(folder, split="train"), epochs=1, progress=False, **options)
        assert math.isfinite(report.history[0]["loss"]) and "accuracy" not in report.history[0]


def test_several_classes_for_each_sound(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    waves, labels = [], []
    for i in range(24):
        own = [name for name, chance in (("high", 0.5), ("low", 0.5)) if rng.random() < chance]
        parts = [tone({"high": 3000, "low": 300}[n], 0.4, seed=i) for n in own] or [0.01 * rng.normal(size=6400)]
        waves.append(encoded(np.sum(parts, axis=0).astype(np.float32)))
        labels.append(own)
    table(tmp_path / "tags", "train.parquet", audio=waves, labels=labels)
    data = open_audio(tmp_path / "tags")
    assert data.classes == ["high", "low"] and data.labels is None
    assert [[n for n, t in zip(("high", "low"), data[i][1].tolist()) if t] for i in range(24)] == labels
    model = zoo.load("ast-micro", "lora", pretrained=False, num_classes=2, seed=0, **SMALL)
    before = zoo.evaluate(model, data, task="multilabel", progress=False)
    zoo.fit(model, data, task="multilabel", epochs=4, batch_size=8, lr=1e-2, augment="none", progress=False)
    after = zoo.evaluate(model, data, task="multilabel", progress=False)
    assert after["loss"] < before["loss"] and after["map"] > 0.9
    with pytest.raises(DataError, match=r"not among the 1 classes"):
        open_audio(tmp_path / "tags", classes=["low"])


# -- the Hub, and words -----------------------------------------------------------------------------------------------


class Table:
    """As a data set of the library `datasets`: rows of (audio, text, label)."""

    def __init__(self, sounds: list[Any]) -> None:
        kind = sys.modules["datasets"]
        self.sounds, self.encoded = sounds, False
        self.features = {"audio": kind.Audio(), "text": object(), "label": kind.ClassLabel(names=["high", "low"])}

    def cast_column(self, name: str, feature: Any) -> Table:
        cast = Table(self.sounds)
        cast.encoded = name == "audio" and isinstance(feature, type(self.features["audio"])) and not feature.decode
        return cast

    def __len__(self) -> int:
        return len(self.sounds)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [i % 2 for i in range(len(self))] if key == "label" else None
        assert self.encoded  # bytes, which nothing has decoded
        return {"audio": self.sounds[key], "text": "", "label": key % 2}


@pytest.mark.parametrize("name", ["ann/tones", "hf:ann/tones", "hf://ann/tones", "hf://datasets/ann/tones"])
def test_data_sets_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = [tone(f) for f in (2000, 200, 1500, 300)]
    (tmp_path / "3.wav").write_bytes(encoded(waves[3]))
    sounds = [{"bytes": encoded(w), "path": "x.wav"} for w in waves[:3]]
    sounds.append({"bytes": None, "path": str(tmp_path / "3.wav")})
    fake, asked = types.ModuleType("datasets"), []
    for kind, setting in (("Audio", "decode"), ("Image", "decode"), ("ClassLabel", "names")):
        setattr(fake, kind, dataclasses.make_dataclass(kind, [(setting, Any, dataclasses.field(default=True))]))

    def load_dataset(name: str, split: str | None = None) -> Any:
        asked.append((name, split))
        return Table(sounds) if split else {"train": Table(sounds), "test": Table(sounds)}

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = open_audio(name, split="train")
    assert asked == [("ann/tones", "train")]
    assert data.classes == ["high", "low"] and [data[i][1] for i in range(4)] == [0, 1, 0, 1]
    for wave, (sound, _) in zip(waves, (data[i] for i in range(4)), strict=True):
        torch.testing.assert_close(sound.wave, torch.from_numpy(wave).float(), rtol=0, atol=1e-4)
    with pytest.raises(DataError, match="splits train, test"):
        open_audio(name)
    with pytest.raises(DataError, match=r"audio_column 'text' is of type object; expected Audio"):
        open_audio(name, split="train", audio_column="text")
    with pytest.raises(DataError, match=r"image_column=.*audio, text, label"):
        zoo.open_dataset(name, split="train")


def test_reports_speak_of_sounds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = zoo.load("ast-micro", zoo.adapter("lora"), pretrained=False, num_classes=2, **SMALL)
    train = open_audio(folder, split="train")
    report = zoo.fit(model, train, epochs=1, batch_size=10, progress=True)
    shown = "".join(capsys.readouterr())
    assert "sounds/s" in str(report) and "sounds/s" in shown and "images" not in str(report) + shown
    assert f"{len(train)} sounds" in repr(train)
    with pytest.raises(DataError, match="asks for more sounds than"):
        open_audio(folder, split="train", shots=1000)
    with pytest.raises(ConfigError, match="sounds are less than one batch"):
        zoo.fit(model, train, batch_size=1000, drop_last=True, progress=False)
    for shape, what in (((7,), "Waveforms"), ((7, 4), "Spectrograms"), ((3, 7, 4), "Images"), ((2, 3, 7, 4), "Clips")):
        with pytest.raises(DataError, match=f"^{what} of one batch have different shapes"):
            collate([(torch.zeros(shape), 0), (torch.zeros(*shape[:-1], 5), 0)])
    with pytest.raises(DataError, match=r"first: a\.wav: torn"):
        collate([Skipped("a.wav", "torn")])
