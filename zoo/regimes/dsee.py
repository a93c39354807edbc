"""DSEE's procedure: a sparse and low-rank change is tuned, the backbone is pruned by what it says, and it is tuned again.

Phases: "tune", the adapter `dsee` on the whole backbone. Then heads and neurons are taken out (`zoo.prune`) and weights are made
sparse (`zoo.sparsify`), and "retune" goes on from the values of the adapter and the head on the pruned backbone, with an
optimizer and a schedule of its own. The pruned network is another model, `report.model`; the given one is left as it was tuned.
Test data are measured behind each of the three, and choose nothing.

Defaults: 20 % of the entries of q and v and 20 % of the others, no heads, no neurons; 5 epochs and 5 epochs (RTE: 10) at 5e-4,
batch 32 (4 GPUs with 8). For heads: 0.25 (3 of 12), with sparsity = others = 0; 8 epochs at 6e-4.
Source: Chen et al., ACL 2023 (VITA-Group/DSEE, scripts/). Deviations: none known in the order of things; see `zoo.adapters.dsee`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from zoo.adapters.parts.gates import readers, taken
from zoo.model.lighter import check_whole, sparsify
from zoo.model.pruning import prune
from zoo.regimes.base import Phase, Regime
from zoo.regimes.work import Run
from zoo.registry import adapter, register_regime

__all__ = ["DuallySparse"]

NAME = "dsee"


@register_regime("dsee")
@dataclass(eq=False)
class DuallySparse(Regime):
    """Tune, prune, tune again.

    `zoo.run(model, "dsee", data, test)`: a data set, a model without an adapter in use. `report.model` is the pruned one.

    Args:
        sparsity: part of the entries of the targets that becomes zero, ranked by `by` ("update", "weight", "sum").
        others: part of those of the other projections, ranked by magnitude.
        heads, neurons: parts of each block that are taken out. Neurons need coefficients, which are then trained.
        coefficients: train coefficients for heads, too, and rank heads by them. l1: their lambda.
        rank, alpha, entries, targets, places, rounds: of the adapter.
        epochs, retune_epochs: of the two phases. lr, batch_size: of both.
    """

    sparsity: float = 0.2
    others: float = 0.2
    by: Literal["update", "weight", "sum"] = "update"
    heads: float = 0.0
    neurons: float = 0.0
    coefficients: bool = False
    l1: float = 1e-4
    rank: int = 16
    alpha: float = 32.0
    entries: int = 16
    targets: str | tuple[str, ...] = ("q", "v")
    places: Literal["decomposition", "magnitude", "random"] = "decomposition"
    rounds: int = 100
    epochs: int = 5
    retune_epochs: int = 5
    lr: float = 5e-4
    batch_size: int = 32

    paper = "Chen et al. 2023"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "retune_epochs", "batch_size"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.lr > 0, f"lr is {self.lr}; expected more than 0.")
        parts = ("sparsity", "others", "heads", "neurons")
        for name in parts:
            self.check(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; expected 0 <= {name} < 1.")
        self.check(
            any(getattr(self, name) for name in parts), f"{', '.join(parts)} are all 0: nothing would be pruned."
        )
        self.check(self.by in ("update", "weight", "sum"), f"by is {self.by!r}; expected 'update', 'weight' or 'sum'.")
        self._adapter()

    def _adapter(self) -> Any:
        names = ("rank", "alpha", "entries", "targets", "places", "rounds", "l1")
        settings = {name: getattr(self, name) for name in names}
        return adapter(NAME, **settings, seed=self.seed, coefficients=self.coefficients or self.neurons > 0)

    def prepare(self, run: Run) -> None:
        """One data set, a model without an adapter in use, and a backbone that can be pruned as asked."""
        self.check_data(run)
        self.check_unadapted(run, NAME)
        if self.heads or self.neurons:
            type(run.model.family).surgery()
            of_heads, of_neurons = readers(run.model.points, NAME)
            self._takes("heads", [p.num_heads for p in of_heads])
            self._takes("neurons", [p.dim_in for p in of_neurons])
        check_whole(run.model, NAME)

    def _takes(self, what: str, counts: list[int]) -> None:
        """Raise ConfigError where the part that is to go is less than one in every block: before anything is trained."""
        share = getattr(self, what)
        self.check(
            not share or any(taken(share, count) for count in counts),
            f"{what}={share:g} takes none: a block has {max(counts, default=0)} of them at most. Give a larger part, or 0.",
        )

    def phases(self, run: Run) -> Iterator[Phase]:
        """Tune, prune, tune again."""
        common = {"lr": self.lr, "batch_size": self.batch_size}
        run.model.add_adapter(self._adapter(), NAME)
        whole = run.model.backbone
        before = sum(p.numel() for p in whole.parameters())
        yield Phase("tune", run.data, fit={**common, "epochs": self.epochs})
        if run.test is not None:
            run.evaluate(run.test, "tuned")
        heads, neurons = self._prune(run)
        kept = sum(_nonzero(m) for m in run.model.backbone.modules())
        after = sum(p.numel() for p in run.model.backbone.parameters())
        run.once(
            "pruned", lambda: {"heads": heads, "neurons": neurons, "before": before, "after": after, "nonzero": kept}
        )
        if run.test is not None:
            run.evaluate(run.test, "not retuned")
        yield Phase("retune", run.data, fit={**common, "epochs": self.retune_epochs})
        if run.test is not None:
            run.evaluate(run.test, "test")

    def _prune(self, run: Run) -> tuple[dict[str, int], dict[str, int]]:
        """Put the pruned model into the run; how many heads and neurons are gone, by block."""
        tuned: Any = run.model.adapters[NAME]
        heads = tuned.heads(run.model, self.heads) if self.heads else {}
        neurons = tuned.neurons(run.model, self.neurons) if self.neurons else {}
        if heads or neurons:
            run.model = prune(run.model, heads=heads, neurons=neurons)
            tuned = run.model.adapters[NAME]
        if self.sparsity or self.others:
            run.model = sparsify(run.model, masks=tuned.masks(run.model, self.sparsity, self.others, self.by))
        return {k: len(v) for k, v in heads.items()}, {k: len(v) for k, v in neurons.items()}

    def summary(self, run: Run) -> dict[str, Any]:
        """Parameters of the backbone before and after, those that are not zero, and the test's numbers at the three stages."""
        found = run.values["pruned"]
        stages = (("tuned", "tuned"), ("not retuned", "pruned"), ("test", "test"))
        measured = {
            f"{name}_{n}": v
            for stage, name in stages
            for n, v in run.values.get(stage, {}).items()
            if n in ("accuracy", "loss")
        }
        return {**found, "left": found["nonzero"] / found["before"], **measured}

    def table(self, report: Any) -> tuple[list[str], list[list[Any]]]:
        """One row for each stage."""
        s = report.summary
        rows = [
            ["tuned", s["before"], s["before"]],
            ["pruned", s["after"], s["nonzero"]],
            ["test", s["after"], s["nonzero"]],
        ]
        cells = [[*row, s.get(f"{row[0]}_accuracy", "")] for row in rows]
        return ["stage", "parameters of the backbone", "of these not zero", "accuracy"], cells


def _nonzero(module: Any) -> int:
    """Numbers of a module's own parameters that its mask does not make zero."""
    own = sum(p.numel() for p in module._parameters.values() if p is not None)
    mask = module._buffers.get("weight_mask")
    return own if mask is None else own - int((~mask).sum())
