"""What an image says to a language network as prompts (LLaMA-Adapter V2): queries that read the tokens of an eye.

    u = LN(W_in e + b_in)                     e (B, N, d_eye): all tokens of the eye; u (B, N, v)
    [q ; u] <- [q ; u] through `depth` pre-norm blocks of width v             q (T, v) learned queries
    V = LN(W_out q + b_out)                   (B, T, d)

Counts (v = 768, depth 8, MLP of 4 v, d_eye = 768, T = 10, d = 4096): 60,460,800.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ContextError


class VisualBlock(nn.Module):
    """x + proj(attention(norm1 x)), then x + down(gelu(up(norm2 x))): a block of a vision transformer."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, v) -> (B, N, v)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisualPrompt(nn.Module):
    """Tokens of the eye (B, N, eye_dim), None of a text without an image -> prompts (B, T, d), or None."""

    def __init__(self, num_tokens: int, eye_dim: int, width: int, depth: int, heads: int, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_tokens, width))
        self.into, self.into_norm = nn.Linear(eye_dim, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(VisualBlock(width, heads, 4 * width) for _ in range(depth))
        self.out, self.out_norm = nn.Linear(width, dim), nn.LayerNorm(dim)

    def forward(self, image: Tensor | None) -> Tensor | None:
        """See the class.

        Raises:
            ContextError: tokens of another shape.
        """
        if image is None:
            return None
        wanted = self.into.in_features
        if image.dim() != 3 or image.shape[-1] != wanted:
            raise ContextError(
                f"'image' has the shape {tuple(image.shape)}; expected the tokens of an eye for each sample, (samples, tokens, "
                f"{wanted}). Another width is the adapter's setting eye_dim."
            )
        seen = self.into_norm(self.into(image.to(self.into.weight.dtype)))
        x = torch.cat([self.query.expand(len(seen), -1, -1), seen], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(self.out(x[:, : len(self.query)]))
