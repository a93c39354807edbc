"""Points: the named places of a backbone at which an adapter may do something, and the verbs that each kind offers.

| kind        | where                                               | verbs                                                      |
| ----------- | --------------------------------------------------- | ---------------------------------------------------------- |
| `linear`    | a projection; a slice of a fused one is its own     | `add`, `after`, `rescale`, `rescale_input`,                |
|             |                                                     | `reparametrize`, `train`                                   |
| `sublayer`  | attn, cross, mlp, mixer: `y = F(x)` of the residual | `before`, `after`, `parallel`, `enter`, `replace`, `watch` |
| `attention` | queries, keys and values just before the product    | `extend`, `again`, `gate`, `query`                         |
| `tokens`    | the sequence entering a block, the words of a text  | `prompt`, `train`, `words`                                 |
| `norm`      | a normalisation's scale and shift                   | `train`, `rescale`                                         |
| `block`     | a whole residual block                              | `before`, `after`, `watch`, `replay`, `replace`, `run`     |
| `condition` | the embedding that conditions a model               | `before`, `after`, `replace`                               |

A point is a descriptor and does nothing by itself. Verbs work only inside `Adapter.attach`, where a `Session` records them;
the model installs what was recorded after `attach` has returned, all or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.errors import AttachError
from zoo.points.foreign import is_packed, kept_by
from zoo.points.point import Point, is_pointwise

KINDS = ("linear", "sublayer", "attention", "tokens", "norm", "block", "condition")


@dataclass(eq=False, kw_only=True)
class LinearPoint(Point):
    """A projection `y = W x + b`, or the slice `[start, stop)` of the outputs of a fused one. W: (dim_out, dim_in)."""

    kind: ClassVar[str] = "linear"
    verbs: ClassVar[tuple[str, ...]] = ("add", "after", "rescale", "rescale_input", "reparametrize", "train")

    start: int = 0
    stop: int = 0
    fused: str = ""  # name under which parameters of the whole fused projection are saved; "" if this is the whole
    num_heads: int = 0
    transposed: bool = False  # the module keeps the weight as (dim_in, dim_out)
    # the module and the name of a bias of this point alone, where it stands beside the projection's own parameters
    beside: tuple[nn.Module, str] | None = field(default=None, repr=False)

    def holder(self, name: str) -> tuple[nn.Module, str] | None:
        """As `Point.holder`; a bias may stand beside the projection."""
        return self.beside if name == "bias" and self.beside is not None else super().holder(name)

    @property
    def whole(self) -> bool:
        """Whether this point is the whole module rather than a slice of a fused projection."""
        return not self.fused

    @property
    def weight(self) -> Tensor:
        """The frozen weight (dim_out, dim_in), a view; a convolution's is flattened.

        Raises:
            AttachError: another library has quantised it.
        """
        if kept := kept_by(self.module):
            raise AttachError(
                f"The weight of point '{self.name}' is kept {kept}, and is not read here. Use a method that adds to the output, "
                "such as lora, or weights that are quantised here: zoo.load(..., quantise='nf4')."
            )
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator,union-attr,assignment]
        return (weight.T if self.transposed else weight)[self.start : self.stop].flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (dim_out,), a view, or None."""
        bias = self.module.bias
        return None if bias is None else bias.detach()[self.start : self.stop]  # type: ignore[operator,union-attr,index]

    def add(self, module: nn.Module) -> None:
        """`y <- y + module(x)`. Points of one fused projection are handed to `module.add_group` together, if it has one.

        At a convolution only for a module that says `convolves`: it takes and gives (B, channels, ...).
        """
        if not getattr(module, "convolves", False):
            self._tokens_only("a delta f(x)")
        self._record("add", module)

    def after(self, module: nn.Module) -> None:
        """`y <- module(y)`: any function of the output (..., dim_out), behind what `add` and `rescale` of its adapter do."""
        self._tokens_only("a function of its output")
        self._record("after", module)

    def rescale(self, module: nn.Module) -> None:
        """`y <- module(y)`, elementwise along the last axis: `module.scale` (dim_out,) and, if there, `module.shift`."""
        self._record("rescale", module)

    def rescale_input(self, module: nn.Module) -> None:
        """`x <- module(x)` before the projection; only where the point is the whole projection."""
        if not self.whole:
            raise AttachError(f"point '{self.name}' shares its input with the other slices of '{self.fused}'.")
        if not is_pointwise(self.module):
            self._tokens_only("a factor on the channels of its input")
        self._record("rescale_input", module)

    def reparametrize(self, module: nn.Module) -> None:
        """`W <- module(W)` on each forward; W (dim_out, dim_in) is the frozen weight of this point.

        Points of one fused projection are handed to `module.linear_group(parts, run, x, W, b)` together, if it has one, with
        the whole W and b; it returns what it makes of `run(x, W', b')`, which is `F.linear` unless another adapter follows.
        """
        self._tokens_only("another weight matrix")
        if kept := kept_by(self.module):
            raise AttachError(
                f"The weight of point '{self.name}' is kept {kept}, so another one cannot take its place. Use a method that adds "
                "to the output, such as lora."
            )
        if self.unmergeable:
            raise AttachError(
                f"point '{self.name}' is a {type(self.module).__name__}: {self.unmergeable}, so another weight cannot take its "
                "place. Leave it out of the targets, or use a method that adds to the output, such as lora."
            )
        self._record("reparametrize", module)

    def _tokens_only(self, what: str) -> None:
        if not (isinstance(self.module, nn.Linear) or self.transposed or is_packed(self.module)):
            raise AttachError(
                f"point '{self.name}' is a {type(self.module).__name__}: its input is not a sequence of tokens, so {what} "
                "is not available there. Leave it out of the targets."
            )

    def train(self, *names: str) -> None:
        """Train the backbone's own `weight` and/or `bias` here: a trainable copy takes the place of the frozen one."""
        self._record("train", None, names=names)


