"""Swin V2: equal to timm, prompts, prefixes, queries and adapters against its block written out by hand, counts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from flat_models import shaken
from timm.models.swin_transformer_v2 import window_partition, window_reverse
from torch import Tensor, nn

import zoo
from zoo.errors import CombinationError, MergeError

NAME = "swinv2_tiny_window8_256"
SIZES: dict[str, Any] = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "drop_path_rate": 0.0,
}
TARGETS = torch.tensor([0, 3, 1])


def library() -> Any:
    torch.manual_seed(0)
    return shaken(timm.create_model(NAME, num_classes=5, **SIZES)).eval()


def wrapped(adapter: Any = None, **options: Any) -> zoo.Model:
    model = zoo.load(f"timm:{NAME}", num_classes=5, pretrained=False, **SIZES, **options)
    state = library().state_dict()
    model.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.fc.")})
    model.heads["default"].load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("head.fc.")})
    if adapter is not None:
        torch.manual_seed(5)
        shaken(model.add_adapter(adapter), 5)
    return model.eval()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- the block by hand ------------------------------------------------------------------------------------------------


def projected(attention: Any, tokens: Tensor) -> list[Tensor]:
    """q and k of length 1, and v, each (R, h, N, c)."""
    q, k, v = (tokens @ w.T for w in attention.qkv.weight.chunk(3))
    own = attention._parameters
    q, v = q + own["q_bias"], v + own["v_bias"]
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return [q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v]


def windows_of(block: Any, x: Tensor) -> Tensor:
    """x (B, H, W, d) -> (B * W, M * M, d), shifted."""
    shifted = x.roll([-s for s in block.shift_size], dims=(1, 2))
    return window_partition(shifted, block.window_size).flatten(1, 2)


def read(block: Any, x: Tensor, p: Tensor | None = None, extra: tuple[Tensor, Tensor] | None = None) -> Any:
    """What tokens of the map x and prompts p (B, T, d) read, the prompts' averaged over windows; extra: K, V (h, T, c)."""
    attention, (batch, height, width, _) = block.attn, x.shape
    windows = windows_of(block, x)
    count = 0 if p is None else p.shape[1]
    if p is not None:
        windows = torch.cat([p.repeat_interleave(len(windows) // batch, dim=0), windows], dim=1)
    q, k, v = projected(attention, windows)
    table = 16 * attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads).sigmoid()
    index = attention.relative_position_index
    bias = table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)[None]
    mask = block.attn_mask
    if mask is not None:
        bias = bias + mask.repeat(batch, 1, 1)[:, None]
    bias = F.pad(bias, (count, 0, count, 0))
    if extra is not None:
        keys = extra[0] / extra[0].norm(dim=-1, keepdim=True)
        k, v = (torch.cat([e.expand(len(t), -1, -1, -1), t], dim=2) for e, t in ((keys, k), (extra[1], v)))
        bias = F.pad(bias, (keys.shape[1], 0))
    scores = q @ k.transpose(-1, -2) * attention.logit_scale.clamp(max=torch.log(torch.tensor(100.0))).exp() + bias
    out = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    told = window_reverse(out[:, count:].unflatten(1, block.window_size), block.window_size, (height, width))
    told = told.roll(block.shift_size, dims=(1, 2))
    return told, out[:, :count].unflatten(0, (batch, -1)).mean(dim=1)


def through(block: Any, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    both = []
    for tokens, told in zip((x, p), read(block, x, p)):
        tokens = tokens + block.norm1(told)
        both.append(tokens + block.norm2(block.mlp(tokens)))
    return both[0], both[1]


def prompted(swin: Any, prompts: list[Tensor], deep: bool, pool: str) -> Tensor:
    x = swin.patch_embed(images())
    p, number = prompts[0].expand(len(x), -1, -1), 0
    for stage in swin.layers:
        if not isinstance(stage.downsample, nn.Identity):
            x, p = stage.downsample(x), stage.downsample.norm(stage.downsample.reduction(torch.cat([p] * 4, dim=-1)))
        for block in stage.blocks:
            p = prompts[number].expand(len(x), -1, -1) if deep else p
            x, p = through(block, x, p)
            number += 1
    tokens = x.flatten(1, 2) if pool == "patches" else torch.cat([p, x.flatten(1, 2)], dim=1)
    return swin.head.fc(swin.norm(tokens).mean(dim=1))


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_library_to_the_bit(dtype: torch.dtype) -> None:
    source, model = library().to(dtype), wrapped().to(dtype)
    assert list(model.backbone.state_dict()) == [k for k in source.state_dict() if not k.startswith("head.fc.")]
    with torch.no_grad():
        assert torch.equal(
            model.backbone.forward_features(images().to(dtype)), source.forward_features(images().to(dtype))
        )
        plain = model.merge()
        assert {type(b.attn).__module__ for s in plain.layers for b in s.blocks} == {"timm.models.swin_transformer_v2"}
        assert torch.equal(plain(images().to(dtype)), source(images().to(dtype)))


@pytest.mark.parametrize(
    "method", ["lora", "bitfit", "norm", "ia3", "full", "ssf", "vpt", "prefix", "vqt", "adapter", "spt"]
)
def test_alive_and_merged(method: str) -> None:
    settings: dict[str, Any] = {
        "lora": {"targets": "all-linear"},
        "spt": {"budget": 0.01, "drop_path": 0.0, "dropout": 0.0},
    }
    model = wrapped(zoo.adapter(method, **settings.get(method, {}))).train()
    adapter = model.adapters[method]
    if adapter.needs_calibration:
        adapter.calibrate(model, [(images(), TARGETS)])
        shaken(adapter)
    assert model.probe(images()) == []
    F.cross_entropy(model(images()), TARGETS).backward()
    assert [k for k, p in model.parameters_to_train().items() if p.grad is None or not p.grad.any()] == []
    if adapter.merges and method != "ssf" and method != "adapter":
        with torch.no_grad():
            torch.testing.assert_close(model.eval().merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_ssf_on_keys_that_are_compared_by_cosine_is_refused_when_merging() -> None:
    with pytest.raises(MergeError, match=r"attn\.k' has no bias to merge into"):
        wrapped("ssf").merge()


@pytest.mark.parametrize("pool", ["patches", "all"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts(deep: bool, pool: str) -> None:
    model = wrapped(zoo.adapter("vpt", num_tokens=3, deep=deep, pool=pool))
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    ours, expected = model(images()), prompted(library(), prompts, deep, pool)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    found, wanted = (torch.autograd.grad(F.cross_entropy(y, TARGETS), prompts) for y in (ours, expected))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def entered(model: zoo.Model, stage: int, number: int) -> tuple[Any, Tensor, Tensor]:
    """The library's block of this place, and input and output of ours."""
    seen: list[Any] = []
    handle = model.backbone.layers[stage].blocks[number].register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    model.backbone.forward_features(images())
    handle.remove()
    return library().layers[stage].blocks[number], *seen[0]


@pytest.mark.parametrize("number", [0, 1])  # the second one moves its windows
def test_prefixes(number: int) -> None:
    model = wrapped(zoo.adapter("prefix", num_tokens=3))
    block, x, y = entered(model, 0, number)
    keys, values = model.adapters["prefix"].module_at(f"stages.0.blocks.{number}.attn.product")(1)
    tokens = x + block.norm1(read(block, x, extra=(keys[0], values[0]))[0])
    torch.testing.assert_close(y, tokens + block.norm2(block.mlp(tokens)), rtol=1e-4, atol=1e-5)


def test_queries() -> None:
    model = wrapped(zoo.adapter("vqt", num_tokens=2, dropout=0.0))
    received: list[Tensor] = []
    queries = list(model.adapters["vqt"].queries())  # type: ignore[operator]
    for each in queries:
        each.receive = received.append
    with torch.no_grad():
        assert torch.equal(model.backbone.forward_features(images()), library().forward_features(images()))
        received.clear()
        block, x, _ = entered(model, 0, 1)
        q = projected(block.attn, queries[1](1))[0]
        _, k, v = projected(block.attn, windows_of(block, x))
        scores = q @ k.transpose(-1, -2) * block.attn.logit_scale.exp()
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(0, (3, -1)).mean(dim=1)
        tokens = queries[1](1) + block.norm1(block.attn.proj(out))
        torch.testing.assert_close(received[1], tokens + block.norm2(block.mlp(tokens)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["adaptformer", "parallel", "pfeiffer", "houlsby"])
def test_adapters_beside_and_behind_the_branches(form: str) -> None:
    """In front of the norm that stands behind the branch; beside it they read the block's map, not windows."""
    targets = {"targets": ("attn", "mlp")} if form == "parallel" else {}
    model = wrapped(zoo.adapter("adapter", form=form, rank=4, dropout=0.0, **targets))
    block, x, y = entered(model, 0, 1)
    parts = {k: m for k, m in model.adapters["adapter"].named_modules() if type(m).__name__ == "Bottleneck"}
    attn, mlp = (parts.get(f"stages.0.blocks.1.{name}") for name in ("attn", "mlp"))
    assert (attn is None) == (form in ("adaptformer", "pfeiffer")) and mlp is not None
    told = read(block, x)[0]
    if attn is not None:
        told = told + attn(x) if form == "parallel" else attn(told)
    tokens = x + block.norm1(told)
    said = block.mlp(tokens)
    said = mlp(said) if form in ("pfeiffer", "houlsby") else said + mlp(tokens)
    torch.testing.assert_close(y, tokens + block.norm2(said), rtol=1e-4, atol=1e-5)


def test_prompts_that_flow_and_adapters_beside_the_attention_exclude_each_other() -> None:
    """What stands beside the attention reads the block's map, in which there are no prompts."""
    model = wrapped(zoo.adapter("vpt", num_tokens=3, deep=False))
    with pytest.raises(CombinationError, match="parallel"):
        model.add_adapter(zoo.adapter("adapter", form="parallel", targets="attn", rank=4))
    model.add_adapter(zoo.adapter("adapter", form="adaptformer", rank=4))  # beside the MLP there are
    assert model.probe(images()) == []


def test_points_and_counts() -> None:
    model = zoo.load("swinv2-t", num_classes=0, device="meta")
    library = timm.create_model("swinv2_tiny_window16_256", num_classes=0, device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == sum(p.numel() for p in library.parameters())
    assert set(model.points.kinds) == {"linear", "sublayer", "attention", "tokens", "norm", "block"}
    norms = {id(m) for m in model.backbone.modules() if isinstance(m, nn.LayerNorm)}
    assert {id(p.module) for p in model.points.select(kind="norm")} == norms
    model.add_adapter("bitfit")
    biases = {k: p.numel() for k, p in library.named_parameters() if k.endswith("bias") and "cpb_mlp" not in k}
    assert model.num_parameters(trainable=True) == sum(biases.values())
    model.remove_adapter("bitfit")
    model.add_adapter(zoo.adapter("lora", rank=8))
    dims = [(96, 2), (192, 2), (384, 6), (768, 2)]
    assert model.num_parameters(trainable=True) == sum(8 * 2 * (d + d) * depth for d, depth in dims)
