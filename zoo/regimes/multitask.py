"""Multi-task learning: several data sets, each a task with classes of its own, one adapter for all of them.

Idea: every batch is of one task, drawn with probability

    p_i ~ n_i ^ tau            n_i: items of task i; tau = 1 is their share in the data, 0 an equal share of all

and is one pass with the value `task` in the context, which adapters made for several tasks read (hyperformer); to any other
adapter it is not said. With `batches="mixed"` each item of a batch is drawn so, and the value is one for each sample.

`weights={"edges": 0.5}` says how much the loss of an item of a task counts in training (the others 1): the mean over a batch of

    w_task(b) loss_b        what is measured has no weights

Heads: the rows of one linear head, one group for each task; its classes are named "<task>: <class>". The loss is the cross-
entropy over the logits of the item's own task, and so is every accuracy: the task of an item is known, also when it is used.

    loss = mean_b -log softmax(z_b restricted to the classes of task(b))[y_b]

Data sets that name a task of their own are learnt as that task says, and measured by what each task is chosen by: maps
(`vision.data.dense.open_dense`) with a decoder for each instead of rows; questions and captions (VL-T5, VL-BART) with a prefix.

What one task has become is taken out by `single_task(model, "birds")`: its rows of the head, and plain adapters in the place of
what was generated for it.

Defaults: tau = 0.1 and one task for each batch, as hyperformer's.
Source: Karimi Mahabadi et al., "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks", ACL 2021
(rabeehk/hyperformer: temperature sampling, p ~ n^(1/T), T = 10); Pfeiffer et al. and most of multi-task vision use the same.
Deviations: the rows of all heads are one parameter, so an optimizer with momentum or weight decay also moves those of tasks that
are not in a batch; heads of separate modules would stand still then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import registry
from zoo.data.dataset import ImageDataset
from zoo.data.joined import join
from zoo.errors import ConfigError, DataError, UnknownNameError, nearest
from zoo.regimes.base import Phase, Regime
from zoo.regimes.report import LINE, RunReport, style
from zoo.regimes.work import Run
from zoo.registry import register_regime
from zoo.tasks.base import call
from zoo.tasks.classify import Classify
from zoo.train.samplers import Mixed, OnePart

if TYPE_CHECKING:
    from zoo.host import Host
    from zoo.model import Model

__all__ = ["ManyTasks", "MultiTask", "single_task"]


class ManyTasks(Classify):
    """Classification among the classes of the item's own task; targets count through the classes of all tasks.

    Args:
        names: of the tasks. sizes: how many classes each has. weights: of their losses in training.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Mapping[str, float] | None = None) -> None:
        self.names, self.sizes = list(names), list(sizes)
        self.weights = torch.tensor([float((weights or {}).get(name, 1.0)) for name in names]) if weights else None
        self.task_of_class = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(loss, logits with -inf for the classes of other tasks)."""
        of_class = self.task_of_class.to(targets.device)
        tasks = of_class[targets]
        outputs = call(model, inputs).float()
        others = of_class[None, :] != tasks[:, None]
        logits = outputs.masked_fill(others, float("-inf"))
        each = F.nll_loss(logits.log_softmax(dim=-1), targets, reduction="none")
        if label_smoothing:  # over the task's own classes
            own = logits.log_softmax(dim=-1).masked_fill(others, 0.0)
            smooth = -(own.sum(-1) / (~others).sum(-1))
            each = (1 - label_smoothing) * each + label_smoothing * smooth
        if self.weights is not None and model.training:
            each = self.weights.to(each)[tasks] * each
        return each.mean(), logits

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """`task`: the batch's, or one for each sample; for the adapters that read it."""
        tasks = self.task_of_class[targets.cpu()].tolist()
        found = [self.names[i] for i in tasks]
        said = found[0] if len(set(found)) == 1 else found
        return {**super().context(model, inputs, targets, training=training), "task": said}