@dataclass(eq=False, kw_only=True)
class SublayerPoint(Point):
    """A branch `F` of `x + F(norm(x))`. Tensors are channel-last: (B, N, d), or (B, H, W, d) on windowed backbones."""

    kind: ClassVar[str] = "sublayer"
    verbs: ClassVar[tuple[str, ...]] = ("before", "after", "parallel", "enter", "replace", "watch")

    entry: nn.Module = field(repr=False)  # its output is the input of F ("input": its own input is)
    exit: nn.Module = field(repr=False)  # its input is the output of F, before stochastic depth and the residual sum
    entry_side: str = "output"
    exit_side: str = "input"
    stream: nn.Module | None = field(default=None, repr=False)  # its input is the residual stream; None: the entry's is
    inner: nn.Module | None = field(default=None, repr=False)  # its input is that of F alone; None: the entry's side is

    def before(self, module: nn.Module) -> None:
        """`x <- module(x)` on the input of F (behind its norm)."""
        self._record("before", module)

    def after(self, module: nn.Module) -> None:
        """`y <- module(y)` on the output of F, before the residual sum (sequential adapter)."""
        self._record("after", module)

    def parallel(self, module: nn.Module, source: str = "input") -> None:
        """`y <- y + module(s)`; `source="input"`: s is the input of F (behind its norm); "residual": in front of the norm."""
        if source not in ("input", "residual"):
            raise AttachError(f"source '{source}' is unknown; 'input' is behind the norm, 'residual' in front of it.")
        if self.dim_in != self.dim_out:
            raise AttachError(
                f"the sublayer at '{self.name}' changes the width of its tokens from {self.dim_in} to {self.dim_out}, so nothing "
                "can be added beside it. Leave it out of the targets, or use a form that stands behind it."
            )
        self._record("parallel", module, source=source)

    def watch(self, module: nn.Module) -> None:
        """`module(x)` sees the input of F (behind its norm) and changes nothing. It does not see prompts of one block."""
        self._record("watch", module)

    def enter(self, module: nn.Module) -> None:
        """`u <- u + module(u)` on the residual stream in front of the branch's norm: the sum behind the branch gets it, too."""
        if self.entry_side != "output" and self.stream is None:
            raise AttachError(
                f"'{self.name}' has no norm in front of it, where the residual stream could be told from it."
            )
        self._record("enter", module)

    def replace(self, module: nn.Module) -> None:
        """`y = module(F, x)` runs instead of the branch; `F(x)` is the sublayer's own module (behind its norm, in front of a
        layer scale), which need not be called.

        Raises:
            AttachError: a sublayer that is no module of its own, or that hands on more than one tensor.
        """
        if any(part is self.entry for part in self.module.modules()) and self.entry_side == "output":
            raise AttachError(
                f"the sublayer at '{self.name}' is no module of its own (its input is formed inside), so it cannot be replaced."
            )
        self._record("replace", module)


