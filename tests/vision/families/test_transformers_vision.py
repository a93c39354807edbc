"""transformers' vision networks: against the library's forward, prompts written out, checkpoints as the library saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from hf_vision import KINDS, SMALL, answer, batch, library, make, rows, settle
from torch import Tensor, nn

import zoo
from zoo.errors import MergeError
from zoo.registry import family

transformers = pytest.importorskip("transformers")

each = pytest.mark.parametrize("kind", KINDS)
METHODS = ("bitfit", "norm", "ssf", "ia3", "prefix", "vpt", "full")


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_library(kind: str, attention: str) -> None:
    model = make(kind, attn_implementation=attention)
    x = batch(model)
    assert torch.equal(model.features(x), answer(library(model), x))  # to the bit
    outputs = model.outputs(x, want=("pooled", "tokens"))
    assert torch.equal(outputs["pooled"], model.features(x)) and model.features(x).shape[1] == model.family.feature_dim
    assert outputs["tokens"].shape[1] == model.family.num_prefix + (16 if kind != "videomae" else 8)


@each
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_dead_and_merges_are_exact(kind: str, method: str) -> None:
    model = make(kind, method)
    x = batch(model)
    assert model.probe(x) == []
    settle(model)
    if method == "ssf" and kind.startswith(("dinov3", "clip")):  # turned keys, or a projection, without a bias
        with pytest.raises(MergeError, match="has no bias to merge into"):
            model.merge()
    elif model.adapters[method].merges:
        torch.testing.assert_close(model.family.run(model.merge(), x), model.features(x), rtol=1e-9, atol=1e-9)
    model.remove_adapter(method)
    assert torch.equal(model.features(x), answer(library(model), x))


@each
def test_lora_on_everything_is_that_of_the_weights(kind: str) -> None:
    """W + s B A in the library's own module gives the same; so does the merged module; every linear of the blocks is reached."""
    model = make(kind, zoo.adapter("lora", rank=2, targets="all-linear"))
    x, module = batch(model), library(model)
    settle(model)
    chosen = model.points.select("blocks.*.**", kind="linear")
    blocks = model.family.place.blocks
    linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and f"{blocks}." in n]
    assert sorted(p.path for p in chosen) == sorted(linears)
    with torch.no_grad():
        for point in chosen:
            part = model.adapters["lora"].module_at(point.name)
            module.get_submodule(point.path).weight += part.delta()
    torch.testing.assert_close(model.features(x), answer(module, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.family.run(model.merge(), x), model.features(x), rtol=1e-9, atol=1e-9)


@each
def test_every_normalisation_is_a_point(kind: str) -> None:
    """The pooling's norms among them: counted against the library's modules."""
    model = make(kind, "norm")
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.LayerNorm) and m.elementwise_affine]
    assert {id(p.module) for p in model.points.select(kind="norm")} == {id(m) for m in norms}
    assert model.num_parameters(trainable=True, head=False) == sum(p.numel() for m in norms for p in m.parameters())


def straightforward(module: Any, model: zoo.Model, x: Tensor, prompts: list[Tensor], deep: bool, pool: str) -> Tensor:
    """Prompts as tokens [prefix | prompts | patches] that run through whole blocks of the library's module."""
    family, place = model.family, model.family.place
    at, count = family.num_prefix, len(prompts[0])
    blocks = module.get_submodule(".".join(filter(None, (place.body, place.blocks))))

    def enter(number: int) -> Any:
        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0]
            if number == 0 or deep:
                rest = hidden[:, at:] if number == 0 else hidden[:, at + count :]
                hidden = torch.cat([hidden[:, :at], prompts[number].expand(len(x), -1, -1), rest], dim=1)
            return (hidden, *args[1:]), kwargs

        return hook

    def grow(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None:  # BEiT's bias of relative positions
            own = torch.arange(mask.shape[-1] + count)
            own = own[(own < at) | (own >= at + count)]
            wide = mask.new_zeros(*mask.shape[:2], mask.shape[-1] + count, mask.shape[-1] + count)
            wide[..., own[:, None], own] = mask
            kwargs["attention_mask"] = wide
        return args, kwargs

    def leave(block: Any, args: Any, hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :at], hidden[:, at + count :]], dim=1)

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(enter(i), with_kwargs=True)
        family.attention_of(block).register_forward_pre_hook(grow, with_kwargs=True)
    if pool != "all" or not family.averaged:
        blocks[-1].register_forward_hook(leave)
    return answer(module, x)


