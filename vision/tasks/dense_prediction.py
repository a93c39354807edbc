"""What a trained model says of every pixel of images, at the size of these.

found = predict_maps(model, ["a.jpg", "b.jpg"], "segment")
Image.fromarray(found[0].astype("uint8")).save("a.png")
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vision.data.dense_transform import DenseTransform
from vision.data.masks import KINDS
from vision.tasks.dense import at_size
from zoo import registry
from zoo.data.folders import read_file
from zoo.data.images import decode, size_of
from zoo.errors import ConfigError, DataError, nearest
from zoo.heads import Head

__all__ = ["predict_maps"]


@torch.no_grad()
def predict_maps(model: Any, images: Iterable[Any], kind: str = "segment") -> list[np.ndarray]:
    """One map for each image, at its own size.

    Args:
        model: with a head of maps. images: files, or PIL images; each is seen whole, resized to the backbone's size.
        kind: "segment" gives class indices (H, W) int64; "edges" probabilities, "depth" numbers (H, W) float32; "normals"
            directions of length 1, (H, W, 3) float32.

    Raises:
        ConfigError: no such kind, a model without such a head, or one for another kind. DataError: an image that cannot be read.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}. {nearest(str(kind), KINDS)}")
    if not isinstance(model.head, Head) or "maps" not in model.head.needs:
        raise ConfigError("The model's head says nothing of single pixels; load one with head='dense', and train it.")
    _check_kind(model, kind)
    if isinstance(images, (str, Path, Image.Image)):
        raise ConfigError(f"images is a {type(images).__name__}; expected a list of files or of PIL images.")
    transform, found, mode = DenseTransform(model.family.data_config(), kind, False), [], model.training
    model.eval()
    try:
        for number, one in enumerate(images):
            image = decode(read_file(one), str(one)) if isinstance(one, (str, Path)) else one
            if not isinstance(image, Image.Image):
                raise DataError(f"image {number} is a {type(image).__name__}; expected a file or a PIL image.")
            size = size_of(image)
            pixels, _ = transform(image, torch.zeros(size))
            logits = at_size(model(pixels[None].to(model.device, model.dtype)).float(), size)[0].cpu()
            found.append(_answer(logits, kind).numpy())
    finally:
        model.train(mode)
    return found


def _check_kind(model: Any, kind: str) -> None:
    """Raise ConfigError if the outputs are those of another kind."""
    task: Any = registry.task(kind)
    wanted, trained, outputs = task.outputs, model.record.get("trained_for"), model.num_classes
    if trained in KINDS and trained != kind:
        raise ConfigError(f"The model was trained for '{trained}', and maps of the kind '{kind}' are asked for.")
    if wanted is not None and outputs != wanted:
        raise ConfigError(f"'{kind}' has {wanted} values for each pixel, the model's head {outputs} outputs.")
    if wanted is None and outputs < 2:
        raise ConfigError(f"'{kind}' is one of several classes for each pixel, and the model's head has one output.")


def _answer(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """Of outputs (K, H, W)."""
    if kind == "segment":
        return logits.argmax(0)
    if kind == "normals":
        return F.normalize(logits, dim=0).permute(1, 2, 0)
    return logits[0].sigmoid() if kind == "edges" else logits[0]
