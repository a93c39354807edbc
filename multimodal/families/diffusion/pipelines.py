"""Sampling through the pipelines of diffusers, with the adapters of a model active.

A model's adapters live in hooks on the library's own transformer, so a pipeline that is given `model.backbone` runs them, and
follows when they are switched (`model.set_active`, `model.disable`). What a pipeline cannot do is to move them: move the model
(`model.to(device, dtype)`) before the pipeline is made, and offload only a merged transformer.

    pipe = pipeline(model)                                        # the rest from the checkpoint's repository
    pipe = pipeline(model, vae=vae, scheduler=scheduler)          # or from you
    frames = pipe(prompt="a cat", guidance_scale=6).frames[0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.library import library, only_tensors, reaching

if TYPE_CHECKING:
    from zoo.host import Host


def pipeline(
    model: Host, source: str | None = None, *, kind: Any = None, merged: bool = False, **components: Any
) -> Any:
    """A pipeline of diffusers around the model's transformer.

    Args:
        model: of a family of diffusers.
        source: repository or folder of a pipeline, from which what is not in `components` is loaded; by default the
            repository of the model's own weights, if there are no components.
        kind: the pipeline's class, or its name; by default the family's (image-to-video for a model that takes an image).
        merged: put in a plain transformer with the active adapters folded in, of which the pipeline may do as it likes.
        components: the pipeline's other parts, such as vae, scheduler, text_encoder, tokenizer. The scheduler is the
            family's unless it is given.

    Raises:
        ConfigError: another family, or no source for the other parts. MergeError: with `merged`, a method that cannot be merged.
    """
    family: Any = model.family
    kind = kind or getattr(family, "pipeline_class", "")
    if not kind:
        raise ConfigError(f"'{model.backbone_name}' is no diffusion model of a family with a pipeline of diffusers.")
    made = getattr(library("diffusers", "multimodal"), kind) if isinstance(kind, str) else kind
    if family.family == "dit" and family.num_classes != 1000 and made.__name__ == "DiTPipeline":
        raise ConfigError(
            f"DiTPipeline takes the label 1000 for \"no class\", and '{model.backbone_name}' has {family.num_classes} classes. "
            "Sample it by multimodal.tasks.sampling.generate(model, labels, guidance=...)."
        )
    part: nn.Module = model.merge() if merged else model.backbone
    if source is None and not components:
        source = family.hub_id()
        if source is None:
            raise ConfigError(
                f"The other parts of {made.__name__} are needed: name a repository or folder (pipeline(model, source)), or hand "
                "them in (vae=..., scheduler=...)."
            )
    if source is not None:
        if model.dtype != torch.float32:
            components.setdefault("torch_dtype", model.dtype)
        with only_tensors(), reaching():
            return made.from_pretrained(source, **{family.part: part, **components})
    components.setdefault("scheduler", family.scheduler())
    try:
        return made(**{family.part: part, **components})
    except TypeError as error:
        raise ConfigError(f"{made.__name__} cannot be made of these parts: {error}") from error
