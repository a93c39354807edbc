"""Every timm `VisionTransformer`: ViT, DeiT, DeiT-3, DINOv2 (with registers), MAE, AIMv2, the image towers of CLIP and SigLIP,
ViTs on a convolutional stem (hybrid, ViTamin).

Pre-norm blocks `u = x + DP(LS(Attn(LN1 x)))`, `y = u + DP(LS(MLP(LN2 u)))`, tokens (B, N, d) as [prefix | patches]; other kinds
of blocks stand in `vision.families.parts.vit_blocks`. Of a convolutional stem the
norms and the last projection are points.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision.families.parts import vit_blocks
from vision.families.parts.sequence import SequenceBackbone
from vision.heads.distilled import DistilledHead
from zoo.families.children import mixes
from zoo.families.timm_parts import pool_points, stem_norms
from zoo.points import Layout, NormPoint, Point
from zoo.points.rows import find, make_linear
from zoo.registry import register_backbone


@register_backbone
class ViT(SequenceBackbone):
    """timm's VisionTransformer."""

    family = "vit"
    timm_class = VisionTransformer
    timm_blocks = tuple(vit_blocks.KINDS)
    timm_modules = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")
    members = {
        "vit-micro": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 100}
    }
    aliases = {
        "vit-micro": "zoo:vit-micro",
        "vit-ti16": "timm:vit_tiny_patch16_224",
        "vit-s16": "timm:vit_small_patch16_224",
        "vit-b16": "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "vit-b16-in21k": "timm:vit_base_patch16_224.augreg_in21k",
        "vit-b32": "timm:vit_base_patch32_224",
        "vit-l16": "timm:vit_large_patch16_224",
        "vit-h14": "timm:vit_huge_patch14_224",
        "deit-s16": "timm:deit_small_patch16_224",
        "deit-b16": "timm:deit_base_patch16_224",
        "deit3-b16": "timm:deit3_base_patch16_224",
        "dinov2-s14": "timm:vit_small_patch14_dinov2.lvd142m",
        "dinov2-b14": "timm:vit_base_patch14_dinov2.lvd142m",
        "dinov2-b14-reg": "timm:vit_base_patch14_reg4_dinov2.lvd142m",
        "mae-b16": "timm:vit_base_patch16_224.mae",
    }
    block_table = vit_blocks.PRE_NORM
    elementwise = ("mlp.act", "mlp_act", "ffns.0.mlp.act", "ffns.1.mlp.act")
    plain_blocks = True
    tiny = ("vit-micro", {"embed_dim": 48, "depth": 2, "num_heads": 3})

    def take_head(self) -> nn.Module | None:
        """Take timm's classifier off, or both of a distilled network."""
        own = self.module.get_classifier()  # type: ignore[operator]
        if not (isinstance(own, tuple) and all(isinstance(each, nn.Linear) for each in own)):
            return super().take_head()
        head, dist = own
        both = DistilledHead(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
        both.head, both.head_dist = head, dist
        self.module.reset_classifier(0)  # type: ignore[operator]
        return both

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` the classifier of a merged module: a linear one on the pooled features, or that of two tokens."""
        if not isinstance(head, DistilledHead):
            return super().put_head(module, head)
        module.reset_classifier(head.out_features)  # type: ignore[operator]
        for own, trained in zip(module.get_classifier(), (head.head, head.head_dist)):  # type: ignore[operator]
            own.load_state_dict(trained.state_dict())
            own.to(device=trained.weight.device, dtype=trained.weight.dtype)
        return None

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """`x + DP(LS(Attn(LN1 x)))`, or `x + DP(LS(MLP(LN2 x)))`; other kinds of blocks as `vit_blocks` says."""
        return vit_blocks.half(
            block, role, x, **({"attn_mask": attn_mask, "is_causal": is_causal} if role == "attn" else {})
        )

    @classmethod
    def surgery(cls) -> Any:
        """Heads, neurons and blocks of timm's plain attention and MLP can be taken out."""
        from vision.families.parts import cutting

        return cutting

    @classmethod
    def children(cls) -> Any:
        """Fewer heads or neurons, one projection, nothing."""
        from vision.families.parts.children import TimmChildren

        return TimmChildren()

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, and of the final norms."""
        module, dim = self.module, int(self.module.embed_dim)  # type: ignore[arg-type]
        found: list[Point] = []
        projection = find(module, "patch_embed.proj")
        if projection is not None:
            common = {"name": "patch_embed", "role": "patch", "path": "patch_embed.proj", "module": projection}
            point = make_linear(projection, None, "", 0, common)
            found += [] if point is None else [point]
        found = [
            *stem_norms(self.module, "patch_embed.backbone", "patch_embed.backbone"),
            *found,
            *self._norms(("patch_embed.norm", "norm_pre"), dim),
        ]
        token = "cls_token" if getattr(module, "cls_token", None) is not None else ""
        blocks: Any = module.blocks
        first = next((i for i, block in enumerate(blocks) if mixes(getattr(block, "attn", None))), 0)
        for i, block in enumerate(blocks):
            found += vit_blocks.points_of(
                self,
                block,
                f"blocks.{i}",
                f"blocks.{i}",
                block=i,
                layout=Layout(self.num_prefix, tuple(getattr(module.patch_embed, "grid_size", None) or ())),  # type: ignore[arg-type]
                tokens={
                    "num_prefix": self.num_prefix,
                    "first": i == first,
                    "accumulates": True,
                    "parameter": token if i == first else "",
                },
            )
        found += self._norms(("norm",), dim)
        return found + pool_points(self, "attn_pool") + self._norms(("fc_norm",), dim)

    def _norms(self, paths: tuple[str, ...], dim: int) -> list[Point]:
        found: list[Point] = []
        for path in paths:
            norm = find(self.module, path)
            if norm is not None and isinstance(getattr(norm, "weight", None), torch.Tensor):
                found.append(NormPoint(name=path, role="norm", path=path, module=norm, dim_in=dim, dim_out=dim))
        return found
