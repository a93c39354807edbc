"""Clips with the embeddings of their text, from a folder, and masks of what is to be filled in where there are some.

    clips/cat/000.png, 001.png ...      a folder of frames, in the order of their names (numbers in that of numbers)
    clips/dog.gif                       or one animated image (GIF, WebP, PNG)
    clips/bird.mp4                      or a video (MP4, MOV, MKV, WebM, AVI), which needs the package av
    clips/cat.mask/, clips/dog.mask.gif masks, in any of these forms: as many frames of the same size, white where something is
                                        to be filled in (grey is white from 128 on); for all clips, or for none
    clips/cat.txt, clips/dog.txt        what is to be seen
    clips/cat.safetensors ...           "text": its embeddings (L, d_text), as the model's text encoder makes them

The text encoder is larger than most models that train on clips, so it is run once, in front of training:

    embed_texts("clips", lambda text: pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save
from torch import Tensor

from multimodal.data.masks import jitter
from multimodal.data.pixels import Pixels
from zoo.data.folders import visible
from zoo.data.images import colours
from zoo.data.labels import natural
from zoo.errors import ConfigError, DataError
from zoo.library import library

FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATED = (".gif", ".webp", ".png")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
MASK, HALF = ".mask", 128  # what masks are called, and from which grey on they are white
JITTER = 0.3  # share of masks that are varied in training, as VideoPainter's scripts have it


class Masked(NamedTuple):
    """A clip with its masks and the embeddings of its text."""

    frames: list[Image.Image]
    masks: list[Image.Image]
    text: Tensor


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
        found = [p for p in there if p.is_dir() or p.suffix.lower() in (*ANIMATED, *VIDEOS)]
        self.masks = {_stem(p).removesuffix(MASK): p for p in found if _stem(p).endswith(MASK)}
        self.clips = [p for p in found if not _stem(p).endswith(MASK)]
        if not self.clips:
            raise DataError(
                f"'{folder}' holds no clips: folders of frames, animated images ({', '.join(ANIMATED)}) or videos "
                f"({', '.join(VIDEOS)})."
            )
        lacking = [p.name for p in self.clips if _stem(p) not in self.masks]
        if self.masks and lacking:
            raise DataError(
                f"'{folder}' holds masks, and {len(lacking)} clips have none, first '{lacking[0]}'. Put it beside the clip as "
                f"'{_stem(Path(lacking[0]))}{MASK}', a folder of frames, an animated image or a video, or take the clip out."
            )

    def __len__(self) -> int:
        return len(self.clips)

    def where(self, index: int) -> str:
        """The clip's path below the folder above."""
        return f"{self.name}/{self.clips[index].name}"

    def read(self, index: int) -> tuple[Any, Any]:
        """(frames, (L, d_text)); or, where there are masks, (`Masked`, 0).

        Raises:
            DataError: frames that cannot be read, or no embeddings; masks of another number or size, or empty ones.
        """
        clip = self.clips[index]
        place = clip.parent / f"{_stem(clip)}.safetensors"
        try:
            text = load_file(place)["text"]
        except Exception as error:
            raise DataError(
                f"{self.where(index)}: no text embeddings in '{place.name}' ({type(error).__name__}). Write the captions to "
                "<clip>.txt and run multimodal.data.clips.embed_texts(folder, encode)."
            ) from error
        try:
            frames = read_frames(clip)
            if not self.masks:
                return frames, text.float()
            masks = [m.convert("L") for m in read_frames(self.masks[_stem(clip)])]
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise DataError(f"{self.where(index)}: a frame cannot be read ({error}).") from error
        if len(masks) != len(frames):
            raise DataError(f"{self.where(index)}: {len(masks)} masks for {len(frames)} frames; expected one for each.")
        wrong = next((i for i, (f, m) in enumerate(zip(frames, masks)) if f.size != m.size), None)
        if wrong is not None:
            raise DataError(
                f"{self.where(index)}: the mask of frame {wrong} is {masks[wrong].size}, and the frame {frames[wrong].size}; "
                "expected the same width and height."
            )
        if not any(map(_marks, masks)):
            raise DataError(
                f"{self.where(index)}: the mask marks nothing, so nothing is to be filled in. Leave the clip out."
            )
        return Masked(frames, masks, text.float()), 0


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def read_frames(clip: Path) -> list[Image.Image]:
    """The frames of a folder of images, an animated image, or a video.

    Raises:
        MissingPackageError: a video, without the package av. OSError, ValueError: it cannot be read.
    """
    if clip.is_dir():
        named = {p.stem: p for p in clip.iterdir() if p.suffix.lower() in FRAMES and visible(p.name)}
        return [_frame(named[stem]) for stem in natural(list(named))]
    if clip.suffix.lower() in VIDEOS:
        av = library("av", "video")
        with av.open(str(clip)) as container:
            if not container.streams.video:
                raise ValueError("there is no stream of pictures")
            return [colours(frame.to_image()) for frame in container.decode(video=0)]
    with Image.open(clip) as image:
        return [colours(frame) for frame in ImageSequence.Iterator(image)]


