"""Shapes of transformers' blocks that families of several modalities have: one table each."""

from __future__ import annotations

from zoo.points.rows import Row

__all__ = ["OUTPUT_APART"]

# Attention and MLP of two modules each, as ViLT and VideoMAE have them
OUTPUT_APART: tuple[Row, ...] = (
    Row("norm", "norm", "norm1", "layernorm_before"),
    Row("linear", "q", "attn.q", "attention.attention.query"),
    Row("linear", "k", "attn.k", "attention.attention.key"),
    Row("linear", "v", "attn.v", "attention.attention.value"),
    Row("attention", "attn", "attn.product", "attention.attention"),
    Row("linear", "o", "attn.o", "attention.output.dense"),
    Row("sublayer", "attn", "attn", "attention", entry="layernorm_before", exit="attention:output"),
    Row("norm", "norm", "norm2", "layernorm_after"),
    Row("linear", "up", "mlp.up", "intermediate.dense"),
    Row("linear", "down", "mlp.down", "output.dense"),
    # The MLP is no module of its own: its second half adds the residual
    Row("sublayer", "mlp", "mlp", "", entry="layernorm_after", exit="output.dense:output"),
    Row("block", "block", "", ""),
)
