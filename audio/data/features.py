"""From sound to log-mel features, as transformers' `ASTFeatureExtractor` computes them.

A mono waveform x at 16 kHz is cut into frames of 25 ms every 10 ms (no padding at the ends: 1 + (n - 400) // 160 of them).
Each frame is freed of its mean, pre-emphasised (x_i - 0.97 x_{i-1}), multiplied by a symmetric Hann window, and transformed
(FFT of 512 points). Its power goes through triangular filters that are equally spaced between 20 Hz and 8 kHz on the mel scale

    mel(f) = 1127 ln(1 + f / 700)

and the logarithm of max(energy, 2^-23) is the feature. A spectrogram of fewer than `max_length` frames is filled up with zeros
*in front of* the normalisation (v - mean) / (2 std), as the backbones were trained; a longer one is cut.

The transform is computed in float64: next to a loud partial the rounding of a float32 transform is as large as quiet bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.data.sound import HOP, SAMPLE_RATE, WINDOW, as_sound, resample
from zoo.errors import ConfigError, nearest

__all__ = ["AUGMENTS", "AudioTransform", "LogMel", "WaveTransform", "log_mel", "mel_filters"]

FFT = 512
FLOOR = 2.0**-23
LOWEST = 20.0  # Hz
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet
AUGMENTS = ("mask", "shift", "none")


@cache
def mel_filters(num_mel_bins: int) -> Tensor:
    """Triangular filters (257, num_mel_bins), float64: energy of FFT bins -> energy of mel bands."""

    def mel(frequency: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(frequency / 700.0)

    low, high = mel(torch.tensor([LOWEST, SAMPLE_RATE / 2], dtype=torch.float64)).tolist()
    corners = torch.linspace(low, high, num_mel_bins + 2, dtype=torch.float64)
    bins = mel(torch.arange(FFT // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / FFT)[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0.0)


def log_mel(waves: Tensor, num_mel_bins: int = 128) -> Tensor:
    """Waveforms (..., n) at 16 kHz, n >= 400 -> log-mel features (..., 1 + (n - 400) // 160, num_mel_bins), float32."""
    frames = waves.to(torch.float64).unfold(-1, WINDOW, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64, device=waves.device)
    power = torch.fft.rfft((frames - 0.97 * before) * window, n=FFT).abs().square()
    return (power @ mel_filters(num_mel_bins).to(waves.device)).clamp_min(FLOOR).log().float()


@dataclass(frozen=True)
class LogMel:
    """Batches of waveforms at 16 kHz -> what the backbone takes.

    Args:
        max_length: frames of the result. num_mel_bins: bands of the result.
        mean, std: of log-mel features in the data that the backbone was trained on; the result is (v - mean) / (2 std).
    """

    max_length: int = 1024
    num_mel_bins: int = 128
    mean: float = MEAN
    std: float = STD

    @property
    def samples(self) -> int:
        """How many samples `max_length` frames span."""
        return (self.max_length - 1) * HOP + WINDOW

    def __call__(self, waves: Tensor | Sequence[Tensor]) -> Tensor:
        """A batch (B, n), or B waveforms (n_i,) of any lengths from 400 samples -> (B, max_length, num_mel_bins), float32.

        Raises:
            DataError: a waveform that is empty, too short, not finite, or not mono.
        """
        batch = [as_sound(wave, where=f"waveform {i}").wave[: self.samples] for i, wave in enumerate(waves)]
        longest = max(len(wave) for wave in batch)
        features = log_mel(torch.stack([F.pad(wave, (0, longest - len(wave))) for wave in batch]), self.num_mel_bins)
        counts = torch.tensor([1 + (len(wave) - WINDOW) // HOP for wave in batch], device=features.device)
        inside = torch.arange(features.shape[1], device=features.device) < counts[:, None]
        return self.normalize(self.fill(features.masked_fill(~inside[..., None], 0.0)))

    def fill(self, features: Tensor, offset: int = 0) -> Tensor:
        """(..., t, mel), t <= max_length - offset -> (..., max_length, mel), zeros around."""
        return F.pad(features, (0, 0, offset, self.max_length - offset - features.shape[-2]))

    def normalize(self, features: Tensor) -> Tensor:
        """(v - mean) / (2 std)."""
        return (features - self.mean) / (2 * self.std)


def _function(augment: Any, known: Sequence[str], train: bool) -> tuple[Any, str]:
    """(the user's function or None, the name of what is done besides)."""
    if callable(augment):
        return (augment if train else None), "none"
    if augment not in known:
        raise ConfigError(f"augment '{augment}' is unknown. {nearest(augment, known)}")
    return None, augment


def _augmented(wave: Tensor, function: Any) -> Tensor:
    """A waveform (n,) at 16 kHz through a function of the user's."""
    if function is None:
        return wave
    return as_sound(function(wave.numpy(), SAMPLE_RATE), where="what augment gives").wave


class AudioTransform:
    """The preprocessing of a backbone: sound -> (max_length, num_mel_bins), float32.

    In training a long sound is cut at a random place instead of at its beginning, and a short one is moved by up to a tenth of
    the length (`augment="shift"`); with "mask" (the default) one band of frequencies and one stretch of time are also set
    to zero (SpecAugment, Park et al. 2019, as the authors of AST use it: in front of the normalisation).

    Args:
        config: `max_length`, `num_mel_bins`, `mean`, `std`, as in `Backbone.data_config()`.
        train: augment; False gives the evaluation view, equal to that of transformers' feature extractor.
        augment: of training: "mask", "shift", "none"; or a function (samples, sample rate) -> samples, as those of
            audiomentations are, on the whole sound at 16 kHz.
        frequency_mask, time_mask: largest part of the bands and of the frames that is masked. The authors take 24 of 128
            bands and 96 of 512 frames on ESC-50 (our default), 48 of 128 each on Speech Commands.

    Raises:
        ConfigError: a setting that is not known, or out of range.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        train: bool = False,
        *,
        augment: Any = "mask",
        frequency_mask: float = 24 / 128,
        time_mask: float = 96 / 512,
    ) -> None:
        self.own, augment = _function(augment, AUGMENTS, train)
        for name, value in (("frequency_mask", frequency_mask), ("time_mask", time_mask)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; expected a part from 0 to 1.")
        known = ("max_length", "num_mel_bins", "mean", "std")
        self.extract = LogMel(**{key: config[key] for key in known if key in config})
        self.shift = train and augment != "none"
        self.masks = (frequency_mask, time_mask) if train and augment == "mask" else (0.0, 0.0)

    def __call__(self, sound: Any) -> Tensor:
        """What `audio.data.sound.as_sound` takes, of any sample rate -> (max_length, num_mel_bins).

        Raises:
            DataError: a sound that is empty, too short, not finite, or not mono; the message names its place.
        """
        heard, extract = as_sound(sound), self.extract
        wave = _augmented(resample(heard.wave, heard.rate, SAMPLE_RATE), self.own)
        spare = len(wave) - extract.samples
        if spare > 0:
            start = int(torch.randint(spare + 1, ())) if self.shift else 0
            wave = wave[start : start + extract.samples]
        features = log_mel(wave, extract.num_mel_bins)
        room = min(extract.max_length - len(features), extract.max_length // 10) if self.shift else 0
        features = extract.fill(features, int(torch.randint(room + 1, ())) if room > 0 else 0)
        for axis, part in zip((1, 0), self.masks):
            features = _masked(features, axis, part)
        return extract.normalize(features)

    def __repr__(self) -> str:
        steps = f"shifted={self.shift}, masked={self.masks}" + (f", {self.own!r}" if self.own is not None else "")
        return f"AudioTransform({self.extract.max_length} x {self.extract.num_mel_bins}, {steps})"


def _masked(features: Tensor, axis: int, part: float) -> Tensor:
    """Up to `part` of an axis set to 0; width and place are drawn evenly."""
    size = features.shape[axis]
    if (widest := math.floor(part * size)) < 1:
        return features
    width = float(torch.rand(())) * widest
    start = float(torch.rand(())) * (size - width)
    index = torch.arange(int(start), int(start) + int(width), device=features.device)
    return features.index_fill(axis, index, 0.0)


class WaveTransform:
    """The preprocessing of a backbone that takes waveforms: sound -> (samples,), float32, at 16 kHz.

    A long sound is cut, in training at a random place; a short one gets silence at its end, in training on both sides. With
    `normalize` the sound itself, without the silence, is brought to mean 0 and variance 1.

    Args:
        config: `samples` and `normalize`, as in `Backbone.data_config()`.
        train: augment. augment: of training: "shift" or "none", or a function as in `AudioTransform`.

    Raises:
        ConfigError: a setting that is not known.
    """

    def __init__(self, config: Mapping[str, Any], train: bool = False, *, augment: Any = "shift") -> None:
        self.own, augment = _function(augment, AUGMENTS[1:], train)
        self.samples, self.normalize = int(config["samples"]), bool(config.get("normalize", True))
        self.shift = train and augment == "shift"

    def __call__(self, sound: Any) -> Tensor:
        """What `audio.data.sound.as_sound` takes, of any sample rate -> (samples,).

        Raises:
            DataError: a sound that is empty, too short, not finite, or not mono; the message names its place.
        """
        heard = as_sound(sound)
        wave = _augmented(resample(heard.wave, heard.rate, SAMPLE_RATE), self.own)
        spare = len(wave) - self.samples
        place = int(torch.randint(abs(spare) + 1, ())) if self.shift and spare else 0
        if spare > 0:
            wave = wave[place : place + self.samples]
        if self.normalize:
            wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
        return wave if spare > 0 else F.pad(wave, (place, -spare - place))

    def __repr__(self) -> str:
        own = f", {self.own!r}" if self.own is not None else ""
        return f"WaveTransform({self.samples} samples, normalized={self.normalize}, shifted={self.shift}{own})"
