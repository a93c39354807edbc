"""Exported with a batch of any size, and traced: the same numbers as the model, at other sizes than the example's too."""

from __future__ import annotations

import pytest
import torch
from method_models import FAMILIES, METHODS, attach, bare, images, shake

import zoo
from zoo.table import tiny_model

PLACES = [(f, m) for m in ("lora", "vpt", "prefix", "spt", "bitfit") for f in ("vit", "swin")]
PLACES += [("vit", "unipelt")]  # of prefixes with a number for each sample
PLACES += [(f, m) for f in ("clip", "ast") for m in ("lora", "vpt", "prefix")]


def made(family: str, method: str) -> tuple[zoo.Model, tuple[torch.Tensor, ...]]:
    if family in FAMILIES:
        model, batch = bare(family), (images()[:2],)
        attach(model, method)
    else:
        model, batch = tiny_model(family)
        model.add_adapter(zoo.adapter(method, **METHODS[method].trial))
    shake(model, method)
    return model.eval(), batch


@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize(("family", "method"), PLACES)
def test_any_batch(family: str, method: str, how: str) -> None:
    """Export was specialised to the example's batch (`len` of a tensor), and LoRA's product in place could not be traced."""
    model, batch = made(family, method)
    with torch.no_grad():
        if how == "export":
            shapes = {"inputs": tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in batch)}
            found = torch.export.export(model, batch, dynamic_shapes=shapes, strict=False).module()
        else:
            found = torch.jit.trace(model, batch, check_trace=False)
        for size in (1, 2, 5):
            given = tuple(torch.cat([x, x.flip(0), x])[:size] for x in batch)
            torch.testing.assert_close(found(*given), model(*given), rtol=1e-4, atol=1e-5)
