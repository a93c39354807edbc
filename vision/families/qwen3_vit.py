"""timm's `Qwen3VitClassifier` and `Qwen3VitEncoder`: the image towers of Qwen3-VL and what follows it, of EVA's rotary blocks.

The classifier averages the encoder's patches (those that the projector makes of four, with `encoder_pool="merge"`); the encoder
gives tokens for a language model, on which no classifier stands. There are no class and register tokens, and no norm behind the
blocks: prompts that flow stand in front of the patches and leave behind the last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import timm.models.qwen3_vit as qwen
from torch import Tensor, nn

from vision.families.parts.flat_vit import FlatViT
from vision.families.parts.timm_family import OPTIONS
from zoo.engine.attention import recorder
from zoo.engine.changes import OnOutput
from zoo.engine.kept import Insert
from zoo.engine.sites import BlockSite
from zoo.errors import AttachError
from zoo.families import timm_attention as flat
from zoo.points import Layout, NormPoint, Point, TokensPoint
from zoo.points.rows import make_linear
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@register_backbone
class Qwen3ViT(FlatViT):
    """timm's image towers of Qwen."""

    family = "qwen3-vit"
    timm_class = (qwen.Qwen3VitClassifier, qwen.Qwen3VitEncoder)  # type: ignore[assignment]
    timm_modules = ("qwen3_vit",)
    aliases = {
        "qwen3-vit-306m": "timm:qwen3_vit_306m.qwen3_vl_4b",
        "qwen3-vit-306m-enc": "timm:qwen3_vit_306m_enc.qwen3_vl_4b",
    }
    saved_options = {
        **OPTIONS,
        "global_pool": ("", "avg", "merge"),
        "encoder_pool": ("", "merge"),
        **dict.fromkeys(("out_features", "merge_size", "pos_embed_grid_size"), range(16385)),
        **dict.fromkeys(("rope_temperature", "norm_eps"), float),
    }
    tiny = (
        "timm:qwen3_vit_88m",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "pos_embed_grid_size": 4},
    )

    @property
    def encoder(self) -> Any:
        """The network of the blocks, the module itself or its part."""
        return getattr(self.module, "encoder", self.module)

    @property
    def _path(self) -> str:
        return "" if self.encoder is self.module else "encoder."

    @property
    def num_prefix(self) -> int:
        """None."""
        return 0

    @property
    def pools(self) -> bool:  # type: ignore[override]
        """Whether one vector for each image comes out."""
        return self.module.global_pool == "avg"

    def take_head(self) -> nn.Module | None:
        """timm's classifier; the encoder has none."""
        return None if self.encoder is self.module else super().take_head()

    def data_config(self) -> dict[str, Any]:
        """timm's, at the image size that the network was built for."""
        config = super().data_config()
        return {**config, "input_size": (config["input_size"][0], *self.encoder.patch_embed.img_size)}

    def features(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Images (B, 3, H, W) -> the average (B, d), or all that comes out where nothing is averaged."""
        if self.encoder is self.module:
            return self.module(*inputs, **kwargs).contiguous()  # type: ignore[no-any-return]
        return super().features(*inputs, **kwargs)

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Patches behind the last block, row by row, and as a map."""
        self.check_wanted(want)
        found: dict[str, Any] = {}
        if "pooled" in want:
            found["pooled"] = self.features(*inputs, **kwargs)
        if "tokens" in want or "maps" in want:
            patches: Tensor = self.encoder.forward_features(*inputs, **kwargs)  # (B, H, W, d)
            everything = {"tokens": patches.flatten(1, 2), "maps": [patches.permute(0, 3, 1, 2)]}
            found |= {name: everything[name] for name in want if name != "pooled"}
        return found

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, and of the projector for a language model."""
        encoder, path = self.encoder, self._path
        found: list[Point] = []
        self._linear(found, "patch_embed", "patch", f"{path}patch_embed.proj", encoder.patch_embed.proj)
        for i, block in enumerate(encoder.blocks):
            attention = block.attn
            found += self.points_of_block(
                block,
                f"blocks.{i}",
                f"{path}blocks.{i}",
                int(encoder.embed_dim),
                attention.num_heads,
                block=i,
                layout=Layout(0, tuple(encoder.patch_embed.grid_size)),
                attention={"head_dim": attention.head_dim},
                tokens={"first": i == 0, "accumulates": True},
            )
        merger = encoder.merger
        if merger is not None:
            dim = int(encoder.embed_dim)
            common: dict[str, Any] = {"role": "norm", "path": f"{path}merger.norm", "module": merger.norm}
            found.append(NormPoint(name="merger.norm", **common, dim_in=dim, dim_out=dim))
            self._linear(found, "merger.fc1", "proj", f"{path}merger.fc1", merger.fc1)
            self._linear(found, "merger.fc2", "proj", f"{path}merger.fc2", merger.fc2)
        return found

    def _linear(self, found: list[Point], name: str, role: str, path: str, module: nn.Module) -> None:
        point = make_linear(module, None, "", 0, {"name": name, "role": role, "path": path, "module": module})
        found += [] if point is None else [point]

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Prefixes, prompts and queries.

        Raises:
            AttachError: prompts that are to be averaged.
        """
        if verb == "query" or not (options.get("keep") or options.get("pooled")) or options.get("replace"):
            if verb == "query":
                super().record(session, point, verb, module, **options)
                return
            flat.record(session, point, verb, module, self.encoder.blocks, self.module, True, **options)
            return
        if options.get("pooled"):
            raise AttachError(
                f"prompts leave '{point.name}' before the patches take their places in the map again, so they cannot be averaged "
                "with these. Leave them out of the pooling."
            )
        assert isinstance(point, TokensPoint)
        op = recorder(session, point, verb, module)
        blocks: Any = self.encoder.blocks
        block = blocks[point.block]
        insert = Insert(module, 0, session.site(block, BlockSite))
        op(block, BlockSite, "input", insert, per_row=False)
        for each in blocks[point.block :]:
            op(each.attn, flat.kind_of(point, each.attn), "forward", None, "flow", per_row=False)
        op(blocks[-1], BlockSite, "output", OnOutput(insert.strip), per_row=False)
