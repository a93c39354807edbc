"""Which of our attentions describes one of timm's: prefixes and prompts on timm's ViT and Swin. See `zoo.engine.attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.layers.attention import Attention
from timm.layers.diff_attention import DiffAttention
from timm.models.swin_transformer import WindowAttention
from torch import nn

from vision.families.parts.vit_blocks import flows
from zoo.errors import AttachError
from zoo.points import Point

if TYPE_CHECKING:
    from zoo import Backbone
    from zoo.points.recorder import Recorder


def record(family: Backbone, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
    """Record the ops of `point.extend(module)` and `point.prompt(module, keep, pooled)`.

    Raises:
        AttachError: an attention of a class that is not described here.
    """
    path = point.path if point.kind == "tokens" else point.path.rpartition(".")[0]
    block = family.module.get_submodule(path)
    attention = getattr(block, "attn", block) if point.kind == "tokens" else point.module
    if type(attention) in (Attention, DiffAttention) or (point.kind == "tokens" and flows(block, options)):
        from vision.families.parts.vit_attention import record as put
    elif type(attention) is WindowAttention:
        from vision.families.parts.swin_attention import record as put
    else:
        raise AttachError(
            f"the attention at '{point.name}' is a {type(attention).__name__}; more keys and values are described for timm's "
            "Attention and WindowAttention. Use a backbone with one of these, or leave the point out of the targets."
        )
    put(family, session, point, block, verb, module, **options)
