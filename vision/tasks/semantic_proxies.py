"""The task "semantic-proxies": metric learning with proxies that prompts read from the images of a class (VPT-SP).

The model is a ViT with the adapter `vpt-sp`, which embeds images: z_i = h(x_i; P). In each training step the same images pass
again, with the prompts Q of their class in the place of P (in the first `depth` blocks, `tokens` each), and a head of its own:

    s_i   = l2(h'(x_i; Q_{y_i}))                        (e,)      what image i says of its class
    h     <- GRU(s_i, h), i over the images of class c, h from C_c;   C_c <- h / |h|        C (K, e) the container
    p_c   = l2(b P_c + (1 - b) C_c)                     P (K, e) learned, b = bias_ratio
    loss  = proxy anchor of (z_i, p_c) over all K classes, both terms divided by K (`zoo.tasks.proxy_anchor`)

    GRU(s, h):  u = sig(s W_iz + h W_hz + b_z),  r = sig(s W_ir + h W_hr + b_r),
                n = ReLU(s W_in + r * (h W_hn) + b_n),  h' = (1 - u) n + u h

After a step C holds numbers, no graph; it is part of the checkpoint. In evaluation images are embedded and proxies are not
asked, so classes may be others. Images of a class are taken in the order of the batch, wherever they stand in it.

Initial values: Q_j (K, tokens, d) Xavier-normal for a tensor of three dimensions, h' and GRU Xavier-uniform with zero biases, P
and C Xavier-uniform / 8, C then of unit rows. Defaults: tokens = 5, depth = 4, step = 0, b = 0.4, no dropout behind the GRU. CUB
as the authors ran it is step = 5: class prompts in block 0 alone. For Stanford Online Products depth = 8, b = 0.2, dropout = 0.5.
Counts, K = 100, ViT-B/16, e = 512: head 395,264, GRU 1,574,400, Q 1,536,000, P 51,200; with adapter and head 4,239,360 are
trained, and 682,496 of them are published. The authors' code counts 4,239,872: their GRU has a vector W_ia (e, 1) of 512 that
nothing reads.
Source: Ren, Chen, Wang, Hua, ICLR 2024 (see `vision.adapters.vpt_sp`); Noahsark/ParameterEfficient-DML, `proxy_data_range:
both_all`, `semantic_mix_type: gru_relu`.
Deviations:
- Their container is a plain tensor: neither saved nor moved with the model. Here it is a buffer.
- They want each batch sorted by class, with equally many images of each; here any batch will do. On theirs both agree.
- In CUB's configuration step = 5 leaves blocks 1 to 3 of the second pass without prompts, whose 1,152,000 parameters are there
  and get no gradient. Here prompts that no block takes are not made.
- Their bank, which keeps prompts and the optimizer's state of many classes on the CPU, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.adapters.vpt_sp import COUNTS, PROMPTS, VPTSP
from zoo.errors import ConfigError
from zoo.heads.embedding import EmbeddingHead
from zoo.registry import register_task
from zoo.tasks.base import call
from zoo.tasks.proxy_anchor import MetricLearning, proxy_anchor

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["SemanticProxies"]


class GRU(nn.Module):
    """The cell above, with matrices as (in, out)."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        for gate in "zrn":
            for side in "ih":
                weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, width)))
                self.register_parameter(f"w_{side}{gate}", weight)
            self.register_parameter(f"b_{gate}", nn.Parameter(torch.zeros(width)))
        self.drop = nn.Dropout(dropout)

    def forward(self, s: Tensor, h: Tensor) -> Tensor:
        """s (n, e), h (n, e) -> (n, e)."""
        own: Any = self
        update = torch.sigmoid(s @ own.w_iz + h @ own.w_hz + own.b_z)
        reset = torch.sigmoid(s @ own.w_ir + h @ own.w_hr + own.b_r)
        new = F.relu(s @ own.w_in + reset * (h @ own.w_hn) + own.b_n)
        return self.drop((1 - update) * new + update * h)


