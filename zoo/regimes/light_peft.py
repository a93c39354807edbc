"""Light-PEFT's procedure: a short phase says what of backbone and LoRA a task needs; the rest is trained without the others.

Phases: "estimate", the adapter `light-peft` with a coefficient for each head and neuron, its low-rank changes measured. Heads and
neurons are then taken out of the backbone (`zoo.prune`), the coefficients go, and modules and ranks of little importance, too.
"train" goes on from the values of what is left, a plain `lora`, and of the head, on the smaller network, with an optimizer and
a schedule of its own. That network is another model, `report.model`, with a backbone of its own (`zoo.save_backbone`); the given
model is left as it was estimated. Test data are measured behind both, and choose nothing.

Defaults: 800 steps of 32 samples at 3e-4, then 10 epochs at 3e-4; a third of heads and neurons go, 3/4 of the modules, and half
of the ranks. ViT-B/16 without a third of both: 57.5 of 85.8 M parameters, 0.67 x the operations.
Source: Gu et al., Findings of ACL 2024 (gccnlp/Light-PEFT, scripts/).
Deviations: see `zoo.adapters.light_peft`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zoo.model.lighter import check_whole
from zoo.model.pruning import prune
from zoo.regimes.base import Phase, Regime
from zoo.regimes.report import style
from zoo.regimes.work import Run
from zoo.registry import adapter, register_regime

__all__ = ["EarlyPruning"]

NAME, LEFT = "light-peft", "lora"


@register_regime("light-peft")
@dataclass(eq=False)
class EarlyPruning(Regime):
    """Estimate, prune, train.

    `zoo.run(model, "light-peft", data, test)`: a data set, a model without an adapter in use. `report.model` is the smaller one.

    Args:
        heads, neurons, modules, ranks: parts that go; 0 takes nothing of a kind.
        rank, alpha, targets, dropout, l1: of the adapter.
        steps: of the first phase. epochs: of the second. lr, batch_size: of both.
    """

    heads: float = 1 / 3
    neurons: float = 1 / 3
    modules: float = 0.75
    ranks: float = 0.5
    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.05
    l1: float = 1e-4
    steps: int = 800
    epochs: int = 10
    lr: float = 3e-4
    batch_size: int = 32

    paper = "Gu et al. 2024"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.steps >= 2, f"steps is {self.steps}; expected 2 or more: the second half of them is measured.")
        self.check(self.lr > 0, f"lr is {self.lr}; expected more than 0.")
        parts = ("heads", "neurons", "modules", "ranks")
        for name in parts:
            self.check(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; expected 0 <= {name} < 1.")
        self.check(
            any(getattr(self, name) for name in parts), f"{', '.join(parts)} are all 0: nothing would be pruned."
        )
        self._adapter()

    def _adapter(self) -> Any:
        names = ("rank", "alpha", "targets", "dropout", "l1")
        return adapter(NAME, **{name: getattr(self, name) for name in names})

    def prepare(self, run: Run) -> None:
        """One data set, a model without an adapter in use, and a backbone that can be pruned as asked."""
        self.check_data(run)
        self.check_unadapted(run, NAME, LEFT)
        if self.heads or self.neurons:
            type(run.model.family).surgery()
            check_whole(run.model, NAME)

    def phases(self, run: Run) -> Iterator[Phase]:
        """Estimate, prune, train."""
        common = {"lr": self.lr, "batch_size": self.batch_size}
        estimated: Any = run.model.add_adapter(self._adapter(), NAME)
        before = _counts(run.model)
        yield Phase("estimate", run.data, fit={**common, "steps": self.steps})
        if run.test is not None:
            run.evaluate(run.test, "estimated")
        decisions = run.once(
            "decisions",
            lambda: estimated.decisions(run.model, self.heads, self.neurons, self.modules, self.ranks),
        )
        parts = {"whole": estimated.sizes(run.model), "places": [n for n, p in estimated.parts().items() if p.low_rank]}
        run.model = smaller(run.model, decisions)
        run.once("sizes", lambda: {"before": before, "after": _counts(run.model), **parts})
        yield Phase("train", run.data, fit={**common, "epochs": self.epochs})
        if run.test is not None:
            run.evaluate(run.test, "test")

    def summary(self, run: Run) -> dict[str, Any]:
        """Parameters of backbone and adapter before and after, what was taken out, and the test's numbers."""
        found, sizes = run.values["decisions"], run.values["sizes"]
        stages = (("estimated", "estimated"), ("test", "test"))
        measured = {
            f"{name}_{n}": v
            for stage, name in stages
            for n, v in run.values.get(stage, {}).items()
            if n in ("accuracy", "loss")
        }
        return {
            **sizes,
            "backbone_left": sizes["after"]["backbone"] / sizes["before"]["backbone"],
            "heads_gone": {block: len(gone) for block, gone in found["heads"].items()},
            "neurons_gone": {block: len(gone) for block, gone in found["neurons"].items()},
            "ranks": {point: len(kept) for point, kept in found["ranks"].items()},
            **measured,
        }

    def table(self, report: Any) -> tuple[list[str], list[list[Any]]]:
        """Both phases."""
        s = report.summary
        rows = [("estimate", "before", "estimated"), ("train", "after", "test")]
        cells = [
            [name, s[key]["backbone"], s[key]["adapter"], s.get(f"{stage}_accuracy", "")] for name, key, stage in rows
        ]
        return ["phase", "parameters of the backbone", "of the low-rank change", "accuracy"], cells

    def draw(self, figure: Any, report: Any) -> None:
        """Ranks that stay at each projection, and heads and neurons that go, by block."""
        s = report.summary
        names = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in s["places"]]
        blocks = list(dict.fromkeys(_block(s, name) for name in s["places"]))
        roles = list(dict.fromkeys(role for _, role in names))
        grid = [[0] * len(blocks) for _ in roles]
        for place, (_, role) in zip(s["places"], names, strict=True):
            grid[roles.index(role)][blocks.index(_block(s, place))] += s["ranks"].get(place, 0)
        axes = figure.add_subplot(1, 2, 1)
        axes.imshow(grid, cmap="Blues", vmin=0, vmax=max(1, self.rank), aspect="auto")
        for y, row in enumerate(grid):
            for x, count in enumerate(row):
                colour = "white" if count > self.rank / 2 else "black"
                axes.text(x, y, str(count or "."), ha="center", va="center", fontsize=7, color=colour)
        axes.set_yticks(range(len(roles)), roles)
        axes.set_xticks(range(len(blocks)), range(len(blocks)))
        style(axes, f"ranks that stay, of {self.rank}")
        axes.grid(False)
        axes = figure.add_subplot(1, 2, 2)
        for key, shift, label in (("heads", -0.2, "heads"), ("neurons", 0.2, "neurons")):
            shares = [100 * s[f"{key}_gone"].get(b, 0) / max(1, s["whole"][key].get(b, 0)) for b in blocks]
            axes.bar([i + shift for i in range(len(blocks))], shares, width=0.38, label=label)
        axes.set_xticks(range(len(blocks)), range(len(blocks)))
        axes.set_xlabel("block", fontsize=9)
        axes.set_axisbelow(True)
        style(axes, "taken out, %")
        axes.legend(fontsize=8, frameon=False)


