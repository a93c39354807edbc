"""Selective scan: a linear recurrence over tokens whose decay depends on the token, computed for all tokens in parallel.

For every channel d and state n, with `dt = softplus(delta + delta_bias)`,

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = sum_n C_t h_t + D u_t        h_0 = 0

u, delta, y (batch, tokens, d); A (d, n) negative; B, C (batch, tokens, groups, n), channel i reads group i // (d / groups);
D, delta_bias (d,).

How: two steps `h -> a h + b` are one such step, (a2 a1, a2 b1 + b2). So tokens are joined in chunks of two, the chunks in chunks
of two, and so on, and the way back fills in the tokens between: 2 log2(tokens) vector operations on arrays that halve each
time, 3 multiply-adds for each token in all. There is no loop over tokens, the work is linear in their number, and the
only products formed are of decays in [0, 1], so nothing overflows, however long the sequence or large delta is.

In memory: backward keeps the inputs and computes h again. Long sequences are worked on in segments that fit a processor's cache,
and states one after another, so both passes need a few small arrays beside the inputs and the output. On a CUDA GPU a Triton
kernel does the same (`vision.families.groupmamba.selective_scan_triton`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.engine.second_order import exact, first_order
from zoo.errors import ConfigError

WORKING = 2**19  # numbers of one array that is worked on at a time
SHORTEST = 16  # tokens of a segment, at least
_kernel: Callable[..., Tensor] | bool | None = True  # True: not looked for yet


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
) -> Tensor:
    """The recurrence above, in float32 at least; `softplus=False` takes `delta + delta_bias` as it is.

    Args:
        u, delta: (batch, tokens, d). A: (d, n). B, C: (batch, tokens, groups, n). D, delta_bias: (d,).

    Returns:
        y (batch, tokens, d), in float32, or float64 if u is.

    Raises:
        ConfigError: the shapes do not fit together.
    """
    _check(u, delta, A, B, C, D, delta_bias)
    if torch.compiler.is_compiling() or exact():
        return _plain(u, delta, A, B, C, D, delta_bias, softplus)
    if u.is_cuda and u.dtype != torch.float64:
        kernel = _triton()
        if kernel is not None:
            return kernel(u, delta, A, B, C, D, delta_bias, softplus)
    return _Scan.apply(u, delta, A, B, C, D, delta_bias, softplus)  # type: ignore[no-any-return]


def sequential_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
) -> Tensor:
    """The same, token by token as the recurrence is written: the reference for tests and benchmarks."""
    u, dt, A, B, C = _prepare(u, delta, A, B, C, delta_bias, softplus)
    dim = u.shape[2]
    decay = torch.exp(dt[..., None] * A).unbind(dim=1)  # indexing would make backward quadratic in the tokens
    inputs = ((dt * u)[..., None] * _spread(B, dim)).unbind(dim=1)
    h = u.new_zeros(u.shape[0], dim, A.shape[1])
    steps = []
    for a, b, c in zip(decay, inputs, _spread(C, dim).unbind(dim=1)):
        h = a * h + b
        steps.append((h * c).sum(dim=-1))
    y = torch.stack(steps, dim=1)
    return y if D is None else y + u * D.to(y.dtype)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None) -> None:
    shapes = {"u": u.shape, "delta": delta.shape, "A": A.shape, "B": B.shape, "C": C.shape}
    fits = u.ndim == 3 and u.shape == delta.shape and A.ndim == 2 and len(A) == u.shape[2]
    fits = fits and B.ndim == 4 and B.shape == C.shape and B.shape[:2] == u.shape[:2] and B.shape[3] == A.shape[1]
    fits = fits and u.shape[2] % B.shape[2] == 0 and all(v is None or v.shape == (u.shape[2],) for v in (D, bias))
    if not fits:
        raise ConfigError(
            f"selective_scan got {', '.join(f'{k} {tuple(v)}' for k, v in shapes.items())}; expected u and delta (batch, tokens, "
            "d), A (d, n), B and C (batch, tokens, groups, n) with d a multiple of groups, D and delta_bias (d,)."
        )


def _triton() -> Callable[..., Tensor] | None:
    """The GPU kernel, or None where Triton is missing or cannot run it; tried once, on a small problem."""
    global _kernel
    if _kernel is True:
        _kernel = None
        try:
            from vision.families.groupmamba.selective_scan_triton import selective_scan_triton, self_test

            self_test(_Scan)
            _kernel = selective_scan_triton
        except Exception as error:  # a compiler has many ways to fail, and the plain form gives the same numbers
            if not isinstance(error, ImportError):
                warnings.warn(f"the Triton scan cannot be used, plain torch is: {error}", stacklevel=3)
    return None if isinstance(_kernel, bool) else _kernel


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, softplus: bool
) -> tuple[Tensor, ...]:
    """All in the precision of the computation; delta with its bias and softplus."""
    dtype = _wide(u.dtype)
    u, dt, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if bias is not None:
        dt = dt + bias.to(dtype)
    return u, (F.softplus(dt) if softplus else dt), A, B, C


def _spread(groups: Tensor, dim: int) -> Tensor:
    """(..., groups, n) -> (..., dim, n): what each channel reads."""
    return groups.repeat_interleave(dim // groups.shape[-2], dim=-2)


def _times(x: Tensor, groups: Tensor) -> Tensor:
    """x (b, t, d) times groups (b, t, g), each for its d / g channels."""
    return (x.unflatten(2, (groups.shape[2], -1)) * groups[..., None]).flatten(2)


def _sums(x: Tensor, groups: int) -> Tensor:
    """(b, t, d) -> (b, t, g): the sum over the channels of each group."""
    return x.unflatten(2, (groups, -1)).sum(dim=3)


# -- the recurrence -----------------------------------------------------------------------------------------------------


def scan_(a: Tensor, b: Tensor) -> None:
    """`b_t <- b_t + a_t b_{t-1}` from the first token on, in place; a, b (batch, tokens, d). a is not changed."""
    length = b.shape[1]
    if length < 2:
        return
    pairs = length // 2 * 2
    second = b[:, 1::2]
    second.addcmul_(a[:, 1::2], b[:, :pairs:2])
    scan_(a[:, :pairs:2] * a[:, 1::2], second)
    b[:, 2::2].addcmul_(a[:, 2::2], second[:, : (length - 1) // 2])


def scan_back_(a: Tensor, b: Tensor) -> None:
    """`b_t <- b_t + a_t b_{t+1}` from the last token back, in place: the mirror image of `scan_`."""
    length = b.shape[1]
    if length < 2:
        return
    odd = length % 2
    second = b[:, odd:-1:2]
    second.addcmul_(a[:, odd:-1:2], b[:, odd + 1 :: 2])
    scan_back_(a[:, odd:-1:2] * a[:, odd + 1 :: 2], second)
    b[:, 1 - odd : -2 : 2].addcmul_(a[:, 1 - odd : -2 : 2], second[:, 1 - odd :])


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """`scan_` in operations that autograd and the compiler follow."""
    length = b.shape[1]
    if length < 2:
        return b
    pairs = length // 2 * 2
    a2, b1 = a[:, 1::2], b[:, :pairs:2]
    second = _scan(a[:, :pairs:2] * a2, b[:, 1::2] + a2 * b1)
    before = torch.cat([torch.zeros_like(b[:, :1]), second[:, : (length - 1) // 2]], dim=1)
    first = b[:, ::2] + a[:, ::2] * before
    both = torch.stack([first[:, : length // 2], second], dim=2).flatten(1, 2)
    return both if length == pairs else torch.cat([both, first[:, -1:]], dim=1)


def _plain(*inputs: Any) -> Tensor:
    """The scan of all that `selective_scan` takes, without a backward of its own: for the compiler and second derivatives."""
    u, delta, A, B, C, D, bias, softplus = inputs
    u, dt, A, B, C = _prepare(u, delta, A, B, C, bias, softplus)
    x = dt * u
    y = torch.zeros_like(u) if D is None else u * D.to(u.dtype)
    for n in range(A.shape[1]):
        y = y + _times(_scan(torch.exp(dt * A[:, n]), _times(x, B[..., n])), C[..., n])
    return y


def _segments(u: Tensor) -> list[slice]:
    """Tokens that are worked on at a time."""
    size = max(SHORTEST, WORKING // max(1, u.shape[0] * u.shape[2]))
    return [slice(start, start + size) for start in range(0, u.shape[1], size)]


def _states(dt: Tensor, x: Tensor, rate: Tensor, b: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states (batch, tokens, d) of a segment, for one n, from the state (batch, d) in front of it."""
    a, h = (dt * rate).exp_(), _times(x, b)
    h[:, 0].addcmul_(a[:, 0], before)
    scan_(a, h)
    return a, h


