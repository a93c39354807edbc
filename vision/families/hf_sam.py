"""transformers' image encoder of SAM (`SamVisionModel`): pre-norm blocks on maps (B, H, W, d), most of them in windows.

    u = x + W_o Attn(LN1 x),  y = u + MLP(LN2 u)          Attn in windows of 14 x 14 places, or over the map in every third block

Behind the blocks two convolutions with norms make a map of 256 channels (the neck). Pooled is its mean over the places. The
prompt encoder and the mask decoder are left out. The neck's convolutions have no bias and norms behind them; the norms are
points. The library has no place for a classifier.

Source: Kirillov et al., "Segment Anything", ICCV 2023. Count: SAM-B 89,670,912.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vision.families.parts.transformers_family import IMAGENET, OPTIONS, Places, TransformersVision
from zoo.families.names import check_names
from zoo.points import Layout, Point
from zoo.points.rows import Row
from zoo.registry import register_backbone


@register_backbone
class TransformersSAM(TransformersVision):
    """`hf-sam-b`, `hf-sam-l`, `hf-sam-h`, or `transformers:<repository or folder>` of these types."""

    family = "hf-sam"
    gives = ("pooled", "maps")
    library_classes = {
        "sam": ("SamVisionConfig", "SamVisionModel"),
        "sam_vision_model": ("SamVisionConfig", "SamVisionModel"),
    }
    nested = {"sam": "vision_config"}
    configs = {
        "facebook/sam-vit-base": ("sam", {}),
        "facebook/sam-vit-large": (
            "sam",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "mlp_dim": 4096,
                "global_attn_indexes": [5, 11, 17, 23],
            },
        ),
        "facebook/sam-vit-huge": (
            "sam",
            {
                "hidden_size": 1280,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "mlp_dim": 5120,
                "global_attn_indexes": [7, 15, 23, 31],
            },
        ),
    }
    aliases = {
        "hf-sam-b": "transformers:facebook/sam-vit-base",
        "hf-sam-l": "transformers:facebook/sam-vit-large",
        "hf-sam-h": "transformers:facebook/sam-vit-huge",
    }
    saved_options = {
        **OPTIONS,
        **dict.fromkeys(("mlp_dim", "window_size", "output_channels"), range(1, 65537)),
        "global_attn_indexes": range(257),
        **dict.fromkeys(("use_abs_pos", "use_rel_pos"), bool),
    }
    left_out = ("prompt_encoder.*", "mask_decoder.*", "shared_image_embedding.*")
    layout = ("vision_encoder.layers.0.attn.qkv",)
    places = {
        "sam_vision_model": Places(
            body="vision_encoder",
            blocks="layers",
            patch="patch_embed.projection",
            behind=(("neck.norm1", "neck.layer_norm1"), ("neck.norm2", "neck.layer_norm2")),
        )
    }
    preprocessing = {
        "sam_vision_model": {**IMAGENET, "crop_mode": "border", "crop_pct": 1.0, "interpolation": "bilinear"}
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "layer_norm1"),
        Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3)),
        Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
        Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3)),
        Row("attention", "attn", "attn.product", "attn"),
        Row("linear", "o", "attn.o", "attn.proj"),
        Row("sublayer", "attn", "attn", "attn", entry="layer_norm1", exit="attn:output"),
        Row("norm", "norm", "norm2", "layer_norm2"),
        Row("linear", "up", "mlp.up", "mlp.lin1"),
        Row("linear", "down", "mlp.down", "mlp.lin2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="layer_norm2", exit="mlp:output"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.act",)
    tiny = (
        "hf-sam-b",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "mlp_dim": 96,
            "window_size": 3,
            "global_attn_indexes": [1],
            "initializer_range": 0.1,  # the library's 1e-10 is for weights that are loaded
            "output_channels": 24,
        },
    )
    tiny_classes = None

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's module with attentions whose input and output are maps."""
        from vision.families.parts.sam_attention import opened

        return opened(super().build(name, pretrained=pretrained, **kwargs))

    def restore(self, module: nn.Module) -> nn.Module:
        """The library's own attentions again."""
        from vision.families.parts.sam_attention import closed

        return closed(module)

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`x + attention(LN1 x)`, or `x + MLP(LN2 x)`."""
        if role == "attn":
            return x + block.attn(block.layer_norm1(x))[0]  # type: ignore[no-any-return]
        return x + block.mlp(block.layer_norm2(x))  # type: ignore[no-any-return]

    def packs(self, module: nn.Module) -> bool:
        """The library's attentions give (y, weights)."""
        return hasattr(module, "qkv")

    @property
    def num_prefix(self) -> int:
        """None."""
        return 0

    @property
    def resizes(self) -> bool:
        """Positions are of one size."""
        return False

    @property
    def feature_dim(self) -> int:
        """Channels of the neck."""
        return int(self.config.output_channels)

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, and of the neck's norms."""
        config, place = self.config, self.place
        found = self.linear_at("patch_embed", "patch", self.path(place.patch))
        side = int(config.image_size) // int(config.patch_size)
        for i, block in enumerate(self.stack):
            window = block.attn.map_window
            found += self.points_of_block(
                block,
                f"blocks.{i}",
                f"{self.path(place.blocks)}.{i}",
                config.hidden_size,
                config.num_attention_heads,
                block=i,
                layout=Layout(0, (side, side), (window, window) if window else None),
                attention={
                    "head_dim": config.hidden_size // config.num_attention_heads,
                    "window": window**2 if window else None,
                },
                tokens={"first": i == 0},
            )
        for name, path in place.behind:
            found += self.norm_at(name, self.path(path), first=True)
        return found

    def record(self, session: Any, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Verbs of attention and tokens points: more keys, and prompts of one block each."""
        from vision.families.parts.sam_attention import record

        assert point.block is not None
        record(session, point, verb, module, self.stack[point.block], **options)

    def pool(self, output: Any) -> Tensor:
        """The mean over the places of the neck's map."""
        return output.last_hidden_state.mean(dim=(-2, -1))  # type: ignore[no-any-return]

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """The neck's map (B, C, H, W)."""
        self.check_wanted(want)
        check_names(self.name, None, kwargs)
        output = self.look(self.body, *inputs)
        everything = {"pooled": self.pool(output), "maps": [output.last_hidden_state]}
        return {name: everything[name] for name in want}

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Those of the neck."""
        return (int(self.config.output_channels),)

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        return "apache-2.0" if self.pretrained and self.source in self.configs else None
