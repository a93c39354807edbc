"""Training to fill in masked videos: the noise's error everywhere, and once more where the mask is.

    loss = mean |f(x_t, t, c) - target|^2 + w mean |m (f(x_t, t, c) - target)|^2          m: the mask of the latents

Items of the data are ((clip, mask, condition ...), anything): frames (F, 3, H, W) in [-1, 1], masks (F, 1, H, W) with 1 where
something is to be filled in, and what the model is conditioned on. Both means are over all elements, whatever the mask's area, as
the authors have it. They write the error of the latents that a velocity v leads to, x - x' = sqrt(1 - a) (v - v'), weighed by
1 / (1 - a): the error of v itself, which is what stands here, for any scheduler.

An adapter that reads them (`videopainter`) is given the latents of the clip without what is masked, and the mask of the latents
(`multimodal.data.masks`). A model that takes an image is given the first frame: nothing of it is masked then.

Deviations from VideoPainter's script: it hides pixels by black in training and by grey in its pipelines; here they are black in
both. It takes one frame of four for the latents' mask, so that fast masks leak; here a latent is masked if any of its pixels is
(`frames="nearest"`: as theirs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from multimodal.data.masks import check_mask, hidden, latent_mask
from multimodal.tasks.diffuse import Denoising, Diffuse
from zoo.errors import ConfigError, DataError
from zoo.host import Host
from zoo.registry import register_task
from zoo.tasks.base import Task


@register_task("inpaint")
class Inpaint(Diffuse):
    """Denoising of masked clips.

    Args:
        scheduler, vae: as `Diffuse`.
        region: w.
        image_drop: share of clips whose first frame is not given to an image-to-video model in training.
        frames: how masks are brought to the size of latents: "any" or "nearest".
        given_first: nothing of the first frame is masked; by default for models that take it.
        options: further ones of `Diffuse`.
    """

    def __init__(
        self,
        scheduler: Any = None,
        vae: Any = None,
        *,
        region: float = 1.0,
        image_drop: float = 0.05,
        frames: str = "any",
        given_first: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(scheduler, vae, **options)
        if not 0 <= region < 1e6:
            raise ConfigError(f"region is {region}; expected a number of 0 or more.")
        if not 0 <= image_drop < 1:
            raise ConfigError(f"image_drop is {image_drop}; expected 0 <= image_drop < 1.")
        if frames not in ("any", "nearest"):
            raise ConfigError(f"frames is {frames!r}; expected 'any' or 'nearest'.")
        self.region, self.image_drop, self.frames, self.given_first = region, image_drop, frames, given_first
        self._made: tuple[Any, dict[str, Tensor]] | None = None  # of the batch under way

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Denoising]:
        """The error of the prediction, in float32, and once more where the mask is; see the module."""
        given = self.masks(model, inputs)
        self._made = None
        arguments, target = self._noisy(model, (inputs[0], *inputs[2:]), targets)
        wanted = {k: v for k, v in given.items() if k in model.wanted}  # type: ignore[attr-defined]
        prediction = model(*arguments, context=wanted) if wanted else model(*arguments)
        channels = target.shape[1]
        error = (prediction[:, :channels] if prediction.shape[1] > channels else prediction).float() - target
        loss = error.square().mean() + self.region * (given["mask"].float() * error).square().mean()
        return loss, Denoising(prediction, target, inputs[0])

    def example(self, model: Host, inputs: Any, targets: Any) -> Any:
        """As `Diffuse.example`."""
        return super().example(model, (inputs[0], *inputs[2:]), targets)

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """`masked` and `mask` for the passes of a batch."""
        return {**super().context(model, inputs, targets, training=training), **self.masks(model, inputs)}

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """None but the loss."""
        return Task.metrics(self, model) if self.distance is None else super().metrics(model)

    def encode(self, model: Host, data: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Diffuse.encode`; while training some images are left out."""
        latents, image = super().encode(model, data)
        if image is not None and model.training and self.image_drop:
            kept = torch.rand(len(image), device=image.device) >= self.image_drop
            image = image * kept.to(image).view(-1, 1, 1, 1, 1)
        return latents, image

    @torch.no_grad()
    def masks(self, model: Host, inputs: Any) -> dict[str, Tensor]:
        """Of a batch (clips, masks, ...): the latents of what is known, and the latents' mask, in the model's layout.

        Raises:
            DataError: no masks, masks of another size than the clips, or one that marks nothing.
        """
        if self._made is not None and self._made[0] is inputs:
            return self._made[1]
        if not isinstance(inputs, (tuple, list)) or len(inputs) < 2 or not isinstance(inputs[1], Tensor):
            raise DataError(
                "a batch holds no masks; items are ((clip, mask, text), anything), see multimodal.tasks.inpaint."
            )
        family: Any = model.family
        clip, mask = inputs[0], inputs[1]
        family.check_clip(clip, self.vae is not None)
        axis = family.frames_axis if self.vae is None else 1
        stood = (clip, mask) if axis == 1 else (clip.transpose(1, 2), mask.transpose(1, 2))
        clip, mask = stood[0], stood[1].to(clip.device)
        if self.given_first or (self.given_first is None and getattr(family, "takes_image", False)):
            mask = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)
        check_mask(mask, clip)
        if self.vae is None:
            known, small = hidden(clip.float(), mask, 0.0), mask.float()
        else:
            known = self._latents(hidden(clip, mask), model.training, 1)
            known = known if family.frames_axis == 1 else known.transpose(1, 2)
            size = (known.shape[1], *known.shape[3:])
            small = latent_mask(mask, size, family.frame_ratio, self.frames)
        if short := -known.shape[1] % family.frame_patch:  # as `encode` does it
            known, small = (torch.cat([t[:, :1]] * short + [t], dim=1) for t in (known, small))
        if family.frames_axis == 2:
            known, small = known.transpose(1, 2), small.transpose(1, 2)
        given = {"masked": known.to(model.dtype), "mask": small.to(model.dtype)}
        self._made = inputs, given
        return given
