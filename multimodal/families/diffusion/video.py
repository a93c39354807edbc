"""What the families of videos share: clips as data, and how long these may be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multimodal.families.diffusion.family import DiffusersBackbone
from zoo.errors import DataError

if TYPE_CHECKING:
    from multimodal.families.diffusion.front import Front
    from zoo.data import ImageDataset


class VideoBackbone(DiffusersBackbone):
    """A transformer of clips. The autoencoder makes one latent frame of the first frame, and one of every `frame_ratio` more."""

    modality, noun = "diffusion-video", "clips"
    sample, request = "frames", '("a cat crosses a lawn").frames[0]'
    takes_image = False  # whether it is an image-to-video model, which is given the first frame

    stream: tuple[str, ...] = ("transformer_blocks",)  # module paths of the lists of blocks that the video passes

    @property
    def shape(self) -> dict[str, Any]:
        """Options of `configure` that say of what size its clips are."""
        return {}

    @property
    def patch_sizes(self) -> tuple[int, int]:
        """Latent frames, and latents along a side, in one patch."""
        return self.frame_patch, int(self.config.patch_size)

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The inputs behind the latents, in the order of `run`, but for the latents of an image."""
        return "timestep", "encoder_hidden_states"

    def first_blocks(self, blocks: int, **options: Any) -> Front:
        """As `Backbone.first_blocks` (`multimodal.families.diffusion.front`)."""
        from multimodal.families.diffusion.front import make_front

        return make_front(self, blocks, **options)

    @property
    def frame_patch(self) -> int:
        """Latent frames in one patch."""
        raise TypeError(f"{type(self).__name__} does not implement frame_patch.")

    @property
    def clip_frames(self) -> int:
        """Frames of pixels of a clip."""
        raise TypeError(f"{type(self).__name__} does not implement clip_frames.")

    @property
    def frame_ratio(self) -> int:
        """Frames of pixels in a latent frame, the first one aside."""
        raise TypeError(f"{type(self).__name__} does not implement frame_ratio.")

    def preprocess(self, train: bool, **options: Any) -> Any:
        """PIL frames -> (F, 3, H, W) in [-1, 1]. `frames`: how many, by default as the checkpoint was trained; mirrored at random
        in training, unless `augment` is "crop" or "none". `jitter`: share of masks varied in training, where clips have some."""
        from multimodal.data.clips import JITTER, Clip

        frames = int(options.get("frames") or self.clip_frames)
        flip = train and options.get("augment", "crop-flip") == "crop-flip"
        return Clip(self.data_config(), frames, train, flip, float(options.get("jitter", JITTER)))

    @classmethod
    def open_dataset(cls, data: Any, split: str | None = None, **options: Any) -> ImageDataset:
        """A folder of clips (`clips.py`), with a subfolder for each split if there are several, or a torch data set."""
        from multimodal.data.clips import ClipRows
        from zoo.data import ImageDataset

        if not isinstance(data, (str, Path)):
            return super().open_dataset(data, split, **options)
        folder = Path(data).expanduser()
        return ImageDataset(ClipRows(folder / split if split else folder), None)

    def check_clip(self, clip: Tensor, pixels: bool) -> None:
        """Raise DataError unless a batch of clips (B, F, C, H, W) is as long as the autoencoder and the patches need it."""
        ratio = self.frame_ratio
        if clip.ndim != 5:
            raise DataError(f"clips are {tuple(clip.shape)}; expected (B, frames, channels, height, width).")
        frames = clip.shape[1]
        if pixels and frames <= ratio and ratio > 1:
            raise DataError(
                f"A clip has {frames} frames, fewer than the {ratio + 1} of the shortest one: the first, and a chunk of {ratio}. "
                "Leave it out, or take frames more densely."
            )
        if pixels and (frames - 1) % ratio:
            raise DataError(
                f"A clip has {frames} frames; '{self.name}' takes the first one and whole chunks of {ratio} (it was trained on "
                f"{self.clip_frames} frames). Cut it to {frames - (frames - 1) % ratio}."
            )
