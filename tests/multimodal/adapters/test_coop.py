"""CoOp: the zero-shot start, a form written down straightforwardly, and what every method promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from train_parts import Stop, StopAt

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, MICRO, TEXT, make
from two_processes import launch

from multimodal.families.clip import text as clip_text
from multimodal.families.clip.micro import ShortTokenizer
from zoo.errors import AttachError, CombinationError, ConfigError, MergeError
from zoo.heads.text import class_ids

NAMES = ["cat", "dog", "pick-up_truck"]
KINDS = ["plain", "layer scale", "extra norms", "no mask", "timm"]


@pytest.fixture(autouse=True)
def own_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's tokenizer would be downloaded."""
    monkeypatch.setattr(clip_text, "tokenizer", lambda name, context, vocab: ShortTokenizer(vocab, context))


def build(kind: str = "plain", *adapters: Any, names: list[str] | None = NAMES, **settings: Any) -> zoo.Model:
    """A small model in float64 with the names of three classes."""
    own = [zoo.adapter("coop", **settings)] if settings else []
    text = {**TEXT, **MICRO.get(kind, {}).get("text_cfg", {}), "context_length": 40}
    classes: dict[str, Any] = {"num_classes": 3} if names is None else {"classes": names}
    return make(kind, *own, *adapters, text_cfg=text, tower="both", **classes)


def images(model: zoo.Model, count: int = 4) -> Tensor:
    size = model.family.data_config()["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(5), dtype=torch.double)


def straightforward(model: zoo.Model, x: Tensor, position: str) -> Tensor:
    """Prompts built of embedded words, one class after the other, and open_clip's own towers behind them."""
    own: Any = model.backbone
    family: Any = model.family
    text = getattr(own, "text", own)
    (context,) = model.adapters["coop"].parameters()
    tokenizer = ShortTokenizer(int(own.vocab_size), family.context_length)
    features = []
    for k, name in enumerate(NAMES):
        v = context[k] if context.dim() == 3 else context
        half = len(v) // 2
        words = text.token_embedding.weight[torch.tensor(tokenizer.encode(name.replace("_", " ")))]
        start, end = (text.token_embedding.weight[[i]] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
        stop = text.token_embedding.weight[torch.tensor(tokenizer.encode("."))]
        middle = {"end": [v, words], "middle": [v[:half], words, v[half:]], "front": [words, v]}[position]
        y = torch.cat([start, *middle, stop, end])
        at = len(y) - 1
        padding = text.token_embedding.weight[[0]].expand(family.context_length - len(y), -1)
        y = (torch.cat([y, padding]) + text.positional_embedding)[None]
        y = text.ln_final(text.transformer(y, attn_mask=text.attn_mask))
        pool = getattr(own, "text_pool_type", None) or text.pool_type
        y = y[:, at] if pool == "argmax" else y[:, -1]
        projection = text.text_projection
        features.append(projection(y) if isinstance(projection, torch.nn.Linear) else y @ projection)
    t, i = F.normalize(torch.cat(features), dim=-1), F.normalize(own.encode_image(x), dim=-1)
    bias = 0 if own.logit_bias is None else own.logit_bias
    return own.logit_scale.exp() * i @ t.T + bias


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_zero_shot_classifier(kind: str) -> None:
    from multimodal.tasks.zero_shot import put_zero_shot_classifier

    plain = build(kind)
    model = build(kind, init="a photo of a")
    model.backbone.load_state_dict(plain.backbone.state_dict())
    with torch.no_grad():  # `make` moved everything away from its start
        context = model.adapters["coop"].module_at("text.blocks.0.tokens").context  # type: ignore[union-attr]
        context.copy_(model.points["text.blocks.0.tokens"].embed("a photo of a"))  # type: ignore[operator]
        put_zero_shot_classifier(plain, [name.replace("_", " ") for name in NAMES])
        torch.testing.assert_close(model(images(model)), plain(images(model)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", ["plain", "no mask", "timm"])
def test_straightforward_form(kind: str, position: str, specific: bool) -> None:
    model = build(kind, num_tokens=5, position=position, class_specific=specific).train()
    x = images(model)
    logits = model(x)
    (context,) = model.adapters["coop"].parameters()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6), dtype=torch.double)
    (found,) = torch.autograd.grad((logits * weights).sum(), [context])
    model.set_active()
    for p in model.adapters["coop"].parameters():
        p.requires_grad_(True)
    expected = straightforward(model, x, position)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), [context])
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)


def test_ids_are_told_from_words() -> None:
    """A class name that holds the filler does not become a slot."""
    model = build(num_tokens=2)
    ids = class_ids(model.family, ["x", "x z q", "cat"], "<*> <*> {}.")
    assert ((ids < 0).sum(1) == 2).all() and ids[0, 1:3].tolist() == [-1, -2]
    assert class_ids(model.family, ["a", "b"], "<*> {} <*>", True).min(1).values.tolist() == [-2, -4]
    family: Any = model.family
    assert torch.equal(class_ids(family, ["red_cat"], "a {}."), family.tokenize(["a red cat."]))


