"""Tables of timm's vision transformer blocks: EVA's and BEiT's, and those of plain ViTs where they stand in other networks."""

from __future__ import annotations

from zoo.points.rows import Row

__all__ = ["ATTENTION", "MLP", "POOL", "POST_NORM", "PRE_NORM"]

ATTENTION = (
    Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3), bias="q_bias"),
    Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
    Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3), bias="v_bias"),
    Row("linear", "q", "attn.q", "attn.q_proj"),
    Row("linear", "k", "attn.k", "attn.k_proj"),
    Row("linear", "v", "attn.v", "attn.v_proj"),
    Row("norm", "norm", "attn.q_norm", "attn.q_norm"),
    Row("norm", "norm", "attn.k_norm", "attn.k_norm"),
    Row("attention", "attn", "attn.product", "attn"),
    Row("norm", "norm", "attn.norm", "attn.norm"),
    Row("linear", "gate", "attn.gate", "attn.gate"),
    Row("linear", "o", "attn.o", "attn.proj"),
)
MLP = (  # `Mlp`, `GluMlp` (both halves in `up`), `SwiGLU`, ViTamin's `GeGluMlp`
    Row("linear", "gate", "mlp.gate", "mlp.fc1_g"),
    Row("linear", "up", "mlp.up", "mlp.fc1"),
    Row("linear", "up", "mlp.up", "mlp.fc1_x"),
    Row("linear", "gate", "mlp.gate", "mlp.w0"),
    Row("linear", "up", "mlp.up", "mlp.w1"),
    Row("norm", "norm", "mlp.norm", "mlp.norm"),
    Row("linear", "down", "mlp.down", "mlp.fc2"),
    Row("linear", "down", "mlp.down", "mlp.w2"),
)
PRE_NORM = (
    Row("tokens", "tokens", "tokens", ""),
    Row("norm", "norm", "norm1", "norm1"),
    *ATTENTION,
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="drop_path1"),
    Row("norm", "norm", "norm2", "norm2"),
    *MLP,
    Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="drop_path2"),
    Row("block", "block", "", ""),
)
POST_NORM = (
    Row("tokens", "tokens", "tokens", ""),
    *ATTENTION,
    Row("sublayer", "attn", "attn", "attn", entry="attn:input", exit="norm1:input"),
    Row("norm", "norm", "norm1", "norm1"),
    *MLP,
    Row("sublayer", "mlp", "mlp", "mlp", entry="mlp:input", exit="norm2:input"),
    Row("norm", "norm", "norm2", "norm2"),
    Row("block", "block", "", ""),
)
# A latent that asks all tokens, in front of the head (SigLIP, Perception Encoder): its projections have a role of their own, so
# that "all-linear" and the roles of the blocks leave them out
POOL = (
    Row("linear", "pool", "q", "q"),
    Row("linear", "pool", "k", "kv", part=(0, 2)),
    Row("linear", "pool", "v", "kv", part=(1, 2)),
    Row("norm", "norm", "q_norm", "q_norm"),
    Row("norm", "norm", "k_norm", "k_norm"),
    Row("linear", "pool", "o", "proj"),
    Row("norm", "norm", "norm", "norm"),
    Row("linear", "pool", "up", "mlp.fc1"),
    Row("norm", "norm", "mlp.norm", "mlp.norm"),
    Row("linear", "pool", "down", "mlp.fc2"),
)