@register_regime("multitask")
@dataclass(eq=False)
class MultiTask(Regime):
    """One adapter for several tasks.

    `zoo.run(model, "multitask", data={"birds": ..., "cars": ...}, test={...})`: data sets with known classes, by the names of
    their tasks. The model begins without a head. Afterwards its head has the classes of all tasks.

    Args:
        epochs: passes over all data. tau: of the sampling. batches: "one" task for each batch, or "mixed".
        weights: of the loss of an item in training, by task; those that are not named have 1.
        head: of tasks of maps, the kind of their decoders: "dense", or one of mmsegmentation's ("mmseg-segformer").
    """

    epochs: int = 10
    tau: float = 0.1
    batches: str = "one"
    weights: dict[str, float] | None = None
    head: str = "dense"

    paper = "Karimi Mahabadi et al. 2021"
    needs_head = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.epochs >= 1, f"epochs is {self.epochs}; expected 1 or more.")
        self.check(self.tau >= 0, f"tau is {self.tau}; expected 0 or more.")
        self.check(self.batches in ("one", "mixed"), f"batches is {self.batches!r}; expected 'one' or 'mixed'.")
        for name, weight in (self.weights or {}).items():
            real = isinstance(weight, (int, float)) and 0 < weight < float("inf")
            self.check(real, f"the weight of '{name}' is {weight!r}; expected more than 0.")

    def prepare(self, run: Run) -> None:
        """Data by name, a model without a head, adapters that know these tasks."""
        for what, given in (("data", run.data), ("test", run.test)):
            if what == "test" and given is None:
                continue
            if not isinstance(given, dict) or not all(
                isinstance(d, ImageDataset) and (d.classes or hasattr(d.rows, "task")) for d in given.values()
            ):
                raise DataError(
                    f"multitask: {what}= is a dict of data sets with known classes, by the names of their tasks: "
                    "{'birds': ..., 'cars': ...}."
                )
        if not run.data:
            raise DataError("multitask: data= holds no task.")
        if empty := [name for name, data in run.data.items() if not len(data)]:
            raise DataError(f"multitask: the task '{empty[0]}' has no items to learn from.")
        for name in self.weights or {}:
            if name not in run.data:
                raise DataError(f"multitask: a weight for '{name}', which is no task. {nearest(name, run.data)}")
        together = self._together(run)
        if self.head != "dense" and (together is None or together.head is None):
            raise ConfigError(f"multitask: head='{self.head}' is of tasks of maps, and these are none. Leave it out.")
        if getattr(together, "one_task_a_batch", False) and self.batches != "one":
            raise ConfigError(
                "multitask: these tasks have answers of different lengths, so a batch is of one of them; leave batches='one'."
            )
        for name, test in (run.test or {}).items():
            if name not in run.data:
                raise DataError(f"multitask: test data for '{name}', which is no task. {nearest(name, run.data)}")
            if test.classes != run.data[name].classes:
                raise DataError(f"multitask: the test data of '{name}' have other classes than its training data.")
        if run.model.num_classes:
            raise ConfigError("multitask makes the heads of the tasks: load the model with num_classes=0.")
        for adapter in (run.model.adapters[n] for n in run.model.active):
            known = getattr(adapter, "tasks", None) or None  # none at all: it has one of everything for all tasks
            if known is not None and (unknown := [n for n in run.data if n not in known]):
                raise UnknownNameError(
                    f"multitask: '{adapter.method}' is made for the tasks {', '.join(known)} and does not know '{unknown[0]}'. "
                    f"Attach it with tasks={tuple(run.data)}."
                )
            if known is not None and (idle := [n for n in known if n not in run.data]):
                raise DataError(
                    f"multitask: '{adapter.method}' is made for the task '{idle[0]}' too, and data= holds none of it: what it "
                    f"makes there would stay as it began. Give its data, or attach it with tasks={tuple(run.data)}."
                )

    def phases(self, run: Run) -> Iterator[Phase]:
        """One phase on all data; each task is measured at the end."""
        sampler = OnePart(tau=self.tau) if self.batches == "one" else Mixed(tau=self.tau)
        if (many := self._together(run)) is not None:
            many.weights = dict(self.weights or {})
            if many.head is not None:
                run.model.reset_head(len(many.classes), many.classes, kind=f"{self.head}-tasks")
            yield Phase("tasks", many.data, task=many, sampler=sampler, fit={"epochs": self.epochs})
            for name, test in (run.test or {}).items():
                run.evaluate(test, name, task=many.single(name))
            return
        data = join(run.data)
        what = ManyTasks(list(run.data), [len(d.classes) for d in run.data.values()], self.weights)
        run.model.grow_head(data.classes or ())
        yield Phase("tasks", data, task=what, sampler=sampler, fit={"epochs": self.epochs})
        if run.test is None:
            return
        tests = {name: run.test.get(name) or run.data[name].select([0]) for name in run.data}
        joined = join(tests)  # so that labels count as in training
        part = joined.rows.part  # type: ignore[attr-defined]
        for number, name in enumerate(run.data):
            if name in run.test:
                run.evaluate(joined.select((part == number).nonzero()[0]), name, task=what)

    def _together(self, run: Run) -> Any:
        """The task that all data are of, if they name tasks of their own (of maps, say); None: they are classified.

        Raises:
            DataError: some do, and others do not.
        """
        kinds = {name: getattr(data.rows, "task", None) for name, data in run.data.items()}
        named = [kind for kind in kinds.values() if kind is not None]
        if not named:
            return None
        if other := [name for name, kind in kinds.items() if kind is None]:
            raise DataError(
                f"multitask: '{other[0]}' has a class for each item, and others a task of their own ({named[0]}). They have no "
                "loss in common; train them apart."
            )
        return registry.task(named[0]).together(run.data)

    def summary(self, run: Run) -> dict[str, Any]:
        """Accuracy of each task, and their mean; of tasks that are measured otherwise, what each is chosen by."""
        if not run.test:
            return {}
        if hasattr(next(iter(run.data.values())).rows, "task"):
            measures = {name: registry.task(run.data[name].rows.task).monitor for name in run.test}
            values = {name: run.values[name][measure] for name, measure in measures.items()}
            return {
                "measures": measures,
                "values": values,
                "sizes": {n: [len(d), len(d.classes or ())] for n, d in run.data.items()},
            }
        accuracies = {name: run.values[name]["accuracy"] for name in run.test}
        sizes = {name: [len(d), len(d.classes)] for name, d in run.data.items()}
        return {"accuracy": accuracies, "mean": sum(accuracies.values()) / len(accuracies), "sizes": sizes}

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """One row for each task."""
        if not report.summary:
            return report.phase_table()
        if "measures" in report.summary:
            found = report.summary
            return ["task", "items", "outputs", "measure", "value"], [
                [name, *found["sizes"][name], found["measures"][name], f"{value:.4f}"]
                for name, value in found["values"].items()
            ]
        rows = [
            [name, *report.summary["sizes"][name], f"{100 * accuracy:.1f}"]
            for name, accuracy in report.summary["accuracy"].items()
        ]
        return ["task", "items", "classes", "accuracy, %"], [
            *rows,
            ["mean", "", "", f"{100 * report.summary['mean']:.1f}"],
        ]

    def draw(self, figure: Any, report: RunReport) -> None:
        """Accuracies of the tasks, if they were measured; else the curves."""
        if "accuracy" not in report.summary:  # other measures have no scale in common
            report.draw_phases(figure)
            return
        names, values = list(report.summary["accuracy"]), [100 * v for v in report.summary["accuracy"].values()]
        axes = figure.add_subplot(1, 1, 1)
        axes.bar(names, values, color=LINE, width=0.6)
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.1f}", (place, value), textcoords="offset points", xytext=(0, 4), ha="center", fontsize=8
            )
        axes.set_ylim(0, 105)
        style(axes, f"accuracy, %; mean {100 * report.summary['mean']:.1f}")


