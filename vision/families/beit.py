"""Every timm `Beit`: BEiT and BEiT v2.

Pre-norm blocks `u = x + DP(gamma_1 Attn(LN1 x))`, `y = u + DP(gamma_2 MLP(LN2 u))`, tokens (B, N, d) as [class | patches]. Scores
have a bias by relative position, of each block or of all; prefixes and prompts have none (`zoo.families.timm_attention`). q and v
have biases beside the projection (`zoo.families.timm_biases`).
"""

from __future__ import annotations

from timm.models.beit import Beit as TimmBeit

from vision.families.parts.flat_vit import FlatViT
from zoo.registry import register_backbone


@register_backbone
class Beit(FlatViT):
    """timm's Beit."""

    family = "beit"
    timm_class = TimmBeit
    timm_modules = ("beit",)
    aliases = {
        "beit-b16": "timm:beit_base_patch16_224.in22k_ft_in22k_in1k",
        "beit-l16": "timm:beit_large_patch16_224.in22k_ft_in22k_in1k",
        "beitv2-b16": "timm:beitv2_base_patch16_224.in1k_ft_in22k_in1k",
        "beitv2-l16": "timm:beitv2_large_patch16_224.in1k_ft_in22k_in1k",
    }
    tiny = (
        "beit-b16",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 1.0},
    )
