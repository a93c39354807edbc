"""Every timm `Cait`: blocks of talking heads on the patches, then a class token that asks them.

    u = x + DP(g1 Attn(LN1 x))        y = u + DP(g2 MLP(LN2 u))

The heads of an attention are mixed by two small matrices, in front of its softmax (`attn.mix_scores`) and behind it
(`attn.mix_weights`). Both branches share one stochastic depth, so a sublayer's output is that of its module, in front of g. The
class blocks are described in `parts.class_attention`. Prompts that flow stand in front of the patches and leave behind the last
block: the class token does not see them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models.cait import Cait
from torch import Tensor, nn

from vision.families.parts.class_attention import ClassReader, ClassSite, TalkingSite
from zoo.engine.attention import FusedKeys, Given, Prompts, recorder
from zoo.engine.changes import OnOutput
from zoo.engine.kept import Insert, Overwrite, kept
from zoo.engine.sites import BlockSite
from zoo.errors import AttachError
from zoo.points import Layout, Point, TokensPoint
from zoo.points.rows import Row, make_linear
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@register_backbone
class CaiT(ClassReader):
    """timm's Cait."""

    family = "cait"
    timm_class = Cait
    timm_modules = ("cait",)
    aliases = {
        "cait-xxs24": "timm:cait_xxs24_224.fb_dist_in1k",
        "cait-s24": "timm:cait_s24_224.fb_dist_in1k",
        "cait-m36": "timm:cait_m36_384.fb_dist_in1k",
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "norm1"),
        Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3)),
        Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
        Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3)),
        Row("linear", "mix", "attn.mix_scores", "attn.proj_l"),
        Row("attention", "attn", "attn.product", "attn"),
        Row("linear", "mix", "attn.mix_weights", "attn.proj_w"),
        Row("linear", "o", "attn.o", "attn.proj"),
        Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="attn:output"),
        Row("norm", "norm", "norm2", "norm2"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="mlp:output"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.act",)
    plain_blocks = True
    tiny = (
        "cait-xxs24",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0},
    )

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor) -> Tensor:  # type: ignore[override]
        """`x + DP(g1 Attn(LN1 x))`, or `x + DP(g2 MLP(LN2 x))`."""
        if role == "attn":
            return x + block.drop_path(block.gamma_1 * block.attn(block.norm1(x)))
        return x + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x)))

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block and class block, and of the final norm."""
        module: Any = self.module
        common = {"name": "patch_embed", "role": "patch", "path": "patch_embed.proj", "module": module.patch_embed.proj}
        patch = make_linear(module.patch_embed.proj, None, "", 0, common)
        found: list[Point] = [] if patch is None else [patch]
        for i, block in enumerate(module.blocks):
            name, attention = f"blocks.{i}", block.attn
            found += self.points_of_block(
                block,
                name,
                name,
                int(module.embed_dim),
                attention.num_heads,
                block=i,
                layout=Layout(0, tuple(module.patch_embed.grid_size)),
                attention={"head_dim": attention.proj.in_features // attention.num_heads},
                tokens={"first": i == 0, "accumulates": True, "parameter": "cls_token" if i == 0 else ""},
            )
        mlp = Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="mlp:output")
        return [
            *found,
            *self.class_points("blocks_token_only", len(module.blocks), mlp),
            *self.norm_point("norm", "norm"),
        ]

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Prefixes everywhere, prompts among the patches.

        Raises:
            AttachError: queries.
        """
        if verb == "query":
            raise AttachError(
                f"the attention at '{point.name}' is a {type(point.module).__name__}; queries are described for timm's Attention "
                "and WindowAttention. Use a backbone with one of these, or leave the point out of the targets."
            )
        op = recorder(session, point, verb, module)
        blocks: Any = self.module.blocks
        if verb in ("extend", "gate"):
            kind = ClassSite if point.name.startswith("class_blocks") else TalkingSite
            op(point.module, kind, "forward", Given(module))
            return
        block: Any = self.module.get_submodule(point.path)
        if options.get("replace"):
            op(block, BlockSite, "input", Overwrite(module, *kept(session, point, blocks)), per_row=False)
        elif options.get("keep"):
            assert isinstance(point, TokensPoint)
            insert = Insert(module, 0, session.site(block, BlockSite))
            op(block, BlockSite, "input", insert, per_row=False)
            op(blocks[-1], BlockSite, "output", OnOutput(insert.strip), per_row=False)
        else:  # what becomes of prompts in the last block is read by nobody, however patches are pooled
            through: tuple[Any, ...] = (block.norm1, block.attn.qkv, nn.Identity())
            project = FusedKeys(block.norm1, block.attn.qkv, nn.Identity(), block.attn.num_heads)
            op(block.attn, TalkingSite, "forward", Prompts(session.owner, module, through, project))
