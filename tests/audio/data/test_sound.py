"""Sounds and their features: against transformers' extractor, other rates and kinds, what is refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_parts import encoded, tone

from audio.data.features import AudioTransform, LogMel, log_mel
from audio.data.sound import Sound, as_sound, decode, resample
from audio.data.sounds import open_audio
from zoo.errors import ConfigError, DataError, MissingPackageError

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

    import audio.data.sound

    monkeypatch.setattr(audio.data.sound, "_torchaudio", lambda: None)
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
