"""The study of AST: parameter-efficient methods side by side on one spectrogram transformer, few-shot and at equal budgets.

Every combination of data set, number of sounds for each class (`shots`), budget, method and seed is one phase, an ordinary fit
from the same backbone with a new head; behind it the test sounds are measured once. The last epoch counts: nothing is chosen on
them.

| method             | what is trained (`zoo.adapter`)                         | size in the paper | rate |
| ------------------ | ------------------------------------------------------- | ----------------- | ---- |
| `full`             | everything                                              |                   | 5e-5 |
| `linear`           | the last norm                                           |                   | 1e-3 |
| `bitfit`           | all biases                                              |                   | 5e-3 |
| `prompts-shallow`  | `vpt`, T tokens in front of the first block             | T = 25            | 1e-2 |
| `prompts-deep`     | `vpt`, T tokens in front of each                        | T = 25            | 1e-2 |
| `prefix`           | `prefix`, T keys and T values                           | T = 12            | 1e-2 |
| `lora`             | `lora` on q and v, scale 8 / 64                         | r = d / 64        | 5e-3 |
| `pfeiffer`         | `adapter` behind each MLP, GELU                         | r = d / 64        | 5e-3 |
| `pfeiffer-beside`  | the same beside it, from its input                      | r = d / 64        | 5e-3 |
| `houlsby`          | behind attention and MLP                                | r = d / 64        | 5e-3 |
| `houlsby-beside`   | beside both                                             | r = d / 64        | 5e-3 |
| `conformer`        | `conformer` beside each MLP                             | c = d / 96        | 5e-3 |
| `conformer-behind` | behind it                                               | c = d / 96        | 5e-3 |

All but `full` and `bitfit` also train the last norm, the adapters the norm in front of each sublayer that they adapt, and all a
linear head on the mean of all tokens, as the paper does. A `budget` replaces the paper's size: the largest one whose trained
parameters (without norms and head) do not exceed it; methods without a size appear once, and those whose smallest size exceeds it
not at all. AdamW with betas (.9, .98), eps 1e-6, weight decay 0.1, cosine without warm-up.

Source: Cappellazzo et al., "Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers", MLSP 2024
(umbertocappellazzo/PETL_AST, `main.py`, `hparams/train.yaml`).
Deviations: adapters and LoRA start as nothing (theirs both matrices at zero, or as the library draws what a checkpoint lacks);
prompts stand beside the second class token instead of taking its place, and what becomes of them is not part of the mean; the
sounds are heard without masks (`augment`); norms, biases and other vectors have no weight decay.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from audio.regimes.parts.study_table import draw_study, order, study_table
from zoo import Adapter, Phase, Regime
from zoo.data import ImageDataset, few_shot
from zoo.data.seeds import seed_everything
from zoo.errors import ConfigError, DataError, ZooError
from zoo.regimes import Run, RunReport
from zoo.registry import adapter, register_regime
from zoo.tasks import Classify

__all__ = ["METHODS", "AstStudy", "Method"]

LAST, BOTH = ("norm*",), ("blocks.*.norm1", "blocks.*.norm2", "norm*")
BEFORE_MLP = ("blocks.*.norm2", "norm*")


def _lora(size: int) -> Adapter:
    return adapter("lora", rank=size, alpha=size * 8 / 64)


def _bottleneck(size: int, **settings: Any) -> Adapter:
    return adapter("adapter", rank=size, activation="gelu", scale=1.0, **settings)


@dataclass(frozen=True)
class Method:
    """One row of the study.

    Args:
        make: size -> the method; None: the head and norms alone.
        size: width of the backbone -> the paper's size; None: it has none.
        rate: the paper's learning rate. norms: those that are trained besides.
    """

    make: Callable[[int], Adapter] | None
    size: Callable[[int], int] | None
    rate: float
    norms: tuple[str, ...] = LAST


def _share(by: float) -> Callable[[int], int]:
    return lambda dim: max(1, round(dim / by))


def _fixed(size: int) -> Callable[[int], int]:
    return lambda dim: size


METHODS: dict[str, Method] = {
    "full": Method(lambda _: adapter("full"), None, 5e-5, ()),
    "linear": Method(None, None, 1e-3),
    "bitfit": Method(lambda _: adapter("bitfit"), None, 5e-3, ()),
    "prompts-shallow": Method(lambda n: adapter("vpt", num_tokens=n, deep=False), _fixed(25), 1e-2),
    "prompts-deep": Method(lambda n: adapter("vpt", num_tokens=n), _fixed(25), 1e-2),
    "prefix": Method(lambda n: adapter("prefix", num_tokens=n), _fixed(12), 1e-2),
    "lora": Method(_lora, _share(64), 5e-3),
    "pfeiffer": Method(partial(_bottleneck, form="pfeiffer"), _share(64), 5e-3, BEFORE_MLP),
    "pfeiffer-beside": Method(partial(_bottleneck, form="parallel"), _share(64), 5e-3, BEFORE_MLP),
    "houlsby": Method(partial(_bottleneck, form="houlsby"), _share(64), 5e-3, BOTH),
    "houlsby-beside": Method(partial(_bottleneck, form="parallel", targets=("attn", "mlp")), _share(64), 5e-3, BOTH),
    "conformer-behind": Method(lambda n: adapter("conformer", rank=n, form="sequential"), _share(96), 5e-3, BEFORE_MLP),
    "conformer": Method(lambda n: adapter("conformer", rank=n), _share(96), 5e-3, BEFORE_MLP),
}


@register_regime("ast-study")
@dataclass(eq=False)
class AstStudy(Regime):
    """Methods side by side.

    `zoo.run(model, "ast-study", data=train, test=test)`: a data set, or a dict of several by name, and test data of the same
    names. The model has no adapter; afterwards it has that of the last phase.

    Args:
        methods: names of `METHODS`; none: all.
        shots: sounds of each class that are trained on; 0: all there are.
        budgets: trained parameters of a method; 0: the size that it has in the paper.
        seeds: of the choice of sounds, of the start and of the fit.
        epochs, batch_size: of each fit.
        rates: other learning rates, by method, and of the "head" (None of these: the method's).
        norms: train norms besides, as the paper does. head: "mean", or "linear" for the family's own.
        augment: of the sounds while training; with "none" they are transformed once, and not in each epoch.
    """

    methods: tuple[str, ...] | list[str] = ()
    shots: tuple[int, ...] | list[int] = (0,)
    budgets: tuple[int, ...] | list[int] = (0,)
    seeds: tuple[int, ...] | list[int] = (0, 1, 2)
    epochs: int = 50
    batch_size: int = 32
    rates: dict[str, Any] | None = None
    norms: bool = True
    head: str = "mean"
    augment: str = "none"

    paper = "Cappellazzo et al. 2024"
    needs_head = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.methods = list(self.methods) or list(METHODS)
        for name in [*self.methods, *(set(self.rates or {}) - {"head"})]:
            self.check(name in METHODS, f"there is no method '{name}' in the study; known: {', '.join(METHODS)}.")
        for field, least in (("shots", 0), ("budgets", 0), ("seeds", 0), ("methods", None)):
            values = list(getattr(self, field))
            self.check(bool(values), f"{field} is empty; give one at least.")
            self.check(len(set(values)) == len(values), f"{field} names one twice: {values}.")
            self.check(least is None or min(values) >= least, f"{field} is {values}; expected numbers of 0 or more.")
        for name, rate in (self.rates or {}).items():
            number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            self.check(number and rate > 0, f"the rate of '{name}' is {rate!r}; expected a number above 0.")
        self.check(self.epochs >= 1, f"epochs is {self.epochs}; expected 1 or more.")
        self.check(self.batch_size >= 2, f"batch_size is {self.batch_size}; expected 2 or more.")
        self.check(self.head in ("mean", "linear"), f"head is '{self.head}'; expected 'mean' or 'linear'.")
        self._trained: dict[str, int] = {}  # by phase, without the head; also of those that a run that goes on skips

    # -- what is given ----------------------------------------------------------------------------------------------

    def prepare(self, run: Run) -> None:
        """Data sets of known classes, each with test data of the same ones; a model without adapters that gives tokens."""
        train, test = _named(run.data), _named(run.test)
        if not train or sorted(train) != sorted(test):
            raise DataError(
                "ast-study: data= and test= are a data set each, or dicts of data sets with the same names; data has "
                f"{', '.join(train) or 'none'}, test has {', '.join(test) or 'none'}."
            )
        for name, data in train.items():
            if not data.classes or data.classes != test[name].classes:
                raise DataError(f"ast-study: '{name}' and its test data must have the same known classes.")
            if most := max(self.shots):
                few_shot(data, most)  # what it does not have is said before the first training
        if len(run.model.adapters):
            raise ConfigError("ast-study attaches its own adapters: load the model without one.")
        whole = run.model.num_parameters(head=False)
        self.check(
            max(self.budgets) <= whole,
            f"budgets are {list(self.budgets)}, and {run.model.backbone_name} has {whole:,} parameters; expected at most those.",
        )
        if self.head == "mean" and "tokens" not in run.model.family.gives:
            raise ConfigError(
                f"ast-study: the head 'mean' stands on tokens, which {run.model.backbone_name} does not give. Set head='linear'."
            )

    def phases(self, run: Run) -> Iterator[Phase]:
        """Seeds outermost, so that a run that is stopped has whole seeds."""
        sizes = self._sizes(run)
        test = {name: self._heard(run, data, "test") for name, data in _named(run.test).items()}
        for seed in self.seeds:
            for data, given in _named(run.data).items():
                for shots in self.shots:
                    chosen = self._heard(run, few_shot(given, shots, seed) if shots else given, "train")
                    for (method, budget), size in sizes.items():
                        name = f"{data}-{method}-shots{shots}-budget{budget}-seed{seed}"
                        self._put(run, method, size, chosen.classes or [], seed)
                        self._trained[name] = int(run.model.num_parameters(trainable=True, head=False))
                        yield Phase(name, chosen, fit=self._fit(method, seed))
                        run.evaluate(test[data], name)

    def _sizes(self, run: Run) -> dict[tuple[str, int], int]:
        """The size of each method at each budget, those that there are."""
        found: dict[tuple[str, int], int] = {}
        for name in self.methods:
            method = METHODS[name]
            if method.size is None or method.make is None:
                found[name, 0] = 0
                continue
            one, two = (_count(run.model, method.make(n)) for n in (1, 2))
            for budget in self.budgets:
                size = method.size(run.model.family.feature_dim) if not budget else 1 + (budget - one) // (two - one)
                if size < 1:
                    continue
                try:  # before the first training
                    _count(run.model, method.make(size))
                except ZooError as error:
                    raise ConfigError(
                        f"ast-study: '{name}' cannot be as large as {budget:,} parameters here ({error}) Give a smaller budget, "
                        "or leave the method out."
                    ) from error
                found[name, budget] = size
        if not found:
            raise ConfigError(f"ast-study: no method fits into {min(self.budgets):,} parameters; give a larger budget.")
        return found

    def _put(self, run: Run, method: str, size: int, classes: list[str], seed: int) -> None:
        """The method in place of the former one, and a new head."""
        model, chosen = run.model, METHODS[method]
        for former in list(model.adapters):
            model.remove_adapter(former)
        seed_everything(seed, "ast-study", method)
        if chosen.make is not None:
            model.add_adapter(chosen.make(size), "method")
        if chosen.norms and self.norms:
            model.add_adapter(adapter("norm", targets=chosen.norms), "norms")
        model.set_active(*model.adapters)
        seed_everything(seed, "ast-study", "head")  # the same head for all methods
        model.reset_head(len(classes), classes, kind=self.head)

    def _fit(self, method: str, seed: int) -> dict[str, Any]:
        rates = {"head": None, method: METHODS[method].rate, **(self.rates or {})}
        rate = rates[method]
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": {"default": rate, "head": rates["head"] or rate},
            "weight_decay": 0.1,
            "optimizer_options": {"betas": (0.9, 0.98), "eps": 1e-6},
            "warmup": 0.0,
            "clip": None,
            "keep": "last",
            "seed": seed,
            **({} if self.augment == "none" else {"augment": self.augment}),
        }

    def _heard(self, run: Run, data: ImageDataset, part: str) -> ImageDataset:
        """Transformed once and kept, unless each epoch is to hear them differently."""
        if self.augment != "none" and part == "train":
            return data
        heard = Classify().open(run.model, data, train=False)
        pairs = [heard[i] for i in range(len(heard))]
        inputs, labels = torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])
        return run.model.family.open_dataset(TensorDataset(inputs, labels), classes=data.classes)

    # -- what comes out ---------------------------------------------------------------------------------------------

    def summary(self, run: Run) -> dict[str, Any]:
        """One entry for each method, budget, data set and number of shots; and the order of the methods."""
        rows = []
        for data in _named(run.test):
            for shots in self.shots:
                for method in self.methods:
                    for budget in self.budgets if METHODS[method].size else (0,):
                        names = [f"{data}-{method}-shots{shots}-budget{budget}-seed{seed}" for seed in self.seeds]
                        values = [run.values[name]["accuracy"] for name in names if name in run.values]
                        if not values:
                            continue
                        row = {"data": data, "shots": shots, "method": method, "budget": budget, "accuracies": values}
                        row |= {"trained": self._trained[names[0]], "accuracy": statistics.mean(values)}
                        row["deviation"] = statistics.stdev(values) if len(values) > 1 else None
                        rows.append(row)
        backbone = sum(p.numel() for p in run.model.backbone.parameters())
        return {"rows": rows, "order": order(rows), "backbone": backbone}

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """Methods by budgets, data sets by shots."""
        return study_table(report.summary)

    def draw(self, figure: Any, report: RunReport) -> None:
        """Accuracy against trained parameters, and against the number of shots (or by data set)."""
        draw_study(figure, report.summary)


def _named(data: Any) -> dict[str, ImageDataset]:
    """Data sets by name; one alone is called "data"."""
    if isinstance(data, ImageDataset):
        return {"data": data}
    return {str(k): v for k, v in data.items()} if isinstance(data, dict) else {}


def _count(model: Any, method: Adapter) -> int:
    """What a method trains here."""
    before = model.active
    model.add_adapter(method, "counted", activate=False)
    model.set_active("counted")
    count = int(model.num_parameters(trainable=True, head=False))
    model.set_active(*before)
    model.remove_adapter("counted")
    return count
