"""What CaiT and XCiT share in timm: patches that run through blocks of their own, then a class token that asks them.

In the class blocks one query, that of the class token, reads all tokens; their MLP runs on it alone. The attention of one query
is no sublayer (it takes (B, N, d) and gives (B, 1, d)); its projections, its product and the MLP are points as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision.families.parts.timm_family import TimmBackbone
from zoo.engine.attention import AttentionSite, by_head, heads, mask_bias
from zoo.points import NormPoint, Point
from zoo.points.rows import Row, find, norm_dim

CLASS = (
    Row("norm", "norm", "norm1", "norm1"),
    Row("linear", "q", "attn.q", "attn.q"),
    Row("linear", "k", "attn.k", "attn.k"),
    Row("linear", "v", "attn.v", "attn.v"),
    Row("attention", "attn", "attn.product", "attn"),
    Row("linear", "o", "attn.o", "attn.proj"),
    Row("norm", "norm", "norm2", "norm2"),
    Row("linear", "up", "mlp.up", "mlp.fc1"),
    Row("linear", "down", "mlp.down", "mlp.fc2"),
)


@dataclass(eq=False)
class ClassSite(AttentionSite):
    """timm's `ClassAttn`, with more keys and values."""

    def extended(self, x: Tensor) -> Tensor:
        """x (B, N, d), the class token first -> (B, 1, d)."""
        attention: Any = self.module
        width = attention.proj.in_features // attention.num_heads
        q, k, v = (by_head(t, width) for t in (attention.q(x[:, 0]).unsqueeze(1), attention.k(x), attention.v(x)))
        y = self.attend(q, k, v, x.shape[0], mask_bias(None)).transpose(1, 2).flatten(2)
        return attention.proj_drop(attention.proj(y))  # type: ignore[no-any-return]


@dataclass(eq=False)
class TalkingSite(AttentionSite):
    """timm's `TalkingHeadAttn`, whose heads are mixed in front of the softmax and behind it, with more keys and values."""

    def extended(self, x: Tensor) -> Tensor:
        """x (B, N, d) -> (B, N, d)."""
        attention: Any = self.module
        q, k, v = heads(attention.qkv(x), attention.num_heads)
        y = self.attend(q, k, v, x.shape[0], mask_bias(None)).transpose(1, 2).flatten(2)
        return attention.proj_drop(attention.proj(y))  # type: ignore[no-any-return]

    def _product(
        self, q: Tensor, k: Tensor, v: Tensor, own: Tensor, images: int, bias: Any, index: Any = None
    ) -> Tensor:
        attention: Any = self.module
        scores = q * self.scale @ k.transpose(-2, -1)
        added = bias(k.shape[2] - own.shape[2], images, index)
        scores = attention.proj_l(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if added is not None:  # a mask hides keys; it is not mixed among the heads
            scores = scores.masked_fill(~added, float("-inf")) if added.dtype == torch.bool else scores + added
        weights = attention.proj_w(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return attention.attn_drop(weights) @ v  # type: ignore[no-any-return]


class ClassReader(TimmBackbone):
    """Base of both families: tokens [class | patches] come out."""

    gives = ("pooled", "tokens", "maps")

    @property
    def num_prefix(self) -> int:
        """The class token in front of the patches."""
        return 1

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Tokens behind the final norm, [class | patches]; the map is that of the patches."""
        self.check_wanted(want)
        self.check_size(*inputs)
        module: Any = self.module
        tokens = module.forward_features(*inputs, **kwargs)
        found: dict[str, Any] = {}
        if "pooled" in want:
            found["pooled"] = module.forward_head(tokens, pre_logits=True).contiguous()
        if "tokens" in want:
            found["tokens"] = tokens
        if "maps" in want:
            height, width = self.grid(*inputs[0].shape[-2:])
            patches = tokens[:, tokens.shape[1] - height * width :]
            found["maps"] = [patches.transpose(1, 2).unflatten(2, (height, width))]
        return found

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the patches of images of a size."""
        size: Any = self.module.patch_embed.patch_size  # type: ignore[union-attr]
        tall, wide = size if isinstance(size, tuple) else (size, size)
        return height // tall, width // wide

    def class_points(self, path: str, first: int, sublayer: Row) -> list[Point]:
        """Points of the class blocks, whose numbers go on behind those of the others."""
        blocks: Any = find(self.module, path)
        found: list[Point] = []
        for i, block in enumerate(blocks if blocks is not None else ()):
            attention = block.attn
            found += self.points_of_block(
                block,
                f"class_blocks.{i}",
                f"{path}.{i}",
                int(self.module.embed_dim),  # type: ignore[arg-type]
                attention.num_heads,
                table=(*CLASS, sublayer),
                block=first + i,
                attention={"head_dim": attention.proj.in_features // attention.num_heads},
            )
        return found

    def norm_point(self, name: str, path: str, **more: Any) -> list[Point]:
        """The norm at a path, if there is one."""
        norm = find(self.module, path)
        if norm is None or not norm_dim(norm):
            return []
        dim = norm_dim(norm)
        return [NormPoint(name=name, role="norm", path=path, module=norm, dim_in=dim, dim_out=dim, **more)]
