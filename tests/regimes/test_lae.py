"""LAE: against a straightforward loop, gone on with after a kill, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from train_parts import tiny_model

import zoo
from zoo.data import by_class, with_classes
from zoo.data.seeds import seed_everything
from zoo.errors import ConfigError, DataError
from zoo.regimes.lae import Ensemble, LocalClassify
from zoo.train.batches import BatchPlan

FIT: dict[str, Any] = {"progress": False}
SETTINGS: dict[str, Any] = {"epochs": 3, "frozen_epochs": 1, "decay": 0.9, "batch_size": 8, "lr": 1e-2}


def sessions(each: int = 6, seed: int = 0, classes: int = 6, noise: float = 0.5) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(each * classes) % classes
    images = patterns[labels] + noise * torch.randn(len(labels), 3, 8, 8, generator=generator)
    return by_class(zoo.open_dataset(TensorDataset(images, labels), classes=list("abcdef")[:classes]), 3)


def build() -> zoo.Model:
    adapter = zoo.adapter("adapter", form="parallel", rank=3, targets="attn", learn_scale=True, scale=1.0)
    return tiny_model(adapter, num_classes=0)


def go(model: zoo.Model | None = None, **options: Any) -> tuple[zoo.Model, Any]:
    model = model or build()
    return model, zoo.run(model, "lae", sessions(), sessions(4, seed=1), fit=FIT, **{**SETTINGS, **options})


@pytest.fixture(scope="module")
def learned() -> tuple[zoo.Model, Any]:
    return go()


def test_against_a_straightforward_loop(learned: tuple[zoo.Model, Any]) -> None:
    """The same batches; autograd, torch's Adam and a dict of averages."""
    model = build()
    slow: dict[str, Tensor] | None = None
    for number, session in enumerate(sessions()):
        seed_everything(0, "lae", "between", number - 1)
        start = model.num_classes
        model.grow_head(session.classes, std=0.001)
        if number == 1:
            slow = {n: p.detach().clone() for n, p in model.adapters["adapter"].named_parameters()}
        data = with_classes(session, model.classes or [])
        optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=1e-2)
        for epoch in range(3):
            model.adapters["adapter"].requires_grad_(not (number and epoch < 1))
            order = BatchPlan(len(data), 8, seed=0).order(epoch)
            for rows in (order[i : i + 8] for i in range(0, len(order), 8)):
                images = torch.stack([data[int(i)][0] for i in rows])
                labels = torch.tensor([data[int(i)][1] for i in rows])
                loss = F.cross_entropy(model.train()(images)[:, start:], labels - start)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if slow is not None:
                    for n, p in model.adapters["adapter"].named_parameters():
                        slow[n] = 0.9 * slow[n] + 0.1 * p.detach()
    assert slow is not None
    result = learned[0]
    for name, parameter in result.adapters["adapter"].named_parameters():
        torch.testing.assert_close(parameter, model.adapters["adapter"].get_parameter(name), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            result.adapters["adapter-offline"].get_parameter(name), slow[name], rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(result.head.weight, model.head.weight, rtol=1e-4, atol=1e-6)


def test_two_experts_and_one_head(learned: tuple[zoo.Model, Any]) -> None:
    model, report = learned
    assert list(model.adapters) == ["adapter", "adapter-offline"] and list(model.heads) == ["default"]
    assert model.classes == list("abcdef") and model.active == ("adapter",)
    images = torch.randn(5, 3, 8, 8)
    online = model(images).softmax(-1)
    offline = model(images, adapters=["adapter-offline"] * 5).softmax(-1)
    answer = Ensemble(model, ("adapter", "adapter-offline"))(images)
    torch.testing.assert_close(answer, torch.maximum(online, offline))
    assert not torch.equal(online, offline) and model.active == ("adapter",)
    summary = report.summary
    assert [len(row) for row in summary["matrix"]] == [1, 2, 3]
    assert summary["last"] == pytest.approx(sum(summary["matrix"][2]) / 3)
    drops = [max(summary["matrix"][t][s] for t in range(s, 2)) - summary["matrix"][2][s] for s in range(2)]
    assert summary["forgetting"] == pytest.approx(sum(drops) / 2)
    assert "last_offline" in summary and report.table().count("\n") == 4 and report.picture().startswith(b"\x89PNG")


def test_local_loss_leaves_old_rows_alone() -> None:
    model = build()
    model.grow_head(["a", "b"])
    model.grow_head(["c"])
    loss, outputs = LocalClassify(2).loss(model.train(), torch.randn(4, 3, 8, 8), torch.tensor([2, 2, 2, 2]))
    assert float(loss.detach()) == 0.0 and outputs.shape == (4, 3)
    loss, _ = LocalClassify(1).loss(model, torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 2, 1]))
    loss.backward()
    assert not model.head.weight.grad[0].any() and model.head.weight.grad[1:].any()  # type: ignore[index,union-attr]


