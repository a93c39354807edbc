"""MEET's control adapters: for each quality of an answer a small adapter of its own, chosen for each sample of a batch.

Idea: what people liked and disliked are both learned, each by a control c of its own; asked for an answer, the network is given
the control of the quality that is wanted.
Points: `tokens` in front of the first block (form "prompt"), or `linear` (form "lora").

    prompt:  x <- [P_c ; x]                                P (C, T, d): C qualities, T tokens, in front of the sequence
    lora:    y = W x + b + (alpha / r) B_c A_c x           A (C, r, i), B (C, o, r)

c is the quality of the sample: `model(x, context={"quality": ["good", "bad", "good"]})`, one name for all samples, or what the
regime `meet` says while training. A batch of mixed qualities is one pass, and gives what the batches of one quality give. With
one quality alone nothing has to be said; with several a pass without it is refused. Prompts stay in the sequence as words do:
they take part in an average over the tokens, and a decoder reads them in the output of the encoder.

`model.adapters["meet"].extract(model, "good")` attaches one control as a plain `vpt` or `lora`, which needs no context.

P ~ N(0, 0.02^2); A ~ Kaiming-uniform(a = sqrt 5), B = 0: controls of "lora" start as the pretrained function, to the bit.
Defaults: prompts of 10 tokens; r = 8, alpha = r on q and v; ours, since the paper's are not published.
Counts: C T d (VL-T5, good and bad: 15,360), or C r (i + o) for each point.
Source: Xue, Wang and Ji, "Parameter-Efficient Tuning Helps Language Model Alignment", 2023 (arXiv 2310.00819). There is no code;
what is here follows the abstract and what its public reviews tell. The two stages of training are the regime `meet`.
Deviations: none that is known; how the paper starts its prompts is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.adapters.base import Adapter
from zoo.adapters.parts.low_rank import check_rank
from zoo.errors import AttachError, UnknownNameError, nearest
from zoo.host import Host
from zoo.points import LinearPoint, Points, TokensPoint
from zoo.registry import register_adapter

STD = 0.02


class ControlPrompt(nn.Module):
    """P (C, T, d), one set of tokens for each quality; `quality` is None if there is one alone."""

    def __init__(self, count: int, num_tokens: int, dim: int, quality: Any) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(count, num_tokens, dim).normal_(0, STD))
        self.quality = quality

    def forward(self, batch: int) -> Tensor:
        """(1, T, d), or (batch, T, d): the tokens of each sample's quality."""
        return self.prompt if self.quality is None else self.prompt[self.quality.get()]


class ControlLowRank(nn.Module):
    """`x (n, ..., i) -> scale * B_c A_c x (n, ..., o)`, c of the sample that each of the n rows belongs to."""

    def __init__(self, count: int, dim_in: int, dim_out: int, rank: int, scale: float, quality: Any) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(count, rank, dim_in))
        self.lora_b = nn.Parameter(torch.zeros(count, dim_out, rank))
        for one in self.lora_a.data:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))
        self.scale, self.quality = scale, quality

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        a: Tensor = self.lora_a
        b: Tensor = self.lora_b
        if self.quality is not None:
            chosen = self.quality.rows(x)
            a, b = a[chosen], b[chosen]
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # (n, tokens, i)
        delta = (rows @ a.to(x.dtype).mT) @ b.to(x.dtype).mT
        return self.scale * delta.view(*x.shape[:-1], delta.shape[-1])


