"""Every timm `Hiera`: a pyramid of plain ViT blocks, tokens (B, N, d) in the order of the mask units.

    u = S(x) + DP(LS(Attn(LN1 x)))        y = u + DP(LS(MLP(LN2 u)))

In the first block of a later stage the width grows from d to d' and, by a maximum over four neighbours of the queries, the tokens
become a quarter; S is then the same of a projection of LN1 x (`shortcut`), or of x alone. Elsewhere S is the identity. Points
of such a block have `dim_in` d and `dim_out` d': nothing can stand beside its attention.

Tokens of the first stages see those of their mask unit only, and their number has to be that of the units: more keys and values
can be had where attention is global, prompts of one block there too, in blocks that do not pool. Prompts that flow cannot.
Tokens stand row by row in the last stage; `outputs` gives maps of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from timm.models.hiera import Hiera
from torch import Tensor, nn

from vision.families.parts.timm_family import OPTIONS, TimmBackbone, at_size
from zoo.engine.attention import AttentionSite, FusedKeys, Given, Prompts, heads, mask_bias, recorder
from zoo.errors import AttachError, ConfigError
from zoo.points import Layout, NormPoint, Point
from zoo.points.rows import Row, find, make_linear, norm_dim
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class GlobalSite(AttentionSite):
    """timm's `MaskUnitAttention` over all tokens, with more keys and values; its queries may be pooled."""

    def extended(self, x: Tensor) -> Tensor:
        """x (B, N, d) -> (B, N / stride, d')."""
        attention: Any = self.module
        q, k, v = heads(attention.qkv(x), attention.heads)
        if attention.q_stride > 1:
            q = q.reshape(x.shape[0], attention.heads, attention.q_stride, -1, attention.head_dim).amax(dim=2)
        y = self.attend(q, k, v, x.shape[0], mask_bias(None)).transpose(1, 2).flatten(2)
        return attention.proj(y)  # type: ignore[no-any-return]


