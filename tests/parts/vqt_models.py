"""Small models for the tests of VQT, and its form in the paper, written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import Tensor

import zoo

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "pretrained": False, "num_classes": 5}
SWIN: dict[str, Any] = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "pretrained": False,
    "num_classes": 5,
}
SWIN_NAME = "timm:swin_tiny_patch4_window7_224"
TARGETS = torch.tensor([1, 3, 0])


def make(name: str = "vit-micro", adapter: Any = None, seed: int = 0, **options: Any) -> zoo.Model:
    torch.manual_seed(seed)
    adapter = zoo.adapter("vqt", dropout=0.0) if adapter is None else adapter
    return zoo.load(name, adapter, **{**(SWIN if "swin" in name else VIT), **options})


def images(model: zoo.Model, count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(seed))


def named(model: zoo.Model) -> dict[str, Tensor]:
    return dict(model.parameters_to_train())


def gradients(model: zoo.Model, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(x)
    parameters = named(model)
    found = torch.autograd.grad(F.cross_entropy(logits, TARGETS[: len(x)]), list(parameters.values()))
    return logits, dict(zip(parameters, found))


def kept(model: zoo.Model) -> Iterator[Any]:
    """What a forward pass must not leave behind."""
    for queries in model.adapters["vqt"].queries():  # type: ignore[operator]
        yield from (queries.caught, queries.answers)


# -- the form of the paper, written out: queries in front of the sequence, keys and values of the tokens behind them --------


def attend(attention: Any, x: Tensor, count: int, mask: Tensor | float = 0.0) -> Tensor:
    """x (B, T + N, d), queries in front -> (B, T + N, d); nobody sees the queries."""
    batch, length, _ = x.shape
    q, k, v = attention.qkv(x).view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k[:, :, count:].transpose(-1, -2) * attention.scale + mask
    out = (scores.softmax(-1) @ v[:, :, count:]).transpose(1, 2).reshape(batch, length, -1)
    if hasattr(attention, "gate") and attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj(attention.norm(out) if hasattr(attention, "norm") else out)


def vit_by_hand(vit: Any, queries: list[Any], x: Tensor) -> Tensor:
    hidden = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    answers = []
    for block, tokens in zip(vit.blocks, queries):
        count = len(tokens)
        both = torch.cat([tokens.expand(len(x), -1, -1), hidden], dim=1)
        both = both + block.ls1(attend(block.attn, block.norm1(both), count))
        both = both + block.ls2(block.mlp(block.norm2(both)))
        answers.append(both[:, :count])
        hidden = both[:, count:]
    return joined(vit.norm(hidden)[:, 0], answers)


def swin_by_hand(swin: Any, queries: list[Any], x: Tensor) -> Tensor:
    hidden, answers = swin.patch_embed(x), []
    blocks = iter(queries)
    for layer in swin.layers:
        hidden = layer.downsample(hidden)
        for block in layer.blocks:
            tokens = next(blocks)
            count, normed = len(tokens), block.norm1(hidden)
            shifted = torch.roll(normed, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
            windows = window_partition(shifted, block.window_size).flatten(1, 2)
            mine = block.norm1(tokens).expand(len(windows), -1, -1)
            read = attend(block.attn, torch.cat([mine, windows], dim=1), count)[:, :count]
            z = tokens + read.unflatten(0, (len(x), -1)).mean(1)
            answers.append(z + block.mlp(block.norm2(z)))
            hidden = block(hidden)
    return joined(swin.norm(hidden).mean((1, 2)), answers)


def joined(pooled: Tensor, answers: list[Tensor]) -> Tensor:
    unit = [t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True) for t in [pooled, *answers]]
    return torch.cat(unit, dim=1)


def by_hand(model: zoo.Model, x: Tensor) -> Tensor:
    """Logits of the plain modules, without any hook."""
    run = swin_by_hand if "swin" in model.backbone_name else vit_by_hand
    head, tokens = model.head, [q.tokens for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    with model._bare():
        for parameter in (*tokens, *head.parameters()):
            parameter.requires_grad_(True)
        return head(run(model.backbone, tokens, x))