@dataclass(eq=False, kw_only=True)
class AttentionPoint(Point):
    """The product `softmax(q k^T) v` of one attention."""

    kind: ClassVar[str] = "attention"
    verbs: ClassVar[tuple[str, ...]] = ("extend", "again", "gate", "query")

    num_heads: int = 0  # of keys and values
    query_heads: int = 0  # of queries, where several of them read one head of keys; 0: as many as there are of keys
    head_dim: int = 0
    window: int | None = None  # tokens in a window; None: attention over the whole sequence
    causal: bool = False

    def extend(self, module: nn.Module) -> None:
        """`module(B) -> (keys, values)`, each (1 or B, num_heads, T, head_dim): put before the keys and values of every query.

        Windowed attention shares them between windows, with zero relative bias and no mask. In evaluation the result is
        kept until a parameter of the module changes, so one of size 1 must depend on parameters only: its own, and those of the
        modules in `module.shared` (a tuple), which several points may have in common.

        With a third tensor, (1 or B, 1 or num_heads, 1 or M, T), each of M queries sees some of them only: true where it does,
        or numbers that are added to the scores.
        """
        self._record("extend", module)

    def again(self, module: nn.Module) -> None:
        """`module(k, v, words) -> (k', v')`: what the projections made of the tokens once more, beside the own ones.

        k, v (B, M, h c), the first `words` of text. They pass the norm of keys and the positions of the own ones. With a third
        tensor (B, 1, 1, M) only those that are true in it are seen. Only where the family's attention is of [text | video]
        (CogVideoX).
        """
        self._record("again", module)

    def gate(self, module: nn.Module) -> None:
        """`y <- y + g softmax(q K^T) V` with a softmax of their own: `module(B) -> (K, V, g)` (LLaMA-Adapter).

        y is the product in front of the output projection, K and V (1 or B, num_heads, T, head_dim) as in `extend`, g
        broadcastable to (B, h, M, head_dim), h heads of queries. With g = 0 the function is unchanged, to the bit.
        """
        self._record("gate", module)

    def query(self, module: nn.Module) -> None:
        """`module(batch) -> (1 or batch, T, d)` tokens that only query; `module.receive(z)` gets what becomes of them.

        z is (batch, T, d).

        The backbone's own tokens never see them. The stream that they run through is described in the family's file. It keeps
        what it needs between two modules in `module.caught`; `Adapter.release` has to set that to None.
        """
        self._record("query", module)


@dataclass(eq=False, kw_only=True)
class TokensPoint(Point):
    """The token sequence that enters block `block`. dim_in = dim_out = d."""

    kind: ClassVar[str] = "tokens"
    verbs: ClassVar[tuple[str, ...]] = ("prompt", "train", "words")

    num_prefix: int = 0  # class and register tokens in front of the patches
    first: bool = False  # the first block of the backbone (or tower)
    parameter: str = ""  # path of a trainable token of the backbone, such as cls_token
    accumulates: bool = False  # prompts that are kept may come in here, though it is not the first
    # first block of a text tower: the embedding of its words, and the token ids of a text without start, end and padding
    embedding: nn.Module | None = field(default=None, repr=False)
    spell: Callable[[str], Tensor] | None = field(default=None, repr=False)

    def prompt(self, module: nn.Module, keep: bool = False, pooled: bool = False, replace: bool = False) -> None:
        """`module(B) -> (1 or B, T, d)` tokens between the prefix tokens and the patches; B images.

        `keep=False`: they exist in this block only and their outputs are dropped (VPT-deep); computed as keys and values,
        which gives the same outputs and gradients, and kept in evaluation as those of `AttentionPoint.extend`. `keep=True`,
        first block only: they flow through all blocks (VPT-shallow). `pooled`: what leaves the last block takes part in an
        average over the tokens; otherwise it is dropped before the pooling.

        Where `accumulates` is true, prompts that are kept can also come in at later blocks, beside those that are there
        already; with `replace` they take the place of what has become of the adapter's own of the first block (as many). Where
        no mask tells places apart, it does not matter at which place prompts stand. In a text tower where the adapter's own are
        vectors among the words (`words`), `replace` puts module(n) (1, T, d) in the place of what has become of those, each at
        its place in the text.
        """
        if keep and not self.first and not self.accumulates:
            raise AttachError(f"prompts that are kept can only start at the first block, not at '{self.name}'.")
        if replace and (not keep or self.first):
            raise AttachError(
                f"prompts that replace others are kept, and stand behind the first block, not at '{self.name}'."
            )
        self._record("prompt", module, keep=keep, pooled=pooled, **({"replace": True} if replace else {}))

    def words(self, module: nn.Module) -> None:
        """`module(words, ids) -> words`: the embedded words of texts (n, L, d), in front of the positions; ids (n, L).

        Negative ids stand where an adapter puts vectors of its own: they are embedded as token 0 first, and the module, which
        knows what they mean (`zoo.heads.text`), replaces them. Texts without such ids should pass unchanged.
        """
        if self.embedding is None:
            raise AttachError(
                f"the tokens at '{self.name}' are no words of a text; those are at the first block of a text tower."
            )
        self._record("words", module)

    def embed(self, text: str) -> Tensor:
        """The frozen embeddings (T, d) of a text's words, without positions."""
        if self.embedding is None or self.spell is None:
            raise AttachError(f"the tokens at '{self.name}' are no words of a text.")
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.detach()[self.spell(text).to(weight.device)]

    def train(self) -> None:
        """Train the backbone's own token (`parameter`), such as the class token."""
        if not self.parameter:
            raise AttachError(f"the backbone has no token of its own at '{self.name}' that could be trained.")
        self._record("train", None, names=(self.parameter,))


