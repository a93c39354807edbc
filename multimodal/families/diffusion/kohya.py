"""LoRA files that others wrote for transformers of diffusers: kohya's scripts and trainers with the original networks' names.

kohya's files (sd-scripts, musubi-tuner and others) have three tensors for a module, whose path stands there with "_" for ".":

    lora_unet_<path>.lora_down.weight (r, in)        lora_unet_<path>.lora_up.weight (out, r)        lora_unet_<path>.alpha

The change of the weight is alpha / r * up down. Text encoders stand under `lora_te_`, `lora_te1_`, `lora_te2_`. Paths are those
of the library's transformer, or those of the network's authors; for these, the library has a converter in the pipeline that the
transformer belongs to, which is asked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import MismatchError, WeightsError

if TYPE_CHECKING:
    from zoo.model import Model

_PREFIXES = ("lora_unet_", "lora_transformer_")
_KINDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
_OTHER = re.compile(r"^(text_encoder(?:_\d)?)\.|^lora_(te\d?)_|^(image_encoder)\.")
_NAMES = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}


def other_part(key: str) -> str:
    """The part of a pipeline besides the transformer that a key is for; "" if it is for none."""
    found = _OTHER.match(key)
    if found is None:
        return ""
    name = next(group for group in found.groups() if group)
    return _NAMES.get(name, name)


def is_foreign(tensors: dict[str, Tensor]) -> bool:
    """Whether a file has names of kohya's scripts, or of a network's authors, rather than those of diffusers."""
    return any(
        k.endswith((".lora_down.weight", ".lora_up.weight")) or k.startswith("diffusion_model.") for k in tensors
    )


def to_diffusers(model: Model, tensors: dict[str, Tensor], path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under diffusers' names, `<prefix>.<module>.lora_A.weight`.

    Raises:
        WeightsError: halves of a pair, or names of another kind. MismatchError: modules that this transformer does not have.
    """
    flat = {name.replace(".", "_"): name for name, _ in model.backbone.named_modules() if name}
    found: dict[str, Tensor] = {}
    strange: list[str] = []
    for key, value in tensors.items():
        ending = next((e for e in _KINDS if key.endswith(f".{e}")), None)
        start = next((p for p in _PREFIXES if key.startswith(p)), None)
        module = None if ending is None or start is None else flat.get(key[len(start) : -len(ending) - 1])
        if module is None:
            strange.append(key)
        else:
            found[f"{prefix}.{module}.{_KINDS[ending]}"] = value  # type: ignore[index]
    if not strange:
        return found
    if len(strange) < len(tensors):
        raise MismatchError(
            f"'{path.name}' adapts modules that {model.backbone_name} does not have, such as '{strange[0]}' ({len(strange)} of "
            f"{len(tensors)} tensors). Load it on the transformer that it was trained on."
        )
    return _by_the_library(model, tensors, path)


def _by_the_library(model: Model, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    import diffusers

    family: Any = model.family
    pipeline = getattr(diffusers, str(getattr(family, "pipeline_class", "")), None)
    reader = getattr(pipeline, "lora_state_dict", None)
    what = f"'{path.name}' has names such as '{next(iter(tensors))}', which are those of no module of {model.backbone_name}"
    if reader is None:
        raise WeightsError(f"{what}, and diffusers has no reader of LoRA files for it. Write it with diffusers' names.")
    try:
        found = reader({key: value.clone() for key, value in tensors.items()})
    except Exception as error:  # its converters stop at whatever they did not expect
        raise WeightsError(
            f"{what}, and the reader of diffusers' {pipeline.__name__} does not take them: {type(error).__name__}: "  # type: ignore[union-attr]
            f"{str(error)[:200]}. Check that the file is for this network."
        ) from error
    state = found[0] if isinstance(found, tuple) else found
    if not state or is_foreign(state):
        raise WeightsError(f"{what}, and diffusers does not know them either. Check that the file is for this network.")
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}
