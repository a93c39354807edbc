"""Texts for CLIP: open_clip's tokenizers, and a check that nothing is cut off silently."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.library import library


@lru_cache(maxsize=8)
def tokenizer(name: str, context: int, vocab: int) -> Any:
    """The tokenizer of `open_clip:<name>`, or of our own `zoo:clip-micro`.

    Raises:
        ConfigError: its files cannot be had.
    """
    if name.startswith("zoo:"):
        from multimodal.families.clip.micro import ShortTokenizer

        return ShortTokenizer(vocab, context)
    open_clip = library("open_clip", "multimodal")
    try:
        return open_clip.get_tokenizer(name, context_length=context)
    except Exception as error:  # the Hub's client has a class of its own for each way of failing
        raise ConfigError(
            f"The tokenizer of '{name}' could not be loaded: {type(error).__name__}: {str(error).splitlines()[0][:200]}. Check "
            "the network, or hand in token ids instead of texts."
        ) from error


def tokenize(tokenizer: Any, texts: str | Sequence[str], context: int, truncate: bool = False) -> Tensor:
    """Texts -> token ids (n, context).

    Raises:
        DataError: a text that is longer than the context (unless `truncate`), empty, or no text.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {number} is {type(text).__name__}; expected str.")
        if not text.strip():
            raise DataError(f"text {number} is empty. Leave it out, or write what is to be seen.")
        length = 0 if truncate else _length(tokenizer, text)
        if length > context:
            shown = text if len(text) <= 80 else text[:77] + "..."
            raise DataError(
                f"text {number} has {length} tokens, the model takes {context} (start and end included): '{shown}'. Shorten it, "
                "or pass truncate=True to cut it off."
            )
    if not texts:
        raise DataError("there are no texts; expected at least one.")
    ids: Tensor = tokenizer(texts, context_length=context)
    return ids


def _length(tokenizer: Any, text: str) -> int:
    """Tokens of a text, with the special ones, before anything is cut off."""
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(text)) + 2
    inner = tokenizer.tokenizer
    clean = tokenizer.clean_fn(text)
    if getattr(tokenizer, "tokenizer_mode", ""):  # start, end and class token are put on by open_clip
        return len(inner(clean, add_special_tokens=False).input_ids) + 3
    return len(inner(clean).input_ids)


def spell(tokenizer: Any, text: str) -> Tensor:
    """Token ids (T,) of a text without start, end and padding."""
    if hasattr(tokenizer, "encode"):
        found = tokenizer.encode(text)
    else:
        found = tokenizer.tokenizer(tokenizer.clean_fn(text), add_special_tokens=False).input_ids
    return torch.tensor(found, dtype=torch.long)
