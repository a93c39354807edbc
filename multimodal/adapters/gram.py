"""GRAM: prompts start from meta-learned values, and their gradients are rewritten by a regulator that was learned with them.

Idea: what a few examples say of one domain should help in another one. The start of the prompts, and a function that rewrites
their gradients, are learned together so that a step on one cluster of image-text pairs lowers the loss of a different one.
Points: none of its own; it stands around adapters that have attached before (`regulate`).

    theta' = theta - a R(g_S),  R(g) = (1 + s) g,  g_S = grad L_S(theta)        s (d,) for each tensor of prompts, or its shape
    (theta, s) <- (theta, s) - b grad L_Q(theta')                               `multimodal.tasks.gram`, by an ordinary fit

s = 0, so it starts as MAML. After the meta-training s is frozen, and every further fit of the prompts has its gradients rewritten
by R in front of the optimizer; a second meta-training is refused until `learn_again` has said that s shall go on from what it
is. The function that the model computes is never changed.

    model = zoo.load("clip-micro", "coop", classes=names)
    regulate(model, "coop")
    zoo.fit(model, pairs, task=Meta("classify"), sampler=Episodes(...), batch_size=64, accumulate=4)
    zoo.fit(model, few)                                                         few examples, as ever

Defaults: a = 1e-2, b = 1e-3, gradients exact to the second order (`Meta(first_order=True)`: without the term through g_S).
Counts: d for each tensor (CoOp of CLIP ViT-B: theta 2,048 with M = 4, s 512), or with `each_entry` as many as theta.
Source: Li et al., "Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models", ICCV 2023
(arXiv 2303.06571). There is no code of the authors.
Deviations: what is public of the paper has neither the form of R nor settings; the diagonal R and the defaults are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.errors import AttachError, ConfigError, UnknownNameError, nearest
from zoo.points import Points
from zoo.registry import adapter, register_adapter

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["GRAM", "regulate"]


@register_adapter("gram")
@dataclass
class GRAM(Adapter):
    """A gradient regulator around other adapters; `regulate` makes one.

    Args:
        each_entry: a factor for each entry of a tensor, instead of one for each of its last dimension.
    """

    each_entry: bool = False

    stateless = True
    default_lr = 1e-3
    paper = "Li et al. 2023"
    looks_back = True
    taxonomy = "system"
    merges = False
    trial_families = ()

    def attach(self, points: Points) -> None:
        """s of every tensor that the plan names."""
        if self.plan is None:
            raise AttachError(
                f"'gram' stands around another adapter of {points.backbone}: multimodal.adapters.gram.regulate(model, 'coop') "
                "puts it there."
            )
        shapes = self.plan.get("shapes")
        ok = isinstance(shapes, dict) and bool(shapes) and all(_shape(s) for s in shapes.values())
        self.check(ok, f"its plan is {self.plan!r:.80}; expected the shapes of the tensors that it regulates.")
        session: Any = points.session
        for name, shape in shapes.items():  # type: ignore[union-attr]
            scale = nn.Parameter(torch.zeros(shape), requires_grad=not self.plan.get("done"))
            session.keep(None, f"{name}.scale", scale)

    def regulated(self, model: Host) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """Each tensor that is regulated: its name, the module that holds it, under what, and its s."""
        own = dict(self.named_parameters())
        assert self.plan is not None
        for name in self.plan["shapes"]:
            around, _, rest = name.partition(".")
            place, _, last = rest.rpartition(".")
            if around not in model.adapters:
                raise ConfigError(
                    f"'gram' regulates '{around}', which the model has not (any more). Remove 'gram', too."
                )
            node: Any = model.adapters[around]
            holder = node.get_submodule(place) if place else node
            if last not in holder._parameters:
                raise ConfigError(f"'gram' regulates '{name}', which '{around}' has not any more. Regulate it anew.")
            yield name, holder, last, own[f"{name}.scale"]

    def after_backward(self, model: Host, step: int) -> None:
        """R, unless s itself is learned in this fit."""
        if any(p.grad is not None for p in self.parameters()):
            self._meta = True
            return
        with torch.no_grad():
            for _, holder, last, scale in self.regulated(model):
                gradient = holder._parameters[last].grad  # type: ignore[union-attr]
                if gradient is not None:
                    gradient.mul_(1 + scale)

    def fit_end(self, model: Host) -> None:
        """What was learned is kept from now on."""
        if getattr(self, "_meta", False) and self.plan is not None:
            self._meta = False
            self.plan = {**self.plan, "done": True}
            self.requires_grad_(False)

    def learn_again(self) -> None:
        """s is trained by the next meta-training, from what it is, and rewrites no gradients until that is over."""
        if self.plan is not None:
            self.plan = {**self.plan, "done": False}
            self.requires_grad_(True)

    @property
    def learned(self) -> bool:
        """Whether a meta-training is over, and s rewrites gradients."""
        return self.plan is not None and bool(self.plan.get("done"))


def regulate(model: Host, around: str | Sequence[str], *, each_entry: bool = False, name: str | None = None) -> GRAM:
    """Put a regulator around attached adapters, and use it beside them.

    Raises:
        UnknownNameError: no such adapter. ConfigError: one that trains nothing.
    """
    shapes: dict[str, list[int]] = {}
    for one in [around] if isinstance(around, str) else list(around):
        if one not in model.adapters:
            raise UnknownNameError(f"The model has no adapter '{one}'. {nearest(one, list(model.adapters))}")
        found = [(k, p) for k, p in model.adapters[one].named_parameters() if p.requires_grad]
        if not found:
            raise ConfigError(f"'{one}' trains nothing, so there is no gradient to regulate.")
        shapes |= {f"{one}.{k}": list(p.shape if each_entry else p.shape[-1:]) for k, p in found}
    made = adapter("gram", each_entry=each_entry)
    made.plan = {"shapes": shapes}
    added: Any = model.add_adapter(made, name)  # type: ignore[attr-defined]
    return added  # type: ignore[no-any-return]


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 < n <= 1 << 24 for n in value)