def single_task(model: Model, task: str) -> Model:
    """Make the model one of a single task, in place: its rows of the head, and plain adapters for what was generated for it.

    Raises:
        UnknownNameError: the head has no classes of this task.
    """
    classes = model.classes or []
    rows = [i for i, name in enumerate(classes) if name.startswith(f"{task}: ")]
    if not rows:
        raise UnknownNameError(
            f"The head has no classes of the task '{task}'. {nearest(task, {n.partition(': ')[0] for n in classes})}"
        )
    old: Any = model.head
    own = old.single(task) if hasattr(old, "single") else None
    in_use: list[str] = []
    for name in model.active:
        extract: Any = getattr(model.adapters[name], "extract", None)
        in_use += [name] if extract is None else extract(model, task)
    generated = [name for name in model.active if name not in in_use]
    model.set_active(*in_use)
    for name in generated:
        model.remove_adapter(name)
    if own is not None:
        model.set_head(own, [classes[i].removeprefix(f"{task}: ") for i in rows])
        return model
    head = nn.Linear(old.in_features, len(rows), bias=old.bias is not None)
    with torch.no_grad():
        head.weight.copy_(old.weight[rows])
        if old.bias is not None:
            head.bias.copy_(old.bias[rows])
    model.set_head(head, [classes[i].removeprefix(f"{task}: ") for i in rows])
    return model
