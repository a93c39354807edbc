"""More keys and values for an attention: prefixes (`AttentionPoint.extend`) and prompts (`TokensPoint.prompt`).

A prompt that exists in one block only (VPT-deep) is a token p whose output nobody reads. Its query, its part of the output
projection and its MLP are therefore not needed, and since attention mixes tokens through keys and values alone, all that the
other tokens see of it is

    k_p = k_norm(W_k norm1(p) + b_k)        v_p = W_v norm1(p) + b_v            (1, h, T, c), the same for the whole batch

in front of the keys and values of each image. Outputs and gradients are those of the straightforward form, which runs T more
tokens for each image through the whole block. Prompts go through the block's own norm and projections, so whatever other
adapters do there (LoRA, SSF, a trained norm) is done to prompts too.

In memory: what backward needs of the joined keys and values is put together again from the output of the fused projection (kept
for the queries anyway) and the 2 T d numbers of the prompts. In evaluation these are computed once, and kept until a tensor that
they depend on is changed or replaced, or the model's mode or set of adapters changes. (A change through `parameter.data` that
autograd cannot see, in evaluation mode, is noticed only at the next `model.train()` or `model.eval()`.)

What is around this differs between families: each has an `AttentionSite` of its own whose `extended` is the library's forward
with `attend` for the product (`FusedAttention` below, `vision.families.parts.swin_attention`, and so on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.gates import second_softmax, with_masks
from zoo.engine.memory import recomputable, state_of
from zoo.engine.sites import Op, Site, parts, site_at

if TYPE_CHECKING:
    from zoo.points import Point
    from zoo.points.recorder import Recorder

Pair = tuple[Tensor, ...]  # keys and values, each (1 or B, h, T, c), and possibly which of them who sees
Bias = Callable[[int, int, "Tensor | None"], "Tensor | None"]  # (extra keys, images, which of them) -> what is added


class Source(Protocol):
    """What an op at an attention runs: keys and values for a number of images."""

    through: tuple[nn.Module, ...]  # modules of the backbone that they pass

    def __call__(self, site: AttentionSite, images: int) -> Pair:
        """(1 or images, h, T, c), twice."""


class Alone(NamedTuple):
    """A pair whose keys share a softmax of their own, beside the place that they take in that of all keys (LAE's prefix)."""

    keys: Tensor
    values: Tensor


@dataclass(eq=False)
class Given:
    """Keys and values that the adapter's module gives as they are (prefix tuning).

    With `compensate` at the module the attention of the extra keys is divided by its own sum, so that it sums to one; that of
    the own keys stays what it was.
    """

    module: nn.Module
    through: tuple[nn.Module, ...] = ()

    def __call__(self, site: AttentionSite, images: int) -> Pair:
        """`module(images)`."""
        pair = site.state.run(self.module, images)
        return Alone(*pair) if getattr(self.module, "compensate", False) else pair


@dataclass(eq=False)
class Prompts:
    """Keys and values of tokens that exist in this block only.

    `project` takes tokens (1 or images, T, d) through the block's own norm and projections to keys and values, each
    (1 or images, h, T, c); `through` are the modules that it calls (as modules, so that their hooks run).
    """

    owner: str
    module: nn.Module
    through: tuple[nn.Module, ...]
    project: Callable[[Tensor], Pair]

    def __call__(self, site: AttentionSite, images: int) -> Pair:
        """`module(images)` (1 or images, T, d), normed and projected."""
        state = site.state
        before = state.aside, state.serving
        # The block's own tokens are under way: adapters that watch these must not take the prompts for them.
        state.aside = True
        if state.route is not None:
            state.serving = self.owner
        try:
            return self.project(state.context.wide(state.tokens(self.module, images), images))
        finally:
            state.aside, state.serving = before


@dataclass(eq=False)
class FusedKeys:
    """norm -> fused q, k, v projection -> keys and values (`Prompts.project`)."""

    norm: nn.Module
    qkv: nn.Module
    k_norm: nn.Module
    num_heads: int

    def __call__(self, tokens: Tensor) -> Pair:
        """(n, T, d) -> two of (n, h, T, c)."""
        projected = self.qkv(self.norm(tokens))
        # a copy without the queries, so that the storage which backward keeps holds no more than keys and values
        pair = projected.unflatten(-1, (3, self.num_heads, -1))[:, :, 1:].permute(2, 0, 3, 1, 4).contiguous()
        return self.k_norm(pair[0]), pair[1]


def prepend(own: Tensor, *extra: Tensor) -> Tensor:
    """Extra keys (or values) in front of the own ones.

    own (R, h, N, c), R = B * windows, an image's windows together; each extra (1 or B, h, T, c) -> (R, h, sum T + N, c).
    """
    return torch.cat([*(_for_rows(e, own.shape[0]).to(own.dtype) for e in extra), own], dim=2)


def _for_rows(extra: Tensor, rows: int) -> Tensor:
    count = extra.shape[0]  # not `len`, by which a graph would be fixed to the batch that it is written with
    if count in (1, rows):
        return extra.expand(rows, -1, -1, -1)
    return extra.repeat_interleave(rows // count, dim=0)


def heads(projected: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output of a fused projection (R, N, 3 h c) -> q, k, v (R, h, N, c), views."""
    q, k, v = projected.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def by_head(projected: Tensor, width: int) -> Tensor:
    """(B, N, h c) -> (B, h, N, c), a view; width = c."""
    return projected.unflatten(-1, (-1, width)).transpose(1, 2)


@dataclass(eq=False)
class SplitKeys:
    """norm -> key and value projections -> keys and values (`Prompts.project`); norm None: there is none in front."""

    norm: nn.Module | None
    k: nn.Module
    v: nn.Module
    width: int

    def __call__(self, tokens: Tensor) -> Pair:
        """(n, T, d) -> two of (n, h, T, c)."""
        normed = tokens if self.norm is None else self.norm(tokens)
        return by_head(self.k(normed), self.width), by_head(self.v(normed), self.width)


def mask_bias(mask: Tensor | None) -> Bias:
    """What `AttentionSite.attend` adds for a mask of the own keys, (M or 1, K) or (1 or B, 1 or h, M or 1, K).

    The mask is additive, or true where a key is seen. Extra keys are seen by every query.
    """

    def bias(extra: int, images: int, index: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        own = mask if index is None or mask.dim() < 4 or mask.shape[0] == 1 else mask.index_select(0, index)
        return F.pad(own, (extra, 0), value=own.dtype == torch.bool)

    return bias


@dataclass(eq=False)
class AttentionSite(Site):
    """An attention whose keys and values adapters extend; the `fn` of its ops are `Source`s."""

    # evaluation: the state of all tensors that the pairs depend on, those tensors, and the pairs
    _kept: tuple[Any, list[Tensor], list[Pair]] | None = None
    _slots: list[tuple[nn.Module, dict[str, Any], str]] | None = None  # where these tensors stand
    watchers: tuple[Op, ...] = ()  # "watch_keys": `fn(k, v)` sees the keys and values that all tokens are going to use

    def refresh(self) -> None:
        """Take up the set of active adapters."""
        super().refresh()
        self.watchers = tuple(op for op in self.ops if op.where == "watch_keys" and op.owner in self.state.active)

    def running(self) -> tuple[tuple[Op, ...], ...]:
        """The ops that run now."""
        return (*super().running(), self.watchers)

    def run_only(self, ops: tuple[tuple[Op, ...], ...]) -> None:
        """Run exactly these."""
        super().run_only(ops)
        self.watchers = ops[3]

    def reset(self) -> None:
        """Forget what was computed for evaluation."""
        self._kept = self._slots = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The library's forward, unless an active adapter extends it."""
        return self.extended(*args, **kwargs) if self.forwards else self.original(*args, **kwargs)

    def extended(self, *args: Any, **kwargs: Any) -> Tensor:
        """The attention with extra keys and values; each family has its own."""
        raise NotImplementedError

    @property
    def fused(self) -> bool:
        """Whether the product is torch's fused one, if the attention says so."""
        return bool(getattr(self.module, "fused_attn", True))

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.module.scale)  # type: ignore[arg-type]

    @property
    def dropout(self) -> float:
        """Of the attention weights, 0 in evaluation."""
        drop = getattr(self.module, "attn_drop", None)
        return float(drop.p) if drop is not None and self.module.training else 0.0

    @property
    def sources(self) -> tuple[Op, ...]:
        """Active ops that give keys and values; others say that prompts pass as tokens (`flow`), or look (`read`)."""
        return tuple(op for op in self.forwards if op.verb not in ("flow", "gate", "read"))

    def ready(self, pair: Pair) -> Pair:
        """Extra keys and values as the product takes them; an attention that compares cosines norms the keys."""
        return pair

    # -- extra keys and values --------------------------------------------------------------------------------------

    def pairs(self, images: int, dtype: torch.dtype) -> list[Pair]:
        """Keys and values of all active ops, for `images` images; dtype is that of the attention's input."""
        ops = self.sources
        if not ops or torch.compiler.is_compiling():
            return [self.ready(op.fn(self, images)) for op in ops]
        tensors: list[Tensor] = []
        key = None
        frame = self.state.context.frame
        # values of this forward pass, and what was made of its tokens, may be part of them
        changing = frame is not None and bool(frame.values or frame.carried)
        if not (changing or torch.is_grad_enabled() or any(m.training for op in ops for m in op.modules)):
            tensors = self._tensors()
            state = state_of(tensors)
            key = None if state is None else (dtype, state)
        if key is None:
            self._kept = None
        elif self._kept is not None and self._kept[0] == key:
            return self._kept[2]
        pairs = [self.ready(op.fn(self, images)) for op in ops]
        if key is not None and all(t.shape[0] == 1 for pair in pairs for t in pair):
            # Aliases are held with the tensors: nothing else can come to stand at their addresses.
            self._kept = (key, [*tensors, *(t.detach() for t in tensors)], pairs)
        return pairs

    def _tensors(self) -> list[Tensor]:
        """Every parameter and buffer that the pairs depend on."""
        if self._slots is None:
            self._slots = list(self._places())
        return [part.__dict__.get(name, place[name]) for part, place, name in self._slots]  # a trained copy stands in

    def _places(self) -> Iterator[tuple[nn.Module, dict[str, Any], str]]:
        modules = [m for op in self.sources for m in op.modules]
        sources: list[Source] = [op.fn for op in self.sources]  # type: ignore[misc]
        for passed in dict.fromkeys(m for source in sources for m in source.through):
            modules.append(passed)
            site = site_at(passed)
            if site is not None:
                modules += [m for op in (*site.inputs, *site.forwards, *site.outputs) for m in op.modules]
        for module in modules:
            for part in module.modules():
                for place in (part._parameters, part._buffers):
                    yield from ((part, place, name) for name, tensor in place.items() if tensor is not None)

    # -- the product ------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, images: int, bias: Bias) -> Tensor:
        """softmax(q [k_extra, k]^T + bias) [v_extra, v]. q (R, h, M, c); k, v (R, h, N, c); R = images * windows.

        In a routed batch each image gets the keys and values of its own adapter.
        """
        y = self._attended(q, k, v, images, bias)
        return second_softmax(self, q, y, images) if any(op.verb == "gate" for op in self.forwards) else y

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, images: int, bias: Bias) -> Tensor:
        for op in self.sources:
            self._seen(op)
        if self.state.route is None:
            pairs = self.pairs(images, q.dtype)
            keys, values = self._join(k, [p[0] for p in pairs]), self._join(v, [_shared(p) for p in pairs])
            for op in self.watchers:
                op.fn(keys, values)
            masked = with_masks(bias, pairs, q.shape[0], k.shape[2])
            return self._compensated(q, pairs, self._product(q, keys, values, k, images, masked))
        outputs, order = [], []
        for index, pairs in self._groups():
            windows = q.shape[0] // images
            rows = (index[:, None] * windows + torch.arange(windows, device=q.device)).flatten()
            mine = recomputable(torch.Tensor.index_select, q, 0, rows)
            keys = recomputable(_select, k, rows, *(p[0] for p in pairs))
            values = recomputable(_select, v, rows, *(_shared(p) for p in pairs))
            masked = with_masks(bias, pairs, mine.shape[0], k.shape[2])
            y = self._product(mine, keys, values, k, index.shape[0], masked, index)
            outputs.append(self._compensated(mine, pairs, y))
            order.append(rows)
        return torch.cat(outputs).index_select(0, torch.cat(order).argsort())

    def _compensated(self, q: Tensor, pairs: list[Pair], y: Tensor) -> Tensor:
        """y + softmax(q K_P^T) V_P for every pair that has a softmax of its own."""
        for pair in pairs:
            if isinstance(pair, Alone):
                keys, values = prepend(q[:, :, :0], pair.keys), prepend(q[:, :, :0], pair.values)
                scores = q * self.scale @ keys.transpose(-2, -1)
                y = y + scores.softmax(dim=-1) @ values
        return y

    def _groups(self) -> Iterator[tuple[Tensor, list[Pair]]]:
        """Images that are served alike, and their extra keys and values."""
        assert self.state.route is not None
        owners = list(dict.fromkeys(op.owner for op in self.sources))
        for owner in owners:
            index = self.state.route[owner]
            if index.shape[0]:
                yield index, [self.ready(op.fn(self, index.shape[0])) for op in self.sources if op.owner == owner]
        rest = [index for name, index in self.state.route.items() if name not in owners and index.shape[0]]
        if rest:
            yield torch.cat(rest), []

    @staticmethod
    def _join(own: Tensor, extra: list[Tensor]) -> Tensor:
        return recomputable(prepend, own, *extra) if extra else own

    def _product(
        self, q: Tensor, k: Tensor, v: Tensor, own: Tensor, images: int, bias: Bias, index: Tensor | None = None
    ) -> Tensor:
        added = bias(k.shape[2] - own.shape[2], images, index)
        drop = getattr(self.module, "attn_drop", None)
        drop = drop if isinstance(drop, nn.Module) else None
        # who hooks the attention's dropout wants to see the weights, which the fused product never forms
        seen = (
            drop is not None and not torch.compiler.is_compiling() and (drop._forward_hooks or drop._forward_pre_hooks)
        )
        if self.fused and not seen:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=self.dropout, scale=self.scale)
        scores = q * self.scale @ k.transpose(-2, -1)
        if added is not None and added.dtype == torch.bool:
            scores = scores.masked_fill(~added, float("-inf"))
        elif added is not None:
            scores = scores + added
        weights = scores.softmax(dim=-1)
        return (F.dropout(weights, self.dropout, self.dropout > 0) if drop is None else drop(weights)) @ v


