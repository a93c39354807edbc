"""Semantic proxies: the second pass, the container, what is kept and what is not, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_parts import difference, easy_data, tiny_model, weights

import zoo
from vision.tasks.semantic_proxies import ProxyNet, SemanticProxies
from zoo.errors import ConfigError

FIT: dict[str, Any] = {"batch_size": 8, "lr": 5e-3, "progress": False}


def built(**settings: Any) -> zoo.Model:
    model = tiny_model(zoo.adapter("vpt-sp", **{"num_tokens": 3, **settings}), num_classes=0)
    torch.manual_seed(0)
    model.reset_head(8, kind="embedding")
    return model


def fit(model: zoo.Model, task: SemanticProxies, **options: Any) -> Any:
    sampler = zoo.train.PerClass(classes=4, each=2)
    return zoo.fit(model, easy_data(24, noise=1.5), task=task, sampler=sampler, **FIT, **options)


def test_nothing_is_dead_and_the_container_is_numbers() -> None:
    model, task = built(), SemanticProxies(tokens=2, depth=2)
    images, labels = easy_data(8)[:]
    task.classes = 4
    torch.manual_seed(1)
    task.own = task.proxies(model)
    own: Any = task.own
    before = own.container.clone()
    task.loss(model.train(), images, labels)[0].backward()
    parameters = {**model.parameters_to_train(), **dict(own.named_parameters())}
    assert [n for n, p in parameters.items() if p.grad is None or not p.grad.any()] == []
    assert not own.container.requires_grad and not torch.equal(own.container, before)
    torch.testing.assert_close(own.container.norm(dim=1), torch.ones(4))
    rows = own.container.clone()
    task.loss(model.eval(), images, labels)
    assert torch.equal(own.container, rows)  # evaluation asks for no proxies
    assert own.to(torch.float64).container.dtype == torch.float64  # it moves with the module
    assert "container" in own.state_dict()


def test_only_classes_of_the_batch_move_and_prompts_are_those_of_the_class() -> None:
    model, task = built(), SemanticProxies(tokens=2, depth=1, bias_ratio=0.0)
    task.classes = 5
    task.own = own = task.proxies(model)
    assert isinstance(own, ProxyNet)
    before = own.container.clone()
    images = easy_data(4)[:][0]
    labels = torch.tensor([3, 1, 3, 3])
    proxies = own(model.train().features(images, context=given(own, task, labels)), labels, 0.0)
    moved = (own.container != before).any(1).tolist()
    assert moved == [False, True, False, True, False]
    torch.testing.assert_close(proxies, own.container)
    # by hand: each image alone, with the prompts of its class in front of the first block
    h = before[3:4]
    for i in (0, 2, 3):
        one = model.features(images[i : i + 1], context=given(own, task, labels[i : i + 1]))
        h = own.gru(own.head(one), h)
    torch.testing.assert_close(own.container[3], F.normalize(h, dim=-1)[0].detach(), rtol=1e-5, atol=1e-6)


def given(own: ProxyNet, task: SemanticProxies, labels: torch.Tensor) -> dict[str, Any]:
    return {"class_prompts": own.of_classes(labels), "class_prompt_counts": tuple(task.counts)}


def test_a_run_that_was_stopped_goes_on_from_its_container(tmp_path: Path) -> None:
    whole, broken = built(), built()
    first, second = SemanticProxies(tokens=2, depth=2), SemanticProxies(tokens=2, depth=2)
    fit(whole, first, epochs=2)

    class Stop:
        def epoch_end(self, model: zoo.Model, epoch: int) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(broken, SemanticProxies(tokens=2, depth=2), epochs=2, checkpoint=tmp_path, callbacks=[Stop()])
    fit(broken, second, epochs=2, checkpoint=tmp_path)
    assert difference(weights(whole), weights(broken)) == 0
    assert first.own is not None and second.own is not None
    theirs = second.own.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in first.own.state_dict().items())


def test_what_is_published_embeds_without_classes(tmp_path: Path) -> None:
    model, task = built(), SemanticProxies(tokens=2, depth=2)
    report = fit(model, task, epochs=3)
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    saved = zoo.disk.read(model.save_adapter(tmp_path / "out"))
    kinds = {name.rpartition(".")[2] for name in saved.tensors}
    assert kinds == {"prompt", "bias", "weight"} and "head/linear.weight" in saved.tensors
    count = sum(t.numel() for t in saved.tensors.values())
    assert count == model.num_parameters(trainable=True)
    again = tiny_model(None, num_classes=0)
    zoo.disk.attach(again, saved)
    images = easy_data(6, seed=9)[:][0]
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_on_swin_within_one_width() -> None:
    shape = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    model = zoo.load("timm:swin_tiny_patch4_window7_224", "vpt-sp", num_classes=0, pretrained=False, **shape)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.arange(8) % 2)
    zoo.fit(model, data, task=SemanticProxies(depth=2), steps=1, batch_size=8, progress=False)
    with pytest.raises(ConfigError, match=r"Class prompts in 3 blocks.*\[24, 24, 48, 48\].*smaller depth"):
        zoo.fit(model, data, task=SemanticProxies(depth=3), steps=1, progress=False)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains the adapter 'vpt-sp', and the model uses vpt"):
        zoo.fit(tiny_model("vpt", num_classes=0), easy_data(8), task="semantic-proxies", steps=1, progress=False)
    with pytest.raises(ConfigError, match="Class prompts in 4 blocks, and vpt-sp has prompts in 2 blocks"):
        zoo.fit(built(), easy_data(8), task="semantic-proxies", steps=1, progress=False)
    for wrong, words in (
        ({"tokens": 0}, "tokens is 0; expected 1 or more"),
        ({"bias_ratio": 1.0}, "bias_ratio is 1.0; expected 0 to below 1: with 1 nothing is left of what images say"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"step": -1}, "step is -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            SemanticProxies(**wrong)
    for wrong, words in (({"num_tokens": 0}, "num_tokens is 0"), ({"step": -1}, "step is -1")):
        with pytest.raises(ConfigError, match=words):
            zoo.adapter("vpt-sp", **wrong)
    assert SemanticProxies(tokens=5, step=2).counts == [5, 3, 1]
    fewer = built(num_tokens=3, step=2)
    assert [tuple(p.shape) for n, p in fewer.parameters_to_train().items() if n.endswith("prompt")] == [
        (3, 24),
        (1, 24),
    ]
