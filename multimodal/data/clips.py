"""Clips with the embeddings of their text, from a folder. No video codec is needed:

    clips/cat/000.png, 001.png ...      a folder of frames, in the order of their names (numbers in that of numbers)
    clips/dog.gif                       or one animated image (GIF, WebP, PNG)
    clips/cat.txt, clips/dog.txt        what is to be seen
    clips/cat.safetensors ...           "text": its embeddings (L, d_text), as the model's text encoder makes them

The text encoder is larger than most models that train on clips, so it is run once, in front of training:

    embed_texts("clips", lambda text: pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save
from torch import Tensor

from multimodal.data.pixels import Pixels
from zoo.data.folders import visible
from zoo.data.images import colours
from zoo.data.labels import natural
from zoo.errors import ConfigError, DataError

FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATED = (".gif", ".webp", ".png")


class ClipRows:
    """Rows of a folder of clips (`zoo.data.dataset.Rows`): a list of PIL frames, and the text's embeddings."""

    labels: np.ndarray | None = None
    blocks: np.ndarray | None = None
    window = 0

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder without clips."""
        self.folder, self.name = folder, folder.resolve().name
        if not folder.is_dir():
            raise DataError(f"There is no folder '{folder}' of clips.")
        there = sorted(p for p in folder.iterdir() if visible(p.name))
        self.clips = [p for p in there if p.is_dir() or p.suffix.lower() in ANIMATED]
        if not self.clips:
            raise DataError(
                f"'{folder}' holds no clips: folders of frames, or animated images ({', '.join(ANIMATED)})."
            )

    def __len__(self) -> int:
        return len(self.clips)

    def where(self, index: int) -> str:
        """The clip's path below the folder above."""
        return f"{self.name}/{self.clips[index].name}"

    def read(self, index: int) -> tuple[list[Image.Image], Tensor]:
        """(frames, (L, d_text)).

        Raises:
            DataError: frames that cannot be read, or no embeddings.
        """
        clip = self.clips[index]
        place = clip.with_suffix(".safetensors")
        try:
            text = load_file(place)["text"]
        except Exception as error:
            raise DataError(
                f"{self.where(index)}: no text embeddings in '{place.name}' ({type(error).__name__}). Write the captions to "
                "<clip>.txt and run multimodal.data.clips.embed_texts(folder, encode)."
            ) from error
        try:
            return self._frames(clip), text.float()
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise DataError(f"{self.where(index)}: a frame cannot be read ({error}).") from error

    @staticmethod
    def _frames(clip: Path) -> list[Image.Image]:
        if clip.is_dir():
            named = {p.stem: p for p in clip.iterdir() if p.suffix.lower() in FRAMES and visible(p.name)}
            files = [named[stem] for stem in natural(list(named))]
            return [_frame(p) for p in files]
        with Image.open(clip) as image:
            return [colours(frame) for frame in ImageSequence.Iterator(image)]


def _frame(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return colours(image)


class Clip:
    """PIL frames -> (F, 3, H, W) in [-1, 1], `frames` of them: any stretch in training, the first ones otherwise."""

    def __init__(self, config: Mapping[str, Any], frames: int, train: bool, flip: bool) -> None:
        self.pixels, self.frames, self.train, self.flip = Pixels(config, flip=False), frames, train, flip

    def __call__(self, images: Any) -> Tensor:
        """Raises DataError for a clip that is too short."""
        if not isinstance(images, list):
            raise DataError(f"expected a list of PIL frames, got {type(images).__name__}.")
        if len(images) < self.frames:
            raise DataError(
                f"A clip has {len(images)} frames, fewer than the {self.frames} that are asked for. Leave it out, or ask for "
                "fewer: model.preprocess(train=True, frames=...), a multiple of 4 and one more."
            )
        spare = len(images) - self.frames
        start = int(torch.randint(spare + 1, ())) if self.train and spare else 0
        clip = torch.stack([self.pixels(image) for image in images[start : start + self.frames]])
        return clip.flip(-1) if self.flip and bool(torch.rand(()) < 0.5) else clip


def embed_texts(folder: str | Path, encode: Callable[[str], Tensor]) -> int:
    """Write `<clip>.safetensors` with the embeddings (L, d) of every `<clip>.txt` of a folder; returns how many.

    Raises:
        DataError: no such file in the folder. ConfigError: `encode` gives something else.
    """
    from zoo.disk import write_file

    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise DataError(f"'{folder}' holds no captions (<clip>.txt).")
    for file in files:
        text = encode(file.read_text(encoding="utf-8").strip())
        if not isinstance(text, Tensor) or text.ndim != 2:
            shape = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise ConfigError(f"encode gives {shape} for '{file.name}'; expected embeddings (tokens, width).")
        write_file(file.with_suffix(".safetensors"), save({"text": text.detach().cpu().contiguous()}))
    return len(files)
