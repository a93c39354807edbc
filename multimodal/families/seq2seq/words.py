"""A tokenizer of whole words, for small networks trained from nothing: no download, and a vocabulary that can be read.

Text is put into lower case and cut at blanks and at punctuation. Ids: `<pad>` 0, `</s>` 1, `<unk>` 2, then the words in their
order, then `<vis_extra_id_99>` to `<vis_extra_id_0>`, which name visual tokens (see
`multimodal.families.seq2seq.visual_embedding`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

SPECIAL = ("<pad>", "</s>", "<unk>")
VISUAL = 100

# Every word of easy-VQA's questions and answers, and the two prefixes
# fmt: off
EASY_VQA = [
    "vqa", "caption", ":", "?", ".", "a", "black", "blue", "brown", "circle", "color", "contain", "does", "gray",
    "green", "image", "in", "is", "no", "not", "of", "present", "rectangle", "red", "shape", "teal", "the", "there",
    "triangle", "what", "yellow", "yes",
]
# fmt: on


def words_of(texts: Iterable[str], limit: int | None = None) -> list[str]:
    """The words of texts, most frequent first (equals in alphabetical order); at most `limit`."""
    counts = Counter(w for text in texts for w in re.findall(r"\w+|[^\w\s]", text.lower()))
    return [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:limit]


def vocabulary_size(words: Sequence[str]) -> int:
    """Rows of the word embedding."""
    return len(SPECIAL) + len(words) + VISUAL


def tokenizer(words: Sequence[str]) -> Any:
    """A `PreTrainedTokenizerFast` of these words; texts end with `</s>`."""
    from zoo.library import library

    tokenizers, transformers = library("tokenizers", "multimodal"), library("transformers", "multimodal")
    names = [*SPECIAL, *words, *(f"<vis_extra_id_{i}>" for i in reversed(range(VISUAL)))]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    built = tokenizers.Tokenizer(model)
    built.normalizer = tokenizers.normalizers.Lowercase()
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=names[len(SPECIAL) + len(words) :],
    )