def _block(summary: Any, place: str) -> str:
    """The block of a point, of those that have heads or neurons; else the point's own parent."""
    known = [b for kind in summary["whole"].values() for b in kind if place.startswith(f"{b}.")]
    return max(known, key=len) if known else place.rpartition(".")[0]


def smaller(model: Any, decisions: Any) -> Any:
    """A model without what `LightPEFT.decisions` takes out, with a plain `lora` in the place of its adapter `light-peft`."""
    heads, neurons = decisions["heads"], decisions["neurons"]
    small: Any = prune(model, heads=heads, neurons=neurons) if heads or neurons else model
    lora, tensors = small.adapters[NAME].plain(small, decisions["ranks"])
    small.remove_adapter(NAME)
    added: Any = small.add_adapter(lora, LEFT)
    with torch.no_grad():
        for name, value in tensors.items():
            added.get_parameter(name).copy_(value)
    return small


def _counts(model: Any) -> dict[str, int]:
    """Parameters of the backbone, and of the low-rank change."""
    factors: list[Any] = [
        p for a in model.adapters.values() for n, p in a.named_parameters() if n.endswith(("lora_a", "lora_b"))
    ]
    return {"backbone": sum(p.numel() for p in model.backbone.parameters()), "adapter": sum(p.numel() for p in factors)}
