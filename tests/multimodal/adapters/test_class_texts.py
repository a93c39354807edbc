"""The texts that class names become: whose vectors stand in them, and which names they are written of."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import IMAGE, TEXT
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import ConfigError

NAMES = ["cat", "dog", "red bird"]


def small(adapter: Any, classes: list[str] = NAMES, **more: Any) -> zoo.Model:
    torch.manual_seed(0)
    towers: dict[str, Any] = {"vision_cfg": IMAGE, "text_cfg": {**TEXT, "context_length": 40}, "embed_dim": 24}
    return zoo.load("clip-micro", adapter, classes=classes, pretrained=False, **towers, **more)


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


def of_texts(adapter: Any) -> zoo.Model:
    """A head that keeps its texts in evaluation, and an adapter in the text tower."""
    model = small(adapter, tower="both")
    model.reset_head(3, NAMES, kind="text")
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
def test_a_rank_that_is_cut_or_a_block_that_is_left_out_makes_other_texts() -> None:
    """The kept texts were those of the parameters alone: of another rank, of other blocks, of another precision."""
    ranks = of_texts(zoo.adapter("dylora", targets="all-linear"))
    skips = of_texts(zoo.adapter("das", search=1, draws=2, bottleneck=4))
    das: Any = skips.adapters["das"]
    changes: list[tuple[zoo.Model, Any]] = [
        (ranks, lambda: ranks.adapters["dylora"].choose(1)),  # type: ignore[operator]
        (skips, lambda: das._leave_out([das.candidates.index("text.blocks.0")])),
    ]
    for model, change in changes:
        before = model(images())
        change()
        after = model(images())
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, model.train().eval()(images()), rtol=0, atol=0)


@torch.no_grad()
def test_texts_of_another_precision_are_not_kept() -> None:
    model = of_texts("lora")
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
    assert torch.equal(model(images()), expected)


@torch.no_grad()
def test_a_copy_keeps_no_texts() -> None:
    """They would be pickled with all tensors that they were made of."""
    model = small("coop").eval()
    size = len(pickle.dumps(model))
    model(images())
    assert len(pickle.dumps(model)) < 1.1 * size


def test_words_for_other_classes_lose_no_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`zoo.load("out/", classes=[...])`, as the method's page has it, warned of an untrained head; this one is never trained."""
    small("coop").save_adapter(tmp_path / "words")
    with caplog.at_level(logging.WARNING, logger="zoo"):
        other = small(tmp_path / "words", ["ship", "truck"]).eval()
    assert other(images()).shape == (3, 2) and not caplog.records
