"""transformers' ViT, the encoder of ViTMAE, and BEiT: pre-norm blocks, images (B, C, H, W), tokens [class | patches].

    u = x + l1 (W_o Attn(LN1 x)),  y = u + l2 MLP(LN2 u)          l1, l2: BEiT's layer scales `lambda_1`, `lambda_2`; else 1

Pooled is the class token behind the final norm (ViT, ViTMAE), or the norm of the patches' mean (BEiT); the classifier is a linear
map of it. A ViTMAE is built as the library advises for fine-tuning, as a ViT: its encoder without masking; the decoder of its
pretraining is left out.

BEiT adds to the scores a bias for each pair of places; extra keys and prompts get none. Its adapters behind a sublayer stand
inside of the layer scale: the library multiplies by `lambda_1` in the block itself, where no module is.

Sources: Dosovitskiy et al., ICLR 2021; He et al., CVPR 2022; Bao et al., ICLR 2022. Counts without classifier: ViT-B/16
85,798,656, BEiT-B/16 85,761,984.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vision.families.parts.transformers_family import HALVES, IMAGENET, Places, TransformersVision
from zoo.points.rows import Row
from zoo.registry import register_backbone

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# Fields in which the published fine-tuned BEiTs differ from the library's defaults
BEIT = {"use_relative_position_bias": True, "num_labels": 1000}
SQUASHED = {**HALVES, "crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}


@register_backbone
class TransformersViT(TransformersVision):
    """`hf-vit-b16`, `hf-mae-b16`, `hf-beit-b16`, or `transformers:<repository or folder>` of these types."""

    family = "hf-vit"
    library_classes = {
        "vit": ("ViTConfig", "ViTForImageClassification"),
        "vit_mae": ("ViTConfig", "ViTForImageClassification"),
        "beit": ("BeitConfig", "BeitForImageClassification"),
    }
    configs = {
        "google/vit-base-patch16-224": ("vit", {"num_labels": 1000}),
        "google/vit-base-patch16-224-in21k": ("vit", {}),
        "google/vit-large-patch16-224": ("vit", {**LARGE, "num_labels": 1000}),
        "facebook/vit-mae-base": ("vit_mae", {}),
        "facebook/vit-mae-large": ("vit_mae", LARGE),
        "microsoft/beit-base-patch16-224": ("beit", BEIT),
        "microsoft/beit-large-patch16-224": ("beit", {**BEIT, **LARGE, "layer_scale_init_value": 1e-5}),
    }
    aliases = {
        "hf-vit-b16": "transformers:google/vit-base-patch16-224",
        "hf-vit-b16-in21k": "transformers:google/vit-base-patch16-224-in21k",
        "hf-vit-l16": "transformers:google/vit-large-patch16-224",
        "hf-mae-b16": "transformers:facebook/vit-mae-base",
        "hf-mae-l16": "transformers:facebook/vit-mae-large",
        "hf-beit-b16": "transformers:microsoft/beit-base-patch16-224",
        "hf-beit-l16": "transformers:microsoft/beit-large-patch16-224",
    }
    left_out = (
        *("*.position_ids", "*pooler.dense.*", "*mask_token", "*.relative_position_index"),
        *("decoder.*", "lm_head.*", "layernorm.*"),
    )
    started = ("beit.pooler.layernorm.*",)
    layout = ("vit.layers.0.attention.q_proj", "beit.layers.0.attention.q_proj")
    unread = ("*.mask_token",)
    places = {
        "vit": Places(
            body="vit",
            blocks="layers",
            patch="embeddings.patch_embeddings.projection",
            token="embeddings.cls_token",
            behind=(("norm", "layernorm"),),
        ),
        "beit": Places(
            body="beit",
            blocks="layers",
            patch="embeddings.patch_embeddings.projection",
            token="embeddings.cls_token",
            behind=(("norm", "layernorm"), ("fc_norm", "pooler.layernorm")),
        ),
    }
    preprocessing = {"vit": SQUASHED, "beit": SQUASHED}
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "layernorm_before"),
        Row("linear", "q", "attn.q", "attention.q_proj"),
        Row("linear", "k", "attn.k", "attention.k_proj"),
        Row("linear", "v", "attn.v", "attention.v_proj"),
        Row("attention", "attn", "attn.product", "attention"),
        Row("linear", "o", "attn.o", "attention.o_proj"),
        Row("sublayer", "attn", "attn", "attention", entry="layernorm_before", exit="attention:output"),
        Row("norm", "norm", "norm2", "layernorm_after"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="layernorm_after", exit="mlp:output"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.activation_fn",)
    tiny = (
        "hf-vit-b16",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 96,
        },
    )

    @classmethod
    def half(
        cls,
        block: Any,
        role: str,
        x: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:  # type: ignore[override]
        """`x + attention(LN x)`, or `x + MLP(LN x)`."""
        if getattr(block, "lambda_1", None) is None:  # a ViT
            if role == "attn":
                return block.dropout(block.attention(block.layernorm_before(x), attention_mask, **kwargs)[0]) + x  # type: ignore[no-any-return]
            return block.dropout(block.mlp(block.layernorm_after(x))) + x  # type: ignore[no-any-return]
        if role == "mlp":
            return block.drop_path(block.lambda_2 * block.dropout(block.mlp(block.layernorm_after(x)))) + x  # type: ignore[no-any-return]
        if block.relative_position_bias is not None:
            assert resolution is not None
            window = tuple(n // block.patch_size for n in resolution)
            bias = block.relative_position_bias(window, interpolate_pos_encoding, dim_size=x.shape[1])
            attention_mask = bias if attention_mask is None else bias + attention_mask
        attended = block.attention(block.layernorm_before(x), attention_mask=attention_mask, **kwargs)[0]
        return block.drop_path(block.lambda_1 * block.dropout(attended)) + x  # type: ignore[no-any-return]

    @property
    def num_prefix(self) -> int:
        """The class token."""
        return 1

    @property
    def averaged(self) -> bool:
        """BEiT averages the patches."""
        return self.model_type == "beit" and bool(self.config.use_mean_pooling)

    @property
    def biased(self) -> bool:
        """BEiT has a bias for each pair of places."""
        config = self.config
        return self.model_type == "beit" and (
            config.use_relative_position_bias or config.use_shared_relative_position_bias
        )

    def fold_shift(self, module: nn.Module, point: Any, shift: Tensor) -> bool:
        """BEiT's keys have no bias: a shift of all of them changes no attention."""
        return bool(point.role == "k")

    def norm_of(self, block: Any) -> nn.Module:
        """In front of the attention."""
        return block.layernorm_before  # type: ignore[no-any-return]

    def pool(self, output: Any) -> Tensor:
        """The class token, or BEiT's pooler."""
        return output.last_hidden_state[:, 0] if self.model_type == "vit" else output.pooler_output  # type: ignore[no-any-return]

    def data_config(self) -> dict[str, Any]:
        """ViTMAE has ImageNet's statistics."""
        mae = self.source in self.configs and self.configs[self.source][0] == "vit_mae"
        return {**super().data_config(), **(IMAGENET if mae else {})}

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        stated = {"google": "apache-2.0", "facebook": "apache-2.0", "microsoft": "apache-2.0"}
        return stated.get(self.source.split("/")[0]) if self.pretrained and self.source in self.configs else None
