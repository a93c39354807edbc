"""Textual inversion: a new word of a text encoder, whose embedding is learned from a few images of what it means.

Idea: nothing of a text-to-image model is changed; its text encoder gets words that it did not have, and their embeddings alone
are trained by the denoising loss of prompts that hold them.
Points: the word embedding of a text encoder (`condition`, role "words", verb `replace`).

    e(id) = v_j  for id = first + j, j < n;  the frozen row of the table otherwise          v (n, d)

v starts as a copy of the embedding of a word that comes near (`start`; one token). Texts without the new words are read as
before, to the bit. The loss is `multimodal.tasks.invert`: prompts such as "a photo of a <toy>" pass the pipeline's own encoder.

    text = zoo.wrap(pipe.text_encoder, example=(ids,))
    new_word(text, pipe.tokenizer, "<toy>", start="toy")
    zoo.fit(text, images, task=Invert(model, pipe, "<toy>"))
    pipe("a <toy> on a beach")                              the pipeline runs the word, as long as `text` lives

Defaults: one vector, AdamW at 5e-3 (the authors: 5e-3 times the batch; diffusers' example: 1e-4 times the batch, 5,000 steps).
Counts: n d; SD-1.x: 768 a vector.
Source: Gal et al., "An Image is Worth One Word", ICLR 2023; huggingface/diffusers, examples/textual_inversion.

Deviations: the example enlarges the table, trains all of it, and restores the other rows behind each step; here only the new rows
exist as parameters, so weight decay and momentum reach nothing else. A word of several vectors is written out as several tokens
(`<toy> <toy>_1 ...`), as the library's pipelines do by themselves (`maybe_convert_prompt`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.errors import AttachError, ConfigError, MismatchError
from zoo.points import Points
from zoo.registry import adapter, register_adapter

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["TextualInversion", "new_word", "teach"]


class Words(nn.Module):
    """In place of a table of embeddings: ids from `first` on have vectors (n, d) of their own."""

    def __init__(self, first: int, vectors: Tensor) -> None:
        super().__init__()
        self.first = first
        self.vectors = nn.Parameter(vectors)

    def forward(self, embed: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """ids (...) -> (..., d); the table is asked for token 0 where the word is ours, which it may not have."""
        at = ids - self.first
        mine = (at >= 0) & (at < len(self.vectors))
        found: Tensor = embed(ids.masked_fill(mine, 0), *args, **kwargs)
        own = self.vectors[at.clamp(0, len(self.vectors) - 1)].to(found.dtype)
        return torch.where(mine.unsqueeze(-1), own, found)


@register_adapter("textual-inversion")
@dataclass
class TextualInversion(Adapter):
    """A new word; `new_word` makes one, since a tokenizer has to know it.

    Args:
        word: as it stands in prompts.
        start: a word whose embedding it starts as; "" is the mean of all.
        num_vectors: n.
    """

    word: str = "<concept>"
    start: str = ""
    num_vectors: int = 1

    default_lr = 5e-3
    default_weight_decay = 0.0
    paper = "Gal et al. 2023"
    taxonomy = "additive"
    merges = False
    trial_families = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_vectors >= 1, f"num_vectors is {self.num_vectors}; expected 1 or more.")
        fits = self.word != "" and len(self.word) <= 100 and not any(c.isspace() for c in self.word)
        self.check(fits, f"the word is '{self.word:.100}'; expected one without spaces.")

    @property
    def tokens(self) -> list[str]:
        """The tokens that the word consists of."""
        return [self.word] + [f"{self.word}_{j}" for j in range(1, self.num_vectors)]

    @property
    def text(self) -> str:
        """How the word is written out in a prompt."""
        return " ".join(self.tokens)

    def attach(self, points: Points) -> None:
        """Put the word's vectors beside the table."""
        found: list[Any] = [p for p in points if p.kind == "condition" and p.role == "words"]
        if not found:
            raise AttachError(
                f"'textual-inversion' puts a word into a text encoder, and {points.backbone} has no embedding of words. Wrap "
                "that of a pipeline: zoo.wrap(pipe.text_encoder, example=(ids,))."
            )
        point = found[0]
        if self.plan is None:
            raise AttachError(
                "'textual-inversion' needs the tokenizer, which has to know the word: "
                "multimodal.adapters.textual_inversion.new_word(model, tokenizer, word)."
            )
        table: Tensor = point.module.weight.detach()
        first, start = self.plan.get("first"), self.plan.get("start")
        ok = (
            type(first) is int
            and 0 < first <= 1 << 30
            and (start is None or (type(start) is int and 0 <= start < len(table)))
        )
        self.check(ok, f"its plan is {self.plan!r:.80}; expected the number of its first token, and that of its start.")
        row = table.mean(dim=0) if start is None else table[start]
        point.replace(Words(int(first or 0), row.expand(self.num_vectors, -1).clone()))


def new_word(
    model: Host, tokenizer: Any, word: str, *, start: str = "", num_vectors: int = 1, name: str | None = None
) -> TextualInversion:
    """Give a text encoder and its tokenizer a word; all or nothing.

    Args:
        model: `zoo.wrap` of the encoder of a pipeline. tokenizer: the one that belongs to it; it learns the word.
        word, start, num_vectors: settings of the method. name: of the adapter.

    Raises:
        ConfigError: the tokenizer knows the word already, `start` is not one token of it, or the encoder finds the end of a text
            by the largest token, which a new one would be.
    """
    made: Any = adapter("textual-inversion", word=word, start=start, num_vectors=num_vectors)
    _free(tokenizer, made)
    encoder: Any = model.backbone
    if hasattr(encoder, "text_projection") and getattr(encoder.config, "eos_token_id", None) == 2:
        raise ConfigError(
            "This text encoder takes its pooled output at the largest token, which the new word would be (eos_token_id is 2 in "
            f"its configuration). Load it with config.eos_token_id={tokenizer.eos_token_id}, which reads old texts the same."
        )
    begin = None
    if start:
        ids = tokenizer(start, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ConfigError(f"start is '{start}', which is {len(ids)} tokens here; expected a word that is one.")
        begin = int(ids[0])
    made.plan = {"first": len(tokenizer), "start": begin}
    found: Any = model.add_adapter(made, name)  # type: ignore[attr-defined]
    tokenizer.add_tokens(made.tokens)
    return found  # type: ignore[no-any-return]


def teach(tokenizer: Any, adapter: TextualInversion) -> None:
    """A fresh tokenizer learns the word of an adapter that was saved.

    Raises:
        ConfigError: it knows the word already. MismatchError: the word would become another token than it was.
    """
    _free(tokenizer, adapter)
    first = (adapter.plan or {}).get("first")
    if len(tokenizer) != first:
        raise MismatchError(
            f"'{adapter.word}' is token {first} of its text encoder, and this tokenizer's next one is {len(tokenizer)}: it is "
            "another one, or has learned other words before. Teach them in the order in which they were made."
        )
    tokenizer.add_tokens(adapter.tokens)


def _free(tokenizer: Any, adapter: TextualInversion) -> None:
    known = [token for token in adapter.tokens if token in tokenizer.get_vocab()]
    if known:
        raise ConfigError(f"The tokenizer has a token '{known[0]}' already; choose another word.")
