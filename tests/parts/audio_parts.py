"""Tones, their files and Parquet files, for the tests of sounds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")

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