@dataclass(eq=False, kw_only=True)
class NormPoint(Point):
    """A normalisation with `weight` and `bias` of shape (dim_out,)."""

    kind: ClassVar[str] = "norm"
    verbs: ClassVar[tuple[str, ...]] = ("train", "rescale")

    channels_first: bool = False  # its output is (B, dim_out, ...) rather than (..., dim_out)

    def train(self, *names: str) -> None:
        """Train the backbone's own `weight` and/or `bias` here: a trainable copy takes the place of the frozen one."""
        self._record("train", None, names=names)

    def rescale(self, module: nn.Module) -> None:
        """`y <- module(y)`: `module.scale` (dim_out,) and, if there, `module.shift` (dim_out,)."""
        self._record("rescale", module)


@dataclass(eq=False, kw_only=True)
class BlockPoint(Point):
    """A whole residual block, tensors channel-last."""

    kind: ClassVar[str] = "block"
    verbs: ClassVar[tuple[str, ...]] = ("before", "after", "watch", "replay", "replace", "skip", "run")

    def before(self, module: nn.Module) -> None:
        """`x <- module(x)` in front of the block."""
        self._record("before", module)

    def after(self, module: nn.Module) -> None:
        """`y <- module(x, y)` behind the block; x is the block's input."""
        self._record("after", module)

    def watch(self, module: nn.Module) -> None:
        """`module(y)` sees the block's output and changes nothing."""
        self._record("watch", module)

    def replay(self, module: nn.Module, changes: bool = False) -> None:
        """`module.enter(x, again)` sees the block's input, `module.leave(y)` its output; `changes`: `y <- module.leave(y)`.

        `again(x) -> y` runs the frozen block once more, as it ran and without a graph: in backward, instead of keeping outputs.
        It is None where that is not possible: in a batch of per-sample adapters, beside other adapters, without gradients,
        compiled.
        """
        self._record("replay", module, changes=changes)

    def replace(self, module: nn.Module) -> None:
        """`module(block, x) -> y` runs instead of the block; `block(x)` is its own forward."""
        self._record("replace", module)

    @property
    def skippable(self) -> bool:
        """Whether the blocks behind this one can do without it (`Backbone.hands_on`). Inside of `Adapter.attach` alone."""
        return self.session is not None and self.session.skippable(self)

    def skip(self, module: nn.Module) -> None:
        """While `module.skipping`, `y = module(x)` instead of the block, which does not run; otherwise the block as it is.

        What else a block hands on (relative positions) passes as it came. With `module.always` nothing inside of it ever runs,
        and what other adapters have there is refused; so is a block that makes what those behind it read (`skippable`).
        """
        self._record("skip", module)

    def run(self, module: nn.Module, run: Any) -> None:
        """The block is run by hand, with those that had this `run` before it: `run` is a `zoo.engine.reversible.Reversible`.

        `module` is what the adapter has at this block (F or G of the coupling, or an empty module). Only where blocks are a plain
        sequence (`Backbone.plain_blocks`); points of one run are handed over in forward order.
        """
        self._record("run", module, run=run)


@dataclass(eq=False, kw_only=True)
class ConditionPoint(Point):
    """The embedding that conditions a model: class or time embedding, text encoder output. (B, ..., dim_out)."""

    kind: ClassVar[str] = "condition"
    verbs: ClassVar[tuple[str, ...]] = ("before", "after", "replace")

    def replace(self, module: nn.Module) -> None:
        """`module(embed, x) -> y` runs instead of the embedding; `embed(x)` is its own forward."""
        self._record("replace", module)

    def before(self, module: nn.Module) -> None:
        """`x <- module(x)` on the input of the embedding."""
        self._record("before", module)

    def after(self, module: nn.Module) -> None:
        """`y <- module(y)` on the embedding."""
        self._record("after", module)
