"""The Swin of PETALface (Kartik-3004/PETALface, `backbones/swin_models_iqa.py`): a face recogniser on images of 120 px.

What it has beside timm's Swin, with the names of their checkpoints where timm has none:

- an absolute position embedding (1, N, d) on the patches: `patch_embed.absolute_pos_embed`;
- shifted windows without a mask: theirs computes one and goes on without it, and the weights were trained so;
- instead of the mean of the last stage's tokens a projection of all of them, z = BN(W dropout(BN(flatten(tokens))) + b),
  (B, 512): `feature_layer.{0..3}`. The classifier stands on z.

Images of 120 px in patches of 6 are 20 x 20 tokens; widths 384, 768, 1536, depths 2, 18, 2, heads 8, 16, 16, windows of 5:
213,666,768 parameters without a classifier.
"""

from __future__ import annotations

import re
from typing import Any

from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

__all__ = ["FACE_DATA", "FACE_SWIN", "FaceSwin"]

FACE_SWIN: dict[str, Any] = {
    "img_size": 120,
    "patch_size": 6,
    "window_size": 5,
    "embed_dim": 384,
    "depths": (2, 18, 2),
    "num_heads": (8, 16, 16),
    "num_classes": 0,
    "drop_path_rate": 0.0,
}
# Weights of theirs are read from a file, and are under the terms of their repository
FACE_DATA: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "license": None}
_STAGE_END = re.compile(r"^layers\.(\d+)\.downsample")
_MADE = re.compile(r"(relative_position_index|attn_mask)$")  # buffers that are computed


class _Placed(PatchEmbed):
    """timm's patch embedding, and a learned embedding of the places: (B, 3, H, W) -> (B, H', W', d)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.proj.weight
        self.absolute_pos_embed = nn.Parameter(weight.new_zeros(1, self.num_patches, len(weight)))
        nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Patches with their places."""
        y: Tensor = super().forward(x)
        return y + self.absolute_pos_embed.view(1, *self.grid_size, -1)


class _Unmasked(SwinTransformerBlock):
    """A block whose shifted windows see all of their tokens."""

    def get_attn_mask(self, *args: Any, **kwargs: Any) -> None:
        """None: nothing is hidden."""


class FaceSwin(SwinTransformer):
    """Images (B, 3, H, W) of one size -> z (B, features), or scores of classes."""

    def __init__(self, *, features: int = 512, num_classes: int = 0, device: Any = None, **options: Any) -> None:
        super().__init__(embed_layer=_Placed, num_classes=0, device=device, **options)
        stages: Any = self.layers
        for stage in stages:
            for block in stage.blocks:
                block.__class__ = _Unmasked  # timm has no word for it; nothing else of the block differs
                block._init_buffers()
        height, width = stages[-1].blocks[-1].input_resolution
        tokens = height * width * self.num_features
        project = nn.Linear(tokens, features, device=device)
        nn.init.trunc_normal_(project.weight, std=0.02)
        nn.init.zeros_(project.bias)
        before, behind = nn.BatchNorm1d(tokens, device=device), nn.BatchNorm1d(features, device=device)
        self.feature_layer = nn.Sequential(before, nn.Dropout(0.25), project, behind)
        del self.head
        self.head_hidden_size = features
        self.classifier: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """What stands on z."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0: none. There is no pooling to choose."""
        self.num_classes = num_classes
        place: Any = self.feature_layer[2].weight
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Linear(self.head_hidden_size, num_classes, device=place.device, dtype=place.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, H', W', d) of the last stage -> z, or scores."""
        z: Tensor = self.feature_layer(x.flatten(1))
        return z if pre_logits else self.classifier(z)

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of theirs under the names here: timm merges patches at the start of the next stage."""
        if "absolute_pos_embed" not in state:
            return state
        state = {k: v for k, v in state.items() if not _MADE.search(k)}
        state["patch_embed.absolute_pos_embed"] = state.pop("absolute_pos_embed")
        return {_STAGE_END.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample", k): v for k, v in state.items()}
