"""The texts that class names become: whose vectors stand in them, and which names they are written of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clip_models import IMAGE, TEXT
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import ConfigError

NAMES = ["cat", "dog", "red bird"]


def small(adapter: Any, classes: list[str] = NAMES) -> zoo.Model:
    torch.manual_seed(0)
    towers: dict[str, Any] = {"vision_cfg": IMAGE, "text_cfg": {**TEXT, "context_length": 40}, "embed_dim": 24}
    return zoo.load("clip-micro", adapter, classes=classes, pretrained=False, **towers)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("words", ["coop", "cocoop", "maple", "cpe-clip"])
@pytest.mark.parametrize("other", ["clip-adapter", "tip-adapter", "cones"])
def test_vectors_that_no_text_holds_are_refused(words: str, other: str) -> None:
    """The head of a later adapter has a template without slots: the vectors trained in silence, and changed nothing."""
    model = small([words, other])
    with pytest.raises(ConfigError, match=f"The vectors of '{words}' stand in the texts of its own head.*set_active"):
        model(images())
    if other != "cones":  # whose concepts need its own head
        model.set_active(other, words)
        assert all("text" not in point for point in model.train().probe(images()))
    model.set_active(other)
    assert model(images()).shape == (3, 3)


@pytest.mark.parametrize("method", ["coop", "cocoop", "clip-adapter", "tip-adapter-f"])
def test_labels_without_names_leave_the_names_of_the_model(method: str) -> None:
    """A fit on bare labels named the classes "0", "1", "2"; a grown head then compared images with these words."""
    model = small(method)
    zoo.fit(model, TensorDataset(images(6), torch.arange(6) % 3), epochs=1, batch_size=3, progress=False, device="cpu")
    assert model.classes == NAMES
    before = model.eval()(images())
    model.grow_head(["fish"])
    assert model.classes == [*NAMES, "fish"]
    torch.testing.assert_close(model(images())[:, :3], before)


def test_other_names_are_other_texts() -> None:
    """`model.classes = [...]` named the outputs anew, and the head went on comparing with the old names."""
    model = small("coop").eval()
    swapped = small("coop", ["dog", "cat", "red bird"]).eval()
    swapped.load_state_dict(model.state_dict())
    before = model(images())
    model.classes = ["dog", "cat", "red bird"]
    torch.testing.assert_close(model(images()), before[:, [1, 0, 2]])
    torch.testing.assert_close(model(images()), swapped(images()))


def test_concepts_that_were_read_keep_their_names() -> None:
    model = small("cones").eval()
    model(images())
    with pytest.raises(ConfigError, match="keeps the texts of its own classes"):
        model.classes = ["ship", "truck", "car"]
    assert model.classes == NAMES


def test_settings_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels and tokens are of diffusion transformers"):
        small(zoo.adapter("cones", labels=(1,)))
    with pytest.raises(ConfigError, match="has a brace"):
        zoo.adapter("maple", init="a photo {} of")
