"""Reversible runs: frozen blocks that follow each other, coupled in two streams whose inputs come back from their outputs.

    y1 = lam x1 + F(x2)        y2 = bet x2 + G(y1)        (y2, y1) goes on if `swap`, else (y1, y2)
    x2 = (y2 - G(y1)) / bet    x1 = (y1 - F(x2)) / lam

F and G are the whole block, one of its halves, or the adapter's own module. The tokens in front of the run are both x1 and x2;
behind it stands (x1 + x2) / 2. One autograd function is the whole run: forward makes no graph, backward walks the blocks from the
last to the first, makes the graph of one F or G at a time, and inverts. What adapters do inside the blocks runs as ever.

What is kept between forward and backward, besides the tokens in front:

| `keep`       | kept                                       | inverted in one go | forward passes in backward         |
| ------------ | ------------------------------------------ | ------------------ | ---------------------------------- |
| `"input"`    | the last two streams                       | `every` blocks     | 1 + about log2(L / `every`) / 2 + 1/2 |
| `"segments"` | two streams at each `every`-th block       | `every` blocks     | 1                                  |
| `"output"`   | the last two streams (the paper's)         | all                | 1                                  |

With "input" the streams at every `every`-th block are found again from the front, halving the run: at most log2(L / `every`)
pairs are alive at a time, in backward only. Inverting amplifies rounding by 1 / lam and 1 / bet in each block; it is measured:
where a stretch's first streams are known they are compared with what came back, and backward raises if the error is over `limit`.

Streams are in float64, F and G run in the precision of the tokens. So what F and G are given when they run again is mostly the
same to the bit, and errors do not pass through them: on the trained `vit-micro` with lam = 0.1, stretches of two blocks give
gradients to 2e-6 instead of 3e-5 (float32 streams). Seeds of dropout are kept for each F and G. Inside `zoo.second_order`, under
`torch.compile` and without gradients the run is an ordinary graph ("vanilla").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engine.context import Carried
from zoo.engine.generated import Made
from zoo.engine.second_order import exact, first_order
from zoo.engine.sites import Place, Site, site_at
from zoo.errors import AttachError, CombinationError, DerivativeError

Pair = tuple[Tensor, Tensor]
# Verbs of other adapters at the blocks themselves: the run calls the blocks' inside, and what stands around them would be skipped
ALONE = ("before", "after", "watch", "replay", "replace", "run", "prompt", "flow", "query")


@dataclass(eq=False)
class Call:
    """What one forward pass of a run needs to be made again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place  # who was active
    dtype: torch.dtype  # of the tokens
    autocast: tuple[str, bool, torch.dtype] | None
    seed: int | None
    trained: list[list[nn.Parameter]]  # for each block

    def same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether another block was called with these further arguments."""
        mine, theirs = [*self.args, *self.kwargs.items()], [*args, *kwargs.items()]
        return len(mine) == len(theirs) and all(_same(a, b) for a, b in zip(mine, theirs))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other))
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other))


@dataclass(eq=False)
class Reversible:
    """One run. `f` and `g` are "block", "attn", "mlp" (halves) or "module" (the adapter's at that block)."""

    f: str
    g: str
    lam: float
    bet: float
    swap: bool
    every: int = 2
    streams: torch.dtype = torch.float64
    keep: str = "input"
    limit: float = 1e-2
    reverse: bool = True  # false: an ordinary graph
    half: Callable[..., Tensor] | None = None
    sites: list[Site] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    error: float = 0.0  # largest relative error of streams that came back, since `forget`
    _call: Call | None = None
    _pair: Pair | None = None
    _given: Tensor | None = None  # what the block before handed on
    reported: list[float] | None = None  # an empty list asks the next pass without gradients for each block's error
    _trace: list[Pair] = field(default_factory=list)  # the true streams, for that

    def join(self, site: Site, module: nn.Module, half: Callable[..., Tensor]) -> Turn:
        """Take a block in behind the others; returns what runs in the place of its forward."""
        self.sites.append(site)
        self.modules.append(module)
        self.half = half
        return Turn(self, len(self.sites) - 1)

    def release(self) -> None:
        """The forward pass is over, or broke off."""
        self._call = self._pair = self._given = None
        self._trace = []

    # -- the blocks' turns ------------------------------------------------------------------------------------------

    def turn(self, j: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Block j is called. With a graph of its own the whole run is made at the first; the last hands it on."""
        plain = not self.reverse or torch.compiler.is_compiling() or not torch.is_grad_enabled() or exact()
        if j == 0:
            self._start(x, args, kwargs, plain)
        elif not torch.compiler.is_compiling() and (
            self._call is None or x is not self._given or not self._call.same(args, kwargs)
        ):
            self.release()
            raise AttachError(
                f"block '{j}' of a reversible run was not called with what the block before it gave and with the same further "
                "arguments. Something stands between the blocks, or calls them by itself; take the adapter off for that."
            )
        assert self._call is not None and self._pair is not None
        last = j == len(self.sites) - 1
        if plain:
            self._trace += [] if self.reported is None else [self._pair]
            self._pair = self.couple(j, self._pair, self._call)
        if plain or last:
            given = ((self._pair[0] + self._pair[1]) / 2).to(x.dtype)
        else:  # the result stands behind the last block only: who reads tokens in between must not take anything for them
            given = x.new_full((), float("nan")).expand(x.shape)
        self._given = given
        if last:
            if self.reported is not None:
                self._report([*self._trace, self._pair], self._call)
            self.release()
        return given

    def _start(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], plain: bool) -> None:
        self.release()
        compiling = torch.compiler.is_compiling()
        state, device = self.sites[0].state, x.device.type
        drops = not compiling and any(_drops(m) for m in self._all())
        seed = int(torch.randint(2**62, ())) if drops else None
        autocast = None
        if not compiling and torch.amp.is_autocast_available(device):
            autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        trained = [[] if plain else self._trained(j) for j in range(len(self.sites))]
        self._call = call = Call(args, kwargs, state.place(), x.dtype, autocast, seed, trained)
        if plain:
            wide = self.wide(x)
            self._pair = (wide, wide)
            return
        if any(isinstance(v, Tensor) and v.requires_grad for v in (*args, *kwargs.values())):
            raise AttachError("a reversible run gives no gradient to further arguments of its blocks (masks, tables).")
        parameters = list({id(p): p for each in trained for p in each}.values())
        self._pair = _Run.apply(self, call, x, *parameters)

    def wide(self, x: Tensor) -> Tensor:
        """Tokens in the precision of the streams."""
        streams = torch.float32 if x.device.type == "mps" else self.streams  # which has no float64
        return x.to(torch.promote_types(x.dtype, streams))

    def couple(self, j: int, pair: Pair, call: Call) -> Pair:
        """One block forward."""
        x1, x2 = pair
        y1 = self.lam * x1 + self.piece(0, j, x2, call)
        y2 = self.bet * x2 + self.piece(1, j, y1, call)
        return (y2, y1) if self.swap else (y1, y2)

    def piece(self, which: int, j: int, x: Tensor, call: Call) -> Tensor:
        """F (0) or G (1) of block j, with the seed and precision of its forward pass."""
        kind, block = (self.f, self.g)[which], self.sites[j].module
        with _seeded(call.seed, 2 * j + which, x), _autocast(call.autocast):
            tokens = x.to(call.dtype)
            if kind == "module":
                return self.sites[j].state.change(self.modules[j], tokens)
            if kind == "block":
                return self.sites[j].original(tokens, *call.args, **call.kwargs)
            assert self.half is not None
            return self.half(block, kind, tokens, *call.args, **call.kwargs)

    def back(self, j: int, pair: Pair, grads: Pair, call: Call, found: dict[int, Tensor]) -> tuple[Pair, Pair]:
        """From what block j gave and its gradients to what it got and theirs; parameters' gradients go to `found`."""
        y2, y1 = pair if self.swap else pair[::-1]
        d2, d1 = grads if self.swap else grads[::-1]
        value, through = self._differentiated(1, j, y1, d2, call, found)
        x2, d1 = (y2 - value) / self.bet, d1 + through
        value, through = self._differentiated(0, j, x2, d1, call, found)
        return ((y1 - value) / self.lam, x2), (self.lam * d1, self.bet * d2 + through)

    def _differentiated(
        self, which: int, j: int, x: Tensor, grad: Tensor, call: Call, found: dict[int, Tensor]
    ) -> Pair:
        leaf = x.detach().requires_grad_()
        trained = [p for p in call.trained[j] if p.requires_grad]  # an adapter that rests by now takes no gradient
        with torch.enable_grad():
            y = self.piece(which, j, leaf, call)
        through, *of_parameters = torch.autograd.grad(y, [leaf, *trained], grad.to(y.dtype), allow_unused=True)
        for parameter, g in zip(trained, of_parameters):
            if g is not None:
                key = id(parameter)
                found[key] = found[key] + g if key in found else g
        return y.detach(), through

    # -- the way back -----------------------------------------------------------------------------------------------

    def stretch(self, at: range, start: Pair, end: Pair, grads: Pair, call: Call, found: dict[int, Tensor]) -> Pair:
        """Gradients in front of the blocks `at`, by inverting from their end; `start` is what must come back."""
        pair = end
        for j in reversed(at):
            pair, grads = self.back(j, pair, grads, call, found)
        self.measure(pair, start)
        return grads

    def sweep(
        self, at: range, start: Pair, end: Pair | None, grads: Pair, call: Call, found: dict[int, Tensor]
    ) -> Pair:
        """The same for many blocks: the second half from its own start, then the first."""
        if len(at) <= self.every:
            return self.stretch(at, start, self.forward(at, start, call) if end is None else end, grads, call, found)
        middle = self.every * -(-len(at) // self.every // 2)
        between = self.forward(at[:middle], start, call)
        grads = self.sweep(at[middle:], between, end, grads, call, found)
        del between
        return self.sweep(at[:middle], start, None, grads, call, found)

    def forward(self, at: range, pair: Pair, call: Call) -> Pair:
        """Blocks `at`, without a graph."""
        with torch.no_grad():
            for j in at:
                pair = self.couple(j, pair, call)
        return pair

    def measure(self, found: Pair, true: Pair) -> None:
        """Compare streams that came back with the ones that there were.

        Raises:
            DerivativeError: the difference is over the limit; gradients in front would be wrong.
        """
        error = relative(found, true)
        self.error = max(self.error, error)
        if not error <= self.limit:
            raise DerivativeError(
                f"a reversible run came back with a relative error of {error:.2g} (limit {self.limit:g}): gradients in front of "
                f"it would be wrong. Invert fewer blocks in one go (checkpoint=1 or 2 instead of {self.every}; keep='input' or "
                "'segments'), take lam and bet nearer to 1, or streams='float64'. adapter.report(model, *batch) shows "
                "each block's error."
            )

    def _report(self, true: list[Pair], call: Call) -> None:
        """Invert every stretch from its end, and compare each block's streams."""
        blocks = len(self.sites)
        errors, every = [0.0] * blocks, blocks if self.keep == "output" else self.every
        for first in range(0, blocks, every):
            last = min(first + every, blocks)
            pair = true[last]
            for j in reversed(range(first, last)):
                y2, y1 = pair if self.swap else pair[::-1]
                x2 = (y2 - self.piece(1, j, y1, call)) / self.bet
                pair = (y1 - self.piece(0, j, x2, call)) / self.lam, x2
                errors[j] = relative(pair, true[j])
        self.reported = errors

    # -- what runs inside -------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[nn.Module]:
        for site, module in zip(self.sites, self.modules):
            yield from module.modules()
            for part in site.module.modules():
                yield part
                for op in _ops(part):
                    for own in op.modules:
                        yield from own.modules()

    def _trained(self, j: int) -> list[nn.Parameter]:
        """Every parameter that block j's turn may give a gradient to."""
        found = dict.fromkeys(self.modules[j].parameters())
        for part in self.sites[j].module.modules():
            found |= dict.fromkeys(swap.trained for swap in self.sites[j].state.swaps if swap.module is part)
            found |= dict.fromkeys(p for p in part._parameters.values() if p is not None)
            for op in _ops(part):
                inside = [m for root in op.modules for m in root.modules()]
                if any(isinstance(held, (Made, Carried)) for m in inside for held in vars(m).values()):
                    raise CombinationError(
                        f"'{op.owner}' takes tensors from outside of the block to '{op.point}', and a reversible run makes each "
                        "block anew in backward from its own inputs. Use one of them at a time (model.set_active(...))."
                    )
                found |= dict.fromkeys(p for m in op.modules for p in m.parameters())
        return [p for p in found if p.requires_grad]


@dataclass(eq=False)
class Turn:
    """What runs instead of the forward of a run's block."""

    run: Reversible
    at: int

    def __call__(self, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.run.turn(self.at, x, args, kwargs)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Reversible, call: Call, x: Tensor, *parameters: nn.Parameter) -> Pair:
        wide = run.wide(x)
        pair: Pair = (wide, wide)
        kept: list[Tensor] = []
        for j in range(len(run.sites)):
            if run.keep == "segments" and j and j % run.every == 0:
                kept += pair
            pair = run.couple(j, pair, call)
        ctx.run, ctx.call = run, call
        ctx.parameters = [(p, p._version) for p in parameters]
        ctx.save_for_backward(x, *pair, *kept)
        return pair

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        run, call = ctx.run, ctx.call
        x, y1, y2, *kept = ctx.saved_tensors
        if any(p._version != version for p, version in ctx.parameters):
            raise DerivativeError(
                "a parameter was changed between forward and backward, and a reversible run needs those of its forward pass to "
                "make its streams again. Call backward before optimizer.step(), and the model anew after it."
            )
        wide, blocks = x.to(y1.dtype), range(len(run.sites))
        found: dict[int, Tensor] = {}
        start, end, every = (wide, wide), (y1, y2), run.every

        def walk() -> Pair:
            nonlocal end
            if run.keep == "output":
                return run.stretch(blocks, start, end, (grads[0], grads[1]), call, found)
            if run.keep == "input":
                return run.sweep(blocks, start, end, (grads[0], grads[1]), call, found)
            starts: list[Pair] = [start, *zip(kept[::2], kept[1::2])]
            back: Pair = (grads[0], grads[1])
            for k in reversed(range(len(starts))):
                back = run.stretch(blocks[k * every : (k + 1) * every], starts[k], end, back, call, found)
                end = starts[k]
            return back

        d1, d2 = run.sites[0].state.run_at(call.place, walk)
        dx = (d1 + d2).to(x.dtype) if ctx.needs_input_grad[2] else None
        return (None, None, dx, *(found.get(id(p)) for p, _ in ctx.parameters))


def relative(found: Pair, true: Pair) -> float:
    """Norm of the difference by the norm of the true streams, the larger of the two."""
    errors = [float((f - t).norm() / t.norm().clamp_min(1e-30)) for f, t in zip(found, true)]
    return max(e if e == e else float("inf") for e in errors)


def _ops(part: nn.Module) -> list[Any]:
    site = site_at(part)
    if site is None:
        return []
    return [op for op in (*site.inputs, *site.outputs, *site.forwards) if not isinstance(op.fn, Turn)]


def _drops(module: nn.Module) -> bool:
    return module.training and "Drop" in type(module).__name__


@contextmanager
def _seeded(seed: int | None, number: int, x: Tensor) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.default_generator.manual_seed(seed + number)
        if x.is_cuda:
            with torch.cuda.device(x.device):
                torch.cuda.manual_seed(seed + number)
        yield


def _autocast(state: tuple[str, bool, torch.dtype] | None) -> Any:
    if state is None:
        return nullcontext()
    device, enabled, dtype = state
    return torch.autocast(device, dtype, enabled=enabled)
