"""Clips with masks from a folder: frames, animated images and videos; what of them is taken, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers")

import zoo
from multimodal.data.clips import Clip, ClipRows, Masked, read_frames
from multimodal.tasks.inpaint import Inpaint
from zoo.errors import ConfigError, DataError
from zoo.registry import family

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


def pictures(count: int, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    rows = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return [Image.fromarray(((rows + 9 * i) % 256).astype(np.uint8)) for i in range(count)]


def holes(count: int, first: int = 1, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """White in the middle, from frame `first` on."""
    found = []
    for i in range(count):
        mask = np.zeros((size[1], size[0]), np.uint8)
        if i >= first:
            mask[8:24, 16:32] = 255
        found.append(Image.fromarray(mask))
    return found


def put(folder: Path, frames: list[Image.Image]) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        frame.save(folder / f"{i}.png")


def clip(folder: Path, name: str, frames: int = 11, masks: Any = None, **options: Any) -> Path:
    put(folder / name, pictures(frames))
    put(folder / f"{name}.mask", holes(frames, **options) if masks is None else masks)
    save_file({"text": torch.randn(5, 12)}, folder / f"{name}.safetensors")
    return folder


def test_a_folder_of_frames_and_masks(tmp_path: Path) -> None:
    rows = ClipRows(clip(tmp_path / "a", "cat"))
    item, _ = rows.read(0)
    assert isinstance(item, Masked) and len(rows) == 1 and len(item.frames) == len(item.masks) == 11
    frames, mask, text = Clip(CONFIG, 9, train=False, flip=False)(item)
    assert frames.shape == (9, 3, 32, 32) and mask.shape == (9, 1, 32, 32) and text.shape == (5, 12)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and not mask[0].any() and mask[1].any()
    assert mask[1, 0, 8:24, 8:24].all() and int(mask[1].sum()) == 256  # the centre of 48 x 32
    torch.manual_seed(0)
    made = [Clip(CONFIG, 9, train=True, flip=True, jitter=1.0)(item) for _ in range(4)]
    assert len({float(m.sum()) for _, m, _ in made}) > 1 and all(m[1:].any() for _, m, _ in made)


def test_videos(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    folder = clip(tmp_path / "a", "cat")
    for name, frames in (("dog.mp4", pictures(7)), ("dog.mask.mp4", holes(7))):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
            container.mux(stream.encode())
    save_file({"text": torch.randn(5, 12)}, folder / "dog.safetensors")
    rows = ClipRows(folder)
    assert [rows.where(i) for i in range(2)] == ["a/cat", "a/dog.mp4"]
    item, _ = rows.read(1)
    assert len(item.frames) == 7 and item.frames[0].size == (48, 32)
    assert item.masks[0].getextrema()[1] < 128 <= item.masks[3].getextrema()[1]
    (folder / "dog.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"a/dog.mp4: a frame cannot be read"):
        rows.read(1)
    assert len(read_frames(folder / "cat")) == 11


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="12 masks for 11 frames"):
        ClipRows(clip(tmp_path / "count", "cat", masks=holes(12))).read(0)
    with pytest.raises(DataError, match=r"mask of frame 0 is \(24, 32\)"):
        ClipRows(clip(tmp_path / "size", "cat", masks=[m.resize((24, 32)) for m in holes(11)])).read(0)
    with pytest.raises(DataError, match="the mask marks nothing"):
        ClipRows(clip(tmp_path / "empty", "cat", first=99)).read(0)
    folder = clip(tmp_path / "one", "cat")
    put(folder / "dog", pictures(9))
    with pytest.raises(DataError, match=r"1 clips have none, first 'dog'. Put it beside the clip as 'dog.mask'"):
        ClipRows(folder)
    item, _ = ClipRows(clip(tmp_path / "late", "cat", first=10)).read(0)
    with pytest.raises(DataError, match="no stretch of 9 frames has a mask behind its first frame"):
        Clip(CONFIG, 9, train=False, flip=False)(Masked(item.frames[:10], item.masks[:10], item.text))
    with pytest.raises(DataError, match="11 frames, fewer than the 13"):
        Clip(CONFIG, 13, train=False, flip=False)(item)
    with pytest.raises(ConfigError, match="jitter is 2"):
        Clip(CONFIG, 9, True, True, jitter=2.0)


def test_fit_on_a_folder(tmp_path: Path) -> None:
    """From files to a trained encoder: frames of pixels for a model that works on pixels."""
    for name in ("cat", "dog"):
        clip(tmp_path / "clips", name)
    options = {
        **family("cogvideox").tiny[1],
        "in_channels": 3,
        "out_channels": 3,
        "sample_width": 4,
        "sample_height": 4,
    }  # type: ignore[index]
    model = zoo.load("cogvideox-5b", zoo.adapter("videopainter", blocks=1), pretrained=False, **options)
    before: list[Tensor] = [p.detach().clone() for p in model.adapters["videopainter"].parameters()]
    data = model.family.open_dataset(tmp_path / "clips")
    data.transform = model.family.preprocess(True, frames=9)
    report = zoo.fit(model, data, task=Inpaint(), epochs=1, batch_size=2, lr=1e-2, progress=False)
    assert report is not None
    assert any(not torch.equal(a, b) for a, b in zip(before, model.adapters["videopainter"].parameters()))
