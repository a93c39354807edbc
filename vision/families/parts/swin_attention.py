"""Prefixes and prompts on timm's `SwinTransformer`. See `zoo.engine.attention` for the idea.

Tokens see each other within a window. Extra keys and values are the same for all windows of an image, and their relative
position bias and shift mask are zero. Windows are batch-major: those of image i are rows i * W to (i + 1) * W.

Prompts that flow (VPT-shallow) stand beside the map (B, H, W, d), as (B, T, d). In each block they are in every window and
ask there too, and what they read is averaged over the windows of their image; residual sums and MLP run on them as on any
token. Patch merging takes each prompt four times for four neighbours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.engine.attention import AttentionSite, FusedKeys, Given, Prompts, heads, prepend, recorder
from zoo.engine.memory import recomputable
from zoo.engine.second_order import exact
from zoo.engine.sites import BlockSite, Site, State
from zoo.points import Point, TokensPoint

if TYPE_CHECKING:
    from zoo import Backbone
    from zoo.points.recorder import Recorder


def window_bias(
    table: Tensor, offsets: Tensor, mask: Tensor | None, dtype: torch.dtype, extra: int, asking: int, images: int
) -> Tensor:
    """What is added to the scores: zero for all but the window's own N tokens.

    table (offsets in a window, h); offsets (N, N), an index into it; mask (W, N, N) of shifted windows, or None
    -> (1 or images * W, h, asking + N, extra + N).
    """
    bias = table[offsets.flatten()].unflatten(0, offsets.shape).permute(2, 0, 1).unsqueeze(0)
    if mask is not None:
        bias = bias + mask.unsqueeze(1)
    bias = F.pad(bias.to(dtype), (extra, 0, asking, 0))
    return bias if mask is None else bias.repeat(images, 1, 1, 1)


@dataclass(eq=False)
class WindowSite(AttentionSite):
    """timm's `WindowAttention`, with extra keys and values, and with prompts that flow."""

    images: int | None = None  # B; windows alone do not tell
    prompts: Tensor | None = None  # flowing prompts, normed (B, T, d)
    asking: bool = False  # whether they ask too, or only give keys and values
    answers: Tensor | None = None  # what they read (B, T, d)

    def reset(self) -> None:
        """Also forget what a forward pass that broke off has left."""
        super().reset()
        self.prompts = self.answers = None

    @property
    def fused(self) -> bool:
        """Also where timm by default keeps Swin from the fused product: with more keys it saves time and half the bytes.

        Gates alone bring no keys into it: the product is the library's then, to the bit.
        """
        gated = bool(self.forwards) and all(op.verb == "gate" for op in self.forwards)
        return bool(self.module.fused_attn) or (use_fused_attn() and not gated)

    def compared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as the product takes them."""
        return q, k

    def table(self) -> Tensor:
        """The bias of each offset in a window, (offsets, h)."""
        return self.module.relative_position_bias_table  # type: ignore[return-value]

    def extended(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B * W, N, d), mask (W, N, N) or None -> (B * W, N, d)."""
        attention: Any = self.module
        count = attention.num_heads
        images = self.images or x.shape[0]
        q, k, v = heads(attention.qkv(x), count)
        prompts, self.prompts = self.prompts, None
        flowing = asking = 0
        if prompts is not None:
            q_p, k_p, v_p = heads(attention.qkv(prompts), count)
            k, v = recomputable(prepend, k, k_p), recomputable(prepend, v, v_p)
            flowing = prompts.shape[1]
            if self.asking:
                q, asking = recomputable(prepend, q, q_p), flowing
        q, k = self.compared(q, k)
        table = self.table()

        def bias(extra: int, images: int, index: Tensor | None) -> Tensor:
            place = (table, attention.relative_position_index, mask)
            return recomputable(window_bias, *place, q.dtype, extra + flowing, asking, images, constant=True)

        y = self.attend(q, k, v, images, bias).transpose(1, 2)  # (B * W, asking + N, h, c)
        if asking:
            read = y[:, :asking].flatten(2).unflatten(0, (images, -1)).mean(dim=1)
            self.answers = attention.proj_drop(attention.proj(read))
        return attention.proj_drop(attention.proj(y[:, asking:].flatten(2)))


@dataclass(eq=False)
class Flow:
    """The prompts of one adapter on their way through the stages."""

    module: nn.Module
    held: Tensor | None = None  # (B, T, d) between two blocks

    def start(self, images: int, state: State) -> None:
        """New prompts."""
        self.held = state.tokens(self.module, images).expand(images, -1, -1)

    def take(self) -> Tensor:
        """Hand the prompts over."""
        held, self.held = self.held, None
        assert held is not None, "prompts were taken before the first block"
        return held

    def join(self, x: Tensor) -> Tensor:
        """Map (B, H, W, d) -> (B, 1, T + H W, d): one row of tokens, prompts first, for the final norm and the pooling."""
        return torch.cat([self.take(), x.flatten(1, 2)], dim=1).unsqueeze(1)


