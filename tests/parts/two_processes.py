"""Starting a test's own file on two CPU processes, as `accelerate launch` does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(file: str, *arguments: str | Path) -> None:
    """Run a file on two processes; a failure of either fails the test with what it wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests" / "parts"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, file, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def pair(file: str | Path, folder: Path, *arguments: str | Path) -> None:
    """Run a file as two processes that join by `joined`; a failure of either fails the test with what it wrote."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests" / "parts"), os.environ.get("PYTHONPATH", "")])
    started = []
    for rank in range(2):
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"JOIN": str(folder / "join"), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(file), *map(str, arguments)]
        with (folder / f"log.{rank}").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=480) for process in started]
    finally:
        for process in started:
            process.kill()
    told = "\n".join((folder / f"log.{rank}").read_text(errors="replace")[-3000:] for rank in range(2))
    assert codes == [0, 0], told


def joined() -> int:
    """In a process that `pair` started: join the other; returns which of both this is."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['JOIN']}", rank=rank, world_size=2)
    return rank
