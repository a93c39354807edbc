"""The task "contrast": images and texts that belong together shall be close, others apart.

    S_ij = exp(a) <I_i, T_j> + b                                       embeddings of length 1, a batch of B pairs
    CLIP:    L = 1/2 (CE(S, Y) + CE(S^T, Y))                           Y_ij = 1 / |group of i| within a group, else 0
    SigLIP:  L = -1/B sum_ij log sigmoid(z_ij S_ij)                    z_ij = 1 within a group, else -1

Groups are single pairs, so that Y is the identity, unless the data says that several show the same (captions made of class
names). A model with a logit bias is trained with the second, others with the first. Negatives are those of one part of a batch
on one process: `accumulate` and more processes mean fewer of them.

In training one caption of each image is drawn anew each time. In evaluation all of them (up to `captions`) are candidates, and
recall is measured over the whole set: how often a caption of an image is among the k best of all captions (image to text), and
the image of a caption among the k best of all images (text to image). Of equal scores the wrong one counts as better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.data.pairs import Pair, open_pairs
from zoo.data.dataset import ImageDataset
from zoo.data.preprocess import image_transform
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.heads.text import cut
from zoo.registry import register_task
from zoo.tasks.base import Task

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["Contrast", "Embedded", "Retrieval"]

RANKS = (1, 5, 10)


class Embedded(NamedTuple):
    """What the task measures: embeddings of length 1, (B, d) and (n, d), and for each text the row of its image (n,)."""

    images: Tensor
    texts: Tensor
    owner: Tensor


@register_task("contrast")
@dataclass
class Contrast(Task):
    """Contrastive training of image-text models.

    Args:
        captions: of an image in evaluation, at most; those behind are left out.
        truncate: cut captions that are longer than the model's context, instead of raising DataError.
        scale: share of the area that a random crop keeps, as open_clip's own training has it.
    """

    captions: int = 5
    truncate: bool = False
    scale: tuple[float, float] = (0.9, 1.0)

    noun, monitor, hub = "pairs", "recall", "zero-shot-image-classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.captions < 1:
            raise ConfigError(f"captions is {self.captions}; expected 1 or more.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"scale is {self.scale}; expected the least and the largest share of an image, 0 < a <= b <= 1."
            )

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """What `open_pairs` takes; items are ((image (3, H, W), token ids (L,), or (captions, L) in evaluation), group)."""
        family: Any = model.family
        _check_family(model)
        dataset = open_pairs(data, split=split)
        if dataset.transform is not None:
            return dataset
        config = {**family.data_config(), "scale": self.scale}
        # a mirrored image is another one where the caption says "left", or there are letters
        image = image_transform(config, train, augment=augment or "crop")
        return dataset.with_transform(PairTransform(image, family.tokenize, train, self.captions, self.truncate))

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model has two towers and no classifier."""
        _check_family(model)
        if model.num_classes:
            raise ConfigError(
                "The model has a classification head, which contrast does not train. Load it without num_classes, or take "
                "the head off: model.reset_head(0)."
            )

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Embedded]:
        """inputs: images (B, 3, H, W) with token ids (B, L) or (B, captions, L), of which zeros are padding; targets (B,).

        Texts run up to the last end among them, where the tower is causal (`zoo.heads.text`).
        """
        images, ids = inputs
        own: Any = model.backbone
        if ids.dim() == 2:
            ids = ids[:, None]
        there = ids.any(dim=-1)
        owner = there.nonzero()[:, 0]
        embedded = Embedded(
            F.normalize(model.features(images).float(), dim=-1),
            F.normalize(model.features(texts=cut(model, ids[there])).float(), dim=-1),
            owner,
        )
        first = torch.cat(
            [owner.new_ones(1), (owner[1:] != owner[:-1]).long()]
        ).bool()  # the first caption of each image
        scores = own.logit_scale.exp().float() * embedded.images @ embedded.texts[first].T
        same = targets[:, None] == targets[None, :]
        if own.logit_bias is not None:
            if label_smoothing:
                raise ConfigError("label_smoothing is that of a softmax; models with a logit bias are trained without.")
            signs = same.to(scores.dtype) * 2 - 1
            return -F.logsigmoid(signs * (scores + own.logit_bias.float())).sum() / len(scores), embedded
        goal = same.to(scores.dtype) / same.sum(dim=1, keepdim=True)
        sides = [F.cross_entropy(s, goal, label_smoothing=label_smoothing) for s in (scores, scores.T)]
        return (sides[0] + sides[1]) / 2, embedded

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Recall at 1, 5 and 10 in both directions, and the mean of the six, "recall"."""
        return {"retrieval": Retrieval()}


class PairTransform:
    """`Pair` -> (image (3, H, W), token ids): of one caption drawn at random (L,), or of the first `captions` (captions, L)."""

    def __init__(
        self,
        image: Callable[[Any], Tensor],
        tokenize: Callable[..., Tensor],
        train: bool,
        captions: int,
        truncate: bool,
    ) -> None:
        self.image, self.tokenize, self.train = image, tokenize, train
        self.captions, self.truncate = captions, truncate

    def __call__(self, pair: Any) -> tuple[Tensor, Tensor]:
        """Rows behind the last caption are zero.

        Raises:
            DataError: no pair, or a caption that is longer than the context.
        """
        if not isinstance(pair, Pair):
            raise DataError(
                f"the data set yields {type(pair).__name__}; contrast needs images with captions: open it with "
                "multimodal.data.pairs.open_pairs, or make captions of class names with caption_classes."
            )
        pixels = self.image(pair.image)
        if self.train:
            chosen = pair.captions[int(torch.randint(len(pair.captions), ()))]
            return pixels, self.tokenize(chosen, self.truncate)[0]
        ids = self.tokenize(pair.captions[: self.captions], self.truncate)
        return pixels, F.pad(ids, (0, 0, 0, self.captions - len(ids)))


class Retrieval:
    """Recall over everything that was seen since `reset`; on several processes over what all of them saw."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.seen: list[Embedded] = []
        self.count = 0

    def update(self, outputs: Embedded, targets: Tensor) -> None:
        """Add a batch."""
        images, texts, owner = (t.detach().cpu() for t in outputs)
        self.seen.append(Embedded(images, texts, owner + self.count))
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """Shares between 0 and 1."""
        everything = self._everything()
        images, texts = torch.cat([e.images for e in everything]), torch.cat([e.texts for e in everything])
        owner = torch.cat([e.owner for e in everything])
        ranks = {"image_to_text": _ranks(images, texts, torch.arange(len(images)), owner)}
        ranks["text_to_image"] = _ranks(texts, images, owner, torch.arange(len(images)))
        found = {f"{way}_r{k}": (r < k).float().mean().item() for way, r in ranks.items() for k in RANKS}
        return {"recall": sum(found.values()) / len(found), **found}

    def _everything(self) -> list[Embedded]:
        """What all processes saw, with owners that count through."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.seen
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (self.seen, self.count))
        found, before = [], 0
        for seen, count in gathered:
            found += [e._replace(owner=e.owner + before) for e in seen]
            before += count
        return found


def _ranks(asking: Tensor, answers: Tensor, group: Tensor, groups: Tensor, rows: int = 1024) -> Tensor:
    """How many wrong answers are at least as near as the best right one, for each of `asking`; groups say what is right."""
    found = []
    for start in range(0, len(asking), rows):
        scores = asking[start : start + rows] @ answers.T
        right = group[start : start + rows, None] == groups[None, :]
        best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
        found.append(((scores >= best) & ~right).sum(dim=1))
    return torch.cat(found)


def _check_family(model: Host) -> None:
    if model.family.family != "clip":
        raise MismatchError(
            f"'{model.backbone_name}' is of the family '{model.family.family}'; contrast trains those with an image and a text "
            "tower (family 'clip')."
        )
