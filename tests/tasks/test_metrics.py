"""Metrics by name, against numbers worked out by hand; a task with modules of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_parts import Stop, StopAt, easy_data, tiny_model
from two_processes import launch

import zoo
from zoo.errors import ConfigError
from zoo.tasks import Task
from zoo.tasks.metrics import METRICS, metric, named_metrics

pytest.importorskip("torchmetrics")


def measured(name: str, outputs: Tensor, targets: Tensor, classes: int = 4, parts: int = 3) -> Any:
    found = metric(name, classes)
    for o, t in zip(outputs.chunk(parts), targets.chunk(parts)):
        found.update(o, t)
    value = found.compute()
    found.reset()
    return value


def test_of_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 4, generator=generator), torch.randint(4, (50,), generator=generator)
    hits = logits.argmax(1) == labels
    assert float(measured("accuracy", logits, labels)) == pytest.approx(hits.float().mean().item())
    best = (logits.topk(2, dim=1).indices == labels[:, None]).any(1)
    assert float(measured("top2", logits, labels)) == pytest.approx(best.float().mean().item())
    each = torch.stack([hits[labels == k].float().mean() for k in range(4)])
    assert float(measured("mean_accuracy", logits, labels)) == pytest.approx(each.mean().item())
    scores = []
    for k in range(4):
        said, there = logits.argmax(1) == k, labels == k
        scores.append(2 * (said & there).sum() / (said.sum() + there.sum()))
    assert float(measured("f1", logits, labels)) == pytest.approx(torch.stack(scores).mean().item())


def test_of_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, 5, 5, generator=generator), torch.randint(3, (6, 5, 5), generator=generator)
    labels[:, 0] = 255
    said, there = logits.argmax(1)[labels != 255], labels[labels != 255]
    each = [((said == k) & (there == k)).sum() / ((said == k) | (there == k)).sum() for k in range(3)]
    assert float(measured("miou", logits, labels, 3)) == pytest.approx(torch.stack(each).mean().item())


def test_of_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    z, own = torch.randn(20, 5, generator=generator), torch.arange(20) % 7
    own[0] = 99  # alone
    scores = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T
    scores.fill_diagonal_(-2)
    counted = [i for i in range(20) if (own == own[i]).sum() > 1]
    for k in (1, 3):
        hits = [bool((own[scores[i].topk(k).indices] == own[i]).any()) for i in counted]
        assert float(measured(f"recall@{k}", z, own)) == pytest.approx(sum(hits) / len(hits))
    pairs = [(float(scores[i, j]), bool(own[i] == own[j])) for i in range(20) for j in range(i)]
    true, false = [s for s, same in pairs if same], [s for s, same in pairs if not same]
    found = measured("verification", z, own)
    for rate in (0.1, 0.01, 0.001):
        thresholds = [t for t, _ in pairs if sum(s >= t for s in false) / len(false) <= rate]
        best = max((sum(s >= t for s in true) / len(true) for t in thresholds), default=0.0)
        assert float(found[f"tar@{rate:g}"]) == pytest.approx(best)
    rates = [(sum(s >= t for s in false) / len(false), 1 - sum(s >= t for s in true) / len(true)) for t, _ in pairs]
    nearest = min(abs(a - b) for a, b in rates)
    assert any(
        abs(a - b) <= nearest + 1e-6 and float(found["eer"]) == pytest.approx((a + b) / 2, abs=1e-6) for a, b in rates
    )


def test_in_an_evaluation() -> None:
    model, data = tiny_model(), easy_data(21)
    result = zoo.evaluate(model, data, metrics=["accuracy", "top3", "f1"], progress=False, device="cpu", batch_size=8)
    again = zoo.evaluate(model, data, progress=False, device="cpu", batch_size=8)
    assert result["top3"] >= result["accuracy"] == pytest.approx(again["accuracy"]) and 0 <= result["f1"] <= 1
    for wrong, reason in ((["top9"], "9 best of 4"), (["acuracy"], "'accuracy'"), ({"x": "f2"}, "no metric 'f2'")):
        with pytest.raises(ConfigError, match=reason):
            zoo.evaluate(model, data, metrics=wrong, progress=False, device="cpu")
    with pytest.raises(ConfigError, match="one of a classifier"):
        named_metrics(["miou"], 0)
    assert named_metrics("map", 0) and "nmi" in METRICS


class Proxies(Task):
    """Each item near the proxy of its class."""

    name, monitor = "proxies", "recall@1"

    def modules(self, model: Any) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.2), nn.Linear(model.family.feature_dim, 4, bias=False))

    def loss(self, model: Any, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        assert self.own is not None and self.own.training == model.training
        z = F.normalize(model.features(inputs), dim=-1)
        return F.cross_entropy(5 * self.own(z), targets, label_smoothing=label_smoothing), z

    def metrics(self, model: Any) -> Mapping[str, Any]:
        return named_metrics(["recall@1"], 0)


FIT: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "progress": False, "device": "cpu"}


def bare() -> zoo.Model:
    return tiny_model(num_classes=0)


def test_modules_of_a_task_are_trained_checkpointed_and_not_published(tmp_path: Path) -> None:
    model, task, data = bare(), Proxies(), easy_data(24)
    state = torch.get_rng_state()
    report = zoo.fit(model, data, easy_data(12, seed=1), task=task, **FIT)
    assert torch.equal(state, torch.get_rng_state())
    assert task.own is not None and report.parameters == model.num_parameters(trainable=True)  # what is published
    start = Proxies().modules(model)
    assert not any(torch.equal(a, b) for a, b in zip(start.parameters(), task.own.parameters()))
    assert 0 <= report.metrics["val_recall@1"] <= 1
    options = {**FIT, "checkpoint": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(Stop):
        zoo.fit(bare(), data, easy_data(12, seed=1), task=Proxies(), callbacks=[StopAt(4)], **options)
    again, other = bare(), Proxies()
    zoo.fit(again, data, easy_data(12, seed=1), task=other, callbacks=[], **options)
    for key, value in model.parameters_to_train().items():
        assert torch.equal(value, again.parameters_to_train()[key])
    assert other.own is not None
    assert all(torch.equal(a, b) for a, b in zip(task.own.state_dict().values(), other.own.state_dict().values()))
    model.save_adapter(tmp_path / "out")
    from safetensors.torch import load_file

    assert all(k.startswith("lora/") for k in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert zoo.evaluate(bare(), data, task=Proxies(), progress=False, device="cpu")["images"] == 24


def train(out: Path) -> None:
    """The run of the test below, on however many processes there are."""
    from safetensors.torch import save_file

    from zoo.train.processes import Processes

    class Still(Proxies):
        def modules(self, model: Any) -> nn.Module:
            return nn.Linear(model.family.feature_dim, 4, bias=False)

    model, task = bare(), Still()
    zoo.fit(model, easy_data(21), task=task, **FIT)
    found = zoo.evaluate(
        model, easy_data(13, seed=2), task=task, metrics=["verification"], progress=False, device="cpu"
    )
    assert task.own is not None
    numbers = torch.tensor([found["recall@1"], found["eer"], found["tar@0.1"]])
    processes = Processes("cpu")
    if processes.main:
        tensors = {**{k: v.detach() for k, v in model.parameters_to_train().items()}, **task.own.state_dict()}
        save_file({**{k: v.contiguous() for k, v in tensors.items()}, "numbers": numbers}, out / f"{processes.world}")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    launch(train, tmp_path, tmp_path)
    train(tmp_path)
    one, two = (load_file(tmp_path / str(n)) for n in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-4)


def test_the_calibration_error_by_hand() -> None:
    """The mean over 15 bins of confidence of |accuracy - confidence|, weighted by shares; also of logits between 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.5, 4.0):
        logits = torch.rand(400, 4, generator=generator) * scale
        labels = torch.randint(0, 4, (400,), generator=generator)
        found = metric("calibration", 4)
        for part in range(0, 400, 64):
            found.update(logits[part : part + 64], labels[part : part + 64])
        sure, taken = logits.softmax(-1).max(-1)
        bins = (sure * 15).ceil().long() - 1
        wanted = sum(
            (bins == b).float().mean()
            * ((taken[bins == b] == labels[bins == b]).float().mean() - sure[bins == b].mean()).abs()
            for b in bins.unique().tolist()
        )
        assert abs(float(found.compute()) - float(wanted)) < 1e-6
