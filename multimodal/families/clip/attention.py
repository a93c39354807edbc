"""open_clip's attention with projections that are modules, and prefixes and prompts on both towers.

open_clip's blocks hold torch's `nn.MultiheadAttention`, or an `Attention` of the library's own (blocks with more norms; all
blocks of later releases). Both multiply by a packed weight that belongs to no projection module, and the first one does not call
its `out_proj` either, so hooks there would never run. `PackedAttention` computes the same, of the same parameters:

    [q k v] = x W_in^T + b_in       x (B, N, d), W_in (3 d, d); h heads of c = d / h
    y = concat_h(softmax(q k^T / sqrt(c) + M) v) W_o^T + b_o      M: additive mask, (N, N) or (B h, N, N)

Its `state_dict` has the library's keys: `in_proj_weight`, `in_proj_bias`, `out_proj.weight`, `out_proj.bias`.

Prompts that flow stand behind the first token of the sequence ([start | prompts | words], [class | prompts | patches]) and are
taken out behind the last block. In a causal tower every token sees them, and they see each other and the start token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.attention import (
    AttentionSite,
    FusedKeys,
    Given,
    Prompts,
    heads,
    mask_bias,
    recorder,
)
from zoo.engine.changes import OnOutput
from zoo.engine.kept import Insert, Overwrite, kept
from zoo.engine.sites import BlockSite, Site
from zoo.errors import AttachError, MismatchError
from zoo.points import Point, TokensPoint

if TYPE_CHECKING:
    from multimodal.families.clip.towers import Tower
    from zoo.points.recorder import Carried, Recorder


class InProjection(nn.Linear):
    """The packed projection d -> 3 d. In a `state_dict` its tensors are `in_proj_weight` and `in_proj_bias`."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix[:-1] + "_", keep_vars)

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: Any, errors: Any
    ) -> None:
        own: list[str] = []
        super()._load_from_state_dict(state, prefix, metadata, strict, own, unexpected, errors)
        missing += [prefix[:-1] + "_" + key.removeprefix(prefix) for key in own]


