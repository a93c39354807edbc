"""To find a word for what is in a few images: prompts with the word, a pipeline's own text encoder, a frozen denoiser.

    loss = mean |f(x_t, t, T(p)) - target|^2          p: a template with the word; x_t, target: `multimodal.tasks.diffuse`

The model that is trained is the text encoder (`multimodal.adapters.textual_inversion`); the denoiser is another model, whose
parameters stay. Prompts are drawn for each item while training, and taken in turn in evaluation, so that evaluations agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multimodal.tasks.diffuse import Denoising, Diffuse
from zoo.errors import ConfigError, MismatchError
from zoo.tasks.base import Task

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["TEMPLATES", "Invert"]

TEMPLATES = (
    "a photo of a {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a photo of one {}",
    "a picture of my {}",
)
# Which of what `encode_prompt` gives a denoiser takes, in its order
TAKEN = {
    "StableDiffusionPipeline": (0,),
    "CogVideoXPipeline": (0,),
    "PixArtAlphaPipeline": (0, 1),
    "PixArtSigmaPipeline": (0, 1),
    "StableDiffusion3Pipeline": (0, 2),
    "FluxPipeline": (0, 1),
}


class Invert(Task):
    """Denoising of images by prompts with a new word.

    Args:
        denoiser: a diffusion model of zoo. pipe: a pipeline around it, whose text encoder is the model that is trained.
        word: as `TextualInversion.text` writes it. templates: with `{}` for the word.
        encode: prompts -> further inputs of the denoiser; by default the pipeline's `encode_prompt`.
        options: of `multimodal.tasks.diffuse.Diffuse`, such as vae=; by default the pipeline's own autoencoder and scheduler.
    """

    name, monitor = "invert", "loss"

    def __init__(
        self,
        denoiser: Host,
        pipe: Any,
        word: str,
        templates: Sequence[str] = TEMPLATES,
        encode: Callable[[list[str]], Sequence[Any]] | None = None,
        **options: Any,
    ) -> None:
        wrong = [t for t in templates if "{}" not in t]
        if wrong or not templates:
            raise ConfigError(f"the template '{wrong[0] if wrong else ''}' has no place {{}} for the word.")
        kind = type(pipe).__name__
        if encode is None and kind not in TAKEN:
            raise ConfigError(f"What a {kind} makes of prompts is not described here: pass encode=, prompts -> inputs.")
        self.denoiser, self.pipe, self.word, self.templates, self.encode = (
            denoiser,
            pipe,
            word,
            tuple(templates),
            encode,
        )
        settings: dict[str, Any] = {
            "drop": 0.0,
            "vae": getattr(pipe, "vae", None),
            "scheduler": getattr(pipe, "scheduler", None),
        }
        self.inner = Diffuse(**(settings | options))

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model is the pipeline's text encoder, and its tokenizer knows the word."""
        vocabulary = self._tokenizer(model).get_vocab()
        unknown = [w for w in self.word.split() if w not in vocabulary]
        if unknown:
            raise ConfigError(
                f"The tokenizer has no token '{unknown[0]}': make the word by "
                "multimodal.adapters.textual_inversion.new_word, or teach it a saved one."
            )

    def _tokenizer(self, model: Host) -> Any:
        for number in ("", "_2", "_3"):
            if getattr(self.pipe, f"text_encoder{number}", None) is model.backbone:
                return getattr(self.pipe, f"tokenizer{number}")
        raise MismatchError("The model is no text encoder of this pipeline: pass zoo.wrap(pipe.text_encoder, ...).")

    def example(self, model: Host, inputs: Any, targets: Any) -> Tensor:
        """Token ids (B, L) of the prompts of a batch."""
        pixels = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
        words = self._tokenizer(model)(self.prompts(len(pixels), False), padding=True, return_tensors="pt")
        return words.input_ids.to(model.device)  # type: ignore[no-any-return]

    def prompts(self, count: int, training: bool) -> list[str]:
        """One for each of so many items."""
        places = torch.randint(len(self.templates), (count,)).tolist() if training else range(count)
        return [self.templates[i % len(self.templates)].replace("{}", self.word) for i in places]

    def conditions(self, model: Host, prompts: list[str]) -> list[Any]:
        """What the denoiser takes besides latents and time, with a graph to the text encoder."""
        if self.encode is not None:
            return list(model.passing(lambda: self.encode(prompts)))  # type: ignore[misc]
        takes = inspect.signature(self.pipe.encode_prompt).parameters
        asked = {
            "device": model.device,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": False,
            **({"prompt_2": None} if "prompt_2" in takes else {}),
            **({"prompt_3": None} if "prompt_3" in takes else {}),
        }
        given = {k: v for k, v in asked.items() if k in takes}
        found = model.passing(lambda: self.pipe.encode_prompt(prompts, **given))
        return [found[i] for i in TAKEN[type(self.pipe).__name__]]

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Denoising]:
        """As `Diffuse.loss` of the denoiser."""
        pixels = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
        denoiser: Any = self.denoiser
        denoiser.to(model.device)
        denoiser.train(model.training)
        flags = [(p, p.requires_grad) for p in denoiser.parameters()]
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        try:
            conditions = self.conditions(model, self.prompts(len(pixels), model.training))
            return self.inner.loss(denoiser, (pixels, *conditions), None)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
