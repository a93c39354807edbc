"""Small EVAs and BEiTs of every kind, and prompts, prefixes and queries on them by timm's own means. For comparison only."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

import zoo

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3-biases": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "eva02-packed": ("eva02_tiny_patch14_224", {}),
    "eva02-split": ("eva02_base_patch14_224", {}),
    "eva02-clip": ("eva02_base_patch16_clip_224", {}),
    "eva-g": ("eva_giant_patch14_224", {}),
    "eva02-e": ("eva02_enormous_patch14_clip_224", {}),
    "pe-core": ("vit_pe_core_base_patch16_224", {}),
    "rope-mixed": ("vit_base_patch16_rope_mixed_ape_224", {}),
    "rope-registers": ("vit_mediumd_patch16_rope_reg1_gap_256", {}),
    "sapiens2-grouped": ("vit_base_patch16_sapiens2", {"num_kv_heads": 1}),
    "beit": ("beit_base_patch16_224", {}),
    "beit-shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
}


def shaken(module: nn.Module, seed: int = 3) -> Any:
    """A module with other numbers everywhere: no zero bias, no layer scale of 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def library(kind: str, num_classes: int = 5) -> Any:
    """timm's own module."""
    name, options = MODELS[kind]
    torch.manual_seed(0)
    return shaken(timm.create_model(name, num_classes=num_classes, **SIZES, **options)).eval()


def wrapped(kind: str, adapter: Any = None, seed: int = 5, **options: Any) -> zoo.Model:
    """A model of ours on the numbers of `library`, the adapter's own shaken."""
    name, own = MODELS[kind]
    source = library(kind)
    model = zoo.load(f"timm:{name}", num_classes=5, pretrained=False, **SIZES, **own, **options)
    state = source.state_dict()
    model.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    model.heads["default"].load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("head.")})
    if adapter is not None:
        torch.manual_seed(seed)
        shaken(model.add_adapter(adapter), seed)
    return model.eval()


def images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def prompted(module: Any, prompts: list[Tensor], deep: bool) -> Tensor:
    """Logits with prompts as tokens of the sequence, counted as prefix tokens by timm's model and by every attention."""
    module = copy.deepcopy(module)
    x, prefix, count = images(), module.num_prefix_tokens, len(prompts[0])
    for block in module.blocks:
        block.attn.num_prefix_tokens = prefix + count
        widen_bias(block.attn, count)
    x = module.patch_embed(x)
    further: list[dict[str, Any]] = [{}] * len(module.blocks)
    if hasattr(module, "_pos_embed"):
        x, rope = module._pos_embed(x)
        x = module.norm_pre(x)
        mixed = module.rope_mixed
        further = [{"rope": None if rope is None else rope[i] if mixed else rope} for i in range(len(module.blocks))]
    else:
        x = torch.cat([module.cls_token.expand(len(x), -1, -1), x], dim=1)
        if module.rel_pos_bias is not None:
            shared = widened(module.rel_pos_bias(), count)
            further = [{"shared_rel_pos_bias": shared}] * len(module.blocks)
    for i, block in enumerate(module.blocks):
        if i == 0 or deep:
            rest = x[:, prefix:] if i == 0 else x[:, prefix + count :]
            x = torch.cat([x[:, :prefix], prompts[i].expand(len(x), -1, -1), rest], dim=1)
        x = block(x, **further[i])
    x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
    return module.forward_head(module.norm(x))


def widened(bias: Tensor, count: int) -> Tensor:
    """([1,] h, N, N) -> (1, h, N + T, N + T), zero at the prompts behind the class token."""
    bias = bias if bias.dim() == 4 else bias[None]
    places = [0, *range(1 + count, bias.shape[-1] + count)]
    wide = bias.new_zeros(*bias.shape[:2], bias.shape[-1] + count, bias.shape[-1] + count)
    rows = torch.tensor(places)
    wide[:, :, rows[:, None], rows[None, :]] = bias
    return wide


def widen_bias(attention: Any, count: int) -> None:
    if getattr(attention, "relative_position_bias_table", None) is not None:
        bias = widened(attention._get_rel_pos_bias(), count)
        attention._get_rel_pos_bias = lambda: bias


def projected(attention: Any, x: Tensor, rope: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, h, N, c) of timm's module in the open."""
    h = attention.num_heads
    if attention.qkv is not None:
        q, k, v = (x @ w.T for w in attention.qkv.weight.chunk(3))
        shift = attention.qkv.bias
        beside = attention._parameters.get("q_bias") is not None
        if beside:
            q, v = q + attention.q_bias, v + attention.v_bias
        elif shift is not None:
            q, k, v = (t + b for t, b in zip((q, k, v), shift.chunk(3)))
    else:
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    width = q.shape[-1] // h
    q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        n, turn = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        q, k = (torch.cat([t[:, :, :n], apply_rot_embed_cat(t[:, :, n:], rope, half=turn)], dim=2) for t in (q, k))
    k, v = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (k, v))
    return q, k, v


def product(attention: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(c) + bias) v, and what stands behind it, (B, N, d)."""
    y = ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = attention.norm(y) if hasattr(attention, "norm") else y
    return attention.proj(y)


def with_prefix(attention: Any, x: Tensor, keys: Tensor, values: Tensor, rope: Any = None, bias: Any = 0.0) -> Tensor:
    """The attention with keys and values (h, T, c) in front of its own."""
    q, k, v = projected(attention, x, rope)
    k, v = (torch.cat([e.expand(len(x), -1, -1, -1), t], dim=2) for e, t in ((keys, k), (values, v)))
    return product(
        attention, q, k, v, nn.functional.pad(bias, (keys.shape[1], 0)) if isinstance(bias, Tensor) else bias
    )


def asked(block: Any, queries: Tensor, x: Tensor, rope: Any = None) -> Tensor:
    """What becomes of queries (T, d) in a block whose tokens are x: they ask, and nobody asks them."""
    post = not hasattr(block, "gamma_1")
    tokens = queries.expand(len(x), -1, -1)
    q = projected(block.attn, tokens if post else block.norm1(tokens))[0]
    _, k, v = projected(block.attn, x if post else block.norm1(x), rope)
    y = product(block.attn, q, k, v)
    if post:
        tokens = tokens + block.norm1(y)
        return tokens + block.norm2(block.mlp(tokens))
    one = 1 if block.gamma_1 is None else block.gamma_1
    two = 1 if block.gamma_2 is None else block.gamma_2
    tokens = tokens + one * y
    return tokens + two * block.mlp(block.norm2(tokens))
