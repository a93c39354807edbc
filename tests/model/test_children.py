"""Cheaper sublayers in place of a backbone's own: what each form computes, folders, adapters on them, and what is refused."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import METHODS, attach, bare, images
from torch import Tensor, nn
from vlm_models import TINY, tiny

import zoo
from zoo import registry
from zoo.errors import ConfigError, MismatchError, SelectionError, ZooError
from zoo.model.children import baked, child_of, own_tensors, places

ALL: dict[str, dict[str, Any]] = {
    "vit": {
        "blocks.0.attn": "none",
        "blocks.0.mlp": 40,
        "blocks.1.attn": "linear",
        "blocks.2.attn": 1,
        "blocks.2.mlp": "none",
    },
    "swin": {
        "stages.0.blocks.0.attn": "linear",
        "stages.0.blocks.1.attn": "none",
        "stages.1.blocks.0.attn": 2,
        "stages.1.blocks.0.mlp": "linear",
    },
    "decoder": {"blocks.0.attn": "none", "blocks.0.mlp": "linear", "blocks.1.attn": 1, "blocks.1.mlp": 20},
    "vlm": {"text.blocks.0.attn": "linear", "text.blocks.1.attn": "none", "text.blocks.1.mlp": "none"},
}
each = pytest.mark.parametrize("family", list(ALL))


def model_of(family: str, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    if family in ("vit", "swin"):
        return bare(family, **({"depth": 3} if family == "vit" else {}), **options).eval()
    if family == "vlm":
        return tiny()
    name, sizes = registry.family("decoder").tiny  # type: ignore[misc]
    return zoo.load(name, pretrained=False, seed=0, **{**sizes, **options}).eval()


def batch(family: str, model: zoo.Model) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return (images(),) if family in ("vit", "swin") else model.example_batch(2)


def block_of(model: zoo.Model, name: str) -> Any:
    return next(p.module for p in model.points if p.name == name)


@each
@torch.no_grad()
def test_folder_and_parent(family: str, tmp_path: Path) -> None:
    """The parent stays; the child is a backbone of its own, which a folder brings back to the bit."""
    model = model_of(family)
    inputs = batch(family, model)
    before = model(*inputs)
    small = zoo.substitute(model, ALL[family])
    assert torch.equal(model(*inputs), before) and not torch.allclose(small(*inputs), before, atol=1e-3)
    assert small.num_parameters() < model.num_parameters() and small.num_classes == model.num_classes
    assert small.backbone_name.startswith(f"{model.backbone_name}~") and small.fingerprint != model.fingerprint
    zoo.save_backbone(small, tmp_path / "small")
    again = zoo.load(tmp_path / "small")
    assert again.backbone_name == small.backbone_name
    assert torch.equal(again.features(*inputs), small.features(*inputs))
    gone = {p.name for p in model.points} - {p.name for p in small.points}
    for name, form in ALL[family].items():
        assert (name in gone) == (form == "none") and (f"{name}.q" in gone or f"{name}.up" in gone) == isinstance(
            form, str
        )


@each
def test_adapters_on_children(family: str, tmp_path: Path) -> None:
    """LoRA on what is left of the projections: no dead parameter, trains, merges, loads on that backbone alone."""
    small = zoo.substitute(model_of(family), ALL[family])
    inputs = batch(family, small)
    small.add_adapter(zoo.adapter("lora", targets="all-linear", rank=2))
    assert small.train().probe(*inputs) == []
    small.eval()
    for parameter in small.parameters_to_train().values():
        nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        logits = small(*inputs)
        torch.testing.assert_close(small.family.run(small.merge(), *inputs), logits, rtol=1e-4, atol=1e-4)
    zoo.save_backbone(small, tmp_path / "network")
    small.save_adapter(tmp_path / "adapter")
    assert torch.equal(zoo.load(tmp_path / "network", tmp_path / "adapter").eval()(*inputs), logits)
    with pytest.raises(ZooError):
        model = model_of(family)
        zoo.disk.attach(model, zoo.disk.read(tmp_path / "adapter"))


@functools.cache
def changed_once(family: str) -> zoo.Model:
    return zoo.substitute(model_of(family), ALL[family])


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_or_a_reason(method: str, family: str) -> None:
    small = copy.deepcopy(changed_once(family))
    try:
        attach(small, method)
    except ZooError as error:
        assert len(str(error)) > 40 and not small.adapters
        return
    assert small.train().probe(images()) == []


@torch.no_grad()
def test_linear_and_none_by_hand() -> None:
    """ "linear" is W_o W_v and W_2 W_1 on the normed tokens; "none" leaves the residual stream."""
    model = model_of("vit")
    block, x = block_of(model, "blocks.1"), torch.randn(2, 5, 48)
    normed = block.norm1(x)
    value = normed @ block.attn.qkv.weight[96:].T + block.attn.qkv.bias[96:]
    attended = x + value @ block.attn.proj.weight.T + block.attn.proj.bias
    found = child_of(model, "blocks.1.attn", "linear")(x)
    torch.testing.assert_close(found, attended + block.mlp(block.norm2(attended)), rtol=1e-5, atol=1e-5)
    after = x + block.attn(normed)
    hidden = block.norm2(after)
    whole = after + (hidden @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(child_of(model, "blocks.1.mlp", "linear")(x), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(child_of(model, "blocks.1.mlp", "none")(x), after)
    small = zoo.substitute(model, {f"blocks.{i}.{role}": "none" for i in range(3) for role in ("attn", "mlp")})
    front = model.backbone.norm_pre(model.backbone._pos_embed(model.backbone.patch_embed(images())))  # type: ignore[operator,union-attr]
    torch.testing.assert_close(small.family.outputs(images(), want=("tokens",))["tokens"], model.backbone.norm(front))  # type: ignore[operator]


@torch.no_grad()
def test_linear_of_language_models() -> None:
    """Each value once for each query that reads it, from the second word's own place; the gate is left out."""
    model = model_of("decoder")
    block, x = block_of(model, "blocks.1"), torch.randn(2, 5, 32)
    attention, mlp = block.self_attn, block.mlp
    value = attention.v_proj(x).unflatten(-1, (2, 8)).repeat_interleave(2, dim=-2).flatten(-2)
    child = block_of(zoo.substitute(model, {"blocks.1.attn": "linear", "blocks.1.mlp": "linear"}), "blocks.1")
    torch.testing.assert_close(child.self_attn(x)[0], attention.o_proj(value), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(child.mlp(x), mlp.down_proj(mlp.up_proj(x)), rtol=1e-5, atol=1e-5)
    # alone in its text, a word attends to itself: attention is linear there
    ids = torch.randint(5, 60, (3, 1))
    linear = zoo.substitute(model, {"blocks.0.attn": "linear", "blocks.1.attn": "linear"})
    torch.testing.assert_close(linear(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "swin"])
@torch.no_grad()
def test_fewer_heads_and_neurons_are_those_of_prune(family: str) -> None:
    model = model_of(family)
    block = "blocks.1" if family == "vit" else "stages.1.blocks.1"
    heads, neurons = [2, 0] if family == "vit" else [3, 0], [7, 1, 3]
    small = zoo.substitute(
        model, {f"{block}.attn": 2, f"{block}.mlp": 3}, order={f"{block}.attn": heads, f"{block}.mlp": neurons}
    )
    width = block_of(model, block).mlp.fc1.out_features
    count = block_of(model, block).attn.num_heads
    gone = [i for i in range(count) if i not in heads]
    same = zoo.prune(model, heads={block: gone}, neurons={block: [i for i in range(width) if i not in neurons]})
    assert torch.equal(small(images()), same(images()))


@torch.no_grad()
def test_keys_and_values_that_are_alike_merge_exactly() -> None:
    model = model_of("decoder", num_key_value_heads=4)
    attention = block_of(model, "blocks.1").self_attn
    for part in (attention.k_proj, attention.v_proj):
        for tensor in (part.weight, part.bias):
            tensor.copy_(tensor.unflatten(0, (2, 2, 8))[:, :1].expand(2, 2, 8, *tensor.shape[1:]).flatten(0, 2))
    small = zoo.substitute(model, {"blocks.1.attn": 2})
    child = block_of(small, "blocks.1").self_attn
    assert (child.k_proj.out_features, child.num_key_value_groups) == (16, 2)
    inputs = batch("decoder", model)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    mean = zoo.substitute(model, {"blocks.0.attn": 1})
    torch.testing.assert_close(
        block_of(mean, "blocks.0").self_attn.k_proj.weight,
        block_of(model, "blocks.0").self_attn.k_proj.weight.unflatten(0, (4, 8)).mean(0),
    )


@pytest.mark.parametrize("form", ["none", "linear", 1])
@torch.no_grad()
def test_writing_with_a_cache_is_writing_without(form: Any) -> None:
    """Also where the block by which the library counts words has no attention, in rows of other lengths and with beams."""
    small = zoo.substitute(model_of("decoder"), {"blocks.0.attn": form})
    ids, mask = torch.randint(5, 60, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    network: Any = small.backbone
    for beams in (1, 2):
        common = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
        with_cache = network.generate(ids, attention_mask=mask, use_cache=True, **common)
        assert torch.equal(with_cache, network.generate(ids, attention_mask=mask, use_cache=False, **common))
    cache = network(ids, attention_mask=mask, use_cache=True)["cache"].layers
    assert (
        cache[0].keys.shape[1:] == ((1, 6, 1) if isinstance(form, str) else (1, 6, 8)) and cache[1].keys.shape[1] == 2
    )


@pytest.mark.parametrize("name", list(TINY))
@torch.no_grad()
def test_language_networks_of_all_models_with_eyes(name: str) -> None:
    model = tiny(name)
    forms = {
        "text.blocks.0.attn": "none",
        "text.blocks.0.mlp": 20,
        "text.blocks.1.attn": 1,
        "text.blocks.1.mlp": "linear",
    }
    small = zoo.substitute(model, forms)
    inputs = model.example_batch(2)
    assert small(*inputs).shape == model(*inputs).shape and not torch.allclose(
        small(*inputs), model(*inputs), atol=1e-3
    )


def test_changed_language_models_have_their_words() -> None:
    """Those of the weights that they come of, and those that were set."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = zoo.load(
        "vlm-micro", pretrained=False, seed=0, text_config=sizes, vision_config={"depth": 1, "hidden_size": 32}
    )
    small = zoo.substitute(model, {"text.blocks.0.mlp": "linear"})
    assert small.family.writer().name == small.backbone_name  # type: ignore[attr-defined]
    model.family.tokenizer = words = object()  # type: ignore[attr-defined]
    assert zoo.substitute(model, {"text.blocks.0.mlp": "linear"}).family.tokenizer is words  # type: ignore[attr-defined]


def test_trained_weights_become_the_backbone() -> None:
    """`baked`: what full tuning moved is the network's own, its head too; weights of a child go where they belong."""
    small = zoo.substitute(model_of("vit"), ALL["vit"])
    small.add_adapter("full")
    for parameter in small.parameters_to_train().values():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    made = baked(small)
    assert not made.adapters and made.recipe == small.recipe  # type: ignore[attr-defined]
    assert made.fingerprint != zoo.substitute(model_of("vit"), ALL["vit"]).fingerprint
    torch.testing.assert_close(made.eval()(images()), small.eval()(images()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="not a changed backbone"):
        baked(model_of("vit"))
    makes = type(made.family).children()
    own = own_tensors(block_of(made, "blocks.1"), makes, "attn")
    assert sorted(own) == ["attn.proj.bias", "attn.proj.weight", "norm1.bias", "norm1.weight"]
    taken = zoo.substitute(model_of("vit"), {"blocks.1.attn": "linear"}, weights={"blocks.1.attn": own})
    assert torch.equal(block_of(taken, "blocks.1").attn.proj.weight, own["attn.proj.weight"])
    with pytest.raises(MismatchError, match=r"blocks\.1\.attn"):
        zoo.substitute(model_of("vit"), {"blocks.1.attn": 2}, weights={"blocks.1.attn": own})


@pytest.mark.parametrize(
    ("children", "match"),
    [
        ({}, "nothing to put"),
        ({"blocks.7.attn": "none"}, r"no sublayer 'blocks\.7\.attn'"),
        ({"blocks.0.attn": "nothing"}, "no form"),
        ({"blocks.0.attn": True}, "no form"),
        ({"blocks.0.attn": 4}, "1 to 3"),
        ({"blocks.0.mlp": 0}, "1 to 192"),
    ],
)
def test_what_is_refused(children: Any, match: str) -> None:
    model = model_of("vit")
    with pytest.raises((ConfigError, SelectionError), match=match):
        zoo.substitute(model, children)


def test_models_that_have_no_children(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        zoo.substitute(model_of("decoder", num_attention_heads=6, num_key_value_heads=3), {"blocks.0.attn": 2})
    for name in ("timm:eva02_tiny_patch14_224", "swinv2-t"):
        with pytest.raises(ConfigError, match="not described for the family"):
            zoo.substitute(zoo.load(name, num_classes=0, device="meta"), {"blocks.0.attn": "none"})
    with pytest.raises(ConfigError, match="is built of"):
        places(zoo.load("timm:vit_small_patch16_18x2_224", num_classes=0, device="meta"))
    model = model_of("vit")
    model.add_adapter("lora")
    with pytest.raises(ConfigError, match="Merge them first"):
        zoo.substitute(model, {"blocks.0.attn": "none"})
    small = zoo.substitute(model_of("vit"), {"blocks.0.attn": "linear"})
    with pytest.raises(ConfigError, match="child without heads"):
        zoo.substitute(small, {"blocks.0.attn": 1})
    with pytest.raises(ConfigError, match="plain projections"):
        zoo.substitute(zoo.quantise(model_of("decoder")), {"blocks.0.attn": "linear"})
    zoo.save_backbone(small, tmp_path)
    recipe = json.loads((tmp_path / "backbone.json").read_text())
    for wrong in (
        {"blocks.9.attn": "none"},
        {"blocks.0.attn": "most"},
        {"blocks.0.other": "none"},
        {"blocks.0.attn": [1]},
    ):
        recipe["edits"] = [{"children": wrong}]
        (tmp_path / "backbone.json").write_text(json.dumps(recipe))
        with pytest.raises(ZooError):
            zoo.load(tmp_path)


def test_changes_add_up(tmp_path: Path) -> None:
    """Children of what was pruned; and what has children made sparse, or int8, and saved."""
    model = zoo.prune(model_of("vit"), heads={"blocks.2": [1]})
    small = zoo.quantise(zoo.substitute(model, {"blocks.2.attn": 1, "blocks.1.attn": "linear"}))
    zoo.save_backbone(small, tmp_path)
    assert torch.equal(zoo.load(tmp_path).features(images()), small.features(images()))
