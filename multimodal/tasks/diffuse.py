"""Training of diffusion transformers: predict the noise (or velocity, or flow) that the checkpoint's own scheduler adds.

    loss = mean |f(x_t, t, c) - target|^2                    x_t and target: `multimodal.tasks.noise`

Items of the data are (pixels, condition): an image in [-1, 1] with its class label, or a clip (F, 3, H, W) with the embeddings
(L, d_text) of its text. With an autoencoder (`vae`) the loss is that of its latents; without one, of the data itself: pixels for
a model of three channels, or latents that were made before. Where a model has several conditions, an item is ((pixels, text,
pooled), anything).

While training, a share `drop` of the conditions is left out (the label "no class", or the embeddings `null`), so that the model
can be sampled with guidance. In evaluation nothing is left out, the noise is always the same, and time steps are evenly spread,
so that losses of two evaluations can be compared.

Deviations: a predicted variance (DiT-XL/2 has four channels of it) is not trained; the library's pipelines do not use it either.
In full fine-tuning the library's embedding would drop labels by itself, in each block another one; that is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from multimodal.tasks.latents import encode
from multimodal.tasks.noise import WEIGHTINGS, Schedule, dynamic_shift, schedule_of, unshifted
from zoo.errors import ConfigError, DataError
from zoo.registry import register_task
from zoo.tasks.base import Task

if TYPE_CHECKING:
    from multimodal.metrics.frechet import Moments
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["Denoising", "Diffuse", "FeatureDistance"]


class Denoising(NamedTuple):
    """What the loss hands to metrics and adapters."""

    prediction: Tensor  # what the model answered
    target: Tensor  # what it should have
    pixels: Tensor  # as they came from the data


@register_task("diffuse")
class Diffuse(Task):
    """Denoising.

    Args:
        scheduler: one of diffusers; by default that with the noise of the family's checkpoints.
        vae: an autoencoder of diffusers, which stays frozen; None if the data are what the model works on.
        drop: share of the conditions that are left out in training; by default 0.1 for classes, and for text if `null` is given.
        null: text embeddings (L, d) of the empty prompt.
        weighting: how time steps are drawn: "uniform", "logit-normal" (SD3; with `logit_mean`, `logit_std`), "mode" (SD3), or
            "log-normal" (EDM). A schedule that is shifted is drawn from as it is shifted.
        shift: of a flow's noise: a number in place of the scheduler's own shift; "dynamic": as the scheduler has it for
            images of this size (`use_dynamic_shifting`, Flux and others). By default the scheduler's own; none for a dynamic
            one.
        distance: an image model (or its name) by whose features generated images are compared with real ones in `zoo.evaluate`;
            None leaves that out, as it takes `samples` images of `steps` steps.
        samples: at most so many images, with the labels of the first ones of the data.
        steps, guidance: how they are sampled (`multimodal.tasks.sampling`).
        seed: of the noise in evaluation and sampling.
    """

    monitor = "loss"

    def __init__(
        self,
        scheduler: Any = None,
        vae: Any = None,
        *,
        drop: float | None = None,
        null: Tensor | None = None,
        weighting: str = "uniform",
        shift: float | str | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        distance: Host | str | None = None,
        samples: int = 500,
        steps: int = 50,
        guidance: float = 1.0,
        seed: int = 0,
    ) -> None:
        if drop is not None and not 0 <= drop < 1:
            raise ConfigError(f"drop is {drop}; expected 0 <= drop < 1.")
        if weighting not in WEIGHTINGS:
            raise ConfigError(f"weighting is {weighting!r}; expected one of {', '.join(WEIGHTINGS)}.")
        if not (logit_std > 0 and math.isfinite(logit_mean) and math.isfinite(logit_std)):
            raise ConfigError(
                f"logit_mean is {logit_mean} and logit_std {logit_std}; expected numbers, the second above 0."
            )
        number = isinstance(shift, (int, float)) and not isinstance(shift, bool) and 0 < shift < math.inf
        if shift is not None and shift != "dynamic" and not number:
            raise ConfigError(f'shift is {shift!r}; expected a number above 0, "dynamic", or None.')
        self.shift, self.logit_mean, self.logit_std = shift, logit_mean, logit_std
        self.scheduler, self.vae, self.drop, self.null, self.weighting = scheduler, vae, drop, null, weighting
        self.distance, self.samples, self.steps, self.guidance, self.seed = distance, samples, steps, guidance, seed
        self._schedule: tuple[str, Schedule] | None = None
        if vae is not None:
            vae.eval().requires_grad_(False)

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model denoises, and its classes are enough for the labels."""
        if not hasattr(model.family, "scheduler"):
            raise ConfigError(
                f"'{model.backbone_name}' is no diffusion model: this task is for transformers and UNets of diffusers."
            )
        labels, classes = dataset.labels, getattr(model.family, "num_classes", None)
        if (
            classes is not None
            and labels is not None
            and len(labels)
            and not 0 <= labels.min() <= labels.max() < classes
        ):
            wrong = int(((labels < 0) | (labels >= classes)).argmax())
            raise DataError(f"{dataset.where(wrong)}: {_outside(int(labels[wrong]), classes)}")

    def check_batch(self, model: Host, dataset: ImageDataset, targets: Any) -> None:
        """Raise DataError for labels that the model has no embedding of."""
        from zoo.tasks.classify import class_range

        classes = getattr(model.family, "num_classes", None)
        found = class_range(targets) if classes is not None and isinstance(targets, Tensor) else None
        if found is not None and not 0 <= found[0] <= found[1] < classes:  # type: ignore[operator]
            wrong = found[0] if found[0] < 0 else found[1]
            raise DataError(f"{dataset.name}: {_outside(wrong, classes)}")  # type: ignore[arg-type]

    # -- the loss ---------------------------------------------------------------------------------------------------

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Denoising]:
        """Mean squared error of the prediction, in float32; see the module."""
        arguments, target = self._noisy(model, inputs, targets)
        for module in model.backbone.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.training = False
        prediction = model(*arguments)
        channels = target.shape[1]
        if prediction.shape[1] > channels:  # without those of a variance
            prediction = prediction[:, :channels]
        loss = (prediction.float() - target).square().mean()
        return loss, Denoising(prediction, target, inputs[0] if isinstance(inputs, (tuple, list)) else inputs)

    def example(self, model: Host, inputs: Any, targets: Any) -> Any:
        """What the model is called with for a batch."""
        return self._noisy(model, inputs, targets)[0]

    def _noisy(self, model: Host, inputs: Any, targets: Any) -> tuple[tuple[Any, ...], Tensor]:
        data, *conditions = inputs if isinstance(inputs, (tuple, list)) else (inputs, targets)
        latents, image = self.encode(model, data)
        schedule, training = self._shifted(model, latents), model.training
        options: dict[str, Any] = {"even": not training, "mean": self.logit_mean, "std": self.logit_std}
        index = schedule.times(len(latents), self.weighting, **options).to(latents.device)
        if training:
            noise = torch.randn_like(latents)
            conditions = self._dropped(model, conditions)
        else:
            source = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(latents.shape, generator=source).to(latents)
        noisy, target = schedule.add(latents, noise, index.cpu())
        steps = schedule.steps[index.cpu()].to(latents.device)
        further = [c.to(model.dtype) if isinstance(c, Tensor) and c.is_floating_point() else c for c in conditions]
        if image is not None:
            further.append(image.to(model.dtype))
        return (noisy.to(model.dtype), steps, *further), target.float()

    def schedule(self, model: Host) -> Schedule:
        """The noise of the scheduler, or of the family's own."""
        name = model.backbone_name
        if self._schedule is None or self._schedule[0] != name:
            family: Any = model.family
            self._schedule = name, schedule_of(self.scheduler if self.scheduler is not None else family.scheduler())
        return self._schedule[1]

    def _shifted(self, model: Host, latents: Tensor) -> Schedule:
        if self.shift is None:
            return self.schedule(model)
        family: Any = model.family
        scheduler = self.scheduler if self.scheduler is not None else family.scheduler()
        schedule = unshifted(scheduler)
        if self.shift != "dynamic":
            return schedule.shifted(float(self.shift))
        frame_patch, patch = getattr(family, "patches", (1, getattr(family, "patch", None) or 1))
        tokens = latents.shape[-1] * latents.shape[-2] // patch**2
        if latents.ndim == 5:
            tokens = tokens * latents.shape[family.frames_axis] // frame_patch
        return schedule.shifted(dynamic_shift(scheduler, tokens))

    @torch.no_grad()
    def encode(self, model: Host, data: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels or latents -> latents in float32, and those of the first frame for an image-to-video model.

        Latents come in the order that the model takes them in.

        Raises:
            ConfigError: pixels for a model of latents, without an autoencoder. DataError: a clip of a length that does not fit.
        """
        family: Any = model.family
        video, takes_image = family.modality == "diffusion-video", getattr(family, "takes_image", False)
        axis = family.frames_axis
        if video:
            family.check_clip(data, self.vae is not None)
        image = None
        if self.vae is None:
            channels = data.shape[2 if video and axis == 1 else 1]
            if channels == 3 != family.latent_channels:
                raise ConfigError(
                    f"The data have 3 channels, and '{model.backbone_name}' works on latents of {family.latent_channels}. Pass "
                    "the autoencoder that makes these: task=Diffuse(vae=AutoencoderKL.from_pretrained(...))."
                )
            latents = data.float()
            if takes_image:
                image = latents[:, :1]
        else:
            latents = self._latents(data, model.training, axis)
            if takes_image:
                image = self._latents(data[:, :1], False, axis)
                if getattr(self.vae.config, "invert_scale_latents", False):
                    image = image / float(self.vae.config.scaling_factor) ** 2
        if video and (short := -latents.shape[axis] % family.frame_patch):
            first = latents.narrow(axis, 0, 1)
            latents = torch.cat([first] * short + [latents], dim=axis)
        return latents, image

    def _latents(self, pixels: Tensor, training: bool, axis: int) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w), or (B, F, 3, H, W) -> (B, f, C, h, w), or (B, C, f, h, w) if frames stand at axis 2."""
        video = pixels.ndim == 5
        latents = encode(self.vae, pixels.transpose(1, 2) if video else pixels, training, video)
        return latents.transpose(1, 2) if video and axis == 1 else latents

    def _dropped(self, model: Host, conditions: list[Any]) -> list[Any]:
        """The conditions, some of them replaced by none."""
        classes = getattr(model.family, "num_classes", None)
        drop = self.drop if self.drop is not None else 0.1 if classes is not None or self.null is not None else 0.0
        if not drop:
            return conditions
        first = conditions[0]
        rows = torch.rand(len(first), device=first.device) < drop
        if classes is not None:
            return [first.masked_fill(rows, classes), *conditions[1:]]
        if self.null is None:
            raise ConfigError(
                "drop leaves out text, and there is nothing to put in its place: pass null=, the embeddings of ''."
            )
        return [torch.where(rows[:, None, None], self.null.to(first), first), *conditions[1:]]

    # -- numbers ----------------------------------------------------------------------------------------------------

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """The distance between features of generated and of real images, if it is asked for."""
        return {} if self.distance is None else {"feature distance": FeatureDistance(model, self)}


class FeatureDistance:
    """Frechet distance between real images and as many generated ones with their labels (`multimodal.metrics.frechet`)."""

    def __init__(self, model: Host, task: Diffuse) -> None:
        import zoo

        self.model, self.task = model, task
        distance = task.distance
        self.by: Host = zoo.load(distance, num_classes=0) if isinstance(distance, str) else distance  # type: ignore[assignment]
        if getattr(model.family, "num_classes", None) is None:
            raise ConfigError(
                "The feature distance needs images sampled by class; sample a text-conditioned model by its pipeline, and "
                "compare with multimodal.metrics.frechet.feature_distance."
            )
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        from multimodal.metrics.frechet import Moments

        self.real: Moments = Moments()
        self.labels: list[int] = []

    def update(self, outputs: Denoising, targets: Tensor) -> None:
        """Real images, until there are enough."""
        from multimodal.metrics.frechet import image_features

        room = self.task.samples - len(self.labels)
        if room > 0:
            self.by.to(outputs.pixels.device).eval()
            self.real.update(image_features(self.by, outputs.pixels[:room].float() / 2 + 0.5))
            self.labels += targets[:room].tolist()

    def compute(self) -> float:
        """Generates the images, and compares."""
        from multimodal.metrics.frechet import Moments, frechet_distance, image_features
        from multimodal.tasks.sampling import generate

        task, generated = self.task, Moments()
        options: dict[str, Any] = {"steps": task.steps, "guidance": task.guidance, "seed": task.seed}
        images = generate(self.model, self.labels, scheduler=task.scheduler, vae=task.vae, **options)
        for part in images.split(64):
            generated.update(image_features(self.by, part))
        return frechet_distance(self.real, generated)


def _outside(label: int, classes: int) -> str:
    return (
        f"class label {label} is outside the model's {classes} classes (0..{classes - 1}). Mend the labels, or build the model "
        f"with num_embeds_ada_norm={max(label + 1, classes)}."
    )
