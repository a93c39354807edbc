"""The loop over epochs: batches, evaluation, choice of the best weights, checkpoints, resuming."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.data.dataset import ImageDataset
from zoo.data.seeds import seed_everything
from zoo.errors import ConfigError, DataError
from zoo.tasks import Task
from zoo.train import evaluation
from zoo.train.aids import make_aids
from zoo.train.batches import Batch, BatchPlan, make_loader
from zoo.train.checkpoint import Run, Saved, Snapshot, Store, parameters_of, restore, restore_plans, snapshot
from zoo.train.evaluation import to_device
from zoo.train.hooks import HOOKS, Hooks
from zoo.train.optimizer import OptimizerService
from zoo.train.processes import Processes
from zoo.train.progress import Progress
from zoo.train.report import Report
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
    ) -> None:
        self.model, self.train, self.val, self.settings = model, train, val, settings
        self.processes, self.task, self.workers, self.bar = processes, task, workers, bar
        self.items = task.items(model)
        # a task's own modules: the first, whatever callbacks a run goes on with
        self.aids = make_aids(task, model, processes.device, settings.seed)
        callbacks = callbacks if self.aids is None else [self.aids, *callbacks]
        self.store, self.every, self.callbacks = Store(folder, processes.main, callbacks), every, callbacks
        self.hooks = Hooks(model, [c for c in callbacks if any(hasattr(c, h) for h in HOOKS)])
        self.listeners = [c for c in callbacks if not any(hasattr(c, h) for h in HOOKS)]
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
        self.total = settings.steps or settings.epochs * self.plan.batches
        self.epochs = math.ceil(self.total / self.plan.batches)
        for stream in self.streams.values():
            stream.begin(processes.device, settings, self.total)
        self.loader = make_loader(train, self.plan, workers=workers, device=processes.device, seed=settings.seed)
        self.run = Run()
        self.chosen: Snapshot | None = None

    # -- before the first step --------------------------------------------------------------------------------------

    def prepare(self, resume: bool) -> None:
        """Calibrate, make the optimizer, and go back to where the checkpoint is, if there is one."""
        model, processes, settings = self.model, self.processes, self.settings
        model.to(processes.device)
        processes.share_module(model)
        saved = self.store.read(self._identity()) if resume else None
        processes.same(str(saved and saved.state["run"]["step"]), "checkpoints")
        if saved is not None:
            restore_plans(model, saved.state["adapters"])
        model.train()
        if self.hooks.needs_calibration and saved is None:
            seed_everything(settings.seed, "calibrate")
            self.hooks.calibrate(_Calibration(self), self.task)
            processes.share_module(model)
        parameters = model.parameters_to_train()
        if self.aids is not None:
            processes.share_module(self.aids.module)
            parameters = {**parameters, **self.aids.parameters()}
        if not parameters:
            raise ConfigError(
                "The model has nothing to train: no adapter with parameters, and no head. Load it with adapter=... and "
                "num_classes=..."
            )
        processes.same(repr([(n, tuple(p.shape)) for n, p in parameters.items()]), "trained parameters")
        service = OptimizerService(
            lr=default_lr(model) if settings.lr is None else _base(settings.lr),
            total_steps=self.total,
            optimizer=settings.optimizer,
            schedule=settings.schedule,
            warmup=warmup_steps(settings.warmup, self.total),
            options=settings.optimizer_options,
        )
        service.reduce, service.streams = processes.add, self.streams
        given = {"default": settings.lr} if isinstance(settings.lr, (int, float)) else settings.lr
        add_parameters(service, model, parameters, given, settings.layer_decay, settings.weight_decay)
        self.service = service
        self.stepper = Stepper(model, self.train, service, self.hooks, processes, settings, self.task)
        seed_everything(settings.seed, "fit_start")
        self.hooks.fit_start(service, self.total)
        if saved is not None:
            self._go_back(saved)
        processes.barrier()
        if saved is None:
            self.store.clear()

    def _identity(self) -> dict[str, Any]:
        data = {"train": self.train, "val": self.val, **{f"stream {n}": s.dataset for n, s in self.streams.items()}}
        return {
            "settings": self.settings.to_json(),
            "data": {name: _data_identity(d) for name, d in data.items() if d is not None},
            "backbone": [self.model.backbone_name, self.model.fingerprint],
        }

    def _go_back(self, saved: Saved) -> None:
        restore(self.model, saved.model, self.callbacks)
        own = {} if self.aids is None else self.aids.parameters()
        self.service.load(saved.state["service"], saved.optimizer, {**parameters_of(self.model), **own})
        self.run = Run(**saved.state["run"])
        self.stepper.sums.copy_(torch.tensor(self.run.sums, dtype=self.stepper.sums.dtype))
        self.stepper.scale.load(self.run.scale)
        if self.run.best is not None and self.settings.keep == "best":
            self.chosen = self.store.read_best(self.run.best["step"])

    # -- the epochs -------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """All epochs that are still to do; then the chosen weights are in the model."""
        run = self.run
        while run.epoch < self.epochs and not run.stopped:
            began = time.perf_counter()
            self._epoch()
            self.stepper.check_pending()
            run.seconds += time.perf_counter() - began
            evaluated = time.perf_counter()
            self._close_epoch()
            run.seconds += time.perf_counter() - evaluated
            self._save()
        if self.chosen is not None:
            restore(self.model, self.chosen, self.callbacks)
        self.service.unfreeze(
            self.service.parameters
        )  # what a method froze for the last step is still a parameter to train
        self.model.eval()
        seed_everything(self.settings.seed, "fit_end")
        self.hooks.fit_end()

    def _epoch(self) -> None:
        """The batches of the present epoch that are still to do."""
        run, plan, bar = self.run, self.plan, self.bar
        batches = min(plan.batches, self.total - run.epoch * plan.batches)
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
            result = self._evaluate()
            record |= {f"val_{k}": result[k] for k in result if k not in ("images", "seconds", "images_per_second")}
        record["seconds"] = run.epoch_seconds
        record["images_per_second"] = images / run.epoch_seconds if run.epoch_seconds else 0.0
        run.history.append(record)
        run.epoch, run.batch, run.epoch_seconds = run.epoch + 1, 0, 0.0
        self.stepper.sums.zero_()
        if self.val is not None and self.hooks.ready():  # what has not reached its budget is not what will be exported
            self._choose(record)
        best = run.best is not None and run.best["epoch"] == record["epoch"]
        self.bar.line(_line(record, self.epochs, best, self.items))
        for listener in self.listeners:
            getattr(listener, "log", listener)(dict(record))

    def _evaluate(self) -> dict[str, Any]:
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
            bar=self.bar,
            seed=self.settings.seed,
        )

    def _choose(self, record: dict[str, Any]) -> None:
        """Remember the weights if they are the best so far; stop if that was too long ago."""
        run, settings = self.run, self.settings
        if settings.keep != "best" and settings.patience is None:
            return
        key = f"val_{settings.monitor}"
        if key not in record:
            known = ", ".join(k[4:] for k in record if k.startswith("val_"))
            raise ConfigError(f"monitor is '{settings.monitor}', which the evaluation does not give; it gives {known}.")
        value = -record[key] if "loss" in settings.monitor or "error" in settings.monitor else record[key]
        score = [value, -record["val_loss"]]  # of two epochs with equal accuracy, the one with the lower loss
        former = run.best
        if former is None or score > former["score"]:
            run.best = {**record, "score": score}
            if settings.keep == "best":
                self.chosen = snapshot(self.model, self.callbacks)
        run.waited = 0 if former is None or value > former["score"][0] else run.waited + 1
        run.stopped = settings.patience is not None and run.waited >= settings.patience

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint; process 0 does."""
        run = self.run
        run.sums, run.scale = self.stepper.sums.tolist(), self.stepper.scale.save()
        best = None if run.best is None else run.best["step"]
        self.store.write(self.model, self.service, asdict(run), self._identity(), self.chosen, best)

    def first_batch(self) -> list[Batch]:
        """The first part of the first batch of the first epoch, if anything of it can be read."""
        self.plan.epoch, self.plan.start, self.plan.stop = 0, 0, 1
        batches = list(
            make_loader(self.train, self.plan, workers=0, device=self.processes.device, seed=self.settings.seed)
        )
        return [b for b in batches[:1] if b.count]

    # -- afterwards -------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        run, settings = self.run, self.settings
        last = {**run.history[-1], "chosen": "last"}
        best = {**run.best, "chosen": "best"} if settings.keep == "best" and run.best is not None else last
        best.pop("score", None)
        data: dict[str, Any] = {
            "train": self.train.name,
            "train_images": len(self.train),
            "items": self.items,
            "classes": self.model.num_classes,
        }
        if self.val is not None:
            data |= {"val": self.val.name, "val_images": len(self.val)}
        elsewhere = int(self.processes.add(torch.tensor([len(run.skipped)], device=self.processes.device))) - len(
            run.skipped
        )
        return Report(
            history=run.history,
            best=best,
            stopped="early" if run.stopped else "finished",
            steps=run.step,
            images=run.images,
            seconds=run.seconds,
            images_per_second=run.images / run.training_seconds if run.training_seconds else 0.0,
            parameters=self.model.num_parameters(trainable=True),
            skipped=[*run.skipped, *([f"{elsewhere} more, seen by other processes"] if elsewhere else [])],
            settings={
                **settings.to_json(),
                "lr": settings.to_json()["lr"] or self.service.lr,
                "total_steps": self.total,
            },
            data=data,
        )

    def _note_skipped(self, parts: Sequence[Batch]) -> None:
        for where, reason in (item for batch in parts for item in batch.skipped):
            if where not in self.run.skipped:
                self.run.skipped.append(where)
                self.bar.line(f"skipped: {reason}")


