"""Conformer adapter: the convolution module of the Conformer, narrow, beside or behind sublayers.

Idea: tokens of a spectrogram belong to their neighbours; so the bottleneck mixes them by a convolution along the sequence, one
kernel for each of its c channels, between the map down (with a gate) and the map up.
Points: `sublayer`, by default the MLPs ("Pfeiffer"); `targets=("attn", "mlp")` is their "Houlsby".

    A(x) = W_2 silu(BN(k * glu(W_1 LN(x) + b_1) + b_k)) + b_2       W_1 (2c, d), k (c, K), W_2 (d, c)

| form         | place    | computes for the sublayer `h = F(x)`, x = LN u | of the paper        |
| ------------ | -------- | ---------------------------------------------- | ------------------- |
| `parallel`   |          | `u + h + A(x)`                                 | parallel (default)  |
| `sequential` | `after`  | `u + h + A(h)`                                 | sequential          |
| `sequential` | `before` | `u + F(x + A(x))`                              | see the deviations  |

`k *` runs over all tokens in their order, class tokens in front, a grid row by row (of AST: along the time, then the next band),
with K // 2 zeros at both ends. `residual` says whether A's own input is added besides: by default behind or in front of a
sublayer, not beside it, which the paper found best in both cases. BN is a batch normalisation: over all tokens of the batch
while training, with running statistics (momentum 0.1) in evaluation. b_k only moves its mean, so in training its gradient is
rounding alone.

Defaults: c = d / 96, K = 31, parallel, MLPs. AdamW, 5e-3, weight decay 0.1, cosine (the study's betas are (.9, .98): `zoo run
ast-study` has them, `zoo.fit` by optimizer_options). The study also trains the norm in front of each adapted sublayer and the
last one, `zoo.adapter("norm", targets=("blocks.*.norm2", "norm*"))` beside it.
Count: 2d + 2c(d + 1) + c(K + 1) + 2c + d(c + 1) for each point. AST: c = 8 252,288 (0.29 %), c = 12 364,608; norms 19,968 more.
Source: Cappellazzo, Falavigna, Brutti, Ravanelli, "Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers",
MLSP 2024 (umbertocappellazzo/PETL_AST, `src/AST_adapters.py`); Gulati et al., "Conformer", Interspeech 2020.
Deviations:
- Their module computes LN(x) and then goes on with x, so that its LN is never trained though it is counted. Here it is used;
  `norm=False` leaves it out, which is the function that their code computes (233,856 parameters).
- They start W_2 at random, here it is zero: the pretrained function, to the bit.
- Their "sequential before" is F(A(x)) + A(x), in which nothing of x reaches F but through c channels; here x stays.

Mixed are the tokens that run through the block: the prompts of one block alone (`vpt`, deep) are not among them, and those that
only query (`vqt`) are mixed among themselves.

What one sample gives depends on the others of its batch while training. So a batch of per-sample adapters is refused then, and so
are several processes (zoo.fit's, and any process group) and accumulated parts, whose statistics would be others;
`batch_norm=False` allows all three. A block that is run again for backward does not move the running statistics a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from audio.adapters.parts.whole import check_whole
from zoo import Adapter, Points, SublayerPoint, register_adapter
from zoo.adapters.parts.bottleneck import width_at
from zoo.engine.memory import in_backward, recomputable
from zoo.errors import ConfigError

MOMENTUM = 0.1


class Moments(nn.Module):
    """Batch normalisation of (B, c, N) over B and N; the running statistics move once for each forward pass in training mode.

    Held, as in an adapter that is not trained: by the running statistics, which stay as they are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.was_held = False

    def forward(self, x: Tensor, held: bool = False) -> Tensor:
        """(B, c, N) -> (B, c, N).

        Raises:
            ConfigError: training in one of several processes.
        """
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        # Run again in backward (memory="low", "min"), it is no further pass, and what is trained may have changed since.
        again = not torch.compiler.is_compiling() and in_backward()
        if again:
            held = self.was_held
        elif not torch.compiler.is_compiling():
            self.was_held = held
        if held or not self.training:
            return F.batch_norm(wide, self.mean, self.variance, self.weight, self.bias).to(x.dtype)
        if not again:
            if (count := _processes()) > 1:
                raise ConfigError(
                    f"'conformer' normalises over the batch, of which each of these {count} processes sees its part alone, and "
                    "would keep statistics of its own. Train in one process, or set batch_norm=False."
                )
            with torch.no_grad():
                variance, mean = torch.var_mean(wide, dim=(0, 2))
                self.mean.lerp_(mean.to(self.mean.dtype), MOMENTUM)
                self.variance.lerp_(variance.to(self.variance.dtype), MOMENTUM)
        return F.batch_norm(wide, None, None, self.weight, self.bias, training=True).to(x.dtype)


