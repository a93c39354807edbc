"""Every timm `Eva`: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs, Sapiens 2.

Pre-norm blocks `u = x + DP(gamma_1 Attn(LN1 x))`, `y = u + DP(gamma_2 MLP(LN2 u))`, EVA-02-E with its norms behind the branches;
tokens (B, N, d) as [class | registers | patches]. Queries and keys of patches are turned by their places; for prefixes, prompts
and queries on this see `zoo.families.timm_attention`, for biases beside the projection `zoo.families.timm_biases`.
"""

from __future__ import annotations

from timm.models.eva import Eva as TimmEva
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from torch import nn

from vision.families.parts.flat_vit import FlatViT
from zoo.registry import register_backbone


@register_backbone
class Eva(FlatViT):
    """timm's Eva."""

    family = "eva"
    timm_class = TimmEva
    timm_blocks = (EvaBlock, EvaBlockPostNorm)
    timm_modules = ("eva",)
    aliases = {
        "dinov3-s16": "timm:vit_small_patch16_dinov3.lvd1689m",
        "dinov3-s16-plus": "timm:vit_small_plus_patch16_dinov3.lvd1689m",
        "dinov3-b16": "timm:vit_base_patch16_dinov3.lvd1689m",
        "dinov3-l16": "timm:vit_large_patch16_dinov3.lvd1689m",
        "dinov3-h16-plus": "timm:vit_huge_plus_patch16_dinov3.lvd1689m",
        "dinov3-7b16": "timm:vit_7b_patch16_dinov3.lvd1689m",
        "eva-g14": "timm:eva_giant_patch14_224.clip_ft_in1k",
        "eva02-ti14": "timm:eva02_tiny_patch14_224.mim_in22k",
        "eva02-s14": "timm:eva02_small_patch14_224.mim_in22k",
        "eva02-b14": "timm:eva02_base_patch14_224.mim_in22k",
        "eva02-l14": "timm:eva02_large_patch14_224.mim_m38m",
        "pe-core-s16": "timm:vit_pe_core_small_patch16_384.fb",
        "pe-core-b16": "timm:vit_pe_core_base_patch16_224.fb",
        "pe-core-l14": "timm:vit_pe_core_large_patch14_336.fb",
        "pe-spatial-b16": "timm:vit_pe_spatial_base_patch16_512.fb",
        "rope-vit-b16": "timm:vit_base_patch16_rope_224.naver_in1k",
    }
    tiny = (
        "timm:vit_small_patch16_dinov3_qkvb",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 3,
            "num_reg_tokens": 2,
            "init_values": 1.0,
        },
    )

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        # learned rotations differ from block to block, so no two blocks are called alike
        self.plain_blocks = not getattr(module, "rope_mixed", False)  # type: ignore[misc]
