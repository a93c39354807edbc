"""CPE-CLIP over sessions: against a straightforward loop, its rates, another method in its place, a killed run, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT

from multimodal.regimes.cpe_clip import rate_of
from zoo.data import by_class
from zoo.data.joined import with_classes
from zoo.data.seeds import seed_everything
from zoo.errors import ConfigError, DataError
from zoo.train.batches import BatchPlan
from zoo.train.hooks import Hooks

FIT: dict[str, Any] = {"progress": False, "device": "cpu"}
SETTINGS: dict[str, Any] = {"shots": None, "base_epochs": 2, "base_batch_size": 4, "epochs": 2, "batch_size": 3}
CLASSES = ["cat", "dog", "ship", "red bird"]


def sessions(each: int = 4, seed: int = 0) -> list[Any]:
    patterns = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(each * 4) % 4
    images = patterns[labels] + 0.5 * torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return by_class(zoo.open_dataset(TensorDataset(images, labels), classes=CLASSES), [2, 1, 1])


def build(adapter: Any = None, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 24, "vision_cfg": IMAGE, "text_cfg": {**TEXT, "context_length": 24}}
    return zoo.load("clip-micro", adapter, pretrained=False, **sizes, **{"num_classes": 0, **options})


def go(**options: Any) -> tuple[zoo.Model, Any]:
    model = build()
    return model, zoo.run(model, "cpe-clip", sessions(), sessions(2, 1), fit=FIT, **{**SETTINGS, **options})


@pytest.fixture(scope="module")
def learned() -> tuple[zoo.Model, Any]:
    return go(lr_max=1.0)


def test_against_a_straightforward_loop(learned: tuple[zoo.Model, Any]) -> None:
    """Masked logits, torch's SGD made anew for each session, gradients shrunken by hand, rates written down."""
    model, known = build(), []
    for number, session in enumerate(sessions()):
        seed_everything(0, "cpe-clip", "between", number - 1)
        if number == 0:
            model.add_adapter("cpe-clip", num_classes=2)
            model.classes = ["cat", "dog"]
        else:
            model.grow_head(session.classes)
        old, known = len(known), [*known, *session.classes]
        data, size = with_classes(session, known), 3 if number else 4
        named = model.adapters["cpe-clip"].named_parameters()
        groups = [{"params": [p], "weight_decay": 0.0 if k == "project.bias" else 1e-5} for k, p in named]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        for epoch in range(2):
            for group in optimizer.param_groups:
                group["lr"] = (0.001, 0.001 + 0.999 / 50)[epoch]
            order = BatchPlan(len(data), size, seed=0).order(epoch)
            for rows in (order[i : i + size] for i in range(0, len(order), size)):
                images = torch.stack([data[int(i)][0] for i in rows])
                labels = torch.tensor([data[int(i)][1] for i in rows])
                logits = model.train()(images)
                logits = torch.cat([torch.full_like(logits[:, :old], -9999.0), logits[:, old:]], dim=1)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels).backward()
                for p in model.adapters["cpe-clip"].parameters():
                    assert p.grad is not None
                    p.grad *= 1 if number == 0 else 1 / (2 + number)
                optimizer.step()
    for name, parameter in learned[0].adapters["cpe-clip"].named_parameters():
        torch.testing.assert_close(parameter, model.adapters["cpe-clip"].get_parameter(name), rtol=1e-4, atol=1e-6)


def test_what_is_measured(learned: tuple[zoo.Model, Any]) -> None:
    model, report = learned
    assert model.classes == CLASSES and list(model.adapters) == ["cpe-clip"]
    summary = report.summary
    assert [len(row) for row in summary["matrix"]] == [1, 2, 3]
    last = summary["matrix"][2]
    assert summary["last"] == pytest.approx((2 * last[0] + last[1] + last[2]) / 4)
    assert summary["drop"] == pytest.approx(summary["seen"][0] - summary["last"])
    assert [p["steps"] for p in report.phases] == [2 * 2, 2 * 2, 2 * 2]
    assert report.table().count("\n") == 4 and report.picture().startswith(b"\x89PNG")


def test_rates() -> None:
    """The authors' five epochs, the top, the bottom, and from the beginning."""
    found = [rate_of(epoch, 0.001, 0.1) for epoch in (0, 1, 2, 3, 4, 50, 125, 200)]
    assert found == pytest.approx([0.001, 0.00298, 0.00496, 0.00694, 0.00892, 0.1, 0.0505, 0.001])


def test_shots_and_another_method() -> None:
    model, report = go(method="coop", shots=2, epochs=1, base_epochs=1, batch_size=2)
    assert [p["steps"] for p in report.phases] == [2, 1, 1] and list(model.adapters) == ["coop"]


def test_goes_on_where_it_was_killed(tmp_path: Path, learned: tuple[zoo.Model, Any]) -> None:
    steps = 0

    def stopped(self: Any, *args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 7:  # in the second epoch of session 1
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Hooks, "step_end", stopped)
        go(lr_max=1.0, out=tmp_path)
    model, report = go(lr_max=1.0, out=tmp_path)
    for name, parameter in learned[0].adapters["cpe-clip"].named_parameters():
        assert torch.equal(parameter, model.adapters["cpe-clip"].get_parameter(name)), name
    assert report.summary == learned[1].summary


def test_refusals() -> None:
    def refused(error: type[Exception], message: str, model: zoo.Model, **given: Any) -> None:
        with pytest.raises(error, match=message):
            zoo.run(model, "cpe-clip", fit=FIT, **{"data": sessions(), "test": sessions(), **SETTINGS, **given})

    data = sessions()
    refused(DataError, "session 3 has the class 'cat'", build(), data=[*data, data[0]], test=[*data, data[0]])
    refused(DataError, "data= is a list", build(), data=data[0])
    refused(DataError, "asks for more", build(), shots=50)
    refused(ConfigError, "does not read the names", build(), method="lora")
    refused(ConfigError, "lr_min is 1.0, lr_max 0.1", build(), lr_min=1.0)
    refused(ConfigError, "without an adapter", build("lora"))
    refused(ConfigError, "without an adapter", build(num_classes=3))
    vit = zoo.load("vit-micro", num_classes=0, pretrained=False, depth=1, embed_dim=12, num_heads=2)
    refused(ConfigError, "no text tower", vit)
