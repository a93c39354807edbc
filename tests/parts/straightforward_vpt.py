"""VPT as the paper draws it: prompts are tokens like all others and run through whole blocks. For comparison only.

Nothing here uses `zoo` or `vision`; the backbones are timm's plain modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StraightViT(nn.Module):
    """timm's VisionTransformer with prompts: one (T, d) for each block (deep), or a single one (shallow)."""

    def __init__(self, vit: nn.Module, prompts: Sequence[Tensor], deep: bool, pool: str = "patches") -> None:
        super().__init__()
        self.vit: Any = vit
        self.prompts = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in prompts])
        self.deep, self.pool = deep, pool

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> pooled features (B, d)."""
        vit, prefix, count = self.vit, self.vit.num_prefix_tokens, 0
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for i, block in enumerate(vit.blocks):
            if self.deep or i == 0:
                prompt = self.prompts[i].expand(len(x), -1, -1)
                x = torch.cat([x[:, :prefix], prompt, x[:, prefix + count :]], dim=1)
                count = prompt.shape[1]
            x = block(x)
        if self.pool == "patches":
            x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
        return vit.forward_head(vit.norm(x), pre_logits=True)


class StraightSwin(nn.Module):
    """timm's SwinTransformer with prompts in every window, windows of an image together."""

    def __init__(self, swin: nn.Module, prompts: Sequence[Tensor], deep: bool, pool: str = "patches") -> None:
        super().__init__()
        self.swin: Any = swin
        self.prompts = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in prompts])
        self.deep, self.pool = deep, pool

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> pooled features (B, d)."""
        x = self.swin.patch_embed(images)  # (B, H, W, d)
        p = self.prompts[0].expand(len(x), -1, -1)
        number = 0
        for stage in self.swin.layers:
            if not isinstance(stage.downsample, nn.Identity):
                merge = stage.downsample
                p = merge.reduction(merge.norm(torch.cat([p, p, p, p], dim=-1)))
                x = merge(x)
            for block in stage.blocks:
                if self.deep:
                    p = self.prompts[number].expand(len(x), -1, -1)
                p, x = self._block(block, p, x)
                number += 1
        tokens = x.flatten(1, 2)
        if self.pool == "all":
            tokens = torch.cat([p, tokens], dim=1)
        return self.swin.norm(tokens).mean(dim=1)

    def _block(self, block: Any, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, height, width, dim = x.shape
        count = p.shape[1]
        tokens = torch.cat([p, x.flatten(1, 2)], dim=1)
        normed = block.norm1(tokens)
        p_normed, x_normed = normed[:, :count], normed[:, count:].reshape(batch, height, width, dim)
        (wh, ww), (sh, sw) = block.window_size, block.shift_size
        x_normed = x_normed.roll((-sh, -sw), dims=(1, 2))
        down, right = -height % wh, -width % ww
        x_normed = F.pad(x_normed, (0, 0, 0, right, 0, down))
        rows, columns = (height + down) // wh, (width + right) // ww
        windows = x_normed.reshape(batch, rows, wh, columns, ww, dim).transpose(2, 3).reshape(-1, wh * ww, dim)
        each = p_normed.unsqueeze(1).expand(-1, rows * columns, -1, -1).reshape(-1, count, dim)
        out = self._attention(block.attn, torch.cat([each, windows], dim=1), block.attn_mask, count)
        p_out = out[:, :count].reshape(batch, rows * columns, count, dim).mean(dim=1)
        x_out = out[:, count:].reshape(batch, rows, columns, wh, ww, dim).transpose(2, 3)
        x_out = x_out.reshape(batch, rows * wh, columns * ww, dim)[:, :height, :width].roll((sh, sw), dims=(1, 2))
        tokens = tokens + block.drop_path1(torch.cat([p_out, x_out.flatten(1, 2)], dim=1))
        tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
        return tokens[:, :count], tokens[:, count:].reshape(batch, height, width, dim)

    def _attention(self, attention: Any, tokens: Tensor, mask: Tensor | None, count: int) -> Tensor:
        many, length, _ = tokens.shape
        qkv = attention.qkv(tokens).reshape(many, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        own = attention._get_rel_pos_bias()
        if mask is not None:
            own = (own + mask[:, None]).repeat(many // len(mask), 1, 1, 1)
        bias = torch.zeros(len(own), attention.num_heads, length, length, dtype=tokens.dtype)
        bias[:, :, count:, count:] = own
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias)
        return attention.proj(out.transpose(1, 2).reshape(many, length, -1))
