"""Nothing stays in memory: after n forward passes, counts, merges, switches and fits there is what there was after one."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampled import drawn

import zoo
from zoo import registry
from zoo.errors import ZooError
from zoo.table import tiny_model
from zoo.tasks.resolve import resolve


def live() -> int:
    """How many tensors there are, after a collection."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some libraries' lazy objects warn when their class is asked for
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.fixture(autouse=True)
def only_what_is_new_in_each() -> None:
    """Whatever there is already (modules of libraries above all) is left out of collections and counts: much quicker."""
    for family in registry.families():
        registry.family(family)
    gc.collect()
    gc.freeze()


def made(family: str, method: str) -> tuple[Any, Any]:
    model, batch = tiny_model(family)
    try:
        adapter = model.add_adapter(method)
        if adapter.needs_calibration:
            # without a head a task's own targets would be of another form: any loss of the output serves here
            task = None if model.num_classes else resolve(model, loss=lambda output, _: output.square().mean())
            adapter.calibrate(model, [(batch if len(batch) > 1 else batch[0], torch.arange(len(batch[0])))], task)
    except ZooError as error:
        pytest.skip(str(error)[:80])
    return model, batch


def grows(run: Callable[[], Any], times: int = 3) -> int:
    """By how many tensors the process grows in further runs."""
    run()
    run()
    before = live()
    for _ in range(times):
        run()
    return live() - before


@pytest.mark.parametrize("family", [f for f in registry.families() if registry.family(f).tiny])
def test_a_forward_without_a_backward_is_freed(family: str, request: pytest.FixtureRequest) -> None:
    whole = request.config.getoption("--whole")
    for method in registry.list_adapters():
        if not (whole or drawn(family, method)):
            continue
        try:
            model, batch = made(family, method)
        except pytest.skip.Exception:
            continue

        def use(model: Any = model, batch: Any = batch) -> None:
            with model.context(**model.example_context(*batch)):
                for mode in (True, False):
                    model.train(mode)(*batch)
                model.saved_bytes(*batch)

        assert grows(use, 2) == 0, method
        gone = weakref.ref(model)
        del model, use
        gc.collect()
        assert gone() is None, f"{method}: the model itself stays"


@pytest.mark.parametrize("memory", ["default", "low", "min"])
@pytest.mark.parametrize("method", ["lora", "vpt", "prefix", "vqt", "adapter"])
def test_whatever_a_model_is_used_for(method: str, memory: str) -> None:
    model, batch = made("vit", method)
    model.memory = memory

    def use() -> None:
        model.train()
        model(*batch)
        model(*batch, adapters=[method, None])
        with model.disable():
            model(*batch)
        model.set_active()
        model.set_active(method)
        model.probe(*batch)
        if method == "lora":
            model.merge()

    assert grows(use) == 0


@pytest.mark.parametrize("memory", ["default", "min"])
@pytest.mark.parametrize("method", ["dtl", "dtl+", "ladder", "unipelt"])
def test_what_is_carried_along_many_blocks(method: str, memory: str) -> None:
    """Blocks behind the first of DTL's that give back run again in backward, and what they kept led to their own outputs."""
    model = zoo.load("vit-micro", method, num_classes=2, pretrained=False, embed_dim=48, depth=6, num_heads=3)
    model.memory = memory
    images = torch.randn(2, 3, 32, 32)
    assert grows(lambda: model.train()(images), 2) == 0


def test_a_fit_is_freed(image_folder: Any) -> None:
    model = zoo.load("vit-micro", "lora", num_classes=2, pretrained=False)

    def fit(model: Any = model) -> None:
        zoo.fit(model, image_folder / "train", epochs=1, batch_size=12, progress=False)

    assert grows(fit, 2) == 0
    gone = weakref.ref(model)
    del model, fit
    gc.collect()
    assert gone() is None
