"""SAM's attention, windows included: its input and output are whole maps, and more keys and values.

The library's block cuts maps into windows and puts them together around its attention, so a branch would be seen in windows on
one side and whole on the other. `MapAttention` (and the one on torch's fused product) takes the cutting over: the same
operations on the same parameters, in the same order; only the class of the module and the block's own `window_size` are others
while it is ours.

    A_ij = q_i . k_j / sqrt(c) + q_i . R_h(i, j) + q_i . R_w(i, j)           in windows of w x w places, or the whole map

R are tables of relative rows and columns. Extra keys have no place; all windows share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionLayer, SamVisionSdpaAttention

from zoo.engine.attention import AttentionSite, FusedKeys, Given, Prompts, heads, recorder
from zoo.errors import AttachError

if TYPE_CHECKING:
    from zoo.points import Point
    from zoo.points.recorder import Recorder


WINDOWS: Any = SamVisionLayer  # its two functions on windows look at no block


class _Maps:
    """Maps (B, H, W, d) -> maps, through windows."""

    map_window: int

    def forward(self, hidden_states: Tensor, output_attentions: Any = None) -> Any:
        """(map (B, H, W, d), weights or None)."""
        if not self.map_window:
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        windows, padded = WINDOWS.window_partition(None, hidden_states, self.map_window)
        y, weights = super().forward(windows, output_attentions)  # type: ignore[misc]
        size = hidden_states.shape[1:3]
        return WINDOWS.window_unpartition(None, y, self.map_window, padded, size), weights


class MapAttention(_Maps, SamVisionAttention):  # type: ignore[misc]
    """On the plain product."""


class FusedMapAttention(_Maps, SamVisionSdpaAttention):  # type: ignore[misc]
    """On torch's fused product."""


OURS = {SamVisionAttention: MapAttention, SamVisionSdpaAttention: FusedMapAttention}


def opened(module: nn.Module) -> nn.Module:
    """The network with attentions on whole maps, in place."""
    for layer in module.modules():
        attention: Any = getattr(layer, "attn", None)
        if isinstance(layer, SamVisionLayer) and type(attention) in OURS:
            attention.map_window, layer.window_size = layer.window_size, 0
            attention.__class__ = OURS[type(attention)]
    return module


def closed(module: nn.Module) -> nn.Module:
    """The network as the library has it, in place."""
    back = {ours: theirs for theirs, ours in OURS.items()}
    for layer in module.modules():
        attention: Any = getattr(layer, "attn", None)
        if isinstance(layer, SamVisionLayer) and type(attention) in back:
            layer.window_size = attention.__dict__.pop("map_window")
            attention.__class__ = back[type(attention)]
    return module


@dataclass(eq=False)
class MapSite(AttentionSite):
    """`MapAttention` extended; it answers (map, None)."""

    @property
    def fused(self) -> bool:
        """Whether the library would call torch's fused product."""
        return isinstance(self.module, SamVisionSdpaAttention)

    @property
    def dropout(self) -> float:
        """Of the attention weights, 0 in evaluation; the fused form of the library has none."""
        attention: Any = self.module
        return float(attention.dropout) if attention.training and not self.fused else 0.0

    def extended(self, hidden_states: Tensor, output_attentions: Any = None) -> Any:  # type: ignore[override]
        """Map (B, H, W, d) -> map. Extra keys are seen by every place."""
        attention: Any = self.module
        images, window, padded = len(hidden_states), attention.map_window, None
        x = hidden_states
        if window:
            x, padded = WINDOWS.window_partition(None, x, window)
        rows, height, width, _ = x.shape
        q, k, v = heads(attention.qkv(x).flatten(1, 2), attention.num_attention_heads)
        bias: Tensor | None = None
        if attention.use_rel_pos:
            size = (height, width)
            tables = attention.rel_pos_h, attention.rel_pos_w
            bias = attention.get_decomposed_rel_pos(q.flatten(0, 1), *tables, size, size)
            bias = bias.reshape(rows, -1, height * width, height * width)

        def added(extra: int, count: int, index: Tensor | None) -> Tensor | None:
            if bias is None:
                return None
            own = bias
            if index is not None:  # windows of an image stand together
                each = torch.arange(rows // images, device=index.device)
                own = own.index_select(0, (index[:, None] * (rows // images) + each).flatten())
            return F.pad(own, (extra, 0))

        y = self.attend(q, k, v, images, added).transpose(1, 2).flatten(2)
        y = attention.proj(y.unflatten(1, (height, width)))
        if window:
            y = WINDOWS.window_unpartition(None, y, window, padded, hidden_states.shape[1:3])
        return y, None


def record(
    session: Recorder, point: Point, verb: str, module: nn.Module, block: Any, keep: bool = False, pooled: bool = False
) -> None:
    """Record the ops of `extend` and `prompt`.

    Raises:
        AttachError: tokens that flow, or that only query: a map has no place for them.
    """
    op, attention = recorder(session, point, verb, module), block.attn
    if verb in ("extend", "gate"):
        op(attention, MapSite, "forward", Given(module))
    elif verb == "prompt" and not keep and not pooled:
        through = (block.layer_norm1, attention.qkv)
        project = FusedKeys(*through, nn.Identity(), attention.num_attention_heads)
        op(attention, MapSite, "forward", Prompts(session.owner, module, through, project))
    else:
        raise AttachError(
            f"'{verb}' is not available in this form at '{point.name}': the blocks of SAM hand on maps, in which further tokens "
            "have no place. Prompts of one block each (vpt, deep=True) work."
        )