def _marks(mask: Image.Image) -> bool:
    darkest_and_lightest: Any = mask.getextrema()  # of a grey image
    return bool(darkest_and_lightest[1] >= HALF)


def _frame(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return colours(image)


class Clip:
    """PIL frames -> (F, 3, H, W) in [-1, 1], `frames` of them: any stretch in training, the first ones otherwise.

    Of a `Masked` clip a tuple: the stretch, one that has something masked behind its first frame, (F, 1, H, W) masks, 0 or 1, in
    training a share `jitter` of them varied (`multimodal.data.masks`), and the text.
    """

    def __init__(self, config: Mapping[str, Any], frames: int, train: bool, flip: bool, jitter: float = JITTER) -> None:
        self.pixels, self.frames, self.train, self.flip = Pixels(config, flip=False), frames, train, flip
        if not 0 <= jitter <= 1:
            raise ConfigError(f"jitter is {jitter}; expected a share from 0 to 1.")
        self.jitter = jitter

    def __call__(self, images: Any) -> Any:
        """Raises DataError for a clip that is too short, or has no stretch with a mask."""
        if isinstance(images, Masked):
            return self._masked(images)
        self._check(images)
        start = self._start(len(images) - self.frames + 1)
        clip = self._stretch(images, start)
        return clip.flip(-1) if self.flip and bool(torch.rand(()) < 0.5) else clip

    def _masked(self, item: Masked) -> tuple[Tensor, Tensor, Tensor]:
        self._check(item.frames)
        marked = [_marks(m) for m in item.masks]
        places = [i for i in range(len(marked) - self.frames + 1) if any(marked[i + 1 : i + self.frames])]
        if not places:
            raise DataError(
                f"no stretch of {self.frames} frames has a mask behind its first frame; nothing would be filled in. Leave the "
                "clip out."
            )
        start = places[self._start(len(places))]
        clip = self._stretch(item.frames, start)
        masks = [m.convert("RGB") for m in item.masks]
        mask = (self._stretch(masks, start).mean(dim=1, keepdim=True) > 0).float()
        if self.train and bool(torch.rand(()) < self.jitter):
            mask = jitter(mask)
        if self.flip and bool(torch.rand(()) < 0.5):
            clip, mask = clip.flip(-1), mask.flip(-1)
        return clip, mask, item.text

    def _start(self, count: int) -> int:
        return int(torch.randint(count, ())) if self.train and count > 1 else 0

    def _stretch(self, images: list[Image.Image], start: int) -> Tensor:
        return torch.stack([self.pixels(image) for image in images[start : start + self.frames]])

    def _check(self, images: Any) -> None:
        if not isinstance(images, list):
            raise DataError(f"expected a list of PIL frames, got {type(images).__name__}.")
        if len(images) < self.frames:
            raise DataError(
                f"A clip has {len(images)} frames, fewer than the {self.frames} that are asked for. Leave it out, or ask for "
                "fewer: model.preprocess(train=True, frames=...), a multiple of 4 and one more."
            )


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
