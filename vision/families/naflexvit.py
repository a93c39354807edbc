"""timm's `NaFlexVit`: ViTs for images of any shape, such as SigLIP 2 NaFlex and C-RADIO. Blocks are those of ViT.

Besides images (B, C, H, W) it takes what timm's NaFlex collator makes of images of several shapes, patches with their places:

    model({"patches": (B, N, p p C), "patch_coord": (B, N, 2), "patch_valid": (B, N)})        or the last two by keyword

Shorter sequences are filled up, `patch_valid` says where; padding is seen by no token and counts in no average. Prompts that
flow are seen and see like registers: each block's mask grows by them. Prompts and prefixes of one block are keys that all tokens
see.
Queries of their own (VQT) would need the mask, and are refused; so are prompts that take part in the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vision.families.parts import vit_blocks
from vision.families.parts.timm_family import OPTIONS, TimmBackbone, at_size
from zoo.engine.attention import FusedAttention, recorder
from zoo.errors import AttachError, MismatchError
from zoo.families.timm_parts import pool_points
from zoo.points import Layout, NormPoint, Point
from zoo.points.rows import find, make_linear, norm_dim
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class MaskedAttention(FusedAttention):
    """timm's `Attention` in a sequence that prompts have come into, with the mask of the sequence as it was."""

    num_prefix: int = 0

    def extended(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, T + N, d), attn_mask (B, 1, N or 1, N) -> (B, T + N, d)."""
        more = 0 if attn_mask is None else x.shape[1] - attn_mask.shape[-1]
        if attn_mask is not None and more > 0:
            attn_mask = grown(attn_mask, more, self.num_prefix)
        return super().extended(x, attn_mask, is_causal)


def grown(mask: Tensor, more: int, at: int) -> Tensor:
    """A mask (B, 1, M or 1, K) that is added to scores, with `more` tokens at a place: whoever sees anything sees these, and
    they see whatever is seen."""
    keys = mask.amax(dim=-1, keepdim=True).expand(-1, -1, -1, more)
    mask = torch.cat([mask[..., :at], keys, mask[..., at:]], dim=-1)
    if mask.shape[-2] == 1:
        return mask
    rows = mask.amax(dim=-2, keepdim=True).expand(-1, -1, more, -1)
    return torch.cat([mask[..., :at, :], rows, mask[..., at:, :]], dim=-2)


@register_backbone
class NaFlex(TimmBackbone):
    """timm's NaFlexVit with the blocks of ViT."""

    family = "naflexvit"
    timm_class = NaFlexVit
    timm_blocks = (Block,)
    timm_modules = ("naflexvit",)
    aliases = {
        "siglip2-naflex-b": "timm:naflexvit_base_patch16_siglip.v2_webli",
        "siglip2-naflex-so400m": "timm:naflexvit_so400m_patch16_siglip.v2_webli",
        "naflexvit-b": "timm:naflexvit_base_patch16_gap.e300_s576_in1k",
        "c-radio-v3-b": "timm:naflexvit_base_patch16_radio_v3.c_radio",
        "c-radio-v3-l": "timm:naflexvit_large_patch16_radio_v3.c_radio",
    }
    saved_options = {
        **OPTIONS,
        "pos_embed": ("", "none", "learned", "factorized"),
        "pos_embed_grid_size": range(1, 1025),
        "attn_pool_num_heads": range(1, 257),
        **dict.fromkeys(("pos_embed_ar_preserving", "use_key_only_attn_mask", "pool_include_prefix"), bool),
    }
    block_table = vit_blocks.PRE_NORM
    elementwise = ("mlp.act",)
    gives = ("pooled", "tokens", "maps")
    plain_blocks = True
    tiny = (
        "siglip2-naflex-b",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 3,
            "pos_embed_grid_size": [4, 4],
            "reg_tokens": 1,
        },
    )

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """As timm; `img_size` is also what the preprocessing makes of images."""
        module: Any = super().build(name, pretrained=pretrained, **kwargs)
        size = kwargs.get("img_size")
        return module if size is None else at_size(module, size)

    def data_config(self) -> dict[str, Any]:
        """timm's; the patch embedding is no convolution that would say how many channels images have."""
        config = super().data_config()
        return {**config, "input_size": (int(self.module.in_chans), *config["input_size"][1:])}  # type: ignore[arg-type]

    @property
    def num_prefix(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.module.num_prefix_tokens)  # type: ignore[arg-type]

    # -- what comes out ---------------------------------------------------------------------------------------------

    def features(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Images, or patches with their places -> pooled features (B, d)."""
        module: Any = self.module
        found = module.forward_features(*_unpacked(inputs), **_named(inputs, kwargs))
        found = found if isinstance(found, dict) else {"patches": found}
        pooled: Tensor = module.forward_head(**found, pre_logits=True)
        return pooled.contiguous()

    def outputs(self, *inputs: Any, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Tokens behind the final norm, [prefix | patches and padding]; a map of images that all have one shape.

        Raises:
            MismatchError: a map of patches with places, whose shapes differ.
        """
        self.check_wanted(want)
        module: Any = self.module
        patches = _unpacked(inputs)
        features = module.forward_features(*patches, **_named(inputs, kwargs))
        placed = isinstance(features, dict)
        if placed and "maps" in want:
            raise MismatchError(
                "patches with places are of images of several shapes, and make no map. Ask for 'tokens'."
            )
        tokens = features["patches"] if placed else features
        found: dict[str, Any] = {}
        if "pooled" in want:
            whole = features if placed else {"patches": features}
            found["pooled"] = module.forward_head(**whole, pre_logits=True).contiguous()
        if "tokens" in want:
            found["tokens"] = tokens
        if "maps" in want:
            height, width = module.embeds.dynamic_feat_size(patches[0].shape[-2:])
            own = tokens[:, tokens.shape[1] - height * width :]
            found["maps"] = [own.transpose(1, 2).unflatten(2, (height, width))]
        return found

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """A block in halves (`vit_blocks`)."""
        return vit_blocks.half(block, role, x, **(kwargs if role == "attn" else {}))

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, of the final norms, and of what pools the tokens."""
        module: Any = self.module
        common = {"name": "patch_embed", "role": "patch", "path": "embeds.proj", "module": module.embeds.proj}
        patch = make_linear(module.embeds.proj, None, "", 0, common)
        found: list[Point] = [] if patch is None else [patch]
        found += self._norms(("patch_embed.norm_in", "embeds.norm_input"), ("patch_embed.norm", "embeds.norm"))
        found += self._norms(("norm_pre", "norm_pre"))
        token = "embeds.cls_token" if module.embeds.cls_token is not None else ""
        for i, block in enumerate(module.blocks):
            name = f"blocks.{i}"
            found += vit_blocks.points_of(
                self,
                block,
                name,
                name,
                block=i,
                layout=Layout(self.num_prefix),
                tokens={
                    "num_prefix": self.num_prefix,
                    "first": i == 0,
                    "accumulates": True,
                    "parameter": token if i == 0 else "",
                },
            )
        found += self._norms(("norm", "norm"))
        return found + pool_points(self, "attn_pool") + self._norms(("fc_norm", "fc_norm"))

    def _norms(self, *places: tuple[str, str]) -> list[Point]:
        found: list[Point] = []
        for name, path in places:
            norm = find(self.module, path)
            if norm is not None and norm_dim(norm):
                dim = norm_dim(norm)
                found.append(NormPoint(name=name, role="norm", path=path, module=norm, dim_in=dim, dim_out=dim))
        return found

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Prefixes and prompts as on ViT; prompts that flow take the mask of each block with them.

        Raises:
            AttachError: queries, or prompts that are to be averaged.
        """
        if verb == "query" or options.get("pooled"):
            what = "queries of an adapter" if verb == "query" else "prompts in the average"
            raise AttachError(
                f"{what} know nothing of the padding of sequences of several lengths, so '{self.family}' does not take them at "
                f"'{point.name}'. {'Use a ViT of one image size.' if verb == 'query' else 'Leave prompts out of the pooling.'}"
            )
        super().record(session, point, verb, module, **options)
        if options.get("keep"):
            op = recorder(session, point, verb, module)
            blocks: Any = self.module.blocks
            for block in blocks:
                op(block.attn, MaskedAttention, "forward", None, "flow", per_row=False)
                session.site(block.attn, MaskedAttention).num_prefix = self.num_prefix  # type: ignore[attr-defined]


def _unpacked(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0]["patches"], *inputs[1:]) if inputs and isinstance(inputs[0], dict) else inputs


def _named(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The places of patches, those of a dict first."""
    if not (inputs and isinstance(inputs[0], dict)):
        return kwargs
    return {**kwargs, **{k: v for k, v in inputs[0].items() if k in ("patch_coord", "patch_valid", "attn_mask")}}
