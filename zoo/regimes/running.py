"""`run`: carry out a regime, phase by phase, and go on where a killed run was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo import registry
from zoo.data.dataset import ImageDataset
from zoo.data.seeds import kept_generators, seed_everything
from zoo.errors import ConfigError, MismatchError, ZooError, nearest
from zoo.regimes.base import Phase, Regime
from zoo.regimes.ledger import Ledger, data_identity, structure, take
from zoo.regimes.report import RunReport
from zoo.regimes.work import Run
from zoo.train.fitting import fit as fit_once
from zoo.train.processes import Processes

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["run"]

# what `zoo.run(..., fit=...)` may say of `zoo.fit`; the rest belongs to the run itself
_OWN = ("checkpoint", "resume", "out", "train", "val", "task", "streams", "sampler", "callbacks")


def run(
    model: Model,
    regime: str | Regime,
    data: Any,
    test: Any = None,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    fit: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RunReport:
    """Train a model by a regime: a procedure of several fits.

    Args:
        regime: its name (`zoo.list_regimes()`), with `settings`, or a regime object.
        data: what the regime trains on: a data set, or a list or a dict of them; each as `zoo.open_dataset` takes it.
        test: what it is measured on, likewise.
        out: folder for the state of the run and its report. If it holds one of the same run and `resume` is true, the run goes on
            from there, to exactly the numbers of an unbroken one.
        fit: arguments of `zoo.fit` for all phases: device, workers, batch_size, precision ...
        settings: of the regime.

    Returns:
        The report; the model is what the regime made of it, in eval mode. A regime that changes the backbone (prunes it) goes on
        with another model, which is `report.model`. A run that fails leaves the given model as it was.

    Raises:
        ConfigError: a wrong setting, a phase that trains nothing, or a folder of another run.
        DataError, MismatchError: data that do not fit.
    """
    chosen = _regime(regime, settings)
    common = dict(fit or {})
    if wrong := [name for name in common if name in _OWN]:
        raise ConfigError(f"fit={{'{wrong[0]}': ...}} is decided by the regime; leave it out.")
    opened, measured = (_opened(model, chosen, part) for part in (data, test))
    identity = {
        "regime": chosen.name,
        "settings": chosen.config(),
        "fit arguments": {k: v for k, v in _json(common).items() if k not in ("device", "workers", "progress")},
        "data": data_identity(opened),
        "test data": data_identity(measured),
        "model": structure(model),
    }
    processes = Processes(common.get("device"), model)
    ledger = Ledger(Path(out) if out is not None else None, identity, processes.main)
    this = Run(model, chosen.name, opened, measured, common, ledger)
    chosen.prepare(this)
    with kept_generators(), _as_it_was(model):
        start = ledger.open(resume)
        processes.same(str(start and len(ledger.phases)), "states of the run")
        processes.barrier()
        if start is not None:
            start.put(model)
        else:
            ledger.begin(take(model))
        try:
            _carry_out(this, chosen, processes)
        except ZooError:
            ledger.withdraw()
            raise
        summary = json.loads(json.dumps(chosen.summary(this)))
        this.model.eval()
    report = RunReport(chosen, ledger.phases, ledger.values, summary, ledger.seconds, model=this.model)
    if out is not None and processes.main:
        report.save(out)
    processes.barrier()
    return report


def _carry_out(this: Run, regime: Regime, processes: Processes) -> None:
    """All phases: those that are done by putting their end state back, the others by a fit."""
    ledger = this.ledger
    finished = len(ledger.phases) if ledger.folder is not None else 0
    began = time.perf_counter()
    seed_everything(regime.seed, regime.name, "between", -1)
    names: set[str] = set()
    for number, phase in enumerate(regime.phases(this)):
        if not phase.name.replace("_", "").replace("-", "").replace(".", "").isalnum() or phase.name in names:
            raise ConfigError(
                f"The phase name '{phase.name}' of '{regime.name}' is used twice or no word of letters, digits, '-', '_', '.'."
            )
        names.add(phase.name)
        model = this.model  # by now perhaps another one
        about = _about(model, regime, phase)
        if number < finished:
            former = ledger.phases[number]["phase"]
            if former != about:
                part = next((k for k in about if former.get(k) != about[k]), "name")
                raise MismatchError(
                    f"Phase {number} of the run was '{former['name']}' and is now '{phase.name}': its {part} differs. Go on with "
                    "the same version, data and settings, or pass resume=False."
                )
            ledger.state_after(number).put(model)
        else:
            entry = _fit(this, regime, phase, ledger.place(number, phase.name))
            processes.barrier()
            ledger.seconds += time.perf_counter() - began
            began = time.perf_counter()
            ledger.close_phase({"name": phase.name, "phase": about, **entry}, take(model))
            processes.barrier()
        seed_everything(regime.seed, regime.name, "between", number)
    ledger.seconds += time.perf_counter() - began
    ledger.write()


def _fit(this: Run, regime: Regime, phase: Phase, place: Path | None) -> dict[str, Any]:
    if double := [k for k in this.fit if k in phase.fit]:
        raise ConfigError(
            f"'{double[0]}' is decided by the regime '{regime.name}' ({phase.fit[double[0]]!r} in '{phase.name}'); "
            f"leave it out of fit=, or use the regime's settings: {', '.join(regime.config())}."
        )
    options = {"seed": regime.seed, **this.fit, **phase.fit}
    with trained_only(this.model, phase.trained, phase.name):
        if phase.by is not None:
            return phase.by.train(this.model, phase.data, place, options)
        report = fit_once(
            this.model,
            phase.data,
            phase.val,
            task=phase.task,
            streams=phase.streams,
            sampler=phase.sampler,
            callbacks=phase.callbacks,
            checkpoint=place,
            **options,
        )
    return {
        "epochs": len(report.history),
        "steps": report.steps,
        "seconds": report.seconds,
        "parameters": report.parameters,
        "metrics": report.metrics,
        "history": report.history,
        "layers": report.layers,
    }


@contextmanager
def trained_only(model: Model, chosen: Any, phase: str) -> Iterator[None]:
    """Only what is chosen (see `Phase.trained`) is trained inside; everything is as it was afterwards.

    Raises:
        ConfigError: nothing is chosen, or a choice fits no trained parameter.
    """
    parameters = model.parameters_to_train()
    patterns = (chosen,) if isinstance(chosen, str) else None if chosen is None else tuple(chosen)
    if not parameters or patterns == ():
        raise ConfigError(
            f"The phase '{phase}' trains nothing: the model has no adapter with trainable parameters in use and no head, or "
            "`trained` is empty. Attach an adapter before it, or leave the phase out."
        )
    if patterns is None:
        yield
        return
    kept: set[str] = set()
    for pattern in patterns:
        fitting = {n for n in parameters if n.partition("/")[0] == pattern or fnmatchcase(n, pattern)}
        if not fitting:
            owners = {n.partition("/")[0] for n in parameters}
            raise ConfigError(
                f"The phase '{phase}' trains nothing called '{pattern}'. {nearest(pattern, owners)} Name adapters that are in "
                "use, 'head', or patterns such as 'lora/blocks.3.*'."
            )
        kept |= fitting
    frozen = [p for n, p in parameters.items() if n not in kept]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.memory = model.memory  # which blocks have anything to learn, and are worth recomputing, is seen anew
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.memory = model.memory


@contextmanager
def _as_it_was(model: Model) -> Iterator[None]:
    """A failure inside leaves the model as it was before, its numbers too."""
    before = take(model)
    try:
        with model.all_or_nothing():
            yield
    except BaseException:
        if list(before.about["adapters"]) == list(model.adapters):
            before.put(model)
        raise


def _regime(regime: str | Regime, settings: Mapping[str, Any]) -> Regime:
    if isinstance(regime, str):
        return registry.regime(regime, **settings)
    if settings:
        raise ConfigError(f"Give the settings ({', '.join(settings)}) to the regime object, not beside it.")
    return regime


def _opened(model: Model, regime: Regime, data: Any) -> Any:
    """Data sets in the structure in which they were given; lists and dicts are structure, everything else a source.

    A list of pairs, or of what the regime calls its `items`, is a source, too.
    """
    if data is None or isinstance(data, ImageDataset):
        return data
    if isinstance(data, Mapping):
        return {str(name): _opened(model, regime, part) for name, part in data.items()}
    if isinstance(data, (list, tuple)) and not (data and (isinstance(data[0], regime.items) or _is_item(data[0]))):
        return [_opened(model, regime, part) for part in data]
    return regime.open(model, data)


def _is_item(one: Any) -> bool:
    """Whether this is an image with its label, and no data set."""
    pixels = (Image.Image, Tensor, np.ndarray)
    if isinstance(one, Mapping):
        return any(isinstance(value, pixels) for value in one.values())
    pair = isinstance(one, (list, tuple)) and len(one) == 2
    return pair and (isinstance(one[0], pixels) or isinstance(one[1], (int, float, Tensor, np.generic, np.ndarray)))


def _about(model: Model, regime: Regime, phase: Phase) -> dict[str, Any]:
    """What makes a phase this one, as JSON."""
    task = phase.task
    return {  # type: ignore[no-any-return]
        "name": phase.name,
        "trained": _json(phase.trained),
        "task": task if task is None or isinstance(task, str) else type(task).__name__,
        "fit": _json(dict(phase.fit)),
        "sampler": None if phase.sampler is None else repr(phase.sampler),
        **({} if phase.by is None else {"by": json.loads(json.dumps(phase.by.about()))}),
        "data": data_identity(_opened(model, regime, phase.data)),
        "model": json.loads(json.dumps(structure(model))),
    }


def _json(value: Any) -> Any:
    """JSON types; what is none by its name."""
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if isinstance(value, torch.device):
        return str(value)
    return (
        value
        if value is None or isinstance(value, (bool, int, float, str))
        else getattr(value, "__name__", repr(type(value)))
    )
