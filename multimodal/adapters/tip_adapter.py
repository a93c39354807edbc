"""Tip-Adapter: a cache of the few training images beside the zero-shot classifier, without any training.

Idea: an image votes for the classes of those few training images that its embedding is near to; the votes are added to the
zero-shot logits.
Points: none; it stands behind the head (`Adapter.logits`). Head: `text` (`zoo.heads.text`).

    F (n, d), V (n, K)       keys: embeddings of the n training images, of length 1; values: their classes, one-hot
    A = f F^T                f (B, d): the image's embedding, of length 1
    logits = z + alpha exp(-beta (1 - A)) V                  z: the zero-shot logits

The cache is filled by `zoo.calibrate(model, train)`. A key is the mean of the image's embeddings (not normalised) over `passes`
random augmentations, then normalised. Before that the model is the zero-shot classifier. alpha and beta are chosen on validation
data by `adapter.search(model, val)`, in the authors' grid: beta in 0.1 .. `beta_most` (200 values), alpha in 0.1 .. `alpha_most`
(20 values), upper ends not included, the first of the best.
Defaults: beta = 1, alpha = 1.17, 10 passes, the grid up to 7 and 3, as the authors' for ImageNet; on Caltech101 alpha = 3 and the
grid up to 12 and 5. alpha = 0 is the zero-shot classifier.
Counts: nothing is trained. The cache has n d numbers; ImageNet, 16 images of each class, RN50: 16,384,000.
Measured (benchmarks/clip_few_shot.py: clip-micro, 16 images of each class, one pass, mean of three seeds): CIFAR-10 31.8 %, with
trained keys 35.3 %, zero-shot 25.6 %, a linear probe 46.1 %; 17 flowers 36.4, 48.0, 10.3 and 65.9 %.
Source: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022;
gaopengcuhk/Tip-Adapter (main.py, utils.py). `tip-adapter-f` trains the keys.

Saved are the keys, sorted by class, how many each class has, and the names of the classes. For other classes the cache is
refused; classes that are added to the head (`model.grow_head`) have no votes until it is filled anew.

Deviations: z has the model's own scale exp(a) where theirs is 100 (OpenAI's CLIP: 100.0), and one template where theirs has
several of which the mean is taken; the head can be any on the embeddings (`model.set_head` with
`multimodal.tasks.zero_shot.zero_shot_classifier`, which takes several). Their script for ImageNet searches alpha and beta on the
test data; here that is the caller's to avoid. Theirs relies on a loader that does not shuffle; here the labels of all passes are
compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.adapters.parts.cache import Grid, counted, embed
from multimodal.adapters.parts.named import require_texts
from zoo import Task, evaluate
from zoo.adapters.base import Adapter
from zoo.adapters.parts.deciding import deciding, name_in
from zoo.errors import ConfigError
from zoo.host import Host
from zoo.points import Points
from zoo.registry import register_adapter


class Cache(nn.Module):
    """Keys (n, d) of images sorted by class, `counts` of each class; `trained`: the keys are parameters."""

    def __init__(self, counts: list[int], dim: int, trained: bool) -> None:
        super().__init__()
        keys = torch.zeros(sum(counts), dim)
        if trained:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        # follows from the counts, so it is not saved
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts), output_size=sum(counts))
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, features: Tensor, beta: float, classes: int) -> Tensor:
        """The votes exp(-beta (1 - f F^T)) V of embeddings of length 1, (B, d) -> (B, K)."""
        near = torch.exp(beta * (F.linear(features, self.keys.to(features.dtype)) - 1))
        labels: Tensor = self.labels  # type: ignore[assignment]
        values = F.one_hot(labels, classes).to(near.dtype)
        return near @ values


@register_adapter("tip-adapter")
@dataclass
class TipAdapter(Adapter):
    """A cache of the training images' embeddings.

    Args:
        alpha: weight of the votes. beta: how fast a vote falls with the distance.
        passes: augmentations of each image that a key is the mean of.
        alpha_most, beta_most: upper ends of `search`, not included.
    """

    alpha: float = 1.17
    beta: float = 1.0
    passes: int = 10
    alpha_most: float = 3.0
    beta_most: float = 7.0

    needs_calibration = True
    head_kind = "text"
    paper = "Zhang et al. 2022"
    looks_back = True
    taxonomy = "additive"
    merges = False
    trial = {"passes": 1}
    trial_families = ()
    trains_keys = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            self.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; expected 0 or more.")
            self.check(
                getattr(self, name) > 0 or not self.trains_keys,
                f"{name} is 0; no vote depends on the keys then, which are what is trained. Expected more than 0.",
            )
            most = getattr(self, f"{name}_most")
            self.check(most > 0.1, f"{name}_most is {most}; expected more than 0.1, where the search begins.")
        self.check(self.passes >= 1, f"passes is {self.passes}; expected 1 or more.")
        self._keys: Tensor | None = None  # found by a calibration and not attached yet
        self._seen: list[tuple[Tensor, Tensor]] | None = None  # during a search: zero-shot logits and embeddings

    @property
    def stateless(self) -> bool:  # type: ignore[override]
        """There is no cache before a calibration."""
        return self.plan is None

    def fresh(self) -> Adapter:
        """An unattached adapter with the same settings and cache."""
        twin = super().fresh()
        assert isinstance(twin, TipAdapter)
        twin._keys = self._keys
        if twin._keys is None and "cache" in self._modules:
            twin._keys = self.module_at("cache").keys.detach().clone()
        return twin

    # -- the cache --------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Make room for the cache; nothing before there is one."""
        require_texts(points, self.method)
        if self.plan is None:
            return
        counts = counted(self.plan, self.method)
        self.check(
            len(counts) == points.num_classes,
            f"its cache is of {len(counts)} classes, and the head has {points.num_classes}. Fill it with images of these "
            "classes: zoo.calibrate(model, train).",
        )
        cache = points.beside("cache", Cache(counts, points.feature_dim, self.trains_keys))
        if self._keys is not None:
            with torch.no_grad():
                cache.keys.copy_(self._keys)
            self._keys = None

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Fill the cache; one that is there already, anew.

        Args:
            task: not asked; images of classes are what it needs.
            batches: (images, labels), in the same order each time they are iterated; of a `zoo.train.Calibration` every pass
                augments anew.

        Raises:
            ConfigError: the adapter is in no model. DataError: no batch, labels that are none, passes in another order,
                embeddings that are not finite. The model is as it was, then.
        """
        name = name_in(model, self)
        keys, labels = embed(model, batches, self.passes)
        counts = torch.bincount(labels, minlength=model.num_classes).tolist()
        try:
            with deciding(self):
                names = getattr(model.head, "classes", None) or model.classes
                self.plan = {"counts": counts, "classes": list(names) if names else None}
                self._keys = keys[labels.argsort(stable=True)]
                model.reattach(name)
        finally:
            self._keys = None

    def logits(self, logits: Tensor, outputs: Mapping[str, Any]) -> Tensor:
        """z (B, K) -> z + alpha votes."""
        if self.plan is None:
            return logits
        known, names = self.plan["classes"], outputs["classes"]
        if known and names and list(names[: len(known)]) != known:
            raise ConfigError(
                f"'{self.method}' has a cache of other classes ({', '.join(known[:3])} ...) than the head's "
                f"({', '.join(names[:3])} ...). Fill it with images of these: zoo.calibrate(model, train)."
            )
        pooled = outputs["pooled"]
        features = F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)
        if self._seen is not None:
            self._seen.append((logits.float(), features.float()))
        votes = self.module_at("cache")(features, self.beta, logits.shape[-1])
        return logits + self.alpha * votes.to(logits.dtype)

    # -- alpha and beta ---------------------------------------------------------------------------------------------

    def search(self, model: Any, val: Any, **options: Any) -> dict[str, float]:
        """Choose alpha and beta by the accuracy on validation data, and set them.

        Args:
            model: that this adapter is in use in.
            val: validation data, as for `zoo.evaluate`; never test data.
            options: further arguments of `zoo.evaluate`: batch_size, split, precision, workers, device, progress.

        Returns:
            "alpha", "beta", "accuracy" with them, and "before": the accuracy that was there.

        Raises:
            ConfigError: it is not in use in this model, or has no cache.
        """
        if self.plan is None or not any(model.adapters[n] is self for n in model.active):
            why = (
                "has no cache yet: zoo.calibrate(model, train)" if self.plan is None else "is not in use in this model"
            )
            raise ConfigError(f"'{self.method}' {why}.")
        grid = Grid(self)
        self._seen = []
        try:
            found = evaluate(model, val, **{"progress": False, "record": "", **options}, metrics={"grid": grid})
        finally:
            self._seen = None
        best = grid.best()
        self.alpha, self.beta = best["alpha"], best["beta"]
        return {**best, "before": found["accuracy"]}
