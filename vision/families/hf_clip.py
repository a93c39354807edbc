"""transformers' image towers of CLIP, SigLIP and SigLIP 2: pre-norm blocks, images (B, C, H, W), tokens [class | patches].

    u = x + W_o Attn(LN1 x),  y = u + MLP(LN2 u)

CLIP: pooled is the normed class token in the space that it shares with texts, `visual_projection` (B, p). SigLIP has no class
token: a learned query reads the normed patches (`head`), z = Attn(query, tokens), pooled = z + MLP(LN z) (B, d). That reading is
a `nn.MultiheadAttention`, which multiplies by packed weights and never calls its own `out_proj`: its projections are no points.
The norm and the MLP behind it are, `pool.norm`, `pool.up` and `pool.down`, of the role "pool", which "all-linear" leaves out.

The library's classes here have no classifier: a model with a head of ours is merged without it. Folders saved with one
(`SiglipForImageClassification`, `CLIPForImageClassification`) come with it; it stands on the mean of the patches.

SigLIP 2 of fixed sizes has the type of SigLIP. Its NaFlex variants (`siglip2`) read rows of patches; here they are given images
of any size of whole patches, all of one size in a batch, which are cut into these rows. Text towers are left out.

Sources: Radford et al., ICML 2021; Zhai et al., ICCV 2023; Tschannen et al., "SigLIP 2", 2025. Counts: SigLIP-B/16 92,884,224 (of
these 7,087,104 of the pooling), CLIP-B/32 87,849,216.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vision.families.parts.transformers_family import HALVES, Places, TransformersVision, pair
from zoo.points.rows import Row
from zoo.registry import register_backbone

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
CLIP_DATA = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "crop_mode": "center",
    "crop_pct": 1.0,
}
CLIP_PLACES = Places(
    body="vision_model",
    blocks="encoder.layers",
    patch="embeddings.patch_embedding",
    token="embeddings.class_embedding",
    before=(("norm_pre", "pre_layrnorm"),),  # the library's spelling
    behind=(("norm", "post_layernorm"),),
    further=(("proj", "proj", "visual_projection"),),
)
SIGLIP_PLACES = Places(
    blocks="encoder.layers",
    patch="embeddings.patch_embedding",
    behind=(("norm", "post_layernorm"), ("pool.norm", "head.layernorm")),
    further=(("pool.up", "pool", "head.mlp.fc1"), ("pool.down", "pool", "head.mlp.fc2")),
)


@register_backbone
class TransformersCLIP(TransformersVision):
    """`hf-clip-b32`, `hf-siglip-b16`, `hf-siglip2-b16`, or `transformers:<repository or folder>` of these types."""

    family = "hf-clip"
    library_classes = {
        "clip": ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
        "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
        "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
        "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel"),
        "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel"),
        "siglip2_vision_model": ("Siglip2VisionConfig", "Siglip2VisionModel"),
        "clip, classifier": ("CLIPConfig", "CLIPForImageClassification"),
        "siglip, classifier": ("SiglipConfig", "SiglipForImageClassification"),
    }
    classifiers = {
        "CLIPForImageClassification": "clip, classifier",
        "SiglipForImageClassification": "siglip, classifier",
    }
    nested = {"clip": "vision_config", "siglip": "vision_config", "siglip2": "vision_config"}
    configs = {
        "openai/clip-vit-base-patch32": ("clip", {}),
        "openai/clip-vit-base-patch16": ("clip", {"patch_size": 16}),
        "openai/clip-vit-large-patch14": ("clip", {**LARGE, "patch_size": 14, "projection_dim": 768}),
        "google/siglip-base-patch16-224": ("siglip", {}),
        "google/siglip-large-patch16-256": ("siglip", {**LARGE, "image_size": 256}),
        "google/siglip-so400m-patch14-384": ("siglip", {**SO400M, "image_size": 384, "patch_size": 14}),
        "google/siglip2-base-patch16-224": ("siglip", {}),
        "google/siglip2-large-patch16-256": ("siglip", {**LARGE, "image_size": 256}),
        "google/siglip2-base-patch16-naflex": ("siglip2", {}),
    }
    aliases = {
        "hf-clip-b32": "transformers:openai/clip-vit-base-patch32",
        "hf-clip-b16": "transformers:openai/clip-vit-base-patch16",
        "hf-clip-l14": "transformers:openai/clip-vit-large-patch14",
        "hf-siglip-b16": "transformers:google/siglip-base-patch16-224",
        "hf-siglip-l16": "transformers:google/siglip-large-patch16-256",
        "hf-siglip-so400m": "transformers:google/siglip-so400m-patch14-384",
        "hf-siglip2-b16": "transformers:google/siglip2-base-patch16-224",
        "hf-siglip2-l16": "transformers:google/siglip2-large-patch16-256",
        "hf-siglip2-b16-naflex": "transformers:google/siglip2-base-patch16-naflex",
    }
    left_out = ("*position_ids", "text_model.*", "text_projection.*", "logit_scale", "logit_bias")
    layout = ("vision_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj")
    places = {
        "clip_vision_model": CLIP_PLACES,
        "siglip_vision_model": SIGLIP_PLACES,
        "siglip2_vision_model": SIGLIP_PLACES,
    }
    preprocessing = {
        "clip_vision_model": CLIP_DATA,
        "siglip_vision_model": {**HALVES, "crop_mode": "squash", "crop_pct": 1.0},
        "siglip2_vision_model": {**HALVES, "crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"},
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "layer_norm1"),
        Row("linear", "q", "attn.q", "self_attn.q_proj"),
        Row("linear", "k", "attn.k", "self_attn.k_proj"),
        Row("linear", "v", "attn.v", "self_attn.v_proj"),
        Row("attention", "attn", "attn.product", "self_attn"),
        Row("linear", "o", "attn.o", "self_attn.out_proj"),
        Row("sublayer", "attn", "attn", "self_attn", entry="layer_norm1", exit="self_attn:output"),
        Row("norm", "norm", "norm2", "layer_norm2"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="layer_norm2", exit="mlp:output"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.activation_fn",)
    tiny = (
        "hf-siglip-b16",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 96,
        },
    )
    tiny_classes = None

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`x + attention(LN1 x)`, or `x + MLP(LN2 x)`."""
        if role == "attn":
            return x + block.self_attn(block.layer_norm1(x), attention_mask=attention_mask, **kwargs)[0]  # type: ignore[no-any-return]
        return x + block.mlp(block.layer_norm2(x))  # type: ignore[no-any-return]

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.classifying = "classifier" in module._modules

    def reads(self, path: str, name: str) -> bool:
        """A classifier stands on the mean of the patches: what else could be pooled is read by nobody."""
        unused = ("vision_model.head", *(("vision_model.post_layernorm",) if self.clip else ()))
        return super().reads(path, name) and not (self.classifying and path.startswith(unused))

    @property
    def config(self) -> Any:
        """The library's configuration of the image tower."""
        return getattr(self.module.config, "vision_config", self.module.config)

    @property
    def place(self) -> Places:
        """Where this network has its parts."""
        found = self.places[self.model_type]
        if not self.classifying:
            return found
        behind = () if self.clip else (("norm", "post_layernorm"),)
        return replace(found, body="vision_model", behind=behind, further=())

    @property
    def clip(self) -> bool:
        """Whether it is a CLIP, with a class token and a projection."""
        return self.model_type == "clip_vision_model"

    @property
    def num_prefix(self) -> int:
        """CLIP's class token."""
        return 1 if self.clip else 0

    @property
    def averaged(self) -> bool:
        """SigLIP reads all tokens; so does a classifier."""
        return not self.clip or self.classifying

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.config.projection_dim if self.clip and not self.classifying else self.config.hidden_size)

    @property
    def own_size(self) -> tuple[int, int]:
        """NaFlex has a square table of positions, which is fitted to every image."""
        if self.model_type != "siglip2_vision_model":
            return pair(self.config.image_size)
        side = math.isqrt(int(self.config.num_patches)) * int(self.config.patch_size)
        return side, side

    def look(self, module: nn.Module, images: Tensor) -> Any:
        """As every vision transformer's; NaFlex gets the rows of patches, pixel by pixel, and how many there are."""
        if self.model_type != "siglip2_vision_model":
            return super().look(module, images)
        self.check_images(images)
        p, (height, width) = int(self.config.patch_size), images.shape[-2:]
        grid = (height // p, width // p)
        rows = images.unflatten(3, (grid[1], p)).unflatten(2, (grid[0], p)).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([grid], device=images.device).expand(len(images), -1)
        return module(rows.flatten(3).flatten(1, 2), None, shapes)

    def attention_of(self, block: Any) -> Any:
        """The module with the projections."""
        return block.self_attn

    def fold_shift(self, module: Any, point: Any, shift: Tensor) -> bool:
        """CLIP's patches have no bias, and positions behind them: a shift of all patches is one of their positions."""
        if point.name != "patch_embed" or not self.clip:
            return False
        table = module.get_submodule(self.path("embeddings.position_embedding")).weight
        table.data[self.num_prefix :] += shift.to(table)
        return True

    def norm_of(self, block: Any) -> nn.Module:
        """In front of the attention."""
        return block.layer_norm1  # type: ignore[no-any-return]

    def pool(self, output: Any) -> Tensor:
        """CLIP's projected class token; SigLIP's query behind its MLP; without it, or with a classifier, the patches' mean."""
        if self.classifying:
            return output.last_hidden_state[:, self.num_prefix :].mean(dim=1)  # type: ignore[no-any-return]
        if self.clip and output.get("image_embeds") is not None:
            return output.image_embeds  # type: ignore[no-any-return]
        if self.clip:
            return self.module.visual_projection(output.pooler_output)  # type: ignore[no-any-return, operator]
        return output.last_hidden_state.mean(dim=1) if output.pooler_output is None else output.pooler_output  # type: ignore[no-any-return]

    def tokens(self, output: Any) -> Tensor:
        """Behind the final norm, which CLIP's network gives the class token alone."""
        tokens = output.last_hidden_state
        return self.body.post_layernorm(tokens) if self.clip and not self.classifying else tokens  # type: ignore[no-any-return]

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        known = self.pretrained and self.source in self.configs
        return {"google": "apache-2.0", "openai": "mit"}.get(self.source.split("/")[0]) if known else None