@register_backbone
class HieraFamily(TimmBackbone):
    """timm's Hiera."""

    family = "hiera"
    timm_class = Hiera
    timm_modules = ("hiera",)
    aliases = {
        "hiera-t": "timm:hiera_tiny_224.mae_in1k_ft_in1k",
        "hiera-s": "timm:hiera_small_224.mae_in1k_ft_in1k",
        "hiera-b": "timm:hiera_base_224.mae_in1k_ft_in1k",
        "hiera-b-plus": "timm:hiera_base_plus_224.mae_in1k_ft_in1k",
        "hiera-l": "timm:hiera_large_224.mae_in1k_ft_in1k",
        "hiera-h": "timm:hiera_huge_224.mae_in1k_ft_in1k",
        "hiera-b-mae": "timm:hiera_base_224.mae",
    }
    saved_options = {
        **OPTIONS,
        **dict.fromkeys(("stages", "mask_unit_size", "patch_kernel", "patch_stride"), range(1, 257)),
        **dict.fromkeys(("q_stride", "global_pos_size"), range(1, 257)),
        **dict.fromkeys(("q_pool", "patch_padding"), range(257)),
        **dict.fromkeys(("dim_mul", "head_mul"), float),
        **dict.fromkeys(("use_expand_proj", "abs_win_pos_embed", "sep_pos_embed"), bool),
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "norm1"),
        Row("linear", "shortcut", "shortcut", "proj"),
        Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3)),
        Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
        Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3)),
        Row("attention", "attn", "attn.product", "attn"),
        Row("linear", "o", "attn.o", "attn.proj"),
        # the shortcut of a block that pools reads the norm, too
        Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="drop_path1", inner="attn"),
        Row("norm", "norm", "norm2", "norm2"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="drop_path2"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.act",)
    gives = ("pooled", "maps")
    tiny = ("hiera-t", {"img_size": [64, 64], "embed_dim": 12, "stages": [1, 1, 2, 2]})

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """As timm; `img_size` may be a number."""
        size = kwargs.get("img_size")
        if isinstance(size, int):
            size = kwargs["img_size"] = (size, size)
        module: Any = super().build(name, pretrained=pretrained, **kwargs)
        if size is None:
            return module  # type: ignore[no-any-return]
        whole = [stride * unit for stride, unit in zip(module.patch_stride, module.mask_unit_size)]
        if any(side % each for side, each in zip(size, whole)):
            raise ConfigError(
                f"img_size is {tuple(size)}; '{name}' looks at mask units of {whole[0]} x {whole[1]} pixels, so sides have to be "
                "multiples of these."
            )
        return at_size(module, size)

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """A map of every stage."""
        self.check_wanted(want)
        self.check_size(*inputs)
        module: Any = self.module
        tokens, maps = module.forward_features(*inputs, return_intermediates=True, **kwargs)
        found: dict[str, Any] = {"maps": [m.permute(0, 3, 1, 2) for m in maps]}
        if "pooled" in want:
            found["pooled"] = module.forward_head(tokens, pre_logits=True).contiguous()
        return {name: found[name] for name in want}

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, and of the head's norm."""
        module: Any = self.module
        common = {"name": "patch_embed", "role": "patch", "path": "patch_embed.proj", "module": module.patch_embed.proj}
        patch = make_linear(module.patch_embed.proj, None, "", 0, common)
        found: list[Point] = [] if patch is None else [patch]
        stage = number = 0
        for i, block in enumerate(module.blocks):
            if i - 1 in module.stage_ends:
                stage, number = stage + 1, 0
            attention = block.attn
            # tokens stand row by row once all units are taken up by the pooling, which the first block of a stage does inside
            units, size = module.reroll.schedule[i]
            table = self.block_table if not _takes_no_prompts(block) else self.block_table[1:]
            points = self.points_of_block(
                block,
                f"stages.{stage}.blocks.{number}",
                f"blocks.{i}",
                attention.dim_out,
                attention.heads,
                table=table,
                block=number,
                stage=stage,
                layout=None if units or attention.q_stride > 1 else Layout(0, tuple(size)),
                attention={
                    "head_dim": attention.head_dim,
                    "window": attention.window_size * attention.q_stride if attention.use_mask_unit_attn else None,
                },
            )
            for point in points:
                if point.kind in ("block", "sublayer") and point.role != "mlp":
                    point.dim_in = attention.dim
            found += points
            number += 1
        norm = find(module, "head.norm")
        if norm is not None and norm_dim(norm):
            dim = norm_dim(norm)
            found.append(NormPoint(name="norm", role="norm", path="head.norm", module=norm, dim_in=dim, dim_out=dim))
        return found

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """More keys and values where attention is global, prompts of one block too.

        Raises:
            AttachError: the attention is that of mask units, prompts are to flow, queries.
        """
        block: Any = self.module.get_submodule(point.path if point.kind == "tokens" else point.path.rpartition(".")[0])
        attention = block.attn
        if attention.use_mask_unit_attn:
            able = [p.name for p in self.points() if p.kind == "attention" and getattr(p, "window", None) is None]
            raise AttachError(
                f"the attention at '{point.name}' is that of mask units of {attention.window_size} tokens, a fixed number. "
                f"More keys and values can be had at {', '.join(able) or 'no point of it'}. Name these as targets."
            )
        if verb == "query":
            raise AttachError(
                f"the attention at '{point.name}' is a MaskUnitAttention; queries are described for attentions that do not pool. "
                "Leave the point out of the targets."
            )
        if options.get("keep") or options.get("pooled"):
            raise AttachError(
                f"prompts cannot leave '{point.name}': tokens of a Hiera are pooled by four and averaged at the end. Use prompts "
                "of one block, with the pooling over the patches."
            )
        op = recorder(session, point, verb, module)
        source: Any = Given(module)
        if verb == "prompt":
            through: tuple[Any, ...] = (block.norm1, attention.qkv, nn.Identity())
            project = FusedKeys(block.norm1, attention.qkv, nn.Identity(), attention.heads)
            source = Prompts(session.owner, module, through, project)
        op(attention, GlobalSite, "forward", source)


def _takes_no_prompts(block: Any) -> bool:
    """Whether tokens of a block's own cannot stand beside the others: there are units, or four tokens become one."""
    return bool(block.attn.use_mask_unit_attn or block.attn.q_stride > 1)