class PackedAttention(nn.Module):
    """Self-attention over the parameters of one of open_clip's; called as that is.

    Args:
        source: `nn.MultiheadAttention` (batch first, one width), or open_clip's `Attention`. Its packed parameters and its
            submodules move here; `library` gives it back with the present ones.

    Raises:
        MismatchError: an option of the attention that is not described here.
    """

    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    attn_drop: nn.Dropout
    out_drop: nn.Module
    head_scale: nn.Parameter | None

    def __init__(self, source: Any) -> None:
        super().__init__()
        if reason := _odd(source):
            raise MismatchError(f"open_clip's {type(source).__name__} {reason}, which is not described here.")
        weight, bias = source.in_proj_weight, source.in_proj_bias
        dim = weight.shape[1]
        self.num_heads = int(source.num_heads)
        self.head_dim = dim // self.num_heads
        self.scale = self.head_dim**-0.5
        self.in_proj = InProjection(dim, 3 * dim, bias=bias is not None, device="meta")
        self.in_proj.weight, self.in_proj.bias = weight, bias
        self.pair = isinstance(source, nn.MultiheadAttention)
        for name in ("ln_q", "ln_k", "ln_inner", "out_drop"):
            self.add_module(name, getattr(source, name, nn.Identity()))
        self.attn_drop = nn.Dropout(source.dropout) if self.pair else source.attn_drop
        self.register_parameter("head_scale", getattr(source, "head_scale", None))
        self.out_proj: nn.Linear = source.out_proj
        source.in_proj_weight = source.in_proj_bias = None
        self._source = (source,)  # in a tuple, so that it is no submodule
        self.train(source.training)

    # -- the library's module -----------------------------------------------------------------------------------------

    def library(self) -> nn.Module:
        """The library's own attention, with the parameters of this one."""
        (source,) = self._source
        source.in_proj_weight, source.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        return source.train(self.training)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}in_proj_{name}" in state:
                state[f"{prefix}in_proj.{name}"] = state.pop(f"{prefix}in_proj_{name}")
        super()._load_from_state_dict(state, prefix, *rest)

    # -- the computation ----------------------------------------------------------------------------------------------

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, d) -> q, k, v, each (B, h, N, c)."""
        q, k, v = heads(self.in_proj(x), self.num_heads)
        return self.ln_q(q), self.ln_k(k), v

    def mask(self, given: Tensor | None, images: int, dtype: torch.dtype) -> Tensor | None:
        """An additive mask (N, N) or (B h, N, N) as the product takes it: (N, N) or (B, h, N, N)."""
        if given is None:
            return None
        return (given.unflatten(0, (images, -1)) if given.dim() == 3 else given).to(dtype)

    def finish(self, y: Tensor) -> Any:
        """y (B, h, N, c) -> (B, N, d), in a pair with None where `nn.MultiheadAttention` stood."""
        if self.head_scale is not None:
            y = y * self.head_scale
        y = self.out_drop(self.out_proj(self.ln_inner(y.transpose(1, 2).flatten(2))))
        return (y, None) if self.pair else y

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
    ) -> Any:
        """query (B, N, d); key, value, k_x and v_x are the same tensor and not looked at."""
        q, k, v = self.project(query)
        mask = self.mask(attn_mask, q.shape[0], q.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        return self.finish(y)


def _odd(source: Any) -> str:
    """What about an attention of open_clip's is not described here, in words; "" if nothing."""
    if isinstance(source, nn.MultiheadAttention):
        if not source._qkv_same_embed_dim or source.bias_k is not None or source.add_zero_attn:
            return "has keys and values of another width, or keys of its own"
        return "" if source.batch_first else "has the batch in the second place"
    if getattr(source, "in_proj_weight", None) is None or not isinstance(getattr(source, "out_proj", None), nn.Linear):
        return "has no packed projection"
    return "compares cosines" if source.logit_scale is not None else ""


def widen(mask: Tensor, extra: int, at: int) -> Tensor:
    """An additive mask (..., N, N) for `extra` prompts behind the first `at` tokens: (..., N + extra, N + extra).

    Every token sees the prompts; these see each other and the tokens in front of them.
    """
    hidden = float("-inf")
    wide = torch.cat([mask[..., :at], mask.new_zeros(*mask.shape[:-1], extra), mask[..., at:]], dim=-1)
    rows = mask.new_full((*mask.shape[:-2], extra, wide.shape[-1]), hidden)
    rows[..., : at + extra] = 0
    return torch.cat([wide[..., :at, :], rows, wide[..., at:, :]], dim=-2)


