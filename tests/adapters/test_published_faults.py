"""Faults that published code repeats, looked for in every registered method.

- Dead zero initialisation: both matrices of a bottleneck start at zero, so that no weight ever gets a gradient, only a bias.
- Initialisation overridden late: a parent's `apply(init)`, or a loader's pass over "missing keys", undoes what the method chose.
- Prompts, queries or statistics mixed over the batch: what one image gives depends on which others stand beside it.
- Parameters lost on save: names filtered by a substring, shared tensors written once under the wrong name.
- Selection on the test set: the epoch that is reported is the best on the data of the report.

The methods run on a ViT of two blocks with the settings of their `trial`; `test_methods.py` holds them to more.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import METHODS, attach, bare, build, each, images, loss_of, shake

import zoo


@each
def test_weights_are_alive_from_the_start(method: str) -> None:
    """The first backward pass reaches more than what is added at the end, and the second one all."""
    model = build("vit", method).train()
    named = {k: p for k, p in model.parameters_to_train().items() if k.startswith(f"{method}/")}
    if not named:
        assert METHODS[method].stateless
        return
    inner = {k for k in named if not k.endswith(("bias", "shift"))}
    optimizer = torch.optim.Adam(named.values(), lr=0.01, eps=1e-30)
    alive: set[str] = set()
    for step in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model).backward()
        alive |= {k for k, p in named.items() if p.grad is not None and p.grad.any()}
        if step == 0 and inner:
            assert alive & inner, f"only {sorted(alive)} learn in the first step"
        optimizer.step()
    assert alive == set(named)


@each
def test_nothing_overrides_the_start(method: str, tmp_path: Path) -> None:
    """What a method starts from outlives a new head, a copy to double and back, and a save and load without training."""
    model = bare("vit")
    with torch.no_grad():
        before = model(images())
        attach(model, method)
        started = model(images())
    start = {k: p.detach().clone() for k, p in model.adapters[method].named_parameters()}
    assert torch.equal(started, before) == METHODS[method].identity
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "out", pretrained=False)
    again.reset_head(7)
    again.double().float()
    loaded = dict(again.adapters[method].named_parameters())
    assert loaded.keys() == start.keys()
    assert all(torch.equal(loaded[k], p) for k, p in start.items())
    if METHODS[method].identity and not METHODS[method].head_kind:
        adapted = again.features(images())
        with again.disable():
            assert torch.equal(again.features(images()), adapted)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@each
def test_images_do_not_see_each_other(method: str, train: bool) -> None:
    """A sample's logits are the same alone, beside others, and in another order."""
    model = build("vit", method)
    shake(model, method)
    adapter: Any = model.adapters[method]
    if train and adapter.config().get("batch_norm"):
        pytest.skip("its paper has a norm over the batch, which is one while it trains")
    model.train(train)
    x = images()
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
        order = torch.tensor([2, 0, 3, 1])
        turned = model(x[order])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned, together[order], rtol=1e-4, atol=1e-5)


@each
def test_every_parameter_is_saved(method: str, tmp_path: Path) -> None:
    """Each number that is trained, head included, comes back as it was, and nothing else does."""
    model = build("vit", method)
    shake(model, method)
    with torch.no_grad():
        for p in model.head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False)
    trained, loaded = model.parameters_to_train(), again.parameters_to_train()
    assert trained.keys() == loaded.keys()
    assert [k for k, p in trained.items() if not torch.equal(p, loaded[k])] == []
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_the_test_set_chooses_nothing() -> None:
    """`fit` has no test data; without validation data the last epoch stands; an evaluation changes no number of the model."""
    assert not [name for name in inspect.signature(zoo.fit).parameters if "test" in name]
    generator = torch.Generator().manual_seed(4)
    pictures = torch.randn(24, 3, 32, 32, generator=generator)
    train = torch.utils.data.TensorDataset(pictures, torch.arange(24) % 5)
    test = torch.utils.data.TensorDataset(pictures.flip(0), torch.arange(24) % 5)

    def fitted() -> tuple[zoo.Model, object]:
        model = build("vit", "lora")
        report = zoo.fit(model, train, epochs=3, batch_size=8, lr=0.05, progress=False)
        return model, report

    model, report = fitted()
    assert report.best["chosen"] == "last" and report.best["epoch"] == 3  # type: ignore[attr-defined]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = zoo.evaluate(model, test, progress=False)["accuracy"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert zoo.evaluate(model, test, progress=False)["accuracy"] == first
    # the same run once more: what was evaluated in between decides nothing
    again, _ = fitted()
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
