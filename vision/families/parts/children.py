"""Cheaper sublayers for timm's ViT and Swin: fewer heads, fewer neurons, one projection, nothing (`zoo.families.children`).

A Swin block without attention between tokens has no windows either: its child sees the map as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vision.families.parts import cutting
from zoo.families.children import Alone, Children, product

__all__ = ["TimmChildren", "WindowlessBlock"]


class WindowlessBlock(SwinTransformerBlock):
    """A block whose attention is a child that mixes no tokens: nothing is shifted, padded or cut into windows for it."""

    def _attn(self, x: Tensor) -> Tensor:
        """x (B, H, W, d), normed."""
        return self.attn(x)  # type: ignore[no-any-return]


class TimmChildren(Children):
    """Of pre-norm blocks with timm's `Attention` or `WindowAttention`, and `Mlp`."""

    blocks = ("Block", "SwinTransformerBlock", "WindowlessBlock")

    def parts(self, role: str) -> tuple[str, ...]:
        """The norm, what scales and drops the branch, the sublayer."""
        number = "1" if role == "attn" else "2"
        return (f"norm{number}", f"ls{number}", f"drop_path{number}", role)

    def whole(self, name: str, block: Any, role: str) -> int:
        """Heads, or hidden channels."""
        if role == "attn":
            return int(cutting._attention(name, block)[0].num_heads)
        return int(cutting._mlp(name, block).fc1.out_features)

    def reader(self, block: Any, role: str) -> tuple[nn.Linear, int]:
        """`proj`, with the width of a head; `fc2`."""
        if role == "mlp":
            return block.mlp.fc2, 1
        attention, width = cutting._attention("", block)
        return attention.proj, width

    def shrink(self, name: str, block: Any, role: str, kept: Sequence[int]) -> None:
        """Cut the others out."""
        gone = [i for i in range(self.whole(name, block, role)) if i not in set(kept)]
        (cutting.cut_heads if role == "attn" else cutting.cut_neurons)(name, block, gone)

    def linear(self, block: Any, role: str) -> nn.Module:
        """`W_o W_v`, `W_2 W_1`."""
        if role == "mlp":
            return Alone("fc2", *product(block.mlp.fc2, block.mlp.fc1))
        qkv, proj = block.attn.qkv, block.attn.proj
        return Alone("proj", *product(proj, qkv, slice(2 * qkv.out_features // 3, None)))

    def unmixed(self, block: Any) -> None:
        """No windows are made."""
        if type(block) is SwinTransformerBlock:
            block.__class__ = WindowlessBlock
