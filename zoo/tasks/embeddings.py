"""Metrics of embeddings: retrieval and verification, over everything that was seen, on all processes.

s_ij = <z_i, z_j> / |z_i| |z_j|                                cosine of two embeddings
recall@k = share of items i with an item of the same identity among the k largest s_ij, j != i
           (items whose identity occurs once are left out)
nmi = I(identities; clusters) / mean of their entropies, of k-means with as many clusters as there are identities
pairs {i < j}; a threshold t accepts the pairs with s_ij >= t:
FAR(t): share of pairs of two identities that are accepted;  TAR(t): of one identity
tar@f = the largest TAR(t) with FAR(t) <= f;   eer = FAR(t) where FAR(t) = 1 - TAR(t), between thresholds the mean of both
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_roc

from zoo.errors import MissingPackageError

__all__ = ["Clusters", "Embeddings", "RecallAt", "Verification"]


class Embeddings(Metric):
    """Keeps embeddings (n, d) of length 1 and identities (n,)."""

    full_state_update = False
    embeddings: list[Tensor]
    identities: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("identities", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: (B, d), (B,)."""
        self.embeddings.append(F.normalize(outputs.detach().float(), dim=-1))
        self.identities.append(targets)

    def everything(self) -> tuple[Tensor, Tensor]:
        """(n, d), (n,)."""
        kept: list[Any] = [self.embeddings, self.identities]
        z, own = (torch.cat(x) if isinstance(x, list) else x for x in kept)  # joined already, on several processes
        return z, own


class RecallAt(Embeddings):
    """recall@k."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def compute(self) -> Tensor:
        """A share, 0..1; NaN if no identity occurs twice."""
        z, own = self.everything()
        hits = []
        for start in range(0, len(z), 1024):
            scores = z[start : start + 1024] @ z.T
            rows = torch.arange(len(scores), device=z.device)
            same = own[start : start + 1024, None] == own[None, :]
            scores[rows, start + rows] = float("-inf")
            same[rows, start + rows] = False
            near = scores.topk(min(self.k, len(z) - 1), dim=1).indices
            hits.append(same.gather(1, near).any(1)[same.any(1)])
        return torch.cat(hits).float().mean()


class Clusters(Embeddings):
    """nmi, with scikit-learn's k-means (10 starts, seed 0)."""

    def __init__(self) -> None:
        super().__init__()
        try:
            import sklearn.cluster  # noqa: F401
        except ImportError as error:
            raise MissingPackageError("nmi clusters with scikit-learn: pip install 'adapter-zoo[demo]'.") from error

    def compute(self) -> Tensor:
        """0..1; NaN if there are fewer than two identities."""
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score

        z, own = self.everything()
        count = len(own.unique())
        if count < 2:
            return torch.tensor(float("nan"))
        found = KMeans(count, n_init=10, random_state=0).fit_predict(z.double().cpu().numpy())
        return torch.tensor(float(normalized_mutual_info_score(own.cpu().numpy(), found)))


class Verification(Embeddings):
    """eer and tar@f."""

    rates = (0.1, 0.01, 0.001)

    def compute(self) -> dict[str, Tensor]:
        """Shares, 0..1."""
        z, own = self.everything()
        i, j = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
        # similarities are compared and not taken for probabilities: moved into [0, 1], where nothing is squashed
        scores = (((z @ z.T)[i, j] + 1) / 2).clamp(0, 1)
        far, tar, _ = binary_roc(scores, (own[i] == own[j]).long())
        at = (far - (1 - tar)).abs().argmin()
        found = {"eer": (far[at] + 1 - tar[at]) / 2}
        return found | {f"tar@{rate:g}": tar[far <= rate].max() for rate in self.rates}