class _Scan(torch.autograd.Function):
    """One segment and one state after another: h is computed in forward, and again in backward, and never kept.

    What is kept besides the inputs is the state in front of each segment, (segments, batch, d, n).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        u, delta, A, B, C, D, bias, softplus = inputs
        segments, rates = _segments(u), A.to(_wide(u.dtype))
        y = torch.empty_like(u, dtype=rates.dtype, memory_format=torch.contiguous_format)
        states = y.new_zeros(len(segments) + 1, u.shape[0], *A.shape)
        for k, at in enumerate(segments):
            part, dt, _, b, c = _prepare(u[:, at], delta[:, at], A, B[:, at], C[:, at], bias, softplus)
            x, out = dt * part, y[:, at]
            if D is None:
                out.zero_()
            else:
                torch.mul(part, D.to(part.dtype), out=out)
            for n in range(A.shape[1]):
                _, h = _states(dt, x, rates[:, n], b[..., n], states[k, ..., n])
                states[k + 1, ..., n] = h[:, -1]
                out += _times(h, c[..., n])
        ctx.softplus = softplus
        ctx.save_for_backward(u, delta, A, B, C, D, bias, states[:-1].clone() if len(segments) > 1 else None)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        *inputs, states = ctx.saved_tensors
        u, delta, A, B, C, D, bias = inputs
        rates, segments, groups = A.to(_wide(u.dtype)), _segments(u), B.shape[2]
        du, ddelta = (torch.empty(u.shape, dtype=rates.dtype, device=u.device) for _ in range(2))
        dB, dC = (torch.empty(B.shape, dtype=rates.dtype, device=u.device) for _ in range(2))
        dA = torch.zeros_like(rates)
        dD, dbias = None if D is None else rates.new_zeros(len(A)), None if bias is None else rates.new_zeros(len(A))
        later = rates.new_zeros(u.shape[0], *A.shape)  # what the segment behind adds to the gradient of the last state
        if states is None:
            states = torch.zeros_like(later)[None]
        for k, at in reversed(list(enumerate(segments))):
            part, dt, _, b, c = _prepare(u[:, at], delta[:, at], A, B[:, at], C[:, at], bias, ctx.softplus)
            x, out = dt * part, grad[:, at].to(rates.dtype)
            dx, ddt = torch.zeros_like(part), torch.zeros_like(part)
            for n in range(A.shape[1]):
                before = states[k, ..., n]
                a, h = _states(dt, x, rates[:, n], b[..., n], before)
                dC[:, at, :, n] = _sums(out * h, groups)
                g = _times(out, c[..., n])  # of h_t, from y_t alone; then also from all that come later
                g[:, -1] += later[..., n]
                scan_back_(torch.cat([a[:, 1:], a[:, :1]], dim=1), g)  # the last factor is not used
                torch.mul(a[:, 0], g[:, 0], out=later[..., n])
                dB[:, at, :, n] = _sums(g * x, groups)
                dx += _times(g, b[..., n])
                a[:, 1:] *= h[:, :-1]  # d a_t = g_t h_{t-1}, and a itself is the derivative of exp
                a[:, 0] *= before
                a *= g
                ddt.addcmul_(a, rates[:, n])
                dA[:, n] += (a * dt).sum(dim=(0, 1))
            torch.mul(dx, dt, out=du[:, at])
            if D is not None and dD is not None:
                du[:, at].addcmul_(out, D.to(out.dtype))
                dD += (out * part).sum(dim=(0, 1))
            ddt.addcmul_(dx, part)
            if ctx.softplus:
                raw = delta[:, at].to(rates.dtype)
                ddt *= torch.sigmoid(raw if bias is None else raw + bias.to(rates.dtype))
            if dbias is not None:
                dbias += ddt.sum(dim=(0, 1))
            ddelta[:, at] = ddt
        grads = (du, ddelta, dA, dB, dC, dD, dbias)
        return (*(g if g is None else g.to(t.dtype) for g, t in zip(grads, inputs)), None)