@each
@pytest.mark.parametrize(("deep", "pool"), [(True, "patches"), (True, "all"), (False, "patches"), (False, "all")])
def test_prompts_equal_the_straightforward_form(kind: str, deep: bool, pool: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=3, deep=deep, pool=pool))
    x = batch(model)
    prompts = [p.detach().clone().requires_grad_() for p in model.adapters["vpt"].parameters()]
    expected = straightforward(library(model), model, x, prompts, deep, pool)
    found = model.features(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = torch.autograd.grad((expected * weights).sum(), prompts)
    (found * weights).sum().backward()
    for parameter, grad in zip(model.adapters["vpt"].parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-11)


@each
def test_blocks_by_hand_and_memory(kind: str) -> None:
    model = make(kind, zoo.adapter("lora", rank=2))
    settle(model)
    x, run = batch(model), zoo.blocks(model)
    here = run.start(x)
    for i in range(len(run)):
        tokens = run.half(i, "mlp", here)(run.half(i, "attn", here)(here.tokens))
        here = run.advance(here, 1)
        torch.testing.assert_close(tokens, here.tokens, rtol=1e-12, atol=1e-12)
    assert torch.equal(run.finish(here), model.features(x))
    found = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.zero_grad()
        model.features(x).square().sum().backward()
        found[memory] = [p.grad.clone() for p in model.parameters_to_train().values()]  # type: ignore[union-attr]
    for memory in ("low", "min"):
        for one, other in zip(found[memory], found["default"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_counts() -> None:
    """Of the library's own modules; SigLIP-B with its pooling."""
    expected = {
        "hf-siglip-b16": 92_884_224,
        "hf-vit-b16": 85_798_656,
        "hf-mae-b16": 85_798_656,
        "hf-beit-b16": 85_761_984,
        "hf-dinov2-b14": 86_580_480,
        "hf-dinov2-b14-reg": 86_583_552,
        "hf-dinov3-b16": 85_660_416,
        "hf-clip-b32": 87_849_216,
        "hf-siglip2-b16-naflex": 92_884_224 + 60 * 768,  # 256 positions
        "videomae-b16": 86_227_200,
    }
    for name, count in expected.items():
        assert zoo.load(name, num_classes=0, device="meta").num_parameters() == count, name
    lora = zoo.load("hf-dinov3-b16", "lora", num_classes=0, device="meta")
    assert lora.num_parameters(trainable=True) == 294_912


def test_the_pooling_of_siglip_has_no_dead_projections() -> None:
    """`head.attention` is a nn.MultiheadAttention: its `out_proj` is never called, so nothing may stand there."""
    model = make("siglip", zoo.adapter("lora", targets="pool.*", rank=2))
    assert [p.path for p in model.points if p.path.startswith("head")] == [
        "head.layernorm",
        "head.mlp.fc1",
        "head.mlp.fc2",
    ]
    assert model.probe(batch(model)) == []
    settle(model)
    x = batch(model)
    torch.testing.assert_close(model.family.run(model.merge(), x), model.features(x), rtol=1e-9, atol=1e-9)


def test_an_mlp_without_a_module_is_not_replaced() -> None:
    point = make("videomae").points["blocks.0.mlp"]
    with pytest.raises(zoo.ZooError, match="no module of its own"):
        point.replace(nn.Identity())


def test_a_clip_is_made_of_frames() -> None:
    from PIL import Image

    model = make("videomae")
    frames = [Image.new("RGB", (20, 16), (10 * i, 0, 0)) for i in range(9)]
    clip = model.preprocess()(frames)
    assert clip.shape == (4, 3, 16, 16) and clip[0, 0, 0, 0] < clip[1, 0, 0, 0] < clip[3, 0, 0, 0]
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    same = model.preprocess(train=True)([noise] * 5)
    assert torch.equal(same[0], same[3])  # one view for all frames
    assert family("videomae").noun == "clips"


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("method", ["lora", "norm", "full", "vpt"])
def test_image_classifiers_of_both(kind: str, method: str, tmp_path: Path) -> None:
    """Folders of SiglipForImageClassification come with their classifier, which stands on the mean of the patches."""
    small = {**SMALL, **({"projection_dim": 20} if kind == "clip" else {})}
    text = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "vocab_size": 50,
    }
    names = {
        "siglip": ("SiglipConfig", "SiglipForImageClassification"),
        "clip": ("CLIPConfig", "CLIPForImageClassification"),
    }
    config_class, model_class = (getattr(transformers, n) for n in names[kind])
    module = model_class(config_class(vision_config=small, text_config=text, num_labels=4)).eval()
    module.save_pretrained(tmp_path)
    model = zoo.load(f"transformers:{tmp_path}").eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.num_classes == 4
    with torch.no_grad():
        assert torch.equal(model(x), module.requires_grad_(False)(x).logits)
    model.add_adapter(zoo.adapter(method, **({"pool": "all"} if method == "vpt" else {})))
    assert model.probe(x) == []
    settle(model)
    if model.adapters[method].merges:
        plain: Any = model.merge()
        torch.testing.assert_close(plain(x).logits, model(x), rtol=1e-5, atol=1e-5)
        plain.save_pretrained(tmp_path / "merged")
        again = zoo.load(f"transformers:{tmp_path / 'merged'}").eval()
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "videomae"])
def test_an_adapter_for_each_sample_and_half_precision(kind: str) -> None:
    model = make(kind, zoo.adapter("lora", rank=2, targets="all-linear"))
    model.add_adapter("prefix")
    settle(model)
    x, expected = batch(model), []
    for i, name in enumerate(("prefix", "lora")):
        model.set_active(name)
        expected.append(model(x[i : i + 1]))
    torch.testing.assert_close(model(x, adapters=["prefix", "lora"]), torch.cat(expected), rtol=1e-9, atol=1e-9)
    model.set_active("prefix", "lora")
    model.to(torch.bfloat16).train()(x.to(torch.bfloat16)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters_to_train().values())


def test_naflex_sees_what_its_processor_makes_of_an_image() -> None:
    """Rows of patches, a mask of those that there are, and their number along each axis: one image, 24 x 40 pixels."""
    import numpy as np

    model = make("siglip2", image_size=32)
    picture = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=15, do_resize=False)
    given = processor(images=picture, return_tensors="pt")
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255 * 2 - 1
    assert given["spatial_shapes"].tolist() == [[3, 5]]
    torch.testing.assert_close(rows(image), given["pixel_values"].double(), rtol=1e-5, atol=1e-5)
    expected = library(model)(rows(image), given["pixel_attention_mask"], given["spatial_shapes"]).pooler_output
    torch.testing.assert_close(model.features(image), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "siglip"])
def test_it_is_one_graph(kind: str) -> None:
    model = make(kind, zoo.adapter("lora", rank=2))
    x = batch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
