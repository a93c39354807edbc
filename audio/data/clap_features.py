"""From sound to CLAP's log-mel features, as transformers' `ClapFeatureExtractor` computes them.

A mono waveform at 48 kHz is cut to 10 s, or repeated as often as it fits and filled up with silence. Frames of 1,024 samples,
every 480 (periodic Hann window, the ends reflected), give power, mel bands up to 14 kHz, and 10 log10 max(e, 1e-10). Networks
with feature fusion have bands of the HTK scale, and see four copies; the others Slaney's. Of longer sounds one part is heard.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.data.sound import as_sound, resample
from audio.data.whisper_features import slaney_filters, triangles
from zoo.errors import ConfigError, nearest

__all__ = ["ClapTransform", "clap_features"]

RATE, FFT, HOP, HIGHEST = 48_000, 1024, 480, 14_000.0
AUGMENTS = ("shift", "none")


@cache
def htk_filters(num_mel_bins: int) -> Tensor:
    """Triangular filters (513, num_mel_bins), float64, equally spaced on the HTK scale: mel = 2595 log10(1 + f / 700)."""
    top = 2595.0 * torch.log10(torch.tensor(1 + HIGHEST / 700.0, dtype=torch.float64))
    mels = torch.linspace(0, float(top), num_mel_bins + 2, dtype=torch.float64)
    return triangles(700.0 * (10.0 ** (mels / 2595.0) - 1.0), FFT, RATE)


def clap_features(waves: Tensor, num_mel_bins: int = 64, fused: bool = False) -> Tensor:
    """Waveforms (..., n) at 48 kHz -> (..., 1 + n // 480, num_mel_bins) in dB, float32."""
    flat = waves.to(torch.float64).reshape(-1, waves.shape[-1])
    window = torch.hann_window(FFT, dtype=torch.float64, device=waves.device)
    power = torch.stft(flat, FFT, HOP, window=window, return_complex=True).abs().square()
    filters = htk_filters(num_mel_bins) if fused else slaney_filters(num_mel_bins, FFT, RATE, HIGHEST)
    energy = power.transpose(1, 2) @ filters.to(waves.device)
    return (10.0 * energy.clamp_min(1e-10).log10()).float().reshape(*waves.shape[:-1], -1, num_mel_bins)


class ClapTransform:
    """The preprocessing of CLAP: sound -> (1 or 4, frames, num_mel_bins), float32.

    Args:
        config: `num_mel_bins`, `frames` and `fused`, as in `Backbone.data_config()`.
        train: a long sound is cut at a random place instead of at its beginning (`augment="shift"`, not "none").

    Raises:
        ConfigError: a setting that is not known.
    """

    def __init__(self, config: Mapping[str, Any], train: bool = False, *, augment: str = "shift") -> None:
        if augment not in AUGMENTS:
            raise ConfigError(f"augment '{augment}' is unknown. {nearest(augment, AUGMENTS)}")
        self.num_mel_bins, self.fused = int(config["num_mel_bins"]), bool(config["fused"])
        self.samples = (int(config["frames"]) - 1) * HOP
        self.shift = train and augment == "shift"

    def __call__(self, sound: Any) -> Tensor:
        """What `audio.data.sound.as_sound` takes, of any sample rate -> (1 or 4, frames, num_mel_bins).

        Raises:
            DataError: a sound that is empty, too short, not finite, or not mono; the message names its place.
        """
        heard = as_sound(sound)
        wave = resample(heard.wave, heard.rate, RATE)
        spare = len(wave) - self.samples
        if spare > 0:
            start = int(torch.randint(spare + 1, ())) if self.shift else 0
            wave = wave[start : start + self.samples]
        else:
            wave = wave.repeat(self.samples // len(wave))
            wave = F.pad(wave, (0, self.samples - len(wave)))
        found = clap_features(wave, self.num_mel_bins, self.fused)[None]
        return found.repeat(4, 1, 1) if self.fused else found

    def __repr__(self) -> str:
        return f"ClapTransform({self.samples} samples x {self.num_mel_bins}, shifted={self.shift})"