def test_goes_on_after_a_stop(tmp_path: Path, learned: tuple[zoo.Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the second and of the third session, the offline adapter included."""
    from zoo.train.hooks import Hooks

    former = Hooks.step_end
    for stop in (8, 10):
        count = 0

        def stopped(self: Hooks, step: int, stop: int = stop) -> None:
            nonlocal count
            former(self, step)
            count += 1
            if count == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Hooks, "step_end", stopped)
            go(out=tmp_path)
    model, report = go(out=tmp_path)
    for name, adapter in learned[0].adapters.items():
        for key, value in adapter.state_dict().items():
            assert torch.equal(value, model.adapters[name].state_dict()[key]), (name, key)
    assert torch.equal(learned[0].head.weight, model.head.weight) and report.summary == learned[1].summary  # type: ignore[arg-type]


def test_experts_are_saved_together(tmp_path: Path) -> None:
    model = zoo.load("vit-micro", zoo.adapter("lora", rank=1, learn_scale=True), num_classes=0)
    model.grow_head(["a", "b"])
    model.copy_adapter("lora", "lora-offline")
    with torch.no_grad():
        for p in model.adapters["lora"].parameters():
            p.add_(0.1)
    model.save_adapter(tmp_path, ["lora", "lora-offline"])
    again = zoo.load(adapter=tmp_path)
    again.set_active("lora")
    images, experts = torch.randn(2, 3, 32, 32), ("lora", "lora-offline")
    assert torch.equal(Ensemble(model.eval(), experts)(images), Ensemble(again.eval(), experts)(images))


def test_sequential_and_joint() -> None:
    model, report = go(offline=False)
    assert list(model.adapters) == ["adapter"] and "last_offline" not in report.summary
    bound, joint = go(offline=False, joint=True)
    assert joint.phases[2]["steps"] == 3 * 5 and joint.summary["last"] >= report.summary["last"]
    assert bound.num_classes == 6


def test_a_model_without_adapter_gets_the_form() -> None:
    images = [s.select(range(4)) for s in sessions()]
    model = zoo.load(
        "vit-micro", num_classes=0, pretrained=False, depth=5, embed_dim=12, num_heads=2, img_size=8, patch_size=4
    )
    zoo.run(model, "lae", images, images, form="prefix", fit=FIT, epochs=1, frozen_epochs=0)
    assert list(model.adapters) == ["prefix", "prefix-offline"]


def test_refusals() -> None:
    model, data = build(), sessions()
    before = copy.deepcopy(model.state_dict())

    def refused(error: type[Exception], message: str, model: zoo.Model = model, **given: Any) -> None:
        arguments = {"data": data, "test": data, **SETTINGS, **given}
        with pytest.raises(error, match=message):
            zoo.run(model, "lae", fit=FIT, **arguments)

    refused(
        DataError, "session 3 has the class 'a', which an earlier one had", data=[*data, data[0]], test=[*data, data[0]]
    )
    refused(DataError, "the classes of the training sessions", test=data[::-1])
    refused(DataError, "data= is a list of data sets", data=data[0])
    refused(DataError, "test= is a list", test=None)
    refused(ConfigError, "the adapter would never learn", frozen_epochs=3)
    refused(ConfigError, "form is 'vpt'; expected one of adapter, lora, prefix", form="vpt")
    refused(ConfigError, "load the model with num_classes=0", model=tiny_model())
    refused(ConfigError, "learns with one adapter; in use are lora, bitfit", model=tiny_model(["lora", "bitfit"], 0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.num_classes == 0
