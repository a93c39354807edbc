"""The scripts that train the small members: a run that was stopped and goes on is the unbroken one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from cifar import augment, taught
from pretraining import Run, arguments

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


def train(out: Path, epochs: int, stop: int | None = None) -> Run:
    """Some epochs of regression with noise that is drawn anew each time; `stop` leaves after that epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    args = arguments("", "toy").parse_args(
        ["--out", str(out), "--epochs", str(epochs), "--batch-size", "8", "--warmup", "0.5", "--device", "cpu"]
    )
    run = Run(model, args, 5, lambda name, p: name == "0.weight")
    for epoch in run.epochs():
        if epoch == stop:
            return run
        for index in run.batches(epoch, len(x)):
            noise = torch.randn(len(index), 6, generator=run.generator)
            run.step((model(x[index] + 0.1 * noise) - y[index]).square().mean())
    run.averaged()
    run.finish(score=0.5)
    return run


@needs_muon
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 4, stop=2)
    parts = train(tmp_path / "parts", 4)
    ours, theirs = (load_file(tmp_path / name / "toy.safetensors") for name in ("whole", "parts"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [e["loss"] for e in whole.log] == [e["loss"] for e in parts.log]
    assert whole.log[-1]["loss"] < whole.log[0]["loss"]
    assert json.loads((tmp_path / "parts" / "log.json").read_text())["final"] == {"score": 0.5}


@needs_muon
def test_schedule_and_average(tmp_path: Path) -> None:
    """Warm-up is a line to the full rate, the cosine ends near 0; the average of one step is 2/11 old and 9/11 new."""
    model = nn.Linear(2, 2)
    args = arguments("", "toy").parse_args(["--out", str(tmp_path), "--epochs", "4", "--lr", "0.1", "--device", "cpu"])
    run = Run(model, args, 10, lambda name, p: p.ndim == 2)
    before = model.weight.detach().clone()
    rates = []
    for _epoch in run.epochs():
        for _ in range(10):
            run.step(model(torch.ones(1, 2)).sum())
            rates.append(run.optimizers[1].param_groups[0]["lr"])
            if run.step_number == 2:  # the first step has the rate 1e-4, so that something moves
                assert not torch.equal(before, model.weight)
    assert rates[:10] == pytest.approx([0.1 * max(i / 10, 1e-3) for i in range(10)])
    assert rates[10] == pytest.approx(0.1) and rates[25] == pytest.approx(0.05) and rates[-1] < 1e-3
    fresh = Run(
        nn.Linear(2, 2),
        arguments("", "t").parse_args(["--out", str(tmp_path / "b"), "--device", "cpu"]),
        5,
        lambda n, p: p.ndim == 2,
    )
    old = fresh.average["bias"].clone()
    fresh.losses = []
    fresh.step(fresh.model(torch.ones(1, 2)).square().sum())
    new = fresh.model.state_dict()["bias"]
    assert torch.allclose(fresh.average["bias"], old * 2 / 11 + new * 9 / 11)


def test_two_heads_learn_labels_and_teacher() -> None:
    torch.manual_seed(0)
    first, second, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    teacher = torch.rand(4, 5).softmax(-1)

    def entropy(goal: Tensor, logits: Tensor) -> Tensor:
        return -(goal * (logits - logits.exp().sum(-1, keepdim=True).log())).sum(-1).mean()

    smooth = torch.full((4, 5), 0.02)
    smooth[torch.arange(4), labels] += 0.9
    expected = 0.7 * entropy(smooth, first) + 0.3 * entropy(teacher, second)
    assert torch.allclose(taught((first, second), labels, teacher, 0.3), expected)


def test_augmented_images_are_crops() -> None:
    """Without the erased square, every augmented image is a part of the reflected one, mirrored or not."""
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).float() + 1
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    for number, image in enumerate(augment(images, torch.Generator().manual_seed(1))):
        seen = image != 0
        crops = (padded[number, :, t : t + 32, left : left + 32] for t in range(9) for left in range(9))
        assert any(torch.equal(image[seen], c[seen]) for crop in crops for c in (crop, crop.flip(2)))
        assert seen.float().mean() > 0.9
