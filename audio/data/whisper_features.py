"""From sound to Whisper's log-mel features, as transformers' `WhisperFeatureExtractor` computes them.

A mono waveform at 16 kHz, cut or filled up with silence to the network's length (30 s), is transformed in frames of 25 ms every
10 ms (periodic Hann window, the ends reflected; the last frame is left out). Its power goes through triangular filters of equal
area on Slaney's mel scale, linear up to 1 kHz and logarithmic above. With e the energies,

    v = log10 max(e, 1e-10),  w = max(v, max v - 8),  feature = (w + 4) / 4
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.data.sound import HOP, SAMPLE_RATE, WINDOW, as_sound, resample
from zoo.errors import ConfigError, nearest

__all__ = ["WhisperTransform", "slaney_filters", "triangles", "whisper_features"]

AUGMENTS = ("shift", "none")
BREAK, STEP = 1000.0, 3 / 200  # Hz; mel for each Hz below
RATIO = 6.4 ** (1 / 27)  # from one mel to the next above


@cache
def slaney_filters(
    num_mel_bins: int, fft: int = WINDOW, rate: int = SAMPLE_RATE, highest: float = SAMPLE_RATE / 2
) -> Tensor:
    """Triangular filters (fft / 2 + 1, num_mel_bins), float64: energy of FFT bins -> energy of mel bands up to `highest` Hz."""
    top = BREAK * STEP + torch.log(torch.tensor(highest / BREAK, dtype=torch.float64)) / math.log(RATIO)
    mels = torch.linspace(0, float(top), num_mel_bins + 2, dtype=torch.float64)
    corners = torch.where(mels < BREAK * STEP, mels / STEP, BREAK * RATIO ** (mels - BREAK * STEP))
    return triangles(corners, fft, rate) * (2.0 / (corners[2:] - corners[:-2]))


def triangles(corners: Tensor, fft: int, rate: int) -> Tensor:
    """Filters (fft / 2 + 1, len(corners) - 2) that rise from one corner (Hz) to the next and fall to the one behind."""
    bins = torch.linspace(0, rate / 2, fft // 2 + 1, dtype=torch.float64)[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp_min(0.0)


def whisper_features(waves: Tensor, num_mel_bins: int = 80) -> Tensor:
    """Waveforms (..., n) at 16 kHz -> (..., num_mel_bins, n // 160), float32; the loudest part of each sets its floor."""
    flat = waves.to(torch.float64).reshape(-1, waves.shape[-1])
    window = torch.hann_window(WINDOW, dtype=torch.float64, device=waves.device)
    spectrum = torch.stft(flat, WINDOW, HOP, window=window, return_complex=True)[..., :-1]
    energy = slaney_filters(num_mel_bins).to(waves.device).T @ spectrum.abs().square()
    value = energy.clamp_min(1e-10).log10()
    value = torch.maximum(value, value.amax(dim=(-2, -1), keepdim=True) - 8.0)
    return ((value + 4.0) / 4.0).float().reshape(*waves.shape[:-1], num_mel_bins, -1)


class WhisperTransform:
    """The preprocessing of Whisper: sound -> (num_mel_bins, frames), float32.

    A long sound is cut, in training at a random place; a short one gets silence at its end, in training on both sides.

    Args:
        config: `num_mel_bins` and `frames`, as in `Backbone.data_config()`.
        train: augment. augment: of training: "shift" or "none" (transcriptions: what is said must be heard).

    Raises:
        ConfigError: a setting that is not known.
    """

    def __init__(self, config: Mapping[str, Any], train: bool = False, *, augment: str = "shift") -> None:
        if augment not in AUGMENTS:
            raise ConfigError(f"augment '{augment}' is unknown. {nearest(augment, AUGMENTS)}")
        self.num_mel_bins, self.samples = int(config["num_mel_bins"]), int(config["frames"]) * HOP
        self.shift = train and augment == "shift"

    def __call__(self, sound: Any) -> Tensor:
        """What `audio.data.sound.as_sound` takes, of any sample rate -> (num_mel_bins, frames).

        Raises:
            DataError: a sound that is empty, too short, not finite, or not mono; the message names its place.
        """
        heard = as_sound(sound)
        wave = resample(heard.wave, heard.rate, SAMPLE_RATE)
        spare = len(wave) - self.samples
        place = int(torch.randint(abs(spare) + 1, ())) if self.shift and spare else 0
        wave = wave[place : place + self.samples] if spare > 0 else F.pad(wave, (place, -spare - place))
        return whisper_features(wave, self.num_mel_bins)

    def __repr__(self) -> str:
        return f"WhisperTransform({self.num_mel_bins} x {self.samples // HOP}, shifted={self.shift})"
