"""LLaMA-Adapter V2 on small decoders: the paper's form against the formulas, images, and two groups trained apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, ConfigError, ContextError, MergeError
from zoo.tasks import Task
from zoo.train.samplers import OnePart

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

NAME = "llama-adapter-v2"
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "initializer_range": 0.2,
}
EYE: dict[str, Any] = {"eye_dim": 6, "visual_width": 8, "visual_heads": 2, "visual_depth": 1}
GROUPED: dict[str, Any] = {
    "qwen2-0.5b": {"num_key_value_heads": 2},
    "qwen3-0.6b": {"num_key_value_heads": 2, "head_dim": 8},
}


def build(backbone: str = "llama-7b", stirred: bool = True, **settings: Any) -> zoo.Model:
    torch.manual_seed(0)
    own = {"num_tokens": 3, **EYE, **settings}
    sizes = {**SIZE, **GROUPED.get(backbone, {})}
    model = zoo.load(backbone, zoo.adapter(NAME, **own), pretrained=False, **sizes)
    if stirred:
        with torch.no_grad():
            for parameter in model.adapters[NAME].parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def words() -> Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def eye() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))


def seen(model: zoo.Model, image: Tensor | None, ids: Tensor | None = None) -> Tensor:
    return model(words() if ids is None else ids, context=None if image is None else {"image": image})


# -- the paper's form, by hand --------------------------------------------------------------------------------------------


def by_hand(model: zoo.Model, ids: Tensor, image: Tensor | None) -> Tensor:
    """A LLaMA with the equations of the method's file, from the weights alone."""
    state, own = model.backbone.state_dict(), dict(model.adapters[NAME].named_parameters())
    heads, width = SIZE["num_attention_heads"], SIZE["hidden_size"] // SIZE["num_attention_heads"]
    place = torch.arange(ids.shape[1])[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    cos, sin = place.cos().repeat(1, 2), place.sin().repeat(1, 2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * own[f"{name}.weight"]

    def linear(x: Tensor, i: int, role: str, path: str) -> Tensor:
        y = x @ state[f"model.layers.{i}.{path}.weight"].T
        return own[f"blocks.{i}.{role}.scale"] * (y + own[f"blocks.{i}.{role}.bias"])

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width)).transpose(-3, -2)

    def turned(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
        return x * cos + half * sin

    hidden = state["model.embed_tokens.weight"][ids]
    causal = torch.ones(len(cos), len(cos)).tril() == 0
    for i in range(SIZE["num_hidden_layers"]):
        x = norm(hidden, f"blocks.{i}.norm1")
        q, k, v = (split(linear(x, i, f"attn.{r}", f"self_attn.{r}_proj")) for r in "qkv")
        scores = turned(q) @ turned(k).mT / math.sqrt(width)
        y = scores.masked_fill(causal, float("-inf")).softmax(-1) @ v
        prompt = own.get(f"blocks.{i}.attn.product.prompt")
        if i == 0 and image is not None:
            prompt = model.adapters[NAME].visual(image)
        if prompt is not None:
            k_p, v_p = (split(linear(prompt, i, f"attn.{r}", f"self_attn.{r}_proj")) for r in "kv")
            gate = own[f"blocks.{i}.attn.product.gate"].tanh()
            y = y + gate * (turned(q) @ k_p.mT / math.sqrt(width)).softmax(-1) @ v_p
        hidden = hidden + linear(y.transpose(1, 2).flatten(2), i, "attn.o", "self_attn.o_proj")
        x = norm(hidden, f"blocks.{i}.norm2")
        gated = F.silu(linear(x, i, "mlp.gate", "mlp.gate_proj")) * linear(x, i, "mlp.up", "mlp.up_proj")
        hidden = hidden + linear(gated, i, "mlp.down", "mlp.down_proj")
    return norm(hidden, "norm") @ state["lm_head.weight"].T


@pytest.mark.parametrize("image", [None, eye()], ids=["text", "image"])
def test_the_papers_form(image: Tensor | None) -> None:
    model = build()
    torch.testing.assert_close(seen(model, image), by_hand(model, words(), image), rtol=1e-4, atol=1e-4)


def test_what_reads_the_image_by_torchs_own_layers() -> None:
    visual = build().adapters[NAME].visual
    block = visual.blocks[0]
    twin = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True)
    values = {
        "self_attn.in_proj_weight": block.qkv.weight,
        "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.proj.weight,
        "self_attn.out_proj.bias": block.proj.bias,
        **{f"linear1.{n}": p for n, p in block.up.named_parameters()},
        **{f"linear2.{n}": p for n, p in block.down.named_parameters()},
        **{f"{m}.{n}": p for m in ("norm1", "norm2") for n, p in getattr(block, m).named_parameters()},
    }
    twin.load_state_dict(values)
    entered = visual.into_norm(visual.into(eye()))
    read = twin.eval()(torch.cat([visual.query.expand(2, -1, -1), entered], dim=1))[:, :3]
    expected = visual.out_norm(visual.out(read))
    torch.testing.assert_close(visual(eye()), expected, rtol=1e-5, atol=1e-5)


