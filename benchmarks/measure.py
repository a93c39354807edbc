"""How things are measured: turns, processor time, saved bytes, resident memory. Ratios only leave this place.

Times are processor time of one thread (on a GPU: wall time around a synchronisation), so other processes on the machine
disturb little. Configurations that are compared take turns in every round, in an order that changes from round to round,
so that a slow minute and a warm cache fall on all alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.model import Model


@dataclass
class Run:
    """One configuration: a module and how it is set up before its turn."""

    name: str
    module: nn.Module
    setup: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)

    def saved_bytes(self, images: Tensor) -> int:
        """What autograd keeps of one training forward pass, the same count for all: distinct storages, without parameters,
        buffers and the batch."""
        self.setup()
        if isinstance(self.module, Model):
            return self.module.saved_bytes(images)
        ignore = [*self.module.parameters(), *self.module.buffers(), images]
        return zoo.saved_bytes(lambda: self.module(images), ignore=ignore)

    def step(self, images: Tensor, targets: Tensor) -> float:
        """Forward, loss, backward; the gradients are dropped. Returns seconds."""
        self.setup()
        start = clock(images)
        F.cross_entropy(self.module(images), targets).backward()
        seconds = clock(images) - start
        self.forget()
        return seconds

    def evaluate(self, images: Tensor) -> float:
        """A forward pass without gradients. Returns seconds."""
        self.setup()
        with torch.no_grad():
            start = clock(images)
            self.module(images)
            return clock(images) - start

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in self.module.parameters():
            parameter.grad = None

    @property
    def median(self) -> float:
        """Of the measured turns."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """Of the measured turns."""
        return min(self.seconds)


def clock(where: Tensor) -> float:
    """Seconds: of this process on the CPU, of the wall on a GPU."""
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
        return time.perf_counter()
    return time.process_time()


def take_turns(runs: Sequence[Run], turn: Callable[[Run], float], rounds: int, tick: Callable[[], None]) -> None:
    """Fill `seconds` of every run; a first round warms up and does not count."""
    order = list(runs)
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        for run in order:
            seconds = turn(run)
            if number:
                run.seconds.append(seconds)
            tick()
        shuffle(order)


def resident(run: Run, images: Tensor) -> int:
    """Bytes by which memory grows while a forward pass waits for its backward: an independent check of `saved_bytes`.

    On the CPU the resident set of the process (Linux; 0 elsewhere), on a GPU what torch has allocated.
    """
    run.setup()
    run.module(images).sum().backward()  # what is allocated once and stays is there now
    run.forget()
    before = _in_use(images)
    output = run.module(images)
    grown = _in_use(images) - before
    del output
    return max(grown, 0)


def _in_use(where: Tensor) -> int:
    gc.collect()
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
        return torch.cuda.memory_allocated(where.device)
    if sys.platform != "linux":
        return 0
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # free pages that the allocator holds back
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak(run: Run, images: Tensor, targets: Tensor) -> int:
    """Bytes at the peak of a step above what is there before it; GPU only, else 0."""
    if not images.is_cuda:
        return 0
    run.step(images, targets)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = _in_use(images)
    run.step(images, targets)
    return torch.cuda.max_memory_allocated(images.device) - before


@dataclass
class Row:
    """One number of the report."""

    group: str
    what: str
    value: float
    target: float | None = None
    fastest: float | None = None  # the same ratio by the fastest turn
    unit: str = "x"
    by_fastest: bool = False  # overheads of a few per mille: noise only adds, so the fastest turn decides

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached, to the digits in which it is given; None without one."""
        if self.target is None:
            return None
        value = self.fastest if self.by_fastest and self.fastest is not None else self.value
        digits = 1 if self.unit == "ms" else 3 if self.target < 0.2 else 2
        return round(value, digits) <= self.target

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "group": self.group,
            "what": self.what,
            "value": round(self.value, 4),
            "fastest": None if self.fastest is None else round(self.fastest, 4),
            "unit": self.unit,
            "target": self.target,
            "passed": self.passed,
        }


def time_ratio(
    group: str, what: str, ours: Run, theirs: Run, target: float | None = None, by_fastest: bool = False
) -> Row:
    """Time of one run by that of another: of medians, and of the fastest turns."""
    return Row(group, what, ours.median / theirs.median, target, ours.fastest / theirs.fastest, by_fastest=by_fastest)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import peft
    import timm

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "peft": peft.__version__,
        "adapter-zoo": zoo.__version__,
        "python": sys.version.split()[0],
    }


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return f"CPU, {line.split(':', 1)[1].strip()}"
    return "CPU"
