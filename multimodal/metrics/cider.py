"""CIDEr-D: how much a caption has in common with what several people wrote of the same image.

Candidate c and references s_1 .. s_m of an image, N images, n-grams k:

    g_n(x)_k = h_k(x) (log N - log max(1, df_k))              h_k: how often k stands in x; df_k: in how many images' references
    sim_n(c, s) = exp(-(|c| - |s|)^2 / (2 * 6^2)) <min(g_n(c), g_n(s)), g_n(s)> / (|g_n(c)| |g_n(s)|)
    CIDEr-D = 10 * mean over images, over j and over n = 1 .. 4 of sim_n(c, s_j)

Between 0 and 10, often printed times 100; papers on captioning report it as "CIDEr". Words are runs of letters, digits and
apostrophes in lower case; the published script has the Penn Treebank's tokenizer, which cuts "dog's" in two.
Source: Vedantam, Zitnick and Parikh, CVPR 2015.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["cider"]

LONGEST = 4
SIGMA = 6.0

Vector = dict[tuple[str, ...], float]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of one candidate and some references for each image; 0 for a single image, where no n-gram is rare."""
    if not candidates:
        return 0.0
    known = [[_grams(text) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in known:
        frequency.update({gram for grams in texts for gram in grams})
    log_images = math.log(len(candidates))

    def weighted(grams: Counter[tuple[str, ...]]) -> list[Vector]:
        found: list[Vector] = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            found[len(gram) - 1][gram] = count * (log_images - math.log(max(1, frequency[gram])))
        return found

    total = 0.0
    for text, others in zip(candidates, known, strict=True):
        grams = _grams(text)
        own = weighted(grams)
        scores = [_similarity(own, weighted(o), _length(grams) - _length(o)) for o in others]
        total += sum(scores) / max(len(scores), 1)
    return 10 * total / len(candidates)


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _length(grams: Counter[tuple[str, ...]]) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _similarity(own: list[Vector], other: list[Vector], difference: int) -> float:
    """Mean over n of the cosine, clipped and with the penalty for another length."""
    total = 0.0
    for a, b in zip(own, other, strict=True):
        lengths = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        if lengths > 0:
            total += sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b) / lengths
    return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))
