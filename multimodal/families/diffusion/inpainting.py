"""A pipeline that fills in masked videos of any length, in windows, by a transformer of videos with `videopainter` attached.

    pipe = inpainting(model, vae=vae)                             # or text_encoder=, tokenizer= of T5, for prompts
    frames = pipe(video, mask, (text,), (empty,)).frames[0]       # PIL images, as many as went in

Windows have as many frames as the model was trained on, and start `stride` frames after one another; the last one starts earlier
if it must, so that it ends with the video. Each is denoised from noise of its own, decoded, and its frames fade into those of the
window before over the frames that both have. An image-to-video model is given, for the first window, the first frame (`image`
where it is masked), and for the others what the window before made of the frame with which they start: nothing of that frame is
masked then, as in training.

`replace`: after each step what is known of the latents takes the place of what was made of them, with the noise of the next step.

Deviations from VideoPainter's pipeline: it averages latents of neighbouring windows, and decodes them as one video; but the first
latent of a window is of one frame, and that of the window before at the same place of four, so here decoded frames are faded. Its
windows start at multiples of the stride in pixels and at others in latents unless the stride is a multiple of four; here it must
be. It drops frames behind the last whole window; here none is dropped.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from multimodal.data.masks import check_mask, dilated, hidden, latent_mask
from multimodal.tasks.latents import decode, encode
from zoo.arguments import NOTHING, number, one_of, whole
from zoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["InpaintingPipeline", "Windows", "inpainting"]


@dataclass
class Inpainted(BaseOutput):
    """`frames`: a list with one video: PIL images, or a tensor (F, 3, H, W) in [0, 1]."""

    frames: list[Any]


@dataclass(frozen=True)
class Windows:
    """Where windows start, in frames, for a video of `frames` frames in chunks of `ratio`, repeated at its end to `padded`."""

    frames: int
    padded: int
    length: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, frames: int, length: int, stride: int | None, ratio: int) -> Windows:
        """Windows of `length` frames, `stride` apart; by default three quarters of a window.

        Raises:
            DataError: a video shorter than the first frame and a chunk. ConfigError: a length or stride not of whole chunks.
        """
        if frames < ratio + 1:
            raise DataError(
                f"The video has {frames} frames, fewer than the {ratio + 1} of the shortest clip: the first, and a chunk of "
                f"{ratio}."
            )
        if (length - 1) % ratio or length < ratio + 1:
            raise ConfigError(
                f"window is {length} frames; expected one and a multiple of {ratio}, such as {8 * ratio + 1}."
            )
        padded = frames + (1 - frames) % ratio
        step = max((length - 1) * 3 // 4 // ratio * ratio, ratio) if stride is None else stride
        if not ratio <= step <= length - 1 or step % ratio:
            raise ConfigError(
                f"stride is {stride} frames; expected a multiple of {ratio} below {length}, so that neighbours share frames."
            )
        length = min(length, padded)  # of a shorter video there is one window
        starts = [*range(0, padded - length + 1, step)]
        if starts[-1] != padded - length:
            starts.append(padded - length)
        return cls(frames, padded, length, tuple(starts))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Windows (length, ...) -> the video (frames, ...): what two share fades from the first to the second."""
        video = parts[0]
        for start, part in zip(self.starts[1:], parts[1:]):
            shared = len(video) - start
            weight = torch.linspace(0, 1, shared + 1, device=part.device)[:-1].view(-1, *[1] * (part.ndim - 1))
            faded = video[start:] * (1 - weight) + part[:shared] * weight
            video = torch.cat([video[:start], faded, part[shared:]])
        return video[: self.frames]


