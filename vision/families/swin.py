"""Every timm `SwinTransformer`: windowed attention in stages of growing width, tokens (B, H, W, C).

Blocks as in ViT, but attention sees windows (B * nW, M * M, C), batch-major: window j of image i is row i * nW + j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vision.families.parts.face_swin import FACE_DATA, FACE_SWIN, FaceSwin
from vision.families.parts.timm_family import TimmBackbone
from zoo.families.children import mixes
from zoo.points import Layout, NormPoint, Point
from zoo.points.rows import Row, find, make_linear
from zoo.registry import register_backbone


@register_backbone
class Swin(TimmBackbone):
    """timm's SwinTransformer (version 1)."""

    family = "swin"
    timm_class = SwinTransformer
    timm_modules = ("swin_transformer",)
    members = {
        "swin-micro": {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 48,
            "depths": (2, 4, 2),
            "num_heads": (2, 4, 8),
            "num_classes": 100,
            "drop_path_rate": 0.0,
        },
        "swin-face": FACE_SWIN,
    }
    networks = {"swin-face": (FaceSwin, FACE_DATA)}
    aliases = {
        "swin-micro": "zoo:swin-micro",
        "swin-face": "zoo:swin-face",
        "swin-t": "timm:swin_tiny_patch4_window7_224",
        "swin-s": "timm:swin_small_patch4_window7_224",
        "swin-b": "timm:swin_base_patch4_window7_224",
        "swin-l": "timm:swin_large_patch4_window7_224",
        "swin-b-in21k": "timm:swin_base_patch4_window7_224.ms_in22k",
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "norm1"),
        Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3)),
        Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
        Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3)),
        Row("attention", "attn", "attn.product", "attn"),
        Row("linear", "o", "attn.o", "attn.proj"),
        Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="drop_path1"),
        Row("norm", "norm", "norm2", "norm2"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="drop_path2"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.act",)
    gives = ("pooled", "tokens", "maps")
    plain_blocks = True
    tiny = (
        "swin-t",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    )

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """A map of every stage, the last one behind the final norm; tokens are its places, row by row."""
        self.check_wanted(want)
        self.check_size(*inputs)
        module: Any = self.module
        x = module.patch_embed(*inputs, **kwargs)
        maps = []
        for stage in module.layers:
            x = stage(x)
            maps.append(x)
        maps[-1] = x = module.norm(x)
        found: dict[str, Any] = {}
        if "pooled" in want:
            found["pooled"] = module.forward_head(x, pre_logits=True).contiguous()
        if "tokens" in want:
            found["tokens"] = x.flatten(1, 2)
        if "maps" in want:
            found["maps"] = [m.permute(0, 3, 1, 2) for m in maps]
        return found

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, H, W, d) plus the windows' attention, or plus the MLP."""
        if role == "attn":
            return x + block.drop_path1(block._attn(block.norm1(x)))
        tokens = x.flatten(1, 2)
        return (tokens + block.drop_path2(block.mlp(block.norm2(tokens)))).view_as(x)

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

    @classmethod
    def describes(cls, module: nn.Module) -> bool:
        """A network of timm's own class, or of a member's."""
        return type(module) in (cls.timm_class, *(network for network, _ in cls.networks.values()))

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every stage's merging and blocks, and of the final norm."""
        module: Any = self.module
        found: list[Point] = []
        self._add(found, "linear", "patch_embed", "patch", "patch_embed.proj")
        self._add(found, "norm", "patch_embed.norm", "norm", "patch_embed.norm")
        first = True
        for s, stage in enumerate(module.layers):
            self._add(found, "norm", f"stages.{s}.merge.norm", "norm", f"layers.{s}.downsample.norm", stage=s)
            self._add(found, "linear", f"stages.{s}.merge", "merge", f"layers.{s}.downsample.reduction", stage=s)
            for i, block in enumerate(stage.blocks):
                attention = block.attn if mixes(block.attn) else None
                width = 1 if attention is None else attention.qkv.out_features // 3 // attention.num_heads
                found += self.points_of_block(
                    block,
                    f"stages.{s}.blocks.{i}",
                    f"layers.{s}.blocks.{i}",
                    block.dim,
                    1 if attention is None else attention.num_heads,
                    block=i,
                    stage=s,
                    layout=Layout(0, tuple(block.input_resolution), tuple(block.window_size), tuple(block.shift_size)),
                    attention={
                        "head_dim": width,
                        "window": block.window_area,
                    },
                    tokens={"first": first},
                )
                first = False
        if any(not mixes(block.attn) for stage in module.layers for block in stage.blocks):
            found = [p for p in found if p.kind != "tokens"]  # prompts pass through all windows, or none
        self._add(found, "norm", "norm", "norm", "norm")
        self._add(found, "linear", "project", "project", "feature_layer.2")  # of a face recogniser
        return found

    def _add(self, found: list[Point], kind: str, name: str, role: str, path: str, **place: Any) -> None:
        module: nn.Module | None = find(self.module, path)
        if module is None:
            return
        common: dict[str, Any] = {"name": name, "role": role, "path": path, "module": module, **place}
        if kind == "linear":
            point = make_linear(module, None, "", 0, common)
            found += [] if point is None else [point]
        else:
            dim = len(module.weight)  # type: ignore[arg-type]
            found.append(NormPoint(**common, dim_in=dim, dim_out=dim))
