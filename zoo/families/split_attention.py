"""Prefixes and prompts on attentions of transformers that project queries, keys and values apart (`zoo.engine.attention`).

    y = W_o concat_h(softmax(q k^T s + M) v),  q = R W_q x,  k = R W_k x,  v = W_v x

M is a mask or a bias of relative positions, R turns queries and keys of patches by their place (rotary positions); both may be
absent. Extra keys are behind R and get neither mask nor bias: they have no place. Prompts that flow stand behind the prefix
tokens ([class, registers | prompts | patches]), are not turned, and get no bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.engine.attention import AttentionSite, Given, Prompts, SplitKeys, by_head, mask_bias, recorder
from zoo.engine.changes import OnOutput
from zoo.engine.kept import Insert, Overwrite, kept
from zoo.engine.sites import BlockSite, Site
from zoo.errors import AttachError
from zoo.points import Point, TokensPoint

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

# What the library calls the same thing in one attention or another
QUERY, KEY, VALUE = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")
OUTPUT = ("o_proj", "out_proj")
WIDTH, SCALE = ("head_dim", "attention_head_size"), ("scaling", "scale")
DROPOUT = ("attention_dropout", "dropout_prob", "dropout")


def named(attention: Any, names: tuple[str, ...]) -> Any:
    """The first of these attributes that there is; None without any."""
    return next((getattr(attention, name) for name in names if hasattr(attention, name)), None)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, h, N, c), the last of whose tokens are turned by their angles (n, c); n <= N."""
    prefix, patches = x.split((x.shape[-2] - sin.shape[-2], sin.shape[-2]), dim=-2)
    half = patches.shape[-1] // 2
    turned = torch.cat((-patches[..., half:], patches[..., :half]), dim=-1)
    return torch.cat((prefix, (patches * cos) + (turned * sin)), dim=-2)


def widened(bias: Tensor, extra: int, at: int) -> Tensor:
    """A bias (..., N, N) for `extra` tokens behind the first `at`, which have none: (..., N + extra, N + extra)."""
    wide = torch.cat([bias[..., :at], bias.new_zeros(*bias.shape[:-1], extra), bias[..., at:]], dim=-1)
    rows = wide.new_zeros(*wide.shape[:-2], extra, wide.shape[-1])
    return torch.cat([wide[..., :at, :], rows, wide[..., at:, :]], dim=-2)


@dataclass(eq=False)
class SplitAttention(AttentionSite):
    """A self-attention of three projections and mostly an output projection, extended; it answers (y, None)."""

    @property
    def fused(self) -> bool:
        """Whether the library would use a fused product."""
        return self.module.config._attn_implementation != "eager"  # type: ignore[union-attr]

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(named(self.module, SCALE))

    @property
    def dropout(self) -> float:
        """Of the attention weights, 0 in evaluation."""
        return float(named(self.module, DROPOUT)) if self.module.training else 0.0

    def extended(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """x (B, N, d) -> (B, N, d). Extra keys are seen by every query, masked or not."""
        attention: Any = self.module
        q, k, v = self.project(hidden_states)
        if position_embeddings is not None:
            q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
        if attention_mask is not None and attention_mask.shape[-1] < k.shape[2]:
            attention_mask = widened(attention_mask, k.shape[2] - attention_mask.shape[-1], 1)
        y = self.attend(q, k, v, hidden_states.shape[0], mask_bias(attention_mask)).transpose(1, 2).flatten(2)
        out = named(attention, OUTPUT)
        return (y if out is None else out(y)), None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, d) -> queries, keys and values, each (B, h, N, c)."""
        width = named(self.module, WIDTH)
        q, k, v = (by_head(named(self.module, names)(x), width) for names in (QUERY, KEY, VALUE))
        return q, k, v


def record(
    session: Recorder,
    point: Point,
    verb: str,
    module: nn.Module,
    *,
    block: Any,
    attention: Any,
    norm: nn.Module | None,
    leave: tuple[nn.Module, str] | None,
    options: dict[str, Any],
    kind: type[AttentionSite] = SplitAttention,
    masked: Iterable[nn.Module] = (),
    blocks: Sequence[nn.Module] = (),
) -> None:
    """Record the ops of `extend` and `prompt` at a block of this kind.

    Args:
        block, attention, norm: the residual block, its attention, and the norm in front of that (None: there is none).
        leave: the module, and its "input" or "output", where prompts that flow are taken out; None: they stay, and take part
            in the pooling.
        options: of the verb. A prompt is kept as a token if `options["keep"]`.
        kind: the site of the attention.
        masked: attentions whose mask or bias must grow with the prompts that flow.
        blocks: all of the sequence, where prompts can be made anew in later ones.

    Raises:
        AttachError: queries of their own.
    """
    op = recorder(session, point, verb, module)
    if verb in ("extend", "gate"):
        op(attention, kind, "forward", Given(module))
    elif verb == "prompt" and options.get("replace"):
        op(block, BlockSite, "input", Overwrite(module, *kept(session, point, blocks)), per_row=False)
    elif verb == "prompt" and options["keep"]:
        assert isinstance(point, TokensPoint)
        insert = Insert(module, point.num_prefix, session.site(block, BlockSite))
        op(block, BlockSite, "input", insert, per_row=False)
        for each in masked:
            op(each, kind, "forward", None, "flow", per_row=False)
        if leave is not None:
            strip = insert.strip if leave[1] == "input" else OnOutput(insert.strip)
            op(leave[0], BlockSite if leave[1] == "output" else Site, leave[1], strip, per_row=False)
    elif verb == "prompt":
        keys, values = named(attention, KEY), named(attention, VALUE)
        project = SplitKeys(norm, keys, values, named(attention, WIDTH))
        through = (*(() if norm is None else (norm,)), keys, values)
        op(attention, kind, "forward", Prompts(session.owner, module, through, project))
    else:
        raise AttachError(
            f"'{verb}' is not available at '{point.name}': tokens that only query are described for timm's attentions."
        )