class ProxyNet(nn.Module):
    """Class prompts, head, GRU, learned proxies and container."""

    container: Tensor

    def __init__(
        self, classes: int, dims: tuple[int, int, int], counts: list[int], tokens: int, dropout: float
    ) -> None:
        super().__init__()
        tokens_dim, features, width = dims
        std = math.sqrt(2 / ((tokens + classes) * tokens_dim))  # fan in tokens d, fan out classes d
        self.prompts = nn.ParameterList([std * torch.randn(classes, n, tokens_dim) for n in counts])
        self.head = EmbeddingHead(features, width)
        self.gru = GRU(width, dropout)
        self.proxies = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, width)) / 8)
        rows = nn.init.xavier_uniform_(torch.empty(classes, width))
        self.register_buffer("container", F.normalize(rows, dim=-1))

    def of_classes(self, labels: Tensor) -> Tensor:
        """The prompts (B, sum of counts, d) of each item's class."""
        return torch.cat([prompts[labels] for prompts in self.prompts], dim=1)

    def forward(self, features: Tensor, labels: Tensor, bias_ratio: float) -> Tensor:
        """Pooled features (B, d) of the second pass, labels (B,) -> proxies (K, e) of length 1; the container is updated."""
        s = self.head(features).to(self.container.dtype)
        order = labels.argsort(stable=True)
        classes, sizes = labels[order].unique_consecutive(return_counts=True)
        first = sizes.cumsum(0) - sizes
        h = self.container[classes]
        for turn in range(int(sizes.max())):
            slots = (sizes > turn).nonzero()[:, 0]  # classes with an image for this turn
            h = h.index_copy(0, slots, self.gru(s[order[first[slots] + turn]], h[slots]).to(h.dtype))
        rows = self.container.index_copy(0, classes, F.normalize(h, dim=-1))
        self.container = rows.detach()
        return F.normalize(bias_ratio * self.proxies + (1 - bias_ratio) * rows, dim=-1)


@register_task("semantic-proxies")
@dataclass
class SemanticProxies(MetricLearning):
    """Metric learning with semantic proxies.

    Args:
        tokens: prompts of each class in front of the first block. step: how many fewer each further block has.
        depth: how many blocks have them.
        bias_ratio: b, the share of the learned part of a proxy.
        dropout: behind the GRU, while training.
        scale, margin: of the proxy anchor loss.
    """

    tokens: int = 5
    depth: int = 4
    step: int = 0
    bias_ratio: float = 0.4
    dropout: float = 0.0
    scale: float = 32.0
    margin: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fits, expected in (
            ("tokens", self.tokens >= 1, "1 or more"),
            ("depth", self.depth >= 1, "1 or more"),
            ("step", self.step >= 0, "0 or more"),
            ("bias_ratio", 0 <= self.bias_ratio < 1, "0 to below 1: with 1 nothing is left of what images say"),
            ("dropout", 0 <= self.dropout < 1, "0 to below 1"),
            ("scale", self.scale > 0, "a number above 0"),
        ):
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {expected}.")

    @property
    def counts(self) -> list[int]:
        """Class prompts of each block that has some."""
        return [n for i in range(self.depth) if (n := self.tokens - i * self.step) > 0]

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model embeds with `vpt-sp`, whose blocks can take these class prompts."""
        super().check(model, dataset, what)
        if what != "training data":
            return
        widths = _branch(model).widths(model.points)
        if len(self.counts) > len(widths) or len(set(widths[: len(self.counts)])) > 1:
            raise ConfigError(
                f"Class prompts in {len(self.counts)} blocks, and vpt-sp has prompts in {len(widths)} blocks, of the widths "
                f"{widths}. Choose a smaller depth: it must end before the width changes."
            )

    def proxies(self, model: Host) -> nn.Module:
        """`ProxyNet`.

        Raises:
            ConfigError: several processes, each of which would have a container of its own.
        """
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        if spread and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "semantic-proxies keeps one container of what the images of each class said, and several processes would have "
                "one each. Train in one process."
            )
        first = _branch(model).widths(model.points)[0]
        dims = (first, model.family.feature_dim, self.width(model))
        return ProxyNet(self.classes, dims, self.counts, self.tokens, self.dropout)

    def of_proxies(self, model: Host, z: Tensor, inputs: Any, labels: Tensor) -> Tensor:
        """A second pass with the class prompts, its proxies, and the proxy anchor loss."""
        own: Any = self.own
        given = {PROMPTS: own.of_classes(labels), COUNTS: tuple(self.counts)}
        proxies = own(call(model.features, inputs, context=given), labels, self.bias_ratio)
        return proxy_anchor(z, proxies, labels, self.scale, self.margin, present=False)


def _branch(model: Host) -> VPTSP:
    """The image branch in use; raises ConfigError if there is none."""
    found = [a for n in model.active if isinstance(a := model.adapters[n], VPTSP)]
    if len(found) != 1:
        raise ConfigError(
            f"'semantic-proxies' trains the adapter 'vpt-sp', and the model uses {', '.join(model.active) or 'none'}. Load it "
            "with adapter='vpt-sp'; plain VPT or LoRA are trained by the task 'proxy-anchor'."
        )
    return found[0]
