"""The straightforward forms that ours are measured against: plain torch on timm's modules, as a paper's code would do it."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn


def full(name: str, **kwargs: Any) -> nn.Module:
    """timm's model, everything trainable."""
    return timm.create_model(name, **kwargs).train()


def bitfit(name: str, **kwargs: Any) -> nn.Module:
    """timm's model, biases and classifier trainable."""
    module = timm.create_model(name, **kwargs).train()
    head = {id(p) for p in module.get_classifier().parameters()}
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key.endswith("bias") or id(parameter) in head)
    return module


class DeepPrompts(nn.Module):
    """VPT-deep as published: T more tokens for each image go through every block, and what comes out of them is dropped.

    Only the prompts and the classifier are trainable. `prompts[i]` is (T, d_i).
    """

    def __init__(self, module: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.module: Any = module.requires_grad_(False).eval()
        self.module.get_classifier().requires_grad_(True)
        widths = [block.norm1.weight.shape[0] for block in self.blocks()]
        self.prompts = nn.ParameterList(nn.Parameter(torch.empty(num_tokens, d).uniform_(-0.06, 0.06)) for d in widths)

    def blocks(self) -> list[Any]:
        """All blocks, in forward order."""
        if isinstance(self.module, SwinTransformer):
            return [block for stage in self.module.layers for block in stage.blocks]
        return list(self.module.blocks)

    def train(self, mode: bool = True) -> DeepPrompts:
        """The frozen backbone stays in eval mode."""
        super().train(mode)
        self.module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes)."""
        tokens = self._swin(x) if isinstance(self.module, SwinTransformer) else self._vit(x)
        return self.module.forward_head(tokens)

    def _vit(self, x: Tensor) -> Tensor:
        module = self.module
        x = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(x))))
        front = module.num_prefix_tokens
        for block, prompt in zip(module.blocks, self.prompts):
            x = torch.cat([x[:, :front], prompt.expand(len(x), -1, -1), x[:, front:]], dim=1)
            x = block(x)
            x = torch.cat([x[:, :front], x[:, front + len(prompt) :]], dim=1)
        return module.norm(x)

    def _swin(self, x: Tensor) -> Tensor:
        module, prompts = self.module, iter(self.prompts)
        x = module.patch_embed(x)
        for stage in module.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = swin_block(block, x, next(prompts).expand(len(x), -1, -1))
        return module.norm(x)


def swin_block(block: Any, x: Tensor, p: Tensor) -> Tensor:
    """One Swin block with prompts p (B, T, d) in every window; x (B, H, W, d) -> (B, H, W, d)."""
    images, height, width, dim = x.shape
    count, (rows, columns), area = p.shape[1], block.window_size, block.window_area
    y, q = block.norm1(x), block.norm1(p)
    shift = any(block.shift_size)
    if shift:
        y = torch.roll(y, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
    windows = window_partition(y, block.window_size).view(-1, area, dim)  # (B * W, N, d), batch-major
    per_image = len(windows) // images
    seen = torch.cat([q.repeat_interleave(per_image, dim=0), windows], dim=1)
    out = window_attention(block.attn, seen, block.attn_mask, count)
    answers = out[:, :count].unflatten(0, (images, per_image)).mean(dim=1)
    y = window_reverse(out[:, count:].reshape(-1, rows, columns, dim), block.window_size, height, width)
    if shift:
        y = torch.roll(y, block.shift_size, (1, 2))
    tokens = torch.cat([p + answers, (x + y).view(images, -1, dim)], dim=1)
    tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens[:, count:].reshape(images, height, width, dim)


def window_attention(attention: Any, x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """x (B * W, T + N, d); relative position bias and shift mask are zero for the first `count` = T tokens."""
    windows, tokens, dim = x.shape
    q, k, v = attention.qkv(x).reshape(windows, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    bias = attention._get_rel_pos_bias()
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(windows // len(mask), 1, 1, 1)
    bias = F.pad(bias, (count, 0, count, 0))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(x.transpose(1, 2).reshape(windows, tokens, dim))
