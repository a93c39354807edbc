"""What the methods that put vectors among class names all promise: CoCoOp, MaPLe, CPE-CLIP on open_clip's towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, MICRO, TEXT, make

from multimodal.families.clip import text as clip_text
from multimodal.families.clip.micro import ShortTokenizer
from zoo.errors import AttachError, CombinationError, ConfigError, MergeError

METHODS = ["cocoop", "maple", "cpe-clip"]
NAMES = ["cat", "dog", "pick-up_truck"]
each = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def own_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's tokenizer would be downloaded."""
    monkeypatch.setattr(clip_text, "tokenizer", lambda name, context, vocab: ShortTokenizer(vocab, context))


def trial(method: str) -> zoo.Adapter:
    return zoo.adapter(method, **zoo.registry.adapter_class(method).trial)


def build(method: str | None, kind: str = "plain", *others: Any, names: list[str] | None = NAMES) -> zoo.Model:
    """A small model in float64 with the names of three classes."""
    text = {**TEXT, **MICRO.get(kind, {}).get("text_cfg", {}), "context_length": 24}
    classes: dict[str, Any] = {"num_classes": 3} if names is None else {"classes": names}
    own = [] if method is None else [trial(method)]
    return make(kind, *own, *others, text_cfg=text, tower="both", **classes)


def images(model: zoo.Model, count: int = 4) -> Tensor:
    size = model.family.data_config()["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(5), dtype=torch.double)


@pytest.mark.parametrize("kind", ["layer scale", "extra norms", "no mask", "timm", "timm pe"])
@each
def test_runs_on_every_kind_of_tower(method: str, kind: str) -> None:
    model = build(method, kind)
    assert model.train().probe(images(model)) == []
    logits = model(images(model))
    assert logits.shape == (4, 3) and logits.isfinite().all()
    with torch.no_grad(), model.disable():
        bare = model.features(images(model))
    model.remove_adapter(method)
    assert torch.equal(model.eval().features(images(model)), bare)
    assert not any(m._forward_hooks for m in model.backbone.modules())


@each
def test_every_image_has_an_answer_of_its_own(method: str) -> None:
    """The fault of prompts that mix images of a batch: each image alone gives what it gives among others."""
    model = build(method).eval()
    x = images(model)
    together = model(x)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(len(x))]), together)
    with torch.no_grad():
        torch.testing.assert_close(model(x), together.detach())


@pytest.mark.parametrize(("method", "texts"), [("maple", [3, 3]), ("cpe-clip", [3, 3]), ("cocoop", [12, 12, 12])])
def test_how_many_texts_are_encoded(method: str, texts: list[int]) -> None:
    """Those of the classes once for each step, whatever the batch; in evaluation once, but where each image has its own."""
    model = build(method)
    runs: list[int] = []
    model.points["text.embed"].module.register_forward_hook(lambda m, a, y: runs.append(len(y)))
    model.train()(images(model)).sum().backward()
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            model(images(model))
    assert runs == texts


@pytest.mark.parametrize("beside", ["lora", "vpt", "prefix"])
@each
def test_memory_settings_and_other_methods_beside_it(method: str, beside: str) -> None:
    shallow = {"deep": False, "num_tokens": 2} if beside == "vpt" else {}
    model = build(method, "plain", zoo.adapter(beside, **shallow)).train()
    found = []
    for setting in ("default", "low", "min"):
        model.memory = setting
        model.zero_grad()
        model(images(model)).square().sum().backward()
        found.append({k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None})
    assert set(found[0]) == set(model.parameters_to_train()) and all(g.any() for g in found[0].values())
    for other in found[1:]:
        for key, value in other.items():
            torch.testing.assert_close(value, found[0][key], rtol=1e-9, atol=1e-12)


