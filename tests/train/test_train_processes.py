"""Two CPU processes under `accelerate launch` train to the numbers of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from context_adapters import Graded, ScaledByQuality, Stepping
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_parts import difference, easy_data, tiny_model, weights

import zoo
from zoo.train import IST
from zoo.train.processes import Processes

METHODS: dict[str, Any] = {
    "ladder": {"reduction": 2, "rerun": 1},
    "lora": {},
    "vpt": {"num_tokens": 3},
    "meft": {"rank": 2},
    "hyperformer": {"rank": 4, "task_dim": 4, "hidden": 8, "projected": 8},
    "adalora": {"rank": 3, "target_rank": 2},
    "increlora": {"target_rank": 2},
    "triadaptlora": {"target_rank": 2, "added": 2},
    "spt": {"budget": 0.002, "rank": 2, "dropout": 0.0, "drop_path": 0.0, "num_batches": 3},
    "diffora": {"rank": 2, "warmup": 2, "steps": 3},
}
SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 12, "lr": 1e-2, "progress": False, "device": "cpu"}


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


class Odd:
    """Leaves parameters unused on one process, and freezes and adds some on the way, as samplers and growing methods do."""

    def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
        self.optimizer, self.draws = optimizer, torch.zeros(())
        self.extra = torch.nn.Parameter(torch.ones(2))

    def step_start(self, model: zoo.Model, step: int) -> None:
        self.draws = self.draws + torch.rand(())  # must be equal on all processes
        names = [n for n in self.optimizer.parameters if n.startswith("lora/")]
        self.optimizer.unfreeze(names)
        self.optimizer.freeze(names[step % 2 :: 2])
        if step == 2:
            self.optimizer.add({"lora/extra": self.extra})

    def extra_loss(self, model: zoo.Model, outputs: Tensor, targets: Tensor) -> Tensor:
        used = (targets == 3).sum()  # often no such image on a process: no gradient there
        return used * (self.extra**2).sum() / len(targets) if int(used) else 0 * outputs.sum()

    def after_backward(self, model: zoo.Model, step: int) -> None:
        score = self.optimizer.reduce(torch.ones(()))
        assert float(score) == world()


def train(out: Path) -> None:
    """All runs of this test; what they gave goes to `out` (of process 0; the others must agree with it)."""
    torch.set_num_threads(1)
    histories, tensors = {}, {}
    data = easy_data(37, noise=1)  # the last batch has one image: one process has nothing to do
    for name in [*METHODS, "odd", "dropout", "context", "ist"]:
        model = tiny_model(
            zoo.adapter(name, **METHODS[name])
            if name in METHODS
            else [ScaledByQuality(targets="q,v"), Stepping()]
            if name == "context"
            else zoo.adapter("lora", dropout=0.3 * (name == "dropout"))
        )
        task = Graded() if name == "context" else None
        odd = Odd()
        # random numbers belong to the parts of a batch: two parts draw alike on one process and on two
        parts = 2 // world() if name == "dropout" else 1
        sampler = IST(every=2)
        callbacks = [odd] if name == "odd" else [sampler] if name == "ist" else []
        report = zoo.fit(
            model, data, easy_data(13, seed=1), callbacks=callbacks, accumulate=parts, task=task, **SETTINGS
        )
        histories[name] = report.history
        tensors |= {f"{name}:{k}": v for k, v in weights(model).items()}
        if name == "odd":
            tensors |= {"odd:draws": odd.draws, "odd:extra": odd.extra.detach()}
        if name == "ist":
            tensors |= {"ist:scores": sampler.scores, "ist:updates": torch.tensor(sampler.updates)}
        metrics = zoo.evaluate(model, easy_data(21, seed=2), per_class=True, task=task, progress=False, device="cpu")
        histories[f"{name}:test"] = [{k: v for k, v in metrics.items() if "second" not in k}]
    processes = Processes("cpu")
    processes.same(repr([(k, v.tolist()) for k, v in tensors.items()]), "results")
    if processes.main:
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / f"{processes.world}.safetensors")
        (out / f"{processes.world}.json").write_text(json.dumps(histories))


@pytest.mark.slow
def test_two_processes_train_to_the_numbers_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command = [
        *accelerate,
        "--dynamo_backend",
        "no",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        str(port),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(tmp_path)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one.keys() == two.keys()
    for run, records in one.items():
        for a, b in zip(records, two[run], strict=True):
            assert a.pop("per_class", None) == b.pop("per_class", None)
            numbers = {k: v for k, v in a.items() if "second" not in k}
            assert {k: v for k, v in b.items() if "second" not in k} == pytest.approx(numbers, rel=2e-5), run
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    for tensors in (first, second):  # a softmax does not see the keys' bias: its gradient is noise, which Adam blows up
        for key in [k for k in tensors if k.endswith("side.qkv.bias")]:
            q, _, v = tensors[key].chunk(3)
            tensors[key] = torch.cat([q, v])
    assert difference(first, second) < 1e-4
    assert all(any(k.startswith(f"{m}:{m}/") for k in first) for m in METHODS)
    assert torch.equal(first["odd:draws"], second["odd:draws"])
    assert not torch.equal(first["odd:extra"], torch.ones(2))
    assert torch.equal(first["ist:updates"], second["ist:updates"]) and first["ist:scores"].any()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