@dataclass(eq=False)
class Merge:
    """Takes prompts through a patch merging, behind the tokens."""

    flow: Flow
    merging: Any

    def __call__(self, x: Tensor) -> None:
        """(B, T, d) -> (B, T, 2 d)."""
        self.flow.held = self.merging.reduction(self.merging.norm(self.flow.take().repeat(1, 1, 4)))


@dataclass(eq=False)
class Pass:
    """The way of flowing prompts through one block."""

    flow: Flow
    first: bool  # they start here
    read: bool  # what becomes of them is read by somebody


@dataclass(eq=False)
class WindowBlock(BlockSite):
    """timm's `SwinTransformerBlock`: tells its attention the number of images, and takes prompts through."""

    @property
    def attention(self) -> Any:
        """The site that stands for the block's attention; the attention itself if none does."""
        return self.module.attn.forward.__self__  # type: ignore[union-attr]

    def original(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The block's own forward."""
        if isinstance(self.attention, WindowSite):
            self.attention.images = x.shape[0]
        return super().original(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, H, W, d) -> (B, H, W, d)."""
        passes: list[Any] = [op.fn for op in self.forwards if op.verb == "flow"]  # `Pass`es
        if not passes:
            return super().forward(x)
        for op in self.forwards:
            self._seen(op)
        for each in passes:
            if each.first:
                each.flow.start(x.shape[0], self.state)
        held = [each.flow.take() for each in passes]
        prompts = torch.cat(held, dim=1)
        read = any(each.read for each in passes)
        if self.checkpointed and torch.is_grad_enabled() and not exact():
            run: Any = self.prompted
            if not torch.compiler.is_compiling():
                run = functools.partial(self.state.run_at, self.state.place(), run)
            x, prompts = checkpoint(run, x, prompts, read, use_reentrant=False)
        else:
            x, prompts = self.prompted(x, prompts, read)
        for each, part in zip(passes, prompts.split([h.shape[1] for h in held], dim=1)):
            each.flow.held = part if each.read else None
        return x

    def prompted(self, x: Tensor, prompts: Tensor, read: bool) -> tuple[Tensor, Tensor]:
        """The block on x (B, H, W, d) and prompts (B, T, d); without `read` the prompts give keys and values only."""
        block: Any = self.module
        site, state = self.attention, self.state
        count = prompts.shape[1]
        site.images, site.asking = x.shape[0], read
        if not read:
            state.aside = True
            try:
                site.prompts = block.norm1(prompts)
            finally:
                state.aside = False
            return self.original(x), prompts
        tokens = torch.cat([prompts, x.flatten(1, 2)], dim=1)
        normed = block.norm1(tokens)
        site.prompts = normed[:, :count]
        windows = block._attn(normed[:, count:].reshape(x.shape))
        answers, site.answers = site.answers, None
        tokens = tokens + block.drop_path1(torch.cat([answers, windows.flatten(1, 2)], dim=1))  # type: ignore[list-item]
        tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
        return tokens[:, count:].reshape(x.shape), tokens[:, :count]


@dataclass(frozen=True)
class Kinds:
    """What stands at the attentions, blocks and mergings of one version of Swin."""

    window: type[WindowSite] = WindowSite
    block: type[WindowBlock] = WindowBlock
    merge: type[Merge] = Merge
    excludes: tuple[str, ...] = ()  # verbs of other adapters at a block or attention through which prompts flow

    def prompts(self, owner: str, module: nn.Module, block: Any) -> Prompts:
        """Keys and values of prompts of one block."""
        attention = block.attn
        through = (block.norm1, attention.qkv, nn.Identity())
        return Prompts(owner, module, through, FusedKeys(*through, attention.num_heads))


def record(
    family: Backbone,
    session: Recorder,
    point: Point,
    block: nn.Module,
    verb: str,
    module: nn.Module,
    keep: bool = False,
    pooled: bool = False,
    replace: bool = False,
    kinds: Kinds | None = None,
) -> None:
    """Record the ops of `extend`, `gate` and `prompt`; see `vision.families.parts.attention.record`.

    `replace` is refused by the point: prompts flow from the first block on.
    """
    backbone: Any = family.module
    attention: Any = block.attn
    kinds = kinds or Kinds()
    op = recorder(session, point, verb, module)
    last = backbone.layers[-1].blocks[-1]
    if not keep and not (pooled and block is last):
        source: Any = Given(module)
        if verb == "prompt":
            source = kinds.prompts(session.owner, module, block)
        op(attention, kinds.window, "forward", source)
        op(block, kinds.block, "forward", None, "windows")
        return
    assert isinstance(point, TokensPoint)
    flow = Flow(module)
    passing: dict[str, Any] = {"verb": "flow", "per_row": False, "excludes": ("replace", *kinds.excludes)}
    for number, stage in enumerate(backbone.layers):
        if keep and number and not isinstance(stage.downsample, nn.Identity):
            op(stage.downsample, Site, "watch_input", kinds.merge(flow, stage.downsample), per_row=False)
        for each in stage.blocks:
            if keep or each is last:
                op(each.attn, kinds.window, "forward", None, **passing)
                op(each, kinds.block, "forward", Pass(flow, each is block, each is not last or pooled), **passing)
    if pooled:
        op(backbone.norm, Site, "input", flow.join, per_row=False)
