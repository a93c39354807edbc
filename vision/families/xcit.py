"""Every timm `Xcit`: attention among channels, a convolution among neighbours, an MLP; then a class token asks the patches.

    u = x + DP(g1 XCA(LN1 x))        w = u + DP(g3 LPI(LN3 u))        y = w + DP(g2 MLP(LN2 w))

Sublayers of a block are `attn`, `mixer` (the local convolutions, (B, N, d) like the others) and `mlp`. Cross-covariance attention
has no keys that a query could choose among, and a convolution in every block needs the grid: so there are no `tokens` points, and
`attention` points (prefixes) in the class blocks alone. The class blocks are described in `parts.class_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models.xcit import Xcit
from torch import Tensor, nn

from vision.families.parts.class_attention import ClassReader, ClassSite
from zoo.engine.attention import Given, recorder
from zoo.errors import AttachError
from zoo.points import Layout, NormPoint, Point
from zoo.points.rows import Row, make_linear
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@register_backbone
class XCiT(ClassReader):
    """timm's Xcit."""

    family = "xcit"
    timm_class = Xcit
    timm_modules = ("xcit",)
    aliases = {
        "xcit-n12-p16": "timm:xcit_nano_12_p16_224.fb_dist_in1k",
        "xcit-ti12-p16": "timm:xcit_tiny_12_p16_224.fb_dist_in1k",
        "xcit-s12-p16": "timm:xcit_small_12_p16_224.fb_dist_in1k",
        "xcit-m24-p16": "timm:xcit_medium_24_p16_224.fb_dist_in1k",
    }
    block_table = (
        Row("norm", "norm", "norm1", "norm1"),
        Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3)),
        Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
        Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3)),
        Row("linear", "o", "attn.o", "attn.proj"),
        Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="drop_path1"),
        Row("norm", "norm", "norm3", "norm3"),
        Row("linear", "conv", "local.conv1", "local_mp.conv1"),
        Row("norm", "norm", "local.norm", "local_mp.bn"),
        Row("linear", "conv", "local.conv2", "local_mp.conv2"),
        Row("sublayer", "mixer", "local", "local_mp", entry="norm3", exit="drop_path3"),
        Row("norm", "norm", "norm2", "norm2"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="drop_path2"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.act", "local_mp.act")
    tiny = (
        "xcit-n12-p16",
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    )

    def points(self) -> list[Point]:
        """Points of the convolutions of the patch embedding, of every block and class block, and of the final norm."""
        module: Any = self.module
        found: list[Point] = []
        for i, part in enumerate(module.patch_embed.proj):
            if isinstance(
                part, nn.Sequential
            ):  # a convolution and its norm; what stands between two is their activation
                path = f"patch_embed.proj.{i}"
                common = {"name": f"patch_embed.{i}", "role": "patch", "path": f"{path}.0", "module": part[0]}
                point = make_linear(part[0], None, "", 0, common)
                found += [] if point is None else [point]
                found += self.norm_point(f"patch_embed.{i}.norm", f"{path}.1", channels_first=True)
        for i, block in enumerate(module.blocks):
            name = f"blocks.{i}"
            points = self.points_of_block(block, name, name, int(module.embed_dim), 0, block=i, layout=Layout())
            for each in points:
                if isinstance(each, NormPoint) and each.name.endswith("local.norm"):
                    each.channels_first = True
            found += points
        # its input is the residual stream: the norm stands in front of the sum
        mlp = Row("sublayer", "mlp", "mlp", "mlp", entry="mlp:input", exit="mlp:output")
        return [
            *found,
            *self.class_points("cls_attn_blocks", len(module.blocks), mlp),
            *self.norm_point("norm", "norm"),
        ]

    def fold_shift(self, module: nn.Module, point: Point, shift: Tensor) -> bool:
        """The convolutions of the patch embedding have no bias: the norm behind one takes a shift into its mean."""
        if point.role != "patch":
            return False
        norm: Any = module.get_submodule(f"{point.path.rpartition('.')[0]}.1")
        norm.running_mean -= shift.to(norm.running_mean)
        return True

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """More keys and values for the class token.

        Raises:
            AttachError: queries.
        """
        if verb == "query":
            raise AttachError(
                f"'{point.name}' has the class token as its one query; other queries are not described there."
            )
        recorder(session, point, verb, module)(point.module, ClassSite, "forward", Given(module))