# -- starts, images, rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["llama-7b", "qwen3-0.6b"])
@pytest.mark.parametrize("form", ["paper", "7b", "65b"])
def test_it_starts_as_the_network_with_an_image_too(backbone: str, form: str) -> None:
    model = build(backbone, stirred=False, form=form)
    with model.disable():
        bare = model(words())
    assert torch.equal(model(words()), bare)
    if form != "65b":
        assert torch.equal(seen(model, eye()), bare)
    assert model.probe(words()) == []


@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.parametrize("backbone", ["llama-7b", "qwen2-0.5b"])
def test_each_text_sees_its_own_image(backbone: str, fusion: str) -> None:
    model = build(backbone, fusion=fusion)
    whole = seen(model, eye())
    for i in range(2):
        alone = seen(model, eye()[i : i + 1], words()[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, seen(model, eye().flip(0)))
    assert not torch.allclose(whole, seen(model, None))


def test_it_serves_its_rows_of_a_batch() -> None:
    model = build()
    model.add_adapter("lora", activate=False)
    expected = seen(model, eye())[1]
    found = model(words(), adapters=["lora", NAME], context={"image": eye()})
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)


def test_it_writes_with_a_cache(tmp_path: Path) -> None:
    """Word by word as in one pass: prompts have no place, and the cache does not hold them."""
    model = build(fusion="none")
    ids = words()[:1]
    for _ in range(3):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    network: Any = model.backbone
    made = model.passing(lambda: network.generate(words()[:1], max_new_tokens=3, do_sample=False), words()[:1])
    assert torch.equal(made, ids)


def test_it_is_saved_and_cannot_be_merged(tmp_path: Path) -> None:
    model = build()
    again, expected = build(stirred=False), seen(model, eye())
    again.remove_adapter(NAME)
    zoo.disk.attach(again, zoo.disk.read(model.save_adapter(tmp_path / "a")))
    assert torch.equal(seen(again.eval(), eye()), expected)
    with pytest.raises(MergeError, match="second attention"):
        model.merge()


# -- two groups -----------------------------------------------------------------------------------------------------------


class Pairs(Task):
    """Ids, which are also what is to be written, with an image where the first number of the target says so."""

    name = "pairs"

    def loss(self, model: Any, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        scores = model(inputs["x"])
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), inputs["x"][:, 1:].flatten()), scores

    def example(self, model: Any, inputs: Any, targets: Any) -> Any:
        return inputs["x"]

    def context(self, model: Any, inputs: Any, targets: Tensor, *, training: bool) -> dict[str, Any]:
        return {"image": inputs["image"]} if bool(targets[0]) else {}


class Rows:
    """Four texts with images, then four without; `parts` and `part` are what a sampler of parts reads."""

    labels: Any = None
    blocks: Any = None
    window, name, noun = 1, "rows", "texts"
    parts = ("captions", "instructions")

    def __init__(self) -> None:
        import numpy as np

        self.part = np.repeat([0, 1], 4)

    def __len__(self) -> int:
        return 8

    def where(self, index: int) -> str:
        return str(index)

    def raw(self) -> bool:
        return False

    def read(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {"x": words()[index % 2], "image": eye()[index % 2]}, int(index < 4)


def groups(model: zoo.Model) -> dict[str, dict[str, Tensor]]:
    named = dict(model.adapters[NAME].named_parameters())
    return {g: {n: named[n] for n in names} for g, names in model.adapters[NAME].groups().items()}


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_a_step_trains_the_group_of_its_data(image: bool) -> None:
    """Momentum and decay included: the other group does not move at all."""
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters_to_train().values(), lr=0.1, weight_decay=0.1)
    for step, picture in enumerate((not image, image)):  # both groups have momentum when it counts
        before = {g: {n: p.detach().clone() for n, p in own.items()} for g, own in groups(model).items()}
        optimizer.zero_grad()
        seen(model, eye() if picture else None).square().mean().backward()
        model.adapters[NAME].after_backward(model, step)
        optimizer.step()
    moved = {g: {n for n, p in own.items() if not torch.equal(p, before[g][n])} for g, own in groups(model).items()}
    every = {g: set(own) for g, own in groups(model).items()}
    if image:
        assert moved == {"vision": every["vision"], "prompts": set(), "tuned": set()}
    else:
        assert moved == {"vision": set(), "prompts": every["prompts"], "tuned": every["tuned"]}


