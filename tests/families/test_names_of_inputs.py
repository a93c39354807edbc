"""A misspelt input is refused by every family; libraries that take any name would run without it."""

from __future__ import annotations

import pytest
import torch

from zoo import registry
from zoo.errors import ConfigError
from zoo.table import tiny_model


@pytest.mark.parametrize("family", [f for f in registry.families() if registry.family(f).tiny])
def test_misspelt(family: str) -> None:
    model, batch = tiny_model(family)
    with torch.no_grad(), pytest.raises((ConfigError, TypeError), match="atention_mask"):
        model.eval()(*batch, atention_mask=torch.ones(1))
    for want in [n for n in ("pooled", "tokens") if n in model.family.gives and (n != "pooled" or model.family.pools)]:
        with torch.no_grad(), pytest.raises((ConfigError, TypeError), match="atention_mask"):
            model.outputs(*batch, want=(want,), atention_mask=torch.ones(1))
