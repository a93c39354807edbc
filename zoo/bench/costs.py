"""What a training step costs, in time and in bytes that are kept for backward, beside a step of full fine-tuning.

The reference is full fine-tuning of the library's own module, without anything of ours. What is compared takes turns in one
process, in an order that changes from round to round, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo import __version__, registry
from zoo.engine.memory import saved_bytes
from zoo.errors import ConfigError
from zoo.loading import load
from zoo.model import Model
from zoo.train.evaluation import autocast

__all__ = [
    "COSTS",
    "REFERENCE",
    "beside_full",
    "best_device",
    "head_width",
    "machine",
    "measure",
    "revision",
    "versions",
]

REFERENCE = "library"  # every weight trained, in the library's own module without anything of ours
PACKAGES = ("torch", "timm", "transformers", "numpy")
COSTS = ("saved_bytes", "saved_ratio", "step_seconds", "step_ratio")  # of a row, what `beside_full` says of a model
Say = Callable[[str], object]


def head_width(backbone: str, num_classes: int) -> int:
    """The width of the head: none where the backbone is for something else than classifying."""
    cls, _ = registry.find_backbone(backbone)
    return num_classes if cls.pools and cls.task == "classify" else 0


def machine(device: str | None) -> dict[str, Any]:
    """What the numbers were measured on."""
    where = torch.device(best_device(device))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "adapter_zoo": __version__,
    }


def versions() -> dict[str, str]:
    """Of Python, of ours and of the libraries below, those that are installed."""
    found = {"python": platform.python_version(), "adapter_zoo": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def revision() -> str | None:
    """The commit of this checkout, with "-dirty" if files differ from it; None where it is no checkout of ours."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def best_device(device: str | None) -> str:
    """The device asked for, or the best there is."""
    if device:
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def measure(
    backbone: str,
    methods: list[str],
    levels: list[str],
    batch_size: int,
    rounds: int,
    num_classes: int,
    *,
    device: str | None = None,
    precision: str = "fp32",
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """One row for each method and memory setting, the reference first. Times in seconds, memory in bytes.

    Args:
        say: is told what goes on.

    Raises:
        UnknownNameError: an unknown backbone or method. AttachError: a method that this backbone refuses.
        ConfigError: an unknown precision, or a method that has nothing to train.
    """
    autocast(torch.device("cpu"), precision)  # refuses an unknown one, before models are built
    where, width = best_device(device), head_width(backbone, num_classes)
    variants = [(m, level) for m in methods for level in levels]
    runs: list[_Run] = []
    say(f"building {len(variants) + 1} models ...")
    for method, level in variants:
        model = load(backbone, adapter=method, num_classes=width, pretrained=False, memory=level, seed=0, device=where)
        if not runs:
            batch = model.example_batch(batch_size)
            targets = torch.randint(width, (batch_size,), device=where) if width else None
            plain = _plain(model)
            runs.append(_Run(REFERENCE, "", plain, partial(model.family.run, plain), batch, targets, precision))
        runs.append(_Run(method, level, model, model, batch, targets, precision))
    return _in_turns(runs, rounds, say)


def beside_full(model: Model, batch_size: int, rounds: int, precision: str = "fp32") -> dict[str, float]:
    """What a step of this model costs, as "saved_bytes", "saved_ratio", "step_seconds" and "step_ratio".

    The ratios are to full fine-tuning of the same backbone with the same head. The model is trained on by this.
    """
    batch = model.example_batch(batch_size)
    targets = torch.randint(model.num_classes, (batch_size,), device=batch[0].device)
    plain = _plain(model)
    full = _Run(REFERENCE, "", plain, partial(model.family.run, plain), batch, targets, precision)
    row = _in_turns([full, _Run("", "", model, model, batch, targets, precision)], rounds)[1]
    return {name: row[name] for name in COSTS}


def _in_turns(runs: Sequence[_Run], rounds: int, say: Say = lambda text: None) -> list[dict[str, Any]]:
    """A row for each run, the first being the reference."""
    for run in runs:  # the first steps allocate and choose kernels
        run.step()
        run.step()
    times: list[list[float]] = [[] for _ in runs]
    for index in range(rounds):
        say(f"round {index + 1} of {rounds} ...")
        for position in range(len(runs)):
            which = (position + index) % len(runs)  # nobody always runs behind the same neighbour
            times[which].append(runs[which].step())
    full_bytes = runs[0].saved_bytes
    return [
        {
            "method": run.method,
            "memory": run.level,
            "trainable": run.trainable,
            "saved_bytes": run.saved_bytes,
            "saved_ratio": run.saved_bytes / full_bytes if full_bytes else 0.0,
            "step_seconds": statistics.median(seconds),
            "step_ratio": statistics.median(mine / full for mine, full in zip(seconds, times[0], strict=True)),
        }
        for run, seconds in zip(runs, times, strict=True)
    ]


def _plain(model: Model) -> nn.Module:
    """The library's module, with a classifier if the model has one, every parameter trainable."""
    with model.disable():
        return model.merge()


class _Run:
    """One model with its own optimizer, stepped on always the same batch."""

    def __init__(
        self,
        method: str,
        level: str,
        model: nn.Module,
        call: Callable[..., Tensor],
        batch: tuple[Tensor, ...],
        targets: Tensor | None,
        precision: str,
    ) -> None:
        self.method, self.level, self.call = method, level, call
        self.batch, self.targets, self.device = batch, targets, batch[0].device
        self.precision = precision
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError(f"'{method}' has nothing to train here: it trains a head, and this backbone has none.")
        self.trainable = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        with autocast(self.device, self.precision):
            if isinstance(model, Model):
                self.saved_bytes = model.saved_bytes(*batch)
            else:
                self.saved_bytes = saved_bytes(lambda: call(*batch), [*batch, *model.parameters(), *model.buffers()])

    def step(self) -> float:
        """One training step (forward, backward, optimizer); returns its seconds."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        with autocast(self.device, self.precision):
            output = self.call(*self.batch).float()
            if self.targets is None:
                loss = output.square().mean()
            else:
                loss = functional.cross_entropy(output, self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start
