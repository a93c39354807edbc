"""Sound: reading files, checking what was read, other sample rates.

Files are decoded by soundfile (WAV, FLAC, Ogg, MP3); several channels are averaged. An array must be mono already, since nothing
says which of its axes are the channels.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError, MissingPackageError
from zoo.library import library

__all__ = ["SAMPLE_RATE", "Sound", "as_sound", "decode", "resample"]

SAMPLE_RATE = 16_000  # Hz, of what backbones take
WINDOW, HOP = 400, 160  # samples of a frame, and from one to the next: 25 and 10 ms
SHORTEST = WINDOW / SAMPLE_RATE  # seconds

_ADVICE = 'Repair or remove it, or open the data set with on_error="skip" to go on without it.'


@dataclass(frozen=True, eq=False)
class Sound:
    """A mono waveform: `wave` (n,) float32, about -1..1; `rate` in Hz; `where` it comes from, for messages."""

    wave: Tensor
    rate: int = SAMPLE_RATE
    where: str = "the sound"

    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.wave) / self.rate


def as_sound(value: Any, rate: int = SAMPLE_RATE, where: str = "the sound") -> Sound:
    """A checked `Sound` out of one, of an array or tensor (n,), of a pair (array, rate), or of {"array":, "sampling_rate":}.

    An array alone is taken to be at `rate`; a dict must say its own, and so does a decoder of torchcodec, as the library
    `datasets` gives it. Whole numbers (int16 and the like) are scaled to -1..1.

    Raises:
        DataError: it is empty, shorter than 25 ms, not finite, not mono, or no sound at all.
    """
    if isinstance(value, Sound):
        return _checked(value)
    if hasattr(value, "get_all_samples"):
        samples = value.get_all_samples()
        value, rate = samples.data.mean(0), samples.sample_rate
    elif isinstance(value, dict):
        if "array" not in value or "sampling_rate" not in value:
            raise DataError(
                f"{where}: a sound with the entries {', '.join(map(str, value)) or 'none'}; expected 'array' and "
                "'sampling_rate' (in Hz), or encoded 'bytes'."
            )
        value, rate = value["array"], value["sampling_rate"]
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], (Real, str)):
        value, rate = value
    if isinstance(rate, bool) or not isinstance(rate, Real) or rate != rate or int(rate) != rate:
        raise DataError(f"{where}: the sample rate is {rate!r}; expected a whole number of Hz, such as 16000.")
    try:
        wave = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{where}: {type(value).__name__} is no waveform; expected an array of samples, or (array, sample rate)."
        ) from error
    if wave.ndim != 1:
        raise DataError(
            f"{where}: an array of shape {tuple(wave.shape)}; expected one channel, (samples,). Average the channels, for "
            "example wave.mean(0) for (channels, samples). (Files with several channels are averaged.)"
        )
    if wave.is_complex() or wave.dtype == torch.bool:
        raise DataError(f"{where}: samples of type {wave.dtype}; expected real numbers.")
    if rate <= 0:
        raise DataError(f"{where}: a sample rate of {rate} Hz.")
    if not wave.is_floating_point():
        info = torch.iinfo(wave.dtype)
        middle = 0 if info.min < 0 else (info.max + 1) // 2
        wave = (wave.float() - middle) / ((info.max + 1) / (2 if middle else 1))
    return _checked(Sound(wave.float(), int(rate), where))


def _checked(sound: Sound, advice: str = "") -> Sound:
    wave, where = sound.wave, sound.where
    if not len(wave):
        raise DataError(f"{where}: the sound is empty (0 samples). {advice}".rstrip())
    if sound.seconds() < SHORTEST:
        raise DataError(
            f"{where}: {len(wave)} samples at {sound.rate} Hz ({1000 * sound.seconds():.1f} ms); expected at least one window of "
            f"{1000 * SHORTEST:.0f} ms. {advice}".rstrip()
        )
    finite = wave.isfinite()
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise DataError(f"{where}: sample {first} is {wave[first].item()}; expected finite numbers. {advice}".rstrip())
    return sound


def decode(data: bytes | bytearray | memoryview | None, where: str) -> Sound:
    """A mono sound out of an encoded file (WAV, FLAC, Ogg, MP3); several channels are averaged.

    Raises:
        DataError: there are no bytes, they are no sound, or the sound is empty, too short or not finite; it names `where`.
        MissingPackageError: soundfile is not installed.
    """
    if data is None or len(data) == 0:
        raise DataError(f"{where}: the file is empty (0 bytes). {_ADVICE}")
    soundfile = library("soundfile", "audio")
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{where}: not a sound that soundfile can read ({error}). {_ADVICE}") from error
    return _checked(Sound(torch.from_numpy(samples).mean(1), int(rate), where), _ADVICE)


def resample(wave: Tensor, rate: int, target: int = SAMPLE_RATE) -> Tensor:
    """(..., n) at `rate` Hz -> (..., about n * target / rate) at `target` Hz: by torchaudio if it is there, else by scipy.

    Raises:
        MissingPackageError: neither is installed.
    """
    if rate == target:
        return wave
    if (functional := _torchaudio()) is not None:
        return functional.resample(wave, rate, target)  # type: ignore[no-any-return]
    signal = library("scipy.signal", "audio")
    common = math.gcd(rate, target)
    found = signal.resample_poly(wave.cpu().double().numpy(), target // common, rate // common, axis=-1)
    return torch.from_numpy(found).to(wave)


@cache
def _torchaudio() -> Any:
    try:
        return library("torchaudio.functional", "audio")
    except (MissingPackageError, OSError):  # OSError: built for another torch
        return None