@dataclass(eq=False)
class FusedAttention(AttentionSite):
    """An attention of the layout of timm's `Attention` (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`), extended."""

    def extended(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, d) -> (B, N, d). Extra keys are seen by every query, masked or not."""
        attention: Any = self.module
        batch, tokens, _ = x.shape
        gate = getattr(attention, "gate", None)
        gate = None if gate is None else gate(x).sigmoid()
        q, k, v = heads(attention.qkv(x), attention.num_heads)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if is_causal:
            attn_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        y = self.attend(q, k, v, batch, mask_bias(attn_mask)).transpose(1, 2).flatten(2)
        y = attention.norm(y)
        y = y if gate is None else y * gate
        return attention.proj_drop(attention.proj(y))


def _shared(pair: Pair) -> Tensor:
    """The values of a pair in the softmax of all keys: none, if it has one of its own."""
    return torch.zeros_like(pair.values) if isinstance(pair, Alone) else pair[1]


def _select(own: Tensor, rows: Tensor, *extra: Tensor) -> Tensor:
    return prepend(own.index_select(0, rows), *extra)


def recorder(session: Recorder, point: Point, verb: str, module: nn.Module) -> Callable[..., None]:
    """What records the ops that a verb with this module makes at a point: `op(at, kind, where, fn)`, and options of `Op`."""

    def op(at: nn.Module, kind: type[Site], where: str, fn: Any, verb: str = verb, **options: Any) -> None:
        session.op(at, Op(session.owner, where, fn, point.name, verb, modules=parts(module), **options), kind)

    return op
