"""Encoded images and Parquet files of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(value: int, size: int = 8, kind: str = "PNG") -> bytes:
    """An image whose every pixel is `value`."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(file: Path, labels: list[Any], images: list[Any] | None = None, **options: Any) -> Path:
    """Row i holds an image of grey value i and labels[i]."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [encoded(i) for i in range(len(labels))] if images is None else images
    pq.write_table(pa.table({"image": images, "label": labels}), file, **options)
    return file
