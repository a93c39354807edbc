"""DAS's procedure: a supernet is trained while a bandit finds the blocks that are missed least; the network without them, afresh.

Phases: "search", `search_epochs` of the adapter `das` as a supernet (`multimodal/adapters/das.py`) on the larger part of the
data, its gates moved by losses on the other part (`val_fraction`, drawn with the seed; or the "val" of the data). Then "train":
`epochs` of a fresh adapter, and of a fresh head if the model has one, with the found blocks left out, on the training part. Test
data are measured once, at the end. The summary has the operations of one sample with and without what is skipped: products of
matrices and attentions, as torch counts them.

Defaults: 3 epochs of search, the first without updates, then 10 epochs (METER on VQA); k = 4.
Source: Wu et al., NeurIPS 2023 (DoubtedSteam/DAS: run_search.py, run_train.py).
Deviations: their second run takes the list by hand, from the printed gates; here it follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.data.dataset import ImageDataset
from zoo.data.sampling import split_train_val
from zoo.errors import DataError
from zoo.regimes.base import Phase, Regime
from zoo.regimes.work import Run
from zoo.registry import adapter, register_regime
from zoo.train.streams import Stream

NAME, PARTS = "das", ("train", "val")


@torch.no_grad()
def operations(model: Any) -> int:
    """Floating-point operations of products and attentions, of one example sample, with the adapters in use."""
    batch, training = model.example_batch(1), model.training
    model.eval()
    try:
        # attention as plain products: torch does not count those of its fused kernel on CPUs
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.features(*batch)
    finally:
        model.train(training)
    return int(counter.get_total_flops())


@register_regime("das")
@dataclass(eq=False)
class DynamicArchitectureSkipping(Regime):
    """Find blocks that a task can do without, and adapt the rest.

    `zoo.run(model, "das", data, test)`: one data set, or {"train": ..., "val": ...}; a model without adapters in use. Afterwards
    it has the adapter `das` with the blocks that were found.

    Args:
        skip: k, blocks to leave out.
        bottleneck, targets, draws, turn, rate: of the adapter.
        search_epochs, epochs: of the two phases. lr: of both; None: the adapter's own.
        val_fraction: share of the data on which blocks are compared, where none is given.
    """

    skip: int = 4
    bottleneck: int = 96
    targets: str | None = None
    draws: int = 3
    turn: int = 10
    rate: float = 1.0
    search_epochs: int = 3
    epochs: int = 10
    lr: float | None = None
    val_fraction: float = 0.1

    paper = "Wu et al. 2023"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("skip", "epochs"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(
            self.search_epochs >= 2,
            f"search_epochs is {self.search_epochs}; expected 2 or more: the gates stand still in the first.",
        )
        self.check(self.lr is None or self.lr > 0, f"lr is {self.lr}; expected more than 0.")
        self.check(0 < self.val_fraction < 1, f"val_fraction is {self.val_fraction}; expected between 0 and 1.")

    def prepare(self, run: Run) -> None:
        """One data set, or its two parts, and a model without adapters."""
        given = run.data if isinstance(run.data, dict) else {"train": run.data}
        if not set(given) <= set(PARTS) or "train" not in given:
            raise DataError(f"das: data= is one data set, or a dict of 'train' and 'val'; it has {', '.join(given)}.")
        if not all(isinstance(d, ImageDataset) for d in given.values()):
            raise DataError("das: data= is one data set, or a dict of 'train' and 'val', and test= is one data set.")
        self.check_unadapted(run, NAME)

    def phases(self, run: Run) -> Iterator[Phase]:
        """The supernet, then the network that was found."""
        model, common = run.model, {} if self.lr is None else {"lr": self.lr}
        given = run.data if isinstance(run.data, dict) else {"train": run.data}
        train, val = given["train"], given.get("val")
        if val is None:
            train, val = split_train_val(train, self.val_fraction, self.seed)
        settings = {"bottleneck": self.bottleneck, "targets": self.targets}
        bandit = {"draws": self.draws, "turn": self.turn, "rate": self.rate, "seed": self.seed}
        supernet: Any = model.add_adapter(adapter(NAME, search=self.skip, **bandit, **settings), NAME)
        yield Phase("search", train, streams={"val": Stream(val)}, fit={**common, "epochs": self.search_epochs})
        found = run.once("search", lambda: self._found(supernet))
        whole = run.once("whole", lambda: self._whole(model))
        classes = list(model.classes) if model.classes else None
        model.remove_adapter(NAME)
        if model.num_classes:
            model.reset_head(model.num_classes, classes)
        model.add_adapter(adapter(NAME, skip=tuple(found["skip"]), **settings), NAME)
        yield Phase("train", train, fit={**common, "epochs": self.epochs})
        run.once("operations", lambda: {"skipped": operations(model), "whole": whole})
        if run.test is not None:
            run.evaluate(run.test, "test")

    def _whole(self, model: Any) -> int:
        """Operations of the backbone with nothing left out and nothing beside it."""
        with model.disable():
            return operations(model)

    def _found(self, supernet: Any) -> dict[str, Any]:
        numbers = supernet.chosen()
        return {
            "skip": numbers,
            "blocks": [supernet.candidates[i] for i in numbers],
            "gates": dict(zip(supernet.candidates, supernet.module_at("gates").values.tolist())),
        }

    def summary(self, run: Run) -> dict[str, Any]:
        """The blocks that were left out, the gates, operations of a sample with and without them, the test's numbers."""
        counted = run.values["operations"]
        return {
            **run.values["search"],
            "operations": counted,
            "saved": 1 - counted["skipped"] / counted["whole"],
            **{f"test_{n}": v for n, v in run.values.get("test", {}).items() if isinstance(v, float)},
        }
