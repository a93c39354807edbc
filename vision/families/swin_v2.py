"""Every timm `SwinTransformerV2`: windowed attention that compares cosines, norms behind the branches, tokens (B, H, W, C).

    u = x + DP(LN1 Attn(x))        y = u + DP(LN2 MLP(u))

The attention's branch reads the block's map, and its module sees windows (B * nW, M * M, C): what is done to the input of the
branch alone is done to windows, everything else to maps. Biases of q and v stand beside the projection
(`zoo.families.timm_biases`); the MLP that makes the relative positions is no target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from vision.families.swin import Swin
from zoo.backbone import Backbone
from zoo.families.timm_biases import close_biases, open_biases
from zoo.points import Point
from zoo.points.rows import Row
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@register_backbone
class SwinV2(Swin):
    """timm's SwinTransformerV2."""

    family = "swinv2"
    timm_class = SwinTransformerV2  # type: ignore[assignment]
    timm_modules = ("swin_transformer_v2",)
    members = {}
    aliases = {
        "swinv2-t": "timm:swinv2_tiny_window16_256.ms_in1k",
        "swinv2-s": "timm:swinv2_small_window16_256.ms_in1k",
        "swinv2-b": "timm:swinv2_base_window16_256.ms_in1k",
        "swinv2-l": "timm:swinv2_large_window12to16_192to256.ms_in22k_ft_in1k",
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3), bias="q_bias"),
        Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
        Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3), bias="v_bias"),
        Row("attention", "attn", "attn.product", "attn"),
        Row("linear", "o", "attn.o", "attn.proj"),
        Row("sublayer", "attn", "attn", "attn", entry=":input", exit="norm1:input", inner="attn"),
        Row("norm", "norm", "norm1", "norm1"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="mlp:input", exit="norm2:input"),
        Row("norm", "norm", "norm2", "norm2"),
        Row("block", "block", "", ""),
    )
    tiny = ("swinv2-t", {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)})

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        open_biases(module)

    def stir(self) -> None:
        """timm starts the norms behind the branches at zero, so that no branch says anything."""
        for point in self.points():
            if point.kind == "norm":
                nn.init.ones_(point.module.weight)  # type: ignore[arg-type]

    def restore(self, module: nn.Module) -> nn.Module:
        """The library's own classes again."""
        close_biases(module)
        return module

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, H, W, d) plus the windows' attention, or plus the MLP, normed."""
        if role == "attn":
            return x + block.drop_path1(block.norm1(block._attn(x)))
        tokens = x.flatten(1, 2)
        return (tokens + block.drop_path2(block.norm2(block.mlp(tokens)))).view_as(x)

    @classmethod
    def surgery(cls) -> Any:
        """Not described."""
        return Backbone.surgery()

    @classmethod
    def children(cls) -> Any:
        """Not described."""
        return Backbone.children()

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Prefixes, prompts and queries."""
        if verb == "query":
            from vision.families.parts.swin_v2_attention import record_queries

            record_queries(self, session, point, module)
            return
        from vision.families.parts.swin_attention import record
        from vision.families.parts.swin_v2_attention import KINDS

        path = point.path if point.kind == "tokens" else point.path.rpartition(".")[0]
        record(self, session, point, self.module.get_submodule(path), verb, module, **options, kinds=KINDS)