def test_texts_are_encoded_once() -> None:
    model = build(num_tokens=3).train()
    embedding: Any = model.points["text.embed"].module
    runs: list[int] = []
    embedding.register_forward_hook(lambda m, a, y: runs.append(len(y)))
    model(images(model, 7)).sum().backward()
    assert runs == [3]  # three texts, whatever the batch
    model.eval()
    with torch.no_grad():
        first = model(images(model))
        for count in (1, 5):
            model(images(model, count))
        assert runs == [3, 3]
        (context,) = model.adapters["coop"].parameters()
        before = context.clone()
        context.mul_(torch.arange(32))
        assert not torch.equal(model(images(model)), first) and runs == [3, 3, 3]
        context.copy_(before)
        model.train()
        model.eval()
        torch.testing.assert_close(model(images(model)), first)
    model(images(model)).sum().backward()  # gradients in evaluation mode too
    assert context.grad is not None and runs == [3] * 5


def test_only_the_context_is_trained_and_removed_again() -> None:
    model = build()
    before, head = {k: v.clone() for k, v in model.backbone.state_dict().items()}, model.head
    expected = model(images(model))
    model.add_adapter(zoo.adapter("coop", num_tokens=4)).double()
    assert set(model.parameters_to_train()) == {"coop/text.blocks.0.tokens.context"}
    assert model.train().probe(images(model)) == []
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    model(images(model)).square().sum().backward()
    optimizer.step()
    with pytest.raises(MergeError, match="'coop' cannot be merged"):
        model.merge()
    model.remove_adapter("coop")
    assert model.head is head and not any(m._forward_hooks for m in model.backbone.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert torch.equal(model.eval()(images(model)), expected)


@pytest.mark.parametrize("specific", [False, True])
def test_is_saved_as_names_and_vectors(specific: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from zoo.disk import attach, read

    model = build(num_tokens=4, class_specific=specific).eval()
    folder = model.save_adapter(tmp_path / "out")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == {"coop/text.blocks.0.tokens.context"}
    again = make("plain", text_cfg={**TEXT, "context_length": 40}).eval()
    attach(again, read(folder))
    assert again.classes == NAMES and torch.equal(again(images(model)), model(images(model)))
    again.train()
    assert again.probe(images(model)) == []


def test_a_context_is_used_for_other_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "pretrained": False,
        "embed_dim": 24,
        "vision_cfg": IMAGE,
        "text_cfg": {**TEXT, "context_length": 40},
    }
    model = zoo.load("clip-micro", zoo.adapter("coop", num_tokens=4), classes=NAMES, **options)
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)  # the same random backbone
    other = zoo.load(adapter=tmp_path / "out", pretrained=False, classes=["a", "b", "c", "dog"]).eval()
    x = torch.randn(2, 3, 16, 16)
    assert other(x).shape == (2, 4) and other.classes == ["a", "b", "c", "dog"]
    torch.testing.assert_close(other(x)[:, 3], model.eval()(x)[:, 1])
    torch.manual_seed(0)
    specific = zoo.load("clip-micro", zoo.adapter("coop", num_tokens=4, class_specific=True), classes=NAMES, **options)
    specific.save_adapter(tmp_path / "specific")
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="3 classes, and the head has 4"):
        zoo.load(adapter=tmp_path / "specific", pretrained=False, classes=["a", "b", "c", "d"])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_per_sample_adapters(train: bool) -> None:
    model = build()
    for seed, name in enumerate(("a", "b")):
        model.add_adapter(zoo.adapter("coop", num_tokens=3), name, activate=False)
        with torch.no_grad():
            for p in model.adapters[name].parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    model.add_adapter(zoo.adapter("lora", rank=2), "c", activate=False)
    model.double().set_active("a")
    model.train(train)
    rows, x, alone = ["b", None, "a", "c"], images(model), []
    for i, name in enumerate(rows):
        model.set_active(*([name] if name else []))
        alone.append(model(x)[i : i + 1])
    model.set_active("a")
    logits = model(x, adapters=rows)
    torch.testing.assert_close(logits, torch.cat(alone))
    assert model.active == ("a",)
    if train:
        for name in ("a", "b"):
            model.adapters[name].requires_grad_(True)
        model(x, adapters=rows).square().sum().backward()
        assert all(p.grad is not None for name in "ab" for p in model.adapters[name].parameters())


@pytest.mark.parametrize("beside", ["lora", "vpt", "prefix"])
def test_memory_settings_and_other_methods_beside_it(beside: str) -> None:
    model = build("plain", zoo.adapter(beside), num_tokens=3).train()
    assert model.probe(images(model)) == []
    found, kept = [], []
    for setting in ("default", "low", "min"):
        model.memory = setting
        model.zero_grad()
        model(images(model)).square().sum().backward()
        found.append({k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None})
        kept.append(model.saved_bytes(images(model)))
    assert set(found[0]) == set(model.parameters_to_train()) and kept[0] >= kept[1] > kept[2]
    for other in found[1:]:
        for key, value in other.items():
            torch.testing.assert_close(value, found[0][key], rtol=1e-9, atol=1e-12)


