"""What broke inside torch or timm, or too late: losses without a gradient, images of another shape, files for folders."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo import registry
from zoo.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda outputs, targets: 1.0, "The loss gave a float"),
        (lambda outputs, targets: None, "The loss gave a NoneType"),
        (lambda outputs, targets: outputs.argmax(1).sum(), "The loss gave a tensor of int64"),
        (lambda outputs, targets: outputs.detach().square().mean(), "The loss has no gradient"),
        (lambda outputs, targets: torch.tensor(1.0), "The loss has no gradient"),
    ],
)
def test_a_loss_that_nothing_can_be_learnt_from(loss: Any, words: str) -> None:
    """An AttributeError of `float`, and torch's "element 0 of tensors does not require grad"."""
    for data in (easy_data(16), TensorDataset(easy_data(16).tensors[0], torch.rand(16, 2))):
        model = tiny_model()
        before = weights(model)
        with pytest.raises(ConfigError, match=words):
            fit(model, data, loss=loss, epochs=1)
        assert difference(weights(model), before) == 0


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 8, 8), (3, 8, 6)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    """An AssertionError of timm, or a RuntimeError of the convolution."""
    data = TensorDataset(torch.randn(8, *shape), torch.arange(8) % 4)
    words = rf"an item of the batch has the shape \({', '.join(map(str, shape))}\), and 'vit-micro' takes \(3, 8, 8\)"
    with pytest.raises(DataError, match=words):
        fit(tiny_model(), data, epochs=1)
    with pytest.raises(DataError, match=words):
        zoo.evaluate(tiny_model(), data, progress=False)


def test_a_file_where_a_folder_goes(tmp_path: Path) -> None:
    """`out=` on a file was noticed after the whole training."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        for name in ("out", "checkpoint"):
            with pytest.raises(ConfigError, match=f"{name} is .* is a file; expected a folder"):
                fit(tiny_model(), easy_data(16), epochs=1, **{name: place})


def test_a_family_whose_file_broke_off_says_why_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one failed import it was "no backbone family 'beit'. Did you mean 'beit'"."""
    entry = registry._entry_points("zoo.backbones")["beit"]
    kept = dict(registry._families)
    registry._families.pop("beit", None)
    real = importlib.import_module
    before = sys.modules.pop(entry, None)
    try:
        monkeypatch.setitem(sys.modules, entry, type(sys)(entry))  # as an import leaves it that broke off elsewhere

        def broken(name: str, package: str | None = None) -> Any:
            if name == entry and name not in sys.modules:
                raise ImportError("timm lacks a class")
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", broken)
        for _ in range(2):
            with pytest.raises(ImportError, match="timm lacks a class"):
                registry.family("beit")
        monkeypatch.setattr(importlib, "import_module", real)
        assert registry.family("beit").family == "beit"
    finally:
        registry._families.clear()
        registry._families.update(kept)
        if before is not None:
            sys.modules[entry] = before
