"""Which entries of a weight (o, i) stay: by magnitude, Wanda or SparseGPT, freely or N of every M neighbours.

Exactly round(sparsity * o * i) entries go, the smallest; those that are equal go in their order in the weight, so the choice is
the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import AttachError, DataError
from zoo.points import LinearPoint

__all__ = ["CRITERIA", "Pruning", "largest", "pattern_of", "sparsegpt", "zeros_of"]

CRITERIA = ("magnitude", "wanda", "sparsegpt", "random", "given")

COLUMNS = 128  # that SparseGPT decides about at once
DAMP = 0.01  # of the mean diagonal, added to it


def pattern_of(text: str | None) -> tuple[int, int] | None:
    """(N, M) of "N:M", N of every M neighbours of a row stay; None: any entries may.

    Raises:
        ValueError: no such pattern.
    """
    if text is None:
        return None
    kept, colon, group = text.partition(":")
    if not (colon and kept.isdecimal() and group.isdecimal() and len(text) <= 16):
        raise ValueError(text)
    found = int(kept), int(group)
    if not 0 < found[0] < found[1]:
        raise ValueError(text)
    return found


def _without_smallest(scores: Tensor, gone: int) -> Tensor:
    """True (n,) for all of the scores (n,) but the `gone` smallest."""
    if gone <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(gone).values
    kept = scores > limit
    level = (scores == limit).nonzero()[:, 0]
    kept[level[gone - int((scores < limit).sum()) :]] = True
    return kept


def _without_smallest_of_each(scores: Tensor, kept: int) -> Tensor:
    """True (..., m) for the `kept` largest of each group."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., scores.shape[-1] - kept :], True)


def zeros_of(point: LinearPoint) -> Tensor | None:
    """Which entries of the weight (o, i) a sparse backbone has left (`zoo.sparsify`); None: it is not sparse."""
    mask = point.module._buffers.get("weight_mask")
    return None if mask is None else (mask.T if point.transposed else mask)[point.start : point.stop].flatten(1)


