"""PST and DSL on two processes: the same entries on both, and those of one process, but for a few that nearly tie."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from train_parts import easy_data, fit, tiny_model
from two_processes import launch

import zoo
from zoo.train.processes import Processes

METHODS = {
    "pst": {"rank": 2, "mask_rank": 2, "sparsity": 0.5},
    "dsl": {"density": 0.5, "interval": 3, "start": "random"},
}


def train_both(out: Path) -> None:
    """The merged weights of each process."""
    found: dict[str, Tensor] = {}
    for method, settings in METHODS.items():
        model = tiny_model(zoo.adapter(method, **settings))
        fit(model, easy_data(48), device="cpu", batch_size=12, epochs=2)
        plain = model.merge()
        found |= {f"{method} {n}": m.weight for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    torch.save({n: w.detach().clone() for n, w in found.items()}, out.with_suffix(f".{Processes('cpu').rank}"))


def test_two_processes_prune_and_grow_as_one(tmp_path: Path) -> None:
    launch(train_both, tmp_path, tmp_path / "two")
    train_both(tmp_path / "one")
    one, two, other = (torch.load(tmp_path / n, weights_only=True) for n in ("one.0", "two.0", "two.1"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(two[name], other[name]), name
        apart = (weight - two[name]).abs() > 1e-5
        assert float(apart.float().mean()) < 0.01, name
        if " blocks." in name:
            assert 0.3 < float((weight == 0).float().mean()) < 0.6, name