class _Calibration:
    """Training batches for `calibrate`: (inputs, targets) on the device, the same on every process, from the start each time."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        trainer = self.trainer
        settings, device = trainer.settings, trainer.processes.device
        size = max(1, settings.batch_size // settings.accumulate)
        plan = BatchPlan(
            len(trainer.train), size, seed=settings.seed, blocks=trainer.plan.blocks, window=trainer.plan.window
        )
        for batch in make_loader(trainer.train, plan, workers=0, device=device, seed=settings.seed):
            if batch.count:
                trainer.task.check_batch(trainer.model, trainer.train, batch.targets)
                yield (
                    to_device(batch.inputs, device, evaluation.input_dtype(trainer.model, settings.precision)),
                    to_device(batch.targets, device),
                )

    def __len__(self) -> int:
        size = max(1, self.trainer.settings.batch_size // self.trainer.settings.accumulate)
        return math.ceil(len(self.trainer.train) / size)


def _base(lr: Any) -> float:
    return float(lr) if isinstance(lr, (int, float)) else float(lr.get("default", next(iter(lr.values()))))


def _data_identity(dataset: ImageDataset) -> list[Any]:
    labels = dataset.labels
    return [len(dataset), None if labels is None else zlib.crc32(labels.tobytes()), dataset.classes]


def _line(record: dict[str, Any], epochs: int, best: bool, items: str) -> str:
    parts = [f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}"]
    for title, prefix in (("training", ""), ("validation", "val_")):
        if f"{prefix}loss" in record:
            accuracy = f", accuracy {100 * record[f'{prefix}accuracy']:.1f} %" if f"{prefix}accuracy" in record else ""
            parts.append(f"{title}: loss {record[f'{prefix}loss']:.4f}{accuracy}")
    return "   ".join([*parts, f"{record['images_per_second']:.0f} {items}/s", *(["best so far"] if best else [])])
