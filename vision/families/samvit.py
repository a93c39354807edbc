"""timm's `VisionTransformerSAM`: the image encoder of Segment Anything, maps (B, H, W, d) in windows, now and then as a whole.

    u = x + DP(LS(Attn(LN1 x)))        y = u + DP(LS(MLP(LN2 u)))        then a neck of two convolutions, (B, C, H, W)

Attention adds biases by relative rows and columns. In most blocks it sees windows (B * nW, M, M, d), batch-major, filled up with
zeros at the edges (which are keys like others): there the sublayer `attn` is that of windows, padding included, and what stands
beside it cannot read the residual stream, which is a map. Prefixes and prompts of one block are in every window, without relative
bias. Prompts that flow, and queries of an adapter's own, would have no place in the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.vision_transformer_sam import (
    VisionTransformerSAM,
    get_decomposed_rel_pos_bias,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from vision.families.parts.timm_family import OPTIONS, TimmBackbone
from zoo.engine.attention import AttentionSite, FusedKeys, Given, Prompts, heads, recorder
from zoo.engine.sites import BlockSite
from zoo.errors import AttachError
from zoo.heads.base import not_held
from zoo.points import Layout, NormPoint, Point, SublayerPoint
from zoo.points.rows import Row, find, make_linear, norm_dim
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

INSIDE = (
    Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3)),
    Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
    Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3)),
    Row("norm", "norm", "attn.q_norm", "attn.q_norm"),
    Row("norm", "norm", "attn.k_norm", "attn.k_norm"),
    Row("attention", "attn", "attn.product", "attn"),
    Row("linear", "o", "attn.o", "attn.proj"),
)
BEHIND = (
    Row("norm", "norm", "norm2", "norm2"),
    Row("linear", "up", "mlp.up", "mlp.fc1"),
    Row("linear", "down", "mlp.down", "mlp.fc2"),
    Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="drop_path2"),
    Row("block", "block", "", ""),
)
FRONT = (Row("tokens", "tokens", "tokens", ""), Row("norm", "norm", "norm1", "norm1"))
WHOLE = (*FRONT, *INSIDE, Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="drop_path1"), *BEHIND)
WINDOWS = (*FRONT, *INSIDE, Row("sublayer", "attn", "attn", "attn", entry="attn:input", exit="drop_path1"), *BEHIND)


@dataclass(eq=False, kw_only=True)
class WindowedSublayer(SublayerPoint):
    """Attention in windows, (B * nW, M, M, d)."""

    def parallel(self, module: nn.Module, source: str = "input") -> None:
        """As everywhere, but the residual stream in front of the norm is a map, and no windows."""
        if source == "residual":
            raise AttachError(
                f"the sublayer at '{self.name}' gives windows, and the residual stream is a map: what reads it cannot stand "
                "beside the attention. Use source='input', or leave the point out of the targets."
            )
        super().parallel(module, source)


@dataclass(eq=False)
class SamAttention(AttentionSite):
    """timm's attention of SAM, with more keys and values, which have no relative bias."""

    images: int | None = None  # B; windows alone do not tell

    def extended(self, x: Tensor) -> Tensor:
        """x (B * nW, H, W, d) -> the same."""
        attention: Any = self.module
        rows, height, width, _ = x.shape
        count, images = attention.num_heads, self.images or rows
        q, k, v = heads(attention.qkv(x.flatten(1, 2)), count)
        q, k = attention.q_norm(q), attention.k_norm(k)
        own: Tensor | None = None
        if attention.use_rel_pos:
            size = (height, width)
            flat = q.reshape(rows * count, height * width, -1)
            own = get_decomposed_rel_pos_bias(flat, attention.rel_pos_h, attention.rel_pos_w, size, size)
            own = own.unflatten(0, (rows, count))
        elif attention.rope is not None:
            rope = attention.rope.get_embed()
            q, k = apply_rot_embed_cat(q, rope).type_as(v), apply_rot_embed_cat(k, rope).type_as(v)

        def bias(extra: int, several: int, index: Tensor | None) -> Tensor | None:
            if own is None:
                return None
            windows = rows // images
            mine = own
            if index is not None:
                among = torch.arange(windows, device=own.device)
                mine = own.index_select(0, (index[:, None] * windows + among).flatten())
            return F.pad(mine, (extra, 0))

        y = self.attend(q, k, v, images, bias).transpose(1, 2).flatten(2)
        return attention.proj_drop(attention.proj(y)).view(rows, height, width, -1)  # type: ignore[no-any-return]


