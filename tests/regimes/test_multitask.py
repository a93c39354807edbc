"""Several tasks and one adapter: which loss, which tasks, what is taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_parts import easy_data, tiny_model

import zoo
from zoo.errors import ConfigError, DataError, UnknownNameError
from zoo.regimes.multitask import ManyTasks, single_task

FIT: dict[str, Any] = {"progress": False, "batch_size": 8, "lr": 1e-2}
HYPER: dict[str, Any] = {"rank": 2, "task_dim": 4, "hidden": 8, "projected": 8}


def data(seed: int = 0) -> dict[str, Any]:
    sizes = {"birds": (24, 4), "cars": (8, 2)}
    return {n: zoo.open_dataset(easy_data(c, seed, classes=k)) for n, (c, k) in sizes.items()}


def go(adapter: Any, **options: Any) -> tuple[zoo.Model, Any]:
    torch.manual_seed(3)
    model = tiny_model(adapter, num_classes=0)
    settings = {"epochs": 3, "tau": 0.5, **options}
    return model, zoo.run(model, "multitask", data(), data(1), fit=FIT, **settings)


def test_the_loss_is_among_the_classes_of_the_task() -> None:
    model = tiny_model("lora", num_classes=6)
    images, targets = torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 4, 5, 2])
    loss, logits = ManyTasks(["birds", "cars"], [4, 2]).loss(model, images, targets)
    outputs = model(images)
    own = [F.cross_entropy(outputs[i : i + 1, :4], targets[i : i + 1]) for i in (0, 1, 4)]
    own += [F.cross_entropy(outputs[i : i + 1, 4:], targets[i : i + 1] - 4) for i in (2, 3)]
    torch.testing.assert_close(loss, torch.stack(own).mean())
    assert logits.isinf().sum() == 3 * 2 + 2 * 4
    smooth, _ = ManyTasks(["birds", "cars"], [4, 2]).loss(model, images, targets, 0.1)
    own = [F.cross_entropy(outputs[i : i + 1, :4], targets[i : i + 1], label_smoothing=0.1) for i in (0, 1, 4)]
    own += [F.cross_entropy(outputs[i : i + 1, 4:], targets[i : i + 1] - 4, label_smoothing=0.1) for i in (2, 3)]
    torch.testing.assert_close(smooth, torch.stack(own).mean())
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters_to_train().values())


def test_weights_of_tasks_count_in_training_alone() -> None:
    model = tiny_model("lora", num_classes=6)
    images, targets = torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 4, 5, 2])
    plain, weighted = ManyTasks(["birds", "cars"], [4, 2]), ManyTasks(["birds", "cars"], [4, 2], {"cars": 3.0})
    model.eval()
    assert torch.equal(weighted.loss(model, images, targets)[0], plain.loss(model, images, targets)[0])
    model.train()
    each = torch.stack([plain.loss(model, images[i : i + 1], targets[i : i + 1])[0] for i in range(5)])
    factor = torch.tensor([1.0, 1.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(weighted.loss(model, images, targets)[0], (factor * each).mean())
    _, report = go("lora", weights={"birds": 0.5})
    assert report.summary["mean"] > 0.5
    with pytest.raises(DataError, match=r"a weight for 'bird', which is no task.*'birds'"):
        go("lora", weights={"bird": 2.0})
    with pytest.raises(ConfigError, match="the weight of 'cars' is 0; expected more than 0"):
        go("lora", weights={"cars": 0})
    with pytest.raises(ConfigError, match="the weight of 'cars' is 'much'; expected more than 0"):
        go("lora", weights={"cars": "much"})
    with pytest.raises(ConfigError, match="head='mmseg-fcn' is of tasks of maps"):
        go("lora", head="mmseg-fcn")


@pytest.mark.parametrize("batches", ["one", "mixed"])
def test_any_adapter(batches: str) -> None:
    model, report = go("lora", batches=batches)
    assert model.classes == [*(f"birds: {i}" for i in range(4)), *(f"cars: {i}" for i in range(2))]
    assert report.summary["accuracy"].keys() == {"birds", "cars"} and report.summary["mean"] > 0.5
    assert "birds | 24 | 4" in report.table() and report.picture().startswith(b"\x89PNG")


def test_hyperformer_knows_the_task_and_gives_it_away(tmp_path: Path) -> None:
    adapter = zoo.adapter("hyperformer", tasks=("birds", "cars"), **HYPER)
    model, report = go(adapter, out=tmp_path)
    again, second = go(adapter, out=tmp_path)  # read back
    assert second.summary == report.summary
    images = torch.randn(4, 3, 8, 8)
    logits = {task: model(images, context={"task": task}) for task in ("birds", "cars")}
    assert not torch.allclose(logits["birds"], logits["cars"])
    with pytest.raises(zoo.ZooError, match="task"):
        model(images)
    single = single_task(model, "cars")
    assert single.classes == ["0", "1"] and "hyperformer" not in single.adapters
    torch.testing.assert_close(single(images), logits["cars"][:, 4:], rtol=1e-4, atol=1e-5)
    assert torch.equal(again(images, context={"task": "birds"}), logits["birds"])


def test_mixed_batches_are_not_for_one_task_adapters() -> None:
    with pytest.raises(zoo.ZooError, match="task"):
        go(zoo.adapter("hyperformer", tasks=("birds", "cars"), **HYPER), batches="mixed")


def test_refusals() -> None:
    def refused(error: type[Exception], message: str, adapter: Any = "lora", classes: int = 0, **given: Any) -> None:
        arguments: dict[str, Any] = {"data": data(), "test": None, **given}
        with pytest.raises(error, match=message):
            zoo.run(tiny_model(adapter, num_classes=classes), "multitask", fit=FIT, **arguments)

    refused(DataError, "data= is a dict of data sets", data=data()["birds"])
    refused(DataError, "test data for 'ducks', which is no task", test={"ducks": data()["birds"]})
    refused(DataError, "'birds' have other classes", test={"birds": data()["cars"]})
    refused(ConfigError, "load the model with num_classes=0", classes=3)
    refused(ConfigError, "batches is 'two'", batches="two")
    adapter = zoo.adapter("hyperformer", tasks=("birds", "planes"), **HYPER)
    refused(UnknownNameError, r"does not know 'cars'\. Attach it with tasks=\('birds', 'cars'\)", adapter)
    adapter = zoo.adapter("hyperformer", tasks=("birds", "cars", "planes"), **HYPER)
    refused(DataError, r"task 'planes' too, and data= holds none.*tasks=\('birds', 'cars'\)", adapter)
    refused(DataError, "'birds' has no items", data={**data(), "birds": data()["birds"].select([])})
    model, _ = go("lora", epochs=1)
    with pytest.raises(UnknownNameError, match=r"no classes of the task 'car'\. Did you mean 'cars'"):
        single_task(model, "car")
