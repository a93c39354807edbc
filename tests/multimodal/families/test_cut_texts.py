"""Class texts run without what fills the context behind them: the same numbers, where no token is told of later ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo

pytest.importorskip("open_clip")
from clip_models import MICRO, TEXT, make

from multimodal.families.clip import text as clip_text
from multimodal.families.clip import towers
from multimodal.families.clip.micro import ShortTokenizer
from multimodal.tasks.zero_shot import zero_shot_classifier
from zoo.errors import AttachError, DataError

NAMES = ["cat", "dog", "pick-up_truck of the fire brigade"]
IN_TEXTS = ["coop", "cocoop", "maple", "cpe-clip"]


@pytest.fixture(autouse=True)
def own_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's tokenizer would be downloaded."""
    monkeypatch.setattr(clip_text, "tokenizer", lambda name, context, vocab: ShortTokenizer(vocab, context))


def build(kind: str = "plain", *adapters: Any, **text_cfg: Any) -> zoo.Model:
    text = {**TEXT, **MICRO.get(kind, {}).get("text_cfg", {}), "context_length": 40, **text_cfg}
    return make(kind, *adapters, text_cfg=text, tower="both", classes=NAMES)


def trial(method: str) -> zoo.Adapter:
    return zoo.adapter(method, **zoo.registry.adapter_class(method).trial)


def shaken(model: zoo.Model) -> zoo.Model:
    """Values of adapters that change something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in model.adapters.values():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def lengths(model: zoo.Model) -> list[int]:
    """The columns of every batch of texts that runs from here on."""
    seen: list[int] = []
    model.points["text.embed"].module.register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
    return seen


def images(model: zoo.Model) -> Tensor:
    size = model.family.data_config()["input_size"]
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(5), dtype=torch.double)


def gradients(model: zoo.Model) -> list[Tensor]:
    model.zero_grad()
    model(images(model)).pow(2).sum().backward()
    return [p.grad.clone() for a in model.adapters.values() for p in a.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["plain", "extra norms"])
@pytest.mark.parametrize("method", IN_TEXTS)
def test_logits_and_gradients_are_those_of_whole_texts(method: str, kind: str, monkeypatch: Any) -> None:
    model = shaken(build(kind, trial(method))).train()
    seen = lengths(model)
    logits, found = model(images(model)), gradients(model)
    assert 8 < max(seen) < 36
    monkeypatch.setattr(type(model.head), "cut", lambda head, host: head.ids(host))
    torch.testing.assert_close(model(images(model)), logits, rtol=0, atol=1e-12)
    assert seen[-1] == 40
    for one, whole in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-12)


def looking_back() -> list[str]:
    return [n for n in zoo.list_adapters() if zoo.registry.adapter_class(n).looks_back and n not in IN_TEXTS]


def test_what_says_that_it_looks_back_does() -> None:
    """Every method that says so, and whose values are put into the text tower: texts do not depend on what stands behind them."""
    tried = []
    for method in looking_back():
        model: Any = build()
        try:
            model.add_adapter(trial(method))
        except AttachError:
            continue
        ids = model.family.tokenize(["a cat", "a dog in the park"])
        length = model.family.text_length(ids)
        with torch.no_grad():
            bare = model.eval().outputs(texts=ids, want=("text",))["text"]
            moved = shaken(model).outputs(texts=ids, want=("text",))["text"]
            cut = model.outputs(texts=ids[:, :length], want=("text",))["text"]
        assert length < 12
        torch.testing.assert_close(cut, moved, rtol=0, atol=1e-12, msg=method)
        tried += [method] if not torch.equal(bare, moved) else []
    assert {"lora", "vpt", "prefix", "adapter", "bitfit", "norm", "ssf", "ia3", "full"} <= set(tried)


def test_beside_a_method_that_looks_ahead_texts_are_whole() -> None:
    """The gates of `unipelt` average all tokens of a text."""
    model = build("plain", zoo.adapter("coop", num_tokens=3), trial("unipelt")).eval()
    seen = lengths(model)
    model(images(model))
    model.set_active("coop")
    model(images(model))
    assert seen[0] == 40 and seen[-1] < 30


def test_a_longer_name_is_seen_whole() -> None:
    model: Any = build("plain", zoo.adapter("coop", num_tokens=3)).eval()
    seen = lengths(model)
    with torch.no_grad():
        for names in (["cat", "dog", "ox"], NAMES):
            model.head.name_classes(names)
            model(images(model))
    assert seen[0] < seen[1] < 40


@pytest.mark.parametrize(("kind", "options"), [("no mask", {}), ("timm", {}), ("plain", {"pool_type": "last"})])
def test_towers_that_read_all_tokens_have_them(kind: str, options: dict[str, Any]) -> None:
    model = build(kind, zoo.adapter("coop", num_tokens=3), **options).eval()
    seen = lengths(model)
    model(images(model))
    assert seen == [40]


def test_the_end_by_its_id() -> None:
    """Pooling "eos" looks for the id of the end, which need not be the largest."""
    model: Any = build("timm", eos_id=7, pool_type="eos", no_causal_mask=False)
    ids = torch.tensor([[9, 8, 7, 0, 0, 0], [9, 8, 8, 8, 7, 0]])
    assert model.family.text_length(ids) == 5
    padded = torch.cat([ids, ids.new_zeros(2, 34)], dim=1)
    whole = model.backbone.encode_text(padded)
    torch.testing.assert_close(towers.encode_text(model.backbone, ids), whole, rtol=0, atol=1e-12)


def test_ids_without_padding() -> None:
    """Features and scores of short ids are those of padded ones; a tower that reads all tokens asks for them."""
    model: Any = build()
    ids = model.family.tokenize(["a cat", "a dog in the park"])
    x = images(model)
    model.reset_head(0)
    short = ids[:, : model.family.text_length(ids)]
    torch.testing.assert_close(model.features(texts=short), model.features(texts=ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.features(x, short), model.features(x, ids), rtol=0, atol=1e-12)
    for odd in (ids.double(), ids[:, :0], ids[0]):
        with pytest.raises(DataError, match=r"expected whole numbers \(n, 40\)"):
            model.features(texts=odd)
    model = build("no mask")
    with pytest.raises(DataError, match=r"expected whole numbers \(n, 40\)"):
        model.features(texts=short)


def test_zero_shot_and_contrast_run_short_texts() -> None:
    model: Any = build()
    seen = lengths(model)
    whole = zero_shot_classifier(model, NAMES, ["a {}.", "a photo of a {}."])
    assert max(seen) < 36
    texts = model.family.tokenize([t.format(name) for name in NAMES for t in ("a {}.", "a photo of a {}.")])
    embedded = F.normalize(model.features(texts=texts), dim=-1).unflatten(0, (3, 2)).mean(1)
    expected = model.backbone.logit_scale.exp().float() * F.normalize(embedded.float(), dim=-1)
    torch.testing.assert_close(whole.weight, expected, rtol=0, atol=1e-5)
    model.reset_head(0)
    del seen[:]
    given = model.family.tokenize(["a cat", "a dog", "an ox", "a big grey cat"])
    loss, _ = zoo.registry.task("contrast").loss(model, (images(model), given), torch.arange(4))
    scores = model.features(images(model), given)
    label = torch.arange(4)
    both = (F.cross_entropy(scores.float(), label) + F.cross_entropy(scores.T.float(), label)) / 2
    torch.testing.assert_close(loss.float(), both, rtol=1e-5, atol=1e-5)
    assert seen[0] < 16 and seen[1] == 40