@dataclass(eq=False)
class SamBlock(BlockSite):
    """timm's block of SAM: tells its attention the number of images."""

    def original(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The block's own forward."""
        site = getattr(self.module.attn.forward, "__self__", None)  # type: ignore[union-attr]
        if isinstance(site, SamAttention):
            site.images = len(x)
        return super().original(x)  # type: ignore[no-any-return]


@register_backbone
class SamViT(TimmBackbone):
    """timm's VisionTransformerSAM."""

    family = "samvit"
    timm_class = VisionTransformerSAM
    timm_modules = ("vision_transformer_sam",)
    aliases = {
        "sam-b16": "timm:samvit_base_patch16.sa1b",
        "sam-l16": "timm:samvit_large_patch16.sa1b",
        "sam-h16": "timm:samvit_huge_patch16.sa1b",
    }
    saved_options = {
        **OPTIONS,
        "global_attn_indexes": range(257),
        "neck_chans": range(16385),
        "head_hidden_size": range(1, 16385),
        **dict.fromkeys(("use_abs_pos", "use_rel_pos", "use_rope"), bool),
    }
    block_table = WHOLE
    elementwise = ("mlp.act",)
    gives = ("pooled", "maps")
    plain_blocks = True
    tiny = (
        "sam-b16",
        {
            "img_size": 32,
            "patch_size": 8,
            "window_size": 3,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "global_attn_indexes": [1],
            "neck_chans": 16,
        },
    )

    def take_head(self) -> nn.Module | None:
        """timm's linear classifier; the pooling in front of it stays."""
        head: Any = self.module.head
        own = head.fc
        self.module.reset_classifier(0)  # type: ignore[operator]
        return own if isinstance(own, nn.Linear) and self.pools else None

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` (a linear one on the pooled features) the classifier of a merged module."""
        if not isinstance(head, nn.Linear) or head.in_features != self.feature_dim:
            raise not_held("timm")
        module.reset_classifier(head.out_features)  # type: ignore[operator]
        own: Any = module.head.fc  # type: ignore[union-attr]
        own.load_state_dict(head.state_dict())
        own.to(device=head.weight.device, dtype=head.weight.dtype)

    def head_path(self) -> str | None:
        """Where timm keeps the classifier."""
        return "head.fc"

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """The map behind the neck."""
        self.check_wanted(want)
        self.check_size(*inputs)
        module: Any = self.module
        map_ = module.forward_features(*inputs, **kwargs)
        found: dict[str, Any] = {"maps": [map_]}
        if "pooled" in want:
            found["pooled"] = module.forward_head(map_, pre_logits=True).contiguous()
        return {name: found[name] for name in want}

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Those of the neck."""
        module: Any = self.module
        neck = [m for m in module.neck.modules() if isinstance(m, nn.Conv2d)]
        return (neck[-1].out_channels if neck else int(module.embed_dim),)

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, H, W, d) plus the attention of its windows, or plus the MLP."""
        if role == "mlp":
            return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        size, y, padded = (x.shape[1], x.shape[2]), block.norm1(x), None
        if block.window_size > 0:
            y, padded = window_partition(y, block.window_size)
        y = block.drop_path1(block.ls1(block.attn(y)))
        return x + (y if padded is None else window_unpartition(y, block.window_size, size, padded))

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, and of the neck."""
        module: Any = self.module
        found: list[Point] = []
        self._add(found, "patch_embed", "patch", "patch_embed.proj")
        self._add(found, "norm_pre", "norm", "norm_pre")
        for i, block in enumerate(module.blocks):
            name, attention, side = f"blocks.{i}", block.attn, block.window_size
            points = self.points_of_block(
                block,
                name,
                name,
                int(module.embed_dim),
                attention.num_heads,
                table=WINDOWS if side else WHOLE,
                block=i,
                layout=Layout(0, tuple(module.patch_embed.grid_size), (side, side) if side else None),
                attention={"head_dim": attention.head_dim, "window": side * side or None},
                tokens={"first": i == 0},
            )
            found += [_windowed(p) if side and p.kind == "sublayer" and p.role == "attn" else p for p in points]
        neck = module.neck if isinstance(module.neck, nn.Sequential) else ()
        for i in range(len(neck)):
            self._add(found, f"neck.{i}", "neck", f"neck.{i}")
        if not neck:
            self._add(found, "norm", "norm", "neck")
        self._add(found, "head.norm", "norm", "head.norm")
        self._add(found, "pre_logits", "proj", "head.pre_logits.fc")
        return found

    def _add(self, found: list[Point], name: str, role: str, path: str) -> None:
        module = find(self.module, path)
        if module is None:
            return
        common: dict[str, Any] = {"name": name, "role": role, "path": path, "module": module}
        point = make_linear(module, None, "", 0, common)
        if point is not None:
            found.append(point)
        elif dim := norm_dim(module):
            first = type(module).__name__.endswith("2d")
            found.append(NormPoint(**{**common, "role": "norm"}, dim_in=dim, dim_out=dim, channels_first=first))

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Prefixes, and prompts of one block.

        Raises:
            AttachError: queries, and prompts that flow.
        """
        if verb == "query" or options.get("keep") or options.get("pooled"):
            what = "queries of an adapter" if verb == "query" else "prompts that leave their block"
            raise AttachError(
                f"{what} have no place in the maps of '{self.family}' (at '{point.name}'). Prefixes, and prompts of every block "
                "of its own, do."
            )
        path = point.path if point.kind == "tokens" else point.path.rpartition(".")[0]
        block: Any = self.module.get_submodule(path)
        attention = block.attn
        op = recorder(session, point, verb, module)
        source: Any = Given(module)
        if verb == "prompt":
            through: tuple[Any, ...] = (block.norm1, attention.qkv, attention.k_norm)
            project = FusedKeys(block.norm1, attention.qkv, attention.k_norm, attention.num_heads)
            source = Prompts(session.owner, module, through, project)
        op(attention, SamAttention, "forward", source)
        op(block, SamBlock, "forward", None, "windows")


def _windowed(point: Any) -> WindowedSublayer:
    return WindowedSublayer(**{f.name: getattr(point, f.name) for f in fields(point)})
