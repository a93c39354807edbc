"""Tip-Adapter-F: the keys of Tip-Adapter's cache are trained.

Idea: the cache of the few training images (`tip-adapter`) is a two-layer network whose first weights are the images' embeddings
and whose second are their classes; a few epochs of training of the first make it better, from a start that is good already.
Points, equations, head, cache, `search`: as `tip-adapter`, whose function it is before its first step, to the bit. Trained are
the keys F (n, d), not normalised again; the values stay one-hot, alpha and beta what they are while training.

`zoo.fit(model, train, val, epochs=20, batch_size=256, optimizer_options={"eps": 1e-4})` fills the cache, then trains; then
`adapter.search(model, val)` chooses alpha and beta for the trained keys.
Defaults: the authors': AdamW at 1e-3, eps 1e-4, weight decay 0.01, cosine, 20 epochs, batch 256; alpha and beta at their initial
values while training.
Counts: n d. 16 images of 1000 classes, RN50 (d = 1024): 16,384,000.
Source: Zhang et al. 2022, as `tip-adapter`.

Deviations: the authors keep the epoch that is best on the test data, and report the larger of that and the searched value. Here
the epoch is chosen on validation data (`val`, or `keep="last"`), and a test is looked at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from multimodal.adapters.tip_adapter import TipAdapter
from zoo.registry import register_adapter


@register_adapter("tip-adapter-f")
@dataclass
class TipAdapterF(TipAdapter):
    """As `tip-adapter`, with trained keys."""

    default_lr = 1e-3
    trains_keys = True
