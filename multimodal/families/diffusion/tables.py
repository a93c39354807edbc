"""Rows that the tables of diffusers' classes are put together of: an attention, an MLP, the branches that they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.points.rows import Row

BLOCK = Row("block", "block", "", "")


def attention(name: str, path: str, role: str = "attn", product: bool = True) -> tuple[Row, ...]:
    """Projections, norms of queries and keys, the product (where it can be extended), the output projection."""
    rows = (
        Row("linear", "q", f"{name}.q", f"{path}.to_q"),
        Row("linear", "k", f"{name}.k", f"{path}.to_k"),
        Row("linear", "v", f"{name}.v", f"{path}.to_v"),
        Row("norm", "norm", f"{name}.q_norm", f"{path}.norm_q"),
        Row("norm", "norm", f"{name}.k_norm", f"{path}.norm_k"),
    )
    point = (Row("attention", role, f"{name}.product", path),) if product else ()
    return (*rows, *point, Row("linear", "o", f"{name}.o", f"{path}.to_out.0"))


def added(path: str = "attn", name: str = "text.attn") -> tuple[Row, ...]:
    """The text's own projections in an attention over both."""
    return (
        Row("linear", "q", f"{name}.q", f"{path}.add_q_proj"),
        Row("linear", "k", f"{name}.k", f"{path}.add_k_proj"),
        Row("linear", "v", f"{name}.v", f"{path}.add_v_proj"),
        Row("norm", "norm", f"{name}.q_norm", f"{path}.norm_added_q"),
        Row("norm", "norm", f"{name}.k_norm", f"{path}.norm_added_k"),
        Row("linear", "o", f"{name}.o", f"{path}.to_add_out"),
    )


def branch(name: str, path: str, role: str, stream: str = "") -> Row:
    """A branch that is a module: what enters it (behind norm and modulation) and what it gives (in front of the gate)."""
    return Row("sublayer", role, name, path, entry=f"{path}:input", exit=f"{path}:output", stream=stream)


def mlp(name: str, path: str, stream: str = "", gated: bool = False) -> tuple[Row, ...]:
    """The library's `FeedForward`; `gated`: its first projection is up and gate in one (`SwiGLU`, `GEGLU`)."""
    first = f"{path}.net.0.proj"
    up: tuple[Row, ...] = (Row("linear", "up", f"{name}.up", first),)
    if gated:
        up = (
            Row("linear", "up", f"{name}.up", first, part=(0, 2)),
            Row("linear", "gate", f"{name}.gate", first, part=(1, 2)),
        )
    return (*up, Row("linear", "down", f"{name}.down", f"{path}.net.2"), branch(name, path, "mlp", stream))


def norms(*pairs: tuple[str, str]) -> tuple[Row, ...]:
    """Norms with parameters: (name, path) each."""
    return tuple(Row("norm", "norm", name, path) for name, path in pairs)


# -- packing and places ---------------------------------------------------------------------------------------------------


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C): two by two latents in one token."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, latents: Tensor) -> Tensor:
    """The reverse, to the height and width of the latents."""
    height, width = (n // 2 for n in latents.shape[-2:])
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


def places(height: int, width: int, like: Tensor, first: float = 0.0, start: float = 0.0) -> Tensor:
    """(height * width, 3): a constant, the row and the column of every token, counted from `start`."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) + start for n in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.full_like(grid[:, :1], first), grid], dim=1)


def counted(length: int, like: Tensor) -> Tensor:
    """(length, 3): a zero, and the place of every word twice."""
    count = torch.arange(length, device=like.device, dtype=like.dtype)
    return torch.stack([torch.zeros_like(count), count, count], dim=1)
