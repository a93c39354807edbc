"""Who is it? Probes are compared with a gallery of known identities, by the cosines of their features.

    zoo.evaluate(model, faces, task="identify")          the first image of each identity is the gallery
    zoo.evaluate(model, probes, task=Identify(gallery="gallery/", probe_scale=4))

s_pg = <z_p, z_g> / |z_p| |z_g|         z (d,) what the model gives in front of its head
rank@k = share of the probes with an image of their identity among the k images of the gallery that are most similar to them
pairs (p, g); a threshold t accepts those with s_pg >= t
FAR(t): share of the pairs of two identities that are accepted;  TAR(t): of one identity
tar@f = the largest TAR(t) with FAR(t) <= f

Probes whose identity is not in the gallery ("unmated") take part in the pairs and have no rank. Of equally similar images
those of others come first, so a model that maps all to one point finds nobody. A rank that reaches the size of the gallery
says nothing, and is left out. Identities of a test need not have been seen in training (open set): no head is asked.

Cross-resolution: `probe_scale` and `gallery_scale` divide both sides of the images by a number (area), and bring them back to
their size (bicubic), in front of the preprocessing.

Ranks are those of the protocol of TinyFace (Cheng et al. 2018) as Kartik-3004/PETALface measures it; tar@f of one-to-one
verification, as in IJB.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo import Task, register_task
from zoo.data import ImageDataset
from zoo.data.labels import bare
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.tasks.base import call
from zoo.tasks.embeddings import Embeddings

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["Coarse", "Identification", "Identify"]

RANKS, RATES = (1, 5, 20), (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Coarse:
    """An image of a lower resolution: both sides divided by `scale`, and brought back to what they were."""

    scale: float

    def __call__(self, image: Any) -> Any:
        """A PIL image -> one of the same size.

        Raises:
            DataError: another kind of image, or nothing of it is left.
        """
        if not isinstance(image, Image.Image):
            raise DataError(
                f"the resolution of images is lowered in front of their preprocessing; this one is a {type(image).__name__}. "
                "Open files, or lower it yourself."
            )
        small = round(image.width / self.scale), round(image.height / self.scale)
        if min(small) < 1:
            raise DataError(
                f"an image of {image.size[0]} x {image.size[1]} pixels cannot be {self.scale:g} times smaller."
            )
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


class Identification(Embeddings):
    """rank@k and tar@f of embeddings (B, d) with targets 2 * identity, of probes one more."""

    def __init__(self, ranks: Sequence[int] = RANKS, rates: Sequence[float] = RATES) -> None:
        super().__init__()
        self.ranks, self.rates = tuple(ranks), tuple(rates)

    def compute(self) -> dict[str, Any]:
        """Shares from 0 to 1, and how many images and pairs they are of.

        Raises:
            DataError: there is no gallery or no probe, a feature that is no number, or no identity is on both sides.
        """
        z, told = self.everything()
        if not z.isfinite().all():
            raise DataError("features of some images are no numbers (NaN or Inf), so they are similar to nothing.")
        probe = told % 2 == 1
        scores = z[probe] @ z[~probe].T
        same = told[probe][:, None] // 2 == told[~probe][None, :] // 2
        if not scores.numel() or not same.any() or same.all():
            raise DataError(
                f"{int((~probe).sum())} images of a gallery and {int(probe.sum())} probes: to be told apart, some must be of one "
                "identity and some of others."
            )
        mated = same.any(1)
        best = scores.masked_fill(~same, float("-inf")).amax(1)
        others = ((scores >= best[:, None]) & ~same).sum(1)[mated]
        found: dict[str, Any] = {f"rank@{k}": (others < k).double().mean() for k in self.ranks if k < scores.shape[1]}
        genuine, impostors = scores[same].sort().values, scores[~same].sort(descending=True).values
        for rate in self.rates:
            allowed = int(rate * len(impostors) + 1e-9)  # impostors that may be accepted: t lies above the next one
            above = genuine > impostors[allowed] if allowed < len(impostors) else torch.ones_like(genuine)
            found[f"tar@{rate:g}"] = above.double().mean()
        counts = {"gallery": (~probe).sum(), "probes": probe.sum(), "impostors": (~same).sum()}
        return found | counts | ({"unmated": (~mated).sum()} if not mated.all() else {})


class _Sides:
    """The rows of a gallery, then those of the probes; the label says whose and which."""

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, gallery: ImageDataset, probes: ImageDataset, labels: np.ndarray) -> None:
        self.sides = tuple(side._like(on_error="raise") for side in (gallery, probes))
        self.labels: np.ndarray | None = labels
        self.name, self.noun = probes.name, probes.noun

    def __len__(self) -> int:
        return sum(map(len, self.sides))

    def read(self, index: int) -> tuple[Any, Any]:
        """(prepared image, 2 * identity + 1 of a probe)."""
        assert self.labels is not None
        side, place = self._place(index)
        return side[place][0], int(self.labels[index])

    def where(self, index: int) -> str:
        """The place of a row in words."""
        side, place = self._place(index)
        return side.where(place)

    def _place(self, index: int) -> tuple[ImageDataset, int]:
        first = len(self.sides[0])
        return (self.sides[0], index) if index < first else (self.sides[1], index - first)


@register_task("identify")
class Identify(Task):
    """Gallery and probes; it measures, and trains nothing.

    Args:
        gallery: data of the gallery; or how many images of each identity, the first in the order of the data, are the gallery.
        gallery_split: of a source with several splits.
        probe_scale, gallery_scale: by how much the resolution of either is lowered; 1: not at all.
        ranks: the k. rates: the f.
        singles: identities without an image for the probes (of which a gallery of k takes all): "refuse" them, leave them in the
            "gallery" as others among whom the right one is to be found, or "leave" them out.
    """

    monitor, measures = "rank@1", True

    def __init__(
        self,
        gallery: Any = 1,
        *,
        gallery_split: str | None = None,
        probe_scale: float = 1,
        gallery_scale: float = 1,
        ranks: Sequence[int] = RANKS,
        rates: Sequence[float] = RATES,
        singles: Literal["refuse", "gallery", "leave"] = "refuse",
    ) -> None:
        self.gallery, self.gallery_split, self.singles = gallery, gallery_split, singles
        self.scales = (gallery_scale, probe_scale)
        for what, values in (("ranks", ranks), ("rates", rates)):
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ConfigError(
                    f"{what} is {values!r}; expected several, such as {RANKS if what == 'ranks' else RATES}."
                )
        self.ranks, self.rates = tuple(ranks), tuple(rates)
        for scale in self.scales:
            if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 1 <= scale <= 1024:
                raise ConfigError(f"a scale is {scale!r}; expected a number from 1 (as it is) to 1024.")
        if isinstance(gallery, bool) or (isinstance(gallery, int) and gallery < 1):
            raise ConfigError(
                f"gallery is {gallery!r}; expected data, or a number of images of each identity, 1 or more."
            )
        if not all(type(k) is int and k >= 1 for k in self.ranks):
            raise ConfigError(f"ranks are {self.ranks}; expected whole numbers, 1 or more.")
        if not all(type(f) in (int, float) and 0 <= f <= 1 for f in self.rates):
            raise ConfigError(f"rates are {self.rates}; expected shares of the pairs of two identities, from 0 to 1.")
        if singles not in ("refuse", "gallery", "leave"):
            raise ConfigError(f"singles is {singles!r}; expected 'refuse', 'gallery' or 'leave'.")

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """Gallery and probes behind each other.

        Raises:
            DataError: labels that are not known, or identities with too few images. MismatchError: of a gallery whose
            identities have names and probes whose have none.
        """
        probes = super().open(model, data, train=False, split=split)
        if isinstance(self.gallery, int):
            gallery, probes = self._divided(probes)
        else:
            gallery = super().open(model, self.gallery, train=False, split=self.gallery_split)
            _check_apart(gallery, probes)
        sides = [self._coarse(side, scale) for side, scale in zip((gallery, probes), self.scales, strict=True)]
        first, second = _identities(gallery, probes)
        labels = np.concatenate([2 * first, 2 * second + 1])
        return ImageDataset(_Sides(sides[0], sides[1], labels), None, on_error=probes.on_error)

    def _divided(self, dataset: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
        """The first images of each identity, and the rest."""
        labels = _labels(dataset)
        seen: dict[int, int] = {}
        number = np.array([seen.update({y: seen.get(y, 0) + 1}) or seen[y] for y in labels.tolist()])
        front = number <= self.gallery
        few = [y for y, count in seen.items() if count <= self.gallery]
        if few and self.singles == "refuse":
            names = dataset.classes or []
            named = [f"'{names[y]}'" if y < len(names) else str(y) for y in few[:3]]
            raise DataError(
                f"{dataset.name}: {len(few)} of {len(seen)} identities have {self.gallery} image{'s' * (self.gallery > 1)} or "
                f"fewer (first: {', '.join(named)}), and none is left for the probes. Add images, leave these identities out "
                "(singles='leave'), or let them be others in the gallery (singles='gallery')."
            )
        if self.singles == "leave":
            front &= ~np.isin(labels, few)
        return dataset.select(np.flatnonzero(front)), dataset.select(np.flatnonzero(number > self.gallery))

    def _coarse(self, dataset: ImageDataset, scale: float) -> ImageDataset:
        return dataset if scale == 1 else dataset.with_transform(_Behind(Coarse(scale), dataset.transform))

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """No loss: features in front of the head.

        Raises:
            ConfigError: it was to be trained, or the model pools nothing.
        """
        if model.training:
            raise ConfigError(
                "The task 'identify' measures, and has no loss. Train with a head, for example model.reset_head(30, "
                "kind='cosface') and zoo.fit(model, faces), and evaluate by task='identify'."
            )
        features: Tensor = call(model.features, inputs)
        if features.dim() != 2:
            raise ConfigError(
                f"'{model.backbone_name}' gives {tuple(features.shape)}; expected one vector for each image."
            )
        return features.new_zeros(()), features

    def metrics(self, model: Host) -> dict[str, Any]:
        """rank@k, tar@f."""
        return {"identification": Identification(self.ranks, self.rates)}


@dataclass(frozen=True)
class _Behind:
    """One function of an image behind another; a plain object, which worker processes can be sent."""

    first: Any
    second: Any

    def __call__(self, image: Any) -> Any:
        return self.first(image) if self.second is None else self.second(self.first(image))


def _labels(dataset: ImageDataset) -> np.ndarray:
    if dataset.labels is None or not len(dataset):
        raise DataError(
            f"{dataset.name}: whose images these are is not known. Open data with one label for each image."
        )
    return dataset.labels


def _check_apart(gallery: ImageDataset, probes: ImageDataset) -> None:
    """Raise DataError if an image is on both sides: it finds itself, whatever the model."""
    both = _places(gallery) & _places(probes)
    if both:
        raise DataError(
            f"{len(both)} of the {len(probes)} probes of '{probes.name}' are images of the gallery, too, and would find "
            "themselves. Give data that have no image in common; or one source, of which the first k images of each identity are "
            "the gallery: gallery=k."
        )


def _places(dataset: ImageDataset) -> set[Any]:
    """Where the images of a data set lie: files, rows of files, or items of an object that is in memory."""
    held = getattr(dataset.rows, "dataset", getattr(dataset.rows, "_data", None))
    if held is not None:
        return {(id(held), int(index)) for index in dataset.indices}
    return {os.path.realpath(dataset.where(index)) for index in range(len(dataset))}


def _identities(gallery: ImageDataset, probes: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the identities of both, equal where their names are."""
    first, second = _labels(gallery), _labels(probes)
    if gallery.classes == probes.classes:
        return first, second
    names = [side.classes or [] for side in (gallery, probes)]
    plain = [side.name for side, own in zip((gallery, probes), names, strict=True) if bare(own)]
    if len(plain) == 2:
        return first, second
    if plain:
        raise MismatchError(
            f"The identities of '{plain[0]}' are numbers, and the others ('{gallery.name}', '{probes.name}') have names. Open "
            "both with classes=[...]."
        )
    number = {name: i for i, name in enumerate(dict.fromkeys([*names[0], *names[1]]))}
    tables = [np.array([number[name] for name in own]) for own in names]
    return tables[0][first], tables[1][second]