def test_compiles() -> None:
    model = build(num_tokens=3).train()
    x = images(model)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        logits = compiled(x)
        torch.testing.assert_close(logits, expected)
        (context,) = model.adapters["coop"].parameters()
        (found,) = torch.autograd.grad(logits.square().sum(), [context])
        (gradient,) = torch.autograd.grad(expected.square().sum(), [context])
        torch.testing.assert_close(found, gradient)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    finally:
        torch._dynamo.reset()


def test_what_is_refused() -> None:
    with pytest.raises(AttachError, match="words of a text tower, and vit-micro has none"):
        zoo.load("vit-micro", "coop", pretrained=False, num_classes=3)
    with pytest.raises(AttachError, match="tower='image' hides them"):
        make("plain", "coop", tower="image", num_classes=3)
    with pytest.raises(AttachError, match="class names"):
        make("plain", "coop")
    model = build(num_tokens=4, names=None)
    with pytest.raises(ConfigError, match=r"names of its 3 classes.*classes=\["):
        model(images(model))
    model = build(num_tokens=36)
    # (it told to pass truncate=True, for which there is no place, and quoted the letters that stand for vectors)
    message = r"name '.*' with its 36 vectors does not fit the text tower \(it has \d+ tokens, .*a shorter name, or take fewer"
    with pytest.raises(ConfigError, match=message):
        model(images(model))
    model = build(num_tokens=2)
    with pytest.raises(CombinationError, match="words"):
        model.add_adapter("coop", "second")
    assert list(model.adapters) == ["coop"] and list(model.heads) == ["default", "coop"]
    with pytest.raises(ConfigError, match="names 3"):
        zoo.load("clip-micro", "coop", pretrained=False, num_classes=4, classes=NAMES)
    with pytest.raises(ConfigError, match="num_tokens"):
        zoo.adapter("coop", num_tokens=0)


def test_new_classes_are_new_names() -> None:
    """One context serves them; contexts of single classes do not."""
    model = build(num_tokens=3).eval()
    x = images(model)
    with torch.no_grad():
        before = model(x)
        model.classes = list(NAMES)
        model.grow_head(["red bird"])
        after = model(x)
    assert after.shape == (4, 4) and model.num_classes == 4
    torch.testing.assert_close(after[:, :3], before)
    specific = build(num_tokens=3, class_specific=True)
    specific.classes = list(NAMES)
    with pytest.raises(ConfigError, match="contexts of their own"):
        specific.grow_head(["red bird"])
    assert specific.num_classes == 3


class Pictures(TensorDataset):
    """Images of three classes; `classes` are their names."""

    def __init__(self, count: int = 12, classes: list[str] | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        patterns, labels = torch.randn(3, 3, 16, 16, generator=generator), torch.arange(count) % 3
        super().__init__(patterns[labels] + 0.3 * torch.randn(count, 3, 16, 16, generator=generator), labels)
        if classes is not None:
            self.classes = classes


def small(**settings: Any) -> zoo.Model:
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 24, "vision_cfg": IMAGE, "text_cfg": {**TEXT, "context_length": 40}}
    return zoo.load("clip-micro", zoo.adapter("coop", **settings), pretrained=False, num_classes=3, **options)


FIT: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "progress": False, "device": "cpu"}


def test_trains_with_the_names_of_the_data_and_resumes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names of its 3 classes"):
        zoo.fit(small(num_tokens=3), Pictures(), **FIT)
    data = Pictures(classes=NAMES)
    assert zoo.evaluate(small(num_tokens=3), data, progress=False, device="cpu")["images"] == 12
    model = small(num_tokens=3)
    report = zoo.fit(model, data, **FIT)
    assert model.classes == NAMES and report.history[-1]["loss"] < report.history[0]["loss"]
    options = {**FIT, "checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Stop):
        zoo.fit(small(num_tokens=3), data, callbacks=[StopAt(3)], **options)
    again = small(num_tokens=3)
    zoo.fit(again, data, **options)
    for key, value in model.parameters_to_train().items():
        assert torch.equal(value, again.parameters_to_train()[key])


def train(out: Path) -> None:
    """The run of the test below, on however many processes there are."""
    from safetensors.torch import save_file

    from zoo.train.processes import Processes

    model = small(num_tokens=3)
    zoo.fit(model, Pictures(13, NAMES), **FIT)
    processes = Processes("cpu")
    if processes.main:
        save_file(
            {k: v.detach().contiguous() for k, v in model.parameters_to_train().items()}, out / f"{processes.world}"
        )


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    launch(train, tmp_path, tmp_path)
    train(tmp_path)
    one, two = (load_file(tmp_path / str(n)) for n in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