def largest(scores: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """The mask (o, i), true where a weight stays, by its scores (o, i), which are finite."""
    if pattern is not None:
        kept, group = pattern
        return _without_smallest_of_each(scores.reshape(-1, group), kept).view(scores.shape)
    return _without_smallest(scores.flatten(), round(sparsity * scores.numel())).view(scores.shape)


def sparsegpt(
    weight: Tensor, moment: Tensor, sparsity: float, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The mask (o, i) and the change of the entries that stay, which makes good what the others did on the inputs (float32).

    Columns go from left to right, `COLUMNS` at a time; what the entries of a column that go leave behind is taken over by the
    columns right of it, by the inverse of the damped moment (Cholesky).

    Args:
        moment: mean of x x^T (i, i) over the inputs.

    Raises:
        DataError: moments that no inputs have.
    """
    made = {"dtype": torch.float32 if weight.device.type == "mps" else torch.float64, "device": weight.device}
    start, h = weight.to(**made), moment.to(**made, copy=True)  # type: ignore[call-overload]
    w, diagonal = start.clone(), h.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1
    w[:, unused] = 0
    diagonal += DAMP * diagonal.mean()
    try:
        h = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except RuntimeError as error:  # also torch.linalg.LinAlgError
        raise DataError(
            f"SparseGPT inverts the second moments of a projection's inputs, and these have no inverse ({error}). Look for NaN "
            "or Inf in the samples and in the backbone."
        ) from error
    mask = torch.ones_like(w, dtype=torch.bool)
    width = COLUMNS if pattern is None else max(pattern[1], COLUMNS - COLUMNS % pattern[1])
    for left in range(0, w.shape[1], width):
        right = min(left + width, w.shape[1])
        block, inverse = w[:, left:right].clone(), h[left:right, left:right]
        strength, errors = inverse.diagonal().square(), torch.zeros_like(block)
        if pattern is None:
            gone = round(sparsity * len(w) * right) - round(sparsity * len(w) * left)
            stays = _without_smallest((block.square() / strength).flatten(), gone).view(block.shape)
        else:
            stays = torch.ones_like(block, dtype=torch.bool)
        for column in range(right - left):
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                stays[:, group] = _without_smallest_of_each(block[:, group].square() / strength[group], pattern[0])
            errors[:, column] = torch.where(stays[:, column], 0.0, block[:, column]) / inverse[column, column]
            after = slice(column + 1, None)
            block[:, after] -= torch.outer(errors[:, column], inverse[column, after])
        w[:, left:right], mask[:, left:right] = block, stays
        w[:, right:] -= errors @ h[left:right, right:]
    return mask, (w - start).masked_fill_(~mask, 0).float()


@dataclass(frozen=True)
class Pruning:
    """A way to prune points."""

    method: str  # whose errors these are
    criterion: str  # of CRITERIA
    sparsity: float
    pattern: tuple[int, int] | None

    @property
    def seen(self) -> str | None:
        """What must be known of a point's inputs (a reduction of `zoo.capture`); None: nothing."""
        return {"wanda": "channel_norm", "sparsegpt": "moment"}.get(self.criterion)

    def without_data(self, point: LinearPoint) -> Tensor:
        """The mask (o, i) of what is known without data: all true where the criterion needs some.

        Raises:
            AttachError: a weight that cannot be pruned, or not so. DataError: one that is not finite.
        """
        weight, module = point.weight, point.module
        if "weight" not in module._parameters:
            raise AttachError(
                f"'{self.method}' prunes weights, and that of '{point.name}' is kept in another form "
                f"({type(module).__name__}). Prune first, quantise then."
            )
        if self.pattern is not None and point.dim_in % self.pattern[1]:
            raise AttachError(
                f"'{self.method}': '{point.name}' reads {point.dim_in} channels, which groups of {self.pattern[1]} do not "
                "divide. Use another pattern, or leave it out of the targets."
            )
        if "weight_mask" not in module._buffers and self.criterion == "given":
            raise AttachError(
                f"'{self.method}' with criterion='given' keeps the zeros of a sparse backbone, and the weight of "
                f"'{point.name}' is not sparse. Use zoo.sparsify(model, ...) first, or another criterion."
            )
        mask = torch.ones_like(weight, dtype=torch.bool)
        if not weight.is_meta and self.criterion in ("magnitude", "random"):
            drawn = self.criterion == "random"
            mask = self._largest(point, torch.rand(weight.shape).to(weight.device) if drawn else weight.abs())
        return self._and_given(point, mask)

    def by_data(self, point: LinearPoint, seen: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mask (o, i), and the change of what stays if there is one.

        Args:
            seen: lengths of the input channels (i,), or second moments (i, i).

        Raises:
            DataError: numbers that are not finite.
        """
        weight, seen = point.weight, seen.to(point.weight.device)
        if self.criterion == "wanda":
            return self._and_given(point, self._largest(point, weight.float().abs() * seen)), None
        mask, change = sparsegpt(weight, seen, self.sparsity, self.pattern)
        return self._and_given(point, mask), change

    def _largest(self, point: LinearPoint, scores: Tensor) -> Tensor:
        if not bool(scores.isfinite().all()):
            raise DataError(
                f"{self.method}: the weight or the inputs of '{point.name}' hold numbers that are not finite."
            )
        if self.pattern is None and round(self.sparsity * scores.numel()) == scores.numel():
            raise AttachError(
                f"'{self.method}': a sparsity of {self.sparsity!r} leaves none of the {scores.numel():,} entries of "
                f"'{point.name}'. Take less."
            )
        return largest(scores, self.sparsity, self.pattern)

    @staticmethod
    def _and_given(point: LinearPoint, mask: Tensor) -> Tensor:
        """What is zero in a sparse backbone stays so."""
        zeros = zeros_of(point)
        return mask if zeros is None else mask & zeros
