"""The table of backbone families and methods: each cell was run, and works or is refused with a reason."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.errors import MergeError, MissingPackageError, UnknownNameError, ZooError
from zoo.tasks.resolve import resolve

# Kinds of heads that compare inputs of one tower with names of classes
NAMED = ("text", "image-text", "concepts")
STEPS = ("attach", "train", "save", "merge")


@dataclass(frozen=True)
class Cell:
    """One family with one method. Each step is "yes" or the reason for which it is refused."""

    family: str
    method: str
    attach: str
    train: str
    save: str
    merge: str
    parameters: int  # trainable at the tiny size, without head

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def compatibility(families: list[str] | None = None, methods: list[str] | None = None) -> list[Cell]:
    """Run every method on a tiny random member of every family: attach, one training step, save and load, merge.

    Takes some seconds. A refusal is a `ZooError` with its reason; any other exception is a defect and is raised.
    """
    return [
        _cell(family, method)
        for family in families or registry.families()
        if registry.family(family).tiny
        for method in methods or registry.list_adapters()
    ]


def tiny_model(family: str) -> tuple[Any, tuple[Tensor, ...]]:
    """A tiny random member of a family (with a head, if it takes one), and a batch of two for it."""
    from zoo.loading import load_backbone

    member = registry.family(family).tiny
    if member is None:
        raise UnknownNameError(f"the family '{family}' names no tiny member (Backbone.tiny).")
    name, options = member
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_backbone(name, pretrained=False, num_classes=registry.family(family).tiny_classes, **options)
        model.family.stir()
        return model, model.family.tiny_batch()


def _cell(family: str, method: str) -> Cell:
    done = dict.fromkeys(STEPS, "not reached")
    try:
        model, batch = tiny_model(family)
    except MissingPackageError as error:
        return Cell(family, method, **{**done, "attach": str(error)}, parameters=0)
    targets = torch.arange(len(batch[0]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            if registry.adapter_class(method).head_kind in NAMED:
                batch, targets = _named(model, batch)
            cls = registry.adapter_class(method)
            # what chooses within a budget has one for such a small network; what is large anywhere is small here
            adapter = model.add_adapter(
                registry.adapter(method, **cls.trial) if cls.needs_calibration or cls.large else method
            )
        except ZooError as error:  # no such points, a role that the family lacks, a setting that does not fit
            return Cell(family, method, **{**done, "attach": str(error)}, parameters=0)
        done["attach"] = "yes"
        try:
            if adapter.needs_calibration:
                task = None if model.num_classes else resolve(model, loss=_loss)
                adapter.calibrate(model, [(batch if len(batch) > 1 else batch[0], targets)], task)
        except ZooError as error:
            return Cell(family, method, **{**done, "train": str(error)}, parameters=0)
        with model.context(**model.example_context(*batch)):
            done["train"] = _train(model, batch, targets)
            done["save"] = _save(model, batch)
        try:
            merged = model.merge()
            expected = model.eval()(*batch, context=model.example_context(*batch))
            close = torch.allclose(model.family.run(merged, *batch), expected, atol=1e-5)
            done["merge"] = "yes" if close else "defect: the merged module gives other logits"
        except MergeError as error:
            done["merge"] = str(error)
    return Cell(family, method, **done, parameters=model.num_parameters(trainable=True, head=False))


def _named(model: Any, batch: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """A model of two towers with names of classes in place of texts, and its batch without these."""
    if "text" in model.family.gives:
        model.reset_head(3, ["cat", "dog", "red bird"])
        batch = batch[:1]
    return batch, torch.arange(len(batch[0]))


def _train(model: Any, batch: tuple[Tensor, ...], targets: Tensor) -> str:
    if not model.parameters_to_train():
        return "nothing to train: neither has this method parameters, nor the model a head that has some"
    dead = model.probe(*batch)
    if dead:
        return f"defect: without a gradient: {', '.join(dead)}"
    model.train()
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    _loss(model(*batch), targets).backward()
    optimizer.step()
    model.eval()
    return "yes"


def _loss(output: Tensor, targets: Tensor) -> Tensor:
    """Of any output: logits (B, K), or something of another form."""
    return torch.nn.functional.cross_entropy(output, targets) if output.ndim == 2 else (output - 1).square().mean()


def _save(model: Any, batch: tuple[Tensor, ...]) -> str:
    from zoo.disk import attach, read

    with tempfile.TemporaryDirectory() as folder:
        saved = model.save_adapter(Path(folder) / "adapter")
        twin, _ = tiny_model(model.family.family)
        try:
            attach(twin, read(saved))
        except ZooError as error:
            return f"defect: {error}"
    with torch.no_grad(), twin.context(**twin.example_context(*batch)):
        return (
            "yes"
            if torch.equal(twin.eval()(*batch), model(*batch))
            else "defect: the loaded adapter gives other logits"
        )


def as_markdown(cells: list[Cell]) -> str:
    """The table for the documentation: a row for each method, a column for each family, reasons below."""
    families = list(dict.fromkeys(c.family for c in cells))
    by = {(c.family, c.method): c for c in cells}
    lines = ["| method | " + " | ".join(families) + " |", "| --- |" + " --- |" * len(families)]
    notes: dict[str, int] = {}
    for method in dict.fromkeys(c.method for c in cells):
        row = []
        for family in families:
            words = []
            for step in STEPS:
                answer = getattr(by[family, method], step)
                if answer == "not reached":
                    continue
                note = "" if answer == "yes" else f" no[^{notes.setdefault(answer, len(notes) + 1)}]"
                words.append(f"{step}{note}")
            row.append(", ".join(words))
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    lines.append("")
    lines += [f"[^{number}]: {reason}" for reason, number in notes.items()]
    return "\n".join(lines) + "\n"
