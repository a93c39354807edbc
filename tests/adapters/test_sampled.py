"""Single entries of a product, against those of the whole product."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from zoo.adapters.parts import sampled as module
from zoo.adapters.parts.sampled import sampled


def places(count: int) -> Tensor:
    """Of (5, 7), in no order, the first one twice: two adapters may have the same entry."""
    order = torch.randperm(35, generator=torch.Generator().manual_seed(1))[:count]
    return torch.cat([order, order[:1]]).int()


@pytest.mark.parametrize("way", ["sampled", "whole", "gathered"])
@pytest.mark.parametrize("count", [1, 9, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entries_of_a_product(way: str, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE", 0.0 if way == "whole" else 2.0)
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: way == "gathered")
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(11, n, generator=draw, dtype=torch.float64).to(dtype) for n in (5, 7))
    index = places(count)
    found = sampled(
        a, b, index, torch.empty(count + 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    )
    whole = a.double().t() @ b.double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2 if way == "gathered" else 1e-5}[dtype]
    torch.testing.assert_close(found.double(), whole.flatten()[index.long()], rtol=0, atol=tolerance)


def test_torch_has_nothing_to_say_of_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(torch.ones(3, 40), torch.ones(3, 40), torch.tensor([0]), torch.empty(1))
