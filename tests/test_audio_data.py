"""Sounds: features against transformers' extractor, files and Parquet packs, what is refused, and a whole `zoo.fit`."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import zoo
from zoo.data import Skipped, collate
from zoo.errors import ConfigError, DataError, MissingPackageError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")

from audio.data import open_audio  # noqa: E402
from audio.features import AudioTransform, LogMel, log_mel  # noqa: E402
from audio.sound import Sound, as_sound, decode, resample  # noqa: E402

SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 48, "max_length": 40, "num_mel_bins": 32}


def tone(frequency: float, seconds: float = 0.5, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """A sine with a little noise, float32."""
    noise = np.random.default_rng(seed).normal(size=round(seconds * rate))
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency * time) + 0.01 * noise).astype(np.float32)


def encoded(wave: np.ndarray, rate: int = 16_000, form: str = "WAV") -> bytes:
    """A file's bytes; 32-bit float in WAV, so that nothing is rounded."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, subtype="FLOAT" if form == "WAV" else None)
    return file.getvalue()


def table(folder: Path, name: str, **columns: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


# -- features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [400, 5_000, 16_000, 30_000])
def test_features_are_those_of_the_library(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    own = transformers.ASTFeatureExtractor(max_length=100, mean=-6.8, std=5.5)
    rng = np.random.default_rng(length)
    # loud low partials beside silence: where a transform in float32 would be off
    wave = (tone(120, length / 16_000) * np.linspace(0, 1, length) ** 4 + 1e-6 * rng.normal(size=length)).astype(
        "float32"
    )
    expected = own(wave, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    found = LogMel(100, 128, -6.8, 5.5)([torch.from_numpy(wave)])[0]
    assert found.shape == (100, 128) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    config = {"max_length": 100, "num_mel_bins": 128, "mean": -6.8, "std": 5.5}
    torch.testing.assert_close(AudioTransform(config)(wave), expected, rtol=0, atol=1e-4)


def test_features_of_real_recordings_are_those_of_the_library(data_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own, ours = transformers.ASTFeatureExtractor(max_length=500), AudioTransform({"max_length": 500})
    for data in (open_audio(data_dir / "fsdd", split="test"), open_audio(data_dir / "esc10")):
        for i in (0, 1):
            sound = data[i][0]
            wave = resample(sound.wave, sound.rate)
            expected = own(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"][0]
            torch.testing.assert_close(ours(sound), expected, rtol=0, atol=1e-4)


def test_a_batch_of_several_lengths_is_each_alone() -> None:
    extract = LogMel(max_length=30, num_mel_bins=40)
    waves = [torch.randn(n) for n in (400, 559, 560, 3_000, 9_000)]
    together = extract(waves)
    assert together.shape == (5, 30, 40)
    for wave, found in zip(waves, together, strict=True):
        torch.testing.assert_close(found, extract([wave])[0])
    assert [len(log_mel(w, 40)) for w in waves] == [1, 1, 2, 17, 54]
    # what follows the sound is zero in front of the normalisation
    torch.testing.assert_close(together[0, 1:], torch.full((29, 40), 4.2677393 / (2 * 4.5689974)))


def test_a_partial_lands_in_its_band() -> None:
    """Bands are equally spaced on the mel scale between 20 Hz and 8 kHz: which one a tone falls into, by hand."""
    low, high = (1127 * math.log(1 + f / 700) for f in (20, 8000))
    for frequency in (300, 1000, 4000):
        expected = (1127 * math.log(1 + frequency / 700) - low) / ((high - low) / 65) - 1
        assert abs(int(log_mel(torch.from_numpy(tone(frequency)), 64)[20].argmax()) - expected) <= 0.6


def test_augmentation() -> None:
    config = {"max_length": 50, "num_mel_bins": 64, "mean": 0.0, "std": 0.5}
    wave = torch.randn(40 * 160 + 400)  # 41 frames
    plain = AudioTransform(config)(wave)
    assert plain[:41].abs().min() > 0 and not plain[41:].any()
    torch.manual_seed(0)
    shift = AudioTransform(config, train=True, augment="shift")
    starts = set()
    for _ in range(40):
        moved = shift(wave)
        start = int(moved.any(1).nonzero()[0])
        starts.add(start)
        assert torch.equal(moved[start : start + 41], plain[:41])
    assert starts == set(range(6))  # up to a tenth of 50 frames
    assert torch.equal(AudioTransform(config, train=True, augment="none")(wave), plain)

    mask = AudioTransform(config, train=True, frequency_mask=0.25, time_mask=0.5)
    widths = []
    for _ in range(40):
        found = mask(wave)
        live = found[found.any(1)]
        bands = (~live.any(0)).nonzero().flatten()
        assert len(bands) == 0 or int(bands[-1] - bands[0]) == len(bands) - 1  # one band of neighbours
        widths.append(len(bands))
        assert len(live) >= 41 - 25
    assert max(widths) <= 16 and len(set(widths)) > 4

    long = torch.arange(5 * 50 * 160, dtype=torch.float32).sin() * torch.linspace(0.01, 1, 5 * 50 * 160)
    seen = {float(AudioTransform(config, train=True, augment="shift")(long).mean()) for _ in range(10)}
    assert len(seen) > 5  # cut at random places; in evaluation at the beginning:
    torch.testing.assert_close(AudioTransform(config)(long), LogMel(**config)([long])[0])
    state = torch.get_rng_state()
    AudioTransform(config)(wave)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="'crop'"):
        AudioTransform({}, augment="crop")
    with pytest.raises(ConfigError, match="time_mask is 3"):
        AudioTransform({}, time_mask=3)


# -- sounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int) -> None:
    """A tone stays that tone."""
    found = resample(torch.from_numpy(tone(440, 1.0, rate)), rate)
    assert abs(len(found) - 16_000) <= 1
    power = torch.fft.rfft(found[:16_000].double()).abs()
    assert int(power.argmax()) == 440
    middle = found[2_000:14_000]
    assert float(middle.abs().max()) == pytest.approx(0.5, abs=0.06)


def test_without_scipy_and_torchaudio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import audio.sound

    monkeypatch.setattr(audio.sound, "_torchaudio", lambda: None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(MissingPackageError, match=r"adapter-zoo\[audio\]"):
        resample(torch.zeros(100), 8_000)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_channels_of_a_file_are_averaged(form: str) -> None:
    left, right = tone(300), tone(2000)
    found = decode(encoded(np.stack([left, right], 1), form=form), "here")
    expected = torch.from_numpy((left + right) / 2)
    torch.testing.assert_close(found.wave, expected, rtol=0, atol=0.06 if form == "OGG" else 1e-4)
    assert (found.rate, found.where) == (16_000, "here")


def test_kinds_of_arrays() -> None:
    wave = tone(300)
    for value in (wave, wave.astype(np.float64), torch.from_numpy(wave), (wave, 16_000), wave.tolist()):
        torch.testing.assert_close(as_sound(value).wave, torch.from_numpy(wave))
    assert as_sound({"array": wave, "sampling_rate": 22_050}).rate == 22_050
    ints = (wave * 32768).astype(np.int16)
    torch.testing.assert_close(as_sound(ints).wave, torch.from_numpy(wave), rtol=0, atol=1 / 32768)
    bytes_ = np.round(wave * 127 + 128).astype(np.uint8)
    torch.testing.assert_close(as_sound(bytes_).wave, torch.from_numpy(wave), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(0, np.float32), r"empty \(0 samples\)"),
        (np.zeros(399, np.float32), r"399 samples at 16000 Hz \(24.9 ms\).*25 ms"),
        ((np.zeros(199, np.float32), 8_000), "199 samples at 8000 Hz"),
        (np.array([0.0] * 500 + [np.nan] * 9, np.float32), "sample 500 is nan"),
        (np.array([0.0] * 500 + [-np.inf], np.float32), "sample 500 is -inf"),
        (np.zeros((2, 16_000), np.float32), r"shape \(2, 16000\); expected one channel.*wave.mean\(0\)"),
        ((np.zeros(800), 0), "sample rate of 0 Hz"),
        ("a string", "str is no waveform"),
        (np.zeros(800, np.complex64), "complex64"),
    ],
)
def test_bad_sounds_are_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^here: .*{message}"):
        as_sound(value, where="here")


def test_a_sound_made_by_hand_is_checked_too() -> None:
    with pytest.raises(DataError, match=r"the sound: .*nan"):
        AudioTransform({})(Sound(torch.full((800,), float("nan"))))


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
    with pytest.raises(DataError, match="no file or folder"):
        open_audio("nobody-knows-this")
    (folder / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no sound in its 1 class folders"):
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
