"""A change of low rank with a few free entries beside it (for `zoo.adapters.dsee`).

    y <- y + s (B A + S) x         A (r, i), B (o, r), S: N numbers at fixed places

The entries read N columns of x: `y[..., o_k] += s S_k x[..., i_k]`, so the weight itself is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.parts.low_rank import LowRank
from zoo.engine.second_order import exact
from zoo.errors import MismatchError

__all__ = ["SparseLowRank"]

STD = 0.02  # of A
Part = tuple["SparseLowRank", int, int]


class SparseLowRank(LowRank):
    """`x (..., dim_in) -> s (B A + S) x (..., dim_out)`; without any entry of S left, its two tensors are None."""

    entry_index: Tensor | None

    def __init__(self, dim_in: int, dim_out: int, rank: int, scale: float, places: Tensor, name: str) -> None:
        super().__init__(dim_in, dim_out, rank, scale)
        nn.init.normal_(self.lora_a, std=STD)
        self.register_buffer("entry_index", places if len(places) else None)  # (N,) in the flat S
        self.entry_value = nn.Parameter(torch.zeros(len(places))) if len(places) else None
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        y = super().forward(x)
        return y if self.entry_value is None else _add_entries(((self, 0, y.shape[-1]),), x, y)

    def update(self) -> Tensor:
        """B A + S (dim_out, dim_in)."""
        update = self.lora_b @ self.lora_a
        if self.entry_value is None:
            return update
        return update.flatten().index_add(0, self.entry_index, self.entry_value).view_as(update)  # type: ignore[arg-type]

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in)."""
        return self.scale * self.update()

    @staticmethod
    def add_group(parts: tuple[Part, ...], x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """`y[..., start:stop] += delta(x)` for all parts of one projection at once; y is changed in place and returned."""
        y = LowRank.add_group(parts, x, y)  # type: ignore[arg-type]
        sparse = tuple(part for part in parts if part[0].entry_value is not None)
        return _add_entries(sparse, x, y) if sparse else y

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        index = state.get(f"{prefix}entry_index")
        size = len(self.lora_b) * self.lora_a.shape[1]
        if index is not None and len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
            raise MismatchError(
                f"'{prefix}entry_index' points outside of the {size:,} weights. Take the adapter as it was saved."
            )
        super()._load_from_state_dict(state, prefix, *args)


def _add_entries(parts: tuple[Part, ...], x: Tensor, y: Tensor) -> Tensor:
    """`y[..., o_k] += s S_k x[..., i_k]` for all entries; y is changed in place where that can be."""
    width = x.shape[-1]
    places: Any = [m.entry_index for m, _, _ in parts]
    values: Any = [m.scale * m.entry_value for m, _, _ in parts]  # type: ignore[operator]
    rows = torch.cat([p // width + start for p, (_, start, _) in zip(places, parts)])
    columns = torch.cat([p % width for p in places])
    picked = x.index_select(-1, columns).to(y.dtype) * torch.cat(values).to(y.dtype)
    if torch.compiler.is_compiling() or x.device.type == "meta" or exact():
        return y.index_add(-1, rows, picked)
    return y.index_add_(-1, rows, picked)