@register_adapter("meet")
@dataclass
class Meet(Adapter):
    """Controls for qualities.

    Args:
        qualities: their names, the one that is wanted first.
        form: "prompt" or "lora".
        num_tokens: T. rank: r. alpha: numerator of the scale; None sets it to the rank.
        targets: of "lora", roles or names of linear points, None: q and v (of a language model with eyes those of its language,
            since the images of all samples stand together in its eyes); of "prompt", tokens points, None: those in front of the
            first block of each tower.
    """

    qualities: tuple[str, ...] = ("default",)
    form: Literal["prompt", "lora"] = "prompt"
    num_tokens: int = 10
    rank: int = 8
    alpha: float | None = None
    targets: str | tuple[str, ...] | None = None

    default_lr = 1e-3
    paper = "Xue, Wang and Ji 2023"
    taxonomy = "additive"
    identity = False
    merges = False
    unmerged = (
        "which control acts is decided for each sample. Take one out as a plain adapter, model.adapters['meet'].extract(model, "
        "'good'), and use that; one of the form 'lora' can be merged."
    )
    trial = {"num_tokens": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.qualities = tuple(self.qualities)
        self.check(bool(self.qualities) and all(self.qualities), "qualities is empty, or one has an empty name.")
        twice = sorted({name for name in self.qualities if self.qualities.count(name) > 1})
        self.check(not twice, f"qualities names '{''.join(twice[:1])}' twice; name each once.")
        self.check(self.form in ("prompt", "lora"), f"form is {self.form!r}; expected 'prompt' or 'lora'.")
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any] | None:
        """As many tokens."""
        return {"num_tokens": size}

    def attach(self, points: Points) -> None:
        """Prompts in front of the first block, or a change of every selected projection."""
        points.require("tokens" if self.form == "prompt" else "linear", f"meet (form '{self.form}')")
        count, quality = len(self.qualities), None
        if count > 1:
            quality = points.context("quality", choices=self.qualities, example=self.qualities[0])
        if self.form == "lora":
            check_rank(self, ((linear, self.rank) for linear in self._linears(points)))
            for linear in self._linears(points):
                scale = self._alpha / self.rank
                linear.add(ControlLowRank(count, linear.dim_in, linear.dim_out, self.rank, scale, quality))
            return
        for point in self._tokens(points):
            point.prompt(ControlPrompt(count, self.num_tokens, point.dim_in, quality), keep=True, pooled=True)

    @property
    def _alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    def _linears(self, points: Points) -> list[LinearPoint]:
        if self.targets is None:
            return points.by_sample().linears(("q", "v"), ("q", "v"))
        found = points.linears(self.targets)
        if together := next((p for p in found if not p.by_sample), None):
            raise AttachError(
                f"'meet' has a control for each sample, and at '{together.name}' of {points.backbone} the images of all samples "
                "stand together. Leave targets out, or name points of the language ('text.**.attn.{q,v}')."
            )
        return found

    def _tokens(self, points: Points) -> list[TokensPoint]:
        if self.targets is not None:
            return points.select(self.targets, kind="tokens")  # type: ignore[return-value]
        return [p for p in points.select(kind="tokens") if p.first]  # type: ignore[attr-defined, misc]

    def extract(self, model: Host, quality: str, name: str | None = None) -> str:
        """Attach the control of one quality to the model as a plain `vpt` or `lora` (switched off); its name in the model.

        Raises:
            UnknownNameError: this adapter has no such quality.
        """
        if quality not in self.qualities:
            raise UnknownNameError(f"'{self.method}' has no quality '{quality}'. {nearest(quality, self.qualities)}")
        row = self.qualities.index(quality)
        settings: dict[str, Any] = {"num_tokens": self.num_tokens, "deep": False, "pool": "all"}
        if self.form == "lora":
            own = [point.name for point in self._linears(model.points)]
            settings = {"rank": self.rank, "alpha": self._alpha, "targets": own}
        plain = registry.adapter("vpt" if self.form == "prompt" else "lora", **settings)
        if name is None and quality != "default":  # which is no name for an adapter
            name = quality
        mine = dict(self.named_parameters())
        with model.all_or_nothing(), torch.no_grad():
            twin = model.add_adapter(plain, name, activate=False)
            for key, parameter in twin.named_parameters():
                parameter.copy_(mine[key][row])
        return next(n for n, one in model.adapters.items() if one is twin)
