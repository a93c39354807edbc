"""The selective scan of `vision.families.groupmamba.selective_scan` as a Triton kernel, for CUDA GPUs.

One program takes a block of channels of one group and one sequence, and goes through the tokens in tiles of `TOKENS`; within a
tile the recurrence is an associative scan over (decay, input) pairs, with the state of the tile before carried in. Forward keeps
the state in front of every tile (1 / TOKENS of all states); backward goes through the tiles from the last to the first, computes
h again from there, and runs the mirrored recurrence for its gradient:

    g_t = grad_t C_t + a_{t+1} g_{t+1}      dB_t = sum_d g_t x_t      dC_t = sum_d grad_t h_t      d(dt A)_t = g_t a_t h_{t-1}

with x = dt u and a_t h_{t-1} = h_t - x_t B_t. Sums over channels are over one program's block; the blocks are summed in torch.
With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly, which is how they are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from zoo.engine.second_order import first_order

TILE = 1024  # numbers of a tile: tokens x channels x states
TOKENS = 32


@triton.jit
def _join(a1, b1, a2, b2):  # type: ignore[no-untyped-def]
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):  # type: ignore[no-untyped-def]
    size = raw
    if SOFTPLUS:
        e = tl.exp(tl.minimum(raw, 20.0))
        w = 1.0 + e  # log(w) e / (w - 1) is log1p(e) to full precision, also where 1 + e is rounded
        small = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
        size = tl.where(raw > 20.0, raw, small)
    return size


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, y_ptr, carry_ptr, length, dim, groups, per, states, tiles,
    SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(per, BD)
    group = tl.program_id(1) // blocks
    inside = (tl.program_id(1) % blocks) * BD + tl.arange(0, BD)
    d, on_d = group * per + inside, inside < per
    n = tl.arange(0, BN)
    on_n = n < states
    on_dn = on_d[:, None] & on_n[None, :]
    a_coef = tl.load(a_ptr + d[:, None] * states + n[None, :], on_dn, other=0.0).to(tl.float32)
    h = tl.zeros((BD, BN), tl.float32)
    steps = tl.arange(0, BT)
    for tile in range(tiles):
        tl.store(carry_ptr + ((batch * tiles + tile) * dim + d[:, None]) * states + n[None, :], h, on_dn)
        t = tile * BT + steps
        on_td = (t < length)[:, None] & on_d[None, :]
        on_tn = (t < length)[:, None] & on_n[None, :]
        at = (batch * length + t)[:, None] * dim + d[None, :]
        at_n = ((batch * length + t)[:, None] * groups + group) * states + n[None, :]
        u = tl.load(u_ptr + at, on_td, other=0.0).to(tl.float32)
        raw = tl.load(delta_ptr + at, on_td, other=0.0).to(tl.float32)
        if BIAS:
            raw += tl.load(bias_ptr + d, on_d, other=0.0).to(tl.float32)[None, :]
        dt = tl.where(on_td, _step_size(raw, SOFTPLUS), 0.0)  # behind the end: decay 1, input 0
        b = tl.load(b_ptr + at_n, on_tn, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + at_n, on_tn, other=0.0).to(tl.float32)
        decay = tl.exp(dt[:, :, None] * a_coef[None, :, :])
        x = (dt * u)[:, :, None] * b[:, None, :]
        since, own = tl.associative_scan((decay, x), 0, _join)
        states_t = own + since * h[None, :, :]
        y = tl.sum(states_t * c[:, None, :], axis=2)
        if SKIP:
            y += u * tl.load(d_ptr + d, on_d, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + at, y, on_td)
        h = tl.sum(tl.where((steps == BT - 1)[:, None, None], states_t, 0.0), axis=0)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, carry_ptr, grad_ptr, du_ptr, dd_ptr, da_ptr, db_ptr, dc_ptr,
    length, dim, groups, per, states, tiles,
    SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(per, BD)
    group = tl.program_id(1) // blocks
    inside = (tl.program_id(1) % blocks) * BD + tl.arange(0, BD)
    d, on_d = group * per + inside, inside < per
    n = tl.arange(0, BN)
    on_n = n < states
    on_dn = on_d[:, None] & on_n[None, :]
    a_coef = tl.load(a_ptr + d[:, None] * states + n[None, :], on_dn, other=0.0).to(tl.float32)
    steps = tl.arange(0, BT)
    later = tl.zeros((BD, BN), tl.float32)  # gradient of the state at the first token of the tile behind
    da = tl.zeros((BD, BN), tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        h = tl.load(carry_ptr + ((batch * tiles + tile) * dim + d[:, None]) * states + n[None, :], on_dn, other=0.0)
        t = tile * BT + steps
        on_td = (t < length)[:, None] & on_d[None, :]
        on_next = (t + 1 < length)[:, None] & on_d[None, :]
        on_tn = (t < length)[:, None] & on_n[None, :]
        at = (batch * length + t)[:, None] * dim + d[None, :]
        at_n = ((batch * length + t)[:, None] * groups + group) * states + n[None, :]
        u = tl.load(u_ptr + at, on_td, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, on_td, other=0.0).to(tl.float32)
        raw = tl.load(delta_ptr + at, on_td, other=0.0).to(tl.float32)
        raw_next = tl.load(delta_ptr + at + dim, on_next, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + d, on_d, other=0.0).to(tl.float32)[None, :]
            raw += bias
            raw_next += bias
        dt = tl.where(on_td, _step_size(raw, SOFTPLUS), 0.0)
        dt_next = tl.where(on_next, _step_size(raw_next, SOFTPLUS), 0.0)
        b = tl.load(b_ptr + at_n, on_tn, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + at_n, on_tn, other=0.0).to(tl.float32)
        x = (dt * u)[:, :, None] * b[:, None, :]
        since, own = tl.associative_scan((tl.exp(dt[:, :, None] * a_coef[None, :, :]), x), 0, _join)
        states_t = own + since * h[None, :, :]
        decay_next = tl.exp(dt_next[:, :, None] * a_coef[None, :, :])
        until, mine = tl.associative_scan((decay_next, grad[:, :, None] * c[:, None, :]), 0, _join, reverse=True)
        g = mine + until * later[None, :, :]
        later = tl.sum(tl.where((steps == 0)[:, None, None], g, 0.0), axis=0)
        # One row of db and dc for each block of channels: blocks of all groups side by side
        at_block = ((batch * length + t)[:, None] * (groups * blocks) + tl.program_id(1)) * states + n[None, :]
        tl.store(dc_ptr + at_block, tl.sum(grad[:, :, None] * states_t, axis=1), on_tn)
        tl.store(db_ptr + at_block, tl.sum(g * (dt * u)[:, :, None], axis=1), on_tn)
        dx = tl.sum(g * b[:, None, :], axis=2)
        moved = g * (states_t - x)
        da += tl.sum(moved * dt[:, :, None], axis=0)
        ddt = tl.sum(moved * a_coef[None, :, :], axis=2) + dx * u
        if SOFTPLUS:
            ddt *= 1.0 / (1.0 + tl.exp(-raw))
        du = dx * dt
        if SKIP:
            du += grad * tl.load(d_ptr + d, on_d, other=0.0).to(tl.float32)[None, :]
        tl.store(du_ptr + at, du, on_td)
        tl.store(dd_ptr + at, ddt, on_td)
    tl.store(da_ptr + (batch * dim + d[:, None]) * states + n[None, :], da, on_dn)


class _Launch:
    """Sizes of the grid and of the tiles for one problem."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, skip: bool, bias: bool, softplus: bool) -> None:
        (self.batch, length, dim), groups, states = u.shape, B.shape[2], A.shape[1]
        per = dim // groups
        wide = triton.next_power_of_2(states)
        channels = max(1, min(triton.next_power_of_2(per), TILE // TOKENS // wide, 32))
        self.blocks = groups * triton.cdiv(per, channels)
        self.tiles = triton.cdiv(length, TOKENS)
        self.numbers = (length, dim, groups, per, states, self.tiles)
        self.constants = {"SKIP": skip, "BIAS": bias, "SOFTPLUS": softplus, "BT": TOKENS, "BD": channels, "BN": wide}

    @property
    def grid(self) -> tuple[int, int]:
        return self.batch, self.blocks


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, D, bias, softplus = inputs
        u, delta, A, B, C = (t.contiguous() for t in tensors)
        launch = _Launch(u, A, B, D is not None, bias is not None, softplus)
        y = torch.empty_like(u, dtype=torch.float32)
        carry = u.new_empty(launch.batch, launch.tiles, u.shape[2], A.shape[1], dtype=torch.float32)
        with torch.cuda.device_of(u):  # Triton launches on the current device
            _forward[launch.grid](
                u, delta, A, B, C, u if D is None else D, u if bias is None else bias, y, carry, *launch.numbers,
                **launch.constants,
            )  # fmt: skip
        ctx.save_for_backward(u, delta, A, B, C, D, bias, carry)
        ctx.launch = launch
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        u, delta, A, B, C, D, bias, carry = ctx.saved_tensors
        launch, grad = ctx.launch, grad.contiguous()
        wide = {"dtype": torch.float32, "device": u.device}
        du, ddelta = torch.empty(u.shape, **wide), torch.empty(u.shape, **wide)
        dA = torch.empty(launch.batch, *A.shape, **wide)
        dB, dC = (torch.empty(*u.shape[:2], launch.blocks, A.shape[1], **wide) for _ in range(2))
        with torch.cuda.device_of(u):
            _backward[launch.grid](
                u, delta, A, B, C, u if D is None else D, u if bias is None else bias, carry, grad, du, ddelta, dA, dB, dC,
                *launch.numbers, **launch.constants,
            )  # fmt: skip
        dB, dC = (part.unflatten(2, (B.shape[2], -1)).sum(dim=3) for part in (dB, dC))
        dD = None if D is None else (grad * u).sum(dim=(0, 1))
        dbias = None if bias is None else ddelta.sum(dim=(0, 1))
        grads = (du, ddelta, dA.sum(dim=0), dB, dC, dD, dbias)
        inputs = (u, delta, A, B, C, D, bias)
        return (*(g if g is None else g.to(t.dtype) for g, t in zip(grads, inputs)), None)


def selective_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
) -> Tensor:
    """As `vision.families.groupmamba.selective_scan.selective_scan`, on a GPU; y (batch, tokens, d) in float32."""
    return _TritonScan.apply(u, delta, A, B, C, D, delta_bias, softplus)  # type: ignore[no-any-return]


def self_test(plain: type[torch.autograd.Function], device: str = "cuda") -> None:
    """Run both kernels on a small problem against the plain form, which is handed in.

    Raises:
        RuntimeError: they give other numbers.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 40, 8)] * 2 + [(8, 2)] + [(2, 40, 2, 2)] * 2 + [(8,)] * 2
    tensors = [torch.randn(s, generator=generator).to(device) for s in shapes]
    tensors[2] = -tensors[2].exp()
    found = []
    for function in (_TritonScan, plain):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.enable_grad():
            y = function.apply(*leaves, True)
            y.square().sum().backward()
        found.append([y.detach(), *(t.grad for t in leaves)])
    for one, other in zip(*found):
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-3):
            raise RuntimeError("the Triton scan and the plain one give different numbers")