def test_two_streams_in_one_fit() -> None:
    from zoo.data import ImageDataset

    model = build(stirred=False)
    before = {n: p.detach().clone() for n, p in model.adapters[NAME].named_parameters()}
    data = ImageDataset(Rows(), None)
    report = zoo.fit(
        model, data, val=None, task=Pairs(), sampler=OnePart(tau=0.0), epochs=12, batch_size=2, lr=0.05, progress=False
    )
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    still = [n for n, p in model.adapters[NAME].named_parameters() if torch.equal(p, before[n])]
    assert still == []


def test_together_where_that_is_asked_for() -> None:
    model = build(disjoint=False).train()
    seen(model, eye()).square().mean().backward()
    model.adapters[NAME].after_backward(model, 0)
    assert all(p.grad is not None for p in model.adapters[NAME].parameters())


# -- the eye, and what is refused -----------------------------------------------------------------------------------------


def test_tokens_of_a_clip() -> None:
    pytest.importorskip("open_clip", reason="the extra 'multimodal' is not installed")
    from multimodal.adapters.llama_adapter_v2 import eye_tokens
    from zoo.table import tiny_model

    clip, _ = tiny_model("clip")
    visual: Any = clip.backbone.visual
    image = clip.example_batch(2)[0]
    caught: list[Tensor] = []
    handle = visual.ln_post.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
    clip.eval()(image)
    handle.remove()
    tokens = eye_tokens(clip, image)
    whole = caught[0] if caught[0].dim() == 3 else None
    if whole is not None:
        torch.testing.assert_close(tokens, visual.ln_post(whole) @ visual.proj, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, 0], clip.features(image), rtol=1e-4, atol=1e-5)
    with pytest.raises(AttachError, match="is no CLIP"):
        eye_tokens(build(), image)


def test_what_does_not_fit_is_refused() -> None:
    model = build()
    with pytest.raises(ContextError, match="expected the tokens of an eye"):
        seen(model, torch.randn(2, 5, 7))
    with pytest.raises(ContextError, match="1 values for a batch of 2"):
        seen(model, eye()[:1])
    for settings, message in (
        ({"form": "8b"}, "form"),
        ({"scale": "both"}, "scale"),
        ({"fusion": "late", "layers": 0}, "adds images to prompts"),
        ({"visual_width": 10, "visual_heads": 4}, "not divisible"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter(NAME, **settings)
    with pytest.raises(ConfigError, match="the first one is the image's"):
        build(layers=3)


# -- language models with eyes of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "7b", "65b"])
@pytest.mark.parametrize("name", ["qwen2-vl-2b", "qwen2.5-vl-3b", "smolvlm-256m", "llava-1.5-7b"])
def test_the_language_alone_of_a_network_with_eyes(name: str, form: str) -> None:
    from vlm_models import tiny

    model = tiny(name)
    batch = model.family.tiny_batch()
    bare = model(*batch)
    model.add_adapter(zoo.adapter(NAME, form=form, num_tokens=3, **EYE))
    assert torch.equal(model(*batch), bare) and model.probe(*batch) == []
    places = {key.removeprefix(f"{NAME}/").partition(".")[0] for key in model.parameters_to_train()}
    assert places == ({"text"} if form == "65b" else {"text", "visual"})
    assert all(key.startswith(f"{NAME}/visual.") for key in model.parameters_to_train() if "/text." not in key)


def test_the_language_of_a_network_with_eyes_is_the_decoder_that_it_contains() -> None:
    """LLaVA's language network is a LLaMA: with the same weights and the same adapter, the same scores of a text."""
    from vlm_models import tiny

    model = build()
    sizes = {**SIZE, "num_key_value_heads": SIZE["num_attention_heads"], "rms_norm_eps": 1e-6}
    seeing = tiny("llava-1.5-7b", zoo.adapter(NAME, num_tokens=3, **EYE), text_config={**sizes, "model_type": "llama"})
    inside: Any = seeing.backbone
    language = {k.removeprefix("model."): v for k, v in model.backbone.state_dict().items() if k != "lm_head.weight"}
    inside.model.language_model.load_state_dict(language)
    inside.lm_head.load_state_dict({"weight": model.backbone.state_dict()["lm_head.weight"]})
    values = {k if k.startswith("visual.") else f"text.{k}": v for k, v in model.adapters[NAME].state_dict().items()}
    seeing.adapters[NAME].load_state_dict(values)
    ids = words().masked_fill(words().eq(4), 5)  # 4 is the place of an image there
    for image in (None, eye()):
        torch.testing.assert_close(seen(seeing, image, ids), seen(model, image, ids), rtol=1e-4, atol=1e-5)