@each
def test_per_sample_adapters(method: str) -> None:
    model = build(None)
    for seed, name in enumerate(("a", "b")):
        model.add_adapter(trial(method), name, activate=False)
        with torch.no_grad():
            for p in model.adapters[name].parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    model.add_adapter(zoo.adapter("lora", rank=2), "c", activate=False)
    model.double().eval()
    rows, x, alone = ["b", None, "a", "c"], images(model), []
    for i, name in enumerate(rows):
        model.set_active(*([name] if name else []))
        alone.append(model(x)[i : i + 1])
    model.set_active("a")
    torch.testing.assert_close(model(x, adapters=rows), torch.cat(alone))
    assert model.active == ("a",)


@each
def test_compiles(method: str) -> None:
    model = build(method).train()
    x = images(model)
    expected = model(x)
    torch._dynamo.reset()
    try:
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(logits, expected)
        parameters = list(model.parameters_to_train().values())
        found = torch.autograd.grad(logits.square().sum(), parameters)
        for a, b in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch._dynamo.reset()


@each
def test_is_saved_and_serves_other_classes(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**TEXT, "context_length": 24}
    options: dict[str, Any] = {"pretrained": False, "embed_dim": 24, "vision_cfg": IMAGE, "text_cfg": text}
    model = zoo.load("clip-micro", trial(method), classes=NAMES, **options).eval()
    with torch.no_grad():
        for p in model.adapters[method].parameters():
            p.add_(0.3)
    model.save_adapter(tmp_path / "out")
    x = torch.randn(2, 3, 16, 16)
    for classes in (None, ["a", "b", "c", "dog"]):
        torch.manual_seed(0)  # the same random backbone
        other = zoo.load(adapter=tmp_path / "out", pretrained=False, classes=classes).eval()
        if classes is None:
            assert torch.equal(other(x), model(x)) and other.classes == NAMES
        else:
            torch.testing.assert_close(other(x)[:, 3], model(x)[:, 1])
    model.grow_head(["red bird"])
    torch.testing.assert_close(model(x)[:, :3], other.eval()(x).new_tensor(model(x)[:, :3].tolist()))
    assert model(x).shape == (2, 4)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model = build(method).to(dtype).eval()
    with torch.no_grad():
        assert model(images(model).to(dtype)).isfinite().all()


@each
def test_what_is_refused(method: str) -> None:
    with pytest.raises(AttachError, match=f"'{method}'.*vit-micro"):
        zoo.load("vit-micro", method, pretrained=False, num_classes=3)
    with pytest.raises(AttachError, match="tower='both'"):
        make("plain", trial(method), tower="image", num_classes=3)
    with pytest.raises(AttachError, match="class names"):
        make("plain", trial(method))
    model = build(method, names=None)
    with pytest.raises(ConfigError, match=r"names of its 3 classes.*classes=\["):
        model(images(model))
    model = build(method, names=["cat", "a dog that is much longer than the context", "c"])
    with pytest.raises(ConfigError, match=r"class name 'a dog that is much .* does not fit the text tower"):
        model(images(model))
    for name in ("_", "\u00a0", "__ "):
        model = build(method, names=["cat", name, "c"])
        with pytest.raises(ConfigError, match="no token is left"):
            model(images(model))
    model = build(method)
    for second in ("coop", "maple", "cpe-clip", "cocoop"):  # two that put vectors among the words
        with pytest.raises(CombinationError, match="words"):
            model.add_adapter(trial(second), "second")
    assert list(model.adapters) == [method]
    with pytest.raises(MergeError, match=f"'{method}' cannot be merged"):
        model.merge()
    with pytest.raises(ConfigError, match="num_tokens"):
        zoo.adapter(method, num_tokens=0)


def test_transformers_clip_is_refused_with_the_reason() -> None:
    """Of transformers' own CLIP, which no family describes, no words are known; OpenAI's weights are open_clip's, too."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 600, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    example = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": torch.randint(3, 600, (2, 8))}
    model = zoo.wrap(transformers.CLIPModel(config), example=example)
    for method in METHODS:
        with pytest.raises(AttachError, match="tokens points, and wrapped:CLIPModel has none"):
            model.add_adapter(method)
