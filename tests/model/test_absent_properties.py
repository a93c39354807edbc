"""A model of sounds has no image size: a ZooError that says so, and an AttributeError as Python expects one.

Seen before: `hasattr(model, "image_size")` and `inspect.getmembers(model)` raised.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import zoo
from zoo.errors import ConfigError
from zoo.registry import families, family
from zoo.table import tiny_model


@pytest.mark.parametrize("name", [n for n in families() if family(n).tiny])
def test_members_can_be_listed(name: str) -> None:
    try:
        model, _ = tiny_model(name)
    except zoo.MissingPackageError as error:
        pytest.skip(str(error))
    config = model.family.data_config()
    members = dict(inspect.getmembers(model))
    for attribute, key in (("image_size", "input_size"), ("mean", "mean"), ("std", "std")):
        assert hasattr(model, attribute) == (attribute in members) == (key in config)
        assert getattr(model, attribute, None) == members.get(attribute)


def test_the_reason_is_said() -> None:
    model, _ = tiny_model("wav2vec2")
    for error in (ConfigError, AttributeError):
        with pytest.raises(error, match=r"\(audio\) has no image size.*model.example_batch\(\)"):
            _ = model.image_size
    with pytest.raises(AttributeError, match="no attribute 'imagesize'"):
        _ = model.imagesize
    twin = copy.deepcopy(model)
    assert not hasattr(twin, "std") and twin.backbone is not model.backbone


def test_it_is_one_graph_still() -> None:
    model = zoo.load("vit-micro", "lora", pretrained=False, num_classes=3, embed_dim=48, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
