"""Words as numbers: what a language model can read, and at which places they stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError

ASKED = " multimodal.tasks.generate.Generate().answer(model, images, questions) asks and answers in words."

__all__ = ["NONE", "SPARE", "check_words", "places", "untold"]

NONE = -100  # where an answer has no word
# What a processor may make that not every network asks for
SPARE = frozenset({"token_type_ids", "mm_token_type_ids", "image_sizes", "second_per_grid_ts", "rows", "cols"})


def untold(x: Tensor) -> bool:
    """Whether the numbers of a tensor cannot be looked at: it is traced, or has none."""
    return torch.compiler.is_compiling() or x.device.type == "meta"


def places(mask: Tensor | None) -> Tensor | None:
    """Places of the words of a mask (B, L), counted without padding; 0 where that is."""
    return None if mask is None else (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def check_words(name: str, ids: Any, mask: Any, answer: Any, more: str = ASKED) -> None:
    """Raise DataError unless text, mask and answer are whole numbers (B, L), (B, L) and (B, T)."""
    for what, given in (("input_ids", ids), ("answer", answer)):
        if what == "answer" and given is None:
            continue
        whole = isinstance(given, Tensor) and not (given.is_floating_point() or given.is_complex())
        if not whole or given.dim() != 2 or given.dtype == torch.bool or len(given) != len(ids):
            told = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise DataError(
                f"{what} is {told}; '{name}' takes the numbers of words, (B, L): its tokenizer makes them of "
                f"texts (padding=True, return_tensors='pt').{more}"
            )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        told = str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        raise DataError(
            f"attention_mask is {told}; expected {tuple(ids.shape)}, as input_ids: 1 for words, 0 for padding."
        )
