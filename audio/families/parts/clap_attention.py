"""CLAP's windowed attention on whole maps, and more keys and values for it.

The library's block turns a map round, cuts it into windows and puts them together around its attention, so a branch would be seen
in windows on one side and whole on the other. `MapAttention` takes that over: the same operations on the same parameters, in the
same order. The block then has one window, the map itself; only its `window_size` and `shift_size`, and the class of its
attention, are others while it is ours.

    A_ij = q_i . k_j / sqrt(c) + T(i, j) + M_ij      T: table of relative places; M hides what the turning brought together

Extra keys have no place and are hidden nowhere; all windows share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clap import modeling_clap as clap

from zoo.engine.attention import AttentionSite, Given, Prompts, SplitKeys, by_head, recorder
from zoo.errors import AttachError

if TYPE_CHECKING:
    from zoo.points import Point
    from zoo.points.recorder import Recorder

LIBRARY: Any = clap  # its functions on windows carry no types


class MapAttention(LIBRARY.ClapAudioAttention):  # type: ignore[misc, name-defined]
    """Tokens of a map (B, H H, d) -> the same, through turned windows."""

    side: int
    window: int
    shift: int

    @property
    def windows(self) -> int:
        """How many there are in a map."""
        return int((-(-self.side // self.window)) ** 2)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, output_attentions: Any = False) -> Any:
        """(tokens (B, H H, d),)."""
        side, window, shift = self.side, self.window, self.shift
        batch, _, width = hidden_states.shape
        missing = -side % window
        x = F.pad(hidden_states.view(batch, side, side, width), (0, 0, 0, missing, 0, missing))
        x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2)) if shift else x
        cut = LIBRARY.window_partition(x, window).view(-1, window * window, width)
        place = SimpleNamespace(window_size=window, shift_size=shift)
        whole = side + missing
        mask = LIBRARY.ClapAudioLayer.get_attn_mask(place, whole, whole, dtype=x.dtype, device=x.device)
        y, *rest = super().forward(cut, mask, output_attentions)
        y = LIBRARY.window_reverse(y.view(-1, window, window, width), window, whole, whole)
        y = torch.roll(y, shifts=(shift, shift), dims=(1, 2)) if shift else y
        y = y[:, :side, :side].contiguous() if missing else y
        return (y.view(batch, side * side, width), *rest)


def opened(module: nn.Module) -> nn.Module:
    """The network with attentions on whole maps, in place."""
    layer: Any
    for layer in module.modules():
        if type(layer) is LIBRARY.ClapAudioLayer and type(layer.attention) is LIBRARY.ClapAudioAttention:
            side, window = int(min(layer.input_resolution)), int(layer.window_size)
            attention: Any = layer.attention
            attention.library = (layer.window_size, layer.shift_size)
            attention.side, attention.window = side, min(side, window)
            attention.shift = 0 if side <= window else int(layer.shift_size)
            layer.window_size, layer.shift_size = side, 0
            attention.__class__ = MapAttention
            attention.self.windows = attention.windows
    return module


def closed(module: nn.Module) -> nn.Module:
    """The network as the library has it, in place."""
    layer: Any
    for layer in module.modules():
        attention: Any = getattr(layer, "attention", None)
        if isinstance(attention, MapAttention):
            layer.window_size, layer.shift_size = attention.library
            for name in ("library", "side", "window", "shift"):
                del attention.__dict__[name]
            del attention.self.__dict__["windows"]
            attention.__class__ = LIBRARY.ClapAudioAttention
    return module


@dataclass(eq=False)
class ClapSite(AttentionSite):
    """The attention inside of the windows, extended; it answers (y,)."""

    @property
    def fused(self) -> bool:
        """The library computes the plain product."""
        return False

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.module.attention_head_size) ** -0.5  # type: ignore[arg-type]

    @property
    def dropout(self) -> float:
        """Of the attention weights, 0 in evaluation."""
        attention: Any = self.module
        return float(attention.dropout.p) if attention.training else 0.0

    def extended(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any) -> Any:  # type: ignore[override]
        """Windows (B W, N, d), mask (W, N, N) or None -> (B W, N, d). Extra keys are seen by every token."""
        attention: Any = self.module
        width, windows = attention.attention_head_size, int(attention.windows)
        q, k, v = (by_head(p(hidden_states), width) for p in (attention.query, attention.key, attention.value))
        places = attention.relative_position_bias_table[attention.relative_position_index.view(-1)]
        own = places.view(q.shape[2], q.shape[2], -1).permute(2, 0, 1).unsqueeze(0)
        own = own if attention_mask is None else own + attention_mask.unsqueeze(1)

        def bias(extra: int, images: int, index: Tensor | None) -> Tensor:
            wide = F.pad(own.to(q.dtype), (extra, 0))
            return wide if len(wide) == 1 else wide.repeat(images, 1, 1, 1)

        return (self.attend(q, k, v, len(q) // windows, bias).transpose(1, 2).flatten(2),)


def record(
    session: Recorder, point: Point, verb: str, module: nn.Module, block: Any, keep: bool = False, pooled: bool = False
) -> None:
    """Record the ops of `extend` and `prompt`.

    Raises:
        AttachError: tokens that flow, or that only query: a map has no place for them.
    """
    op, attention = recorder(session, point, verb, module), block.attention.self
    if verb in ("extend", "gate"):
        op(attention, ClapSite, "forward", Given(module))
    elif verb == "prompt" and not keep and not pooled:
        through = (block.layernorm_before, attention.key, attention.value)
        project = SplitKeys(*through, attention.attention_head_size)
        op(attention, ClapSite, "forward", Prompts(session.owner, module, through, project))
    else:
        raise AttachError(
            f"'{verb}' is not available in this form at '{point.name}': the blocks of CLAP hand on maps, in which further tokens "
            "have no place. Prompts of one block each (vpt, deep=True) work."
        )
