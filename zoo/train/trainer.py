"""The loop over epochs: batches, evaluation, choice of the best weights, checkpoints, resuming."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.data.dataset import ImageDataset, Transform
from zoo.data.seeds import seed_everything
from zoo.errors import ConfigError, DataError
from zoo.tasks import Task
from zoo.train import evaluation
from zoo.train.aids import make_aids
from zoo.train.batches import Batch, BatchPlan, make_loader
from zoo.train.calibration import Calibration
from zoo.train.checkpoint import Run, Saved, Snapshot, Store, parameters_of, restore, restore_plans, snapshot
from zoo.train.choice import NO_METRICS, score_of
from zoo.train.ema import Ema
from zoo.train.failing import Before
from zoo.train.hooks import HOOKS, Hooks
from zoo.train.identity import identity
from zoo.train.loggers import Logger
from zoo.train.optimizer import OptimizerService
from zoo.train.processes import Processes
from zoo.train.progress import Progress, epoch_line
from zoo.train.rates import few_steps, search
from zoo.train.rehearsal import rehearsal
from zoo.train.resuming import asked, batches_of_epoch, length, may_differ, new_leg
from zoo.train.schedule import add_parameters, default_lr, warmup_steps
from zoo.train.settings import Settings
from zoo.train.step import Stepper
from zoo.train.streams import Stream

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Trainer"]


class Trainer:
    """One run of `zoo.fit`; see there for the arguments."""

    def __init__(
        self,
        model: Model,
        train: ImageDataset,
        val: ImageDataset | None,
        settings: Settings,
        processes: Processes,
        *,
        task: Task,
        workers: int | None,
        folder: Path | None,
        every: int | None,
        callbacks: Sequence[Any],
        bar: Progress,
        streams: Mapping[str, Stream] | None = None,
        metrics: Mapping[str, Any] | None = None,
        before: Before | None = None,
        loggers: Sequence[Logger] = (),
        plain: Transform | None = None,
    ) -> None:
        self.model, self.train, self.val, self.settings = model, train, val, settings
        self.processes, self.task, self.workers, self.bar = processes, task, workers, bar
        self.before = before
        self.items, self.metrics = task.items(model), dict(metrics or {})
        # a task's own modules: the first, whatever callbacks a run goes on with
        self.aids = make_aids(task, model, processes.device, settings.seed)
        callbacks = callbacks if self.aids is None else [self.aids, *callbacks]
        self.ema = Ema(model, settings.ema) if settings.ema is not None else None
        callbacks = callbacks if self.ema is None else [self.ema, *callbacks]
        self.store, self.every, self.callbacks = Store(folder, processes.main, callbacks), every, callbacks
        self.hooks = Hooks(model, [c for c in callbacks if any(hasattr(c, h) for h in HOOKS)])
        self.plain = plain  # the transform of data that are not trained on
        self.listeners = [*(c for c in callbacks if not any(hasattr(c, h) for h in HOOKS)), *loggers]
        self.streams = dict(streams or {})
        sampler = settings.sampler.over(train, settings.batch_size, settings.seed) if settings.sampler else None
        self.plan = BatchPlan(
            len(train) if sampler is None else sampler.size,
            settings.batch_size,
            parts=settings.accumulate,
            rank=processes.rank,
            world=processes.world,
            seed=settings.seed,
            drop_last=settings.drop_last,
            blocks=train.blocks,
            window=train.rows.window,
            sampled=sampler and sampler.order,
        )
        if not self.plan.batches:
            raise ConfigError(
                f"drop_last=True leaves nothing: {len(train)} {self.items} are less than one batch of {settings.batch_size}."
            )
        self.run = Run(batches=self.plan.batches)
        self.total, self.epochs = length(self)
        for stream in self.streams.values():
            stream.begin(processes.device, settings, self.total)
        self.loader = make_loader(train, self.plan, workers=workers, device=processes.device, seed=settings.seed)
        self.chosen: Snapshot | None = None
        self.identity: dict[str, Any] = {}

    # -- before the first step --------------------------------------------------------------------------------------

    def prepare(self, resume: bool | Sequence[str]) -> None:
        """Calibrate, make the optimizer, and go back to where the checkpoint is, if there is one."""
        model, processes, settings = self.model, self.processes, self.settings
        again, may = asked(resume, self.store.folder)
        model.to(processes.device)
        processes.share_module(model)
        saved = None
        if self.store.folder is not None:
            self.identity = identity(model, settings, self.task, self.train, self.val, self.streams)
            if again:
                saved = self.store.read(self.identity, lambda found, other: may_differ(found, other, may, self))
        processes.same(str(saved and saved.state["run"]["step"]), "checkpoints")
        if saved is not None:
            restore_plans(model, saved.state["adapters"])
        model.train()
        if self.hooks.needs_calibration and saved is None:
            seed_everything(settings.seed, "calibrate")
            self.hooks.calibrate(Calibration.of(self), self.task)
            processes.share_module(model)
        parameters = model.parameters_to_train()
        if self.aids is not None:
            processes.share_module(self.aids.module)
            parameters = {**parameters, **self.aids.parameters()}
        if not parameters:
            done = [a.method for a in self.hooks.adapters if a.needs_calibration]
            raise ConfigError(
                f"'{done[0]}' has nothing to train. It only needs to see the training data: zoo.calibrate(model, train)."
                if done
                else "The model has nothing to train: no adapter with parameters, and no head. Load it with adapter=... and "
                "num_classes=..."
            )
        processes.same(repr([(n, tuple(p.shape)) for n, p in parameters.items()]), "trained parameters")
        self._set_rates(saved)
        service = OptimizerService(
            lr=self.base_lr,
            total_steps=self.total,
            optimizer=settings.optimizer,
            schedule=settings.schedule,
            warmup=warmup_steps(settings.warmup, self.total),
            options=settings.optimizer_options,
        )
        service.reduce, service.streams = processes.add, self.streams
        service.parts, service.task = settings.accumulate * processes.world, self.task
        given = {"default": float(self.lr)} if isinstance(self.lr, (int, float)) else self.lr
        add_parameters(
            service, model, parameters, given, settings.layer_decay, settings.weight_decay, self._default_rate
        )
        self.service = service
        self.stepper = Stepper(model, self.train, service, self.hooks, processes, settings, self.task)
        seed_everything(settings.seed, "fit_start")
        self.hooks.fit_start(service, self.total)
        if saved is not None:
            self._go_back(saved)
        else:
            self._rehearse()
        processes.barrier()
        if saved is None:
            self.store.clear()

    def _set_rates(self, saved: Saved | None) -> None:
        """The learning rates that are meant: given, found by a search, or the defaults."""
        self.lr: Any = self.settings.lr
        if self.lr == "auto":
            if saved is None:
                self.run.lr, self.run.lr_search = search(self)
            self.lr = self.run.lr if saved is None else saved.state["run"]["lr"]
        self.base_lr = self._default_rate(default_lr(self.model)) if self.lr is None else _base(self.lr)

    def _default_rate(self, rate: float) -> float:
        return few_steps(rate, self.total)

    def _go_back(self, saved: Saved) -> None:
        rates = {name: self.service.settings(name)["lr_scale"] for name in self.service.parameters}
        restore(self.model, saved.model, self.callbacks, complete=True)
        own = {} if self.aids is None else self.aids.parameters()
        self.service.load(saved.state["service"], saved.optimizer, {**parameters_of(self.model), **own})
        self.run = Run(**saved.state["run"])
        if saved.different:
            new_leg(self, saved, rates)
        else:
            self.total, self.epochs = length(self)
        self.run.batches = self.plan.batches
        self.stepper.sums.copy_(torch.tensor(self.run.sums, dtype=self.stepper.sums.dtype))
        if self.run.scale:
            self.stepper.scale.load(self.run.scale)
        if self.run.best is not None and self.settings.keep == "best":
            self.chosen = self.store.read_best(self.run.best["step"])

    def _rehearse(self) -> None:
        """Evaluate a few items before the first step: a metric that breaks, or a monitor that there is not, is told now."""
        if self.val is None:
            return
        few = self.val.select(range(min(4, len(self.val), self.settings.batch_size)))
        known = rehearsal(self.model, few, self.processes, self.task, self.settings.precision, self.metrics)
        if known is not None and (self._chooses or self.settings.monitor != self.task.monitor):
            self._check_monitor(known)

    @property
    def _chooses(self) -> bool:
        return self.settings.keep == "best" or self.settings.patience is not None

    def _check_monitor(self, known: Iterable[str]) -> None:
        monitor = self.settings.monitor.removeprefix("-")
        if monitor not in known:
            names = ", ".join(name for name in known if name not in NO_METRICS)
            raise ConfigError(f"monitor is '{monitor}', which the evaluation does not give; it gives {names}.")

    # -- the epochs -------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """All epochs that are still to do; then the chosen weights are in the model."""
        run = self.run
        while run.epoch < self.epochs and not run.stopped:
            began = time.perf_counter()
            self.one_epoch()
            self.stepper.check_pending()
            run.seconds += time.perf_counter() - began
            evaluated = time.perf_counter()
            self._close_epoch()
            run.seconds += time.perf_counter() - evaluated
            self._save()
        if self.chosen is not None:
            restore(self.model, self.chosen, self.callbacks)
        elif self.ema is not None:
            self.ema.put()
        self.service.unfreeze(
            self.service.parameters
        )  # what a method froze for the last step is still a parameter to train
        self.model.eval()
        seed_everything(self.settings.seed, "fit_end")
        self.hooks.fit_end()

    def one_epoch(self) -> None:
        """The batches of the present epoch that are still to do."""
        run, plan, bar = self.run, self.plan, self.bar
        batches = batches_of_epoch(self)
        plan.epoch, plan.start, plan.stop = run.epoch, run.batch, batches
        loader = iter(self.loader)
        task = bar.task(f"epoch {run.epoch + 1}/{self.epochs}", batches, run.batch)
        self.model.train()
        if run.batch == 0:
            seed_everything(self.settings.seed, "epoch_start", run.epoch)
            self.hooks.epoch_start(run.epoch)
        while run.batch < batches:
            began = time.perf_counter()
            parts = [next(loader) for _ in range(plan.parts)]
            self._note_skipped(parts)
            planned = plan.batch_images(run.batch)
            self.stepper.step(run.step, parts, planned)
            run.step += 1
            run.batch += 1
            run.images += planned
            if self.before is not None:
                self.before.passed(run.step, self.total)
            elapsed = time.perf_counter() - began
            run.training_seconds += elapsed
            run.epoch_seconds += elapsed
            bar.move(task, f"{plan.batch_size / elapsed:.0f} {self.items}/s")
            if self.every and run.step % self.every == 0 and run.batch < batches:
                self.stepper.check_pending()
                self._save()
        bar.end(task)

    def _close_epoch(self) -> None:
        """Hooks, evaluation, the record of the epoch, the choice."""
        run, settings = self.run, self.settings
        seed_everything(settings.seed, "epoch", run.epoch)
        self.hooks.epoch_end(run.epoch)
        self._note_layers()
        images, loss, extra, hits, labelled = self.stepper.sums.tolist()
        if not images:
            raise DataError(
                f"Nothing was trained on in epoch {run.epoch + 1}: none of the {self.items} could be read. First: "
                f"{run.skipped[0] if run.skipped else 'there are none'}. Mend the data; on_error='raise' says what is wrong."
            )
        record: dict[str, Any] = {"epoch": run.epoch + 1, "step": run.step, "lr": self.service.groups[0]["lr"]}
        record["loss"] = loss / max(images, 1)
        if extra:
            record["extra_loss"] = extra / max(images, 1)
        if labelled:
            record["accuracy"] = hits / labelled
        if self.val is not None:
            with self._averaged():
                result = self.evaluate()
            record |= {f"val_{k}": result[k] for k in result if k not in NO_METRICS}
        record["seconds"] = run.epoch_seconds
        record["images_per_second"] = images / run.epoch_seconds if run.epoch_seconds else 0.0
        run.history.append(record)
        part = {"batch": run.batch, "sums": self.stepper.sums.tolist(), "epoch_seconds": run.epoch_seconds}
        run.cut = part if run.batch < self.plan.batches else {}
        run.epoch, run.batch, run.epoch_seconds = run.epoch + 1, 0, 0.0
        self.stepper.sums.zero_()
        if self.val is not None and self.hooks.ready():  # what has not reached its budget is not what will be exported
            self._choose(record)
        best = run.best is not None and run.best["step"] == record["step"]
        self.bar.line(epoch_line(record, self.epochs, best, self.items))
        for listener in self.listeners:
            getattr(listener, "log", listener)(dict(record))

    def _note_layers(self) -> None:
        """What the layers have now, if that is not what they had before."""
        found, run = self.hooks.by_layer(), self.run
        if found and (not run.layers or run.layers[-1]["of"] != found):
            run.layers.append({"epoch": run.epoch + 1, "step": run.step, "of": found})

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.ema is None else self.ema.inside()

    def evaluate(self) -> dict[str, Any]:
        assert self.val is not None
        return evaluation.run(
            self.model,
            self.val,
            self.processes,
            self.hooks,
            batch_size=max(1, self.settings.batch_size // self.settings.accumulate),
            task=self.task,
            precision=self.settings.precision,
            workers=self.workers,
            metrics=self.metrics,
            bar=self.bar,
            seed=self.settings.seed,
        )

    def _choose(self, record: dict[str, Any]) -> None:
        """Remember the weights if they are the best so far; stop if that was too long ago."""
        run, settings = self.run, self.settings
        if not self._chooses:
            return
        self._check_monitor([k[4:] for k in record if k.startswith("val_")])
        score = score_of(record, settings.monitor, self.metrics)
        former = run.best
        if former is None or score > former["score"]:
            run.best = {**record, "score": score}
            if settings.keep == "best":
                with self._averaged():
                    self.chosen = snapshot(self.model, self.callbacks)
        run.waited = 0 if former is None or score[0] > former["score"][0] else run.waited + 1
        run.stopped = settings.patience is not None and run.waited >= settings.patience

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint; process 0 does."""
        run = self.run
        run.sums, run.scale = self.stepper.sums.tolist(), self.stepper.scale.save()
        run.finished = run.stopped or run.epoch >= self.epochs
        best = None if run.best is None else run.best["step"]
        self.store.write(self.model, self.service, asdict(run), self.identity, self.chosen, best)

    def first_batch(self) -> list[Batch]:
        """The first part of the first batch of the first epoch, if anything of it can be read."""
        self.plan.epoch, self.plan.start, self.plan.stop = 0, 0, 1
        batches = list(
            make_loader(self.train, self.plan, workers=0, device=self.processes.device, seed=self.settings.seed)
        )
        return [b for b in batches[:1] if b.count]

    def _note_skipped(self, parts: Sequence[Batch]) -> None:
        for where, reason in (item for batch in parts for item in batch.skipped):
            if where not in self.run.skipped:
                self.run.skipped.append(where)
                self.bar.line(f"skipped: {reason}")


def _base(lr: Any) -> float:
    return float(lr) if isinstance(lr, (int, float)) else float(lr.get("default", next(iter(lr.values()))))