class Convolution(nn.Module):
    """`x (B, ..., d) -> A(x)`, plus x itself if `residual`."""

    def __init__(self, dim: int, rank: int, kernel: int, *, norm: bool, batch_norm: bool, residual: bool) -> None:
        super().__init__()
        self.adapter_norm = nn.LayerNorm(dim) if norm else None
        self.adapter_down = nn.Linear(dim, 2 * rank)
        self.adapter_conv = nn.Conv1d(rank, rank, kernel, padding=kernel // 2, groups=rank)
        self.moments = Moments(rank) if batch_norm else None
        self.adapter_up = nn.Linear(rank, dim)
        for zero in (self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(zero)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d); a grid (B, H, W, d) is read row by row."""
        inner = x if self.adapter_norm is None else recomputable(self.adapter_norm, x)
        gated = F.glu(self.adapter_down(inner))  # (B, ..., c)
        mixed = self.adapter_conv(gated.flatten(1, -2).transpose(1, 2))  # (B, c, N)
        if self.moments is not None:
            mixed = self.moments(mixed, held=not _trained(self))
        out = self.adapter_up(F.silu(mixed).transpose(1, 2)).view_as(x)
        return x + out if self.residual else out


def _processes() -> int:
    """That train together, each on rows of its own; 1 while a graph is compiled, which cannot ask."""
    if torch.compiler.is_compiling() or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@register_adapter("conformer")
@dataclass
class Conformer(Adapter):
    """Conformer adapters.

    Args:
        reduction: c = d / reduction at each point (at least 1). rank: instead, c itself.
        kernel: K, an odd number of tokens.
        form: "parallel" or "sequential". place: of the sequential form: "after" or "before" the sublayer.
        targets: roles or names of sublayer points; None takes all.
        residual: whether A's own input is added; None: as the form has it.
        norm: with the LN in front of W_1. batch_norm: with BN.
    """

    reduction: float = 96.0
    rank: int | None = None
    kernel: int = 31
    form: Literal["parallel", "sequential"] = "parallel"
    place: Literal["after", "before"] = "after"
    targets: str | tuple[str, ...] | None = "mlp"
    residual: bool | None = None
    norm: bool = True
    batch_norm: bool = True

    default_lr = 5e-3
    default_weight_decay = 0.1
    paper = "Cappellazzo et al. 2024"
    taxonomy = "additive"
    merges = False
    unmerged = (
        "it mixes tokens, which no weight of the backbone does. Keep the model as it is, or use a method that can be merged: "
        "lora, ssf, ia3, bitfit."
    )
    trial = {"reduction": 24.0, "kernel": 5}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual is None:  # filled in here, so that the settings that are saved are the ones in use
            self.residual = self.form == "sequential"
        self.check(self.reduction > 0, f"reduction is {self.reduction}; expected above 0.")
        self.check(self.rank is None or self.rank >= 1, f"rank is {self.rank}; expected 1 or more, or None.")
        self.check(
            self.kernel >= 1 and self.kernel % 2 == 1, f"kernel is {self.kernel}; expected an odd number of tokens."
        )
        self.check(
            self.form in ("parallel", "sequential"), f"form is {self.form!r}; expected 'parallel' or 'sequential'."
        )
        self.check(self.place in ("after", "before"), f"place is {self.place!r}; expected 'after' or 'before'.")
        self.check(
            self.form == "sequential" or self.place == "after",
            "place='before' is of the sequential form; the parallel one reads the sublayer's input as it is.",
        )

    @property
    def batch_wise(self) -> bool:
        """With batch normalisation."""
        return self.batch_norm

    def rank_at(self, dim: int) -> int:
        """c at a point of width `dim`."""
        return width_at(dim, self.rank, self.reduction)

    def attach(self, points: Points) -> None:
        """One module at every selected sublayer.

        Raises:
            AttachError: no sublayers, tokens of which some must not see those behind them, or of which the order is not known.
        """
        points.require("sublayer", "conformer")
        chosen: list[SublayerPoint] = points.select(self.targets, kind="sublayer")
        for point in chosen:
            check_whole(points, point, "'conformer' mixes each token with those around it", "'adapter'")
            module = Convolution(
                point.dim_out,
                self.rank_at(point.dim_out),
                self.kernel,
                norm=self.norm,
                batch_norm=self.batch_norm,
                residual=bool(self.residual),
            )
            if self.form == "parallel":
                point.parallel(module)
            elif self.place == "after":
                point.after(module)
            else:
                point.before(module)

    def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
        """Refuse what would make the statistics others.

        Raises:
            ConfigError: several processes, or a batch in parts.
        """
        self.check(
            not self.batch_norm or optimizer.parts == 1 or not _trained(self),
            f"it normalises over the batch, which here comes in {optimizer.parts} parts (accumulate, processes), each with "
            "statistics of its own. Train in one process without accumulate, or set batch_norm=False.",
        )
