"""transformers' DINOv2, DINOv2 with registers, and DINOv3: blocks with layer scales, tokens [class, registers | patches].

    u = x + s1 (W_o Attn(LN1 x)),  y = u + s2 MLP(LN2 u)          MLP: W_2 f(W_1 x), or gated, W_2 (f(W_g x) * W_1 x)

DINOv2 has a table of positions; its pooled features are the class token and the mean of the patches, (B, 2 d), on which the
library's classifier stands. DINOv3 turns queries and keys of patches by their place; pooled is the class token, (B, d), and the
library has no classifier for it. Adapters behind a sublayer stand behind the layer scale.

Sources: Oquab et al., TMLR 2024; Darcet et al., ICLR 2024; Siméoni et al., "DINOv3", 2025. Counts: DINOv2-B 86,580,480, DINOv3-B
85,660,416, mask tokens (which nothing reads here) included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vision.families.parts.transformers_family import IMAGENET, Places, TransformersVision
from zoo.points.rows import Row
from zoo.registry import register_backbone

SMALL = {"hidden_size": 384, "num_attention_heads": 6}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
V2: dict[str, Any] = {"image_size": 518}
V3: dict[str, Any] = {"num_register_tokens": 4}
EMBEDDINGS = "embeddings.patch_embeddings.projection"


@register_backbone
class TransformersDINO(TransformersVision):
    """`hf-dinov2-b14`, `hf-dinov3-b16` and others, or `transformers:<repository or folder>` of these types."""

    family = "hf-dinov2"
    library_classes = {
        "dinov2": ("Dinov2Config", "Dinov2ForImageClassification"),
        "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification"),
        "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    }
    configs = {
        "facebook/dinov2-small": ("dinov2", {**V2, **SMALL}),
        "facebook/dinov2-base": ("dinov2", V2),
        "facebook/dinov2-large": ("dinov2", {**V2, **LARGE}),
        "facebook/dinov2-with-registers-base": ("dinov2_with_registers", {**V2, **V3, "patch_size": 14}),
        "facebook/dinov3-vits16-pretrain-lvd1689m": ("dinov3_vit", {**V3, **SMALL, "intermediate_size": 1536}),
        "facebook/dinov3-vitb16-pretrain-lvd1689m": (
            "dinov3_vit",
            {**V3, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        ),
        "facebook/dinov3-vitl16-pretrain-lvd1689m": ("dinov3_vit", {**V3, **LARGE, "intermediate_size": 4096}),
    }
    aliases = {
        "hf-dinov2-s14": "transformers:facebook/dinov2-small",
        "hf-dinov2-b14": "transformers:facebook/dinov2-base",
        "hf-dinov2-l14": "transformers:facebook/dinov2-large",
        "hf-dinov2-b14-reg": "transformers:facebook/dinov2-with-registers-base",
        "hf-dinov3-s16": "transformers:facebook/dinov3-vits16-pretrain-lvd1689m",
        "hf-dinov3-b16": "transformers:facebook/dinov3-vitb16-pretrain-lvd1689m",
        "hf-dinov3-l16": "transformers:facebook/dinov3-vitl16-pretrain-lvd1689m",
    }
    layout = (
        "dinov2.encoder.layer.0.attention.q_proj",
        "dinov2_with_registers.encoder.layer.0.attention.q_proj",
        "model.layer.0.attention.q_proj",
    )
    unread = ("*mask_token",)
    places = {
        "dinov2": Places(
            body="dinov2",
            blocks="encoder.layer",
            patch=EMBEDDINGS,
            token="embeddings.cls_token",
            behind=(("norm", "layernorm"),),
        ),
        "dinov2_with_registers": Places(
            body="dinov2_with_registers",
            blocks="encoder.layer",
            patch=EMBEDDINGS,
            token="embeddings.cls_token",
            behind=(("norm", "layernorm"),),
        ),
        "dinov3_vit": Places(
            blocks="model.layer",
            patch="embeddings.patch_embeddings",
            token="embeddings.cls_token",
            behind=(("norm", "norm"),),
        ),
    }
    preprocessing = {
        "dinov2": {**IMAGENET, "crop_mode": "center", "crop_pct": 0.875},
        "dinov2_with_registers": {**IMAGENET, "crop_mode": "center", "crop_pct": 0.875},
        "dinov3_vit": {**IMAGENET, "crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"},
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "norm1"),
        Row("linear", "q", "attn.q", "attention.q_proj"),
        Row("linear", "k", "attn.k", "attention.k_proj"),
        Row("linear", "v", "attn.v", "attention.v_proj"),
        Row("attention", "attn", "attn.product", "attention"),
        Row("linear", "o", "attn.o", "attention.o_proj"),
        Row("sublayer", "attn", "attn", "attention", entry="norm1", exit="layer_scale1:output"),
        Row("norm", "norm", "norm2", "norm2"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "gate", "mlp.gate", "mlp.gate_proj"),
        Row("linear", "up", "mlp.up", "mlp.up_proj"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("linear", "down", "mlp.down", "mlp.down_proj"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="layer_scale2:output"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.activation_fn", "mlp.act_fn")
    tiny = (
        "hf-dinov2-b14-reg",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
        },
    )

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`x + s1 attention(LN1 x)`, or `x + s2 MLP(LN2 x)`."""
        if role == "attn":
            attended = block.attention(block.norm1(x), attention_mask=attention_mask, **kwargs)[0]
            return block.drop_path(block.layer_scale1(attended)) + x  # type: ignore[no-any-return]
        return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x  # type: ignore[no-any-return]

    @property
    def num_prefix(self) -> int:
        """The class token and the registers."""
        return 1 + int(getattr(self.config, "num_register_tokens", 0))

    @property
    def averaged(self) -> bool:
        """DINOv2's features hold the mean of the patches."""
        return self.model_type != "dinov3_vit"

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.config.hidden_size) * (2 if self.averaged else 1)

    def norm_of(self, block: Any) -> nn.Module:
        """In front of the attention."""
        return block.norm1  # type: ignore[no-any-return]

    def pool(self, output: Any) -> Tensor:
        """The class token; DINOv2: and the mean of what stands behind the prefix tokens."""
        if not self.averaged:
            return output.pooler_output  # type: ignore[no-any-return]
        tokens = output.last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix :].mean(dim=1)], dim=1)

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        if not self.pretrained or self.source not in self.configs:
            return None
        return "apache-2.0" if self.averaged else "other"
