"""What the task "generate" writes: texts of words, with an adapter for each sample if need be, and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.metrics.answers import exact_match, vqa_accuracy
from multimodal.metrics.cider import cider

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["Scores", "Written", "decode", "written_by"]


class Written(NamedTuple):
    """What the task measures: scores (B, T, V), and in evaluation what was written, with the references of each."""

    logits: Tensor
    texts: list[str]
    references: list[tuple[str, ...]]
    captions: bool


def written_by(
    model: Host,
    write: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    adapters: Sequence[str | None] | None,
    pad: int,
) -> Tensor:
    """Words (B, T) that `write(*inputs)` gives with the active adapters, or with the adapter of each sample.

    `pad` stands behind texts that ended sooner, where they are written in several parts.
    """
    if adapters is None:
        return model.passing(lambda: write(*inputs), *inputs)  # type: ignore[no-any-return]
    parts = model.passing_routed(write, adapters, *inputs)
    longest = max(words.shape[1] for _, words in parts)
    words = torch.cat([F.pad(words, (0, longest - words.shape[1]), value=pad) for _, words in parts])
    return words.index_select(0, torch.cat([rows for rows, _ in parts]).argsort())


def decode(family: Any, ids: Tensor) -> list[str]:
    """Texts of generated tokens (B, T), without the words that only mark start and end; visual words stay."""
    tokenizer, start = family.tokenizer, getattr(family.config, "decoder_start_token_id", None)
    marks = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, start}
    return [tokenizer.decode([i for i in row if i not in marks]).strip() for row in ids.tolist()]


class Scores:
    """Numbers over everything that was written since `reset`; on several processes over what all of them wrote."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.seen: list[tuple[str, tuple[str, ...], bool]] = []

    def update(self, outputs: Written, targets: Tensor) -> None:
        """Add a batch."""
        self.seen += [(t, r, outputs.captions) for t, r in zip(outputs.texts, outputs.references, strict=True)]

    def compute(self) -> dict[str, float]:
        """The numbers that fit the data, and "score", the one that counts."""
        seen = self.seen
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, seen)
            seen = [item for part in gathered for item in part]
        answers, captions = [s for s in seen if not s[2]], [s for s in seen if s[2]]
        found: dict[str, float] = {}
        if answers:
            found["exact_match"] = sum(exact_match(t, r) for t, r, _ in answers) / len(answers)
            if any(len(r) > 1 for _, r, _ in answers):
                found["vqa_accuracy"] = sum(vqa_accuracy(t, r) for t, r, _ in answers) / len(answers)
        if captions:
            found["cider"] = cider([t for t, _, _ in captions], [r for _, r, _ in captions])
        return {**found, "score": list(found.values())[-1] if found else 0.0}
