"""What EVA and BEiT share in timm: a sequence of tokens [class, registers | patches] that runs through equal blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vision.families.parts.sequence import SequenceBackbone
from zoo.families import timm_attention as flat
from zoo.families.timm_biases import close_biases, open_biases
from zoo.families.timm_parts import fold_shift, pool_points
from zoo.families.timm_tables import POST_NORM, PRE_NORM
from zoo.points import Layout, NormPoint, Point
from zoo.points.rows import find, make_linear, norm_dim

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


class FlatViT(SequenceBackbone):
    """Base of both families."""

    block_table = PRE_NORM
    elementwise = ("mlp.act",)
    plain_blocks = True

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        open_biases(module)

    def restore(self, module: nn.Module) -> nn.Module:
        """The library's own classes again."""
        close_biases(module)
        return module

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A block in halves (`zoo.families.timm_attention`)."""
        return flat.half(block, role, x, *args, **kwargs)

    def fold_shift(self, module: nn.Module, point: Point, shift: Tensor) -> bool:
        """Where there is no bias (`zoo.families.timm_parts`)."""
        return fold_shift(module, point, point.path, shift)

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, of the final norms, and of what pools the tokens."""
        module: Any = self.module
        found: list[Point] = []
        projection = find(module, "patch_embed.proj")
        if projection is not None:
            common = {"name": "patch_embed", "role": "patch", "path": "patch_embed.proj", "module": projection}
            point = make_linear(projection, None, "", 0, common)
            found += [] if point is None else [point]
        found += self._norms("patch_embed.norm", "norm_pre")
        token = "cls_token" if getattr(module, "cls_token", None) is not None else ""
        for i, block in enumerate(module.blocks):
            attention = block.attn
            found += self.points_of_block(
                block,
                f"blocks.{i}",
                f"blocks.{i}",
                int(module.embed_dim),
                attention.num_heads,
                table=POST_NORM if type(block).__name__ in flat.POST_NORM else self.block_table,
                block=i,
                layout=Layout(self.num_prefix, tuple(module.patch_embed.grid_size)),
                attention={"head_dim": attention.proj.in_features // attention.num_heads},
                tokens={
                    "num_prefix": self.num_prefix,
                    "first": i == 0,
                    "accumulates": True,
                    "parameter": token if i == 0 else "",
                },
            )
        found += self._norms("norm")
        return found + pool_points(self, "attn_pool") + self._norms("fc_norm")

    def _norms(self, *paths: str) -> list[Point]:
        found: list[Point] = []
        for path in paths:
            norm = find(self.module, path)
            if norm is not None and norm_dim(norm):
                width = norm_dim(norm)
                found.append(NormPoint(name=path, role="norm", path=path, module=norm, dim_in=width, dim_out=width))
        return found

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Prefixes, prompts and queries."""
        if verb == "query":
            from zoo.families.flat_queries import record

            record(session, point, module, self.module.get_submodule(point.path.rpartition(".")[0]))
            return
        backbone: Any = self.module
        averaged = backbone.global_pool != "token" or getattr(backbone, "attn_pool", None) is not None
        flat.record(session, point, verb, module, backbone.blocks, backbone.norm, averaged, **options)
