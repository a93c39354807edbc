"""Functions that run on two CPU processes at once: forked from a process that has imported what they need.

`launch` gives each process the environment that `accelerate launch` would (tests/train/test_train_processes.py starts that
command itself); `pair` leaves joining to `joined`. The functions are found by their module and name, so they stand at the
top of a test file; their processes have no part in what the tests before them left behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest

from zoo.disk.store import alone

WARMED = "warmed"  # imported once, by the process that all others are forked from
LIMIT = 560  # seconds, below the limit of a test


def launch(function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call a function on two processes as `accelerate launch` would; a failure of either fails the test with its words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    pair(function, folder, *arguments, environment={**environment, "ACCELERATE_USE_CPU": "true"})


def pair(
    function: Callable[..., None], folder: Path, *arguments: Any, environment: dict[str, str] | None = None
) -> None:
    """Call a function on two processes that join by `joined`; a failure of either fails the test with its words."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WARMED])
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "JOIN": str(folder / "join")}
        log = folder / f"log.{rank}"
        started.append(context.Process(target=_one, args=(function, arguments, {**own, **(environment or {})}, log)))
    try:
        for process in started:
            process.start()
        left = list(started)
        while left and connection.wait([process.sentinel for process in left], LIMIT):
            left = [process for process in left if process.is_alive()]
            if any(process.exitcode for process in started):
                break  # the other would wait for it
    finally:
        for process in started:
            process.kill()
            process.join()
    told = "\n".join((folder / f"log.{rank}").read_text(errors="replace")[-3000:] for rank in range(2))
    assert [process.exitcode for process in started] == [0, 0], told


@contextlib.contextmanager
def shared(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder of all workers of a run, which only one of them is in: what is costly is made by the first that needs it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with alone(folder):
        yield folder


def _one(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        function(*arguments)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # without the wait of gloo's threads


def joined() -> int:
    """In a process that `pair` started: join the other; returns which of both this is."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['JOIN']}", rank=rank, world_size=2)
    return rank
