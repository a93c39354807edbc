"""Prefixes and prompts on attentions of transformers with `q_proj`, `k_proj` and `v_proj` (`zoo.engine.attention`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zoo.engine.attention import AttentionSite, Given, Prompts, SplitKeys, by_head, mask_bias, recorder
from zoo.engine.kept import Insert
from zoo.engine.session import OnOutput
from zoo.engine.sites import BlockSite, Site
from zoo.errors import AttachError
from zoo.points import Point, TokensPoint

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class SplitAttention(AttentionSite):
    """A self-attention of three projections and an output projection, extended; it answers (y, None).

    AST's (`o_proj`, `attention_dropout`) and that of wav2vec 2.0 and HuBERT (`out_proj`, `dropout`).
    """

    @property
    def fused(self) -> bool:
        """Whether the library would use a fused product."""
        return self.module.config._attn_implementation != "eager"  # type: ignore[union-attr]

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.module.scaling)  # type: ignore[arg-type]

    @property
    def dropout(self) -> float:
        """Of the attention weights, 0 in evaluation."""
        attention: Any = self.module
        rate = attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout
        return float(rate) if attention.training else 0.0

    def extended(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """x (B, N, d) -> (B, N, d). Extra keys are seen by every query, masked or not."""
        attention: Any = self.module
        q, k, v = (
            by_head(p(hidden_states), attention.head_dim)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        y = self.attend(q, k, v, len(hidden_states), mask_bias(attention_mask)).transpose(1, 2).flatten(2)
        return (attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)(y), None


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
) -> None:
    """Record the ops of `extend` and `prompt` at a block of this kind.

    Args:
        block, attention, norm: the residual block, its attention, and the norm in front of that (None: there is none).
        leave: the module, and its "input" or "output", where prompts that flow are taken out; None: they stay, and take part
            in the pooling.
        options: of the verb. A prompt is kept as a token if `options["keep"]`.

    Raises:
        AttachError: queries of their own.
    """
    op = recorder(session, point, verb, module)
    if verb in ("extend", "gate"):
        op(attention, SplitAttention, "forward", Given(module))
    elif verb == "prompt" and options["keep"]:
        assert isinstance(point, TokensPoint)
        insert = Insert(module, point.num_prefix, session.site(block, BlockSite))
        op(block, BlockSite, "input", insert, per_row=False)
        if leave is not None:
            strip = insert.strip if leave[1] == "input" else OnOutput(insert.strip)
            op(leave[0], BlockSite if leave[1] == "output" else Site, leave[1], strip, per_row=False)
    elif verb == "prompt":
        project = SplitKeys(norm, attention.k_proj, attention.v_proj, attention.head_dim)
        through = (*(() if norm is None else (norm,)), attention.k_proj, attention.v_proj)
        op(attention, SplitAttention, "forward", Prompts(session.owner, module, through, project))
    else:
        raise AttachError(
            f"'{verb}' is not available at '{point.name}': tokens that only query are described for timm's attentions."
        )