@dataclass(eq=False)
class PackedSite(AttentionSite):
    """`PackedAttention` with extra keys and values, and with prompts that flow through a masked tower."""

    def extended(self, query: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> Any:  # type: ignore[override]
        """query (B, N, d) -> as `PackedAttention.forward`. Extra keys are seen by every query."""
        attention: Any = self.module
        q, k, v = attention.project(query)
        mask = attention.mask(attn_mask, q.shape[0], q.dtype)
        if mask is not None and mask.shape[-1] < query.shape[1]:
            mask = widen(mask, query.shape[1] - mask.shape[-1], 1)
        return attention.finish(self.attend(q, k, v, q.shape[0], mask_bias(mask)))


@dataclass(eq=False)
class Words:
    """The words of texts, between their embedding and their positions (`TokensPoint.words`)."""

    module: nn.Module
    held: Tensor | None = None
    ids: Carried | None = None  # on their way to later blocks, if anything is replaced there

    def read(self, ids: Tensor) -> Tensor:
        """Ids (n, L), kept for `write`; negative ones are embedded as token 0."""
        self.held = ids
        if self.ids is not None:
            self.ids.put(ids)
        return ids.clamp(min=0)

    def write(self, ids: Tensor, words: Tensor) -> Tensor:
        """Embedded words (n, L, d) -> (n, L, d)."""
        given, self.held = self.held, None
        return self.module(words, given)  # type: ignore[no-any-return]


@dataclass(eq=False)
class Rewrite:
    """New vectors in place of what became of an adapter's words, in front of a later block."""

    module: nn.Module  # module(n) -> (1, T, d)
    ids: Carried

    def __call__(self, x: Tensor) -> Tensor:
        """(n, L, d) -> the same, with vector m where the id is -1 - m; texts without such ids pass unchanged."""
        ids = self.ids.get()
        assert ids is not None
        if extra := x.shape[1] - ids.shape[1]:  # prompts of other adapters, behind the first token
            ids = torch.cat([ids[:, :1], ids.new_zeros(len(ids), extra), ids[:, 1:]], dim=1)
        vectors = F.embedding((-1 - ids).clamp(min=0), self.module(x.shape[0])[0])
        return torch.where((ids < 0).unsqueeze(-1), vectors.to(x.dtype), x)


def words_of(session: Recorder, tower: Tower) -> Words | None:
    """The words that the adapter has put into the text tower before, if it has."""
    ops: Any = getattr(session, "ops", ())
    found = [getattr(op.fn, "__self__", None) for site, op in ops if op.verb == "words"]
    return next((w for w in found if isinstance(w, Words)), None) if tower.embed else None


def record(
    tower: Tower,
    session: Recorder,
    point: Point,
    verb: str,
    module: nn.Module,
    keep: bool = False,
    pooled: bool = False,
    replace: bool = False,
) -> None:
    """Record the ops of `point.extend(module)`, `point.prompt(module, keep, pooled)` and `point.words(module)` in one tower.

    Raises:
        AttachError: the blocks have an attention whose product is not described here.
    """
    if verb in ("extend", "gate", "prompt") and tower.timm:
        from zoo.families import timm_attention

        passed = (tower.blocks, tower.end, tower.averaged, keep, pooled, replace)
        timm_attention.record(session, point, verb, module, *passed)
        return
    block: Any = tower.blocks[point.block]  # type: ignore[index]
    attention = block.attn
    op = recorder(session, point, verb, module)
    if verb == "words":
        assert isinstance(point, TokensPoint) and point.embedding is not None
        words = Words(module)
        op(point.embedding, Site, "input", words.read, per_row=False, excludes=("words",))
        op(point.embedding, Site, "output", words.write, per_row=False)
        return
    if verb not in ("extend", "gate", "prompt"):
        raise AttachError(f"'{verb}' is not available at {point.kind} points of the family 'clip'.")
    if replace and (mine := words_of(session, tower)) is not None:
        mine.ids = session.want("text_ids", "forward")
        op(block, BlockSite, "input", Rewrite(module, mine.ids), per_row=False)
        return
    # Where one token alone is read, prompts that leave the last block are read by nobody.
    pooled = pooled and tower.averaged
    if verb in ("extend", "gate"):
        op(attention, PackedSite, "forward", Given(module))
    elif replace:
        op(block, BlockSite, "input", Overwrite(module, *kept(session, point, tower.blocks)), per_row=False)
    elif keep or (pooled and block is tower.blocks[-1]):
        assert isinstance(point, TokensPoint)
        insert = Insert(module, point.num_prefix, session.site(block, BlockSite))
        op(block, BlockSite, "input", insert, per_row=False)
        if tower.causal:  # the mask is that of the words alone
            for each in tower.blocks:
                op(each.attn, PackedSite, "forward", None, "flow", per_row=False)
        if not pooled and tower.end_side == "input":
            op(tower.end, Site, "input", insert.strip, per_row=False)
        elif not pooled:
            op(tower.end, Site, "output", OnOutput(insert.strip), per_row=False)
    else:
        through = (block.ln_1, attention.in_proj, attention.ln_k)
        project = FusedKeys(*through, attention.num_heads)
        op(attention, PackedSite, "forward", Prompts(session.owner, module, through, project))