class InpaintingPipeline(DiffusionPipeline):
    """Made by `inpainting`; see the module."""

    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self, transformer: Any, vae: Any, scheduler: Any, text_encoder: Any = None, tokenizer: Any = None
    ) -> None:
        super().__init__()
        parts = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
        self.model: Host | None = None

    @torch.no_grad()
    def __call__(
        self,
        video: Any,
        mask: Any,
        conditions: Sequence[Tensor] = (),
        null: Sequence[Tensor] = (),
        *,
        prompt: str | None = None,
        negative_prompt: str = "",
        image: Any = None,
        window: int | None = None,
        stride: int | None = None,
        steps: int = 50,
        guidance: float = 6.0,
        dilate: int = 0,
        replace: bool = True,
        resample: float = 0.5,
        masks: str = "any",
        seed: int = 0,
        output_type: str = "pil",
    ) -> Inpainted:
        """The video with what is masked filled in.

        Args:
            video: frames as PIL images, or (F, 3, H, W) in [-1, 1].
            mask: as many frames, white (1) where something is to be filled in: PIL images, or (F, 1, H, W).
            conditions, null: what the model is conditioned on behind latents and time, (1, ...) each, and the same of nothing,
                for guidance; or `prompt` and `negative_prompt`, where the pipeline has a text encoder.
            image: the first frame filled in, for an image-to-video model, where the mask marks something of it.
            window, stride: in frames; by default as the model was trained, and three quarters of a window.
            steps, guidance: of the scheduler; 1 is no guidance.
            dilate: pixels by which the mask is made wider first (the authors: 32 of 480 x 720).
            replace: put what is known in place of what was made of it after each step.
            resample: how much `videopainter-id` takes of the window before; 0: none, it looks at its own window alone.
            masks: how they are brought to the size of latents (`multimodal.data.masks.latent_mask`).
            seed: of the noise.
            output_type: "pil" or "pt".

        Raises:
            DataError: a video shorter than a chunk, masks of another number or size, an empty mask, a first frame that is masked.
            ConfigError: windows that do not fit, no conditions, or a model without the adapter.
        """
        model, family = self._checked(output_type)
        steps, seed, dilate = (
            kind.of(what, value)
            for what, kind, value in (
                ("steps", whole(1), steps),
                ("seed", whole(0, 2**63 - 1), seed),
                ("dilate", whole(), dilate),
            )
        )
        window, stride = ((whole() | NOTHING).of(*pair) for pair in (("window", window), ("stride", stride)))
        guidance, resample = number().of("guidance", guidance), number(0).of("resample", resample)
        clip, marks = _frames(video, "video"), (_frames(mask, "mask") > 0.5).float()
        check_mask(marks[None], clip[None])
        windows = Windows.of(len(clip), family.clip_frames if window is None else window, stride, family.frame_ratio)
        first = _frames([image] if isinstance(image, Image.Image) else image, "image") if image is not None else None
        if family.takes_image:
            if first is None and bool(marks[0].any()):
                raise DataError(
                    "the mask marks something of the first frame, which an image-to-video model starts from. Hand in this frame "
                    "filled in (image=...), by a model of images or by hand."
                )
            first = clip[:1] if first is None else first
            if first.shape != clip[:1].shape:
                raise DataError(
                    f"image is {tuple(first.shape)}; expected one frame of the video's size, {tuple(clip[:1].shape)}."
                )
            clip, marks = torch.cat([first.to(clip), clip[1:]]), torch.cat([torch.zeros_like(marks[:1]), marks[1:]])
            check_mask(marks[None], clip[None])
        marks = dilated(marks, dilate)
        if family.takes_image:
            marks[0] = 0
        more = windows.padded - windows.frames
        clip, marks = (torch.cat([t, *[t[-1:]] * more]) for t in (clip, marks))
        told = self._told(model, conditions, null, prompt, negative_prompt, guidance)
        source, chain = torch.Generator().manual_seed(seed), {"weight": resample}
        parts: list[Tensor] = []
        training = model.training
        model.eval()
        try:
            for start in self.progress_bar(windows.starts):
                part, hole = (t[start : start + windows.length].clone() for t in (clip, marks))
                if parts and family.takes_image:
                    part[0] = windows_so_far(windows, parts)[start]
                    hole[0] = 0
                parts.append(self._window(part, hole, told, steps, guidance, replace, masks, source, chain))
        finally:
            model.train(training)
        pixels = (windows.joined(parts) / 2 + 0.5).clamp(0, 1).cpu()
        return Inpainted([pixels if output_type == "pt" else [_image(p) for p in pixels]])

    def _checked(self, output_type: str) -> tuple[Any, Any]:
        if self.model is None:
            raise ConfigError(
                "the pipeline has no model; make it by multimodal.families.diffusion.inpainting.inpainting(model)."
            )
        one_of("pil", "pt").of("output_type", output_type)
        return self.model, self.model.family

    def _told(
        self,
        model: Any,
        conditions: Sequence[Tensor],
        null: Sequence[Tensor],
        prompt: Any,
        negative: str,
        guidance: float,
    ) -> list[Tensor]:
        if prompt is not None:
            conditions, null = (self._text(prompt),), (self._text(negative),)
        if not conditions or (guidance != 1 and len(null) != len(conditions)):
            raise ConfigError(
                "conditions are missing: hand in what the model is conditioned on (conditions=(text,)), and the same of an empty "
                "prompt for guidance (null=(empty,), or guidance=1); or a prompt, where the pipeline has a text encoder."
            )
        pairs = zip(null, conditions) if guidance != 1 else ((c,) for c in conditions)
        given = [torch.cat(tuple(pair)).to(model.device) for pair in pairs]
        return [g.to(model.dtype) if g.is_floating_point() else g for g in given]

    def _text(self, prompt: str) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError(
                "the pipeline has no text encoder: make it with text_encoder= and tokenizer=, or hand in conditions."
            )
        length = int(self.model.family.config.max_text_seq_length)  # type: ignore[union-attr]
        options: dict[str, Any] = {
            "padding": "max_length",
            "max_length": length,
            "truncation": True,
            "return_tensors": "pt",
        }
        ids = self.tokenizer([prompt], add_special_tokens=True, **options).input_ids
        return self.text_encoder(ids.to(next(self.text_encoder.parameters()).device))[0]

    def _window(
        self,
        clip: Tensor,
        marks: Tensor,
        told: list[Tensor],
        steps: int,
        guidance: float,
        replace: bool,
        masks: str,
        source: Any,
        chain: dict[str, Any],
    ) -> Tensor:
        """One window (F, 3, H, W) and its mask -> (F, 3, H, W) in [-1, 1]."""
        model: Any = self.model
        family, vae, axis = model.family, self.vae, model.family.frames_axis

        def latents_of(frames: Tensor) -> Tensor:
            made = encode(vae, frames[None].to(model.device).transpose(1, 2), False, True)
            return made.transpose(1, 2) if axis == 1 else made

        known = latents_of(clip)
        seen = latents_of(hidden(clip, marks))
        count = known.shape[axis]
        small = latent_mask(marks[None], (count, *known.shape[-2:]), family.frame_ratio, masks).to(model.device)
        small = small if axis == 1 else small.transpose(1, 2)
        image = (latents_of(clip[:1]),) if family.takes_image else ()
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        noise = torch.randn(known.shape, generator=source).to(model.device)
        x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        twice = 1 if guidance == 1 else 2
        given: dict[str, Any] = {
            k: v.to(model.dtype).repeat(twice, 1, 1, 1, 1) for k, v in (("masked", seen), ("mask", small))
        }
        given = {k: v for k, v in given.items() if k in model.wanted}
        if "previous" in model.wanted and "states" in chain:
            given["previous"] = dict(chain)
        for i, step in enumerate(scheduler.timesteps):
            inner = scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else x
            inner = torch.cat([inner] * twice).to(model.dtype)
            last = i + 1 == len(scheduler.timesteps)
            if last and "keep" in model.wanted:
                kept: dict[str, Tensor] = {}
                given["keep"] = kept
                chain |= {"states": kept, "mask": given["mask"]}
            frames = [torch.cat([f] * twice).to(model.dtype) for f in image]
            answer = model(inner, step.expand(twice).to(model.device), *told, *frames, context=given).float()
            answer = answer[:, : x.shape[1]] if answer.shape[1] > x.shape[1] else answer
            if twice == 2:
                nothing, something = answer.chunk(2)
                answer = nothing + guidance * (something - nothing)
            x = scheduler.step(answer, step, x, return_dict=False)[0]
            if replace:
                fresh = known if last else _noised(scheduler, known, noise, scheduler.timesteps[i + 1])
                x = (1 - small) * fresh + small * x
        x = x.transpose(1, 2) if axis == 1 else x
        return decode(vae, x, True)[0].transpose(0, 1)


def windows_so_far(windows: Windows, parts: Sequence[Tensor]) -> Tensor:
    """The video as far as it goes."""
    return Windows(windows.padded, windows.padded, windows.length, windows.starts[: len(parts)]).joined(parts)


def _noised(scheduler: Any, latents: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    steps = step.reshape(1).to(latents.device)
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(latents, noise, steps)
    return scheduler.scale_noise(latents, steps, noise)


def _frames(given: Any, what: str) -> Tensor:
    """Frames as a tensor (F, C, H, W): pictures in [-1, 1], masks of one channel in [0, 1]."""
    if isinstance(given, Tensor):
        if given.ndim != 4:
            raise DataError(f"{what} is {tuple(given.shape)}; expected (frames, channels, height, width).")
        if not given.numel():
            raise DataError(f"{what} is {tuple(given.shape)}; expected some frames.")
        if what != "mask" and given.shape[1] != 3:
            raise DataError(f"{what} is {tuple(given.shape)}; expected frames of 3 channels, red, green and blue.")
        low = 0.0 if what == "mask" else -1.0
        least, most = float(given.min()), float(given.max())
        if not (least >= low - 0.01 and most <= 1.01):
            raise DataError(
                f"{what} holds numbers from {least:g} to {most:g}; expected {low:g} to 1. Bytes are brought there by "
                f"{'x / 255' if what == 'mask' else 'x / 127.5 - 1'}."
            )
        return given.float()
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(f, Image.Image) for f in given):
        raise DataError(f"{what} is {type(given).__name__}; expected a list of PIL images, or a tensor (F, C, H, W).")
    if len({f.size for f in given}) > 1:
        raise DataError(f"the frames of the {what} are of several sizes.")
    if what == "mask":
        return torch.from_numpy(np.stack([np.asarray(f.convert("L")) for f in given]))[:, None].float() / 255
    frames = torch.from_numpy(np.stack([np.asarray(f.convert("RGB")) for f in given]))
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def inpainting(model: Host, vae: Any, scheduler: Any = None, **components: Any) -> InpaintingPipeline:
    """The pipeline around a model and its autoencoder; `scheduler` is the family's unless it is given.

    Raises:
        ConfigError: no transformer of videos, one of patches of several latent frames, or a scheduler that keeps predictions.
    """
    family: Any = model.family
    if family.modality != "diffusion-video" or family.frame_patch != 1:
        raise ConfigError(
            f"'{model.backbone_name}' cannot fill in videos in windows: expected a transformer of videos with one latent frame "
            "in a patch."
        )
    scheduler = family.scheduler() if scheduler is None else scheduler
    if "old_pred_original_sample" in inspect.signature(scheduler.step).parameters:
        raise ConfigError(
            f"{type(scheduler).__name__} takes the predictions of earlier steps; use CogVideoXDDIMScheduler."
        )
    pipe = InpaintingPipeline(model.backbone, vae, scheduler, **components)
    pipe.model = model
    return pipe
